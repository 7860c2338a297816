"""The contestants of the log-prob benchmarks, each called as its own documentation or trainer calls it.

A builder returns a callable, or raises AbsentError (cannot compute this case here) or ImportError (not installed).
    LOGITS   builder() -> op(logits [N, V], ids [N], entropy: bool) -> (logp,) or (logp, H)
    LINEAR   builder(head) -> op(hidden [N, D], weight [V, D], ids [N]) -> logp [N]
    POLICY   builder(inputs, old [B, T]) -> op() -> scalar loss: PPO clip at 0.8 and 1.2, mean over counting tokens
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import react_fast as rf

from ..common import DEVICE, OURS, AbsentError
from ..heads import Head, Inputs

Tensor = torch.Tensor
LogitsOp = Callable[[Tensor, Tensor, bool], tuple[Tensor, ...]]
LinearOp = Callable[[Tensor, Tensor, Tensor], Tensor]
PolicyOp = Callable[[], Tensor]

CLIP = 0.2
# Head, dtype and gradients make more variants of one function than the default of 8, behind which torch.compile
# silently runs it uncompiled.
torch._dynamo.config.recompile_limit = 64


def need_cuda(library: str) -> None:
    if DEVICE != "cuda":
        raise AbsentError(f"{library} runs on CUDA only")


def need_no_softcap(head: Head, library: str) -> None:
    if head.softcap is not None:
        raise AbsentError(f"{library} has no softcap")


# From logits.


def eager_from_logits(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """What trainers write."""
    log_p = torch.log_softmax(logits, -1)
    logp = log_p.gather(-1, ids[:, None])[:, 0]
    return (logp, -(log_p.exp() * log_p).sum(-1)) if entropy else (logp,)


@cache
def compiled(op: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile once per function, so that shapes share what has been compiled."""
    return torch.compile(op)


def ours_from_logits(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    if entropy:
        return rf.token_logprobs(logits, ids, return_entropy=True)
    return (rf.token_logprobs(logits, ids),)


def trl_from_logits() -> LogitsOp:
    """The call of TRL's trainers (GRPOTrainer._get_per_token_logps_and_entropies): two functions."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def op(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
        logp = selective_log_softmax(logits, ids)
        return (logp, entropy_from_logits(logits)) if entropy else (logp,)

    return op


LOGITS: dict[str, Callable[[], LogitsOp]] = {
    OURS: lambda: ours_from_logits,
    "torch": lambda: eager_from_logits,
    "torch.compile": lambda: compiled(eager_from_logits),
    "TRL selective": trl_from_logits,
}


# From hidden states and the head.


def eager_linear(hidden: Tensor, weight: Tensor, ids: Tensor, softcap: float | None) -> Tensor:
    """What trainers write: the logits as a whole, float32, log_softmax, gather."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]


def ours_linear(head: Head) -> LinearOp:
    return lambda hidden, weight, ids: rf.linear_token_logprobs(hidden, weight, ids, softcap=head.softcap)


def trl_linear(head: Head) -> LinearOp:
    """The call in TRL's patched model forward (trl.trainer.utils), with its own chunk size."""
    from trl.trainer import utils

    def op(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, head.softcap, 1.0, ()
        )[0]

    return op


def liger_linear(head: Head) -> LinearOp:
    """Per-token NLL for RL; on CPU 512-token chunks in torch, which Liger took from verl's FusedLinearForPPO."""
    need_no_softcap(head, "Liger's scaled cross-entropy")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return lambda hidden, weight, ids: (
        -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, ids, 1.0)
    )


