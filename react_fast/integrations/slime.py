"""slime: log-probabilities from Megatron's split logits, and its scans over tokens.

| name in `slime.utils.ppo_utils` | what ours changes |
| --- | --- |
| `calculate_log_probs_and_entropy` | one exchange between ranks, not three; no float32 logits, no chunks |
| `chunked_gae`, `vanilla_gae`, `chunked_discounted_returns` | one scan |

    --custom-advantage-function-path react_fast.integrations.slime.advantages

replaces no name, and computes what slime does for `--advantage-estimator` ppo and reinforce_plus_plus on packed
responses, without padding them to the longest.

Numbers and gradients are slime's to rounding, for tokens in [0, V). The original is called for a
log_prob_keep_mask (top-p), gamma or lambda that are not numbers in [0, 1], and tensors of other dtypes or devices.

slime has no door for plugins beside its paths: `patch("slime")` has to run in every Ray worker, for example at the
import of a module that such a path names. Read: slime 0.3.1, of August 2026. slime wants Megatron and a GPU: tried
was its `ppo_utils` by itself on a CPU, on one process and on two; 68 of its 76 tests pass, and the others want the
last bit of float32 (1e-8). The tests here have stubs of the same signatures.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..ops._shard_logprob import shard_logprobs
from ..ops.advantage import discounted_returns, gae
from .cases import in_group, numbers
from .points import Case, Integration, Point

Tensor = torch.Tensor
_DEVICES = ("cpu", "cuda")


def log_probs_and_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(
        logits: Tensor, tokens: Tensor, tp_group: Any, with_entropy: bool = False, chunk_size: int = -1,
        log_prob_keep_mask: Tensor | None = None, with_entropy_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(logp [N, 1], entropy [N] or None) of logits [N, V_rank], float32."""
        covered = (
            log_prob_keep_mask is None
            and logits.dim() == 2
            and len(logits) > 0
            and logits.device.type in _DEVICES
            and logits.is_floating_point()
            and logits.dtype != torch.float64
            and tokens.shape == logits.shape[:1]
            and tokens.dtype == torch.int64
        )
        if not covered:
            return original(
                logits, tokens, tp_group, with_entropy, chunk_size, log_prob_keep_mask, with_entropy_grad
            )
        group = dist.group.WORLD if tp_group is None and dist.is_initialized() else tp_group
        first = 0 if group is None else dist.get_rank(group) * logits.shape[-1]
        logp, entropy = shard_logprobs(logits, tokens, first=first, group=group, return_entropy=with_entropy)
        if with_entropy and not with_entropy_grad:
            entropy = entropy.detach()
        return logp[:, None], entropy if with_entropy else None

    return replacement


def _covered(rewards: Tensor, *factors: Any) -> bool:
    return (
        rewards.dim() == 2
        and rewards.dtype in (torch.float32, torch.float64)
        and rewards.device.type in _DEVICES
        and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in factors)
    )


