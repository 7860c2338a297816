"""Returns, advantages and whitening: padded [B, T] or packed [N], torch or numpy in and out."""

from typing import Any

import torch
import torch.distributed as dist

from .. import reference
from . import _check
from ._advantage import gae as _gae
from ._advantage import moments as _moments
from ._advantage import reverse_linear_scan as _reverse_linear_scan
from ._advantage import td_lambda_returns as _td_lambda_returns
from ._advantage import whiten as _whiten
from ._arrays import numpy_too
from .backend import get_backend, use_reference

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@numpy_too
def discounted_returns(
    rewards: torch.Tensor,
    *,
    gamma: float,
    mask: torch.Tensor | None = None,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Discounted return of every step, G_t = r_t + gamma * G_{t+1}.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`; float32, bfloat16, float16 or float64. Reward of the
            action taken at step t.
        gamma: discount in [0, 1].
        mask: bool or 0/1 integers like `rewards`. False steps are not steps: they return 0, whatever stands there
            touches nothing, and G passes them unchanged and undiscounted.
        last_values: [B] like `rewards`' dtype. Value behind a row's last counting step; None: 0.
        terminated: like `mask`. The transition at t ended the episode: nothing follows.
        truncated: like `mask`. The episode was cut behind t: `bootstrap_values` there follow. Terminated wins.
        bootstrap_values: like `rewards`; needed with `truncated`, read only there.
        cu_seqlens: [B + 1] int32 or int64, bounds of the packed sequences, from 0 to N.
    Returns: like `rewards`, float32 (float64 for float64). Differentiable in rewards, last and bootstrap values.
    Raises: TypeError for a wrong dtype; ValueError for a wrong shape or device, gamma outside [0, 1], truncated
        without bootstrap_values, or (on CPU) cu_seqlens that do not rise from 0 to N.
    Source: Sutton & Barto 2018, eq. 3.9.
    """
    flags = _steps(rewards, None, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    if use_reference():
        return reference.discounted_returns(
            rewards, gamma=gamma, mask=flags[2], last_values=last_values, terminated=flags[0], truncated=flags[1],
            bootstrap_values=bootstrap_values, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return _gae(rewards, None, last_values, bootstrap_values, *flags, cu_seqlens, None, gamma, 1.0)[1]


@numpy_too
def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and the returns they imply.

        delta_t = r_t + gamma V'_t - V_t      A_t = delta_t + gamma lam A_{t+1}      returns = A + V

    V'_t is the value of the next counting step, `last_values` behind the last one, 0 where `terminated`,
    `bootstrap_values` where `truncated`; at the latter two the recursion is cut.

    Args:
        rewards, values: [B, T], or packed [N] with `cu_seqlens`, of one dtype.
        gamma: discount in [0, 1].
        lam: in [0, 1], a number or a floating tensor [B] with one for each row (no gradient).
        last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens: see `discounted_returns`. Counting
            steps get the numbers they would get if the masked ones were deleted.
    Returns: (advantages, returns) like `rewards`, float32 (float64 for float64), 0 where masked. Differentiable in
        rewards, values, last and bootstrap values.
    Raises: see `discounted_returns`; ValueError for lam outside [0, 1] (a tensor is looked at on CPU only).
    Source: Schulman et al. 2016 (arXiv:1506.02438), eq. 16; time limits: Pardo et al. 2018 (arXiv:1712.00378).
    """
    _check.tensor("values", values)
    flags = _steps(rewards, values, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    shared, lams = _lam(lam, rewards, cu_seqlens)
    if use_reference():
        return reference.gae(
            rewards, values, gamma=gamma, lam=lam, last_values=last_values, terminated=flags[0],
            truncated=flags[1], bootstrap_values=bootstrap_values, mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return _gae(rewards, values, last_values, bootstrap_values, *flags, cu_seqlens, lams, gamma, shared)


@numpy_too
def td_lambda_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """TD(lambda) returns, the second result of `gae` without the first.

        G_t = r_t + gamma ((1 - lam) V'_t + lam G_{t+1})

    A critic with another lam than the policy's (VAPO, arXiv:2504.05118: 1 for the critic) is this beside `gae`.

    Args, Raises: see `gae`. `values` are those of the states the actions were taken in, as everywhere here; rlax
        and torchrl take the ones behind.
    Returns: like `rewards`, float32 (float64 for float64), 0 where masked. Differentiable as `gae` is; a critic's
        target is a constant, so detach it (rlax does so unasked).
    Source: Sutton & Barto 2018, eq. 12.2 in its recursive form.
    """
    _check.tensor("values", values)
    flags = _steps(rewards, values, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    shared, lams = _lam(lam, rewards, cu_seqlens)
    if use_reference():
        return reference.td_lambda_returns(
            rewards, values, gamma=gamma, lam=lam, last_values=last_values, terminated=flags[0],
            truncated=flags[1], bootstrap_values=bootstrap_values, mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
    given = (rewards, values, last_values, bootstrap_values, *flags, cu_seqlens, lams, gamma, shared)
    return _td_lambda_returns(*given)


@numpy_too
def reverse_linear_scan(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    init: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The recurrence behind all returns, y_t = b_t + a_t y_{t+1}.

    Args:
        a, b: [B, T], or packed [N] with `cu_seqlens` (see `discounted_returns`), of one floating dtype.
        init: [B] of that dtype, stands behind a row's last step; None: 0.
    Returns: like `a`, float32 (float64 for float64). Differentiable in all three.
    Raises: TypeError for a wrong dtype, ValueError for a wrong shape or device or bad cu_seqlens.
    Source: Blelloch 1990, prefix sums of linear recurrences.
    """
    _check_rows("a", a, cu_seqlens)
    _check_like("b", b, a, a.shape, "a")
    if init is not None:
        _check_like("init", init, a, (_row_count(a, cu_seqlens),), "the rows of a")
    if use_reference():
        return reference.reverse_linear_scan(a, b, init=init, cu_seqlens=cu_seqlens)
    return _reverse_linear_scan(a, b, init, cu_seqlens)


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
        moments = _merged_over(group, x, mask)
    if use_reference():
        return reference.whiten(x, mask=mask, moments=moments, shift_mean=shift_mean, eps=eps, ddof=ddof)
    stats = _moments(x.detach(), mask) if moments is None else _stacked(moments, x)
    return _whiten(x, mask, stats, shift_mean, eps, ddof, moments is not None)


def _stacked(moments: Moments, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.as_tensor(m, dtype=torch.float64, device=x.device) for m in moments])


def _merged_over(group: Any, x: torch.Tensor, mask: torch.Tensor | None) -> Moments:
    own = _moments(x.detach(), mask)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return reference.merge_moments(*[tuple(part.unbind()) for part in parts])  # type: ignore[arg-type]


def _counting(x: Any, mask: torch.Tensor | None) -> torch.Tensor | None:
    _check.floating("x", x)
    return None if mask is None else _check.mask("mask", mask, x.shape, "x", x.device)


def _steps(
    rewards: torch.Tensor,
    values: torch.Tensor | None,
    last_values: torch.Tensor | None,
    terminated: torch.Tensor | None,
    truncated: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Check what all returns share; (terminated, truncated, mask) as bool."""
    _check_rows("rewards", rewards, cu_seqlens)
    for name, x in (("values", values), ("bootstrap_values", bootstrap_values)):
        if x is not None:
            _check_like(name, x, rewards, rewards.shape, "rewards")
    if last_values is not None:
        _check_like(
            "last_values", last_values, rewards, (_row_count(rewards, cu_seqlens),), "the rows of rewards"
        )
    if truncated is not None and bootstrap_values is None:
        raise ValueError("bootstrap_values must be given with truncated, got None")
    flags = []
    for name, x in (("terminated", terminated), ("truncated", truncated), ("mask", mask)):
        flags.append(None if x is None else _check.mask(name, x, rewards.shape, "rewards", rewards.device))
    return flags[0], flags[1], flags[2]


def _row_count(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_rows(name: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    _check.floating(name, x)
    if x.dim() != (2 if cu_seqlens is None else 1):
        wanted = "[B, T] (or [N] with cu_seqlens)" if cu_seqlens is None else "[N] with cu_seqlens"
        raise ValueError(f"{name} must be {wanted}, got {list(x.shape)}")
    if cu_seqlens is not None:
        _check.bounds("cu_seqlens", cu_seqlens, x, name, "B + 1")
        if get_backend() in ("reference", "triton") and not torch.compiler.is_compiling():
            _check.rising("cu_seqlens", cu_seqlens, x.shape[0], "the packed steps")  # the core does it itself


def _check_like(
    name: str, x: torch.Tensor, other: torch.Tensor, shape: tuple[int, ...] | torch.Size, like: str
) -> None:
    first = "a" if like.endswith("a") else "rewards"
    _check.dtype(name, _check.tensor(name, x), other.dtype, first)
    _check.shape(name, x, shape, like)
    _check.device(name, x, other.device, first)


def _lam(
    lam: float | torch.Tensor, rewards: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[float, torch.Tensor | None]:
    """(the number that all rows share, one for each row if there is no such number)."""
    if isinstance(lam, torch.Tensor):
        return 1.0, _row_lams(lam, rewards, cu_seqlens)
    return _check.number("lam", lam, low=0.0, high=1.0), None


def _row_lams(lam: torch.Tensor, rewards: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    _check.floating("lam", lam)
    _check.shape("lam", lam, (_row_count(rewards, cu_seqlens),), "the rows of rewards")
    _check.device("lam", lam, rewards.device, "rewards")
    if lam.requires_grad:
        raise ValueError("lam must not require a gradient, got a tensor that does; pass .detach()")
    if lam.device.type == "cpu" and not torch.compiler.is_compiling() and len(lam):
        low, high = float(lam.min()), float(lam.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"lam must be in [0, 1], got values from {low:g} to {high:g}")
    return lam.double()
