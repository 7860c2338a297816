"""The result table: test metrics of every policy with 95% bootstrap intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..envs.metrics import CORPUS_METRICS, Interval, Reference, corpus_difference, corpus_metric

RESAMPLES = 1000
MODES = {"sampled": "sampled at T=1", "greedy": "greedy"}
TITLES = {
    "random": "random policy",
    "warm_start": "warm start",
    "rl": "RL",
    "rl_causal": "RL + causal credit",
    "gain": "RL minus warm start",
    "gain_causal": "RL + causal credit minus warm start",
}
_DIFFERENCES = ("gain", "gain_causal")
_LABELS = {**{name: metric.label for name, metric in CORPUS_METRICS.items()}, "reward": "reward x100"}


@dataclass(frozen=True)
class Answers:
    """Responses of one policy to the test prompts, in their order.

    Attributes:
        responses: texts. rewards: one a response. references: the right answers of each; None where the
            records have none.
    """

    responses: Sequence[str]
    rewards: Sequence[float]
    references: Sequence[Reference] | None


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers of several processes as one."""
    references = [part.references for part in parts]
    known = [one for part in references if part is not None for one in part]
    return Answers(
        [one for part in parts for one in part.responses],
        [one for part in parts for one in part.rewards],
        known if None not in references else None,
    )


def measure(answers: Answers, metrics: Sequence[str]) -> dict[str, list[float]]:
    """[value, low, high] of every metric: keys of CORPUS_METRICS from 0 to 100, and the reward times 100."""
    intervals = {"reward": _mean_interval(answers.rewards)}
    if answers.references is not None:
        for name in metrics:
            intervals[name] = corpus_metric(name, answers.responses, answers.references, resamples=RESAMPLES)
    return {name: list(interval) for name, interval in intervals.items()}


def compare(before: Answers, after: Answers, metrics: Sequence[str]) -> dict[str, list[float]]:
    """[after - before, low, high] of every metric, paired: both policies see the same resampled prompts."""
    gains = np.asarray(after.rewards) - np.asarray(before.rewards)
    intervals = {"reward": _mean_interval(gains)}
    if before.references is not None:
        for name in metrics:
            intervals[name] = corpus_difference(
                name, before.responses, after.responses, before.references, resamples=RESAMPLES
            )
    return {name: list(interval) for name, interval in intervals.items()}


def table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the result table.

    Args:
        results: by policy ("gain" is RL minus warm start), by mode, by metric: [value, low, high].
    """
    measured = [metrics for result in results.values() for metrics in result.values()]
    names = [name for name in _LABELS if any(name in metrics for metrics in measured)]
    rows = [
        [f"{TITLES.get(policy, policy)}, {MODES[mode]}"]
        + [_cell(results[policy][mode].get(name), policy in _DIFFERENCES) for name in names]
        for mode in MODES
        for policy in results
        if mode in results[policy]
    ]
    return ["policy", *(_LABELS[name] for name in names)], rows


def _cell(interval: Sequence[float] | None, signed: bool) -> str:
    if interval is None:
        return ""
    value, low, high = interval
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if signed else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """100 times the mean, with its 95% percentile bootstrap interval over prompts."""
    x = 100 * np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), size=RESAMPLES)
    low, high = np.quantile(draws @ x / len(x), [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))
