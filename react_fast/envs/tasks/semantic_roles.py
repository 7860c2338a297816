"""Semantic role labelling on synthetic sentences: who did what to whom, when, where and how.

The sentences are made by the small grammar in this file, not taken from a corpus. Roles are PropBank's, and each
verb has a frame: the same thing is said in several constructions (active, passive, double object, inchoative,
locative alternation), so that neither the order of the phrases nor their prepositions alone tell the roles. Which
verb occurs in which construction is what the splits hold apart: a test sentence asks for a verb in a construction
in which it was never seen, though both were seen often.

Source: frames after PropBank (Palmer et al. 2005); alternations after Levin 1993.
"""

import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

from ..match import Span, linearised
from ..record import Record
from .splits import check_split

REWARD, METRICS, OPTIONS = "span_f1", ("span_f1",), ()
_SIZES = {"train": 6000, "validation": 400, "test": 800}
# Of so many pairs of a verb and a construction one is the test's and one the validation's.
_SHARE = 6

_PEOPLE = (
    "teacher", "girl", "boy", "doctor", "farmer", "painter", "nurse", "king", "lawyer", "pilot", "baker",
    "singer", "woman", "man", "guard", "sailor", "student", "judge", "writer", "cook",
)  # fmt: skip
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Karen", "Leo")
_THINGS = (
    "book", "letter", "lamp", "box", "ring", "picture", "chair", "bottle", "coat", "map", "clock", "basket",
    "knife", "bag", "key", "plate",
)  # fmt: skip
_PLACES = ("table", "shelf", "wall", "floor", "bench", "roof", "truck", "wagon", "boat", "cart")
_FRAGILE = ("door", "window", "gate", "branch", "bridge", "cup", "vase", "lock", "mirror", "rope")
_GOODS = ("hay", "wood", "sand", "coal", "corn", "gravel", "flour", "salt")
_PRICES = ("ten euros", "two pounds", "five dollars", "a small sum", "nine francs")
_ADJECTIVES = ("old", "young", "small", "tall", "red", "heavy", "famous", "quiet", "broken", "new")
_ADJUNCTS = {
    "ARGM-TMP": (
        "yesterday",
        "last week",
        "on Monday",
        "in the morning",
        "after lunch",
        "in March",
        "at noon",
    ),
    "ARGM-LOC": (
        "in the garden",
        "at the station",
        "in Paris",
        "near the river",
        "at school",
        "on the island",
    ),
    "ARGM-MNR": ("quickly", "with great care", "slowly", "in silence", "gladly", "without a word"),
    "ARGM-CAU": ("because of the rain", "out of fear", "because of the war"),
}


class _Frame(NamedTuple):
    """Verbs that share roles and constructions.

    Attributes:
        verbs: past and participle. arguments: role -> kind of phrase.
        constructions: words; a number stands for that argument, V for the past, P for the participle.
    """

    verbs: tuple[tuple[str, str], ...]
    arguments: dict[str, str]
    constructions: tuple[str, ...]


def _regular(*verbs: str) -> tuple[tuple[str, str], ...]:
    return tuple((verb, verb) for verb in verbs)


_FRAMES = (
    _Frame(
        (("gave", "given"), ("showed", "shown"), *_regular("sent", "lent", "sold", "offered", "handed", "paid")),
        {"ARG0": "person", "ARG1": "thing", "ARG2": "person"},
        ("0 V 2 1", "0 V 1 to+2", "1 was P to+2 by+0", "2 was P 1 by+0", "1 was P to+2", "2 was P 1"),
    ),
    _Frame(
        (("broke", "broken"), ("froze", "frozen"), *_regular("opened", "closed", "moved", "burned", "cracked")),
        {"ARG0": "person", "ARG1": "fragile"},
        ("1 V", "0 V 1", "1 was P by+0", "1 was P"),
    ),
    _Frame(
        (("saw", "seen"), ("drew", "drawn"), *_regular("admired", "feared", "praised", "frightened", "followed")),
        {"ARG0": "person", "ARG1": "person"},
        ("0 V 1", "1 was P by+0", "it was 0 who V 1", "it was 1 whom 0 V"),
    ),
    _Frame(
        (("hid", "hidden"), *_regular("put", "placed", "laid", "left", "dropped")),
        {"ARG0": "person", "ARG1": "thing", "ARG2": "place"},
        ("on+2 0 V 1", "0 V 1 on+2", "1 was P on+2 by+0", "1 was P on+2"),
    ),
    _Frame(
        _regular("loaded", "sprayed", "packed", "piled", "covered", "filled"),
        {"ARG0": "person", "ARG1": "place", "ARG2": "goods"},
        ("0 V 1 with+2", "0 V 2 onto+1", "1 was P with+2 by+0", "2 was P onto+1 by+0", "2 was P onto+1",
         "1 was P with+2"),
    ),
    _Frame(
        (("stole", "stolen"), ("took", "taken"), *_regular("bought", "rented", "obtained", "ordered")),
        {"ARG0": "person", "ARG1": "thing", "ARG2": "person", "ARG3": "price"},
        ("0 V 1 from+2 for+3", "0 V 1 for+3", "1 was P from+2 by+0", "1 was P by+0 for+3", "from+2 0 V 1"),
    ),
)  # fmt: skip

