"""Off-policy targets: V-trace and Retrace, padded [B, T] or packed [N], torch or numpy in and out."""

import torch

from .. import reference
from . import _check
from ._arrays import numpy_too
from ._off_policy import retrace as _retrace
from ._off_policy import vtrace as _vtrace
from .advantage import _check_like, _lam, _steps
from .backend import use_reference

Maybe = torch.Tensor | None


@numpy_too
def vtrace(
    rewards: torch.Tensor,
    values: torch.Tensor,
    log_rhos: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    advantage_rho_clip: float | None = None,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """V-trace: value targets and policy-gradient advantages from another policy's actions.

        rho_t = pi(a_t|s_t) / mu(a_t|s_t)        c_t = lam min(c_clip, rho_t)
        delta_t = min(rho_clip, rho_t) (r_t + gamma V'_t - V_t)
        v_t = V_t + delta_t + gamma c_t (v'_t - V'_t)
        A_t = min(advantage_rho_clip, rho_t) (r_t + gamma v'_t - V_t)

    V'_t and v'_t are value and target of the next counting step; `last_values` behind the last one, 0 where
    `terminated`, `bootstrap_values` where `truncated`, and there both are the same: the recursion is cut. With
    rho = 1 the targets are `td_lambda_returns`; with lam 1 the advantages are `gae`'s, and below 1 they are not.

    Args:
        rewards, values, log_rhos: [B, T], or packed [N] with `cu_seqlens`, of one dtype. log_rhos: log pi - log mu
            of the action taken.
        gamma, lam, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens: see `gae`.
        rho_clip, c_clip: not negative, inf for none. rho_clip sets the policy whose value the targets estimate,
            c_clip only the variance.
        advantage_rho_clip: the clip in A_t; None: rho_clip.
    Returns: (targets, advantages) like `rewards`, float32 (float64 for float64), 0 where masked. Targets are
        constants of the update: no gradient flows into any input, whatever requires one.
    Raises: see `gae`.
    Source: IMPALA, Espeholt et al. 2018 (arXiv:1802.01561), eq. 1 and section 4.2. rlax mixes its advantage's
        bootstrap, lam v' + (1 - lam) V'; with both rho clips equal that is lam A + (1 - lam) (v - V), v of lam 0.
        One of PufferLib's two kernels weighs r alone in delta (rho r + gamma V' - V).
    """
    given = _rest(("values", values), ("log_rhos", log_rhos))
    flags = _steps(rewards, values, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    _check_like("log_rhos", given[1], rewards, rewards.shape, "rewards")
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    shared, lams = _lam(lam, rewards, cu_seqlens)
    rho_clip = _check.number("rho_clip", rho_clip, low=0.0, infinite=True)
    c_clip = _check.number("c_clip", c_clip, low=0.0, infinite=True)
    if advantage_rho_clip is None:
        advantage_rho_clip = rho_clip
    advantage_rho_clip = _check.number("advantage_rho_clip", advantage_rho_clip, low=0.0, infinite=True)
    if use_reference():
        return reference.vtrace(
            rewards, values, log_rhos, gamma=gamma, lam=lam, rho_clip=rho_clip, c_clip=c_clip,
            advantage_rho_clip=advantage_rho_clip, last_values=last_values, terminated=flags[0],
            truncated=flags[1], bootstrap_values=bootstrap_values, mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
    constants = _constants(rewards, values, log_rhos, last_values, bootstrap_values)
    return _vtrace(*constants, *flags, cu_seqlens, lams, gamma, shared, rho_clip, c_clip, advantage_rho_clip)


@numpy_too
def retrace(
    rewards: torch.Tensor,
    q_values: torch.Tensor,
    next_values: torch.Tensor,
    log_rhos: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor = 1.0,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Retrace: targets of Q from another policy's actions, safe for any pair of policies.

        c_t = lam min(1, pi(a_t|s_t) / mu(a_t|s_t))
        G_t = r_t + gamma (V'_t + c_{t+1} (G_{t+1} - Q_{t+1}))

    t + 1 is the next counting step; behind a row's last one and behind a cut no correction follows.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`; float32, bfloat16, float16 or float64.
        q_values: like `rewards`, Q(s_t, a_t) of the action taken.
        next_values: like `rewards`, V'_t = sum_a pi(a|s) Q(s, a) of the state behind step t. At a row's last step
            and where `truncated` it is the bootstrap.
        log_rhos: like `rewards`, log pi - log mu of the action taken at t.
        gamma: discount in [0, 1]. lam: in [0, 1], a number or a floating tensor [B] with one for each row.
        terminated: bool or 0/1 integers like `rewards`. Nothing follows step t: G_t = r_t, and next_values is not
            looked at. truncated: likewise; the recursion is cut, next_values stays. Terminated wins.
        mask, cu_seqlens: see `discounted_returns`.
    Returns: like `rewards`, float32 (float64 for float64), 0 where masked. Targets are constants of the update: no
        gradient flows into any input.
    Raises: see `gae`.
    Source: Munos et al. 2016 (arXiv:1606.02647), eq. 3 and 4. rlax takes q, v and c of step t + 1 as one array.
    """
    named = _rest(("q_values", q_values), ("next_values", next_values), ("log_rhos", log_rhos))
    flags = _steps(rewards, None, None, terminated, truncated, rewards, mask, cu_seqlens)
    for name, x in zip(("q_values", "next_values", "log_rhos"), named, strict=True):
        _check_like(name, x, rewards, rewards.shape, "rewards")
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    shared, lams = _lam(lam, rewards, cu_seqlens)
    if use_reference():
        return reference.retrace(
            rewards, q_values, next_values, log_rhos, gamma=gamma, lam=lam, terminated=flags[0],
            truncated=flags[1], mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
    constants = _constants(rewards, q_values, next_values, log_rhos)
    return _retrace(*constants, *flags, cu_seqlens, lams, gamma, shared)


def _rest(*named: tuple[str, torch.Tensor]) -> list[torch.Tensor]:
    return [_check.tensor(name, x) for name, x in named]


def _constants(*given: Maybe) -> list[Maybe]:
    return [None if x is None else x.detach() if x.requires_grad else x for x in given]
