"""linear_token_logprobs for autograd: a Function in eager mode, an operator for torch.compile and fake tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from . import _linear_logprob as engine
from . import _tiles as tiles
from . import _vocab_parallel
from ._linear_logprob import Head, Sums
from ._second_pass import second_pass
from ._tiles import Maybe, Options, Rows, Tensor
from .backend import accumulation_dtype, once_differentiable, register


def _gradients(
    rows: Rows, head: Head, options: Options, sums: Sums, d_logp: Maybe, d_entropy: Maybe, wanted: Sequence[bool],
    kept: list[Tensor], main_grad: Maybe, lent: Maybe,
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    """Gradients of hidden (of the rows that count), weight and bias."""
    zero = torch.zeros_like(sums.logp)
    g = zero if d_logp is None else rows.take(d_logp).double()
    h = None if d_entropy is None else rows.take(d_entropy).double()
    d_hidden = d_weight = d_bias = None
    # What the entropy's gradient needs was not summed in the forward.
    again = wanted[0] and h is not None and len(sums.Q) != len(sums.U)
    if wanted[0] and not again:
        d_hidden = engine.hidden_gradient(sums, g, h, rows, head, options)
    if again or wanted[1] or wanted[2]:
        found, d_weight, d_bias = second_pass(
            rows,
            head,
            options,
            sums,
            g,
            h,
            (again, *wanted[1:]),
            kept,
            main_grad if wanted[1] else None,
            lent,
        )
        d_hidden = found if again else d_hidden
    if d_hidden is not None and head.group is not None:
        d_hidden = _vocab_parallel.total(d_hidden, head.group, options.invariant)
    dtype = rows.hidden.dtype
    return (
        None if d_hidden is None else rows.back(d_hidden.to(dtype)),
        d_weight,
        None if d_bias is None else d_bias.to(dtype),
    )


# ---- eager: profilers and dispatch modes see the matmuls, and only rows that count are kept ---------------------


class Eager(torch.autograd.Function):
    """(logp, entropy or empty, state [rows that count, 5] of the fold, without gradient).

    entropy_gradient: the entropy's gradient for hidden is prepared in the forward, for a GEMM; without, a backward
        that brings one computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe,
        options: Options, want_entropy: bool, group: Any, main_grad: Maybe, recording: bool,
        entropy_gradient: bool = True,
    ) -> Any:  # fmt: skip
        rows, head = Rows(hidden, token_ids, mask, per_row, options), Head(weight, bias, group)
        want_hidden, want_weight, want_bias = (recording and need for need in ctx.needs_input_grad[:3])
        want_Q = want_hidden and want_entropy and entropy_gradient
        keep = tiles.workspace() if want_weight or want_bias else 0
        # The weight's gradient is written in the backward; until then its memory keeps logits.
        lent = tiles.fresh(weight) if want_weight and main_grad is None else None

        def fold(head: Head) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
            return engine.forward(rows, head, options, want_entropy, want_hidden, want_Q, keep, lent)

        if group is None:
            wrong = rows.check(head.vocab)
            state, U, Q, kept = fold(head)
        else:
            head, state, U, Q, kept = _vocab_parallel.fold(rows, head, fold)
            wrong = rows.check(head.vocab)
        ctx.rows, ctx.options, ctx.want_entropy, ctx.group = rows, options, want_entropy, (group, head.shards)
        ctx.main_grad, ctx.kept, ctx.lent = main_grad, kept, lent
        ctx.set_materialize_grads(False)
        compact = rows.index is not None or rows.mask is not None
        kept_hidden = rows.hidden if compact else hidden
        # ids and temperatures are read through `rows`; here autograd notices when they are changed in place.
        ctx.save_for_backward(kept_hidden, weight, bias, state, U, Q, token_ids, per_row)
        sums = engine.finish(state, rows.inverse_t, U, Q)
        found = engine.results(rows, sums, want_entropy, accumulation_dtype(hidden.dtype), wrong)
        del rows.hidden  # autograd keeps it, and notices when it is changed in place
        ctx.mark_non_differentiable(state)
        return *found, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Maybe) -> Any:
        hidden, weight, bias, state, U, Q, *_ = ctx.saved_tensors
        rows: Rows = ctx.rows
        rows.hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1]).contiguous()
        d_logp, d_entropy = upstream[0], upstream[1] if ctx.want_entropy else None
        if d_logp is None and d_entropy is None:
            return (None,) * 12
        sums = engine.finish(state, rows.inverse_t, U, Q)
        found = _gradients(
            rows, Head(weight, bias, *ctx.group), ctx.options, sums, d_logp, d_entropy, ctx.needs_input_grad[:3],
            ctx.kept, ctx.main_grad, ctx.lent,
        )  # fmt: skip
        if ctx.lent is not None:  # is a gradient now, and has no logits for another backward
            ctx.kept, ctx.lent = [], None
        return *found, *[None] * 9


