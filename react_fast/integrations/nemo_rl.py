"""NeMo-RL: log-probabilities from split logits and from hidden states, and its GAE.

| name | what ours changes |
| --- | --- |
| `{Chunked,}DistributedLogprob` of `distributed.model_utils` | one exchange between ranks; no float32 logits |
| `ChunkedDistributedHiddenStatesToLogprobs` (linear CE fusion) | `linear_token_logprobs` with tp_group |
| `GeneralizedAdvantageEstimator._compute_gae` of `algorithms.advantage_estimator` | one scan |

Numbers and gradients are NeMo-RL's to rounding, for targets in [0, V). The original is called for shards of other
sizes than vocab_end_index - vocab_start_index, masks of other numbers than 0 and 1, a gamma or lambda outside
[0, 1], and tensors of other dtypes or devices. Top-k and top-p (`...WithSampling`) and entropies stay.

NeMo-RL has no door for plugins: `patch("nemo_rl")` has to run in every worker. Read: NeMo-RL 0.6.0, of August
2026. NeMo-RL wants a GPU: tried were its two modules by themselves on a CPU, on one process and on two. The tests
here have stubs of the same signatures.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..ops._shard_logprob import shard_logprobs
from ..ops.advantage import gae, reverse_linear_scan
from ..ops.backend import use_reference
from ..ops.linear_logprob import is_eager, linear_token_logprobs
from .cases import in_group, numbers, pulled
from .points import Case, Integration, Point

Tensor = torch.Tensor
_DEVICES = ("cpu", "cuda")


def _recorded(inference_only: bool) -> Any:
    return torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only)


def _covered(x: Tensor, target: Tensor, size: int, first: int, end: int) -> bool:
    return (
        x.dim() == 3
        and type(x) is Tensor
        and x.device.type in _DEVICES
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and target.dtype == torch.int64
        and type(target) is Tensor
        and end - first == size
        and not use_reference()
    )


def split_logprobs(original: Any, chunks: int = 0) -> Any:
    """A class whose `apply` is that of NeMo-RL's functions of logits; `chunks` arguments before the group are no
    matter to ours."""

    class Logprobs:
        forward = staticmethod(original.forward)

        @staticmethod
        def apply(
            logits: Tensor, target: Tensor, vocab_start_index: int, vocab_end_index: int, *rest: Any
        ) -> Tensor:
            """[B, S] float32 of logits [B, S, V_rank]; rest: (chunk_size,) tp_group, inference_only."""
            group, inference_only = (*rest[chunks:], False)[:2]
            place = vocab_start_index, vocab_end_index
            same = target.shape == logits.shape[:-1]
            if not same or not _covered(logits, target, logits.shape[-1], *place):
                return original.apply(logits, target, *place, *rest)
            with _recorded(inference_only):
                return shard_logprobs(logits, target, first=vocab_start_index, group=group)[0]

    return Logprobs


class _Gathered(torch.autograd.Function):
    """All ranks' rows, one rank's after the other's; a rank's gradient is its part of what all of them get."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        ctx.part = slice(dist.get_rank(group) * len(own), (dist.get_rank(group) + 1) * len(own))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream[ctx.part], None


def head_logprobs(original: Any) -> Any:
    """A class whose `apply` is that of NeMo-RL's function of hidden states."""

    class Logprobs:
        forward = staticmethod(original.forward)

        @staticmethod
        def apply(
            tensor_parallel_hidden_states: Tensor, target: Tensor, output_weight_layer: Tensor,
            vocab_start_index: int, vocab_end_index: int, chunk_size: int, tp_group: Any,
            inference_only: bool = False,
        ) -> Tensor:  # fmt: skip
            """[B, S] float32 of hidden states [S / ranks, B, H], this rank's rows of S, and weight [V_rank, H]."""
            hidden, weight = tensor_parallel_hidden_states, output_weight_layer
            place = vocab_start_index, vocab_end_index
            ranks = dist.get_world_size(tp_group)
            ours = (
                _covered(hidden, target, len(weight), *place)
                and weight.dtype == hidden.dtype
                and target.shape == (hidden.shape[1], hidden.shape[0] * ranks)
                and is_eager(hidden)
            )
            if not ours:
                return original.apply(hidden, target, weight, *place, chunk_size, tp_group, inference_only)
            with _recorded(inference_only):
                whole = _Gathered.apply(hidden, tp_group) if ranks > 1 else hidden
                group = tp_group if ranks > 1 else None
                return linear_token_logprobs(whole.transpose(0, 1), weight, target, tp_group=group)

    return Logprobs


