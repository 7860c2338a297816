"""torchrl: its value estimators, each one reverse scan instead of a loop or a convolution.

Replaced under every name that a module bound: `generalized_advantage_estimate`, `td_lambda_return_estimate`, their
`vec_` twins and `vtrace_advantage_estimate`, which the estimators GAE, TDLambdaEstimator and VTrace call. The
originals are called for gamma or lambda of more than one number or with a gradient, `rolling_gamma`, flags that
are not bool, tensors that are empty, of different shapes or dtypes, and under torch.compile. Log-probabilities of
its TransformersWrapper: `torchrl_logprobs`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import _core
from ..ops.advantage import reverse_linear_scan
from ..ops.backend import get_backend, is_eager
from .points import Case, Integration, Point
from .torchrl_logprobs import POINTS as LOGPROBS

Tensor = torch.Tensor
Scalar = float | Tensor


def _scan(a: Tensor, b: Tensor, time: int) -> Tensor:
    """y_t = b_t + a_t y_{t+1} along an axis, nothing behind its end."""
    a, b = a.movedim(time, -1), b.movedim(time, -1)
    shape = b.shape
    y = reverse_linear_scan(a.reshape(-1, shape[-1]), b.reshape(-1, shape[-1]))
    return y.view(shape).movedim(-1, time)


def _covered(
    time_dim: int, scalars: tuple[Any, ...], floats: tuple[Any, ...], flags: tuple[Any, ...]
) -> bool:
    first = floats[0]
    if torch.compiler.is_compiling() or not isinstance(first, Tensor) or first.dim() < 2:
        return False
    return (
        first.numel() > 0
        and all(_is_number(x, first) for x in scalars)
        and first.dtype in (torch.float32, torch.float64)
        and first.device.type in ("cpu", "cuda")
        and all(isinstance(x, Tensor) and x.shape == first.shape for x in (*floats, *flags))
        and all(x.dtype == first.dtype and x.device == first.device for x in floats)
        and all(x.dtype == torch.bool for x in flags)
        and -first.dim() <= time_dim < first.dim()
    )


def _is_number(x: Any, like: Tensor) -> bool:
    """Whether a discount is one number that leaves the results' dtype alone and wants no gradient."""
    if not isinstance(x, Tensor):
        return True
    same = x.device == like.device and (x.dim() == 0 or x.dtype == like.dtype)
    return x.numel() == 1 and same and not x.requires_grad


def _in_core(floats: tuple[Tensor, ...], flags: tuple[Tensor, ...]) -> bool:
    """Whether the core may read the arrays as they are, rows of steps."""
    first = floats[0]
    return (
        first.device.type == "cpu"
        and first.dtype == torch.float32
        and get_backend() in ("auto", "cpu")
        and all(is_eager(x) and x.is_contiguous() for x in (*floats, *flags))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in floats))
    )


