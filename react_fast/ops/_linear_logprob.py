"""Log-probs, entropies and gradients from hidden states, tile by tile, on any device.

forward    z = h W^T (a tile of columns)      state <- z, z <- exp(d) du/dz      U += z W
backward   z = h W^T                          z <- d loss / d z                  dW = z^T h

No tile is left out of the backward. A block-sparse one with a bound a row would pay below 0.4 active tiles at
2^-20; trained small policies have 1.0 in blocks of 128 rows (bench/results/tile_mass.md). They say little of 150k
tokens, where it would have to be measured again before it is built.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from . import _tiles as tiles
from ._tiles import Maybe, Options, Rows, Tensor, part, spans

STATE = 5


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


class Head(NamedTuple):
    """The output matrix: weight [V, D] and bias [V], or this rank's rows of them."""

    weight: Tensor
    bias: Maybe
    group: dist.ProcessGroup | None = None
    shards: tuple[int, ...] = ()  # rows of every rank; as many as here if empty

    @property
    def first(self) -> int:
        """Vocabulary index of the first row."""
        if self.group is None:
            return 0
        rank = dist.get_rank(self.group)
        return sum(self.shards[:rank]) if self.shards else rank * len(self.weight)

    @property
    def vocab(self) -> int:
        """Size of the whole vocabulary."""
        if self.shards:
            return sum(self.shards)
        return len(self.weight) * (1 if self.group is None else dist.get_world_size(self.group))

    def columns(self, begin: int, end: int) -> tuple[Tensor, Maybe]:
        bias = None if self.bias is None else self.bias[begin:end].contiguous()
        return self.weight[begin:end], bias


def fresh_state(rows: Rows) -> Tensor:
    state = torch.zeros(len(rows.ids), STATE, dtype=torch.float64, device=rows.ids.device)
    state[:, 0] = state[:, 4] = float("-inf")
    return state


