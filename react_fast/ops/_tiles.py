"""What stands between the GEMMs of the linear log-prob ops: sizes of tiles, the kernels on a tile, products.

A tile is [rows, columns] of logits as the GEMM leaves them. `fold` reduces it to five numbers a row and, where
asked, writes the weights that the next GEMM multiplies; `turn` writes d loss / d logit. Sizes follow from a budget
and from the cache, never from a constant.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .. import _core
from .backend import DTYPE, accumulation_dtype, address, resolve
from .logprob import HIGH, LOW

Tensor = torch.Tensor
Maybe = torch.Tensor | None

# The fold's unit (kUnit of csrc/linear_logprob.cpp): with tiles of whole units no sum depends on the width.
UNIT = 2048
# Rows of a GEMM that must give every row the same bits wherever it stands: always this many, padded with zeros.
INVARIANT_ROWS = 64
# Rows of a tile on a GPU: 16 row tiles of 128 beside 32 column tiles of 256 of a 8192-column tile are four CTAs a
# multiprocessor. On a CPU a tile takes all rows that the budget allows.
GPU_ROWS = 2048
# Where the exponential of a float64 is 0 (below -745) while the gap stays a number: 0 times it is 0.
LEAST_GAP = -800.0
# Where the system names no last-level cache.
USUAL_CACHE = 32 << 20


class Options(NamedTuple):
    """logit = scale * (h W^T + b), capped, over temperature (unless there is one a row).

    `invariant`: GEMMs of one shape on one thread, so that no bit of a row depends on the batch or the threads.
    """

    scale: float
    temperature: float
    softcap: float
    invariant: bool


class Tiling(NamedTuple):
    """Rows and columns of a tile, and the dtype in which the GEMM writes it."""

    rows: int
    columns: int
    dtype: torch.dtype


# ---- sizes -----------------------------------------------------------------------------------------------------


def _mebibytes(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(
            f"{name} must be a whole number of MiB {'above 0' if least else 'from 0 up'}, got {text!r}"
        )
    return int(text) << 20


def budget(device: torch.device) -> int:
    """Bytes that tiles of logits may take: REACT_FAST_TILE_MIB, 64 by default, 256 on a GPU."""
    return _mebibytes("REACT_FAST_TILE_MIB", 64 if device.type == "cpu" else 256, 1)


def workspace() -> int:
    """Bytes of logits that may be kept for the backward, which need not be computed again: REACT_FAST_KEEP_MIB."""
    return _mebibytes("REACT_FAST_KEEP_MIB", 0, 0)


@cache
def _cache_bytes(device: torch.device) -> int:
    """The last cache between a tile and memory: L2 of a GPU, last level of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = level.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes) or USUAL_CACHE


@cache
def _half_gemms(dtype: torch.dtype) -> bool:
    """Whether the CPU's GEMM library has GEMMs of this half precision; oneDNN wants AVX-512 for them, and torch's
    own loops take several times as long as a float32 GEMM."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return supported is not None and bool(supported())


def widened(x: Tensor) -> bool:
    """Whether GEMMs of these half-precision operands are done on float32 copies of tiles."""
    return x.element_size() == 2 and x.device.type == "cpu" and not _half_gemms(x.dtype)


def tile_dtype(hidden: Tensor) -> torch.dtype:
    """float32 where the GEMM can write its own accumulators, else the dtype of its operands."""
    own = hidden.is_cuda and hidden.element_size() == 2 and hasattr(torch.ops.aten.mm, "dtype_out")
    return torch.float32 if own or widened(hidden) else hidden.dtype


def turned_dtype(hidden: Tensor) -> torch.dtype:
    """Of a tile's weights and gradients, which the next GEMM multiplies."""
    return hidden.dtype if hidden.is_cuda else tile_dtype(hidden)


