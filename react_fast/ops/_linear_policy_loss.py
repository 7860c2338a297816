"""The plans behind react_fast.ops.linear_policy_loss, whose gradients are computed in the forward.

Losses of single tokens, 3 GEMMs, for a block of rows whose logits fit:
    z = h W^T                       state <- z (all tiles), so logp and H of the block
    g, e = d loss / d logp, d H     from the policy loss of the block's tokens
    z <- d loss / d z, tile by tile      dh += z W      dW += z^T h
The logits of a block are kept where dW of the same columns will be written after they are read.

Losses of whole rows, 4 GEMMs: logp and H of all rows, then g and e, then tile by tile z again and the last line,
in which every row of dW is one sum.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..reference.objectives import Reinforce
from . import _linear_logprob as engine
from . import _tiles as tiles
from . import _vocab_parallel
from ._linear_logprob import Head
from ._objectives import OBJECTIVES, PARAMETERS, WHOLE_ROWS
from ._policy_loss import AGGREGATIONS, Terms, policy_loss_op
from ._second_pass import second_pass
from ._tiles import Maybe, Options, Rows, Tensor, part, spans
from .backend import accumulation_dtype


class Tokens(NamedTuple):
    """What the loss reads of every token, in the caller's shape; `advantages` of every token or every sequence."""

    old_logprobs: Maybe
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Maybe
    importance: Maybe
    cu_seqlens: Maybe
    denominator: Maybe


def _loss(logp: Tensor, entropy: Tensor, tokens: Tokens, terms: Terms, slopes: bool) -> tuple[Tensor, ...]:
    return policy_loss_op(
        logp, tokens.old_logprobs, tokens.advantages, tokens.mask, tokens.ref_logprobs, entropy, tokens.importance,
        tokens.cu_seqlens, tokens.denominator, *terms, slopes, slopes,
    )  # fmt: skip


def _token_weights(like: Tensor, tokens: Tokens, terms: Terms) -> Tensor:
    """The weight that the aggregation gives every token: d loss / d logp of REINFORCE for advantages -1."""
    plain = terms._replace(
        objective=OBJECTIVES[Reinforce].tag, parameters=[0.0] * PARAMETERS, kl_coef=0.0, entropy_coef=0.0
    )
    given = tokens._replace(
        old_logprobs=None, advantages=-torch.ones_like(like), ref_logprobs=None, importance=None
    )
    return _loss(torch.zeros_like(like), torch.zeros_like(like), given, plain, True)[2]


def _every_token(tokens: Tokens, shape: torch.Size) -> Tensor:
    """Advantages of every token, where they were given one a sequence."""
    advantages = tokens.advantages
    if advantages.shape == shape:
        return advantages
    if tokens.cu_seqlens is None:
        return advantages[:, None].expand(shape)
    return advantages.repeat_interleave(tokens.cu_seqlens.diff(), output_size=shape.numel())


