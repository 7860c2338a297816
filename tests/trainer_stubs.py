"""Names of trainers that want a GPU, with their signatures and what they compute written out in torch."""

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

VERSIONS = {"prime-rl": "0.8.0", "slime": "0.3.1", "nemo-rl": "0.6.0+abc1234"}


def _of_logits(logits: Any, ids: Any) -> tuple[Any, Any]:
    """(logp, entropy), float32."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


class _Summed(torch.autograd.Function):
    """A sum over ranks, each of which has the same upstream gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, group: Any) -> Any:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        return upstream, None


def of_shards(logits: Any, ids: Any, first: int, group: Any) -> tuple[Any, Any]:
    """(logp, entropy) of logits [..., V_rank], those of the vocabulary from `first` on; float32 or wider."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    largest = logits.detach().amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    shifted = logits - largest[..., None]
    total = _Summed.apply(shifted.exp().sum(-1), group)
    owned = (ids >= first) & (ids < first + logits.shape[-1])
    own = shifted.gather(-1, (ids - first).where(owned, 0)[..., None])[..., 0]
    mean = _Summed.apply((shifted.exp() * shifted).sum(-1), group) / total
    return _Summed.apply(own.where(owned, 0), group) - total.log(), total.log() - mean


# ---- prime-rl


def _prime_head(hidden: Any, weight: Any, labels: Any, inv_temperature: Any, softcap: Any) -> tuple[Any, Any]:
    logits = (hidden @ weight.T).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp, entropy = _of_logits(logits * inv_temperature[:, None], labels)
    return logp, entropy.detach()


class _SequenceChunkedLogProbEntropyFn:
    @staticmethod
    def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size): ...

    @staticmethod
    def apply(hidden, weight, labels, inv_temperature, chunk_size):
        return _prime_head(hidden, weight, labels, inv_temperature, None)


class _GemmaChunkedLogProbEntropyFn:
    @staticmethod
    def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size, softcap): ...

    @staticmethod
    def apply(hidden, weight, labels, inv_temperature, chunk_size, softcap):
        return _prime_head(hidden, weight, labels, inv_temperature, softcap)


@dataclass
class LossInputs:
    trainer_logprobs: Any
    inference_logprobs: Any
    ref_logprobs: Any
    advantages: Any
    loss_mask: Any
    loss_weights: Any = None


@dataclass
class LossOutputs:
    loss: Any
    metrics: dict[str, Any]


# ---- slime


def calculate_log_probs_and_entropy(
    logits,
    tokens,
    tp_group,
    with_entropy=False,
    chunk_size=-1,
    log_prob_keep_mask=None,
    with_entropy_grad=True,
):
    if not len(logits):
        return logits.new_zeros((0,)), logits.new_zeros((0,)) if with_entropy else None
    if log_prob_keep_mask is not None:
        logits = logits.masked_fill(~log_prob_keep_mask, float("-inf"))
    if tp_group is None:
        logp, entropy = _of_logits(logits, tokens)
    else:
        logp, entropy = of_shards(logits, tokens, dist.get_rank(tp_group) * logits.shape[-1], tp_group)
    if not with_entropy_grad:
        entropy = entropy.detach()
    return logp[:, None], entropy if with_entropy else None


def _gae(rewards, values, gamma, lambd):
    advantages, following, after = [], 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * after - values[:, t] + gamma * lambd * following
        advantages, after = [following, *advantages], values[:, t]
    found = torch.stack(advantages, 1)
    return found, found + values


def vanilla_gae(rewards, values, gamma, lambd):
    return _gae(rewards, values, gamma, lambd)


def chunked_gae(rewards, values, gamma, lambd, chunk_size=128):
    return _gae(rewards, values, gamma, lambd)


def chunked_discounted_returns(rewards, discount, chunk_size=128):
    return _gae(rewards, torch.zeros_like(rewards), discount, 1.0)[0]


# ---- NeMo-RL


class ChunkedDistributedLogprob:
    @staticmethod
    def forward(
        ctx, vocab_parallel_logits, target, vocab_start_index, vocab_end_index, chunk_size, tp_group,
        inference_only=False,
    ): ...  # fmt: skip

    @staticmethod
    def apply(logits, target, first, end, chunk_size, group, inference_only=False):
        return of_shards(logits, target, first, group)[0]


class DistributedLogprob:
    @staticmethod
    def forward(
        ctx, vocab_parallel_logits, target, vocab_start_index, vocab_end_index, group, inference_only=False
    ): ...

    @staticmethod
    def apply(logits, target, first, end, group, inference_only=False):
        return of_shards(logits, target, first, group)[0]


class ChunkedDistributedHiddenStatesToLogprobs:
    @staticmethod
    def forward(
        ctx, tensor_parallel_hidden_states, target, output_weight_layer, vocab_start_index, vocab_end_index,
        chunk_size, tp_group, inference_only=False,
    ): ...  # fmt: skip

    @staticmethod
    def apply(hidden, target, weight, first, end, chunk_size, group, inference_only=False):
        return of_shards((hidden @ weight.T).transpose(0, 1), target, first, group)[0]


class GeneralizedAdvantageEstimator:
    def __init__(self, gamma, lam):
        self.gae_gamma, self.gae_lambda = gamma, lam

    def _compute_gae(self, token_level_rewards, values, mask, gae_lambda=None):
        lam = self.gae_lambda if gae_lambda is None else gae_lambda
        advantages, following, after = [], torch.zeros(len(values)), torch.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            here = token_level_rewards[:, t] + self.gae_gamma * after - values[:, t]
            here = here + self.gae_gamma * lam * following
            counts = mask[:, t] != 0
            following, after = here.where(counts, following), values[:, t].where(counts, after)
            advantages.insert(0, following)
        found = torch.stack(advantages, 1)
        return found, found + values


MODULES = {
    "prime_rl.trainer.models.layers.lm_head": [_SequenceChunkedLogProbEntropyFn],
    "prime_rl.trainer.models.layers.lm_head_gemma": [_GemmaChunkedLogProbEntropyFn],
    "prime_rl.trainer.rl.loss": [LossInputs, LossOutputs],
    "slime.utils.ppo_utils": [
        calculate_log_probs_and_entropy, vanilla_gae, chunked_gae, chunked_discounted_returns,
    ],
    "slime.backends.megatron_utils.loss": [calculate_log_probs_and_entropy],  # imported there by name
    "nemo_rl.distributed.model_utils": [
        ChunkedDistributedLogprob, DistributedLogprob, ChunkedDistributedHiddenStatesToLogprobs,
    ],
    "nemo_rl.algorithms.advantage_estimator": [GeneralizedAdvantageEstimator],
}  # fmt: skip


@contextmanager
def trainers() -> Iterator[dict[str, Any]]:
    """The stubs can be imported inside, and their distributions have versions; the modules by name."""
    real = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        for path, things in MODULES.items():
            parts = path.split(".")
            for count in range(1, len(parts) + 1):
                name = ".".join(parts[:count])
                module = sys.modules.get(name) or types.ModuleType(name)
                patch.setitem(sys.modules, name, module)
                if count > 1:
                    setattr(sys.modules[".".join(parts[: count - 1])], parts[count - 1], module)
            for thing in things:
                setattr(sys.modules[path], thing.__name__, thing)
        patch.setattr(importlib.metadata, "version", lambda name: VERSIONS.get(name) or real(name))
        yield {path: sys.modules[path] for path in MODULES}
