"""Faithfulness as loops: one perturbed text at a time, one forward for each token that is asked for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

# Of the shares of features whose loss is comprehensiveness (DeYoung et al. 2020).
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)

Value = Callable[[set[int]], float]


def faithfulness(
    tracker: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    scores: Any,
    outcome: Any = "logprob",
    samples: int | None = None,
    *,
    inputs: str = "all",
    counterfactual: Any = None,
    fractions: Sequence[float] = FRACTIONS,
    points: int = 10,
    subsets: int = 64,
    keep: float = 0.5,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """See `react_fast.tracker.faithfulness`: its measures of one table of scores, a dictionary for each row.

    Args:
        tracker: reference.Tracker.
        scores: [P + R], or [R, P + R] rows of which row i is of response token i. The features are tokens.
    """
    ids, start = [*prompt_ids, *response_ids], len(prompt_ids)
    rows = np.asarray(scores, dtype=float)
    asked = [range(start, len(ids))] if rows.ndim == 1 else [range(t, t + 1) for t in range(start, len(ids))]
    replace = counterfactual.replacement if counterfactual is not None else lambda tokens: []
    first, end = _reach(ids, start, outcome, samples, inputs, empty=not replace([0]))
    rng = np.random.Generator(np.random.Philox(tracker.seed))
    kept = rng.random((subsets, end - first)) < keep

    def value(tokens: range, removed: set[int]) -> float:
        texts = [replace([token]) if i in removed else [token] for i, token in enumerate(ids)]
        if samples is None:
            return _fixed(tracker, ids, start, texts, outcome, tokens)
        limit = max_new_tokens or len(response_ids)
        return _sampled(tracker, ids[:start], texts[:start], outcome, samples, limit)

    found = []
    for row, tokens in zip(np.atleast_2d(rows), asked, strict=True):
        reaching = [i for i in range(first, end) if rows.ndim == 1 or i < tokens.start]
        gone = [{i for i in reaching if not one[i - first]} for one in kept]
        found.append(_measures(row, reaching, gone, fractions, points, partial(value, tokens)))
    return found


def _reach(
    ids: list[int], start: int, outcome: Any, samples: int | None, inputs: str, *, empty: bool
) -> tuple[int, int]:
    """The tokens that can be taken out and change the outcome, from the first to before the end."""
    if samples is None and callable(outcome):
        return start, len(ids)
    end = len(ids) - 1 if outcome == "logprob" else len(ids)
    return int(empty), start if inputs == "prompt" or samples is not None else end


def _fixed(
    tracker: Any, ids: list[int], start: int, texts: list[list[int]], outcome: Any, tokens: range
) -> float:
    prompt, response = _joined(texts[:start]), _joined(texts[start:])
    if outcome == "logprob":
        return sum(tracker.logprob(_joined(texts[:t]), [ids[t]]) for t in tokens)
    return tracker.outcome(prompt, response, outcome)


def _sampled(
    tracker: Any, prompt: list[int], texts: list[list[int]], outcome: Any, samples: int, limit: int
) -> float:
    changed, total = _joined(texts), 0.0
    for s in range(samples):
        if outcome == "logprob":
            total += tracker.logprob(changed, tracker.draw(prompt, s, limit))
        else:
            total += tracker.outcome(changed, tracker.draw(changed, s, limit), outcome)
    return total / samples


def _measures(
    scores: np.ndarray,
    reaching: list[int],
    gone: list[set[int]],
    fractions: Sequence[float],
    points: int,
    value: Value,
) -> dict[str, Any]:
    """The measures of one row; `gone` are the random subsets that are taken out."""
    n, whole = len(reaching), value(set())
    order = sorted(reaching, key=lambda i: -scores[i])
    shares = [max(1, int(np.ceil(share * n - 1e-9))) for share in fractions]
    deletion = [value(set(order[: round(n * j / points)])) for j in range(points + 1)]
    insertion = [value(set(order[round(n * j / points) :])) for j in range(points + 1)]
    missing, predicted, left = [], [], []
    for removed in gone:
        left.append(value(removed))
        missing.append((sum(scores[i] for i in removed) - (whole - left[-1])) ** 2)
        predicted.append(sum(scores[i] for i in reaching if i not in removed))
    return {
        "comprehensiveness": sum(whole - value(set(order[:k])) for k in shares) / len(shares),
        "sufficiency": sum(whole - value(set(order[k:])) for k in shares) / len(shares),
        "deletion_auc": sum(a + b for a, b in zip(deletion[1:], deletion, strict=False)) / 2 / points,
        "insertion_auc": sum(a + b for a, b in zip(insertion[1:], insertion, strict=False)) / 2 / points,
        "infidelity": sum(missing) / len(missing),
        "datamodelling_score": np.corrcoef(_ranks(predicted), _ranks(left))[0, 1],
        "deletion": deletion,
        "insertion": insertion,
        "features": n,
    }


def _joined(texts: list[list[int]]) -> list[int]:
    return [token for text in texts for token in text]


def _ranks(values: list[float]) -> list[float]:
    """How many are smaller, and half of those that are equal."""
    return [sum(x < y for x in values) + sum(x == y for x in values) / 2 for y in values]
