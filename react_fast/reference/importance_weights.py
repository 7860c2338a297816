"""Corrections for tokens of another policy as the equations say them; see react_fast.ops.importance_weights."""

from math import exp, log

import torch

from .policy_loss import MAX_LOG_RATIO, _ess, _log_ratio, _max, _mean, _rows, _wide

LEVELS = {
    "token": lambda x: x,
    "sequence": lambda x: x.sum().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(x),
    "geometric": lambda x: _mean(x).expand_as(x),
}


@torch.no_grad()
def importance_weights(
    logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float,
    high: float,
    bound_level: str | None = None,
    veto: float = 0.0,
    normalize: bool | str = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weights = torch.zeros_like(_wide(logprobs), memory_format=torch.contiguous_format)
    columns: dict[str, list[torch.Tensor]] = {
        name: [weights.new_empty(0)] for name in ("raw", "applied", "outside", "vetoed")
    }
    firsts = []  # weight of every row that counts, for its mean over rows
    tensors = (logprobs, behavior_logprobs, mask, weights)
    for logp, behavior, m, out in zip(*(_rows(x, cu_seqlens) for x in tensors), strict=True):
        m = m.bool()
        x, _ = _log_ratio(_wide(logp)[m], _wide(behavior)[m])
        weight = LEVELS[level](x).exp()
        bounded = LEVELS[bound_level or level](x).exp()
        outside = (bounded < low) | (bounded > high)  # false for NaN, which stays
        kept = weight.clamp(low, high) if mode == "truncate" else torch.where(outside, 0.0, weight)
        vetoed = ((x < log(veto)).any() if veto else torch.zeros_like(outside).any()).expand_as(outside)
        out[m] = torch.where(vetoed, 0.0, kept)
        firsts += out[m][:1]
        for name, value in (("raw", weight), ("applied", out[m]), ("outside", outside), ("vetoed", vetoed)):
            columns[name].append(value.to(weights.dtype))
    raw, applied, outside, vetoed = (torch.cat(column) for column in columns.values())
    if normalize:
        mean = _mean(
            torch.stack([weights.new_zeros(()), *firsts])[1:] if normalize == "sequences" else applied
        )
        scale = torch.where(mean > 0, 1 / mean, 0.0)
        weights, applied = weights * scale, applied * scale
    return weights, {
        "importance/raw_mean": _mean(raw),
        "importance/raw_max": _max(raw),
        "importance/mean": _mean(applied),
        "importance/max": _max(applied),
        "importance/ess": _ess(applied),
        "importance/outside": _mean(outside),
        "importance/vetoed": _mean(vetoed),
    }


@torch.no_grad()
def off_policy_mask(
    logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    threshold: float,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    kept = torch.zeros_like(mask, dtype=torch.bool)
    per_row = advantages.shape != logprobs.shape
    A_rows = list(advantages[:, None]) if per_row else _rows(advantages, cu_seqlens)
    tensors = (logprobs, behavior_logprobs, mask, kept)
    for logp, behavior, m, out, A in zip(*(_rows(x, cu_seqlens) for x in tensors), A_rows, strict=True):
        m = m.bool()
        x, _ = _log_ratio(_wide(logp)[m], _wide(behavior)[m])
        out[m] = (A if per_row else A[m]) >= 0
        if _mean(x).exp() >= exp(-threshold):
            out[m] = True
    return kept


@torch.no_grad()
def high_entropy_mask(entropy: torch.Tensor, mask: torch.Tensor, *, fraction: float) -> torch.Tensor:
    m = mask.bool()
    values = _wide(entropy)[m].double().sort().values
    if not len(values):
        return m.clone()
    position = (1 - fraction) * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    bound = values[below] + (position - below) * (values[above] - values[below])
    return m & (_wide(entropy).double() >= bound)
