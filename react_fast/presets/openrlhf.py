"""OpenRLHF's policy losses: actor.policy_loss_type by function, the options are those of its command line.

Shared options:
    kl_init_coef, kl_use_loss, kl_estimator (algo.kl.*): with kl_use_loss a term differentiated as written: "k2" or
        "k3", since "k1" has a gradient of 0 on average; without it the penalty belongs into the rewards
        (`kl_rewards`) and there is no term here. OpenRLHF bounds an estimate at +-10; here it is not bounded.
    entropy_coef: pass `entropy` to `policy_loss` with it.
    advantage_estimator: "group_norm" (std of the group with n - 1, eps 1e-9), "dr_grpo", "reinforce_baseline"
        (mean of the group), "rloo" (mean of the others).

With a global batch's tokens or sequences pass them as `denominator`.
is_correction_* is `importance_weights`: level "token" with mode "clip" truncates, with "mask" masks, level "seq"
is bound_level "geometric". Its kl unbiased_gradient is not among `policy_loss`'s; "ratio" has the same mean.
Source: OpenRLHF 0.11.2, openrlhf/models/loss.py, cli/train_ppo_ray.py and trainer/ppo_utils.
"""

from typing import Any, TypedDict

from typing_extensions import Unpack

from ..ops import _check
from ..reference.objectives import GSPO, Objective, PPOClip
from ._preset import Preset, kl_term, ratio_bounds

_ESTIMATORS: dict[str, dict[str, Any]] = {
    "group_norm": {"baseline": "mean", "scale": "std", "eps": 1e-9, "ddof": 1},
    "dr_grpo": {"baseline": "mean", "scale": "none"},
    "reinforce_baseline": {"baseline": "mean", "scale": "none"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
}


class Shared(TypedDict, total=False):
    kl_init_coef: float
    kl_use_loss: bool
    kl_estimator: str
    entropy_coef: float
    advantage_estimator: str


def _preset(
    objective: Objective, aggregation: str, *, kl_init_coef: float = 0.01, kl_use_loss: bool = False,
    kl_estimator: str = "k1", entropy_coef: float = 0.0, advantage_estimator: str = "group_norm",
) -> Preset:  # fmt: skip
    _check.choice("advantage_estimator", advantage_estimator, tuple(_ESTIMATORS))
    _check.choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    loss: dict[str, Any] = kl_term(kl_init_coef, kl_estimator) if kl_use_loss else {}
    if _check.number("entropy_coef", entropy_coef) != 0:
        loss["entropy_coef"] = entropy_coef
    return Preset(
        _ESTIMATORS[advantage_estimator].copy(), objective=objective, aggregation=aggregation, **loss
    )


def ppo(
    *,
    eps_clip_low_high: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    **shared: Unpack[Shared],
) -> Preset:
    """policy_loss_type "ppo": mean over the tokens."""
    return _preset(PPOClip(**ratio_bounds(*eps_clip_low_high), dual_clip=dual_clip), "token_mean", **shared)


def gspo(
    *,
    eps_clip_low_high: tuple[float, float] = (3e-4, 4e-4),
    dual_clip: float | None = None,
    **shared: Unpack[Shared],
) -> Preset:
    """policy_loss_type "gspo": mean over the sequences; the bounds are the paper's (OpenRLHF's default: 0.2)."""
    return _preset(
        GSPO(**ratio_bounds(*eps_clip_low_high), dual_clip=dual_clip), "seq_mean_token_mean", **shared
    )
