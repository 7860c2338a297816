"""The Triton kernels that turn tiles of logits into gradients, and that rescale sums: equal to float64 and C++."""

import os
import subprocess
import sys

import pytest
import torch

from react_fast import _core
from react_fast.kernels import linear_logprob as kernels

from . import contract
from .logit_tiles import (
    CASES,
    FEW,
    INF,
    MANY,
    UNIT,
    core_arguments,
    fold,
    make_case,
    stats_of,
)


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
    case = make_case(rows, columns, dtype, kind, padding=padding)
    stats = stats_of(case)
    stats[0, 3:] = torch.tensor([1.5, 0.0])
    found = torch.full_like(case.z, torch.nan)
    kernels.turn_tile(*case[:4], 0, case.options, stats, found)
    _assert_turned(found, case, stats)
    tile = case.z.clone()
    _core.turn_tile(*core_arguments(case._replace(z=tile), 0), stats.data_ptr(), 0, 1)
    _assert_turned(tile, case, stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_turn_into_a_dtype_of_its_own(dtype):
    case = make_case(MANY, 50, kind="all", padding=14)
    before, stats = case.z.clone(), stats_of(case)
    found = torch.empty(MANY, 50, dtype=dtype)
    kernels.turn_tile(*case[:4], 0, case.options, stats, found)
    _assert_turned(found, case, stats)
    contract.assert_bitwise(case.z, before)


def test_turn_row_by_row_and_tile_by_tile():
    """No bit depends on the other rows or on the cut of the vocabulary; the chosen token stands in one tile."""
    case = make_case(MANY, UNIT + 40, kind="all")
    stats, whole = stats_of(case), torch.empty_like(case.z)
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
    case = make_case(MANY, 40)
    stats = stats_of(case)
    stats[1, 3:], stats[2, 1] = 0.0, -INF
    case.z[1], case.z[2] = torch.nan, -INF
    tile = case.z.clone()
    kernels.turn_tile(tile, *case[1:4], 0, case.options, stats)
    assert bool((tile[1:3] == 0).all())
    assert bool(tile.isfinite().all())


def test_turn_of_a_confident_token_does_not_cancel():
    """1 - p of the chosen token to full relative accuracy, down to p = 1 - 1e-12."""
    gaps = torch.tensor([0.0, 5.0, 12.0, 20.0, 28.0])
    case = make_case(MANY, 20)
    case.z.zero_()
    case.z[torch.arange(MANY), case.ids] = gaps
    stats = stats_of(case, g=torch.ones(MANY).double(), h=torch.zeros(MANY).double())
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
    case = make_case(0, 40)
    found = fold(case)
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