def tiling(hidden: Tensor, vocab: int, options: Options, outputs: int = 0, beside: int = 0) -> Tiling:
    """Tiles of hidden [N, D] by `vocab` columns with `outputs` more buffers of their size, and `beside` bytes a
    column that must stay in the cache with them.

    Within the budget, and in half the last-level cache where the rows allow it, so that the GEMM behind the kernel
    finds the tile there and W streams through the other half. Wide all the same: tiles of 2048 columns cost the
    GEMM library a third of its speed.
    """
    dtype = tile_dtype(hidden)
    if options.invariant:
        return Tiling(INVARIANT_ROWS, min(UNIT, vocab), dtype)
    bytes_each = dtype.itemsize + outputs * turned_dtype(hidden).itemsize
    most = budget(hidden.device) // bytes_each
    rows = len(hidden) if hidden.device.type == "cpu" else min(len(hidden), GPU_ROWS)
    rows = max(1, min(rows, most // UNIT))
    fitting = _cache_bytes(hidden.device) // 2 // (rows * bytes_each + beside)
    columns = UNIT * max(1, min(most // rows, fitting) // UNIT)
    return Tiling(rows, min(columns, vocab), dtype)


def turned_rows(hidden: Tensor, sizes: Tiling) -> int:
    """Rows of a tile of gradients, which several tiles of logits fill: as many as the budget has room for, so that
    a row of dW is one GEMM's sum."""
    each = sizes.columns * turned_dtype(hidden).itemsize
    return max(sizes.rows, min(len(hidden), budget(hidden.device) // each))


def spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, step):
        yield begin, min(begin + step, size)


def part(x: Maybe, begin: int, end: int) -> Maybe:
    return None if x is None else x[begin:end]


class Buffer:
    """Memory for a tile of at most rows x columns, handed out contiguous in the shape that is needed."""

    def __init__(self, like: Tensor, size: int, dtype: torch.dtype | None = None) -> None:
        self._memory = like.new_empty(size, dtype=dtype or like.dtype)

    def __call__(self, rows: int, columns: int) -> Tensor:
        return self._memory[: rows * columns].view(rows, columns)


def fresh(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An unwritten contiguous tensor of this shape.

    On ordinary pages: asking for large ones behind a head's gradient of some hundred MiB was seen to wait for the
    system to make room for longer than all the page faults take.
    """
    return torch.empty_like(like, dtype=dtype or like.dtype, memory_format=torch.contiguous_format)


# ---- products --------------------------------------------------------------------------------------------------


@contextmanager
def gemm_threads(invariant: bool) -> Iterator[None]:
    """One thread where the GEMM library would cut its sums by the number of threads."""
    threads = torch.get_num_threads()
    if invariant:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if invariant:
            torch.set_num_threads(threads)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out <- a b; `out` float32 where tile_dtype says so."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if widened(a):
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a b, in float32 where a GPU's GEMM can write its own sums (of half-precision results it may add up parts),
    and for float16 on a CPU, whose range a sum over rows may leave."""
    if a.is_cuda and a.element_size() == 2 and hasattr(torch.ops.aten.mm, "dtype_out"):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16 and not a.is_cuda:
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # with `out` autocast leaves the dtype alone


def accumulate(target: Tensor, a: Tensor, b: Tensor, unit: Maybe = None) -> None:
    """target <- target + a b, or + unit a b; the sum in target's dtype. `a` is a tile in turned_dtype."""
    b = b.to(a.dtype)
    if unit is None and target.dtype == a.dtype and a.element_size() > 2:
        target.addmm_(a, b)
    elif unit is None:
        target.add_(_sums(a, b))
    else:
        target.add_(_sums(a, b).to(unit.dtype).mul_(unit))


def add_product(target: Tensor, a: Tensor, b: Tensor, anew: bool, unit: Maybe = None) -> None:
    """target <- a b where `anew`, else target + a b; with `unit` that times the product."""
    b = b.to(a.dtype)
    if not anew:
        accumulate(target, a, b, unit)
    elif unit is not None:
        target.copy_(_sums(a, b).to(unit.dtype).mul_(unit))
    elif target.dtype == a.dtype and not (a.is_cuda and a.element_size() == 2):
        torch.mm(a, b, out=target)
    else:
        target.copy_(_sums(a, b))


def float16_unit(dtype: torch.dtype, *slopes: Maybe) -> Maybe:
    """A power of two 32 times below the largest slope, 0-d float32: in units of it float16 loses neither 1 / n
    times a probability nor a loss scale. None for the other dtypes, whose exponents reach, and for no slopes."""
    if dtype != torch.float16:
        return None
    given = [x.abs().amax() for x in slopes if x is not None and len(x)]
    if not given:
        return None
    largest = torch.stack(given).amax()
    bounded = torch.where(largest.isfinite(), largest, 1.0).double().clamp(2.0**-100, 2.0**100)
    return torch.exp2(torch.log2(bounded).floor() - 5).float()


# ---- kernels on a tile -----------------------------------------------------------------------------------------


def _arguments(z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, o: Options) -> tuple:
    return (
        z.data_ptr(), address(bias), ids.data_ptr(), address(temperatures), DTYPE[z.dtype], *z.shape, z.stride(0),
        first, o.scale, o.temperature, o.softcap,
    )  # fmt: skip


def fold(
    z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, options: Options, state: Tensor,
    moment: bool, factor: Maybe = None, shift: Maybe = None, weights: Maybe = None, weighted: Maybe = None,
) -> None:  # fmt: skip
    """Fold columns `first` ... of the rows into their state; csrc/linear_logprob.h has the contract.

    Args:
        z: [n, c] tile; bias: [c] or None; ids: [n] int64, counted from the vocabulary's start.
        temperatures: [n] float64 or None.  state: [n, 5] float64.  moment: the entropy's is wanted.
        factor, shift: [n]; with them the weights of the expected embedding are written, to `weights` [n, c] or
            over the tile, and times d to `weighted` [n, c].
    """
    if resolve(z.device.type) == "triton":
        from ..kernels import linear_logprob as kernels

        kernels.fold_tile(
            z, bias, ids, temperatures, first, options, state, moment, factor, shift, weights, weighted
        )
        return
    bias = None if bias is None else bias.to(z.dtype)
    _core.fold_tile(  # type: ignore[call-arg]
        *_arguments(z, bias, ids, temperatures, first, options), state.data_ptr(), moment, address(factor),
        address(shift), address(weights), address(weighted), torch.get_num_threads(),
    )  # fmt: skip


def turn(
    z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, options: Options, stats: Tensor,
    out: Maybe = None,
) -> None:  # fmt: skip
    """The gradient of g logp + h H with respect to tile + bias, to `out` [n, c] or over the tile.

    Args:
        stats: [n, 5] float64: largest, log of the sum, H, g, h. The others as in `fold`.
    """
    if resolve(z.device.type) == "triton":
        from ..kernels import linear_logprob as kernels

        kernels.turn_tile(z, bias, ids, temperatures, first, options, stats, out)
        return
    bias = None if bias is None else bias.to(z.dtype)
    _core.turn_tile(  # type: ignore[call-arg]
        *_arguments(z, bias, ids, temperatures, first, options), stats.data_ptr(), address(out),
        torch.get_num_threads(),
    )  # fmt: skip


def rescale(U: Tensor, Q: Maybe, factor: Tensor, shift: Tensor) -> None:
    """U <- factor U and Q <- factor (Q + shift U), where a row's largest logit has changed."""
    if resolve(U.device.type) == "triton":
        from ..kernels import linear_logprob as kernels

        kernels.rescale(U, Q, factor, shift)
    elif bool((factor != 1).any()):
        if Q is not None:
            Q.addcmul_(U, shift[:, None]).mul_(factor[:, None])
        U.mul_(factor[:, None])


# ---- rows ------------------------------------------------------------------------------------------------------


def capturing(device: torch.device) -> bool:
    """Inside a CUDA graph's capture nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Rows:
    """The rows that count, as [N, D] and [N]; `back` puts their results where they came from.

    Counting them waits for a GPU once. Inside the capture of a CUDA graph all rows are kept instead, the others
    with hidden states and ids of 0, and their results become 0 at the end.
    """

    def __init__(
        self, hidden: Tensor, token_ids: Tensor, mask: Maybe, per_row: Maybe, options: Options
    ) -> None:
        self.shape = hidden.shape[:-1]
        x, ids = hidden.reshape(self.shape.numel(), hidden.shape[-1]), token_ids.reshape(-1).long()
        temperatures = None if per_row is None else per_row.reshape(-1).double()
        self.index: Maybe = None
        self.mask: Maybe = None
        if mask is not None and capturing(hidden.device):
            self.mask = mask.reshape(-1)
            x, ids = torch.where(self.mask[:, None], x, 0.0), torch.where(self.mask, ids, 0)
            temperatures = None if temperatures is None else torch.where(self.mask, temperatures, 1.0)
        elif mask is not None:
            index = mask.reshape(-1).nonzero()[:, 0]
            if len(index) < len(x):
                self.index, x, ids = index, x[index], ids[index]
                temperatures = None if temperatures is None else temperatures[index]
        self.hidden, self.ids, self.temperatures = x.contiguous(), ids.contiguous(), temperatures
        self.inverse_t: Tensor | float = 1.0 / (options.temperature if temperatures is None else temperatures)

    def check(self, vocab: int) -> tuple[Maybe, Maybe]:
        """(rows with an id outside [0, vocab), rows with an impossible temperature), None for none.

        On a CPU they are refused; a GPU, where looking would wait, makes them NaN unless REACT_FAST_CHECKED=1.
        """
        wild, t = (self.ids < 0) | (self.ids >= vocab), self.temperatures
        cold = None if t is None else ~((t >= LOW) & (t <= HIGH))
        if resolve(self.ids.device.type) == "triton" and os.environ.get("REACT_FAST_CHECKED") != "1":
            return wild, cold
        if bool(wild.any()):
            raise IndexError(
                f"token_ids must be in [0, {vocab}) where mask is true, got {int(self.ids[wild][0])}"
            )
        if t is not None and cold is not None and bool(cold.any()):
            raise ValueError(f"temperature must be in [{LOW:g}, {HIGH:g}], got {float(t[cold][0]):g}")
        return None, None

    def take(self, x: Tensor) -> Tensor:
        """[...] or [..., k] -> [N] or [N, k]."""
        flat = x.reshape(-1, *x.shape[len(self.shape) :])
        if self.mask is not None:
            return self._counting(flat)
        return flat if self.index is None else flat[self.index]

    def _counting(self, x: Tensor) -> Tensor:
        assert self.mask is not None
        return torch.where(self.mask.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))

    def back(self, x: Tensor) -> Tensor:
        """[N] or [N, k] -> [...] or [..., k], 0 in the other rows."""
        if self.index is not None:
            whole = x.new_zeros(self.shape.numel(), *x.shape[1:])
            x = whole.index_copy_(0, self.index, x)
        elif self.mask is not None:
            x = self._counting(x)
        return x.view((*self.shape, *x.shape[1:]))


def accumulator(rows: int, dim: int, like: Tensor) -> Tensor:
    """[rows, dim] zeros in the dtype of sums: float32, float64 for float64."""
    return like.new_zeros((rows, dim), dtype=accumulation_dtype(like.dtype))
