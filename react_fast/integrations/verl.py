"""verl: its loops over tokens and over prompts, log-probabilities from logits, and the fused LM head on torch.

| name | what ours changes |
| --- | --- |
| `core_algos.compute_gae_advantage_return` | one scan instead of a loop over tokens |
| `compute_{grpo,rloo,opo,reinforce_plus_plus,..._baseline}_outcome_advantage` | no loop over responses or tokens |
| `core_algos.get_adv_estimator_fn` | finds those, since verl's registry holds the originals |
| `verl.utils.torch_functional.logprobs_from_logits_v2` | `token_logprobs` |
| `FusedLinearForPPOFunction` (fused kernels, backend "torch") | the engine of `linear_token_logprobs` |

Numbers and gradients are verl's to rounding, at masked places too, except that a group of equal rewards gets 0,
where GRPO's loop divides the rounding of its mean by epsilon, and that a NaN reward is left out of its group.
The original is called for masks of other numbers than 0 and 1 (GRPO multiplies by them as in verl), gamma or lam
that are not numbers in [0, 1], fewer than two counting tokens, ids that are no numpy array, other dtypes or
devices, and under torch.compile.

Where flash-attn is installed, verl calls `logprobs_from_logits_flash_attn` instead of `..._v2`; it stays, since a
CPU cannot run it to compare; VERL_DISABLE_FLASH_ATTN_CE=1, verl's own switch, leads to `..._v2`. So do
`linear_cross_entropy` (Triton alone) and the estimators that have no loop (remax, `*_vectorized`) stay.
Read: verl 0.9.1.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import _core
from ..ops.advantage import discounted_returns, gae, reverse_linear_scan
from ..ops.backend import DTYPE, get_backend
from ..ops.group_advantages import group_advantages
from ..ops.logprob import token_logprobs
from ..ops.whiten import moments, whiten
from .fused_head import can_run, head_logprobs, one_dtype
from .points import Integration, Point
from .verl_cases import ESTIMATORS, FUSED, GAE, LOGPROBS

Tensor = torch.Tensor
_DEVICES = ("cpu", "cuda")
_WIDE = (torch.float32, torch.float64)
_EPS = 1e-8  # verl's masked_whiten adds it to the variance


def _covered(rewards: Tensor, mask: Tensor, index: Any = None) -> bool:
    return (
        rewards.dim() == 2
        and rewards.dtype in _WIDE
        and not rewards.requires_grad
        and rewards.device.type in _DEVICES
        and mask.shape == rewards.shape
        and mask.device == rewards.device
        and mask.dtype in (torch.int64, torch.int32, rewards.dtype)
        and (index is None or (isinstance(index, np.ndarray) and index.shape == rewards.shape[:1]))
        and not torch.compiler.is_compiling()
    )


def _counting(rewards: Tensor, mask: Tensor, index: Any = None) -> Tensor | None:
    """The mask as bool where ours covers the call; verl multiplies by it, so other numbers than 0 and 1 weigh."""
    if not _covered(rewards, mask, index):
        return None
    if mask.device.type == "cpu":
        kept, counts = mask.contiguous(), torch.empty(mask.shape, dtype=torch.bool, device="cpu")
        alone = _core.zeros_and_ones(kept.data_ptr(), DTYPE[mask.dtype], mask.numel(), counts.data_ptr())  # type: ignore[call-arg]
        return counts if alone else None
    counts = mask != 0
    return counts if bool((counts == mask).all()) else None


def _fraction(x: Any) -> bool:
    return isinstance(x, (int, float)) and 0 <= x <= 1


def group_numbers(index: np.ndarray) -> np.ndarray:
    """[N] int64, 0 for the first id, 1 for the next other one: by a dictionary quicker than by sorting uids."""
    met: dict[Any, int] = {}
    return np.fromiter((met.setdefault(x, len(met)) for x in index.tolist()), np.int64, len(index))


def _whitened_in_core(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor] | None:
    """All in one call, in no memory but the results' and a byte a step: the rest would cost more than the scan."""
    advantages, returns = (torch.empty(rewards.shape, dtype=rewards.dtype, device="cpu") for _ in range(2))
    given = [x.contiguous() for x in (rewards, values, mask)]
    done = _core.gae_carried_whitened(  # type: ignore[call-arg]
        *(x.data_ptr() for x in given), DTYPE[mask.dtype], *rewards.shape, DTYPE[rewards.dtype], gamma, lam, _EPS,
        advantages.data_ptr(), returns.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return (advantages, returns) if done else None


@torch.no_grad()
def _whitened(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor] | None:
    counts = _counting(rewards, mask)
    if counts is None:
        return None
    advantages, _ = gae(rewards, values, gamma=gamma, lam=lam, mask=counts)
    count, mean, m2 = torch.stack(moments(advantages, counts)).tolist()
    if count < 2:
        return None
    carried = reverse_linear_scan(counts.logical_not().to(rewards.dtype), advantages)
    return (carried - mean) * (m2 / (count - 1) + _EPS) ** -0.5, carried + values


def gae_advantage_return(original: Callable[..., Any]) -> Callable[..., Any]:
    """Whitened advantages and returns; a masked token has those of the next counting one, as in verl."""

    @functools.wraps(original)
    def replacement(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
    ) -> tuple[Tensor, Tensor]:
        rewards, like = token_level_rewards, (values.shape, values.dtype, values.device)
        same = like == (rewards.shape, rewards.dtype, rewards.device)
        if same and _covered(rewards, response_mask) and _fraction(gamma) and _fraction(lam):
            in_core = rewards.device.type == "cpu" and get_backend() in ("auto", "cpu")
            whitened = _whitened_in_core if in_core else _whitened
            found = whitened(rewards, values, response_mask, float(gamma), float(lam))
            if found is not None:
                return found
        return original(rewards, values, response_mask, gamma, lam)

    return replacement


def _spread(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    found = advantages[:, None] * mask
    return found, found


def grpo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6,
        norm_adv_by_std_in_grpo: bool = True, config: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not (_covered(token_level_rewards, response_mask, index) and epsilon > 0):
            return original(
                token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo, config
            )
        groups = group_numbers(index)
        ids, alone = (
            torch.from_numpy(x).to(token_level_rewards.device)
            for x in (groups, np.bincount(groups, minlength=1)[groups] == 1)
        )
        scale = "std" if norm_adv_by_std_in_grpo else "none"
        found = group_advantages(token_level_rewards.sum(-1), ids, scale=scale, eps=epsilon, singleton="raw")
        if norm_adv_by_std_in_grpo:  # the std of a group of one is 1
            found = torch.where(alone, found / (1 + epsilon), found)
        return _spread(found, response_mask)

    return replacement


def _of_groups(baseline: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Rewards less a baseline of their group: rloo, opo, and with whitening reinforce_plus_plus_baseline."""

    def of(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def replacement(
            token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6,
            config: Any = None, **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            counts = _counting(token_level_rewards, response_mask, index)
            if counts is None or (baseline == "mean" and response_mask.sum() < 2):
                return original(token_level_rewards, response_mask, index, epsilon, config, **kwargs)
            ids = torch.from_numpy(group_numbers(index)).to(token_level_rewards.device)
            lengths = counts.sum(-1) if baseline == "length_weighted" else None
            found = group_advantages(
                token_level_rewards.sum(-1),
                ids,
                baseline=baseline,
                scale="none",
                singleton="raw",
                lengths=lengths,
            )
            if baseline != "mean":
                return _spread(found, response_mask)
            whitened = whiten(found[:, None].expand(response_mask.shape), mask=counts)
            return whitened, whitened

        return replacement

    return of


def reinforce_plus_plus(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        gamma = getattr(config, "gamma", None)
        counts = _counting(token_level_rewards, response_mask) if _fraction(gamma) else None
        if counts is not None and response_mask.sum() >= 2:
            returns = discounted_returns(token_level_rewards, gamma=gamma, mask=counts)
            return whiten(returns, mask=counts), returns
        return original(token_level_rewards, response_mask, config, **kwargs)

    return replacement


def looked_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """The registered function, or what stands in its place in its module."""

    @functools.wraps(original)
    def replacement(name_or_enum: Any) -> Any:
        found = original(name_or_enum)
        module = vars(sys.modules[found.__module__]) if hasattr(found, "__name__") else {}
        current = module.get(getattr(found, "__name__", ""))
        return current if getattr(current, "__wrapped__", None) is found else found

    return replacement


def logprobs(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replacement(logits: Tensor, labels: Tensor) -> Tensor:
        covered = logits.device.type in _DEVICES and logits.is_floating_point() and logits.dim() > 1
        if not covered or labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
            return original(logits, labels)
        return token_logprobs(logits, labels).to(logits.dtype)

    return replacement


def fused_linear(original: Any) -> Any:
    """A class whose `apply` is that of verl's FusedLinearForPPOFunction."""

    class HeadLogProbs:
        forward = staticmethod(original.forward)

        @staticmethod
        def apply(
            hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0,
            chunk_size: int = 512,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            """(logp float32, entropy in hidden's dtype), [T] or [B, T]."""
            ours = can_run(hidden_states, vocab_weights) and one_dtype(hidden_states, vocab_weights)
            number = isinstance(temperature, (int, float))
            if not (ours and number and input_ids.shape == hidden_states.shape[:-1]):
                return original.apply(hidden_states, vocab_weights, input_ids, temperature, chunk_size)
            logp, entropy, _ = head_logprobs(hidden_states, vocab_weights, input_ids, temperature=temperature)
            return logp, entropy.to(hidden_states.dtype)

    return HeadLogProbs


_ALGOS = "verl.trainer.ppo.core_algos"
_TORCH = "verl.utils.torch_functional"
_FUSED = "verl.utils.experimental.torch_functional"


def _estimator(name: str, signature: str, replacement: Callable[..., Any], ours: str) -> Point:
    return Point(f"{_ALGOS}.compute_{name}_outcome_advantage", signature, replacement, ESTIMATORS[name], ours)


INTEGRATION = Integration(
    package="verl",
    distribution="verl",
    at_least=(0, 9),
    below=(1, 0),
    points=(
        Point(f"{_ALGOS}.compute_gae_advantage_return", "200d438555c8", gae_advantage_return, GAE, "gae"),
        _estimator("grpo", "037784c708b2", grpo, "group_advantages"),
        _estimator("rloo", "26c82a24df7d", _of_groups("leave_one_out"), "group_advantages"),
        _estimator("opo", "26c82a24df7d", _of_groups("length_weighted"), "group_advantages"),
        _estimator(
            "reinforce_plus_plus_baseline", "26c82a24df7d", _of_groups("mean"), "group_advantages, whiten"
        ),
        _estimator("reinforce_plus_plus", "948c46dd16c1", reinforce_plus_plus, "discounted_returns, whiten"),
        Point(
            f"{_ALGOS}.get_adv_estimator_fn", "059ab9dd3976", looked_up, lambda device: [],
            "finds the replaced estimators",
        ),
        Point(f"{_TORCH}.logprobs_from_logits_v2", "8156d74c0840", logprobs, LOGPROBS, "token_logprobs"),
        Point(
            f"{_FUSED}.FusedLinearForPPOFunction", "a615500fc093", fused_linear, FUSED, "linear_token_logprobs",
            called="forward",
        ),
    ),
)  # fmt: skip