def compute_gae(original: Callable[..., Any]) -> Callable[..., Any]:
    """A masked token has the advantage of the next counting one, as in NeMo-RL."""

    @functools.wraps(original)
    def replacement(
        self: Any, token_level_rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: Any = None
    ) -> tuple[Tensor, Tensor]:
        rewards, lam = token_level_rewards, self.gae_lambda if gae_lambda is None else gae_lambda
        like = values.shape, values.dtype, values.device
        covered = (
            like == (rewards.shape, rewards.dtype, rewards.device)
            and rewards.dim() == 2
            and rewards.dtype in (torch.float32, torch.float64)
            and rewards.device.type in _DEVICES
            and mask.shape == rewards.shape
            and mask.device == rewards.device
            and mask.dtype != torch.bool
            and _fraction(self.gae_gamma)
            and (_fraction(lam) or isinstance(lam, Tensor))
            and bool(((mask == 0) | (mask == 1)).all())
        )
        if not covered:
            return original(self, rewards, values, mask, gae_lambda)
        counts = mask != 0
        advantages, _ = gae(rewards, values, gamma=self.gae_gamma, lam=lam, mask=counts)
        carried = reverse_linear_scan((~counts).to(rewards.dtype), advantages)
        return carried, carried + values

    return replacement


def _fraction(x: Any) -> bool:
    return isinstance(x, (int, float)) and 0 <= x <= 1


def _logit_cases(*chunk_size: int) -> Callable[[torch.device], list[Case]]:
    def cases(device: torch.device) -> list[Case]:
        def of(dtype: torch.dtype) -> Callable[[Any], dict[str, Tensor]]:
            def run(function: Any, group: Any) -> dict[str, Tensor]:
                logits = numbers(device, 2, 5, 19).to(dtype).requires_grad_()
                target = (torch.arange(10, device=device) * 7 % 19).view(2, 5)
                found = function.apply(logits, target, 0, 19, *chunk_size, group)
                read = function.apply(logits.detach(), target, 0, 19, *chunk_size, group, True)
                return pulled({"logprobs": found}, logits=logits) | {"inference": read}

            return in_group(run)

        return [Case("float32", of(torch.float32)), Case("bfloat16", of(torch.bfloat16), 0.02)]

    return cases


def _head_cases(device: torch.device) -> list[Case]:
    def of(dtype: torch.dtype) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any, group: Any) -> dict[str, Tensor]:
            hidden = numbers(device, 5, 2, 8).to(dtype).requires_grad_()
            weight = numbers(device, 19, 8).to(dtype).requires_grad_()
            target = (torch.arange(10, device=device) * 7 % 19).view(2, 5)
            found = function.apply(hidden, target, weight, 0, 19, 2, group)
            return pulled({"logprobs": found}, hidden=hidden, weight=weight)

        return in_group(run)

    # Products of 8 numbers rounded to 8 bits, and probabilities of them.
    return [Case("float32", of(torch.float32)), Case("bfloat16", of(torch.bfloat16), 0.05)]


def _gae_cases(device: torch.device) -> list[Case]:
    def of(lam: Any, dtype: torch.dtype) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any) -> dict[str, Tensor]:
            rewards, values = (numbers(device, 3, 5, seed=seed) for seed in (1, 2))
            mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0] * 5], device=device).to(dtype)
            estimator = types.SimpleNamespace(gae_lambda=0.8, gae_gamma=0.9)
            found = function(estimator, rewards, values, mask, lam)
            return dict(zip(("advantages", "returns"), found, strict=True))

        return run

    rows = torch.linspace(0.5, 1, 3, device=device)
    return [Case("a mask with gaps", of(None, torch.int64)), Case("lambda by row", of(rows, torch.float32))]


_UTILS = "nemo_rl.distributed.model_utils"
_ESTIMATOR = "nemo_rl.algorithms.advantage_estimator.GeneralizedAdvantageEstimator"
INTEGRATION = Integration(
    package="nemo_rl",
    distribution="nemo-rl",
    at_least=(0, 6),
    below=(1, 0),
    points=(
        Point(
            f"{_UTILS}.ChunkedDistributedLogprob", "ad4fe75f5191", functools.partial(split_logprobs, chunks=1),
            _logit_cases(2), "token_logprobs of split logits", called="forward",
        ),
        Point(
            f"{_UTILS}.DistributedLogprob", "2ebb8a601cad", split_logprobs, _logit_cases(),
            "token_logprobs of split logits", called="forward",
        ),
        Point(
            f"{_UTILS}.ChunkedDistributedHiddenStatesToLogprobs", "22652ddc04c3", head_logprobs, _head_cases,
            "linear_token_logprobs", called="forward",
        ),
        Point(f"{_ESTIMATOR}._compute_gae", "c5c2d509cebc", compute_gae, _gae_cases, "gae", aliases=False),
    ),
)  # fmt: skip
