"""Returns and advantages: padded [B, T] or packed [N], torch or numpy in and out."""

from typing import Any

import torch

from .. import reference
from . import _check
from ._advantage import gae as _gae
from ._advantage import gae_moments as _gae_moments
from ._advantage import gae_out as _gae_out
from ._advantage import reverse_linear_scan as _reverse_linear_scan
from ._advantage import scan_out as _scan_out
from ._advantage import td_lambda_returns as _td_lambda_returns
from ._arrays import numpy_too
from ._whiten import moments as _moments
from ._whiten import whiten as _whiten
from ._whiten import whiten_in_place as _whiten_in_place
from .backend import accumulation_dtype, get_backend, use_reference
from .whiten import merged_over, stacked


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
    whiten: bool = False,
    group: Any = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        whiten: the advantages as `whiten(advantages, mask=mask, group=group)` makes them, in two passes instead of
            three, since their moments come out of the recurrence. The returns stay.
        group: see `whiten`; only with it.
        out: memory for (advantages, returns), contiguous, like the results and apart from the arguments; where no
            gradient is wanted. On a CPU fresh memory for large results costs more than the recurrence. There, with
            no other option than last_values and terminated, both may be transposes of contiguous [T, B]: the
            recurrence then walks all rows at once, and arguments that are such transposes, too, are not copied.
    Returns: (advantages, returns) like `rewards`, float32 (float64 for float64), 0 where masked. Differentiable in
        rewards, values, last and bootstrap values. An advantage is G - V: where rewards and values cancel some
        units in V's last place may stay, while the walk over transposes (`out`) sums delta and gives 0.
    Raises: see `discounted_returns`; ValueError for lam outside [0, 1] (a tensor is looked at on CPU only).
    Source: Schulman et al. 2016 (arXiv:1506.02438), eq. 16; time limits: Pardo et al. 2018 (arXiv:1712.00378).
    Elsewhere: verl steps over masked tokens as here, but always whitens the advantages; OpenRLHF keeps masked
        tokens as steps of value 0. Stable-Baselines3's episode_starts[t] is `terminated[t - 1]`; torchrl and
        Tianshou take V' of every step and one flag for both ends.
    """
    _check.tensor("values", values)
    flags = _steps(rewards, values, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    shared, lams = _lam(lam, rewards, cu_seqlens)
    given = (rewards, values, last_values, bootstrap_values, *flags, cu_seqlens, lams, gamma, shared)
    if group is not None and not whiten:
        raise ValueError("group must be None without whiten=True, got a process group")
    with_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given[:4])
    if out is not None:
        _check_out(out, given, with_gradient, whiten)
    if use_reference():
        found = reference.gae(
            rewards, values, gamma=gamma, lam=lam, last_values=last_values, terminated=flags[0],
            truncated=flags[1], bootstrap_values=bootstrap_values, mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if whiten:
            merged = None if group is None else merged_over(group, _moments(found[0].detach(), flags[2]))
            found = reference.whiten(found[0], mask=flags[2], moments=merged), found[1]
        return found if out is None else (out[0].copy_(found[0]), out[1].copy_(found[1]))
    if with_gradient and whiten:
        advantages, returns, stats = _gae_moments(*given)
        stats = stats if group is None else stacked(merged_over(group, stats), stats)
        return _whiten(advantages, flags[2], stats, True, 1e-8, 1, group is not None), returns
    if out is None and not whiten:
        return _gae(*given)
    wide = accumulation_dtype(rewards.dtype)
    advantages, returns = out or (rewards.new_empty(rewards.shape, dtype=wide) for _ in range(2))
    stats = _gae_out(advantages, returns, *given, whiten)
    if whiten:
        stats = stats if group is None else stacked(merged_over(group, stats), stats)
        _whiten_in_place(advantages, flags[2], stats, 1e-8, 1)
    return advantages, returns


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The recurrence behind all returns, y_t = b_t + a_t y_{t+1}.

    Args:
        a, b: [B, T], or packed [N] with `cu_seqlens` (see `discounted_returns`), of one floating dtype.
        init: [B] of that dtype, stands behind a row's last step; None: 0.
        out: contiguous memory for y, like it, where no gradient is wanted; b itself, or apart from a, b and init.
    Returns: like `a`, float32 (float64 for float64). Differentiable in all three.
    Raises: TypeError for a wrong dtype, ValueError for a wrong shape or device or bad cu_seqlens.
    Source: Blelloch 1990, prefix sums of linear recurrences.
    """
    _check_rows("a", a, cu_seqlens)
    _check_like("b", b, a, a.shape, "a")
    if init is not None:
        _check_like("init", init, a, (_row_count(a, cu_seqlens),), "the rows of a")
    if out is not None:
        _check_scan_out(out, a, b, init)
    if use_reference():
        found = reference.reverse_linear_scan(a, b, init=init, cu_seqlens=cu_seqlens)
        return found if out is None else out.copy_(found)
    if out is not None:
        return _scan_out(out, a, b, init, cu_seqlens)
    return _reverse_linear_scan(a, b, init, cu_seqlens)


def _check_scan_out(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, init: torch.Tensor | None) -> None:
    _check.dtype("out", _check.tensor("out", out), accumulation_dtype(a.dtype), "the result")
    _check.shape("out", out, a.shape, "a")
    _check.device("out", out, a.device, "a")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, init, out)):
        raise ValueError("out must be None where a gradient is wanted, got a tensor; use torch.no_grad()")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    if torch.compiler.is_compiling() or out.numel() == 0:
        return
    others = [a] if b.is_contiguous() and b.dtype == out.dtype and b.data_ptr() == out.data_ptr() else [a, b]
    low, high = _span(out)
    if any(
        low < end and begin < high for begin, end in map(_span, [*others, *([] if init is None else [init])])
    ):
        raise ValueError("out must be b or share no memory with a, b and init, got one that does")


def _check_out(out: Any, given: tuple, with_gradient: bool, whiten: bool) -> None:
    """Two results' memory, none of it an argument's."""
    rewards = given[0]
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"out must be a tuple (advantages, returns), got {type(out).__name__}")
    by_time = (
        rewards.device.type == "cpu"
        and not whiten
        and all(given[i] is None for i in (3, 5, 6, 7, 8))
        and get_backend() != "triton"
        and all(isinstance(x, torch.Tensor) and x.dim() == 2 and x.t().is_contiguous() for x in out)
    )
    if with_gradient:
        raise ValueError(
            "out must be None where a gradient is wanted, got tensors; use torch.no_grad() or detach"
        )
    for name, x in zip(("out[0]", "out[1]"), out, strict=True):
        _check.dtype(name, _check.tensor(name, x), accumulation_dtype(rewards.dtype), "the results")
        _check.shape(name, x, rewards.shape, "rewards")
        _check.device(name, x, rewards.device, "rewards")
        if not by_time and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")
    if torch.compiler.is_compiling() or rewards.numel() == 0:
        return
    spans = [_span(x) for x in (*out, *given) if isinstance(x, torch.Tensor)]
    for i, (low, high) in enumerate(spans[:2]):
        if any(low < end and begin < high for begin, end in spans[i + 1 :]):
            raise ValueError(
                f"out[{i}] must not share memory with another tensor of the call, got one that does"
            )


def _span(x: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first element's to behind the last one's."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


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
