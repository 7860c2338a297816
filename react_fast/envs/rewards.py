"""Rewards g(state, action, record) in [0, 1] that compare the action with the record's right answers.

Those are `record.metadata["answers"]` where given, else `record.reference` alone; of several the best counts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from .match import f1_of_counts, rouge, span_counts, squad_match, squad_overlap
from .reward_functions import RewardError

if TYPE_CHECKING:
    from .record import Record


class _HasReference(Protocol):
    @property
    def reference(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


def exact_match(state: str, action: str, record: "Record | _HasReference") -> float:
    """1 if action and a right answer are the same text, blanks at the ends aside, else 0."""
    return float(action.strip() in (answer.strip() for answer in right_answers(record)))


def chrf(state: str, action: str, record: "Record | _HasReference") -> float:
    """chrF / 100: F2 of character 1- to 6-grams. Source: Popovic 2015, computed by sacrebleu."""
    return sacrebleu_metric("CHRF").sentence_score(action, right_answers(record)).score / 100


def bleu(state: str, action: str, record: "Record | _HasReference") -> float:
    """Sentence BLEU / 100 over the n-gram orders that the action has (`effective_order`), by sacrebleu.

    Source: Papineni et al. 2002; exponential smoothing of Chen & Cherry 2014.
    """
    metric = sacrebleu_metric("BLEU", effective_order=True)
    # Rounding in exp(sum log) may exceed 100 by a few ulp.
    return min(metric.sentence_score(action, right_answers(record)).score / 100, 1.0)


def chrf_bleu(state: str, action: str, record: "Record | _HasReference") -> float:
    """The mean of `chrf` and `bleu`."""
    return (chrf(state, action, record) + bleu(state, action, record)) / 2


def squad_em(state: str, action: str, record: "Record | _HasReference") -> float:
    """1 if action and a right answer are the same after SQuAD's normalisation, else 0."""
    return squad_match(action, right_answers(record))


def squad_f1(state: str, action: str, record: "Record | _HasReference") -> float:
    """Token F1 with the nearest right answer after SQuAD's normalisation."""
    return squad_overlap(action, right_answers(record))


def rouge_1(state: str, action: str, record: "Record | _HasReference") -> float:
    """ROUGE-1: F1 of words."""
    return rouge("rouge1", action, right_answers(record))


def rouge_2(state: str, action: str, record: "Record | _HasReference") -> float:
    """ROUGE-2: F1 of pairs of neighbouring words."""
    return rouge("rouge2", action, right_answers(record))


def rouge_l(state: str, action: str, record: "Record | _HasReference") -> float:
    """ROUGE-L: F1 of the longest common subsequence of words."""
    return rouge("rougeL", action, right_answers(record))


def span_f1(state: str, action: str, record: "Record | _HasReference") -> float:
    """F1 of labelled spans, one a line; a line that is no span counts as a wrong one."""
    return max(f1_of_counts(*span_counts(action, answer)) for answer in right_answers(record))


REWARDS: dict[str, Callable[[str, str, Any], float]] = {
    "chrf": chrf,
    "bleu": bleu,
    "chrf_bleu": chrf_bleu,
    "exact_match": exact_match,
    "squad_em": squad_em,
    "squad_f1": squad_f1,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
    "span_f1": span_f1,
}


def right_answers(record: "Record | _HasReference") -> list[str]:
    """Every right answer of a record, at least one.

    Raises: ValueError if it has none.
    """
    if record.reference is None:
        raise RewardError("record.reference must be a str for this reward, got None")
    return list(record.metadata.get("answers") or [record.reference])


@functools.lru_cache
def sacrebleu_metric(name: str, **options: Any) -> Any:
    """A metric of sacrebleu, made once."""
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("chrF and BLEU need sacrebleu: pip install 'react-fast[tasks]'") from error
    return getattr(sacrebleu, name)(**options)
