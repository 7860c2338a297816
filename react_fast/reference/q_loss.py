"""Losses of the Q-learning family as the equations say them; see react_fast.ops.q_loss."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .q_learning import Pair, _lower, _wide, cql_logprobs, n_step_returns


class QLoss(NamedTuple):
    """What the losses return: the scalar to differentiate, and 0-d tensors to log."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def _squared(e: torch.Tensor, parameter: float) -> torch.Tensor:
    return e**2 / 2


def _huber(e: torch.Tensor, parameter: float) -> torch.Tensor:
    return torch.where(e.abs() <= parameter, e**2 / 2, parameter * (e.abs() - parameter / 2))


def _expectile(e: torch.Tensor, parameter: float) -> torch.Tensor:
    return torch.where(e > 0, (1 - parameter) * e**2, parameter * e**2)


REGRESSIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "squared": _squared,
    "huber": _huber,
    "expectile": _expectile,
}


def _rows(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[torch.Tensor]:
    if x.dim() == 2:
        return list(x)
    edges = [0, x.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    return [x[begin:end] for begin, end in pairwise(edges)]


def _weights(counts: list[int], aggregation: str, denominator: float | None) -> list[float]:
    """The weight of every counting token of each row. Rows without counting tokens are no sequences."""
    tokens, sequences = sum(counts), sum(count > 0 for count in counts)
    if aggregation in ("token_mean", "token_sum_norm"):
        return [1 / (denominator or max(tokens, 1))] * len(counts)
    share = 1 / (denominator or max(sequences, 1))
    return [share / max(count, 1) if aggregation == "seq_mean_token_mean" else share for count in counts]


def regression(
    predictions: Pair,
    targets: torch.Tensor,
    mask: torch.Tensor,
    kind: str,
    parameter: float,
    *,
    weights: torch.Tensor | None = None,
    aggregation: str = "token_mean",
    denominator: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> QLoss:
    heads = predictions if isinstance(predictions, tuple) else (predictions,)
    masks = [m.bool() for m in _rows(mask, cu_seqlens)]
    shares = _weights([int(m.sum()) for m in masks], aggregation, denominator)
    total = _wide(heads[0]).flatten()[:0].sum()
    seen: list[list[torch.Tensor]] = [[total.new_empty(0)], [total.new_empty(0)], [total.new_empty(0)]]
    target_rows = _rows(targets, cu_seqlens)
    weight_rows = None if weights is None else _rows(weights, cu_seqlens)
    for i, (m, share) in enumerate(zip(masks, shares, strict=True)):
        target = _wide(target_rows[i])[m].detach().to(total.dtype)
        for head in heads:
            prediction = _wide(_rows(head, cu_seqlens)[i])[m]
            loss = REGRESSIONS[kind](prediction - target, parameter)
            if weight_rows is not None:
                loss = _wide(weight_rows[i])[m].detach() * loss
            total = total + share * loss.sum()
            for column, x in zip(seen, (prediction - target, prediction, target), strict=True):
                column.append(x.detach())
    error, prediction, target = (torch.cat(column) for column in seen)
    return QLoss(total, _metrics(error, prediction, target, len(heads)))


def _metrics(
    error: torch.Tensor, prediction: torch.Tensor, target: torch.Tensor, heads: int
) -> dict[str, torch.Tensor]:
    n = max(len(error), 1)
    return {
        "tokens": error.new_tensor(len(error) / heads),
        "td_error/mean": error.sum() / n,
        "td_error/abs": error.abs().sum() / n,
        "td_error/max": torch.where(error.isnan(), 0, error.abs()).max()
        if len(error)
        else error.new_zeros(()),
        "prediction/mean": prediction.sum() / n,
        "target/mean": target.sum() / n,
        "above": (error > 0).sum().to(error.dtype) / n,
    }


def q_loss(
    q_values: Pair,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    huber: float | None = None,
    **options: Any,
) -> QLoss:
    kind = "squared" if huber is None else "huber"
    return regression(q_values, targets, mask, kind, huber or 0.0, **options)


def expectile_loss(
    values: torch.Tensor, q_targets: torch.Tensor, mask: torch.Tensor, *, tau: float, **options: Any
) -> QLoss:
    return regression(values, q_targets, mask, "expectile", tau, **options)


def log_loss(logprobs: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """-w_t log p_t, aggregated; a token with log p = -inf contributes 0."""
    weights, cu_seqlens = options.get("weights"), options.get("cu_seqlens")
    masks = [m.bool() for m in _rows(mask, cu_seqlens)]
    counts = [int(m.sum()) for m in masks]
    shares = _weights(counts, options.get("aggregation", "token_mean"), options.get("denominator"))
    total = _wide(logprobs).flatten()[:0].sum()
    for i, (m, share) in enumerate(zip(masks, shares, strict=True)):
        logp = _wide(_rows(logprobs, cu_seqlens)[i])[m]
        possible = logp != float("-inf")
        gain = torch.where(possible, logp, 0.0)
        if weights is not None:
            gain = _wide(_rows(weights, cu_seqlens)[i])[m].detach() * gain
        total = total - share * gain.sum()
    return total


def cql_loss(
    q: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor, *, alpha: float = 1.0, **options: Any
) -> torch.Tensor:
    return alpha * log_loss(cql_logprobs(q, token_ids, mask, alpha), mask, **options)


def ilql_loss(
    q_values: Pair,
    target_q_values: Pair,
    values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    tau: float = 0.7,
    q_coef: float = 1.0,
    value_coef: float = 1.0,
    q_logprobs: Pair | None = None,
    cql_coef: float = 0.0,
    logprobs: torch.Tensor | None = None,
    awac_coef: float = 0.0,
    awac_beta: float = 1.0,
    awac_max: float = 100.0,
    n: int = 1,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **options: Any,
) -> QLoss:
    with torch.no_grad():
        targets = n_step_returns(
            rewards, values, gamma=gamma, n=n, last_values=last_values, terminated=terminated,
            truncated=truncated, bootstrap_values=bootstrap_values, mask=mask, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        heads = target_q_values if isinstance(target_q_values, tuple) else (target_q_values,)
        target_q = _lower(_wide(x) for x in heads)
    td = q_loss(q_values, targets, mask, cu_seqlens=cu_seqlens, **options)
    value = expectile_loss(values, target_q, mask, tau=tau, cu_seqlens=cu_seqlens, **options)
    loss = 2 * q_coef * td.loss + value_coef * value.loss
    metrics = {f"q/{k}": x for k, x in td.metrics.items()} | {
        f"value/{k}": x for k, x in value.metrics.items()
    }
    metrics |= {"loss/q": 2 * td.loss.detach(), "loss/value": value.loss.detach()}
    if q_logprobs is not None:
        found = q_logprobs if isinstance(q_logprobs, tuple) else (q_logprobs,)
        cql = sum((log_loss(x, mask, cu_seqlens=cu_seqlens, **options) for x in found), loss * 0)
        loss = loss + cql_coef * cql
        metrics["loss/cql"] = cql.detach()
    if logprobs is not None:
        advantage = torch.where(mask.bool(), target_q - _wide(values), 0.0).detach()
        weights = (awac_beta * advantage).exp().clamp(max=awac_max)
        awac = log_loss(logprobs, mask, weights=weights, cu_seqlens=cu_seqlens, **options)
        loss = loss + awac_coef * awac
        metrics["loss/awac"] = awac.detach()
    return QLoss(loss, metrics)
