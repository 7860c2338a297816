"""The blocks behind react_fast.ops.linear_policy_loss: three GEMMs, since the loss is known in the forward.

for a block of rows whose logits fit the budget:
    z = h W^T                       state <- z (all tiles), so logp and H of the block
    g, e = d loss / d logp, d H     from the policy loss of the block's tokens
    z <- d loss / d z, tile by tile      dh += z W      dW += z^T h
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..reference.objectives import Reinforce
from . import _linear_logprob as engine
from . import _tiles as tiles
from . import _vocab_parallel
from ._linear_logprob import Head
from ._objectives import OBJECTIVES, PARAMETERS
from ._policy_loss import AGGREGATIONS, METRICS, Terms, policy_loss_op
from ._tiles import Maybe, Options, Rows, Tensor, part, spans
from .backend import accumulation_dtype, register


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


class _Gradients:
    """Gradients of the rows that count so far, block after block: hidden [N, D] and bias [V] in wide sums, weight
    [V, D] too but for bfloat16, which the last block writes."""

    def __init__(self, rows: Rows, head: Head, options: Options, block: int, wanted: Sequence[bool]) -> None:
        want_hidden, want_weight, want_bias = wanted
        hidden, weight = rows.hidden, head.weight
        count, dim = hidden.shape
        padded = -(-count // block) * block if options.invariant else count
        self._options = options
        self.hidden = tiles.accumulator(padded if want_hidden else 0, dim, hidden)
        self.bias = hidden.new_zeros(len(weight) if want_bias else 0, dtype=self.hidden.dtype)
        self.weight: Maybe = None
        # Of the blocks before the last, where the weight's dtype is too narrow for it.
        self._sum: Maybe = None
        if want_weight:
            narrow = weight.dtype == torch.bfloat16
            self.weight = tiles.fresh(weight, weight.dtype if narrow else self.hidden.dtype)
            if narrow and count > block:
                self._sum = tiles.fresh(weight, self.hidden.dtype)
            if count == 0:
                self.weight.zero_()

    def add(
        self, begin: int, size: int, first: int, z: Tensor, h: Tensor, w: Tensor, last_block: bool
    ) -> None:
        """A tile of d loss / d logits of the block's `size` rows; behind them rows of zeros."""
        if len(self.hidden):
            with tiles.gemm_threads(self._options.invariant):
                tiles.accumulate(self.hidden[begin : begin + len(z)], z, w)
        z, last = z[:size], first + z.shape[1]
        if self.weight is not None:
            total = (self.weight if self._sum is None else self._sum)[first:last]
            tiles.add_product(total, z.t(), h, anew=begin == 0)
            if self._sum is not None and last_block:
                self.weight[first:last] = total
        if len(self.bias):
            self.bias[first:last] += z.sum(0, dtype=self.bias.dtype)