# ---- compiled: one operator, whose saved tensors have the shapes of the inputs ---------------------------------


def _forward(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe,
    scale: float, temperature: float, softcap: float, invariant: bool, want_entropy: bool, want_hidden: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(scale, temperature, softcap, invariant)
    rows, head = Rows(hidden, token_ids, mask, per_row, options), Head(weight, bias)
    wrong = rows.check(head.vocab)
    state, U, Q, _ = engine.forward(
        rows, head, options, want_entropy, want_hidden, want_hidden and want_entropy
    )
    sums = engine.finish(state, rows.inverse_t, U, Q)
    logp, entropy = engine.results(rows, sums, want_entropy, accumulation_dtype(hidden.dtype), wrong)
    return logp, entropy, rows.back(state), *(rows.back(x) if len(x) else x for x in (U, Q))


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe,
    scale: float, temperature: float, softcap: float, invariant: bool, want_entropy: bool, want_hidden: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape, dim, dtype = hidden.shape[:-1], hidden.shape[-1], accumulation_dtype(hidden.dtype)
    empty = (0, dim)
    return (
        hidden.new_empty(shape, dtype=dtype),
        hidden.new_empty(shape if want_entropy else (0,), dtype=dtype),
        hidden.new_empty((*shape, engine.STATE), dtype=torch.float64),
        hidden.new_empty((*shape, dim) if want_hidden else empty, dtype=dtype),
        hidden.new_empty((*shape, dim) if want_hidden and want_entropy else empty, dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, token_ids, mask, per_row, *ctx.options, ctx.want_entropy, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, token_ids, mask, per_row, *output[2:])


def _grad(ctx: Any, d_logp: Maybe, d_entropy: Maybe, *_: Any) -> tuple:
    if not ctx.want_entropy:
        d_entropy = None
    if d_logp is None and d_entropy is None:
        return (None,) * 12
    wanted = ctx.needs_input_grad[:3]
    found = _op_backward(*ctx.saved_tensors, d_logp, d_entropy, *ctx.options, *wanted)
    return *(x if want else None for x, want in zip(found, wanted, strict=True)), *[None] * 9


def _backward(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe,
    state: Tensor, U: Tensor, Q: Tensor, d_logp: Maybe, d_entropy: Maybe, scale: float,
    temperature: float, softcap: float, invariant: bool, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(scale, temperature, softcap, invariant)
    rows = Rows(hidden, token_ids, mask, per_row, options)
    U, Q = (rows.take(x) if x.dim() == hidden.dim() and want_hidden else x for x in (U, Q))
    sums = engine.finish(rows.take(state), rows.inverse_t, U, Q)
    found = _gradients(
        rows, Head(weight, bias), options, sums, d_logp, d_entropy, (want_hidden, want_weight, want_bias), [],
        None, None,
    )  # fmt: skip
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


def _backward_fake(hidden: Tensor, weight: Tensor, bias: Maybe, *args: Any) -> tuple:
    none = (0,)
    return tuple(
        hidden.new_empty(x.shape if want and x is not None else none)
        for x, want in zip((hidden, weight, bias), args[-3:], strict=True)
    )


_INPUT = "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor? per_row"
_OPTIONS = "float scale, float temperature, float softcap, bool invariant"

compiled = register(
    "linear_token_logprobs",
    f"({_INPUT}, {_OPTIONS}, bool want_entropy, bool want_hidden) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward,
    triton=_forward,
    fake=_forward_fake,
    setup_context=_setup,
    backward=_grad,
)
_op_backward = register(
    "linear_token_logprobs_backward",
    f"({_INPUT}, Tensor state, Tensor U, Tensor Q, Tensor? d_logp, Tensor? d_entropy, {_OPTIONS}, "
    "bool want_hidden, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    cpu=_backward,
    triton=_backward,
    fake=_backward_fake,
)
