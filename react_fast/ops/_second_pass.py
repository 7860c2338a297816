"""Gradients from logits that are computed again, of the rows that have any: z = h W^T, z <- d loss / d z, then
dh += z W and dW = z^T h, a tile of columns after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import _linear_logprob as engine
from . import _tiles as tiles
from ._linear_logprob import Head, Sums
from ._tiles import Maybe, Options, Rows, Tensor, part, spans
from .backend import accumulation_dtype


class _Live(NamedTuple):
    """The rows that have a gradient: all of them, or those at `places`."""

    hidden: Tensor
    ids: Tensor
    temperatures: Maybe
    stats: Tensor
    places: Maybe


def _with_gradient(rows: Rows, head: Head, sums: Sums, g: Tensor, h: Maybe, unit: Maybe) -> _Live:
    ids, stats = rows.ids - head.first, engine.turn_stats(sums, g, h, unit)
    live = engine.live_rows(sums, g, h)
    if tiles.capturing(rows.hidden.device) or bool(live.all()):
        return _Live(rows.hidden, ids, rows.temperatures, stats, None)
    temperatures = None if rows.temperatures is None else rows.temperatures[live]
    places = live.nonzero()[:, 0]
    return _Live(rows.hidden[live], ids[live], temperatures, stats[live], places)


def second_pass(
    rows: Rows, head: Head, options: Options, sums: Sums, g: Tensor, h: Maybe, wanted: Sequence[bool],
    kept: list[Tensor], main_grad: Maybe = None, lent: Maybe = None,
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    """Gradients of this rank's columns from logits computed again: (dh [N, D] wide, dW [V, D], db [V] wide).

    One GEMM for the columns whose logits were not kept, one each for dh and dW. Vocabulary first, so that every
    row of dW is one sum over all rows that have a gradient, in float32 or better.

    Args:
        wanted: which of the three; another is None.
        main_grad: [V, D], to which dW is added instead; then None stands in its place.
        lent: [V, D], which becomes dW; `kept` may lie in it.
    """
    unit = tiles.float16_unit(rows.hidden.dtype, g, h)
    live = _with_gradient(rows, head, sums, g, h, unit)
    count, vocab = len(live.hidden), len(head.weight)
    sizes = tiles.tiling(live.hidden, vocab, options._replace(invariant=False))
    dtype = tiles.turned_dtype(live.hidden)
    same = sizes.dtype == dtype
    room = sizes.columns * (sizes.rows if same else tiles.turned_rows(live.hidden, sizes))
    turned = tiles.Buffer(live.hidden, room, dtype)
    scratch = turned if same else tiles.Buffer(live.hidden, sizes.rows * sizes.columns, sizes.dtype)
    found = _Found(live, head, wanted, unit, main_grad, lent)
    for first, last, known in _column_tiles(kept, vocab, sizes.columns):
        if known is not None and live.places is not None:
            known = known[live.places]
        w, b = head.columns(first, last)
        block = room // (last - first)
        into = found.rows_of_weight(first, last, apart=count > block)
        for begin, end in spans(count, block):
            out = turned(end - begin, last - first)
            for upper, lower in spans(end - begin, sizes.rows):
                own = slice(begin + upper, begin + lower)
                if known is not None:
                    z = known[own]
                else:
                    z = out[upper:lower] if same else scratch(lower - upper, last - first)
                    tiles.product(live.hidden[own], w.t(), z)
                tiles.turn(
                    z, b, live.ids[own], part(live.temperatures, own.start, own.stop), first, options,
                    live.stats[own], out[upper:lower],
                )  # fmt: skip
            found.add(into, begin, first, out, w)
        found.put(into, first)
    return found.finished(len(rows.ids))


class _Found:
    """The gradients of `second_pass` as they grow."""

    def __init__(
        self, live: _Live, head: Head, wanted: Sequence[bool], unit: Maybe, main_grad: Maybe, lent: Maybe
    ) -> None:
        (count, dim), self._live, self._unit = live.hidden.shape, live, unit
        self._d_hidden = tiles.accumulator(count, dim, live.hidden) if wanted[0] else None
        self._anew, self._lent = main_grad is None, lent is not None
        self._d_weight: Maybe = None
        if wanted[1]:
            given = lent if main_grad is None else main_grad
            self._d_weight = tiles.fresh(head.weight) if given is None else given
        wide = accumulation_dtype(live.hidden.dtype)
        self._d_bias = live.hidden.new_zeros(len(head.weight), dtype=wide) if wanted[2] else None
        if self._d_weight is not None and count == 0 and self._anew:
            self._d_weight.zero_()

    def rows_of_weight(self, first: int, last: int, apart: bool) -> Maybe:
        """Where dW of several blocks' columns is summed: `apart` if its own numbers are too narrow for a sum, or
        their memory holds logits of later blocks."""
        if self._d_weight is None:
            return None
        wide = accumulation_dtype(self._live.hidden.dtype)
        if apart and self._anew and (self._lent or self._d_weight.dtype != wide):
            return tiles.accumulator(last - first, self._live.hidden.shape[1], self._live.hidden)
        return self._d_weight[first:last]

    def add(self, into: Maybe, begin: int, first: int, out: Tensor, w: Tensor) -> None:
        """A tile of d loss / d logits, whose first row is `begin` and whose first column is `first`."""
        end = begin + len(out)
        if self._d_hidden is not None:
            tiles.accumulate(self._d_hidden[begin:end], out, w)
        if into is not None:
            h = self._live.hidden[begin:end]
            tiles.add_product(into, out.t(), h, begin == 0 and self._anew, self._unit)
        if self._d_bias is not None:
            self._d_bias[first : first + out.shape[1]] += out.sum(0, dtype=self._d_bias.dtype)

    def put(self, into: Maybe, first: int) -> None:
        """The sum of these columns is complete."""
        if self._d_weight is None or into is None:
            return
        place = self._d_weight[first : first + len(into)]
        if place.data_ptr() != into.data_ptr():
            place.copy_(into)

    def finished(self, count: int) -> tuple[Maybe, Maybe, Maybe]:
        d_hidden, places = self._d_hidden, self._live.places
        for x in (d_hidden, self._d_bias):
            if x is not None and self._unit is not None:
                x.mul_(self._unit)
        if d_hidden is not None and places is not None:
            d_hidden = d_hidden.new_zeros(count, d_hidden.shape[1]).index_copy_(0, places, d_hidden)
        return d_hidden, self._d_weight if self._anew else None, self._d_bias


def _column_tiles(kept: list[Tensor], vocab: int, width: int) -> Iterator[tuple[int, int, Maybe]]:
    """(first, last, logits if they were kept) over the vocabulary."""
    first = 0
    for z in kept:
        yield first, first + z.shape[1], z
        first += z.shape[1]
    for begin, end in spans(vocab - first, width):
        yield first + begin, first + end, None
