"""The tiles behind react_fast.ops.linear_logprob: two GEMMs with a fold between them, for forward and backward.

forward    z = h W^T (a tile of columns)      state <- z, z <- exp(d) du/dz      U += z W
backward   z = h W^T                          z <- d loss / d z                  dW = z^T h
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .. import _core
from .backend import DTYPE, accumulation_dtype, address, get_backend, resolve
from .logprob import HIGH, LOW

Tensor = torch.Tensor
Maybe = torch.Tensor | None

# The fold's unit (kBlock of csrc/logprob_lanes.h): with tiles of whole units the sums do not depend on the width.
UNIT = 2048
# Bytes of a tile that a last-level cache keeps between the GEMM that writes it and the one that reads it, and wide
# enough that the GEMM library runs at full speed (2048 columns cost it a third).
CACHED = 32 << 20
# Rows of a GEMM that must give every row the same bits wherever it stands: always this many, padded with zeros.
INVARIANT_ROWS = 64


class Options(NamedTuple):
    """logit = scale * (h W^T + b), capped, over temperature (unless there is one a row).

    `invariant`: GEMMs of one shape on one thread, so that no bit of a row depends on the batch or the threads.
    """

    scale: float
    temperature: float
    softcap: float
    invariant: bool


class Sums(NamedTuple):
    """What a row needs for logp, entropy and every gradient; float64 [N] but for the expected embeddings.

    log_sum = log sum_j exp(d_j), d_j = (u_j - largest) / T; `chosen` is the chosen token's u. Over the others,
    U = sum exp(d_j) s_j W_j and Q = sum exp(d_j) d_j s_j W_j with s_j = du_j/dx_j: [N, D], or empty.
    """

    largest: Tensor
    total: Tensor
    log_sum: Tensor
    chosen: Tensor
    logp: Tensor
    entropy: Tensor
    U: Tensor
    Q: Tensor


class Rows:
    """The rows that count, as [N, D] and [N]; `back` puts their results where they came from."""

    def __init__(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        mask: Maybe,
        per_row: Maybe,
        options: Options,
    ) -> None:
        if resolve(hidden.device.type) != "cpu":
            raise RuntimeError(
                f"linear_token_logprobs has a kernel for CPU tensors only, got {hidden.device.type} under backend "
                f"'{get_backend()}'; use token_logprobs on the logits there"
            )
        self.shape = hidden.shape[:-1]
        x, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1).long()
        temperatures = None if per_row is None else per_row.reshape(-1).double()
        self.index: Maybe = None
        if mask is not None and not bool(mask.all()):
            self.index = mask.reshape(-1).nonzero()[:, 0]
            x, ids = x[self.index], ids[self.index]
            temperatures = None if temperatures is None else temperatures[self.index]
        self.hidden, self.ids, self.temperatures = x.contiguous(), ids.contiguous(), temperatures
        self.inverse_t: Tensor | float = 1.0 / (options.temperature if temperatures is None else temperatures)

    def take(self, x: Tensor) -> Tensor:
        """[...] or [..., k] -> [N] or [N, k]."""
        flat = x.reshape(-1, *x.shape[len(self.shape) :])
        return flat if self.index is None else flat[self.index]

    def back(self, x: Tensor) -> Tensor:
        """[N] or [N, k] -> [...] or [..., k], 0 in the other rows."""
        if self.index is not None:
            whole = x.new_zeros(self.shape.numel(), *x.shape[1:])
            x = whole.index_copy_(0, self.index, x)
        return x.view((*self.shape, *x.shape[1:]))

    def check(self, vocab: int) -> None:
        wrong = (self.ids < 0) | (self.ids >= vocab)
        if bool(wrong.any()):
            raise IndexError(
                f"token_ids must be in [0, {vocab}) where mask is true, got {int(self.ids[wrong][0])}"
            )
        if self.temperatures is not None and len(self.temperatures):
            low, high = float(self.temperatures.min()), float(self.temperatures.max())
            if not LOW <= low <= high <= HIGH:
                raise ValueError(f"temperature must be in [{LOW:g}, {HIGH:g}], got {low:g} to {high:g}")


def budget() -> int:
    """Bytes that tiles of logits may take: REACT_FAST_TILE_MIB, 64 by default."""
    text = os.environ.get("REACT_FAST_TILE_MIB", "64")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"REACT_FAST_TILE_MIB must be a whole number of MiB above 0, got {text!r}")
    return int(text) << 20


def tiling(rows: int, vocab: int, itemsize: int, copies: int) -> tuple[int, int]:
    """(rows of a block, columns of a tile): within the budget, and in cache where the rows allow it."""
    most = budget() // (itemsize * copies)
    block = max(1, min(rows, most // UNIT))
    wanted = min(most, CACHED // (itemsize * copies))
    columns = UNIT * max(1, wanted // (block * UNIT))
    return block, min(columns, vocab)


@contextmanager
def _gemm_threads(invariant: bool) -> Iterator[None]:
    """One thread where the GEMM library would cut its sums by the number of threads."""
    threads = torch.get_num_threads()
    if invariant:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if invariant:
            torch.set_num_threads(threads)


def _spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, step):
        yield begin, min(begin + step, size)


def _columns(bias: Maybe, begin: int, end: int) -> Maybe:
    return None if bias is None else bias[begin:end].contiguous()


def forward(
    hidden: Tensor, weight: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, options: Options,
    want_entropy: bool, want_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(state [N, 5] of the fold, U, Q); one GEMM, one more for U, one more for Q.

    Args:
        hidden: [N, D] contiguous, weight: [V, D], bias: [V] or None, of one dtype; ids: [N] int64, outside [0, V)
            for a token of another shard. temperatures: [N] float64 or None.
        want_entropy: fold its moment too; with want_hidden also Q.
    """
    rows, dim = hidden.shape
    wide = accumulation_dtype(hidden.dtype)
    state = torch.zeros(rows, 5, dtype=torch.float64)
    state[:, 0] = state[:, 4] = float("-inf")
    U = torch.zeros((rows, dim) if want_hidden else (0, dim), dtype=wide)
    Q = torch.zeros((rows, dim) if want_hidden and want_entropy else (0, dim), dtype=wide)
    copies = 2 if len(Q) else 1
    block, width = tiling(rows, weight.shape[0], hidden.element_size(), copies)
    if options.invariant:
        padding = -rows % INVARIANT_ROWS
        hidden, U, Q = (_padded(x, padding) for x in (hidden, U, Q))
        block, width = INVARIANT_ROWS, min(UNIT, weight.shape[0])
    tile, twin = (hidden.new_empty(block * width if use else 0) for use in (True, len(Q)))
    for begin, stop in _spans(len(hidden), block):
        end = min(stop, rows)
        h = hidden[begin:stop]
        factor, shift = torch.empty(2, end - begin, dtype=wide).unbind()
        for first, last in _spans(weight.shape[0], width):
            w, b = weight[first:last], _columns(bias, first, last)
            shape = (stop - begin, last - first)
            z = tile[: shape[0] * shape[1]].view(shape)
            with _gemm_threads(options.invariant):
                torch.mm(h, w.t(), out=z)
            weighted = twin[: z.numel()].view(shape) if len(Q) else None
            own = _part(temperatures, begin, end)
            _core.fold_tile(  # type: ignore[call-arg]
                *_tile_arguments(z[: end - begin], b, ids[begin:end], own, first, options),
                state[begin:end].data_ptr(), want_entropy, address(factor) if want_hidden else 0, address(shift),
                address(weighted), torch.get_num_threads(),
            )  # fmt: skip
            if not want_hidden:
                continue
            counted = slice(begin, end)
            _rescale(U[counted], Q[counted] if len(Q) else None, factor, shift)
            with _gemm_threads(options.invariant):
                _accumulate(U[begin:stop], z, w)
                if weighted is not None:
                    _accumulate(Q[begin:stop], weighted, w)
    return state, U[:rows], Q[:rows]


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows, x.shape[1])]) if len(x) and rows else x


