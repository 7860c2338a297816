"""Machine translation of names: territories, languages, currencies and units in Unicode CLDR.

The Babel package carries CLDR, so nothing is downloaded. Every name was written by a human translator. Splits
are made by hash of whole groups: two names are in one group if they name the same thing (a currency and its
plural too), or if they are written alike in one language, in any of the pairs. So no name, and no translation
of a name, is in two splits.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..record import Record
from .splits import SPLITS, Groups, check_split

PAIRS = ("es-pt", "es-it")
REWARD, METRICS, OPTIONS = "chrf", ("chrf", "bleu"), ("pairs",)


class _Name(NamedTuple):
    pair: str
    kind: str
    key: str
    source: str
    target: str


def load(pairs: Sequence[str] = PAIRS, split: str = "train") -> list[Record]:
    """The records of one split, in a fixed order.

    A prompt is `es>pt:Alemania=`, its reference `Alemanha`; metadata holds pair, kind and CLDR key. Names
    that are written alike in both languages are left out, since copying them is no translation. Of several
    translations of one name within a pair (a language and a territory may share a name) the first is kept.
    The split of a name depends on the set of `pairs`, not on their order.

    Args:
        pairs: "source-target" with CLDR language codes, such as "es-pt", "en-de", "uk-sr_Latn".
        split: "train" | "validation" | "test", about 72%, 10% and 18% of the names.
    Raises: ValueError for an unknown split, a pair that is not two different known languages, or no pairs.
    Source: Unicode CLDR as in Babel (https://babel.pocoo.org).
    """
    check_split(split)
    if isinstance(pairs, str) or not pairs:
        raise ValueError(f"pairs must be a sequence of at least one 'source-target', got {pairs!r}")
    by_pair = _split_names(tuple(sorted(set(pairs))))
    return [_record(name) for pair in dict.fromkeys(pairs) for name in by_pair[pair][split]]


def _record(name: _Name) -> Record:
    # No blanks around the name: its first word is then the same tokens in prompt and answer.
    prompt = f"{name.pair.replace('-', '>')}:{name.source}="
    return Record(prompt, name.target, {"pair": name.pair, "kind": name.kind, "key": name.key})


@functools.lru_cache(maxsize=8)
def _split_names(pairs: tuple[str, ...]) -> dict[str, dict[str, list[_Name]]]:
    names = [name for pair in pairs for name in _names(pair)]
    groups = Groups()
    for name in names:
        source, target = name.pair.split("-")
        item = f"{name.kind}/{name.key}"
        groups.join(item, f"{source}:{_normal(name.source)}")
        groups.join(item, f"{target}:{_normal(name.target)}")
    split_of = groups.splits()
    result: dict[str, dict[str, list[_Name]]] = {pair: {split: [] for split in SPLITS} for pair in pairs}
    seen = set()
    for name in names:
        place = (name.pair, _normal(name.source))
        if place in seen or _normal(name.source) == _normal(name.target):
            continue
        seen.add(place)
        result[name.pair][split_of[f"{name.kind}/{name.key}"]].append(name)
    return result


def _names(pair: str) -> Iterator[_Name]:
    languages = pair.split("-")
    if len(languages) != 2 or languages[0] == languages[1]:
        raise ValueError(f"pairs must hold 'source-target' of two different languages, got {pair!r}")
    source, target = (_vocabulary(language) for language in languages)
    for kind_key_form in sorted(source.keys() & target.keys()):
        yield _Name(pair, *kind_key_form[:2], source[kind_key_form], target[kind_key_form])


@functools.lru_cache(maxsize=16)
def _vocabulary(language: str) -> dict[tuple[str, str, str], str]:
    """(kind, CLDR key, form) -> name."""
    locale = _locale(language)
    from babel.numbers import get_currency_name

    names: dict[tuple[str, str, str], Any] = {}
    names.update({("territory", key, ""): name for key, name in locale.territories.items()})
    names.update({("language", key, ""): name for key, name in locale.languages.items()})
    for key, name in locale.currencies.items():
        names["currency", key, ""] = name
        names["currency", key, "plural"] = get_currency_name(key, count=2, locale=locale)
    names.update({("unit", key, ""): widths.get("long") for key, widths in locale.unit_display_names.items()})
    # Where CLDR has no name the key stands in for it; a key is no human translation.
    return {
        place: name.strip() for place, name in names.items() if isinstance(name, str) and name != place[1]
    }


def _locale(language: str) -> Any:
    try:
        from babel import Locale, UnknownLocaleError
    except ImportError as error:
        raise ImportError("the translation task needs Babel: pip install 'react-fast[tasks]'") from error
    try:
        return Locale.parse(language)
    except (UnknownLocaleError, ValueError):
        raise ValueError(f"pairs must hold CLDR language codes, got {language!r}") from None


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()
