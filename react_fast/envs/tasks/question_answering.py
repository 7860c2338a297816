"""Questions about facts that stand in a context: territories, currencies and languages in Unicode CLDR.

The Babel package carries CLDR, so nothing is downloaded. A context states three facts in any order: the one that
the question asks for, the same attribute of another thing and another attribute of the same thing, so that thing
and attribute both have to be found. The facts of a thing are in one split alone, in questions and in contexts;
values (English, euro) are shared.

Validation and test state true facts. In training a fact is asked for in one true context and in several where
every value is another thing's, so that answers are read and not known by heart: Longpre et al. 2021
(arXiv:2109.05052), entity substitution. Those state one to three facts: short ones teach reading first.
"""

import functools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..record import Record
from .splits import SPLITS, Groups, check_split

REWARD, METRICS, OPTIONS = "squad_f1", ("squad_em", "squad_f1"), ()
# Of every training fact: a true one, the others with exchanged values.
_CONTEXTS = 24

# CLDR key, name, attributes
_Thing = tuple[str, str, dict[str, str]]
_Facts = dict[str, list[_Thing]]


def load(split: str = "train") -> list[Record]:
    """The records of one split, in a fixed order.

    A prompt is `The currency of Chad is Central African CFA Franc. ...\\nQ: currency of Chad?\\nA: The currency of
    Chad is`, its reference ` Central African CFA Franc`, with the blank that makes it the same tokens as in the
    context; metadata holds kind, attribute, the CLDR keys of both things, and whether values are exchanged.

    Args:
        split: "train" | "validation" | "test", about 72%, 10% and 18% of the things; a training fact is asked
            for in several contexts, the others in one.
    Raises: ValueError for an unknown split.
    Source: Unicode CLDR as in Babel (https://babel.pocoo.org).
    """
    check_split(split)
    contexts = _CONTEXTS if split == "train" else 1
    facts = _split_facts()[split]
    asked = [
        (kind, place, attribute)
        for kind in sorted(facts)
        for place, (_, _, attributes) in enumerate(facts[kind])
        for attribute in sorted(attributes)
    ]
    return [
        _record(facts[kind], kind, place, attribute, number)
        for number in range(contexts)
        for kind, place, attribute in asked
    ]


def prompt(context: str, question: str) -> str:
    """How a context and a question about it are put; an answer follows behind a blank."""
    return f"{context}\nQ: {question}\nA:"


def _record(things: Sequence[_Thing], kind: str, place: int, attribute: str, number: int) -> Record:
    key, name, values = things[place]
    draw = random.Random(f"{kind}/{key}/{attribute}/{number}")
    other = things[(place + draw.randrange(1, len(things))) % len(things)]
    second = draw.choice(sorted(values.keys() - {attribute}))
    alike = attribute if attribute in other[2] else draw.choice(sorted(other[2]))
    stated = [(attribute, name, values), (second, name, values), (alike, other[1], other[2])]
    if number:
        stated = [(fact, about, _another(things, fact, draw)) for fact, about, _ in stated]
        stated = [stated[0], *draw.sample(stated[1:], number % 3)]
    answer = stated[0][2][attribute]
    draw.shuffle(stated)
    context = " ".join(f"The {fact} of {about} is {known[fact]}." for fact, about, known in stated)
    metadata = {"kind": kind, "key": key, "attribute": attribute, "other": other[0], "exchanged": number > 0}
    asked = f"{attribute} of {name}"
    return Record(f"{prompt(context, f'{asked}?')} The {asked} is", f" {answer}", metadata)


def _another(things: Sequence[_Thing], attribute: str, draw: random.Random) -> dict[str, str]:
    """The attributes of any thing that has the one."""
    while True:
        values = draw.choice(things)[2]
        if attribute in values:
            return values


@functools.lru_cache(maxsize=1)
def _split_facts() -> dict[str, _Facts]:
    facts = _facts()
    groups = Groups()
    for kind, things in facts.items():
        for key, name, _ in things:
            groups.join(f"{kind}/{key}", f"name:{name.casefold()}")
    place = groups.splits()
    return {
        split: {
            kind: [thing for thing in things if place[f"{kind}/{thing[0]}"] == split]
            for kind, things in facts.items()
        }
        for split in SPLITS
    }


def _facts() -> _Facts:
    try:
        from babel import Locale
    except ImportError as error:
        raise ImportError(
            "the question answering task needs Babel: pip install 'react-fast[tasks]'"
        ) from error
    english = Locale.parse("en")
    found = {
        "territory": _territories(english),
        "currency": _currencies(english),
        "language": _languages(english),
    }
    return {kind: sorted(thing for thing in things if len(thing[2]) > 1) for kind, things in found.items()}


def _territories(english: Any) -> Iterator[_Thing]:
    from babel.core import get_global

    currencies, languages = get_global("territory_currencies"), get_global("territory_languages")
    zones = get_global("territory_zones")
    for key, name in english.territories.items():
        if not re.fullmatch("[A-Z]{2}", key):
            continue
        values = {"code": key}
        tender = [code for code, _, end, legal in currencies.get(key, ()) if end is None and legal]
        if tender and tender[0] in english.currencies:
            values["currency"] = english.currencies[tender[0]]
        spoken = languages.get(key, {})
        official = [code for code, about in spoken.items() if about["official_status"]]
        most = max(official, key=lambda code: spoken[code]["population_percent"], default=None)
        if most in english.languages:
            values["language"] = english.languages[most]
        if zones.get(key):
            values["time zone"] = zones[key][0].rpartition("/")[2].replace("_", " ")
        yield key, name, values


def _currencies(english: Any) -> Iterator[_Thing]:
    from babel.numbers import get_currency_name, get_currency_precision, get_currency_symbol

    for key, name in english.currencies.items():
        values = {"code": key, "plural": get_currency_name(key, count=2, locale=english)}
        values["number of decimals"] = str(get_currency_precision(key))
        symbol = get_currency_symbol(key, locale=english)
        yield key, name, values | ({"symbol": symbol} if symbol != key else {})


def _languages(english: Any) -> Iterator[_Thing]:
    from babel.core import get_global

    likely = get_global("likely_subtags")
    for key, name in english.languages.items():
        _, *subtags = likely.get(key, key).split("_")
        if len(subtags) != 2 or "_" in key:
            continue
        script, home = subtags
        values = {"code": key, "script": english.scripts.get(script), "home": english.territories.get(home)}
        yield key, name, {attribute: value for attribute, value in values.items() if value}
