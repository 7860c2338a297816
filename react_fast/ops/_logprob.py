"""The operators behind token_logprobs: layouts, values that are refused, both backends, autograd."""

import os
from typing import Any, NamedTuple

import torch

from .. import _core
from .backend import DTYPE, accumulation_dtype, address, register, resolve

# Beyond these, 1 / temperature and differences of float32 logits leave float32.
LOW, HIGH = 1e-30, 1e30

Maybe = torch.Tensor | None


def layout(logits: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int, int]:
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


def overlaps(x: torch.Tensor) -> bool:
    """Whether two elements may share a place: an axis, in the order of strides, must step over all inner ones."""
    span = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += (size - 1) * stride
    return False


def _flat(x: Maybe, dtype: torch.dtype | None = None) -> Maybe:
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def _floors(floor: Maybe, dtype: torch.dtype) -> Maybe:
    """The floors in the dtype that logits are compared in. A float64 floor between two float32 numbers becomes the
    upper one: the same float32 logits are below it."""
    if floor is None:
        return None
    found = floor.to(dtype)
    if floor.dtype == torch.float64 and dtype == torch.float32:
        above = torch.nextafter(found, torch.full_like(found, float("inf")))
        found = torch.where(found.double() < floor, above, found)
    return found.contiguous()


class _Operands(NamedTuple):
    """What a kernel reads beside the logits, contiguous, and how many tokens a row has."""

    ids: torch.Tensor
    mask: Maybe
    per_row: Maybe
    floors: Maybe
    tokens: int


def _operands(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    mask: Maybe,
    per_row: Maybe,
    floor: Maybe,
    dtype: torch.dtype,
) -> _Operands:
    floors = _flat(_floors(floor, accumulation_dtype(logits.dtype)), dtype)
    tokens = token_ids.shape[-1] if token_ids.dim() == logits.dim() else 1
    return _Operands(token_ids.contiguous(), _flat(mask), _flat(per_row, dtype), floors, tokens)


def _index(element: int, shape: torch.Size) -> str:
    """The element's index as the caller writes it, "[2, 5]"; nothing for a scalar."""
    where = []
    for size in reversed(shape):
        element, i = divmod(element, size)
        where.append(str(i))
    return f"[{', '.join(reversed(where))}]" if where else ""


def _refuse(
    argument: str, element: int, logits: torch.Tensor, ids: torch.Tensor, per_row: Maybe, floor: Maybe
) -> None:
    given = {"token_ids": ids, "temperature": per_row, "logit_floor": floor}[argument]
    assert given is not None
    value, at = given.reshape(-1)[element].item(), argument + _index(element, given.shape)
    if argument == "token_ids":
        wanted = f"in [0, {logits.shape[-1]}) where mask is true"
        raise IndexError(f"token_ids must be {wanted}, got {value} at {at}")
    wanted = f"in [{LOW:g}, {HIGH:g}]" if argument == "temperature" else "no NaN where mask is true"
    raise ValueError(f"{argument} must be {wanted}, got {value:g} at {at}")


def _check_values(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe, floor: Maybe
) -> None:
    """What the CPU backend always refuses; waits for the device."""
    bad = {"token_ids": (token_ids < 0) | (token_ids >= logits.shape[-1])}
    if per_row is not None:
        bad["temperature"] = ~((per_row >= LOW) & (per_row <= HIGH))
    if floor is not None:
        bad["logit_floor"] = floor.isnan()
    for argument, wrong in bad.items():
        if mask is not None:
            wrong = wrong & (mask if wrong.dim() == mask.dim() else mask.unsqueeze(-1))
        found = wrong.reshape(-1).nonzero()
        if len(found):
            _refuse(argument, int(found[0]), logits, token_ids, per_row, floor)


# ---- forward