# A piece of a sentence: its role ("" for none, "V" for the verb) and its words.
_Piece = tuple[str, str]
_Pair = tuple[int, int, int]


def load(split: str = "train") -> list[Record]:
    """The records of one split, in a fixed order.

    A prompt is a sentence with its predicate between asterisks, such as
    `the girl was *given* a ring by Ben\\n`; its reference has an argument a line, in the order of the sentence:
    `ARG2 the girl`, `ARG1 a ring`, `ARG0 by Ben`. Some sentences have two clauses; metadata holds verb and
    construction of the one that is asked for. No sentence occurs twice.

    Args:
        split: "train" | "validation" | "test", 6000, 400 and 800 sentences. Two thirds of the pairs of a verb
            and a construction are training's, a sixth each the others'. A clause that is not asked for is
            training's in all of them.
    Raises: ValueError for an unknown split.
    """
    check_split(split)
    return list(_sentences(split))


def prompt(sentence: str) -> str:
    """How a sentence with its predicate marked is put."""
    return f"{sentence}\n"


@functools.lru_cache(maxsize=1)
def _pairs() -> dict[str, list[_Pair]]:
    """Pairs of every split: frame, verb, construction. Over a frame's grid the splits lie in diagonals, so that
    each verb and each construction is in training."""
    found: dict[str, list[_Pair]] = {split: [] for split in _SIZES}
    for f, frame in enumerate(_FRAMES):
        for v in range(len(frame.verbs)):
            for c in range(len(frame.constructions)):
                split = {0: "test", _SHARE // 2: "validation"}.get((v + c + f) % _SHARE, "train")
                found[split].append((f, v, c))
    return found


@functools.lru_cache(maxsize=3)
def _sentences(split: str) -> tuple[Record, ...]:
    draw, pairs = random.Random(f"semantic roles/{split}"), _pairs()
    found: dict[str, Record] = {}
    while len(found) < _SIZES[split]:
        pair = draw.choice(pairs[split])
        asked = _clause(pair, draw)
        clauses = [[("*" if role == "V" else role, words) for role, words in asked]]
        if draw.random() < 0.3:
            clauses.insert(draw.randrange(2), _clause(draw.choice(pairs["train"]), draw))
        words = " and ".join(
            " ".join(f"*{text}*" if role == "*" else text for role, text in clause) for clause in clauses
        )
        answer = linearised(Span(*piece) for piece in asked if piece[0] not in ("", "V"))
        frame = _FRAMES[pair[0]]
        metadata = {"verb": frame.verbs[pair[1]][0], "construction": frame.constructions[pair[2]]}
        found.setdefault(words, Record(prompt(words), answer, metadata))
    return tuple(found.values())


def _clause(pair: _Pair, draw: random.Random) -> list[_Piece]:
    """The pieces of a clause in their order, with up to two adjuncts."""
    frame = _FRAMES[pair[0]]
    pieces = list(_core(frame, *pair[1:], draw))
    for role in draw.sample(sorted(_ADJUNCTS), draw.choice((0, 1, 1, 2))):
        adjunct = (role, draw.choice(_ADJUNCTS[role]))
        first = role in ("ARGM-TMP", "ARGM-LOC") and pieces[0][0].startswith("ARG0") and draw.random() < 0.4
        pieces.insert(0 if first else len(pieces), adjunct)
    return pieces


def _core(frame: _Frame, verb: int, construction: int, draw: random.Random) -> Iterator[_Piece]:
    past, participle = frame.verbs[verb]
    for word in frame.constructions[construction].split():
        preposition, _, number = word.rpartition("+")
        if number.isdigit():
            role = f"ARG{number}"
            yield role, f"{preposition} {_phrase(frame.arguments[role], draw)}".strip()
        elif word in ("V", "P"):
            yield "V", past if word == "V" else participle
        else:
            yield "", word


def _phrase(kind: str, draw: random.Random) -> str:
    if kind == "price":
        return draw.choice(_PRICES)
    if kind == "person" and draw.random() < 0.4:
        return draw.choice(_NAMES)
    nouns = {"person": _PEOPLE, "thing": _THINGS, "place": _PLACES, "fragile": _FRAGILE, "goods": _GOODS}[
        kind
    ]
    article = "" if kind == "goods" else draw.choice(("the", "the", "a" if kind != "place" else "the"))
    adjective = draw.choice(_ADJECTIVES) if draw.random() < 0.4 else ""
    return " ".join(word for word in (article, adjective, draw.choice(nouns)) if word).replace(
        "a old", "an old"
    )
