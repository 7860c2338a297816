"""verl's public doors, without patching anything; the entry point of group "verl.plugins" imports this module.

    algorithm.adv_estimator=react_fast_grpo          also react_fast_{rloo,opo,reinforce_plus_plus[_baseline]}
    actor.policy_loss.loss_mode=react_fast           "vanilla", value and gradient in one pass

verl loads it in every process that imports verl, and hides what goes wrong; so one line is printed either way,
none with REACT_FAST_DISABLE. There is no react_fast_gae: verl 0.9.1 hands `values` to its own "gae" alone, which
`patch("verl")` replaces.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..ops.policy_loss import policy_loss
from ..presets import verl as presets
from .patching import disabled

Tensor = torch.Tensor
LOSS = "react_fast"
# verl's functions by the names that ours get behind "react_fast_".
_ESTIMATORS = ("grpo", "rloo", "opo", "reinforce_plus_plus_baseline", "reinforce_plus_plus")


def _denominator(mode: str, mask: Tensor, info: dict[str, Any]) -> float | Tensor | None:
    """What `policy_loss` divides by for verl's aggregation on one of `dp_size` ranks; None: its own count."""
    ranks = info.get("dp_size", 1)
    whole = info.get("batch_num_tokens" if mode == "token-mean" else "global_batch_size")
    if mode == "token-sum":
        return 1 / ranks
    if whole is None:
        if ranks > 1:
            raise ValueError(
                f"config.global_batch_info must hold the whole batch's size where dp_size is {ranks}"
            )
        if mode != "seq-mean-token-sum-norm":
            return None
        whole = mask.any(-1).sum().clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        scale = info.get("loss_scale_factor")
        whole = whole * (mask.shape[-1] if scale is None else scale)
    return whole / ranks


def loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """verl's "vanilla": PPO's clip with the dual clip, clip_ratio{,_low,_high,_c} of the actor's config.

    Args: [B, T] tensors and loss_agg_mode as verl passes them; config: its ActorConfig.
    Returns: (0-d loss, verl's metrics as numbers).
    Raises: ValueError for another loss_agg_mode, a mask of other numbers than 0 and 1, and for dp_size > 1 without
        the whole batch's size.
    """
    low, high = (
        config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high)
    )
    preset = presets.ppo(
        clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=config.get("clip_ratio_c", 3.0),
        loss_agg_mode=loss_agg_mode, loss_scale_factor=1.0, global_batch_size=1,
    )  # fmt: skip
    mask = response_mask != 0
    if not bool((mask == response_mask).all()):
        raise ValueError("response_mask must hold 0 and 1 alone, got other numbers; use loss_mode vanilla")
    found, metrics = policy_loss(
        log_prob, old_log_prob.to(log_prob.dtype), advantages.to(log_prob.dtype), mask,
        importance=None if rollout_is_weights is None else rollout_is_weights.to(log_prob.dtype),
        **{**preset, "denominator": _denominator(loss_agg_mode, mask, config.global_batch_info)},
    )  # fmt: skip
    names = "clip_ratio/low", "clip_ratio/high", "clip_ratio/dual", "approx_kl/k1"
    below, above, dual, kl = torch.stack([metrics[name].double() for name in names]).tolist()
    told = {"pg_clipfrac": below + above, "ppo_kl": kl, "pg_clipfrac_lower": dual}
    return found, {f"actor/{name}": x for name, x in told.items()}


def register() -> str:
    """Registers the names with verl; what was registered, in one line. Raises: whatever verl raises."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est, register_policy_loss

    from .verl import INTEGRATION

    register_policy_loss(LOSS)(loss)
    ours = {point.target.rpartition(".")[2]: point.replacement for point in INTEGRATION.points}
    for name in _ESTIMATORS:
        original = get_adv_estimator_fn(name)
        original = getattr(original, "__wrapped__", original)
        register_adv_est(f"react_fast_{name}")(_as_registered(name, ours[original.__name__](original)))
    return f"adv_estimator react_fast_{{{','.join(_ESTIMATORS)}}}, loss_mode {LOSS}"


def _as_registered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """verl calls its own "grpo" with norm_adv_by_std_in_grpo, but registered functions with the config alone."""
    if name != "grpo":
        return function

    def grpo(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
        return function(token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=by_std)

    return grpo


def _load() -> None:
    if disabled("verl"):
        return
    try:
        print(f"react_fast is active in verl: {register()}", file=sys.stderr, flush=True)
    except Exception as error:  # verl would hide it
        reason = " ".join(str(error).split())
        print(
            f"react_fast is not active in verl: {type(error).__name__}: {reason}", file=sys.stderr, flush=True
        )


_load()
