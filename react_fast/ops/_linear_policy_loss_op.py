"""linear_policy_loss for autograd: a Function in eager mode, an operator for torch.compile and fake tensors."""

from typing import Any

import torch

from ._linear_logprob import Head
from ._linear_policy_loss import Tokens, forward
from ._policy_loss import METRICS, Terms
from ._tiles import Maybe, Options, Rows, Tensor
from .backend import accumulation_dtype, once_differentiable, register

# ---- autograd: the gradients are there, the backward scales them -----------------------------------------------


def _scaled(saved: Maybe, upstream: Tensor, dtype: torch.dtype) -> Maybe:
    """Wide until here: in float16, 1 / n would vanish before the loss scale reaches it. On a CPU, where looking
    costs nothing, a plain loss.backward() copies no gradient."""
    if saved is None or (saved.dtype == dtype and upstream.device.type == "cpu" and float(upstream) == 1):
        return saved
    return (saved * upstream).to(dtype)


class Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, per_row: Maybe, options: Options,
        tokens: Tokens, terms: Terms, group: Any, recording: bool,
    ) -> Any:  # fmt: skip
        rows = Rows(hidden, token_ids, tokens.mask, per_row, options)
        wanted = [recording and need for need in ctx.needs_input_grad[:3]]
        loss, stats, *gradients = forward(rows, Head(weight, bias, group), options, tokens, terms, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Maybe, _: Maybe) -> Any:
        if upstream is None:
            return (None,) * 10
        return *(_scaled(x, upstream, ctx.dtype) for x in ctx.saved_tensors), *[None] * 7


# ---- compiled --------------------------------------------------------------------------------------------------


def _run(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, per_row: Maybe, old_logprobs: Maybe,
    advantages: Tensor, mask: Tensor, ref_logprobs: Maybe, importance: Maybe, cu_seqlens: Maybe,
    denominator_tensor: Maybe, scale: float, temperature: float, softcap: float, invariant: bool,
    denominator: float, objective: int, parameters: list[float], aggregation: int, kl_coef: float,
    kl_estimator: int, kl_gradient: int, entropy_coef: float, want_hidden: bool, want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(scale, temperature, softcap, invariant)
    tokens = Tokens(old_logprobs, advantages, mask, ref_logprobs, importance, cu_seqlens, denominator_tensor)
    terms = Terms(
        denominator, objective, parameters, aggregation, kl_coef, kl_estimator, kl_gradient, entropy_coef
    )
    rows = Rows(hidden, token_ids, mask, per_row, options)
    wanted = (want_hidden, want_weight, want_bias)
    loss, stats, *found = forward(rows, Head(weight, bias), options, tokens, terms, wanted)
    return loss, stats, *(loss.new_empty(0) if x is None else x for x in found)


def _fake(hidden: Tensor, weight: Tensor, bias: Maybe, *rest: Any) -> tuple[Tensor, ...]:
    wide = accumulation_dtype(hidden.dtype)
    own = torch.bfloat16 if hidden.dtype == torch.bfloat16 else wide
    want_hidden, want_weight, want_bias = rest[-3:]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(METRICS), dtype=wide),
        hidden.new_empty(hidden.shape if want_hidden else (0,), dtype=wide),
        hidden.new_empty(weight.shape if want_weight else (0,), dtype=own if want_weight else wide),
        hidden.new_empty(weight.shape[0] if want_bias else 0, dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.dtype = inputs[0].dtype


def _grad(ctx: Any, upstream: Maybe, *_: Any) -> tuple:
    if upstream is None:
        return (None,) * 27
    found = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *((x * upstream).to(ctx.dtype) if need else None for x, need in found), *[None] * 24


compiled = register(
    "linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? per_row, Tensor? old_logprobs, "
    "Tensor advantages, Tensor mask, Tensor? ref_logprobs, Tensor? importance, Tensor? cu_seqlens, "
    "Tensor? denominator_tensor, float scale, float temperature, float softcap, bool invariant, "
    "float denominator, int objective, float[] parameters, int aggregation, float kl_coef, int kl_estimator, "
    "int kl_gradient, float entropy_coef, bool want_hidden, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_run,
    triton=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_grad,
)
