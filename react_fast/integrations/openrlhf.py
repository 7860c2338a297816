"""OpenRLHF: log-probabilities and entropies from logits, and the experience maker's loops over tokens.

| name | what ours changes |
| --- | --- |
| `openrlhf.models.utils.log_probs_from_logits`, in `models.actor` too | `token_logprobs` |
| `compute_entropy`, likewise | `token_logprobs`, no torch.compile |
| `openrlhf.models.loss.PolicyLoss.forward` | `policy_loss`: value and gradient in one pass |
| `RemoteExperienceMaker.get_advantages_and_returns`, `get_cumulative_returns` | one scan, no loop over tokens |

Numbers and gradients are OpenRLHF's to the rounding of the dtype, except that a loss without any token is 0, not
NaN. The original is called for a temperature (the actor divides the logits itself), gamma or lambda that are not
numbers in [0, 1], losses of type gspo and those with is_correction, and tensors of other dtypes or devices.

OpenRLHF has no door for plugins: `patch("openrlhf")` has to run in every Ray worker. Its modules import
flash_attn, deepspeed and vllm; where these are missing, `patch` refuses.
Read: OpenRLHF 0.11.2.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from ..ops.advantage import discounted_returns, gae
from ..ops.logprob import token_logprobs
from ..ops.policy_loss import policy_loss
from ..presets import openrlhf as presets
from .cases import numbers
from .points import Case, Integration, Point

Tensor = torch.Tensor
_DEVICES = ("cpu", "cuda")


def log_probs(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replacement(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        covered = logits.device.type in _DEVICES and logits.is_floating_point() and logits.dim() > 1
        if (
            not covered
            or temperature != 1
            or labels.shape != logits.shape[:-1]
            or labels.dtype != torch.int64
        ):
            return original(logits, labels, temperature)
        return token_logprobs(logits, labels).to(logits.dtype)

    return replacement


def entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replacement(logits: Tensor) -> Tensor:
        if logits.device.type not in _DEVICES or not logits.is_floating_point():
            return original(logits)
        first = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return token_logprobs(logits, first, return_entropy=True)[1].to(logits.dtype)

    return replacement


def _covered(rewards: Tensor, mask: Tensor | None, *numbers: Any) -> bool:
    return (
        rewards.dim() == 2
        and rewards.dtype in (torch.float32, torch.float64)
        and rewards.device.type in _DEVICES
        and (mask is None or (mask.shape == rewards.shape and mask.device == rewards.device))
        and (mask is None or not mask.is_floating_point() or mask.dtype == rewards.dtype)
        and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in numbers)
    )


def advantages_and_returns(original: Callable[..., Any]) -> Callable[..., Any]:
    """A masked token is a step of reward and value 0, as in OpenRLHF."""

    @functools.wraps(original)
    @torch.no_grad()
    def replacement(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: Any, lambd: Any
    ) -> tuple[Tensor, Tensor]:
        like = values.shape, values.dtype, values.device
        same = like == (rewards.shape, rewards.dtype, rewards.device)
        if not same or not _covered(rewards, action_mask, gamma, lambd):
            return original(self, values, rewards, action_mask, gamma, lambd)
        if action_mask is not None:
            values, rewards = action_mask * values, action_mask * rewards
        return gae(rewards, values, gamma=gamma, lam=lambd)

    return replacement


def cumulative_returns(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    @torch.no_grad()
    def replacement(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: Any) -> Tensor:
        if not _covered(rewards, action_mask, gamma):
            return original(self, rewards, action_mask, gamma)
        return discounted_returns(rewards if action_mask is None else action_mask * rewards, gamma=gamma)

    return replacement


def loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """(loss, share of clipped tokens, KL(old || new) by k1, None, None), as PolicyLoss has them."""

    @functools.wraps(original)
    def replacement(
        self: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None, dp_size: int = 1, batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Any:  # fmt: skip
        like = [(x.shape, x.dtype, x.device) for x in (log_probs, old_log_probs, advantages)]
        ours = (
            self.policy_loss_type == "ppo"
            and self.is_correction_level == "off"
            and like[0] == like[1] == like[2]
            and _covered(log_probs, action_mask)
        )
        if not ours or action_mask is None or action_mask.is_floating_point():
            return original(
                self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size,
                batch_num_tokens, global_batch_size,
            )  # fmt: skip
        preset = presets.ppo(
            eps_clip_low_high=(self.clip_eps_low, self.clip_eps_high), dual_clip=self.dual_clip
        )
        whole = batch_num_tokens if self.token_level_loss else global_batch_size
        found, metrics = policy_loss(
            log_probs, old_log_probs.detach(), advantages.detach(), action_mask,
            **{**preset, "aggregation": "token_mean" if self.token_level_loss else "seq_mean_token_mean"},
            denominator=None if whole is None else whole / dp_size,
        )  # fmt: skip
        clipped = metrics["clip_ratio/low"] + metrics["clip_ratio/high"]
        return found, clipped, metrics["approx_kl/k1"], None, None

    return replacement


def _logits(call: Callable[..., Tensor], *dtypes: torch.dtype) -> Callable[[torch.device], list[Case]]:
    def cases(device: torch.device) -> list[Case]:
        def run(dtype: torch.dtype) -> Callable[[Any], dict[str, Tensor]]:
            def run(function: Any) -> dict[str, Tensor]:
                logits = numbers(device, 2, 5, 19).to(dtype).requires_grad_()
                labels = (torch.arange(10, device=device) * 7 % 19).view(2, 5)
                with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
                    found = call(function, logits, labels)
                upstream = torch.linspace(-1, 2, 10, device=device).view(2, 5).to(found.dtype)
                return {"result": found.detach(), "gradient": torch.autograd.grad(found, logits, upstream)[0]}

            return run

        return [Case(str(x), run(x), 0.02 if x == torch.bfloat16 else 1e-5) for x in dtypes]

    return cases


def _returns(with_values: bool) -> Callable[[torch.device], list[Case]]:
    def cases(device: torch.device) -> list[Case]:
        def run(masked: bool) -> Callable[[Any], dict[str, Tensor]]:
            def run(function: Any) -> dict[str, Tensor]:
                rewards, values = (numbers(device, 3, 5, seed=seed) for seed in (1, 2))
                mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0] * 5], device=device).bool()
                given = (rewards, mask if masked else None, 0.9)
                found = function(None, values, *given, 0.8) if with_values else [function(None, *given)]
                return {f"result {i}": x for i, x in enumerate(found)}

            return run

        return [Case("a mask with gaps", run(True)), Case("no mask", run(False))]

    return cases


def _losses(device: torch.device) -> list[Case]:
    def of(by_token: bool, dual_clip: float | None, **sizes: float) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any) -> dict[str, Tensor]:
            old, moved, advantages = (numbers(device, 3, 5, seed=seed) for seed in (1, 2, 3))
            mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0] * 5], device=device)
            logp = (old + 0.5 * moved).requires_grad_()
            module = types.SimpleNamespace(
                policy_loss_type="ppo", is_correction_level="off", token_level_loss=by_token, dual_clip=dual_clip,
                clip_eps_low=0.2, clip_eps_high=0.3,
            )  # fmt: skip
            found = function(module, logp, old, advantages, mask, **sizes)
            names = ("loss", "clip ratio", "kl")
            results = {name: x.detach() for name, x in zip(names, found, strict=False)}
            return results | {"gradient": torch.autograd.grad(found[0], logp)[0]}

        return run

    return [
        Case("tokens", of(True, None)),
        Case("tokens of a whole batch, dual clip", of(True, 1.5, dp_size=2, batch_num_tokens=9)),
        Case("sequences", of(False, None)),
        Case("sequences of a whole batch", of(False, 1.5, dp_size=2, global_batch_size=5)),
    ]


_UTILS = "openrlhf.models.utils"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker"
_LOG_PROBS = _logits(lambda f, logits, labels: f(logits, labels), torch.float32, torch.bfloat16)
_ENTROPY = _logits(lambda f, logits, labels: f(logits), torch.float32)
INTEGRATION = Integration(
    package="openrlhf",
    distribution="openrlhf",
    at_least=(0, 11),
    below=(1, 0),
    points=(
        Point(f"{_UTILS}.log_probs_from_logits", "f5e64ae81a87", log_probs, _LOG_PROBS, "token_logprobs"),
        Point(f"{_UTILS}.compute_entropy", "6be5166f01e9", entropy, _ENTROPY, "token_logprobs"),
        Point(
            "openrlhf.models.loss.PolicyLoss.forward", "c11ac6fde007", loss, _losses, "policy_loss", aliases=False
        ),
        Point(
            f"{_MAKER}.get_advantages_and_returns", "7f3be77837da", advantages_and_returns, _returns(True), "gae",
            aliases=False,
        ),
        Point(
            f"{_MAKER}.get_cumulative_returns", "34e8786f13a4", cumulative_returns, _returns(False),
            "discounted_returns", aliases=False,
        ),
    ),
)  # fmt: skip