def advantages_and_returns(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(
        rewards: Tensor, values: Tensor, gamma: Any, lambd: Any, *chunk_size: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        like = values.shape, values.dtype, values.device
        if like == (rewards.shape, rewards.dtype, rewards.device) and _covered(rewards, gamma, lambd):
            return gae(rewards, values, gamma=gamma, lam=lambd)
        return original(rewards, values, gamma, lambd, *chunk_size, **options)

    return replacement


def returns(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replacement(rewards: Tensor, discount: Any, *chunk_size: Any, **options: Any) -> Tensor:
        if _covered(rewards, discount):
            return discounted_returns(rewards, gamma=discount)
        return original(rewards, discount, *chunk_size, **options)

    return replacement


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """slime's own advantages and returns for estimators ppo and reinforce_plus_plus, into `rollout_data`.

    Args:
        args: advantage_estimator, gamma, lambd, kl_coef.
        rollout_data: lists with one entry for each response: "rewards" numbers, "kl" [L_i] float, "loss_masks"
            [L_i], "response_lengths"; "values" [L_i] for ppo.
    Raises: ValueError in one line for another estimator, and under context parallelism, where a rank holds a part
        of each response.
    """
    kind, kl = args.advantage_estimator, rollout_data["kl"]
    if kind not in ("ppo", "reinforce_plus_plus"):
        raise ValueError(f"advantage_estimator must be ppo or reinforce_plus_plus, got {kind}")
    lengths = [len(x) for x in kl]
    if lengths != list(rollout_data["response_lengths"]):
        raise ValueError("context_parallel_size must be 1, got responses of which this rank holds parts")
    masks = [
        torch.ones_like(x) if kind == "ppo" else m
        for x, m in zip(kl, rollout_data["loss_masks"], strict=True)
    ]
    rewards = [-args.kl_coef * x * mask for x, mask in zip(kl, masks, strict=True)]
    for i, (row, mask) in enumerate(zip(rewards, masks, strict=True)):
        row[mask.nonzero()[-1]] += rollout_data["rewards"][i]
    packed, ends = torch.cat(rewards), torch.tensor([0, *lengths], device=kl[0].device).cumsum(0)
    if kind == "ppo":
        values = torch.cat(rollout_data["values"]).to(packed.dtype)
        found = gae(packed, values, gamma=args.gamma, lam=args.lambd, cu_seqlens=ends)
    else:
        found = (discounted_returns(packed, gamma=args.gamma, cu_seqlens=ends),) * 2
    for name, x in zip(("advantages", "returns"), found, strict=True):
        rollout_data[name] = list(x.split(lengths))


def _log_prob_cases(device: torch.device) -> list[Case]:
    def with_options(dtype: torch.dtype, **options: Any) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any, group: Any) -> dict[str, Tensor]:
            logits = numbers(device, 5, 19).to(dtype).requires_grad_()
            found = function(logits, torch.arange(5, device=device) * 7 % 19, group, **options)
            results = {
                name: x for name, x in zip(("log_probs", "entropy"), found, strict=True) if x is not None
            }
            # Of all at once: slime's backward writes over what its forward kept.
            upstream = torch.linspace(-1, 2, 5, device=device)
            loss = sum((x.flatten() * upstream).sum() for x in results.values())
            return {**{k: x.detach() for k, x in results.items()}, "d": torch.autograd.grad(loss, logits)[0]}

        return in_group(run)

    read = {"with_entropy": True, "with_entropy_grad": False, "chunk_size": 2}
    return [
        Case("log-probabilities alone", with_options(torch.float32)),
        Case("entropy without gradient, in chunks", with_options(torch.float32, **read)),
        Case("entropy", with_options(torch.float32, with_entropy=True)),
        Case("bfloat16", with_options(torch.bfloat16, with_entropy=True), 0.02),
    ]


def _scan_cases(with_values: bool) -> Callable[[torch.device], list[Case]]:
    def cases(device: torch.device) -> list[Case]:
        def run(function: Any) -> dict[str, Tensor]:
            rewards, values = (numbers(device, 3, 5, seed=seed) for seed in (1, 2))
            found = function(rewards, values, 0.9, 0.8) if with_values else [function(rewards, 0.9)]
            return {f"result {i}": x for i, x in enumerate(found)}

        return [Case("five steps", run)]

    return cases


_UTILS = "slime.utils.ppo_utils"
INTEGRATION = Integration(
    package="slime",
    distribution="slime",
    at_least=(0, 3),
    below=(1, 0),
    points=(
        Point(
            f"{_UTILS}.calculate_log_probs_and_entropy", "47fa49061bff", log_probs_and_entropy, _log_prob_cases,
            "token_logprobs of split logits",
        ),
        Point(f"{_UTILS}.chunked_gae", "12b1220335eb", advantages_and_returns, _scan_cases(True), "gae"),
        Point(f"{_UTILS}.vanilla_gae", "cfc326666d69", advantages_and_returns, _scan_cases(True), "gae"),
        Point(
            f"{_UTILS}.chunked_discounted_returns", "46b7f62445f7", returns, _scan_cases(False),
            "discounted_returns",
        ),
    ),
)  # fmt: skip
