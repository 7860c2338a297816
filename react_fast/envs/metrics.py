"""Corpus metrics for evaluation, from 0 to 100, with bootstrap intervals over segments.

A metric is a row of numbers for every segment (n-gram counts, or a score and a 1) and a function of their sum, so
that of a resample is that of a weighted sum. A new metric is a line in the table.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .match import f1_of_counts, rouge, span_counts, squad_match, squad_overlap
from .rewards import sacrebleu_metric

# One right answer of a segment, or several.
Reference = str | Sequence[str]


class Metric(NamedTuple):
    """How a corpus metric is computed.

    Attributes:
        label: of the result table.
        statistics: (hypotheses, right answers of each) -> [segments, K] numbers.
        score: their sum [K] -> the metric in [0, 100].
    """

    label: str
    statistics: Callable[[Sequence[str], Sequence[list[str]]], Any]
    score: Callable[[np.ndarray], float]


def _sacrebleu(label: str, name: str, **options: Any) -> Metric:
    def statistics(hypotheses: Sequence[str], references: Sequence[list[str]]) -> Any:
        # sacrebleu wants as many streams as the segment with the most references; None where there is no more.
        streams = [
            [right[i] if i < len(right) else None for right in references]
            for i in range(max(map(len, references)))
        ]
        return sacrebleu_metric(name, **options)._extract_corpus_statistics(list(hypotheses), streams)

    def score(sums: np.ndarray) -> float:
        return float(sacrebleu_metric(name, **options)._compute_score_from_stats(sums.tolist()).score)

    return Metric(label, statistics, score)


def _mean(label: str, of_one: Callable[[str, list[str]], float]) -> Metric:
    """100 times the mean of a score in [0, 1]."""

    def statistics(hypotheses: Sequence[str], references: Sequence[list[str]]) -> Any:
        return [(of_one(answer, right), 1.0) for answer, right in zip(hypotheses, references, strict=True)]

    return Metric(label, statistics, lambda sums: float(100 * sums[0] / sums[1]))


def _span_statistics(hypotheses: Sequence[str], references: Sequence[list[str]]) -> Any:
    return [
        max((span_counts(answer, one) for one in right), key=lambda counts: f1_of_counts(*counts))
        for answer, right in zip(hypotheses, references, strict=True)
    ]


CORPUS_METRICS: dict[str, Metric] = {
    "chrf": _sacrebleu("chrF", "CHRF"),
    # Names of one to three words have no 4-grams; without effective_order all of them would score 0.
    "bleu": _sacrebleu("BLEU", "BLEU", effective_order=True),
    "squad_em": _mean("EM", squad_match),
    "squad_f1": _mean("F1", squad_overlap),
    "rouge_1": _mean("ROUGE-1", lambda answer, right: rouge("rouge1", answer, right)),
    "rouge_2": _mean("ROUGE-2", lambda answer, right: rouge("rouge2", answer, right)),
    "rouge_l": _mean("ROUGE-L", lambda answer, right: rouge("rougeL", answer, right)),
    # Micro-averaged, as CoNLL's scorers do: every span weighs alike.
    "span_f1": Metric("span F1", _span_statistics, lambda sums: 100 * f1_of_counts(*sums.tolist())),
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
    references: Sequence[Reference],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Corpus-level metric of a test set and its percentile bootstrap interval.

    Args:
        name: a key of CORPUS_METRICS.
        hypotheses: texts, one a segment. references: for each, its right answer or several.
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
    references: Sequence[Reference],
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
    name: str, systems: Sequence[Sequence[str]], references: Sequence[Reference], resamples: int, seed: int
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
    metric = CORPUS_METRICS[name]
    right = [[one] if isinstance(one, str) else list(one) for one in references]
    return np.array(
        [
            [metric.score(sums) for sums in weights @ np.array(metric.statistics(hypotheses, right))]
            for hypotheses in systems
        ]
    )
