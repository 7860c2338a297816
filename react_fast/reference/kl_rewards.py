"""KL in the reward as the equation says it; see react_fast.ops.kl_rewards."""

import torch

from .policy_loss import KL_ESTIMATORS, _log_ratio, _mean, _rows, _wide


@torch.no_grad()
def kl_rewards(
    rewards: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    clip: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    shaped = torch.zeros_like(_wide(logprobs), memory_format=torch.contiguous_format)
    per_row = rewards.shape != logprobs.shape
    given = _wide(rewards) if per_row else _rows(_wide(rewards), cu_seqlens)
    seen = [shaped.new_empty(0)]
    tensors = (logprobs, ref_logprobs, mask, shaped)
    for logp, ref, m, out, r in zip(*(_rows(x, cu_seqlens) for x in tensors), given, strict=True):
        places = m.nonzero()[:, 0]
        x, _ = _log_ratio(_wide(logp)[places], _wide(ref)[places])
        k = KL_ESTIMATORS[estimator](x)
        if clip is not None:
            k = k.clamp(-clip, clip)
        out[places] = -kl_coef * k
        if per_row:
            out[places[-1:]] += r
        else:
            out[places] += r[places]
        seen.append(k)
    kl = torch.cat(seen)
    return shaped, {"kl": _mean(kl)}
