"""How far two texts agree: SQuAD's normalised match and token F1, ROUGE, and counts of labelled spans."""

import functools
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROLE = re.compile(r"(C-|R-)?(A([0-9]|A|M)|ARG([0-9]|A|M))(-[A-Z0-9]+)?")


def squad_normal(text: str) -> str:
    """Lower case, without ASCII punctuation, the articles a, an, the, and superfluous blanks.

    Source: Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references after normalisation, else 0."""
    return float(squad_normal(answer) in map(squad_normal, references))


def squad_overlap(answer: str, references: Sequence[str]) -> float:
    """The largest token F1 of the answer with a reference, in [0, 1]; both empty (no answer) is 1."""
    return max(_token_f1(squad_normal(answer).split(), squad_normal(one).split()) for one in references)


def _token_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


def rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    """The largest ROUGE F1 with a reference, in [0, 1], without stemming.

    Args:
        kind: "rouge1" | "rouge2" | "rougeL".
    Source: Lin 2004, computed by rouge-score.
    """
    return max(_rouge(kind).score(one, answer)[kind].fmeasure for one in references)


@functools.lru_cache
def _rouge(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge-score: pip install 'react-fast[tasks]'") from error
    return RougeScorer([kind], use_stemmer=False)


class Span(NamedTuple):
    """A phrase and its role, such as ("ARG0", "the old woman")."""

    role: str
    text: str


def linearised(spans: Iterable[Span]) -> str:
    """One span a line: its role, a blank, its words."""
    return "\n".join(f"{span.role} {span.text}" for span in spans)


def spans_of(text: str) -> list[Span | None]:
    """The spans of a linearised text; None for a line that is none: no role of PropBank, or no words."""
    return [_span(line) for line in text.split("\n") if line.strip()]


def _span(line: str) -> Span | None:
    role, _, words = line.strip().partition(" ")
    words = " ".join(words.split())
    return Span(role, words) if words and _ROLE.fullmatch(role) else None


def span_counts(answer: str, reference: str) -> tuple[int, int, int]:
    """(right, answered, wanted) spans of two linearised texts.

    A span is right if role and words are those of a span of the reference, each of which counts once. A line
    that is no span was answered, and is wrong.
    """
    found, wanted = spans_of(answer), spans_of(reference)
    right = Counter(span for span in found if span) & Counter(span for span in wanted if span)
    return right.total(), len(found), len(wanted)


def f1_of_counts(right: float, answered: float, wanted: float) -> float:
    """2 right / (answered + wanted), in [0, 1]; nothing answered where nothing is wanted is 1."""
    return 2 * right / (answered + wanted) if answered + wanted else 1.0