def liger_chunked(head: Head) -> LinearOp:
    """What Liger's GRPO and PPO losses call for log-probs, with their chunk of the vocabulary."""
    need_no_softcap(head, "Liger's chunked loss")
    from liger_kernel.chunked_loss import fused_linear_ppo as ppo

    def op(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return ppo._ChunkedSelectiveLogProbFunction.apply(
            hidden, weight, ids, None, 1.0, ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
        )

    return op


def liger_flce(head: Head) -> LinearOp:
    need_cuda("Liger's Triton fused linear cross-entropy")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    return lambda hidden, weight, ids: -loss(hidden, weight, ids, reduction="none", softcap=head.softcap)


def cce(head: Head, **options: Any) -> LinearOp:
    """cut-cross-entropy; its own kernel is Triton, on CPU its documentation offers impl="torch_compile"."""
    from cut_cross_entropy import linear_cross_entropy

    chosen = {"impl": "torch_compile"} if DEVICE == "cpu" else options

    def op(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, ids, softcap=head.softcap, reduction="none", **chosen)

    return op


def cce_exact(head: Head) -> LinearOp:
    need_cuda("cut-cross-entropy's filter, and so its unfiltered kernel,")
    return cce(head, impl="cce", filter_eps=None)


def quack(head: Head) -> LinearOp:
    need_cuda("QuACK")
    need_no_softcap(head, "QuACK's linear cross-entropy")
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return lambda hidden, weight, ids: -linear_cross_entropy_func(hidden, weight, None, ids, reduction="none")


def torch_chunked(head: Head) -> LinearOp:
    """PyTorch's chunked path."""
    need_no_softcap(head, "F.linear_cross_entropy")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise AbsentError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")

    def op(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options)

    return op


def verl_linear(head: Head) -> LinearOp:
    need_no_softcap(head, "verl's FusedLinearForPPO")
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
    except ImportError:
        raise AbsentError(
            "verl is not installed: it brings ray, wandb and hydra; Liger's CPU path is the same code"
        ) from None
    module = FusedLinearForPPO()
    return lambda hidden, weight, ids: module(hidden, weight, ids)[0]


LINEAR: dict[str, Callable[[Head], LinearOp]] = {
    OURS: ours_linear,
    "torch": lambda head: lambda h, w, ids: eager_linear(h, w, ids, head.softcap),
    "torch.compile": lambda head: lambda h, w, ids: compiled(eager_linear)(h, w, ids, head.softcap),
    "F.linear_cross_entropy": torch_chunked,
    "TRL chunked": trl_linear,
    "Liger scaled CE": liger_linear,
    "Liger chunked": liger_chunked,
    "Liger FLCE": liger_flce,
    "CCE": cce,
    "CCE exact": cce_exact,
    "QuACK": quack,
    "verl": verl_linear,
}
# Hold logits [N, V] as a whole, several times over.
WHOLE_LOGITS = (
    {"torch", "torch.compile", "CCE", "QuACK"} if DEVICE == "cpu" else {"torch", "torch.compile", "QuACK"}
)


# With the policy loss behind it.


def clipped_mean(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The PPO loss the way trainers write it."""
    ratio = torch.exp(logp - old)
    a = advantages[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def ours_policy(inputs: Inputs, old: Tensor, mebibytes: int | None = None) -> PolicyOp:
    """`mebibytes`: REACT_FAST_TILE_MIB, which decides into how many blocks the rows are cut."""
    shape = (*inputs.grid, inputs.head.dim)

    def op() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            if mebibytes is not None:
                patch.setenv("REACT_FAST_TILE_MIB", str(mebibytes))
            return rf.linear_policy_loss(
                inputs.hidden.view(shape), inputs.weight, inputs.ids.view(inputs.grid), old, inputs.advantages,
                inputs.mask, softcap=inputs.head.softcap,
            ).loss  # fmt: skip

    return op


def policy_over(build: Callable[[Head], LinearOp]) -> Callable[[Inputs, Tensor], PolicyOp]:
    """Our policy_loss behind a log-prob function: the same few microseconds of loss for each of them."""

    def builder(inputs: Inputs, old: Tensor) -> PolicyOp:
        logprobs = build(inputs.head)

        def op() -> Tensor:
            logp = logprobs(inputs.hidden, inputs.weight, inputs.ids).float()
            return rf.policy_loss(logp.view(inputs.grid), old, inputs.advantages, inputs.mask).loss

        return op

    return builder


def _eager_policy(
    hidden: Tensor, weight: Tensor, ids: Tensor, softcap: float | None,
    old: Tensor, advantages: Tensor, mask: Tensor,
) -> Tensor:  # fmt: skip
    logp = eager_linear(hidden, weight, ids, softcap)
    return clipped_mean(logp.view(old.shape), old, advantages, mask)


def eager_policy(inputs: Inputs, old: Tensor, through: Callable[..., Any] = lambda op: op) -> PolicyOp:
    op = through(_eager_policy)
    head = inputs.head
    return lambda: op(
        inputs.hidden, inputs.weight, inputs.ids, head.softcap, old, inputs.advantages, inputs.mask
    )


def liger_policy(inputs: Inputs, old: Tensor) -> PolicyOp:
    """LigerFusedLinearGRPOLoss as TRL's GRPOTrainer builds it, without a reference model."""
    need_no_softcap(inputs.head, "Liger's GRPO loss")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo"
    )
    shape = (*inputs.grid, inputs.head.dim)
    ids = inputs.ids.view(inputs.grid)
    return lambda: loss(
        inputs.hidden.view(shape), inputs.weight, ids, inputs.mask.float(), inputs.advantages,
        old_per_token_logps=old,
    )[0]  # fmt: skip


POLICY: dict[str, Callable[[Inputs, Tensor], PolicyOp]] = {
    OURS: ours_policy,
    "react_fast (256 MiB)": lambda inputs, old: ours_policy(inputs, old, 256),
    "react_fast (two ops)": policy_over(ours_linear),
    "torch": eager_policy,
    "torch.compile": lambda inputs, old: eager_policy(inputs, old, compiled),
    "TRL chunked": policy_over(trl_linear),
    "Liger GRPO": liger_policy,
}
