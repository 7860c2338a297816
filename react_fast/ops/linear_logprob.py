"""Log-probability of the chosen token from hidden states and the output matrix; [N, V] logits never exist."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from .. import reference
from . import _check, _vocab_parallel
from . import _linear_logprob as tiles
from ._dtensor import gathered, plain
from .backend import accumulation_dtype, register, use_reference
from .logprob import HIGH, LOW, check_temperature

Maybe = torch.Tensor | None


@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: Maybe = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float | torch.Tensor = ...,
    mask: Maybe = ...,
    return_entropy: Literal[False] = ...,
    tp_group: Any = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor: ...


@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: Maybe = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float | torch.Tensor = ...,
    mask: Maybe = ...,
    return_entropy: Literal[True],
    tp_group: Any = ...,
    batch_invariant: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: Maybe = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: Maybe = None,
    return_entropy: bool = False,
    tp_group: Any = None,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` of logits = logit_scale * (hidden @ weight.T + bias), a tile of logits at a time.

    Where hidden needs a gradient, the forward also sums the expected embedding sum_j p_j W_j, so that the backward
    needs no GEMM: d logp / d hidden = logit_scale / T (W[id] - sum_j p_j W_j). GEMMs of N x V x D, forward and
    backward together: 1 without gradient, 2 for hidden alone, 3 for weight alone, 4 for both; with an entropy and
    hidden one more. Tiles take at most REACT_FAST_TILE_MIB (64) MiB.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D], dtype of `hidden` (under autocast both are cast); with `tp_group` this rank's rows
            [V_rank, D], ranks in order. A DTensor (fully_shard) is gathered, and gets the mean over its mesh of
            the ranks' gradients.
        token_ids: [...] int32 or int64, in [0, V) where the mask is true, anything (-100) elsewhere.
        bias: [V] of that dtype, or None; -inf forbids a token.
        logit_scale: number other than 0.
        softcap, temperature, mask, return_entropy: see `token_logprobs`. Only rows that count reach a GEMM.
        tp_group: torch.distributed process group over which the vocabulary is split; rows' statistics are
            exchanged, never logits, and hidden's gradient is summed over the ranks. They hold the same hidden.
        batch_invariant: no bit of a row's result and of its hidden gradient depends on the other rows, on their
            number or on the threads; slower, since every GEMM then has one shape and one thread. Without it the
            GEMM library chooses by size. The weight's gradient is a sum over the batch either way.
    Returns: logp [...], or (logp, H), float32 (float64 for float64), differentiable in hidden, weight and bias.
        Matmuls run in the dtype of `hidden`, everything else in float32 or better.
    Raises: TypeError, ValueError and IndexError as `token_logprobs`; RuntimeError on a GPU, where no kernel is.
    Source: expected embeddings: the score function's gradient, Williams 1992; online rescaling: Milakov &
        Gimelshein 2018 (arXiv:1805.02867); logits in tiles: Wijmans et al. 2024 (arXiv:2411.09009).
    """
    hidden, token_ids, mask = plain("hidden", hidden), plain("token_ids", token_ids), plain("mask", mask)
    temperature = plain("temperature", temperature)
    device = _check.floating("hidden", hidden).device.type
    casts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else None
    weight = gathered("weight", weight, dtype, tp_group)
    bias = None if bias is None else gathered("bias", bias, dtype, tp_group)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_matrices(hidden, weight, bias)
    rows = hidden.shape[:-1]
    _check.integer("token_ids", token_ids)
    _check.shape("token_ids", token_ids, rows, "hidden[..., 0]")
    _check.device("token_ids", token_ids, hidden.device, "hidden")
    if mask is not None:
        mask = _check.mask("mask", mask, rows, "hidden[..., 0]", hidden.device)
    scale = _check.number("logit_scale", logit_scale, low=-HIGH, high=HIGH)
    if abs(scale) < LOW:
        raise ValueError(f"logit_scale must not be 0, got {scale:g}")
    cap = 0.0 if softcap is None else _check.number("softcap", softcap, low=LOW, high=HIGH)
    if isinstance(temperature, torch.Tensor):
        check_temperature(temperature, hidden)
        shared, per_row = 1.0, temperature
    else:
        shared, per_row = _check.number("temperature", temperature, low=LOW, high=HIGH), None
    if use_reference():
        if tp_group is not None:
            raise ValueError("tp_group must be None on the reference backend, got a process group")
        return reference.linear_token_logprobs(
            hidden, weight, token_ids, bias=bias, logit_scale=scale, softcap=softcap, temperature=temperature,
            mask=mask, return_entropy=return_entropy,
        )  # fmt: skip
    options = tiles.Options(scale, shared, cap, bool(batch_invariant))
    want_hidden = torch.is_grad_enabled() and hidden.requires_grad
    if torch.compiler.is_compiling() or hidden.is_meta or type(hidden) not in _EAGER:
        if tp_group is not None:
            raise ValueError(
                "tp_group must be None under torch.compile and for fake tensors, got a process group"
            )
        logp, entropy, *_ = _op(
            hidden, weight, bias, token_ids, mask, per_row, *options, bool(return_entropy), want_hidden
        )
    else:
        logp, entropy = _Eager.apply(
            hidden,
            weight,
            bias,
            token_ids,
            mask,
            per_row,
            options,
            bool(return_entropy),
            want_hidden,
            tp_group,
        )
    return (logp, entropy) if return_entropy else logp


