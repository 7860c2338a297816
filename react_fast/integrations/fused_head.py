"""The engine of `linear_token_logprobs` for integrations that stand in the place of a fused LM head."""

from typing import Any

import torch

from ..ops._linear_logprob_op import Eager
from ..ops.backend import use_reference
from ..ops.linear_logprob import checked, is_eager

Tensor = torch.Tensor


def can_run(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the engine takes them as they are; ZeRO-3 takes a weight with `ds_id` away before the backward."""
    return (
        hidden.device.type in ("cpu", "cuda")
        and not hasattr(weight, "ds_id")
        and is_eager(hidden)
        and not use_reference()
    )


def one_dtype(hidden: Tensor, weight: Tensor) -> bool:
    """Both whole, of one dtype, and not of float64, which the trainers' own heads round to float32."""
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    return plain and hidden.dtype == weight.dtype and hidden.dtype != torch.float64


def head_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, temperature: float | Tensor = 1.0, entropy: bool = True,
) -> Any:  # fmt: skip
    """(logp, entropy or empty, state [N, 5] of the fold), each in the shape of `targets`.

    Unlike `linear_token_logprobs` it prepares no gradient of the entropy in the forward: trainers ask for
    entropies to log them, and a backward that brings a gradient for them computes the logits again.
    """
    given = checked(hidden, weight, targets, bias, logit_scale, softcap, temperature, None, False)
    return Eager.apply(
        given.hidden, given.weight, given.bias, targets, None, given.per_row, given.options, entropy, None, None,
        torch.is_grad_enabled(), False,
    )  # fmt: skip