def forward(
    rows: Rows,
    head: Head,
    options: Options,
    want_entropy: bool,
    want_U: bool,
    want_Q: bool,
    keep: int = 0,
    lent: Maybe = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(state [N, 5] of the fold, U, Q, kept logits) of this rank's columns; one GEMM, one more each for U and Q.

    Args:
        want_entropy: fold its moment too.
        want_U, want_Q: sum the expected embedding, for hidden's gradient; with U also Q, for the entropy's.
        keep: bytes of logits to hand back, tile after tile from the first column on, each [N, columns].
        lent: [V, D] contiguous, memory for them instead where it holds more. Tile by tile they lie no lower than
            the rows of the same columns, which may be written once the tile was read.
    """
    hidden, (count, dim), vocab = rows.hidden, rows.hidden.shape, len(head.weight)
    ids = rows.ids - head.first
    state = fresh_state(rows)
    U = tiles.accumulator(count if want_U else 0, dim, hidden)
    Q = tiles.accumulator(count if want_Q else 0, dim, hidden)
    sizes = tiles.tiling(hidden, vocab, options, outputs=len(Q) > 0)
    if options.invariant:
        padding = -count % tiles.INVARIANT_ROWS
        hidden, U, Q = (padded(x, padding) for x in (hidden, U, Q))
    width = sizes.columns
    kept = _kept(keep, lent, hidden, vocab, sizes)
    tile = tiles.Buffer(hidden, sizes.rows * width, sizes.dtype)
    weighed = tiles.turned_dtype(hidden)
    apart = want_U and (bool(kept) or sizes.dtype != weighed)
    weights = tiles.Buffer(hidden, sizes.rows * width if apart else 0, weighed)
    twin = tiles.Buffer(hidden, sizes.rows * width if len(Q) else 0, weighed)
    for begin, stop in spans(len(hidden), sizes.rows):
        end = min(stop, count)
        factor, shift = torch.empty(2, end - begin, dtype=U.dtype, device=U.device).unbind()
        for i, (first, last) in enumerate(spans(vocab, width)):
            w, b = head.columns(first, last)
            shape = stop - begin, last - first
            z = kept[i][begin:stop] if i < len(kept) else tile(*shape)
            with tiles.gemm_threads(options.invariant):
                tiles.product(hidden[begin:stop], w.t(), z)
            weighing = {}
            if want_U:
                weighing = {"factor": factor, "shift": shift}
                weighing |= {"weights": weights(*shape)[: end - begin]} if apart else {}
                weighing |= {"weighted": twin(*shape)[: end - begin]} if len(Q) else {}
            tiles.fold(
                z[: end - begin], b, ids[begin:end], part(rows.temperatures, begin, end), first, options,
                state[begin:end], want_entropy, **weighing,
            )  # fmt: skip
            if not want_U:
                continue
            tiles.rescale(U[begin:end], Q[begin:end] if len(Q) else None, factor, shift)
            with tiles.gemm_threads(options.invariant):
                e = weights(*shape) if apart else z
                if len(Q):
                    _accumulate_centred(w, (U[begin:stop], e), (Q[begin:stop], twin(*shape)))
                else:
                    tiles.accumulate(U[begin:stop], e, w)
    return state, U[:count], Q[:count], [z[:count] for z in kept]


def _accumulate_centred(w: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """sum <- sum + e w for every (sum, e), through w less the mean of its rows, whose part is added in float32.

    The entropy's gradient is U and Q in a combination in which what all rows of W have in common cancels, and the
    rounding of a half-precision product does not.
    """
    mean = w.mean(0, dtype=pairs[0][0].dtype)
    centred = (w - mean).to(pairs[0][1].dtype)
    for total, e in pairs:
        tiles.accumulate(total, e, centred)
        total.addr_(e.sum(1, dtype=total.dtype), mean)


def _kept(keep: int, lent: Maybe, hidden: Tensor, vocab: int, sizes: tiles.Tiling) -> list[Tensor]:
    """Memory for whole tiles of columns of all rows: in `keep` bytes of their own, or in `lent`."""
    each = len(hidden) * sizes.dtype.itemsize
    room = 0 if lent is None else lent.numel() * lent.element_size()
    most = max(keep, room) // max(each, 1)
    columns = vocab if most >= vocab else most // sizes.columns * sizes.columns
    if lent is None or keep > room:
        return [
            hidden.new_empty(len(hidden), end - begin, dtype=sizes.dtype)
            for begin, end in spans(columns, sizes.columns)
        ]
    flat = lent.view(-1).view(torch.uint8)
    apart = max(each, lent.shape[1] * lent.element_size())  # no lower than the columns' own rows
    return [
        flat[begin * apart :][: (end - begin) * each].view(sizes.dtype).view(len(hidden), end - begin)
        for begin, end in spans(columns, sizes.columns)
    ]


def padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows, x.shape[1])]) if len(x) and rows else x


def joined(parts: list[Tensor], own: Tensor, U: Tensor, Q: Tensor, inverse_t: Tensor | float) -> Tensor:
    """The parts' state as a whole; U and Q, in terms of the largest logit of `own`, in terms of the whole's."""
    whole = parts[0]
    for other in parts[1:]:
        whole = merge(whole, other, inverse_t)
    if len(U):
        gap = (own[:, 0] - whole[:, 0]) * inverse_t
        shift = torch.where(own[:, 0] == float("-inf"), 0.0, gap).clamp_min(tiles.LEAST_GAP)
        factor = shift.exp().to(U.dtype)[:, None]
        if len(Q):
            Q.addcmul_(U, shift.to(U.dtype)[:, None]).mul_(factor)
        U.mul_(factor)
    return whole


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


def results(
    rows: Rows, sums: Sums, want_entropy: bool, dtype: torch.dtype, wrong: tuple[Maybe, Maybe]
) -> tuple[Tensor, Tensor]:
    """(logp, entropy or empty) in the caller's shape; NaN where an id or a temperature is impossible."""
    wild, cold = wrong
    logp, entropy = sums.logp, sums.entropy
    if cold is not None:
        logp, entropy = torch.where(cold, torch.nan, logp), torch.where(cold, torch.nan, entropy)
    if wild is not None:
        logp = torch.where(wild, torch.nan, logp)
    entropy = rows.back(entropy).to(dtype) if want_entropy else entropy.new_empty(0, dtype=dtype)
    return rows.back(logp).to(dtype), entropy


def merge(a: Tensor, b: Tensor, inverse_t: Tensor | float) -> Tensor:
    """State [N, 5] of two vocabulary shards together, as csrc/logprob_lanes.h merges its folds."""
    above = b[:, 0] > a[:, 0]
    top, low = torch.where(above[:, None], b, a), torch.where(above[:, None], a, b)
    delta = torch.where(
        low[:, 0] == top[:, 0], 0.0, ((low[:, 0] - top[:, 0]) * inverse_t).clamp_min(tiles.LEAST_GAP)
    )
    delta = torch.where(low[:, 0] == float("-inf"), 0.0, delta)
    same = low[:, 0] == top[:, 0]
    factor = delta.exp()
    ties = top[:, 1] + torch.where(same, low[:, 1], 0.0)
    below = torch.where(same, 0.0, low[:, 1]) + low[:, 2]
    rest = top[:, 2] + factor * below
    moment = top[:, 3] + factor * (low[:, 3] + delta * below)
    return torch.stack([top[:, 0], ties, rest, moment, torch.maximum(a[:, 4], b[:, 4])], 1)


def live_rows(sums: Sums, g: Tensor, h: Maybe) -> Tensor:
    """[N] bool: rows that have a gradient at all."""
    return (sums.log_sum != float("-inf")) & ((g != 0) if h is None else (g != 0) | (h != 0))


def hidden_gradient(sums: Sums, g: Tensor, h: Maybe, rows: Rows, head: Head, options: Options) -> Tensor:
    """d loss / d hidden [N, D] of this rank's columns from the expected embeddings, without a GEMM.

    dh = scale / T (c_y s_y W_y - (g + h (H - log sum)) U / sum - h Q / sum)
    c_y = -g expm1(logp) - h p_y (logp + H), in which 1 - p_y does not cancel

    Args:
        g, h: [N] float64, upstream of logp and of the entropy (None: zero).
    """
    wide, weight, ids = sums.U.dtype, head.weight, rows.ids - head.first
    unit = options.scale * rows.inverse_t
    live = live_rows(sums, g, h)
    inverse = torch.where(live, unit / torch.where(live, sums.total, 1.0), 0.0)
    slope = 1.0 - (sums.chosen / options.softcap) ** 2 if options.softcap else 1.0
    own = -g * torch.expm1(sums.logp)
    others = g
    if h is not None:
        own = own - h * sums.logp.exp() * torch.where(
            sums.logp == float("-inf"), 0.0, sums.logp + sums.entropy
        )
        others = g + h * (sums.entropy - sums.log_sum)
    near = live & (sums.chosen != float("-inf")) & (ids >= 0) & (ids < len(weight))
    own = torch.where(near, own * slope * unit, 0.0)
    out = sums.U * (-others * inverse).to(wide)[:, None]
    if h is not None and len(sums.Q):
        out.addcmul_(sums.Q, (-h * inverse).to(wide)[:, None])
    chosen = weight.index_select(0, torch.where(near, ids, 0)).to(wide)
    out.addcmul_(chosen, own.to(wide)[:, None])
    return out.masked_fill_(~live[:, None], 0.0)


def turn_stats(sums: Sums, g: Tensor, h: Maybe, unit: Maybe = None) -> Tensor:
    """[N, 5] float64 that `turn` reads, g and h in terms of `unit`."""
    if unit is not None:
        g, h = g / unit, None if h is None else h / unit
    return torch.stack(
        [sums.largest, sums.log_sum, sums.entropy, g, torch.zeros_like(g) if h is None else h], 1
    )
