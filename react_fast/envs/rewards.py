"""Rewards g(state, action, record) in [0, 1] that compare the action with `record.reference`."""

import functools
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .text_env import Record


class _HasReference(Protocol):
    @property
    def reference(self) -> str | None: ...


def exact_match(state: str, action: str, record: "Record | _HasReference") -> float:
    """1 if action and reference are the same text, blanks at the ends aside, else 0."""
    return float(action.strip() == _reference(record).strip())


def chrf(state: str, action: str, record: "Record | _HasReference") -> float:
    """chrF / 100: F2 of character 1- to 6-grams. Source: Popovic 2015, computed by sacrebleu."""
    return _metric("CHRF").sentence_score(action, [_reference(record)]).score / 100


def bleu(state: str, action: str, record: "Record | _HasReference") -> float:
    """Sentence BLEU / 100 over the n-gram orders that the action has (`effective_order`), by sacrebleu.

    Source: Papineni et al. 2002; exponential smoothing of Chen & Cherry 2014.
    """
    # Rounding in exp(sum log) may exceed 100 by a few ulp.
    return min(
        _metric("BLEU", effective_order=True).sentence_score(action, [_reference(record)]).score / 100, 1.0
    )


def chrf_bleu(state: str, action: str, record: "Record | _HasReference") -> float:
    """The mean of `chrf` and `bleu`."""
    return (chrf(state, action, record) + bleu(state, action, record)) / 2


REWARDS = {"chrf": chrf, "bleu": bleu, "chrf_bleu": chrf_bleu, "exact_match": exact_match}


def _reference(record: "Record | _HasReference") -> str:
    if record.reference is None:
        raise ValueError("record.reference must be a str for this reward, got None")
    return record.reference


@functools.lru_cache
def _metric(name: str, **options: Any) -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("chrF and BLEU need sacrebleu: pip install 'react-fast[tasks]'") from error
    return getattr(sacrebleu, name)(**options)