_EAGER = (torch.Tensor, torch.nn.Parameter)


def _check_matrices(hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe) -> None:
    if hidden.dim() == 0:
        raise ValueError("hidden must be [..., D], got a scalar")
    _check.dtype("weight", _check.floating("weight", weight), hidden.dtype, "hidden")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] like hidden, got {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight must have a row for every token, got none")
    _check.device("weight", weight, hidden.device, "hidden")
    if bias is not None:
        _check.dtype("bias", _check.floating("bias", bias), hidden.dtype, "hidden")
        _check.shape("bias", bias, weight.shape[:1], "weight[:, 0]")
        _check.device("bias", bias, hidden.device, "hidden")


def _fold(
    rows: tiles.Rows, weight: torch.Tensor, bias: Maybe, options: tiles.Options, want_entropy: bool,
    want_hidden: bool, group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(state, U, Q, ids inside this shard) over the whole vocabulary, whoever holds it."""

    def fold(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tiles.forward(
            rows.hidden, weight, bias, ids, rows.temperatures, options, want_entropy, want_hidden
        )

    if group is not None:
        return _vocab_parallel.fold(rows, weight.shape[0], group, fold)
    rows.check(weight.shape[0])
    return *fold(rows.ids), rows.ids


def _results(rows: tiles.Rows, sums: tiles.Sums, want_entropy: bool, dtype: torch.dtype) -> tuple:
    entropy = rows.back(sums.entropy).to(dtype) if want_entropy else sums.entropy.new_empty(0, dtype=dtype)
    return rows.back(sums.logp).to(dtype), entropy


def _gradients(
    rows: tiles.Rows, weight: torch.Tensor, bias: Maybe, ids: torch.Tensor, options: tiles.Options,
    sums: tiles.Sums, d_logp: Maybe, d_entropy: Maybe, wanted: Sequence[bool],
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    """Gradients of hidden (of the rows that count), weight and bias."""
    zero = torch.zeros_like(sums.logp)
    g = zero if d_logp is None else rows.take(d_logp).double()
    h = None if d_entropy is None else rows.take(d_entropy).double()
    d_hidden = d_weight = d_bias = None
    if wanted[0]:
        d_hidden = tiles.hidden_gradient(sums, g, h, weight, ids, rows.inverse_t, options)
    if wanted[1] or wanted[2]:
        d_weight, d_bias = tiles.weight_gradient(
            rows.hidden, weight, bias, ids, rows.temperatures, options, sums, g, h, wanted[2]
        )
    return d_hidden, d_weight if wanted[1] else None, d_bias


# ---- eager: profilers and dispatch modes see the matmuls, and only rows that count are kept ---------------------


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe, token_ids: torch.Tensor, mask: Maybe,
        per_row: Maybe, options: tiles.Options, want_entropy: bool, want_hidden: bool, group: Any,
    ) -> Any:  # fmt: skip
        rows = tiles.Rows(hidden, token_ids, mask, per_row, options)
        state, U, Q, ids = _fold(rows, weight, bias, options, want_entropy, want_hidden, group)
        ctx.rows, ctx.options, ctx.group, ctx.dtype, ctx.want_entropy = (
            rows,
            options,
            group,
            hidden.dtype,
            want_entropy,
        )
        ctx.set_materialize_grads(False)
        kept = hidden if rows.index is None else rows.hidden
        ctx.save_for_backward(kept, weight, bias, ids, state, U, Q)
        del rows.hidden  # autograd keeps it, and notices when it is changed in place
        sums = tiles.finish(state, rows.inverse_t, U, Q)
        return _results(rows, sums, want_entropy, accumulation_dtype(hidden.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Maybe) -> Any:
        hidden, weight, bias, ids, state, U, Q = ctx.saved_tensors
        rows: tiles.Rows = ctx.rows
        rows.hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        d_logp, d_entropy = upstream[0], upstream[1] if ctx.want_entropy else None
        if d_logp is None and d_entropy is None:
            return (None,) * 10
        sums = tiles.finish(state, rows.inverse_t, U, Q)
        d_hidden, d_weight, d_bias = _gradients(
            rows, weight, bias, ids, ctx.options, sums, d_logp, d_entropy, ctx.needs_input_grad[:3]
        )
        if d_hidden is not None:
            if ctx.group is not None:
                d_hidden = _vocab_parallel.total(d_hidden, ctx.group, ctx.options.invariant)
            d_hidden = rows.back(d_hidden.to(ctx.dtype))
        d_bias = None if d_bias is None else d_bias.to(ctx.dtype)
        return d_hidden, d_weight, d_bias, *[None] * 7


# ---- compiled: one operator, whose saved tensors have the shapes of the inputs ---------------------------------


def _forward_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe,
    scale: float, temperature: float, softcap: float, invariant: bool, want_entropy: bool, want_hidden: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    options = tiles.Options(scale, temperature, softcap, invariant)
    rows = tiles.Rows(hidden, token_ids, mask, per_row, options)
    state, U, Q, _ = _fold(rows, weight, bias, options, want_entropy, want_hidden)
    sums = tiles.finish(state, rows.inverse_t, U, Q)
    logp, entropy = _results(rows, sums, want_entropy, accumulation_dtype(hidden.dtype))
    return logp, entropy, rows.back(state), *(rows.back(x) if len(x) else x for x in (U, Q))


def _forward_fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe,
    scale: float, temperature: float, softcap: float, invariant: bool, want_entropy: bool, want_hidden: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    shape, dim, dtype = hidden.shape[:-1], hidden.shape[-1], accumulation_dtype(hidden.dtype)
    empty = (0, dim)
    return (
        hidden.new_empty(shape, dtype=dtype),
        hidden.new_empty(shape if want_entropy else (0,), dtype=dtype),
        hidden.new_empty((*shape, 5), dtype=torch.float64),
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


def _backward_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe,
    state: torch.Tensor, U: torch.Tensor, Q: torch.Tensor, d_logp: Maybe, d_entropy: Maybe, scale: float,
    temperature: float, softcap: float, invariant: bool, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    options = tiles.Options(scale, temperature, softcap, invariant)
    rows = tiles.Rows(hidden, token_ids, mask, per_row, options)
    U, Q = (rows.take(x) if x.dim() == hidden.dim() and want_hidden else x for x in (U, Q))
    sums = tiles.finish(rows.take(state), rows.inverse_t, U, Q)
    wanted = (want_hidden, want_weight, want_bias)
    d_hidden, d_weight, d_bias = _gradients(
        rows, weight, bias, rows.ids, options, sums, d_logp, d_entropy, wanted
    )
    none = hidden.new_empty(0)
    return (
        none if d_hidden is None else rows.back(d_hidden.to(hidden.dtype)),
        none.clone() if d_weight is None else d_weight,
        none.clone() if d_bias is None else d_bias.to(hidden.dtype),
    )


def _backward_fake(hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe, *args: Any) -> tuple:
    none = (0,)
    return tuple(
        hidden.new_empty(x.shape if want and x is not None else none)
        for x, want in zip((hidden, weight, bias), args[-3:], strict=True)
    )


def _no_kernel(hidden: torch.Tensor, *_: Any) -> Any:
    raise RuntimeError(
        "linear_token_logprobs has a kernel for CPU tensors only; use token_logprobs on the logits"
    )


_INPUT = "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor? per_row"
_OPTIONS = "float scale, float temperature, float softcap, bool invariant"

_op = register(
    "linear_token_logprobs",
    f"({_INPUT}, {_OPTIONS}, bool want_entropy, bool want_hidden) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    triton=_no_kernel,
    fake=_forward_fake,
    setup_context=_setup,
    backward=_grad,
)
_op_backward = register(
    "linear_token_logprobs_backward",
    f"({_INPUT}, Tensor state, Tensor U, Tensor Q, Tensor? d_logp, Tensor? d_entropy, {_OPTIONS}, "
    "bool want_hidden, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    triton=_no_kernel,
    fake=_backward_fake,
)
