"""What stands in the place of TRL's log-probability functions; the original is called for the rest."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..ops.logprob import token_logprobs
from .fused_head import can_run, head_logprobs

Tensor = torch.Tensor
Maybe = Tensor | None
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_GIVEN = {"log_probs", "entropy", "mean_logits", "is_top1"}
_DEVICES = ("cpu", "cuda")


def fused_head(original: Any) -> Any:
    """A class whose `apply` is that of TRL's ChunkedLogProbFunction."""

    class HeadLogProbs:
        forward = staticmethod(original.forward)

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Maybe,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = _OUTPUTS,
        ) -> tuple[Tensor, Maybe, Maybe, Maybe, Maybe]:
            """(logp, entropy, None, mean logit, whether the target is the first of the largest), each [N] or None.

            Args:
                hidden: [N, H]. weight: [V, H]. bias: [V] or None. targets: [N] int64 in [0, V).
                outputs: those of the last four that are computed.
            Raises: IndexError for a target outside [0, V) on a CPU.
            """
            covered = _covered(hidden, weight, logit_scale, final_logit_softcapping, outputs)
            if not (covered and _is_number(temperature)):
                return original.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale,
                    outputs,
                )  # fmt: skip
            if not torch.is_autocast_enabled(hidden.device.type):
                weight = weight.to(hidden.dtype)
                bias = None if bias is None else bias.to(hidden.dtype)
            logp, entropy, state = head_logprobs(
                hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=final_logit_softcapping,
                temperature=temperature, entropy="entropy" in outputs,
            )  # fmt: skip
            with torch.no_grad():
                mean = top = None
                if "mean_logits" in outputs:
                    mean = _mean_logits(hidden, weight, bias) * (logit_scale / temperature)
                if "is_top1" in outputs:
                    options = temperature, chunk_size, final_logit_softcapping, logit_scale, ("is_top1",)
                    top = _is_top1(
                        state, hidden, weight, bias, targets, lambda *x: original.apply(*x, *options)[4]
                    )
            return logp.float(), entropy.float() if "entropy" in outputs else None, None, mean, top

    return HeadLogProbs


def _covered(
    hidden: Tensor, weight: Tensor, logit_scale: float, softcap: float | None, outputs: tuple[str, ...]
) -> bool:
    return (
        set(outputs) <= _GIVEN
        and not ("mean_logits" in outputs and softcap is not None)
        and weight.is_floating_point()
        and logit_scale != 0
        and can_run(hidden, weight)
    )


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """[N]: the mean over the vocabulary of hidden @ weight.T + bias is hidden @ mean(weight) + mean(bias)."""
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return mean if bias is None else mean + bias.mean(dtype=torch.float32)


def _is_top1(
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Maybe,
    targets: Tensor,
    original: Callable[..., Tensor],
) -> Tensor:
    """[N] bool. Where several tokens share the largest logit, the original says which of them is the first."""
    largest, ties, chosen = state[:, 0], state[:, 1], state[:, 4]
    top = chosen == largest
    shared = (top & (ties > 1)).nonzero()[:, 0]
    if len(shared):
        top[shared] = original(hidden[shared], weight, bias, targets[shared])
    return top


def selective_log_softmax(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replacement(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Maybe = None
    ) -> Tensor:
        if not (_supported(logits, index, row_mask) and _is_number(temperature)):
            return original(logits, index, temperature, row_mask)
        found = token_logprobs(logits, index, temperature=temperature, mask=row_mask)
        return found.to(_result_dtype(logits, index))

    return replacement


def selective_with_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Maybe = None,
    ) -> tuple[Tensor, Tensor]:
        covered = _supported(logits, index, row_mask) and _is_number(temperature)
        if not covered or index.shape != logits.shape[:-1]:
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        found = token_logprobs(logits, index, temperature=temperature, mask=row_mask, return_entropy=True)
        logp, entropy = (x.to(_result_dtype(logits, index)) for x in found)
        return logp, entropy if entropy_requires_grad else entropy.detach()

    return replacement


def entropy_from_logits(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replacement(logits: Tensor, chunk_size: int = 128) -> Tensor:
        index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        if not _supported(logits, index, None):
            return original(logits, chunk_size)
        return token_logprobs(logits, index, return_entropy=True)[1].to(_result_dtype(logits, index))

    return replacement


def _is_number(temperature: Any) -> bool:
    """Whether it is what TRL declares, and not a tensor."""
    return isinstance(temperature, (int, float))


def _supported(logits: Tensor, index: Tensor, row_mask: Maybe) -> bool:
    """TRL's torch code rounds every step to half precision, and its tests want those bits: they stay."""
    return (
        logits.device.type in _DEVICES
        and _result_dtype(logits, index) in (torch.float32, torch.float64)
        and index.dtype in (torch.int32, torch.int64)
        and index.shape[: logits.dim() - 1] == logits.shape[:-1]
        and (row_mask is None or (row_mask.shape == logits.shape[:-1] and not row_mask.is_floating_point()))
    )


def _result_dtype(logits: Tensor, index: Tensor) -> torch.dtype:
    """TRL's Triton kernel gives float32, its torch code the logits' dtype."""
    kernel = logits.device.type == "cuda" and index.dim() < logits.dim() <= 3 and logits.stride(-1) == 1
    return torch.float32 if kernel and logits.dtype != torch.float64 else logits.dtype
