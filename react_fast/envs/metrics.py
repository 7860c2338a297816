"""Corpus metrics for evaluation, with bootstrap intervals over segments, on sacrebleu's scale of 0 to 100."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .rewards import _metric

CORPUS_METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "chrf": ("CHRF", {}),
    # Names of one to three words have no 4-grams; without effective_order all of them would score 0.
    "bleu": ("BLEU", {"effective_order": True}),
}


class Interval(NamedTuple):
    """A value and its two-sided interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def corpus_metric(
    name: str,
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Corpus-level metric of a test set and its percentile bootstrap interval.

    The metric's sufficient statistics (n-gram counts) are summed over segments; a resample draws as many
    segments with replacement, so its metric is that of the weighted sum.

    Args:
        name: "chrf" | "bleu".
        hypotheses, references: texts, one of each a segment.
        level: coverage of the interval, in (0, 1).
    Raises: ValueError for an unknown name, no segments, or different lengths.
    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation".
    """
    scores = _resampled(name, [hypotheses], references, resamples, seed)[0]
    return _interval(scores, level)


def corpus_difference(
    name: str,
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """metric(after) - metric(before), paired bootstrap interval: both see the same resampled segments."""
    first, second = _resampled(name, [before, after], references, resamples, seed)
    return _interval(second - first, level)


def _interval(scores: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(scores[1:], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(scores[0]), float(low), float(high))


def _resampled(
    name: str, systems: Sequence[Sequence[str]], references: Sequence[str], resamples: int, seed: int
) -> np.ndarray:
    """[systems, 1 + resamples]: the metric on all segments, then on every resample."""
    if name not in CORPUS_METRICS:
        raise ValueError(f"name must be one of {', '.join(map(repr, CORPUS_METRICS))}, got {name!r}")
    for hypotheses in systems:
        if len(hypotheses) != len(references) or not len(references):
            raise ValueError(
                f"hypotheses and references must be equally many, at least 1, "
                f"got {len(hypotheses)} and {len(references)}"
            )
    segments = len(references)
    draws = np.random.default_rng(seed).multinomial(segments, np.full(segments, 1 / segments), size=resamples)
    weights = np.vstack([np.ones((1, segments), dtype=np.int64), draws])
    metric_name, options = CORPUS_METRICS[name]
    metric = _metric(metric_name, **options)
    return np.array([_weighted_scores(metric, hypotheses, references, weights) for hypotheses in systems])


def _weighted_scores(
    metric: Any, hypotheses: Sequence[str], references: Sequence[str], weights: np.ndarray
) -> list[float]:
    statistics = np.array(metric._extract_corpus_statistics(list(hypotheses), [list(references)]))
    return [float(metric._compute_score_from_stats(row.tolist()).score) for row in weights @ statistics]
