"""verl's policy losses: `policy_loss.loss_mode` by function, the options are those of its actor's config.

Shared options:
    loss_agg_mode: "token-mean" | "token-sum" | "seq-mean-token-sum" | "seq-mean-token-mean" |
        "seq-mean-token-sum-norm", the last divided by loss_scale_factor (verl falls back to the padded length) and
        by global_batch_size, the number of sequences; both must be given.
    use_kl_loss, kl_loss_coef, kl_loss_type: "k1"/"kl", "abs", "k2"/"mse", "k3"/"low_var_kl", each as written, or
        with a "+" behind it with the gradient of k2. verl bounds k3 at 10; here it is not bounded.
    entropy_coeff: pass `entropy` to `policy_loss` with it.
    norm_adv_by_std_in_grpo: std of the group with n - 1 and eps 1e-6; a group of one keeps its reward.

With a global batch's tokens or sequences pass them as `denominator`.
Source: verl 0.9.1, verl/trainer/ppo/core_algos.py and verl/workers/config/actor.py.
"""

from math import exp
from typing import Any, TypedDict

from typing_extensions import Unpack

from ..ops import _check
from ..reference.objectives import (
    CISPO,
    DRO,
    GMPO,
    SAPO,
    ClipCov,
    DPPOBinaryKL,
    DPPOBinaryTV,
    GSPOToken,
    KLCov,
    Objective,
    PPOClip,
    Reinforce,
)
from ._preset import Preset, kl_term, ratio_bounds

_AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum_norm",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum-norm": "token_sum_norm",
}
_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


class Actor(TypedDict, total=False):
    loss_agg_mode: str
    loss_scale_factor: float | None
    global_batch_size: int | None
    use_kl_loss: bool
    kl_loss_coef: float
    kl_loss_type: str
    entropy_coeff: float
    norm_adv_by_std_in_grpo: bool


def _preset(
    objective: Objective, *, loss_agg_mode: str = "token-mean", loss_scale_factor: float | None = None,
    global_batch_size: int | None = None, use_kl_loss: bool = False, kl_loss_coef: float = 0.001,
    kl_loss_type: str = "low_var_kl",
    entropy_coeff: float = 0.0, norm_adv_by_std_in_grpo: bool = True,
) -> Preset:  # fmt: skip
    aggregation = _AGGREGATIONS[_check.choice("loss_agg_mode", loss_agg_mode, tuple(_AGGREGATIONS))]
    kinds = tuple(_ESTIMATORS) + tuple(f"{kind}+" for kind in _ESTIMATORS)
    estimator = _ESTIMATORS[_check.choice("kl_loss_type", kl_loss_type, kinds).removesuffix("+")]
    loss: dict[str, Any] = {"objective": objective, "aggregation": aggregation}
    if loss_agg_mode == "token-sum":
        loss["denominator"] = 1.0
    elif aggregation == "token_sum_norm":
        loss["denominator"] = 1.0
        for name, value in (
            ("loss_scale_factor", loss_scale_factor),
            ("global_batch_size", global_batch_size),
        ):
            if value is None:
                raise ValueError(f"{name} must be given with loss_agg_mode {loss_agg_mode!r}, got None")
            loss["denominator"] *= _check.number(name, value, low=0.0, low_open=True)
    if use_kl_loss:
        loss |= kl_term(kl_loss_coef, estimator, "k2" if kl_loss_type.endswith("+") else "value")
    if _check.number("entropy_coeff", entropy_coeff) != 0:
        loss["entropy_coef"] = entropy_coeff
    scale = "std" if norm_adv_by_std_in_grpo else "none"
    return Preset({"baseline": "mean", "scale": scale, "eps": 1e-6, "ddof": 1, "singleton": "raw"}, **loss)


def ppo(
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    **actor: Unpack[Actor],
) -> Preset:
    """loss_mode "vanilla": PPO's clip with the dual clip clip_ratio_c."""
    bounds = ratio_bounds(clip_ratio_low, clip_ratio_high)
    return _preset(PPOClip(**bounds, dual_clip=clip_ratio_c), **actor)


def grpo(
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    **actor: Unpack[Actor],
) -> Preset:
    """loss_mode "vanilla" with use_kl_loss, as verl's GRPO guide sets it."""
    options: Actor = {"use_kl_loss": True, **actor}
    return ppo(
        clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high, clip_ratio_c=clip_ratio_c, **options
    )  # fmt: skip


