"""Ragged lists behind react_fast.ops._support_logprob: which entries a row has, and gathered products over them.

    dots            x_e = W[id_e] . h[row_e]
    weighted_rows   y_s = sum_{e of segment s} c_e W[id_e]

Roofline: D e bytes of W an entry (e = element size) for 2 D flops, both ways: bandwidth-bound at every D. Gathered
rows exist BLOCK bytes at a time, between the gather and the sum.
"""

from bisect import bisect_right
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import _check
from ._tiles import budget
from .attribution import REDUCTIONS, _scores
from .backend import accumulation_dtype

Tensor = torch.Tensor
Maybe = torch.Tensor | None

DOT = REDUCTIONS.index("dot")
# Bytes of a block of gathered rows. CPU: few enough to stay in a core's share of the cache between the gather and
# the sum, yet over a hundred rows at D 1024 in float32, so that the calls of a block are a few percent of it. GPU:
# enough rows to fill it.
BLOCK = {"cpu": 1 << 20, "cuda": 32 << 20}
# Bytes an entry takes at once in the arithmetic between two gathers: eleven numbers of 8 bytes.
ENTRY = 88


class Rows:
    """The rows that count, [n], and where their kept ids are.

    `select` [...] bool: which ones, None for all. `kept`: the length of the list that `offsets` cuts; `name` is
    what an error calls the offsets.
    """

    def __init__(
        self, hidden: Tensor, token_ids: Tensor, select: Maybe, per_row: Maybe, offsets: Tensor, kept: int,
        temperature: float, name: str,
    ) -> None:  # fmt: skip
        self.shape = hidden.shape[:-1]
        self.hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        bounds = _check.rising(name, offsets.cpu(), kept, "kept_ids")
        starts, lengths = bounds[:-1], bounds.diff()
        self.index: Maybe = None
        if select is not None and not bool(select.all()):
            self.index = select.reshape(-1).nonzero()[:, 0]
            starts, lengths = (x[self.index.cpu()] for x in (starts, lengths))
        self.edges = F.pad(lengths.cumsum(0), (1, 0))
        self.starts, self.lengths = starts.to(hidden.device), lengths.to(hidden.device)
        self.ids = self.take(token_ids).long()
        if per_row is None:
            self.temperatures = self.ids.new_full(self.ids.shape, temperature, dtype=torch.float64)
        else:
            self.temperatures = self.take(per_row).double()

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, x: Tensor) -> Tensor:
        """[...] or [..., k] -> [n] or [n, k]."""
        flat = x.reshape(-1, *x.shape[len(self.shape) :])
        return flat if self.index is None else flat[self.index]

    def back(self, x: Tensor) -> Tensor:
        """[n] or [n, k] -> [...] or [..., k], 0 in the other rows."""
        if self.index is not None:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy_(0, self.index, x)
        return x.view((*self.shape, *x.shape[1:]))

    def hidden_of(self, a: int, b: int) -> Tensor:
        return self.hidden[a:b] if self.index is None else self.hidden[self.index[a:b]]

    def numbers(self, a: int, b: int) -> Tensor:
        return torch.arange(a, b, device=self.ids.device)

    def groups(self) -> Iterator[tuple[int, int]]:
        """Rows [a, b) whose kept ids, hidden states, embeddings and gradients fit the budget; one row at least."""
        row = 4 * 8 * self.hidden.shape[1]
        return packs(
            self.edges * ENTRY + torch.arange(len(self) + 1, device="cpu") * row, budget(self.hidden.device)
        )

    def entries(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """(row - a [E], place in the list of kept ids [E], edges [b - a + 1]) of the kept ids of rows [a, b)."""
        edges = (self.edges[a : b + 1] - self.edges[a]).to(self.ids.device)
        size, lengths = int(self.edges[b] - self.edges[a]), self.lengths[a:b]
        row = torch.repeat_interleave(lengths, output_size=size)
        shift = self.starts[a:b] - edges[:-1]
        return row, torch.arange(size, device=row.device) + shift[row], edges


def packs(edges: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Cuts items of sizes edges.diff() into runs [a, b) of at most `most` together; one item at least."""
    at = edges.tolist()
    a, count = 0, len(at) - 1
    while a < count:
        b = max(a + 1, bisect_right(at, at[a] + most) - 1)
        yield a, b
        a = b


def _blocks(edges: Tensor, table: Tensor, copies: int) -> Iterator[tuple[int, int, int, int]]:
    """(a, b, begin, end): segments [a, b) whose entries [begin, end) are gathered together, `copies` rows of the
    table's dtype for each. A segment longer than a block is cut at multiples of one from its own beginning: the
    cuts do not depend on what came before.
    """
    size = BLOCK["cpu" if table.device.type == "cpu" else "cuda"]
    most = max(1, size // (copies * max(1, table.shape[1]) * table.element_size()))
    at = edges.tolist()
    for a, b in packs(edges, most):
        for begin in range(at[a], at[b], most):
            yield a, b, begin, min(begin + most, at[b])


def dots(hidden: Tensor, weight: Tensor, ids: Tensor, row: Tensor, edges: Tensor) -> Tensor:
    """[E] of hidden[row_e] . weight[ids_e] in float32 or better; `row` rises at its segments' edges [n + 1]."""
    out = hidden.new_empty(len(ids), dtype=accumulation_dtype(hidden.dtype))
    for a, b, begin, end in _blocks(edges, weight, 2):
        w = weight.index_select(0, ids[begin:end])
        h = hidden[a].expand_as(w) if b == a + 1 else hidden.index_select(0, row[begin:end])
        out[begin:end] = _scores(w, h, DOT)
    return out


def weighted_rows(table: Tensor, index: Tensor, edges: Tensor, c: Tensor) -> Tensor:
    """[S, D] of sum_{e of segment s} c_e table[index_e] in c's dtype, one term after the other.

    embedding_bag is torch's gathered sum with one fixed order on every device. It adds in the table's dtype, so
    rows of narrower ones are widened a block at a time.
    """
    if len(index) == 0 or table.shape[1] == 0:
        return c.new_zeros(len(edges) - 1, table.shape[1])
    if table.dtype == c.dtype:
        return F.embedding_bag(index, table, edges[:-1], mode="sum", per_sample_weights=c)
    out = c.new_zeros(len(edges) - 1, table.shape[1])
    for a, b, begin, end in _blocks(edges, table, 4):
        rows = table.index_select(0, index[begin:end]).to(c.dtype)
        places = torch.arange(end - begin, device=index.device)
        inner = edges[a:b] - begin if b > a + 1 else edges.new_zeros(1)
        out[a:b] += F.embedding_bag(places, rows, inner, mode="sum", per_sample_weights=c[begin:end])
    return out
