"""The operators behind react_fast.ops.importance_weights."""

from typing import Any

import torch

from .. import _core
from ._policy_loss import _flat, _layout_cpu, _offsets, _outputs
from .backend import DTYPE, address, register

# The tags of csrc/policy_loss.h are the positions.
LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")
NORMALIZE = (False, "tokens", "sequences")

# The `stats` output, in the order of csrc/policy_loss.h.
IMPORTANCE_METRICS = (
    "importance/raw_mean", "importance/raw_max", "importance/mean", "importance/max", "importance/ess",
    "importance/outside", "importance/vetoed",
)  # fmt: skip


def _importance_shapes(logprobs: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(logprobs.shape), (len(IMPORTANCE_METRICS),)


def _importance_weights_cpu(
    logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor | None,
    level: int, mode: int, low: float, high: float, bound_level: int, veto: float, normalize: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    inputs = [_flat(x) for x in (logprobs, behavior_logprobs, mask)]
    bounds, tokens, rows, row_length = _layout_cpu(logprobs, cu_seqlens)
    weights, stats = _outputs(logprobs, _importance_shapes(logprobs))
    pointers: Any = [address(x) for x in inputs]
    _core.importance_weights(  # type: ignore[call-arg]
        *pointers, address(bounds), tokens, rows, row_length, DTYPE[logprobs.dtype], level,
        mode, low, high, bound_level, veto, normalize, weights.data_ptr(), stats.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return weights, stats


def _importance_weights_triton(
    logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor | None,
    level: int, mode: int, low: float, high: float, bound_level: int, veto: float, normalize: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    from ..kernels import importance_weights as kernels
    from ..kernels.policy_loss_layout import Layout

    weights, stats = _outputs(logprobs, _importance_shapes(logprobs))
    layout = Layout.of(logprobs, mask, _offsets(logprobs, cu_seqlens))
    kernels.importance_weights(
        logprobs.contiguous(), behavior_logprobs.contiguous(), layout, level, mode, low, high, bound_level, veto,
        normalize, weights, stats,
    )  # fmt: skip
    return weights, stats


def _importance_weights_fake(logprobs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(logprobs, _importance_shapes(logprobs)))


importance_weights_op = register(
    "importance_weights",
    "(Tensor logprobs, Tensor behavior_logprobs, Tensor mask, Tensor? cu_seqlens, int level, int mode, "
    "float low, float high, int bound_level, float veto, int normalize) -> (Tensor, Tensor)",
    cpu=_importance_weights_cpu,
    triton=_importance_weights_triton,
    fake=_importance_weights_fake,
)


# ---- high_entropy_mask -------------------------------------------------------------------------------------


def _high_entropy_mask_cpu(entropy: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    values, counts = entropy.contiguous(), mask.contiguous()
    out = torch.empty(entropy.shape, dtype=torch.bool, device="cpu")
    _core.high_entropy_mask(
        values.data_ptr(), counts.data_ptr(), values.numel(), DTYPE[values.dtype], fraction, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _high_entropy_mask_triton(entropy: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """A sort, since the quantile needs the whole batch: by torch, which has a radix sort on the device."""
    values = torch.where(mask, entropy.double(), float("inf")).flatten()
    if not len(values):
        return mask.clone()
    ordered = values.sort().values
    position = (1 - fraction) * (mask.sum() - 1).clamp(min=0)
    below = position.long()
    above = torch.minimum(below + 1, (mask.sum() - 1).clamp(min=0))
    low, high = ordered[below], ordered[above]
    return mask & (values.view(mask.shape) >= low + (position - below) * (high - low))


def _high_entropy_mask_fake(entropy: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    return entropy.new_empty(entropy.shape, dtype=torch.bool)


high_entropy_mask_op = register(
    "high_entropy_mask",
    "(Tensor entropy, Tensor mask, float fraction) -> Tensor",
    cpu=_high_entropy_mask_cpu,
    triton=_high_entropy_mask_triton,
    fake=_high_entropy_mask_fake,
)