class _Logits:
    """The logits of a block of rows, tile by tile one behind the other, each [rows, columns]."""

    def __init__(self, rows: Rows, head: Head, options: Options, block: int) -> None:
        self._rows, self._head, self._options = rows, head, options
        hidden, vocab = rows.hidden, len(head.weight)
        # A tile of the block's gradient is added to as many rows of dW, which with few rows are the larger part.
        dim, own = hidden.shape[1], hidden.element_size()
        wide = accumulation_dtype(hidden.dtype).itemsize
        sizes = tiles.tiling(
            hidden[:block], vocab, options, beside=dim * (wide if own == wide else wide + own)
        )
        self._width, self._same = sizes.columns, sizes.dtype == hidden.dtype
        self._memory = hidden.new_empty(block * vocab, dtype=sizes.dtype)
        self._turned = tiles.Buffer(hidden, 0 if self._same else block * self._width)

    def _tiles(self, size: int) -> Iterator[tuple[int, int, Tensor]]:
        size = tiles.INVARIANT_ROWS if self._options.invariant else size
        for first, last in spans(len(self._head.weight), self._width):
            yield first, last, self._memory[size * first : size * last].view(size, last - first)

    def compute(self, begin: int, end: int, state: Tensor) -> None:
        """One GEMM; folds the tiles into the rows' state [end - begin, 5]."""
        rows, head = self._rows, self._head
        h = rows.hidden[begin:end]
        if self._options.invariant:
            h = engine.padded(h, -len(h) % tiles.INVARIANT_ROWS)
        for first, last, z in self._tiles(end - begin):
            w, b = head.columns(first, last)
            with tiles.gemm_threads(self._options.invariant):
                tiles.product(h, w.t(), z)
            tiles.fold(
                z[: end - begin], b, rows.ids[begin:end] - head.first, part(rows.temperatures, begin, end), first,
                self._options, state, True,
            )  # fmt: skip

    def turn(self, begin: int, end: int, stats: Tensor, gradients: _Gradients) -> None:
        """The tiles become d loss / d logits, and go into the gradients while they are hot."""
        rows, head, size = self._rows, self._head, end - begin
        for first, last, z in self._tiles(size):
            w, b = head.columns(first, last)
            out = z if self._same else self._turned(*z.shape)
            if size < len(out):
                out[size:] = 0
            tiles.turn(
                z[:size], b, rows.ids[begin:end] - head.first, part(rows.temperatures, begin, end), first,
                self._options, stats, out[:size],
            )  # fmt: skip
            gradients.add(begin, size, first, out, rows.hidden[begin:end], w, end == len(rows.ids))