def _part(x: Maybe, begin: int, end: int) -> Maybe:
    return None if x is None else x[begin:end]


def _tile_arguments(
    z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, o: Options
) -> tuple:
    return (
        z.data_ptr(), address(bias), ids.data_ptr(), address(temperatures), DTYPE[z.dtype], *z.shape, z.stride(0),
        first, o.scale, o.temperature, o.softcap,
    )  # fmt: skip


def _rescale(U: Tensor, Q: Maybe, factor: Tensor, shift: Tensor) -> None:
    """U <- factor U and Q <- factor (Q + shift U), where a row's largest logit has changed."""
    if bool((factor != 1).any()):
        if Q is not None:
            Q.addcmul_(U, shift[:, None]).mul_(factor[:, None])
        U.mul_(factor[:, None])


def _accumulate(target: Tensor, a: Tensor, b: Tensor) -> None:
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    else:
        target.add_(torch.mm(a, b))


def finish(state: Tensor, inverse_t: Tensor | float, U: Tensor, Q: Tensor) -> Sums:
    """The rows' results from the fold's state."""
    largest, ties, rest, moment, chosen = state.unbind(1)
    empty = (largest == float("-inf")) & (rest == 0)
    total = ties + rest
    log_sum = torch.log1p((ties - 1.0) + rest)
    log_sum = torch.where(largest == float("inf"), torch.nan, log_sum)
    entropy = torch.where(empty, 0.0, log_sum - moment / torch.where(empty, 1.0, total))
    log_sum = torch.where(empty, float("-inf"), log_sum)
    gap = torch.where(empty, float("-inf"), (chosen - largest) * inverse_t - log_sum)
    logp = torch.where(chosen.isnan(), torch.nan, gap.clamp_max(0.0))
    return Sums(largest, total, log_sum, chosen, logp, entropy, U, Q)


