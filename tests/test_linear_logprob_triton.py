"""The Triton kernels over tiles of logits: equal to float64 and to the C++ ones, and the same bits however the
rows and the vocabulary are cut."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
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


def _case(rows, columns, dtype=torch.float32, kind="plain", size=3.0, padding=0):
    z = (torch.randn(rows, columns + padding) * size).to(dtype)[:, :columns]
    full = kind == "all"
    bias = torch.randn(columns).to(dtype) if full else None
    temperatures = torch.rand(rows, dtype=torch.float64) + 0.5 if full else None
    return Case(z, bias, torch.randint(columns, (rows,)), temperatures, OPTIONS[kind])


def _state(rows):
    state = torch.zeros(rows, 5, dtype=torch.float64)
    state[:, 0] = state[:, 4] = -INF
    return state


class Folded(NamedTuple):
    state: torch.Tensor
    factor: torch.Tensor
    shift: torch.Tensor
    weights: torch.Tensor
    weighted: torch.Tensor


def _fold(case, *, state=None, first=0, moment=True, dtype=None, weights=True):
    """Fold into a copy of the state; the weights go to tensors of their own."""
    state = _state(len(case.z)) if state is None else state.clone()
    wide = torch.float64 if case.z.dtype == torch.float64 else torch.float32
    factor, shift = torch.empty(2, len(case.z), dtype=wide).unbind()
    out, twin = torch.full((2, *case.z.shape), torch.nan, dtype=dtype or case.z.dtype).unbind()
    given = (factor, shift, out, twin) if weights else ()
    z, bias, ids, temperatures, options = case
    kernels.fold_tile(z, bias, ids, temperatures, first, options, state, moment, *given)
    return Folded(state, factor, shift, out, twin)


def _core_arguments(case, first):
    z, bias, ids, temperatures, options = case
    return (
        z.data_ptr(), address(bias), ids.data_ptr(), address(temperatures), DTYPE[z.dtype], *z.shape, z.stride(0),
        first, options.scale, options.temperature, options.softcap,
    )  # fmt: skip


def _core_fold(case, state, first=0):
    """The same from the C++ kernel, which turns a copy of the tile in place."""
    case = case._replace(z=case.z.clone())
    wide = torch.float64 if case.z.dtype == torch.float64 else torch.float32
    factor, shift = torch.empty(2, len(case.z), dtype=wide).unbind()
    twin, state = torch.empty_like(case.z), state.clone()
    _core.fold_tile(
        *_core_arguments(case, first),
        state.data_ptr(),
        True,
        factor.data_ptr(),
        shift.data_ptr(),
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


def _exact(case):
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


def _results(state, case):
    """(logp, H) from a state, in float64."""
    t = case.options.temperature if case.temperatures is None else case.temperatures
    largest, ties, rest, moment, chosen = state.unbind(1)
    log_sum = torch.log1p((ties - 1.0) + rest)
    return (chosen - largest) / t - log_sum, log_sum - moment / (ties + rest)


def _assert_folded(found, case, exact):
    logp, entropy = _results(found.state, case)
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


@pytest.mark.parametrize(("dtype", "kind", "shape"), CASES, ids=str)
def test_fold_equals_float64_and_the_core(dtype, kind, shape):
    rows, columns, padding = shape
    case = _case(rows, columns, dtype, kind, padding=padding)
    exact = _exact(case)
    _assert_folded(_fold(case), case, exact)
    _assert_folded(_core_fold(case, _state(rows)), case, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_in_a_dtype_of_their_own(dtype):
    """As between a float32 GEMM result and a bfloat16 GEMM: the tile and what lies behind the columns stay."""
    case = _case(MANY, 50, kind="all", padding=6)
    before = case.z.clone()
    found = _fold(case, dtype=dtype)
    _assert_folded(found, case, _exact(case))
    contract.assert_bitwise(case.z, before)
    room = torch.full((2, MANY, 64), 7.0, dtype=dtype)
    factor, shift = torch.empty(2, MANY).unbind()
    z, bias, ids, temperatures, options = case
    out, twin = (x[:, :50] for x in room)
    kernels.fold_tile(z, bias, ids, temperatures, 0, options, _state(MANY), True, factor, shift, out, twin)
    contract.assert_bitwise(out, found.weights)
    contract.assert_bitwise(twin, found.weighted)
    assert bool((room[:, :, 50:] == 7.0).all())


def test_bias_in_float32_beside_bfloat16_logits():
    case = _case(MANY, 50, torch.bfloat16, kind="all")
    case = case._replace(bias=torch.randn(50))
    _assert_folded(_fold(case), case, _exact(case))


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_in_place_is_the_same(rows):
    case = _case(rows, UNIT + 40, kind="all")
    apart = _fold(case)
    state, (factor, shift), twin = _state(rows), torch.empty(2, rows).unbind(), torch.empty_like(case.z)
    z, bias, ids, temperatures, options = case
    tile = z.clone()
    kernels.fold_tile(tile, bias, ids, temperatures, 0, options, state, True, factor, shift, weighted=twin)
    for one, other in zip((state, factor, shift, tile, twin), apart, strict=True):
        contract.assert_bitwise(one, other)
    stats = _stats(case)
    turned = torch.empty_like(z)
    kernels.turn_tile(z, bias, ids, temperatures, 0, options, stats, turned)
    kernels.turn_tile(z, bias, ids, temperatures, 0, options, stats)
    contract.assert_bitwise(z, turned)


# ---- cuts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, kind):
    """One program a row and a program a block, and rows that share a program: the same bits."""
    for columns, most in ((2 * UNIT + 5, MANY), (100, 40)):
        case = _case(most, columns, dtype, kind)
        whole = _fold(case)
        for part in (slice(0, 1), slice(1, 1 + FEW)):
            found = _fold(case.rows(part))
            for one, other in zip(found, whole, strict=True):
                contract.assert_bitwise(one, other[part])


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_tiles_of_whole_units_change_no_bit(rows):
    case = _case(rows, 2 * UNIT + 700, kind="all")
    whole, state = _fold(case), _state(rows)
    for begin, end in ((0, UNIT), (UNIT, 2 * UNIT), (2 * UNIT, 2 * UNIT + 700)):
        tile = case._replace(z=case.z[:, begin:end].contiguous(), bias=case.bias[begin:end])
        found = _fold(tile, state=state, first=begin)
        state = found.state
    contract.assert_bitwise(state, whole.state)
    contract.assert_bitwise(found.weights, whole.weights[:, 2 * UNIT :])


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_what_else_is_wanted_changes_no_bit(rows):
    """A pass without gradients gives the log-probabilities of the one with them: their ratio is exactly 1."""
    case = _case(rows, UNIT + 40)
    whole = _fold(case)
    bare = _fold(case, moment=False, weights=False)
    contract.assert_bitwise(bare.state[:, [0, 1, 2, 4]], whole.state[:, [0, 1, 2, 4]])
    assert bool((bare.state[:, 3] == 0).all())
    assert bool(bare.weights.isnan().all())


def test_expected_embeddings_over_tiles():
    """U and Q summed over three tiles, rescaled in between, are those of the whole vocabulary; also where the
    largest logit comes first, last, or does not exist in the first tile."""
    columns = 120
    case = _case(MANY, columns, torch.float64, "all")
    case.z[0, 3], case.z[1, 100], case.z[2, :48] = 40.0, 40.0, -INF
    weight = torch.randn(columns, 9, dtype=torch.float64)
    state = _state(MANY)
    U, Q = torch.zeros(2, MANY, 9, dtype=torch.float64).unbind()
    for begin, end in ((0, 48), (48, 96), (96, 120)):
        tile = case._replace(z=case.z[:, begin:end], bias=case.bias[begin:end])
        found = _fold(tile, state=state, first=begin)
        state = found.state
        kernels.rescale(U, Q, found.factor, found.shift)
        U += found.weights @ weight[begin:end]
        Q += found.weighted @ weight[begin:end]
    exact = _exact(case)
    w = torch.where(exact.d == -INF, 0.0, exact.d.exp() * exact.slope).scatter(1, case.ids[:, None], 0.0)
    # Float64 rounding over 120 columns and three rescalings.
    torch.testing.assert_close(U, w @ weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Q, (w * exact.d.clamp_min(-1e3)) @ weight, rtol=1e-12, atol=1e-12)
    logp, entropy = _results(state, case)
    torch.testing.assert_close((logp, entropy), (exact.logp, exact.entropy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_kernels_are_compiled_for_no_number_of_rows(rows, monkeypatch):
    """Nothing that a kernel is compiled for changes between row counts on one path, or between tiles."""
    seen = []
    for module in (kernels, sys.modules[kernels.fold_few.__module__]):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, given, warps: seen.append((kernel, given, warps))
        )

    def compiled_for(count, first):
        seen.clear()
        _fold(_case(count, UNIT + 40), first=first)
        case = _case(count, UNIT + 40)
        kernels.turn_tile(*case[:4], first, case.options, torch.zeros(count, 5, dtype=torch.float64))
        return [
            (kernel.__name__, warps, {k: v for k, v in given.items() if k.isupper()})
            for kernel, given, warps in seen
        ]

    counts = (1, 2, FEW) if rows == FEW else (MANY, 16, 1001)
    found = [compiled_for(count, first) for count in counts for first in (0, UNIT, 2**31)]
    assert all(one == found[0] for one in found)


# ---- extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forbidden_tokens(dtype):
    """-inf from the tile or the bias: no weight, no part in a sum, and neither NaN nor a bound changes."""
    case = _case(MANY, UNIT + 40, dtype, "all")
    case.bias[5:9] = -INF
    case.z[0, :UNIT] = -INF
    case.z[1] = -INF
    case.ids[0], case.ids[1], case.ids[2] = UNIT + 1, 20, 6
    found = _fold(case)
    rows = torch.tensor([0, *range(3, MANY)])
    live = Case(case.z[rows], case.bias, case.ids[rows], case.temperatures[rows], case.options)
    _assert_folded(Folded(*(x[rows] for x in found)), live, _exact(live))
    assert found.state[1].tolist() == [-INF, 0.0, 0.0, 0.0, -INF]
    assert found.state[2, 4] == -INF
    assert bool((found.weights[1] == 0).all())
    assert bool((found.weighted[1] == 0).all())
    assert bool((found.weights[:, 5:9] == 0).all())
    assert bool((found.weighted[:, 5:9] == 0).all())
    stats = torch.randn(MANY, 5, dtype=torch.float64)
    stats[:, :2] = found.state[:, [0, 0]]
    stats[1, 1] = -INF
    turned = torch.full_like(case.z, torch.nan)
    kernels.turn_tile(*case[:4], 0, case.options, stats, turned)
    assert bool((turned[1] == 0).all())
    assert bool((turned[:, 5:9] == 0).all())
    assert bool(turned.isfinite().all())


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_nan_and_infinity_stay_in_their_row(rows):
    case = _case(rows, UNIT + 40)
    clean = _fold(case)
    case.z[0, 7], case.z[1, UNIT + 7] = torch.nan, INF
    found = _fold(case)
    assert bool(found.state[0, 2].isnan())
    assert bool(found.weights[0, 7].isnan())
    assert found.state[0, 0] < INF
    assert found.state[1, 0] == INF
    for one, other in zip(found, clean, strict=True):
        contract.assert_bitwise(one[2:], other[2:])


def test_chosen_token_of_another_tile():
    """Its u stays as it was, and no weight is 0 for it."""
    case = _case(MANY, 40)._replace(ids=torch.tensor([-100, 0, 9, 50, 51]))
    state = _state(MANY)
    state[1, 4] = 2.5
    found = _fold(case, state=state, first=10)
    assert found.state[:, 4].tolist() == [-INF, 2.5, -INF, -INF, -INF]
    assert bool((found.weights > 0).all())
    inside = _fold(case._replace(ids=torch.full((MANY,), 12)), first=10)
    contract.assert_bitwise(inside.state[:, 4], case.z[:, 2].double())
    assert bool((inside.weights[:, 2] == 0).all())


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_equal_logits_are_ties(rows):
    columns = UNIT + 40
    case = _case(rows, columns)
    case.z.fill_(2.25)
    found = _fold(case)
    expected = torch.tensor([2.25, columns, 0.0, 0.0, 2.25], dtype=torch.float64)
    contract.assert_bitwise(found.state, expected.expand(rows, 5))
    assert bool((found.weights.scatter(1, case.ids[:, None], 1.0) == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_huge_logits(dtype):
    case = _case(MANY, UNIT + 40, dtype, size=1e4)
    _assert_folded(_fold(case), case, _exact(case))


def test_confident_row_keeps_relative_accuracy():
    case = _case(FEW, UNIT + 40)
    case.z.zero_()
    case.z[:, 4] = 30.0
    found = _fold(case)
    rest = (UNIT + 39) * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    # Equal exponentials, each within 2 ulp, whose sums over 2047 and 40 of them round 12 times.
    torch.testing.assert_close(
        found.state[:, 2], rest.expand(FEW), rtol=16 * contract.EPS[torch.float32], atol=0
    )


# ---- backward ----------------------------------------------------------------------------------------


def _stats(case, g=None, h=None):
    """[n, 5] as the forward leaves them, in float64, with random upstream gradients."""
    z, bias, ids, temperatures, options = case
    wide = Case(z.double(), None if bias is None else bias.double(), ids, temperatures, options)
    state = _fold(wide, weights=False).state
    log_sum = torch.log1p((state[:, 1] - 1.0) + state[:, 2])
    _, entropy = _results(state, case)
    g = torch.randn(len(z), dtype=torch.float64) if g is None else g
    h = torch.randn(len(z), dtype=torch.float64) if h is None else h
    return torch.stack([state[:, 0], log_sum, entropy, g, h], 1)


def _exact_turn(case, stats):
    """Float64 autograd of g logp + h H with respect to tile + bias."""
    z, bias, ids, temperatures, options = case
    x = (z.double() + (0 if bias is None else bias.double())).requires_grad_()
    v = options.scale * x
    v = options.softcap * torch.tanh(v / options.softcap) if options.softcap else v
    t = options.temperature if temperatures is None else temperatures[:, None]
    logp = torch.log_softmax(v / t, -1)
    chosen = logp.gather(1, ids[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.autograd.grad((stats[:, 3] * chosen + stats[:, 4] * entropy).sum(), x)[0]


def _assert_turned(found, case, stats):
    """Relative: the result's rounding; p_j carries that of d_j, |d| <= 90 where p is not 0, in two terms.
    Absolute: h p (log p + H) is a difference of terms below 16 |h|, over a temperature of at least 0.5."""
    exact = _exact_turn(case, stats)
    inner = contract.EPS[torch.float64 if case.z.dtype == torch.float64 else torch.float32]
    tiny = torch.finfo(found.dtype).smallest_normal * contract.EPS[found.dtype]
    torch.testing.assert_close(
        found.double(), exact, rtol=contract.EPS[found.dtype] + 200 * inner, atol=100 * inner + tiny
    )


@pytest.mark.parametrize(("dtype", "kind", "shape"), CASES, ids=str)
def test_turn_equals_float64_and_the_core(dtype, kind, shape):
    rows, columns, padding = shape
    case = _case(rows, columns, dtype, kind, padding=padding)
    stats = _stats(case)
    stats[0, 3:] = torch.tensor([1.5, 0.0])
    found = torch.full_like(case.z, torch.nan)
    kernels.turn_tile(*case[:4], 0, case.options, stats, found)
    _assert_turned(found, case, stats)
    tile = case.z.clone()
    _core.turn_tile(*_core_arguments(case._replace(z=tile), 0), stats.data_ptr(), 1)
    _assert_turned(tile, case, stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_turn_into_a_dtype_of_its_own(dtype):
    case = _case(MANY, 50, kind="all", padding=14)
    before, stats = case.z.clone(), _stats(case)
    found = torch.empty(MANY, 50, dtype=dtype)
    kernels.turn_tile(*case[:4], 0, case.options, stats, found)
    _assert_turned(found, case, stats)
    contract.assert_bitwise(case.z, before)


def test_turn_row_by_row_and_tile_by_tile():
    """No bit depends on the other rows or on the cut of the vocabulary; the chosen token stands in one tile."""
    case = _case(MANY, UNIT + 40, kind="all")
    stats, whole = _stats(case), torch.empty_like(case.z)
    kernels.turn_tile(*case[:4], 0, case.options, stats, whole)
    for part in (slice(0, 1), slice(1, 1 + FEW)):
        own = case.rows(part)
        found = torch.empty_like(own.z)
        kernels.turn_tile(*own[:4], 0, case.options, stats[part], found)
        contract.assert_bitwise(found, whole[part])
    for begin, end in ((0, 700), (700, UNIT + 40)):
        found = torch.empty(MANY, end - begin)
        kernels.turn_tile(
            case.z[:, begin:end], case.bias[begin:end], case.ids, case.temperatures, begin, case.options, stats,
            found,
        )  # fmt: skip
        contract.assert_bitwise(found, whole[:, begin:end])


def test_turn_leaves_rows_without_upstream_at_zero():
    """Whatever stands in their tiles."""
    case = _case(MANY, 40)
    stats = _stats(case)
    stats[1, 3:], stats[2, 1] = 0.0, -INF
    case.z[1], case.z[2] = torch.nan, -INF
    tile = case.z.clone()
    kernels.turn_tile(tile, *case[1:4], 0, case.options, stats)
    assert bool((tile[1:3] == 0).all())
    assert bool(tile.isfinite().all())


def test_turn_of_a_confident_token_does_not_cancel():
    """1 - p of the chosen token to full relative accuracy, down to p = 1 - 1e-12."""
    gaps = torch.tensor([0.0, 5.0, 12.0, 20.0, 28.0])
    case = _case(MANY, 20)
    case.z.zero_()
    case.z[torch.arange(MANY), case.ids] = gaps
    stats = _stats(case, g=torch.ones(MANY).double(), h=torch.zeros(MANY).double())
    found = torch.empty_like(case.z)
    kernels.turn_tile(*case[:4], 0, case.options, stats, found)
    rest = 19 * torch.exp(-gaps.double())
    # Float64 inside, one rounding.
    torch.testing.assert_close(
        found.gather(1, case.ids[:, None])[:, 0].double(),
        rest / (1 + rest),
        rtol=contract.EPS[torch.float32],
        atol=0,
    )


# ---- rescale, nothing, order -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 70, UNIT + 9])
def test_rescale(dim, dtype):
    U, Q = torch.randn(2, 6, dim, dtype=dtype).unbind()
    factor = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0, 0.25], dtype=dtype)
    shift = torch.tensor([0.0, -0.7, -1e-9, -800.0, 0.0, -1.4], dtype=dtype)
    expected_U, expected_Q = factor[:, None] * U, factor[:, None] * (Q + shift[:, None] * U)
    # Rows that have not moved are not touched: 0 * inf would be NaN.
    U[4] = expected_U[4] = INF
    U, Q = U.contiguous(), Q.contiguous()
    alone = U.clone()
    kernels.rescale(U, Q, factor, shift)
    kernels.rescale(alone, None, factor, shift)
    contract.assert_bitwise(U, expected_U)
    contract.assert_bitwise(alone, expected_U)
    # Q + shift U may be one fused operation.
    bound = contract.EPS[dtype] * (expected_Q.abs() + (factor * shift).abs()[:, None] * expected_U.abs())
    bound[4] = 0
    assert bool(((Q - expected_Q).abs() <= bound).all())


def test_no_rows():
    case = _case(0, 40)
    found = _fold(case)
    kernels.turn_tile(*case[:4], 0, case.options, found.state)
    kernels.rescale(torch.empty(0, 8), None, found.factor, found.shift)
    assert found.weights.shape == (0, 40)


ORDERS = """
import dataclasses, re, sys
from react_fast.kernels import aot, linear_logprob, linear_logprob_few
orders = {}
for v in (*linear_logprob.VARIANTS, *linear_logprob_few.VARIANTS):
    if v.targets != (90,) or v.kernel.__name__ not in ("fold_kernel", "part_kernel"):
        continue
    if v.signature["z"] != "*fp32":
        continue
    for divisible in (v.divisible, tuple(n for n in v.divisible if n != "columns"))[: 1 + v.constants["CAPPED"]]:
        text = aot._compile(dataclasses.replace(v, divisible=divisible), 90).asm["ttgir"]
        names = dict(re.findall(r"(#\\w+) = (#ttg[^\\n]+)", text))
        for name in re.findall(r'"tt.reduce".*?\\n(?:.*\\n)*?.*?: \\(tensor<[^)]*?(#\\w+)>', text):
            orders.setdefault(names[name], []).append(v.name)
print(len(orders), sum(map(len, orders.values())))
"""


def test_compiled_sums_run_in_one_order():
    """A GPU sums a block in the order of its layout: compiled, the layout is one for every variant of the fold, so
    that weights, entropy, few rows or the last tile's width change no bit there either."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ORDERS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    orders, sums = map(int, done.stdout.split())
    assert sums > 50
    assert orders == 1
