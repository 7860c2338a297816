"""Policy loss and value loss as the equations say them; see react_fast.ops.policy_loss."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .logprob import linear_token_logprobs
from .objectives import Objective, PPOClip
from .surrogates import MAX_LOG_RATIO, RULES, Tokens, selection


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns: the scalar to differentiate, and 0-d tensors to log."""

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


# From x = log p - log p_ref of a token drawn from p.
KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: torch.expm1(-x) + x,
    "abs": lambda x: x.abs(),
}


def _kl_value(k: torch.Tensor, x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Differentiate the estimator as written: exact for k2 on policy, nothing for k1, biased for k3."""
    return k


def _kl_k2(k: torch.Tensor, x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """The estimator's value with the gradient of k2, x d(log p): k2 - stop(k2) is 0 but has that gradient."""
    k2 = KL_ESTIMATORS["k2"](x)
    return k.detach() + k2 - k2.detach()


def _kl_ratio(k: torch.Tensor, x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """The live ratio p / p_old times the estimator: its gradient also sees how p chooses the tokens.

    d(r k) = r (k + dk/dlog p) dlog p: with k1 that is r (x + 1), with k3 it is r x; both have the mean of the
    true gradient, since the score has mean zero under p.
    """
    return ratio * k


KL_GRADIENTS = {"value": _kl_value, "k2": _kl_k2, "ratio": _kl_ratio}


def _log_ratio(logp: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p - other clamped to +-20 without gradient outside, where it was clamped).

    A token that the policy forbids, log p = -inf, is clamped to -20 whatever `other` is.
    """
    raw = torch.where(logp == float("-inf"), float("-inf"), logp - other)
    outside = raw.abs() > MAX_LOG_RATIO
    return torch.where(outside, raw.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), raw), outside


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[torch.Tensor]:
    """The sequences of a padded [B, T] or packed [N] tensor, one by one."""
    if x.dim() == 2:
        return list(x)
    bounds = [0, x.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    return [x[begin:end] for begin, end in pairwise(bounds)]


def _row_weights(counts: list[int], aggregation: str, denominator: float | None) -> list[float]:
    """The weight of every counting token of each row. Rows without counting tokens are no sequences."""
    tokens, sequences = sum(counts), sum(count > 0 for count in counts)
    if aggregation in ("token_mean", "token_sum_norm"):
        return [1 / (denominator or max(tokens, 1))] * len(counts)
    per_sequence = 1 / (denominator or max(sequences, 1))
    if aggregation == "seq_mean_token_sum":
        return [per_sequence] * len(counts)
    return [per_sequence / max(count, 1) for count in counts]


def _ess(weights: torch.Tensor) -> torch.Tensor:
    """Effective sample size over the number of weights, (sum w)^2 / (n sum w^2); 0 when all are 0."""
    square = (weights * weights).sum()
    return torch.where(square > 0, weights.sum() ** 2 / (weights.numel() * square), 0.0)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.sum() / max(x.numel(), 1)


def _max(x: torch.Tensor) -> torch.Tensor:
    return x.max() if x.numel() else x.new_zeros(())


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    objective: Objective = PPOClip(),  # noqa: B008, a frozen value
    aggregation: str = "token_mean",
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str = "ratio",
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    importance: torch.Tensor | None = None,
    denominator: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> PolicyLoss:
    masks = [m.bool() for m in _rows(mask, cu_seqlens)]

    def picked(x: torch.Tensor) -> list[torch.Tensor]:
        """Counting tokens of every row; what stands at the others is never read."""
        return [_wide(row)[m] for row, m in zip(_rows(x, cu_seqlens), masks, strict=True)]

    per_row = advantages.dim() < logprobs.dim() or advantages.shape != logprobs.shape
    rows = {
        "logp": picked(logprobs),
        "A": [_wide(a).expand(int(m.sum())) for a, m in zip(advantages, masks, strict=True)]
        if per_row
        else picked(advantages),
    }
    rows["old"] = [x.detach() for x in rows["logp"]] if old_logprobs is None else picked(old_logprobs)
    optional = {"ref": ref_logprobs, "entropy": entropy, "importance": importance}
    rows.update({name: picked(x) for name, x in optional.items() if x is not None})
    counts = [int(m.sum()) for m in masks]
    rows["selected"] = _selected(objective, rows, counts)
    weights = _row_weights(counts, aggregation, denominator)
    rule = RULES[type(objective)]
    total = _wide(logprobs).flatten()[:0].sum()  # 0, on the graph even if every row is empty
    columns = [*rows, "kl"] if ref_logprobs is not None else list(rows)
    seen = {name: [total.detach().new_empty(0)] for name in columns}  # a batch without rows has metrics too
    for i, weight in enumerate(weights):
        row = {name: values[i] for name, values in rows.items()}
        log_ratio, clamped = _log_ratio(row["logp"], row["old"].detach())
        ones = torch.ones_like(log_ratio, requires_grad=False)
        tokens = Tokens(
            row["logp"], row["old"].detach(), log_ratio, row["A"].detach(), row.get("importance", ones).detach(),
            row["selected"],
        )  # fmt: skip
        surrogate = rule.surrogate(objective, tokens)
        loss = surrogate.loss
        if not rule.takes_importance:
            loss = tokens.importance * loss
        if ref_logprobs is not None:
            x, _ = _log_ratio(row["logp"], row["ref"].detach())
            k = KL_ESTIMATORS[kl_estimator](x)
            loss = loss + kl_coef * KL_GRADIENTS[kl_gradient](k, x, log_ratio.exp())
            seen.setdefault("kl", []).append(k)
        if entropy is not None:
            loss = loss - entropy_coef * row["entropy"]
        total = total + weight * loss.sum()
        row.update(log_ratio=log_ratio, ratio=surrogate.ratio, clamped=clamped, low=surrogate.low)
        row.update(high=surrogate.high, dual=surrogate.dual)
        for name, value in row.items():
            seen.setdefault(name, []).append(value)
    flat = {name: torch.cat(v).detach().to(total.dtype) for name, v in seen.items()}
    return PolicyLoss(total, _metrics(flat, total.detach()))


def _selected(
    objective: Objective, rows: dict[str, list[torch.Tensor]], counts: list[int]
) -> list[torch.Tensor]:
    """`surrogates.selection` of the whole batch, row by row."""
    empty = rows["logp"][0].new_empty(0) if rows["logp"] else torch.empty(0)
    logp, old, A = (torch.cat([empty, *rows[name]]).detach() for name in ("logp", "old", "A"))
    return list(selection(objective, logp, old, A).split(counts))


def _metrics(flat: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over the counting tokens of the call, whatever the aggregation."""

    def column(name: str) -> torch.Tensor:
        return flat.get(name, like.new_empty(0))

    log_ratio, ratio = column("log_ratio"), column("ratio")
    metrics = {
        "tokens": like.new_tensor(float(ratio.numel())),
        "clip_ratio/low": _mean(column("low")),
        "clip_ratio/high": _mean(column("high")),
        "clip_ratio/dual": _mean(column("dual")),
        "approx_kl/k1": _mean(-log_ratio),
        "approx_kl/k3": _mean(torch.expm1(log_ratio) - log_ratio),
        "ratio/mean": _mean(ratio),
        "clamped": column("clamped").sum(),
        "ratio/max": _max(ratio),
    }
    if "kl" in flat:
        metrics["kl"] = _mean(flat["kl"])
    if "entropy" in flat:
        metrics["entropy"] = _mean(flat["entropy"])
    if "importance" in flat:
        weights = flat["importance"]
        metrics["importance/mean"] = _mean(weights)
        metrics["importance/ess"] = _ess(weights)
        metrics["importance/max"] = _max(weights)
    return metrics


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor | None,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float | None = None,
    denominator: float | None = None,
) -> torch.Tensor:
    total, count = _wide(values).flatten()[:0].sum(), 0
    for i in range(mask.shape[0]):
        m = mask[i].bool()
        value, target = _wide(values[i])[m], _wide(returns[i])[m].detach()
        error = (value - target) ** 2
        if clip is not None and old_values is not None:
            old = _wide(old_values[i])[m].detach()
            clipped = torch.clamp(value, old - clip, old + clip)
            # clamp, not maximum: where both errors are equal the gradient is the unclipped one's
            error = torch.clamp(error, min=(clipped - target) ** 2)
        total, count = total + 0.5 * error.sum(), count + int(m.sum())
    return total / (denominator or max(count, 1))


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    **terms: Any,
) -> PolicyLoss:
    logp, entropy = linear_token_logprobs(
        hidden, weight, token_ids, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
        mask=mask, return_entropy=True,
    )  # fmt: skip
    return policy_loss(logp, old_logprobs, advantages, mask, entropy=entropy, **terms)
