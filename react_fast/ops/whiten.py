"""Moments of what counts, and whitening by them; torch or numpy in and out."""

from typing import Any

import torch
import torch.distributed as dist

from .. import reference
from . import _check
from ._arrays import numpy_too
from ._whiten import merge_parts as _merge_parts
from ._whiten import moments as _moments
from ._whiten import whiten as _whiten
from .backend import use_reference

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@numpy_too
def moments(x: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    """Count, mean and sum of squared distances to the mean (M2) of the counting elements.

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        mask: bool or 0/1 integers like `x`; None: all count.
    Returns: three float64 scalars on x's device, without a gradient; (0, 0, 0) for nothing.
    Raises: TypeError for a wrong dtype, ValueError for a wrong shape or device.
    """
    mask = _counting(x, mask)
    if use_reference():
        return reference.moments(x, mask)
    count, mean, m2 = _moments(x.detach(), mask).unbind()
    return count, mean, m2


@numpy_too
def merge_moments(*parts: Moments) -> Moments:
    """Moments of the union: exact, so parts from micro-batches, ranks and workers combine.

        n = n_a + n_b            d = mean_b - mean_a
        mean = mean_a + d n_b / n            M2 = M2_a + M2_b + d^2 n_a n_b / n

    Args: parts: results of `moments`, at least one.
    Source: Chan, Golub & LeVeque 1979.
    """
    if not parts:
        raise ValueError("parts must hold at least one result of moments, got none")
    return reference.merge_moments(*parts)


@numpy_too
def whiten(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    moments: Moments | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    ddof: int = 1,
    group: Any = None,
) -> torch.Tensor:
    """Scale the counting elements to mean 0 and variance 1.

        y = (x - mean) / sqrt(M2 / (n - ddof) + eps), plus the mean unless `shift_mean`

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        mask: bool or 0/1 integers like `x`; the other elements return 0 and are not looked at.
        moments: what `moments` or `merge_moments` returned, to whiten with (no gradient through them); None: of x.
        shift_mean: false keeps the mean.
        eps: not negative, beside the variance. ddof: 0 or 1.
        group: a torch.distributed process group over whose ranks the moments are merged, in one collective (no
            gradient through them); a rank without counting elements takes part. None: this process alone.
    Returns: like `x`, float32 (float64 for float64). Fewer than two counting elements, no more than `ddof`, or
        no spread with eps 0: centred only. Differentiable in `x`.
    Raises: TypeError for a wrong dtype; ValueError for a wrong shape, device or number, or moments with a group.
    Elsewhere: ddof 1, eps 1e-8 beside the variance, in verl (raises for a count of 1), TRL (NaN there) and
        NeMo-RL's GAE; ddof 0 in OpenRLHF and NeMo-RL's REINFORCE++, where 1e-8 is the least variance and is not
        added; eps beside the standard deviation in Stable-Baselines3 and torchrl. verl and OpenRLHF leave
        -mean / std on the masked elements; trlx whitens without a mask.
    """
    mask = _counting(x, mask)
    eps = _check.number("eps", eps, low=0.0)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if moments is not None and (not isinstance(moments, tuple) or len(moments) != 3):
        raise ValueError(f"moments must be (count, mean, M2) as moments() returns them, got {moments!r}")
    if moments is not None and group is not None:
        raise ValueError("moments must be None when a process group is given, got both")
    if group is not None:
        moments = merged_over(group, _moments(x.detach(), mask))
    if use_reference():
        return reference.whiten(x, mask=mask, moments=moments, shift_mean=shift_mean, eps=eps, ddof=ddof)
    stats = _moments(x.detach(), mask) if moments is None else stacked(moments, x)
    return _whiten(x, mask, stats, shift_mean, eps, ddof, moments is not None)


def stacked(moments: Moments, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.as_tensor(m, dtype=torch.float64, device=x.device) for m in moments])


def merged_over(group: Any, own: torch.Tensor) -> Moments:
    """The moments of all ranks; `own` is [3], or [3, P] of a scan that left P parts."""
    own = _merge_parts(own) if own.dim() == 2 else own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return reference.merge_moments(*[tuple(part.unbind()) for part in parts])  # type: ignore[arg-type]


def _counting(x: Any, mask: torch.Tensor | None) -> torch.Tensor | None:
    _check.floating("x", x)
    return None if mask is None else _check.mask("mask", mask, x.shape, "x", x.device)
