"""Cases of tiles of logits, what the kernels make of them, and the float64 numbers they are held against."""

from typing import NamedTuple

import torch

from react_fast import _core
from react_fast.kernels import linear_logprob as kernels
from react_fast.kernels.linear_logprob_lanes import INTERPRETED_FEW
from react_fast.ops.backend import DTYPE, address

from . import contract

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNIT = kernels.fold_unit(torch.device("cpu"))
# Rows that share a program's block with others or are cut over programs, and rows that have a program each.
FEW, MANY = INTERPRETED_FEW - 1, INTERPRETED_FEW + 1


class Options(NamedTuple):
    scale: float = 1.0
    temperature: float = 1.0
    softcap: float = 0.0


class Case(NamedTuple):
    """A tile and what its rows need; `options` and the rest as the launchers take them."""

    z: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    temperatures: torch.Tensor | None
    options: Options

    def rows(self, part: slice) -> "Case":
        own = None if self.temperatures is None else self.temperatures[part]
        return self._replace(z=self.z[part], ids=self.ids[part], temperatures=own)


# Plain; a temperature that no float32 holds; capped; everything on (bias and one temperature a row too).
OPTIONS = {
    "plain": Options(),
    "flat": Options(temperature=1.7),
    "capped": Options(softcap=5.0),
    "all": Options(scale=0.7, softcap=30.0),
}


def make_case(rows, columns, dtype=torch.float32, kind="plain", size=3.0, padding=0):
    z = (torch.randn(rows, columns + padding) * size).to(dtype)[:, :columns]
    full = kind == "all"
    bias = torch.randn(columns).to(dtype) if full else None
    temperatures = torch.rand(rows, dtype=torch.float64) + 0.5 if full else None
    return Case(z, bias, torch.randint(columns, (rows,)), temperatures, OPTIONS[kind])


def fresh_state(rows):
    state = torch.zeros(rows, 5, dtype=torch.float64)
    state[:, 0] = state[:, 4] = -INF
    return state


class Folded(NamedTuple):
    state: torch.Tensor
    factor: torch.Tensor
    shift: torch.Tensor
    weights: torch.Tensor
    weighted: torch.Tensor


def fold(case, *, state=None, first=0, moment=True, dtype=None, weights=True):
    """Fold into a copy of the state; the weights go to tensors of their own."""
    state = fresh_state(len(case.z)) if state is None else state.clone()
    wide = torch.float64 if case.z.dtype == torch.float64 else torch.float32
    factor, shift = torch.empty(2, len(case.z), dtype=wide).unbind()
    out, twin = torch.full((2, *case.z.shape), torch.nan, dtype=dtype or case.z.dtype).unbind()
    given = (factor, shift, out, twin) if weights else ()
    z, bias, ids, temperatures, options = case
    kernels.fold_tile(z, bias, ids, temperatures, first, options, state, moment, *given)
    return Folded(state, factor, shift, out, twin)


def core_arguments(case, first):
    z, bias, ids, temperatures, options = case
    return (
        z.data_ptr(), address(bias), ids.data_ptr(), address(temperatures), DTYPE[z.dtype], *z.shape, z.stride(0),
        first, options.scale, options.temperature, options.softcap,
    )  # fmt: skip


def core_fold(case, state, first=0):
    """The same from the C++ kernel, which turns a copy of the tile in place."""
    case = case._replace(z=case.z.clone())
    wide = torch.float64 if case.z.dtype == torch.float64 else torch.float32
    factor, shift = torch.empty(2, len(case.z), dtype=wide).unbind()
    twin, state = torch.empty_like(case.z), state.clone()
    _core.fold_tile(
        *core_arguments(case, first),
        state.data_ptr(),
        True,
        factor.data_ptr(),
        shift.data_ptr(),
        0,
        twin.data_ptr(),
        1,
    )
    return Folded(state, factor, shift, case.z, twin)


class Exact(NamedTuple):
    """In float64: logp, H, d, slope; and how far an evaluation in float32 may be off in logp, H and each d."""

    logp: torch.Tensor
    entropy: torch.Tensor
    d: torch.Tensor
    slope: torch.Tensor
    loss_logp: torch.Tensor
    loss_entropy: torch.Tensor
    loss_d: torch.Tensor