def dapo(
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
    clip_ratio_c: float = 10.0,
    **actor: Unpack[Actor],
) -> Preset:
    """loss_mode "vanilla" with the constants of verl's DAPO recipe: clip-higher, no KL, mean over the tokens."""
    return ppo(
        clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high, clip_ratio_c=clip_ratio_c, **actor
    )  # fmt: skip


def dr_grpo(
    *, loss_scale_factor: float, global_batch_size: int, clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2, clip_ratio_c: float = 3.0,
) -> Preset:  # fmt: skip
    """loss_mode "vanilla", sums over the tokens by constants, advantages without a std."""
    return ppo(
        clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high, clip_ratio_c=clip_ratio_c,
        loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=loss_scale_factor,
        global_batch_size=global_batch_size, norm_adv_by_std_in_grpo=False,
    )  # fmt: skip


def gspo(*, clip_ratio_low: float = 3e-4, clip_ratio_high: float = 4e-4, **actor: Unpack[Actor]) -> Preset:
    """loss_mode "gspo", the token form; bounds and the mean over sequences are the paper's."""
    options: Actor = {"loss_agg_mode": "seq-mean-token-mean", **actor}
    return _preset(GSPOToken(**ratio_bounds(clip_ratio_low, clip_ratio_high)), **options)


def cispo(*, clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.2, **actor: Unpack[Actor]) -> Preset:
    """loss_mode "cispo": the weight in (1 - clip_ratio_low, 1 + clip_ratio_high)."""
    return _preset(CISPO(**ratio_bounds(clip_ratio_low, clip_ratio_high)), **actor)


def sapo(*, tau_pos: float = 1.0, tau_neg: float = 1.05, **actor: Unpack[Actor]) -> Preset:
    """loss_mode "sapo", which always means over sequences; verl's KL and entropy follow loss_agg_mode there."""
    options: Actor = {"loss_agg_mode": "seq-mean-token-mean", **actor}
    return _preset(SAPO(tau_pos, tau_neg), **options)


def gpg(**actor: Unpack[Actor]) -> Preset:
    """loss_mode "gpg": no ratio."""
    return _preset(Reinforce(), **actor)


def clip_cov(
    *, clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.2, clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0, clip_cov_ub: float = 5.0, seed: int = 0, **actor: Unpack[Actor],
) -> Preset:  # fmt: skip
    """loss_mode "clip_cov"; `seed` stands for torch's generator, from which verl draws."""
    bounds = ratio_bounds(clip_ratio_low, clip_ratio_high)
    return _preset(
        ClipCov(**bounds, fraction=clip_cov_ratio, cov_min=clip_cov_lb, cov_max=clip_cov_ub, seed=seed),
        **actor,
    )


def kl_cov(*, kl_cov_ratio: float = 0.0002, ppo_kl_coef: float = 0.1, **actor: Unpack[Actor]) -> Preset:
    """loss_mode "kl_cov"."""
    return _preset(KLCov(fraction=kl_cov_ratio, kl_coef=ppo_kl_coef), **actor)


def geo_mean(*, clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.2, **actor: Unpack[Actor]) -> Preset:
    """loss_mode "geo_mean": bounds of the log-ratio; means over all rows, those without a counting token too."""
    low = _check.number("clip_ratio_low", clip_ratio_low, low=0.0)
    high = _check.number("clip_ratio_high", clip_ratio_high, low=0.0)
    options: Actor = {"loss_agg_mode": "seq-mean-token-mean", **actor}
    return _preset(GMPO(exp(-low), exp(high)), **options)


def dppo_tv(
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 20.0,
    **actor: Unpack[Actor],
) -> Preset:
    """loss_mode "dppo_tv"; clip_ratio_c 20 is the loss's own default, where the actor's config says 3."""
    return _preset(DPPOBinaryTV(clip_ratio_low, clip_ratio_high, clip_ratio_c), **actor)


def dppo_kl(
    *, clip_ratio_low: float = 0.05, clip_ratio_high: float = 0.05, clip_ratio_c: float = 20.0,
    **actor: Unpack[Actor],
) -> Preset:  # fmt: skip
    """loss_mode "dppo_kl"; the bounds are of a divergence, 0.05 as the paper has it (the config says 0.2)."""
    return _preset(DPPOBinaryKL(clip_ratio_low, clip_ratio_high, clip_ratio_c), **actor)


def dro(*, dro_beta: float, **actor: Unpack[Actor]) -> Preset:
    """loss_mode "dro"; verl has no default for dro_beta."""
    return _preset(DRO(dro_beta), **actor)
