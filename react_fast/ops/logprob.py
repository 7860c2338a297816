"""Log-probability of the chosen token of every row, and the entropy of the row, from logits."""

import os
from typing import Any, Literal, overload

import torch

from .. import _core, reference
from . import _check
from .backend import DTYPE, accumulation_dtype, address, register, use_reference

# Beyond these, 1 / temperature and differences of float32 logits leave float32.
LOW, HIGH = 1e-30, 1e30


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    return_entropy: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    return_entropy: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of one token a row, and the row's entropy, in nats.

        z = softcap * tanh(logits / softcap) / temperature
        logp = z[id] - logsumexp(z)        H = -sum_j p_j log p_j,  p = softmax(z)

    One read of the logits forward, one read and one write backward; nothing of their size is kept but the
    logits themselves.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64. -inf forbids a token, with a softcap too: it adds
            nothing to the sum or the entropy, its gradient is 0, and choosing it gives -inf.
        token_ids: [...] int32 or int64, in [0, V) where the mask is true, anything (-100) elsewhere.
        temperature: a number, or a floating tensor [...] with one for each row; in [1e-30, 1e30]. No gradient.
        softcap: a number in [1e-30, 1e30]; None for none.
        mask: [...] bool or 0/1 integers, true where the row counts. The other rows give 0 and gradient 0, and
            nothing in them is looked at.
        return_entropy: also return H.
    Returns: logp [...], or (logp, H), float32 (float64 for float64), both differentiable in `logits`. logp is
        never above 0. A row with NaN gives NaN. A row whose tokens are all forbidden gives logp -inf, H 0 and
        gradient 0.
    Raises: TypeError for another dtype; ValueError for another shape or device, or a temperature or softcap out
        of range; IndexError for an id outside [0, V) in a row that counts. On CUDA, where looking at values
        would wait for the device, such an id or a temperature that is not above 0 gives NaN in its row instead;
        REACT_FAST_CHECKED=1 in the environment raises there too.
    Source: Williams 1992 (REINFORCE) for the score function; Milakov & Gimelshein 2018 (arXiv:1805.02867),
        one-pass softmax; Gemma 2 (arXiv:2408.00118), softcap.
    """
    _check.floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must be [..., V], got a scalar")
    rows = logits.shape[:-1]
    _check.integer("token_ids", token_ids)
    _check.shape("token_ids", token_ids, rows, "logits[..., 0]")
    _check.device("token_ids", token_ids, logits.device, "logits")
    if mask is not None:
        mask = _check.mask("mask", mask, rows, "logits[..., 0]", logits.device)
    if isinstance(temperature, torch.Tensor):
        check_temperature(temperature, logits)
        shared, per_row = 1.0, temperature
    else:
        shared, per_row = _check.number("temperature", temperature, low=LOW, high=HIGH), None
    cap = 0.0 if softcap is None else _check.number("softcap", softcap, low=LOW, high=HIGH)
    if use_reference():
        return reference.token_logprobs(
            logits,
            token_ids,
            temperature=temperature,
            softcap=softcap,
            mask=mask,
            return_entropy=return_entropy,
        )
    logp, entropy, _ = _token_logprobs(logits, token_ids, mask, per_row, shared, cap, bool(return_entropy))
    return (logp, entropy) if return_entropy else logp


def check_temperature(temperature: torch.Tensor, logits: torch.Tensor) -> None:
    _check.floating("temperature", temperature)
    _check.shape("temperature", temperature, logits.shape[:-1], "logits[..., 0]")
    _check.device("temperature", temperature, logits.device, "logits")
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient, got a tensor that does; pass .detach()")


def _layout(logits: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int, int]:
    """(logits, rows, V, inner, outer_stride, stride): row i starts at (i // inner) * outer_stride + (i % inner)
    * stride and has unit stride inside. A copy is made only when two strides do not reach every row.
    """
    vocab = logits.shape[-1]
    rows = logits.shape[:-1].numel()
    if not logits.is_contiguous():
        levels: list[tuple[int, int]] = []
        for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
            if levels and levels[-1][1] == size * stride:
                levels[-1] = (levels[-1][0] * size, stride)
            elif size != 1:
                levels.append((size, stride))
        if len(levels) <= 2 and (vocab <= 1 or logits.stride(-1) == 1):
            (_, outer_stride), (inner, stride) = [(1, 0), (1, 0), *levels][-2:]
            return logits, rows, vocab, max(inner, 1), outer_stride, stride
        logits = logits.contiguous()
    return logits, rows, vocab, max(rows, 1), 0, vocab


def _flat(x: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def _index(row: int, shape: torch.Size) -> str:
    """The row's index as the caller writes it, "2, 5"."""
    where = []
    for size in reversed(shape):
        row, i = divmod(row, size)
        where.append(str(i))
    return ", ".join(reversed(where))


def _refuse(
    argument: str, row: int, logits: torch.Tensor, ids: torch.Tensor, per_row: torch.Tensor | None
) -> None:
    at = f"[{_index(row, ids.shape)}]" if ids.dim() else ""
    if argument == "token_ids":
        raise IndexError(
            f"token_ids must be in [0, {logits.shape[-1]}) where mask is true, "
            f"got {ids.reshape(-1)[row].item()} at token_ids{at}"
        )
    assert per_row is not None
    value = per_row.reshape(-1)[row].item()
    raise ValueError(f"temperature must be in [{LOW:g}, {HIGH:g}], got {value:g} at temperature{at}")


def _outputs(logits: torch.Tensor, want_entropy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp, entropy (empty when not wanted, since an operator returns no None) and the saved row statistics."""
    rows, dtype = logits.shape[:-1], accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if want_entropy else (0,), dtype=dtype),
        logits.new_empty((2, *rows), dtype=dtype),
    )


def _forward_cpu(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor | None, per_row: torch.Tensor | None,
    temperature: float, softcap: float, want_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    logp, entropy, stats = _outputs(logits, want_entropy)
    found = _layout(logits)
    x, layout = found[0], found[1:]
    ids, keep, temperatures = token_ids.contiguous(), _flat(mask), _flat(per_row, torch.float64)
    argument, row = _core.token_logprobs(
        x.data_ptr(), ids.data_ptr(), address(keep), address(temperatures), DTYPE[x.dtype], DTYPE[ids.dtype],
        *layout, temperature, softcap, LOW, HIGH, logp.data_ptr(), address(entropy if want_entropy else None),
        stats.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if argument:
        _refuse(argument, row, logits, ids, per_row)
    return logp, entropy, stats


def _check_values(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor | None, per_row: torch.Tensor | None
) -> None:
    """What the CPU backend always refuses; waits for the device."""
    bad = {"token_ids": (token_ids < 0) | (token_ids >= logits.shape[-1])}
    if per_row is not None:
        bad["temperature"] = ~((per_row >= LOW) & (per_row <= HIGH))
    for argument, wrong in bad.items():
        rows = (wrong if mask is None else wrong & mask).reshape(-1).nonzero()
        if len(rows):
            _refuse(argument, int(rows[0]), logits, token_ids, per_row)


def _forward_triton(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor | None, per_row: torch.Tensor | None,
    temperature: float, softcap: float, want_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from ..kernels import logprob as kernels

    if os.environ.get("REACT_FAST_CHECKED") == "1":
        _check_values(logits, token_ids, mask, per_row)
    logp, entropy, stats = _outputs(logits, want_entropy)
    kernels.forward(
        *_layout(logits), token_ids.contiguous(), _flat(mask), _flat(per_row, logp.dtype), temperature, softcap,
        logp, entropy if want_entropy else None, stats,
    )  # fmt: skip
    return logp, entropy, stats


def _forward_fake(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor | None, per_row: torch.Tensor | None,
    temperature: float, softcap: float, want_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _outputs(logits, want_entropy)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, token_ids, mask, per_row, ctx.temperature, ctx.softcap, ctx.want_entropy = inputs
    _, entropy, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, token_ids, mask, per_row, stats, entropy)


def _grad(ctx: Any, d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None, _: None) -> tuple:
    logits, token_ids, mask, per_row, stats, entropy = ctx.saved_tensors
    d_entropy = d_entropy if ctx.want_entropy else None
    d_logits = None
    if d_logp is not None or d_entropy is not None:
        d_logits = _token_logprobs_backward(
            logits, token_ids, mask, per_row, ctx.temperature, ctx.softcap, stats, entropy, d_logp, d_entropy
        )
    return d_logits, None, None, None, None, None, None


def _backward_cpu(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor | None, per_row: torch.Tensor | None,
    temperature: float, softcap: float, stats: torch.Tensor, entropy: torch.Tensor,
    d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    d_logits = logits.new_empty(logits.shape)
    found = _layout(logits)
    x, layout = found[0], found[1:]
    ids, keep, temperatures = token_ids.contiguous(), _flat(mask), _flat(per_row, torch.float64)
    d_logp, d_entropy = _flat(d_logp), _flat(d_entropy)
    _core.token_logprobs_backward(
        x.data_ptr(), ids.data_ptr(), address(keep), address(temperatures), DTYPE[x.dtype], DTYPE[ids.dtype],
        *layout, temperature, softcap, stats.data_ptr(), entropy.data_ptr(), address(d_logp), address(d_entropy),
        d_logits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return d_logits


def _backward_triton(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor | None, per_row: torch.Tensor | None,
    temperature: float, softcap: float, stats: torch.Tensor, entropy: torch.Tensor,
    d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    from ..kernels import logprob as kernels

    d_logits = logits.new_empty(logits.shape)
    kernels.backward(
        *_layout(logits), token_ids.contiguous(), _flat(mask), _flat(per_row, stats.dtype), temperature, softcap,
        stats, entropy, _flat(d_logp), _flat(d_entropy), d_logits,
    )  # fmt: skip
    return d_logits


def _backward_fake(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor | None, per_row: torch.Tensor | None,
    temperature: float, softcap: float, stats: torch.Tensor, entropy: torch.Tensor,
    d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


_INPUT = "Tensor logits, Tensor token_ids, Tensor? mask, Tensor? per_row, float temperature, float softcap"

_token_logprobs = register(
    "token_logprobs",
    f"({_INPUT}, bool want_entropy) -> (Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    triton=_forward_triton,
    fake=_forward_fake,
    setup_context=_setup,
    backward=_grad,
)
_token_logprobs_backward = register(
    "token_logprobs_backward",
    f"({_INPUT}, Tensor stats, Tensor entropy, Tensor? d_logp, Tensor? d_entropy) -> Tensor",
    cpu=_backward_cpu,
    triton=_backward_triton,
    fake=_backward_fake,
)