def exact_of(case):
    """With u half an ulp (of float64 for float64 tiles): x is off by 2u of itself (bias, scale), a cap by 8u of
    it, in float64, which has no polynomial near 0, by 4u of the softcap; both in each of d's two terms, and d by
    3u of itself more; exp adds 2u. A block's sum takes at most 64 additions in a row, as do the merges in float64.
    logp averages the relative errors of the exponentials under p; H has one more factor d.
    """
    z, bias, ids, temperatures, options = case
    u = contract.EPS[torch.float64 if z.dtype == torch.float64 else torch.float32] / 2
    t = (options.temperature if temperatures is None else temperatures) * torch.ones(
        len(z), dtype=torch.float64
    )
    x = options.scale * (z.double() + (0 if bias is None else bias.double()))
    cap = options.softcap
    v = cap * torch.tanh(x / cap) if cap else x
    slope = torch.cosh(x / cap) ** -2 if cap else torch.ones_like(x)
    top = v.amax(-1, keepdim=True)
    d = (v - top) / t[:, None]
    p = torch.softmax(d, -1)
    log_sum = torch.logsumexp(d, -1)
    loss_v = u * (10 if cap else 2) * torch.where(v.isinf(), 0.0, v.abs())
    if z.dtype == torch.float64:
        loss_v = loss_v + 4 * u * cap
    loss_d = (loss_v + loss_v.amax(-1, keepdim=True)) / t[:, None] + 3 * u * d.abs()
    loss_d = torch.where(d == -INF, 0.0, loss_d)
    adds = u * 128
    finite_d = torch.where(d == -INF, 0.0, d)
    first = (p * finite_d.abs()).sum(-1)

    def pick(value):
        return value.gather(1, ids[:, None])[:, 0]

    return Exact(
        pick(d) - log_sum,
        log_sum - (p * finite_d).sum(-1),
        d,
        slope,
        pick(loss_d) + (p * loss_d).sum(-1) + adds,
        (p * (loss_d + 4 * u) * (1 + finite_d.abs() + first[:, None])).sum(-1) + adds * (1 + first),
        loss_d,
    )


def results(state, case):
    """(logp, H) from a state, in float64."""
    t = case.options.temperature if case.temperatures is None else case.temperatures
    largest, ties, rest, moment, chosen = state.unbind(1)
    log_sum = torch.log1p((ties - 1.0) + rest)
    return (chosen - largest) / t - log_sum, log_sum - moment / (ties + rest)


def assert_folded(found, case, exact):
    logp, entropy = results(found.state, case)
    assert bool(((logp - exact.logp).abs() <= exact.loss_logp).all())
    assert bool(((entropy - exact.entropy).abs() <= exact.loss_entropy).all())
    wide, out = found.factor.dtype, found.weights.dtype
    # Relative: the exponential's, six operations of the slope with an exponent of up to 2 |x| / cap = 12, and one
    # rounding; absolute: the smallest number of the result's dtype.
    tiny = torch.finfo(out).smallest_normal * contract.EPS[out]
    expected = torch.where(exact.d == -INF, 0.0, exact.d.exp() * exact.slope)
    expected.scatter_(1, case.ids[:, None], 0.0)
    loss = exact.loss_d + 32 * contract.EPS[wide] + contract.EPS[out]
    assert bool(((found.weights.double() - expected).abs() <= loss * expected + tiny).all())
    d = torch.where(exact.d == -INF, 0.0, exact.d)
    bound = loss * (expected * d).abs() + exact.loss_d * expected + tiny * (1 + d.abs())
    assert bool(((found.weighted.double() - expected * d).abs() <= bound).all())
    assert bool((found.factor == 1).all())
    assert bool((found.shift == 0).all())


def stats_of(case, g=None, h=None):
    """[n, 5] as the forward leaves them, in float64, with random upstream gradients."""
    z, bias, ids, temperatures, options = case
    wide = Case(z.double(), None if bias is None else bias.double(), ids, temperatures, options)
    state = fold(wide, weights=False).state
    log_sum = torch.log1p((state[:, 1] - 1.0) + state[:, 2])
    _, entropy = results(state, case)
    g = torch.randn(len(z), dtype=torch.float64) if g is None else g
    h = torch.randn(len(z), dtype=torch.float64) if h is None else h
    return torch.stack([state[:, 0], log_sum, entropy, g, h], 1)


# One column; an odd width in rows with room behind them; three blocks cut over programs, and by one program a row.
SHAPES = [(3, 1, 0), (37, 33, 7), (FEW, 2 * UNIT + 5, 0), (MANY, 2 * UNIT + 5, 3)]
# Options and dtypes meet in the short shapes; the long ones, whose blocks are the same code, have the extremes.
CASES = [
    (dtype, kind, shape)
    for dtype in DTYPES
    for kind in OPTIONS
    for shape in SHAPES
    if shape[1] <= UNIT or kind == "all" or (dtype == torch.float32 and kind == "plain")
]
