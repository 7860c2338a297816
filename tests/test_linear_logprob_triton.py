"""The Triton kernels that fold tiles of logits: equal to float64 and to the C++ ones, and the same bits however
the rows and the vocabulary are cut."""

import sys

import pytest
import torch

from react_fast.kernels import linear_logprob as kernels

from . import contract
from .logit_tiles import (
    CASES,
    FEW,
    INF,
    MANY,
    UNIT,
    Case,
    Folded,
    assert_folded,
    core_fold,
    exact_of,
    fold,
    fresh_state,
    make_case,
    results,
    stats_of,
)


@pytest.mark.parametrize(("dtype", "kind", "shape"), CASES, ids=str)
def test_fold_equals_float64_and_the_core(dtype, kind, shape):
    rows, columns, padding = shape
    case = make_case(rows, columns, dtype, kind, padding=padding)
    exact = exact_of(case)
    assert_folded(fold(case), case, exact)
    assert_folded(core_fold(case, fresh_state(rows)), case, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_in_a_dtype_of_their_own(dtype):
    """As between a float32 GEMM result and a bfloat16 GEMM: the tile and what lies behind the columns stay."""
    case = make_case(MANY, 50, kind="all", padding=6)
    before = case.z.clone()
    found = fold(case, dtype=dtype)
    assert_folded(found, case, exact_of(case))
    contract.assert_bitwise(case.z, before)
    room = torch.full((2, MANY, 64), 7.0, dtype=dtype)
    factor, shift = torch.empty(2, MANY).unbind()
    z, bias, ids, temperatures, options = case
    out, twin = (x[:, :50] for x in room)
    kernels.fold_tile(
        z, bias, ids, temperatures, 0, options, fresh_state(MANY), True, factor, shift, out, twin
    )
    contract.assert_bitwise(out, found.weights)
    contract.assert_bitwise(twin, found.weighted)
    assert bool((room[:, :, 50:] == 7.0).all())


def test_bias_in_float32_beside_bfloat16_logits():
    case = make_case(MANY, 50, torch.bfloat16, kind="all")
    case = case._replace(bias=torch.randn(50))
    assert_folded(fold(case), case, exact_of(case))


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_in_place_is_the_same(rows):
    case = make_case(rows, UNIT + 40, kind="all")
    apart = fold(case)
    state, (factor, shift), twin = fresh_state(rows), torch.empty(2, rows).unbind(), torch.empty_like(case.z)
    z, bias, ids, temperatures, options = case
    tile = z.clone()
    kernels.fold_tile(tile, bias, ids, temperatures, 0, options, state, True, factor, shift, weighted=twin)
    for one, other in zip((state, factor, shift, tile, twin), apart, strict=True):
        contract.assert_bitwise(one, other)
    stats = stats_of(case)
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
        case = make_case(most, columns, dtype, kind)
        whole = fold(case)
        for part in (slice(0, 1), slice(1, 1 + FEW)):
            found = fold(case.rows(part))
            for one, other in zip(found, whole, strict=True):
                contract.assert_bitwise(one, other[part])


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_tiles_of_whole_units_change_no_bit(rows):
    case = make_case(rows, 2 * UNIT + 700, kind="all")
    whole, state = fold(case), fresh_state(rows)
    for begin, end in ((0, UNIT), (UNIT, 2 * UNIT), (2 * UNIT, 2 * UNIT + 700)):
        tile = case._replace(z=case.z[:, begin:end].contiguous(), bias=case.bias[begin:end])
        found = fold(tile, state=state, first=begin)
        state = found.state
    contract.assert_bitwise(state, whole.state)
    contract.assert_bitwise(found.weights, whole.weights[:, 2 * UNIT :])


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_what_else_is_wanted_changes_no_bit(rows):
    """A pass without gradients gives the log-probabilities of the one with them: their ratio is exactly 1."""
    case = make_case(rows, UNIT + 40)
    whole = fold(case)
    bare = fold(case, moment=False, weights=False)
    contract.assert_bitwise(bare.state[:, [0, 1, 2, 4]], whole.state[:, [0, 1, 2, 4]])
    assert bool((bare.state[:, 3] == 0).all())
    assert bool(bare.weights.isnan().all())


def test_expected_embeddings_over_tiles():
    """U and Q summed over three tiles, rescaled in between, are those of the whole vocabulary; also where the
    largest logit comes first, last, or does not exist in the first tile."""
    columns = 120
    case = make_case(MANY, columns, torch.float64, "all")
    case.z[0, 3], case.z[1, 100], case.z[2, :48] = 40.0, 40.0, -INF
    weight = torch.randn(columns, 9, dtype=torch.float64)
    state = fresh_state(MANY)
    U, Q = torch.zeros(2, MANY, 9, dtype=torch.float64).unbind()
    for begin, end in ((0, 48), (48, 96), (96, 120)):
        tile = case._replace(z=case.z[:, begin:end], bias=case.bias[begin:end])
        found = fold(tile, state=state, first=begin)
        state = found.state
        kernels.rescale(U, Q, found.factor, found.shift)
        U += found.weights @ weight[begin:end]
        Q += found.weighted @ weight[begin:end]
    exact = exact_of(case)
    w = torch.where(exact.d == -INF, 0.0, exact.d.exp() * exact.slope).scatter(1, case.ids[:, None], 0.0)
    # Float64 rounding over 120 columns and three rescalings.
    torch.testing.assert_close(U, w @ weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Q, (w * exact.d.clamp_min(-1e3)) @ weight, rtol=1e-12, atol=1e-12)
    logp, entropy = results(state, case)
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
        fold(make_case(count, UNIT + 40), first=first)
        case = make_case(count, UNIT + 40)
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
    case = make_case(MANY, UNIT + 40, dtype, "all")
    case.bias[5:9] = -INF
    case.z[0, :UNIT] = -INF
    case.z[1] = -INF
    case.ids[0], case.ids[1], case.ids[2] = UNIT + 1, 20, 6
    found = fold(case)
    rows = torch.tensor([0, *range(3, MANY)])
    live = Case(case.z[rows], case.bias, case.ids[rows], case.temperatures[rows], case.options)
    assert_folded(Folded(*(x[rows] for x in found)), live, exact_of(live))
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
    case = make_case(rows, UNIT + 40)
    clean = fold(case)
    case.z[0, 7], case.z[1, UNIT + 7] = torch.nan, INF
    found = fold(case)
    assert bool(found.state[0, 2].isnan())
    assert bool(found.weights[0, 7].isnan())
    assert found.state[0, 0] < INF
    assert found.state[1, 0] == INF
    for one, other in zip(found, clean, strict=True):
        contract.assert_bitwise(one[2:], other[2:])


def test_chosen_token_of_another_tile():
    """Its u stays as it was, and no weight is 0 for it."""
    case = make_case(MANY, 40)._replace(ids=torch.tensor([-100, 0, 9, 50, 51]))
    state = fresh_state(MANY)
    state[1, 4] = 2.5
    found = fold(case, state=state, first=10)
    assert found.state[:, 4].tolist() == [-INF, 2.5, -INF, -INF, -INF]
    assert bool((found.weights > 0).all())
    inside = fold(case._replace(ids=torch.full((MANY,), 12)), first=10)
    contract.assert_bitwise(inside.state[:, 4], case.z[:, 2].double())
    assert bool((inside.weights[:, 2] == 0).all())


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_equal_logits_are_ties(rows):
    columns = UNIT + 40
    case = make_case(rows, columns)
    case.z.fill_(2.25)
    found = fold(case)
    expected = torch.tensor([2.25, columns, 0.0, 0.0, 2.25], dtype=torch.float64)
    contract.assert_bitwise(found.state, expected.expand(rows, 5))
    assert bool((found.weights.scatter(1, case.ids[:, None], 1.0) == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_huge_logits(dtype):
    case = make_case(MANY, UNIT + 40, dtype, size=1e4)
    assert_folded(fold(case), case, exact_of(case))


def test_confident_row_keeps_relative_accuracy():
    case = make_case(FEW, UNIT + 40)
    case.z.zero_()
    case.z[:, 4] = 30.0
    found = fold(case)
    rest = (UNIT + 39) * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    # Equal exponentials, each within 2 ulp, whose sums over 2047 and 40 of them round 12 times.
    torch.testing.assert_close(
        found.state[:, 2], rest.expand(FEW), rtol=16 * contract.EPS[torch.float32], atol=0
    )