def _block_rows(rows: Rows, head: Head, options: Options) -> int:
    """Rows whose logits of a rank's whole vocabulary fit into the budget, of the largest rank's: blocks meet in
    collectives, so every rank has the same."""
    if options.invariant:
        return tiles.INVARIANT_ROWS
    bytes_a_row = max(head.shards or (len(head.weight),)) * tiles.tile_dtype(rows.hidden).itemsize
    return max(1, min(len(rows.ids), tiles.budget(rows.hidden.device) // bytes_a_row))


def forward(
    rows: Rows, head: Head, options: Options, tokens: Tokens, terms: Terms, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Maybe, Maybe, Maybe]:
    """(loss, metrics as `stats`, gradients of hidden [..., D], weight and bias), wide or the weight's dtype."""
    wide, head = accumulation_dtype(rows.hidden.dtype), _vocab_parallel.placed(head)
    wrong = rows.check(head.vocab)
    none = rows.hidden.new_empty(0, dtype=wide)
    count, t = len(rows.ids), rows.inverse_t
    state, gradients = engine.fresh_state(rows), None
    unit: Maybe = None
    if any(wanted):
        block = _block_rows(rows, head, options)
        slopes = _Slopes(rows, tokens, terms, wide)
        gradients = _Gradients(rows, head, options, block, wanted)
        logits = _Logits(rows, head, options, block)
        unit = tiles.float16_unit(rows.hidden.dtype, slopes.usual(terms))
        for begin, end in spans(count, block):
            own_t = t if isinstance(t, float) else t[begin:end]
            own = state[begin:end]
            logits.compute(begin, end, own)
            own.copy_(_vocab_parallel.whole(own, head, own_t))
            sums = engine.finish(own, own_t, none, none)
            g, e = slopes(begin, end, sums.logp, sums.entropy)
            logits.turn(begin, end, engine.turn_stats(sums, g, e, unit), gradients)
    else:
        state, *_ = engine.forward(rows, head, options, want_entropy=True, want_U=False, want_Q=False)
        state = _vocab_parallel.whole(state, head, t)
    logp, entropy = engine.results(rows, engine.finish(state, t, none, none), True, wide, wrong)
    loss, stats, *_ = _loss(logp, entropy, tokens, terms, False)
    return loss, stats, *_finished(rows, head, options, gradients, wanted, unit)


def _finished(
    rows: Rows, head: Head, options: Options, gradients: _Gradients | None, wanted: Sequence[bool],
    unit: Maybe,
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    if gradients is None:
        return None, None, None
    hidden = gradients.hidden[: len(rows.ids)]
    if wanted[0] and head.group is not None:
        hidden = _vocab_parallel.total(hidden, head.group, options.invariant)
    if unit is not None:
        for x in (hidden, gradients.weight, gradients.bias):
            if x is not None:
                x.mul_(unit)
    return rows.back(hidden) if wanted[0] else None, gradients.weight, gradients.bias if wanted[2] else None


# ---- autograd: the gradients are there, the backward scales them -----------------------------------------------


def _scaled(saved: Maybe, upstream: Tensor, dtype: torch.dtype) -> Maybe:
    """Wide until here: in float16, 1 / n would vanish before the loss scale reaches it. On a CPU, where looking
    costs nothing, a plain loss.backward() copies no gradient."""
    if saved is None or (saved.dtype == dtype and upstream.device.type == "cpu" and float(upstream) == 1):
        return saved
    return (saved * upstream).to(dtype)


class Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, per_row: Maybe, options: Options,
        tokens: Tokens, terms: Terms, group: Any, recording: bool,
    ) -> Any:  # fmt: skip
        rows = Rows(hidden, token_ids, tokens.mask, per_row, options)
        wanted = [recording and need for need in ctx.needs_input_grad[:3]]
        loss, stats, *gradients = forward(rows, Head(weight, bias, group), options, tokens, terms, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Maybe, _: Maybe) -> Any:
        if upstream is None:
            return (None,) * 10
        return *(_scaled(x, upstream, ctx.dtype) for x in ctx.saved_tensors), *[None] * 7


# ---- compiled --------------------------------------------------------------------------------------------------


def _run(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, per_row: Maybe, old_logprobs: Maybe,
    advantages: Tensor, mask: Tensor, ref_logprobs: Maybe, importance: Maybe, cu_seqlens: Maybe,
    denominator_tensor: Maybe, scale: float, temperature: float, softcap: float, invariant: bool,
    denominator: float, objective: int, parameters: list[float], aggregation: int, kl_coef: float,
    kl_estimator: int, kl_gradient: int, entropy_coef: float, want_hidden: bool, want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(scale, temperature, softcap, invariant)
    tokens = Tokens(old_logprobs, advantages, mask, ref_logprobs, importance, cu_seqlens, denominator_tensor)
    terms = Terms(
        denominator, objective, parameters, aggregation, kl_coef, kl_estimator, kl_gradient, entropy_coef
    )
    rows = Rows(hidden, token_ids, mask, per_row, options)
    wanted = (want_hidden, want_weight, want_bias)
    loss, stats, *found = forward(rows, Head(weight, bias), options, tokens, terms, wanted)
    return loss, stats, *(loss.new_empty(0) if x is None else x for x in found)


def _fake(hidden: Tensor, weight: Tensor, bias: Maybe, *rest: Any) -> tuple[Tensor, ...]:
    wide = accumulation_dtype(hidden.dtype)
    own = torch.bfloat16 if hidden.dtype == torch.bfloat16 else wide
    want_hidden, want_weight, want_bias = rest[-3:]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(METRICS), dtype=wide),
        hidden.new_empty(hidden.shape if want_hidden else (0,), dtype=wide),
        hidden.new_empty(weight.shape if want_weight else (0,), dtype=own if want_weight else wide),
        hidden.new_empty(weight.shape[0] if want_bias else 0, dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.dtype = inputs[0].dtype


def _grad(ctx: Any, upstream: Maybe, *_: Any) -> tuple:
    if upstream is None:
        return (None,) * 27
    found = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *((x * upstream).to(ctx.dtype) if need else None for x, need in found), *[None] * 24


compiled = register(
    "linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? per_row, Tensor? old_logprobs, "
    "Tensor advantages, Tensor mask, Tensor? ref_logprobs, Tensor? importance, Tensor? cu_seqlens, "
    "Tensor? denominator_tensor, float scale, float temperature, float softcap, bool invariant, "
    "float denominator, int objective, float[] parameters, int aggregation, float kl_coef, int kl_estimator, "
    "int kl_gradient, float entropy_coef, bool want_hidden, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_run,
    triton=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_grad,
)