def _gae_in_core(
    gamma: Scalar,
    decay: Scalar,
    floats: tuple[Tensor, Tensor, Tensor],
    done: Tensor,
    ended: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The same numbers in one pass over the arrays."""
    value, after, reward = floats
    advantage, target = torch.empty_like(reward), torch.empty_like(reward)
    _core.gae_ahead(  # type: ignore[call-arg]
        *(x.data_ptr() for x in (reward, value, after, ended, done)), reward.numel() // steps, steps,
        float(gamma), float(decay), advantage.data_ptr(), target.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return advantage, target


def _number(x: Scalar, like: Tensor) -> Scalar:
    return x.reshape(()).to(like.dtype) if isinstance(x, Tensor) else x


def gae(original: Callable[..., Any]) -> Callable[..., Any]:
    """A_t = delta_t + gamma lambda A_{t+1} (1 - done_t), delta_t = r_t + gamma V'_t (1 - terminated_t) - V_t."""

    @functools.wraps(original)
    def replacement(
        gamma: Scalar, lmbda: Scalar, state_value: Tensor, next_state_value: Tensor, reward: Tensor, done: Tensor,
        terminated: Tensor | None = None, *, time_dim: int = -2,
    ) -> Any:  # fmt: skip
        ended = done if terminated is None else terminated
        floats = state_value, next_state_value, reward
        if not _covered(time_dim, (gamma, lmbda), floats, (done, ended)):
            return original(gamma, lmbda, *floats, done, terminated, time_dim=time_dim)
        gamma, lmbda = _number(gamma, reward), _number(lmbda, reward)
        steps = reward.shape[time_dim]
        if reward.shape[time_dim:].numel() == steps and _in_core(floats, (done, ended)):
            return _gae_in_core(gamma, gamma * lmbda, floats, done, ended, steps)
        delta = reward + gamma * next_state_value.masked_fill(ended, 0) - state_value
        advantage = _scan((~done).to(delta.dtype) * (gamma * lmbda), delta, time_dim)
        return advantage, advantage + state_value

    return replacement


def td_lambda(original: Callable[..., Any]) -> Callable[..., Any]:
    """G_t = r_t + gamma ((1 - lambda) V'_t + lambda G_{t+1}), G_{t+1} = V'_t where done and at the end."""

    @functools.wraps(original)
    def replacement(
        gamma: Scalar, lmbda: Scalar, next_state_value: Tensor, reward: Tensor, done: Tensor,
        terminated: Tensor | None = None, rolling_gamma: bool | None = None, *, time_dim: int = -2,
    ) -> Any:  # fmt: skip
        ended = done if terminated is None else terminated
        floats = next_state_value, reward
        if rolling_gamma is not None or not _covered(time_dim, (gamma, lmbda), floats, (done, ended)):
            return original(gamma, lmbda, *floats, done, terminated, rolling_gamma, time_dim=time_dim)
        gamma, lmbda = _number(gamma, reward), _number(lmbda, reward)
        on = (~done).to(reward.dtype)
        on.select(time_dim, -1).zero_()
        on = on * lmbda
        return _scan(on * gamma, reward + gamma * next_state_value.masked_fill(ended, 0) * (1 - on), time_dim)

    return replacement


def vtrace(original: Callable[..., Any]) -> Callable[..., Any]:
    """v_t - V_t = rho_t delta_t + gamma c_t (v_{t+1} - V_{t+1}) (1 - done_t)."""

    @functools.wraps(original)
    def replacement(
        gamma: Scalar, log_pi: Tensor, log_mu: Tensor, state_value: Tensor, next_state_value: Tensor,
        reward: Tensor, done: Tensor, terminated: Tensor | None = None, rho_thresh: Scalar = 1.0,
        c_thresh: Scalar = 1.0, time_dim: int = -2,
    ) -> Any:  # fmt: skip
        ended = done if terminated is None else terminated
        floats = log_pi, log_mu, state_value, next_state_value, reward
        if not _covered(time_dim, (gamma, rho_thresh, c_thresh), floats, (done, ended)):
            return original(
                gamma, *floats, done, terminated, rho_thresh=rho_thresh, c_thresh=c_thresh, time_dim=time_dim
            )
        gamma = _number(gamma, reward)
        ratio = (log_pi - log_mu).exp()
        rho = ratio.clamp(max=_number(rho_thresh, reward))
        beyond = gamma * (~ended).to(reward.dtype)
        delta = rho * (reward + beyond * next_state_value - state_value)
        on = (~done).to(reward.dtype) * gamma
        targets = _scan(on * ratio.clamp(max=_number(c_thresh, reward)), delta, time_dim) + state_value
        steps = targets.shape[time_dim]
        after = torch.cat(
            [targets.narrow(time_dim, 1, steps - 1), next_state_value.narrow(time_dim, steps - 1, 1)],
            time_dim,
        )
        after = torch.where(done, next_state_value, after)
        return rho * (reward + beyond * after - state_value), targets

    return replacement


_ARGUMENTS = ("state_value", "next_state_value", "reward")


def _cases(floats: tuple[str, ...], **numbers: float) -> Callable[[torch.device], list[Case]]:
    """Two rows of five steps, with an end, a cut, and what is passed for the time axis."""

    def tensors(device: torch.device, features: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(features)
        shape = 2, 5, features
        given = {
            name: torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            .to(device)
            .requires_grad_()
            for name in floats
        }
        done = torch.zeros(shape, dtype=torch.bool, device=device)
        done[0, 1], done[1, 3], done[1, 4] = True, True, True
        terminated = done.clone()
        terminated[1, 3] = False
        return given, {"done": done, "terminated": terminated}

    def run(features: int, time_dim: int, with_end: bool, device: torch.device) -> Any:
        def run(function: Any) -> dict[str, Tensor]:
            given, flags = tensors(device, features)
            moved = {name: x.movedim(1, time_dim).contiguous() for name, x in (given | flags).items()}
            if not with_end:
                del moved["terminated"]
            found = function(**numbers, **moved, time_dim=time_dim)
            found = found if isinstance(found, tuple) else (found,)
            results = {f"result {i}": x.detach() for i, x in enumerate(found)}
            weights = torch.linspace(-1, 2, found[0].numel(), device=device).view_as(found[0])
            pulled = torch.autograd.grad((found[0] * weights).sum(), list(given.values()), allow_unused=True)
            return results | {
                f"d / d {name}": x for name, x in zip(given, pulled, strict=True) if x is not None
            }

        return run

    return lambda device: [
        Case("ends and cuts", run(1, -2, True, device)),
        Case("done alone", run(1, -2, False, device)),
        Case("three features, time first", run(3, 0, True, device)),
    ]


_PLACE = "torchrl.objectives.value.functional"
_DISCOUNTS = {"gamma": 0.9, "lmbda": 0.7}
_GAE = _cases(_ARGUMENTS, **_DISCOUNTS)
_TD = _cases(_ARGUMENTS[1:], **_DISCOUNTS)
_VTRACE = _cases(("log_pi", "log_mu", *_ARGUMENTS), gamma=0.9, rho_thresh=1.1, c_thresh=0.8)
_SCAN = "reverse_linear_scan"
INTEGRATION = Integration(
    package="torchrl",
    distribution="torchrl",
    at_least=(0, 14),
    below=(1, 0),
    points=(
        Point(f"{_PLACE}.generalized_advantage_estimate", "04f1cefeec35", gae, _GAE, _SCAN),
        Point(f"{_PLACE}.vec_generalized_advantage_estimate", "04f1cefeec35", gae, _GAE, _SCAN),
        Point(f"{_PLACE}.td_lambda_return_estimate", "c4f2d5703f37", td_lambda, _TD, _SCAN),
        Point(f"{_PLACE}.vec_td_lambda_return_estimate", "c4f2d5703f37", td_lambda, _TD, _SCAN),
        Point(f"{_PLACE}.vtrace_advantage_estimate", "f62e995ada7f", vtrace, _VTRACE, _SCAN),
        *LOGPROBS,
    ),
)