class _Slopes:
    """d loss / d logp and d loss / d H of the rows of a block, once their log-probs are known."""

    def __init__(self, rows: Rows, tokens: Tokens, terms: Terms, dtype: torch.dtype) -> None:
        shape = tokens.mask.shape
        like = tokens.advantages.new_empty(shape, dtype=dtype)
        self.weights = rows.take(_token_weights(like, tokens, terms))
        self._advantages = rows.take(_every_token(tokens, shape))
        given = (tokens.old_logprobs, tokens.ref_logprobs, tokens.importance)
        self._given = [None if x is None else rows.take(x) for x in given]
        self._mask = rows.take(tokens.mask)
        self._terms = terms._replace(aggregation=AGGREGATIONS.index("token_sum_norm"), denominator=1.0)

    def usual(self, terms: Terms) -> Tensor:
        """[N], as large as a slope is with ratio 1."""
        size = self._advantages.abs() + (abs(terms.kl_coef) + abs(terms.entropy_coef))
        return self.weights * size

    def __call__(self, begin: int, end: int, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """(g, e) [end - begin] float64."""
        old, ref, importance = (part(x, begin, end) for x in self._given)
        advantages = self._advantages[begin:end]
        tokens = Tokens(old, advantages, self._mask[begin:end], ref, importance, None, None)
        _, _, g, e = _loss(logp.to(advantages.dtype), entropy.to(advantages.dtype), tokens, self._terms, True)
        weights = self.weights[begin:end].double()
        return g.double() * weights, e.double() * weights


class _Plan(NamedTuple):
    """Rows of every block, rows of logits that need memory of their own, and whether those become their gradient
    where they stand: no others lie in memory that a gradient takes, and the dtype is that of the GEMM."""

    blocks: list[int]
    own: int
    in_place: bool


def _plan(rows: Rows, head: Head, options: Options, want_weight: bool) -> _Plan:
    """The same on every rank, for blocks meet in collectives: as the rank with most columns needs it."""
    hidden, count = rows.hidden, len(rows.ids)
    dim, dtype, wide = hidden.shape[1], tiles.tile_dtype(hidden), accumulation_dtype(hidden.dtype)
    in_place = dtype == tiles.turned_dtype(hidden)
    if options.invariant:
        blocks = [end - begin for begin, end in spans(count, tiles.INVARIANT_ROWS)]
        return _Plan(blocks, tiles.INVARIANT_ROWS, in_place)
    vocab = max(head.shards or (len(head.weight),))
    own = max(1, tiles.budget(hidden.device) // (vocab * dtype.itemsize))
    lent = summed = 0
    narrow = want_weight and _weight_dtype(head.weight) != wide
    if want_weight:
        lent = dim * _weight_dtype(head.weight).itemsize // dtype.itemsize
    if narrow:
        summed = dim * wide.itemsize // dtype.itemsize
    if count <= lent + summed + own:
        return _Plan([count], max(0, count - lent), in_place and lent == 0)
    first, next_ones = lent + summed + own, own + (lent if narrow else 0)
    blocks = [first, *(end - begin for begin, end in spans(count - first, next_ones))]
    return _Plan(blocks, own, in_place and lent == 0)


def _weight_dtype(weight: Tensor) -> torch.dtype:
    """Of the weight's gradient: float16's range may not hold it before the loss scale comes."""
    return weight.dtype if weight.dtype == torch.bfloat16 else accumulation_dtype(weight.dtype)


class _Gradients:
    """Gradients of the rows that count so far, block after block: hidden [N, D] and bias [V] in wide sums, weight
    [V, D] too but for bfloat16, which the last block writes."""

    def __init__(
        self, rows: Rows, head: Head, options: Options, wanted: Sequence[bool], blocks: Sequence[int]
    ) -> None:
        want_hidden, want_weight, want_bias = wanted
        hidden, weight = rows.hidden, head.weight
        count, dim = hidden.shape
        padded = -(-count // tiles.INVARIANT_ROWS) * tiles.INVARIANT_ROWS if options.invariant else count
        self._options = options
        self.hidden = tiles.accumulator(padded if want_hidden else 0, dim, hidden)
        self.bias = hidden.new_zeros(len(weight) if want_bias else 0, dtype=self.hidden.dtype)
        self.weight: Maybe = None
        # Of the blocks before the last, where the weight's dtype is too narrow for it.
        self.sum: Maybe = None
        if want_weight:
            self.weight = tiles.fresh(weight, _weight_dtype(weight))
            if self.weight.dtype != self.hidden.dtype and len(blocks) > 1:
                self.sum = tiles.fresh(weight, self.hidden.dtype)
            if count == 0:
                self.weight.zero_()

    def unwritten(self, begin: int) -> list[Tensor]:
        """Memory [V, D] that the block from row `begin` on writes tile by tile, after reading a tile's logits."""
        if self._options.invariant or self.weight is None:
            return []
        if self.sum is None:
            return [self.weight] if begin == 0 else []
        return [self.sum, self.weight] if begin == 0 else [self.weight]

    def add(
        self, begin: int, size: int, first: int, z: Tensor, h: Tensor, w: Tensor, last_block: bool
    ) -> None:
        """A tile of d loss / d logits of the block's `size` rows; behind them rows of zeros."""
        if len(self.hidden):
            with tiles.gemm_threads(self._options.invariant):
                tiles.accumulate(self.hidden[begin : begin + len(z)], z, w)
        z, last = z[:size], first + z.shape[1]
        if self.weight is not None:
            total = (self.weight if self.sum is None else self.sum)[first:last]
            tiles.add_product(total, z.t(), h, anew=begin == 0)
            if self.sum is not None and last_block:
                self.weight[first:last] = total
        if len(self.bias):
            self.bias[first:last] += z.sum(0, dtype=self.bias.dtype)


class _Logits:
    """The logits of a block of rows, a tile of columns at a time: [rows, columns] each, for the first rows in
    memory that gradients of the same columns will take, for the others in some of their own."""

    def __init__(self, rows: Rows, head: Head, options: Options, plan: _Plan) -> None:
        self._rows, self._head, self._options = rows, head, options
        hidden, vocab, most = rows.hidden, len(head.weight), max(plan.blocks, default=0)
        # The next GEMM's product is a temporary where it cannot be added to a sum in place.
        beside = hidden.shape[1] * hidden.element_size() if len(plan.blocks) > 1 else 0
        sizes = tiles.tiling(hidden[:most], vocab, options, beside=beside)
        self._width, self._dtype = sizes.columns, sizes.dtype
        self._own = hidden.new_empty(vocab, plan.own, dtype=sizes.dtype)
        room = 0 if plan.in_place else most * self._width
        self._turned = tiles.Buffer(hidden, room, tiles.turned_dtype(hidden))
        self._in_place = plan.in_place
        self._memory: list[Tensor] = []

    def _parts(self, size: int, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, end, logits) of a tile, counted from the block's start."""
        lower, bytes_each = 0, (last - first) * self._dtype.itemsize
        for memory in self._memory:
            flat = memory[first:last].view(-1).view(torch.uint8)
            upper = min(size, lower + len(flat) // bytes_each)
            if upper > lower:
                z = flat[: (upper - lower) * bytes_each].view(self._dtype)
                yield lower, upper, z.view(upper - lower, last - first)
            lower = upper

    def compute(self, begin: int, end: int, state: Tensor, free: list[Tensor]) -> None:
        """One GEMM; folds the tiles into the rows' state [end - begin, 5]. `free`: [V, D] each, see _Gradients."""
        rows, head, self._memory = self._rows, self._head, [*free, self._own]
        h = rows.hidden[begin:end]
        if self._options.invariant:
            h = engine.padded(h, -len(h) % tiles.INVARIANT_ROWS)
        for first, last in spans(len(head.weight), self._width):
            w, b = head.columns(first, last)
            for lower, upper, z in self._parts(len(h), first, last):
                with tiles.gemm_threads(self._options.invariant):
                    tiles.product(h[lower:upper], w.t(), z)
                some = slice(begin + lower, min(begin + upper, end))
                tiles.fold(
                    z[: some.stop - some.start], b, rows.ids[some] - head.first,
                    part(rows.temperatures, some.start, some.stop), first, self._options,
                    state[lower : some.stop - begin], True,
                )  # fmt: skip

    def turn(self, begin: int, end: int, stats: Tensor, gradients: _Gradients) -> None:
        """The tiles become d loss / d logits, and go into the gradients while they are hot."""
        rows, head, size = self._rows, self._head, end - begin
        padded = tiles.INVARIANT_ROWS if self._options.invariant else size
        for first, last in spans(len(head.weight), self._width):
            w, b = head.columns(first, last)
            out = None if self._in_place else self._turned(padded, last - first)
            for lower, upper, z in self._parts(padded, first, last):
                out = z if out is None else out
                some = slice(begin + lower, min(begin + upper, end))
                tiles.turn(
                    z[: some.stop - some.start], b, rows.ids[some] - head.first,
                    part(rows.temperatures, some.start, some.stop), first, self._options,
                    stats[lower : some.stop - begin], out[lower : some.stop - begin],
                )  # fmt: skip
            assert out is not None
            out[size:] = 0
            gradients.add(begin, size, first, out, rows.hidden[begin:end], w, end == len(rows.ids))


Found = tuple[Tensor, Tensor, Maybe, Maybe, Maybe]


def forward(
    rows: Rows, head: Head, options: Options, tokens: Tokens, terms: Terms, wanted: Sequence[bool]
) -> Found:
    """(loss, metrics as `stats`, gradients of hidden [..., D], weight and bias), wide or the weight's dtype."""
    head = _vocab_parallel.placed(head)
    wrong = rows.check(head.vocab)
    embeds = any(wanted[:1]) and not any(wanted[1:]) and not terms.entropy_coef
    if not any(wanted) or embeds or terms.objective in WHOLE_ROWS:
        return _log_probs_first(rows, head, options, tokens, terms, wanted, wrong)
    return _block_by_block(rows, head, options, tokens, terms, wanted, wrong)


def _block_by_block(
    rows: Rows, head: Head, options: Options, tokens: Tokens, terms: Terms, wanted: Sequence[bool],
    wrong: tuple[Maybe, Maybe],
) -> Found:  # fmt: skip
    """Three GEMMs: a block's logits stay until its log-probs, and so their gradient, are known."""
    wide, t = accumulation_dtype(rows.hidden.dtype), rows.inverse_t
    none = rows.hidden.new_empty(0, dtype=wide)
    state = engine.fresh_state(rows)
    plan = _plan(rows, head, options, wanted[1])
    slopes = _Slopes(rows, tokens, terms, wide)
    gradients = _Gradients(rows, head, options, wanted, plan.blocks)
    logits = _Logits(rows, head, options, plan)
    unit = tiles.float16_unit(rows.hidden.dtype, slopes.usual(terms))
    end = 0
    for size in plan.blocks:
        begin, end = end, end + size
        own_t = t if isinstance(t, float) else t[begin:end]
        own = state[begin:end]
        logits.compute(begin, end, own, gradients.unwritten(begin))
        own.copy_(_vocab_parallel.whole(own, head, own_t))
        sums = engine.finish(own, own_t, none, none)
        g, e = slopes(begin, end, sums.logp, sums.entropy)
        logits.turn(begin, end, engine.turn_stats(sums, g, e, unit), gradients)
    logp, entropy = engine.results(rows, engine.finish(state, t, none, none), True, wide, wrong)
    loss, stats, *_ = _loss(logp, entropy, tokens, terms, False)
    if unit is not None:
        for x in (gradients.hidden, gradients.weight, gradients.bias):
            if x is not None:
                x.mul_(unit)
    hidden = gradients.hidden[: len(rows.ids)] if wanted[0] else None
    found = _whole_hidden(rows, head, options, hidden)
    return loss, stats, found, gradients.weight, gradients.bias if wanted[2] else None


def _log_probs_first(
    rows: Rows, head: Head, options: Options, tokens: Tokens, terms: Terms, wanted: Sequence[bool],
    wrong: tuple[Maybe, Maybe],
) -> Found:  # fmt: skip
    """For losses of whole rows: one GEMM for the log-probs, and three for the logits again and their gradient.

    Two where hidden alone needs a gradient, from its expected embeddings as in `linear_token_logprobs` (three with
    an entropy bonus); batch-invariant gradients of hidden are had so too.
    """
    wide, t, bonus = accumulation_dtype(rows.hidden.dtype), rows.inverse_t, terms.entropy_coef != 0
    embeds = wanted[0] and (options.invariant or not any(wanted[1:]))
    keep = tiles.workspace() if any(wanted[1:]) else 0
    state, U, Q, kept = engine.forward(rows, head, options, True, embeds, embeds and bonus, keep)
    state = _vocab_parallel.whole(state, head, t, U, Q)
    sums = engine.finish(state, t, U, Q)
    logp, entropy = engine.results(rows, sums, True, wide, wrong)
    loss, stats, *slopes = _loss(logp, entropy, tokens, terms, any(wanted))
    if not any(wanted):
        return loss, stats, None, None, None
    g, e = (rows.take(x).double() for x in slopes)
    h = e if bonus else None
    d_hidden = engine.hidden_gradient(sums, g, h, rows, head, options) if embeds else None
    d_weight = d_bias = None
    if any(wanted[1:]):
        again = (wanted[0] and not embeds, *wanted[1:])
        apart = wanted[1] and _weight_dtype(head.weight) != head.weight.dtype
        vocab, dim = head.weight.shape
        total = tiles.accumulator(vocab, dim, rows.hidden) if apart else None
        found, d_weight, d_bias = second_pass(rows, head, options, sums, g, h, again, kept, total)
        d_hidden, d_weight = d_hidden if embeds else found, total if apart else d_weight
    return loss, stats, _whole_hidden(rows, head, options, d_hidden), d_weight, d_bias


def _whole_hidden(rows: Rows, head: Head, options: Options, d_hidden: Maybe) -> Maybe:
    """hidden's gradient over all ranks, in the caller's shape."""
    if d_hidden is None:
        return None
    if head.group is not None:
        d_hidden = _vocab_parallel.total(d_hidden, head.group, options.invariant)
    return rows.back(d_hidden)
