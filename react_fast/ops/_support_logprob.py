"""linear_token_logprobs on the kept set of a truncated sampler: gathered dot products instead of a GEMM.

    x_j = scale (W_j . h + b_j)     u = softcap tanh(x / softcap), or x     K = kept ids of the row and its token y
    logp = u_y / T - log sum_{j in K} exp(u_j / T)                H = -sum_{j in K} p_j log p_j

Roofline: D e bytes of weight read a kept id (e = element size) for 2 D flops, forward and again for each gradient:
bandwidth-bound at every D. Rows of W are gathered a block at a time and reduced while they are in cache. What the
backward keeps is the dot product of every kept id, 4 bytes (8 for float64), beside the caller's list of them.

The softmax runs on the flat list of kept ids in float64. Beside D multiply-adds an id its few dozen operations are
little; no row is padded to the length of another, and since every row has its own sums no bit of it depends on
another. The chosen token stands apart from the others, so that 1 - p_y is their sum and never a difference.
"""

from typing import Any

import torch
import torch.nn.functional as F

from . import _check
from ._ragged import ENTRY, Rows, dots, packs, weighted_rows
from ._tiles import LEAST_GAP, budget
from .attribution import _segment_sum
from .backend import accumulation_dtype, once_differentiable, register
from .logprob import HIGH, LOW

Tensor = torch.Tensor
Maybe = torch.Tensor | None

KEPT, OFFSETS = "support[0] (kept_ids)", "support[1] (offsets)"
# A row's numbers that the backward needs, float64: largest u, log sum exp((u - largest) / T), u_y, logp, H.
STATS = 5


def check_support(support: Any, token_ids: Tensor, tp_group: Any) -> tuple[Tensor, Tensor]:
    """(kept_ids, offsets) of the right types, shapes and device; their values are looked at by the operator."""
    if not isinstance(support, (tuple, list)) or len(support) != 2:
        came = f"{len(support)} items" if isinstance(support, (tuple, list)) else type(support).__name__
        raise TypeError(f"support must be a pair (kept_ids, offsets), got {came}")
    if tp_group is not None:
        raise ValueError("support must be None where the vocabulary is split, got one and a tp_group")
    kept, offsets = support
    _check.integer(KEPT, kept)
    if kept.dim() != 1:
        raise ValueError(f"{KEPT} must be [M], got {list(kept.shape)}")
    _check.integer(OFFSETS, offsets)
    _check.shape(OFFSETS, offsets, (token_ids.numel() + 1,), "the number of token_ids, plus 1")
    _check.device(KEPT, kept, token_ids.device, "token_ids")
    _check.device(OFFSETS, offsets, token_ids.device, "token_ids")
    return kept, offsets


def support_token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe,
    support: tuple[Tensor, Tensor], scale: float, temperature: float, softcap: float, want_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logp [...], H [...] or empty) over each row's kept ids and its token.

    Args:
        hidden: [..., D], weight: [V, D], bias: [V] or None, of one dtype; token_ids, mask: [...].
        per_row: [...], every row's temperature, or None: `temperature`.
        support: from `check_support`.
        softcap: 0 for none.
    Raises: IndexError for a token or kept id outside [0, V) in a row that counts; ValueError for offsets that do
        not rise from 0 to M or a temperature out of range.
    """
    tensors = hidden, weight, bias
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    options = scale, temperature, softcap, want_entropy, wanted
    logp, entropy, *_ = _op(*tensors, token_ids, mask, per_row, *support, *options)
    return logp, entropy


# ---- forward ----------------------------------------------------------------------------------------------------


def _check_values(rows: Rows, vocab: int) -> None:
    _check_ids("token_ids", rows.ids, vocab)
    wrong = ~((rows.temperatures >= LOW) & (rows.temperatures <= HIGH))
    if bool(wrong.any()):
        came = float(rows.temperatures[wrong][0])
        raise ValueError(f"temperature must be in [{LOW:g}, {HIGH:g}], got {came:g}")


def _check_ids(name: str, ids: Tensor, vocab: int) -> None:
    wrong = (ids < 0) | (ids >= vocab)
    if bool(wrong.any()):
        raise IndexError(f"{name} must be in [0, {vocab}) where mask is true, got {int(ids[wrong][0])}")


def _repeated(ids: Tensor, row: Tensor, vocab: int) -> Maybe:
    """True where an id stands in its row a second time; None where none does, which rising ids show unsorted."""
    key = row * vocab + ids
    if bool((key[1:] > key[:-1]).all()):
        return None
    ordered, order = key.sort(stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[order[1:]] = ordered[1:] == ordered[:-1]
    return repeated


def _capped(x: Tensor, bias: Maybe, ids: Tensor, scale: float, softcap: float) -> Tensor:
    """Logits in float64 from dot products; -inf stays -inf."""
    u = x.double()
    u = scale * (u if bias is None else u + bias[ids])
    return torch.where(u == float("-inf"), u, softcap * torch.tanh(u / softcap)) if softcap else u


def _terms(u: Tensor, largest: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(is it the largest, exp(d) of the others, exp(d) d) with d = (u - largest) / T; 0 for a forbidden token."""
    none = u == float("-inf")
    d = torch.where(none, LEAST_GAP, (u - largest) / temperature)
    tie, e = d == 0, torch.where(none, 0.0, d.exp())
    return tie, torch.where(tie, 0.0, e), e * d