def _outputs(
    logits: torch.Tensor, token_ids: torch.Tensor, want_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp, entropy (empty when not wanted, since an operator returns no None) and the saved row statistics."""
    rows, dtype = logits.shape[:-1], accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(token_ids.shape, dtype=dtype),
        logits.new_empty(rows if want_entropy else (0,), dtype=dtype),
        logits.new_empty((2, *rows), dtype=dtype),
    )


def _forward_cpu(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe, floor: Maybe, temperature: float,
    softcap: float, want_entropy: bool, in_place: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    logp, entropy, stats = _outputs(logits, token_ids, want_entropy)
    x, rows, vocab, inner, outer_stride, stride = layout(logits)
    o = _operands(logits, token_ids, mask, per_row, floor, torch.float64)
    argument, element = _core.token_logprobs(
        x.data_ptr(), o.ids.data_ptr(), address(o.mask), address(o.per_row), address(o.floors), DTYPE[x.dtype],
        DTYPE[o.ids.dtype], rows, vocab, o.tokens, inner, outer_stride, stride, temperature, softcap, LOW, HIGH,
        logp.data_ptr(), address(entropy if want_entropy else None), stats.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if argument:
        _refuse(argument, element, logits, token_ids, per_row, floor)
    return logp, entropy, stats


def _forward_triton(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe, floor: Maybe, temperature: float,
    softcap: float, want_entropy: bool, in_place: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from ..kernels import logprob as kernels

    if os.environ.get("REACT_FAST_CHECKED") == "1":
        _check_values(logits, token_ids, mask, per_row, floor)
    logp, entropy, stats = _outputs(logits, token_ids, want_entropy)
    kernels.forward(
        *layout(logits), *_operands(logits, token_ids, mask, per_row, floor, logp.dtype), temperature, softcap,
        logp, entropy if want_entropy else None, stats,
    )  # fmt: skip
    return logp, entropy, stats


def _forward_fake(
    logits: torch.Tensor, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe, floor: Maybe, temperature: float,
    softcap: float, want_entropy: bool, in_place: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _outputs(logits, token_ids, want_entropy)


# ---- backward


def _into_cpu(
    d_logits: torch.Tensor, logits: torch.Tensor, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe,
    floor: Maybe, temperature: float, softcap: float, stats: torch.Tensor, entropy: torch.Tensor, d_logp: Maybe,
    d_entropy: Maybe,
) -> None:  # fmt: skip
    x, rows, vocab, inner, outer_stride, stride = layout(logits)
    o = _operands(logits, token_ids, mask, per_row, floor, torch.float64)
    d_logp, d_entropy = _flat(d_logp), _flat(d_entropy)
    _core.token_logprobs_backward(
        x.data_ptr(), o.ids.data_ptr(), address(o.mask), address(o.per_row), address(o.floors), DTYPE[x.dtype],
        DTYPE[o.ids.dtype], rows, vocab, o.tokens, inner, outer_stride, stride, temperature, softcap,
        stats.data_ptr(), entropy.data_ptr(), address(d_logp), address(d_entropy), d_logits.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def _into_triton(
    d_logits: torch.Tensor, logits: torch.Tensor, token_ids: torch.Tensor, mask: Maybe, per_row: Maybe,
    floor: Maybe, temperature: float, softcap: float, stats: torch.Tensor, entropy: torch.Tensor, d_logp: Maybe,
    d_entropy: Maybe,
) -> None:  # fmt: skip
    from ..kernels import logprob as kernels

    kernels.backward(
        *layout(logits), *_operands(logits, token_ids, mask, per_row, floor, stats.dtype), temperature, softcap,
        stats, entropy, _flat(d_logp), _flat(d_entropy), d_logits,
    )  # fmt: skip


_INTO = {"cpu": _into_cpu, "triton": _into_triton}


def _backward_cpu(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
    d_logits = logits.new_empty(logits.shape)
    _into_cpu(d_logits, logits, *arguments)
    return d_logits


def _backward_triton(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
    d_logits = logits.new_empty(logits.shape)
    _into_triton(d_logits, logits, *arguments)
    return d_logits


def _backward_fake(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _have_memory(*tensors: Maybe) -> bool:
    """Real tensors that nobody traces, batches or watches: one call is one write to one memory."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(
        x is None or (type(x) is torch.Tensor and not torch._C._functorch.is_legacy_batchedtensor(x))
        for x in tensors
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.temperature, ctx.softcap, ctx.want_entropy, ctx.in_place = inputs
    _, entropy, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, stats, entropy)


def _grad(ctx: Any, d_logp: Maybe, d_entropy: Maybe, _: None) -> tuple:
    # Unpacking refuses logits that were written to since, by an earlier in-place backward too.
    *tensors, stats, entropy = ctx.saved_tensors
    d_entropy = d_entropy if ctx.want_entropy else None
    none = (None,) * 8
    if d_logp is None and d_entropy is None:
        return None, *none
    arguments = (*tensors, ctx.temperature, ctx.softcap, stats, entropy, d_logp, d_entropy)
    logits = tensors[0]
    if not (ctx.in_place and _have_memory(logits, d_logp, d_entropy)):
        return token_logprobs_backward(*arguments), *none
    memory = logits.detach()
    _INTO[resolve(logits.device.type)](memory, memory, *arguments[1:])
    torch.autograd.graph.increment_version(logits)
    return memory, *none


_INPUT = (
    "Tensor logits, Tensor token_ids, Tensor? mask, Tensor? per_row, Tensor? logit_floor, float temperature, "
    "float softcap"
)

token_logprobs = register(
    "token_logprobs",
    f"({_INPUT}, bool want_entropy, bool inplace_backward) -> (Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    triton=_forward_triton,
    fake=_forward_fake,
    setup_context=_setup,
    backward=_grad,
)
token_logprobs_backward = register(
    "token_logprobs_backward",
    f"({_INPUT}, Tensor stats, Tensor entropy, Tensor? d_logp, Tensor? d_entropy) -> Tensor",
    cpu=_backward_cpu,
    triton=_backward_triton,
    fake=_backward_fake,
)