def merge(a: Tensor, b: Tensor, inverse_t: Tensor | float) -> Tensor:
    """State [N, 5] of two vocabulary shards together, as csrc/logprob_lanes.h merges its folds."""
    above = b[:, 0] > a[:, 0]
    top, low = torch.where(above[:, None], b, a), torch.where(above[:, None], a, b)
    delta = torch.where(low[:, 0] == top[:, 0], 0.0, ((low[:, 0] - top[:, 0]) * inverse_t).clamp_min(-800.0))
    delta = torch.where(low[:, 0] == float("-inf"), 0.0, delta)
    same = low[:, 0] == top[:, 0]
    factor = delta.exp()
    ties = top[:, 1] + torch.where(same, low[:, 1], 0.0)
    below = torch.where(same, 0.0, low[:, 1]) + low[:, 2]
    rest = top[:, 2] + factor * below
    moment = top[:, 3] + factor * (low[:, 3] + delta * below)
    return torch.stack([top[:, 0], ties, rest, moment, torch.maximum(a[:, 4], b[:, 4])], 1)


def hidden_gradient(
    sums: Sums, g: Tensor, h: Maybe, weight: Tensor, ids: Tensor, inverse_t: Tensor | float, options: Options
) -> Tensor:
    """d loss / d hidden [N, D] from the expected embeddings, without a GEMM; g and h float64 [N].

    dh = scale / T (c_y s_y W_y - (g + h (H - log sum)) U / sum - h Q / sum)
    c_y = -g expm1(logp) - h p_y (logp + H), in which 1 - p_y does not cancel
    """
    wide = sums.U.dtype
    unit = options.scale * inverse_t
    live = (sums.log_sum != float("-inf")) & ((g != 0) if h is None else (g != 0) | (h != 0))
    inverse = torch.where(live, unit / torch.where(live, sums.total, 1.0), 0.0)
    slope = 1.0 - (sums.chosen / options.softcap) ** 2 if options.softcap else 1.0
    own = -g * torch.expm1(sums.logp)
    others = g
    if h is not None:
        own = own - h * sums.logp.exp() * torch.where(
            sums.logp == float("-inf"), 0.0, sums.logp + sums.entropy
        )
        others = g + h * (sums.entropy - sums.log_sum)
    near = live & (sums.chosen != float("-inf")) & (ids >= 0) & (ids < weight.shape[0])
    own = torch.where(near, own * slope * unit, 0.0)
    out = sums.U * (-others * inverse).to(wide)[:, None]
    if h is not None and len(sums.Q):
        out.addcmul_(sums.Q, (-h * inverse).to(wide)[:, None])
    chosen = weight.index_select(0, torch.where(near, ids, 0)).to(wide)
    out.addcmul_(chosen, own.to(wide)[:, None])
    return torch.where(live[:, None], out, 0.0)


def weight_gradient(
    hidden: Tensor, weight: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, options: Options, sums: Sums,
    g: Tensor, h: Maybe, want_bias: bool,
) -> tuple[Tensor, Maybe]:  # fmt: skip
    """(dW [V, D], db [V] or None): two GEMMs; every dW row is one sum over all rows, in float32 or better."""
    keep = (g != 0) if h is None else (g != 0) | (h != 0)
    stats = torch.stack(
        [sums.largest, sums.log_sum, sums.entropy, g, torch.zeros_like(g) if h is None else h], 1
    )
    if not bool(keep.all()):
        hidden, ids, stats = hidden[keep], ids[keep], stats[keep]
        temperatures = None if temperatures is None else temperatures[keep]
    rows, (vocab, dim) = len(hidden), weight.shape
    wide = accumulation_dtype(hidden.dtype)
    d_weight = torch.zeros_like(weight)
    d_bias = torch.zeros(vocab, dtype=wide) if want_bias else None
    if rows == 0:
        return d_weight, d_bias
    block, width = tiling(rows, vocab, hidden.element_size(), 1)
    tile = hidden.new_empty(block * width)
    for first, last in _spans(vocab, width):
        w, b = weight[first:last], _columns(bias, first, last)
        sum_of_blocks = torch.zeros(last - first, dim, dtype=wide) if block < rows else None
        for begin, end in _spans(rows, block):
            h_rows = hidden[begin:end]
            z = tile[: (end - begin) * (last - first)].view(end - begin, last - first)
            torch.mm(h_rows, w.t(), out=z)
            _core.turn_tile(  # type: ignore[call-arg]
                *_tile_arguments(z, b, ids[begin:end], _part(temperatures, begin, end), first, options),
                stats[begin:end].data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            if sum_of_blocks is None:
                torch.mm(z.t(), h_rows, out=d_weight[first:last])
            else:
                _accumulate(sum_of_blocks, z.t(), h_rows)
            if d_bias is not None:
                d_bias[first:last] += z.sum(0, dtype=wide)
        if sum_of_blocks is not None:
            d_weight[first:last] = sum_of_blocks
    return d_weight, d_bias