def _fold(u: Tensor, chosen: Tensor, row: Tensor, edges: Tensor, temperatures: Tensor) -> Tensor:
    """Stats [n, 5] from the others' logits [E] and the chosen tokens' [n]."""
    largest = torch.full_like(chosen, float("-inf")).scatter_reduce_(0, row, u, "amax")
    largest = torch.maximum(largest, chosen)
    # Ties are counted apart from what is added to 1: log1p keeps the small sums of a confident row.
    others = [_segment_sum(x.double(), edges) for x in _terms(u, largest[row], temperatures[row])]
    own = _terms(chosen, largest, temperatures)
    ties, rest, moment = (a + b for a, b in zip(others, own, strict=True))
    log_sum = torch.log1p((ties - 1.0) + rest)
    empty = largest == float("-inf")
    entropy = torch.where(empty, 0.0, log_sum - moment / (ties + rest))
    gap = torch.where(empty, float("-inf"), (chosen - largest) / temperatures - log_sum)
    return torch.stack([largest, log_sum, chosen, gap.clamp_max(0.0), entropy], 1)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe, kept: Tensor,
    offsets: Tensor, scale: float, temperature: float, softcap: float, want_entropy: bool, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logp, entropy, stats, products = _fake(
        hidden, weight, bias, token_ids, mask, per_row, kept, offsets, scale, temperature, softcap, want_entropy,
        want_grad,
    )  # fmt: skip
    rows = Rows(hidden, token_ids, mask, per_row, offsets, len(kept), temperature, OFFSETS)
    vocab = len(weight)
    _check_values(rows, vocab)
    found = [stats.new_empty(0, STATS)]
    for a, b in rows.groups():
        row, place, edges = rows.entries(a, b)
        ids, y, h = kept[place].long(), rows.ids[a:b], rows.hidden_of(a, b)
        _check_ids(KEPT, ids, vocab)
        x = dots(h, weight, ids, row, edges)
        alone = rows.numbers(0, b - a + 1)
        chosen = _capped(dots(h, weight, y, alone[:-1], alone), bias, y, scale, softcap)
        repeated, out = _repeated(ids, row, vocab), ids == y[row]
        out = out if repeated is None else out | repeated
        u = torch.where(out, float("-inf"), _capped(x, bias, ids, scale, softcap))
        found.append(_fold(u, chosen, row, edges, rows.temperatures[a:b]))
        if want_grad:
            products[place] = torch.where(out, float("-inf"), x)
    whole = torch.cat(found)
    logp.copy_(rows.back(whole[:, 3]))
    if want_entropy:
        entropy.copy_(rows.back(whole[:, 4]))
    stats.copy_(rows.back(whole))
    return logp, entropy, stats, products


def _fake(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe, kept: Tensor,
    offsets: Tensor, scale: float, temperature: float, softcap: float, want_entropy: bool, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape, dtype = hidden.shape[:-1], accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty(shape, dtype=dtype),
        hidden.new_empty(shape if want_entropy else (0,), dtype=dtype),
        hidden.new_empty((*shape, STATS), dtype=torch.float64),
        hidden.new_zeros(kept.shape if want_grad else (0,), dtype=dtype),
    )


# ---- backward ---------------------------------------------------------------------------------------------------


def _coefficients(
    u: Tensor, dead: Tensor, stats: Tensor, g: Tensor, h: Tensor, row: Tensor, temperatures: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d (g logp + h H) / d x of the other kept ids [E] and of the chosen tokens [n], float64.

    others: -p (g + h (log p + H))     chosen: -g expm1(logp) - h p_y (logp + H), where 1 - p_y does not cancel
    """
    largest, log_sum, chosen, logp, entropy = stats.unbind(1)
    log_p = (u - largest[row]) / temperatures[row] - log_sum[row]
    others = -log_p.exp() * (g[row] + h[row] * (log_p + entropy[row]))
    own = -g * torch.expm1(logp) - torch.where(h == 0, 0.0, h * logp.exp() * (logp + entropy))
    if softcap:
        others = others * (1.0 - (u / softcap) ** 2)
        own = own * (1.0 - (chosen / softcap) ** 2)
    forbidden = chosen == float("-inf")
    return torch.where(dead, 0.0, others / temperatures[row]), torch.where(forbidden, 0.0, own / temperatures)


def _backward(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe, kept: Tensor,
    offsets: Tensor, stats: Tensor, products: Tensor, d_logp: Maybe, d_entropy: Maybe, scale: float,
    temperature: float, softcap: float, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = products.dtype
    zero = stats.new_zeros(()).expand(stats.shape[:-1])
    g, h = (zero if x is None else x.double() for x in (d_logp, d_entropy))
    live = ((g != 0) | (h != 0)) & (stats[..., 1] != float("-inf"))
    live = live if mask is None else live & mask
    rows = Rows(hidden, token_ids, live, per_row, offsets, len(kept), temperature, OFFSETS)
    stats, g, h = (rows.take(x) for x in (stats, g, h))
    d_hidden = hidden.new_zeros((len(rows), hidden.shape[-1]) if want_hidden else (0,))
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    for a, b in rows.groups():
        row, place, edges = rows.entries(a, b)
        ids, y, x = kept[place].long(), rows.ids[a:b], products[place]
        u = _capped(x, bias, ids, scale, softcap)
        dead = (x == float("-inf")) | (u == float("-inf"))
        mine = slice(a, b)
        others, own = (
            (scale * c).to(wide)
            for c in _coefficients(
                u, dead, stats[mine], g[mine], h[mine], row, rows.temperatures[mine], softcap
            )
        )
        if want_hidden:
            total = weighted_rows(weight, ids, edges, others)
            d_hidden[mine] = total.addcmul_(weight[y].to(wide), own[:, None])
        if want_weight or want_bias:
            pieces += [(kept[place], row + a, others), (y.to(kept.dtype), rows.numbers(a, b), own)]
    d_weight = weight.new_zeros(weight.shape if want_weight else (0,))
    d_bias = weight.new_zeros(len(weight) if want_bias else 0)
    if pieces:
        ids, row, c = (torch.cat(x) for x in zip(*pieces, strict=True))
        _scatter(rows, ids, row, c, d_weight, d_bias)
    return rows.back(d_hidden) if want_hidden else d_hidden, d_weight, d_bias


def _scatter(rows: Rows, ids: Tensor, row: Tensor, c: Tensor, d_weight: Tensor, d_bias: Tensor) -> None:
    """dW[id] = sum c_e hidden[row_e] and db[id] = sum c_e over the entries e with this id, each rounded once.

    Entries are sorted by id, a range of ids that fits the budget at a time.
    """
    vocab = max(len(d_weight), len(d_bias))
    counts = torch.bincount(ids, minlength=vocab).cpu()
    present = counts.nonzero()[:, 0]
    edges = F.pad(counts[present].cumsum(0), (1, 0))
    hidden = rows.hidden
    size = edges * ENTRY + torch.arange(len(edges), device="cpu") * 2 * 8 * hidden.shape[1]
    for a, b in packs(size, budget(rows.hidden.device)):
        mine = torch.arange(len(ids), device=ids.device)
        if b - a < len(present):
            mine = ((ids >= present[a]) & (ids <= present[b - 1])).nonzero()[:, 0]
        mine = mine[torch.argsort(ids[mine], stable=True)]
        source, weights = row[mine], c[mine]
        source = source if rows.index is None else rows.index[source]
        inner, which = (x.to(ids.device) for x in (edges[a : b + 1] - edges[a], present[a:b]))
        if len(d_weight):
            d_weight.index_copy_(0, which, weighted_rows(hidden, source, inner, weights).to(d_weight.dtype))
        if len(d_bias):
            d_bias.index_copy_(0, which, _segment_sum(weights, inner).to(d_bias.dtype))


def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Maybe, token_ids: Tensor, mask: Maybe, per_row: Maybe, kept: Tensor,
    offsets: Tensor, stats: Tensor, products: Tensor, d_logp: Maybe, d_entropy: Maybe, scale: float,
    temperature: float, softcap: float, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, scale, temperature, softcap, ctx.want_entropy, _ = inputs
    ctx.options = scale, temperature, softcap
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


@once_differentiable
def _grad(ctx: Any, d_logp: Maybe, d_entropy: Maybe, *_: Any) -> tuple:
    d_entropy = d_entropy if ctx.want_entropy else None
    if d_logp is None and d_entropy is None:
        return (None,) * 13
    wanted = ctx.needs_input_grad[:3]
    found = _op_backward(*ctx.saved_tensors, d_logp, d_entropy, *ctx.options, *wanted)
    return *(x if want else None for x, want in zip(found, wanted, strict=True)), *[None] * 10


_INPUT = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor? per_row, Tensor kept, "
    "Tensor offsets"
)
_OPTIONS = "float scale, float temperature, float softcap"

_op = register(
    "support_token_logprobs",
    f"({_INPUT}, {_OPTIONS}, bool want_entropy, bool want_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward,
    triton=_forward,
    fake=_fake,
    setup_context=_setup,
    backward=_grad,
)
_op_backward = register(
    "support_token_logprobs_backward",
    f"({_INPUT}, Tensor stats, Tensor products, Tensor? d_logp, Tensor? d_entropy, {_OPTIONS}, bool want_hidden, "
    "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    cpu=_backward,
    triton=_backward,
    fake=_backward_fake,
)
