"""Returns, GAE and the scan: layouts, edges, torch and numpy, and bad input."""

import numpy as np
import pytest
import torch

import react_fast as rf
from react_fast.ops import backend as backends

from . import contract

GAMMA, LAM = 0.99, 0.95


def _inputs(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def _gae(rewards, values, **options):
    return rf.gae(rewards, values, gamma=GAMMA, lam=LAM, **options)


def test_any_strides(backend):
    rewards, values = _inputs((6, 10, 40))
    mask = torch.rand(6, 10, 40) > 0.3
    for view in (lambda x: x[:, 0].T, lambda x: x[:, 0, ::2], lambda x: x[::2, 0, 3:], lambda x: x[1]):
        given = [view(x) for x in (rewards, values, mask)]
        dense = [x.contiguous() for x in given]
        for s, d in zip(_gae(*given[:2], mask=given[2]), _gae(*dense[:2], mask=dense[2]), strict=True):
            contract.assert_bitwise(s, d)
    row = torch.randn(1, 40)
    contract.assert_bitwise(
        rf.discounted_returns(row.expand(6, 40), gamma=GAMMA),
        rf.discounted_returns(row.repeat(6, 1), gamma=GAMMA),
    )
    a = torch.rand(40, 6).T
    contract.assert_bitwise(
        rf.reverse_linear_scan(a, row.expand(6, 40)),
        rf.reverse_linear_scan(a.contiguous(), row.repeat(6, 1)),
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 1), (1, 1)], ids=str)
def test_empty_and_single(backend, shape):
    rewards, values = (x.requires_grad_() for x in _inputs(shape))
    advantages, returns = _gae(rewards, values)
    assert advantages.shape == returns.shape == shape
    torch.testing.assert_close(returns, rewards, rtol=1e-6, atol=1e-6)  # (r - V) + V of one step
    (advantages.sum() + returns.sum()).backward()
    assert rewards.grad.shape == values.grad.shape == shape
    assert rf.discounted_returns(rewards, gamma=GAMMA).shape == shape
    assert rf.reverse_linear_scan(rewards, values).shape == shape


def test_empty_packs(backend):
    nothing = torch.empty(0)
    for edges in ([0], [0, 0], [0, 0, 0, 0]):
        cu_seqlens = torch.tensor(edges)
        assert _gae(nothing, nothing, cu_seqlens=cu_seqlens)[0].shape == (0,)
        assert rf.discounted_returns(nothing, gamma=GAMMA, cu_seqlens=cu_seqlens).shape == (0,)


def test_nothing_counts(backend):
    nan = torch.full((3, 20), float("nan"), requires_grad=True)
    out = _gae(nan, nan, mask=torch.zeros(3, 20, dtype=torch.bool))
    for x in out:
        assert bool((x == 0).all())
    (slope,) = torch.autograd.grad(out[0].sum() + out[1].sum(), nan)
    assert bool((slope == 0).all())


def test_nan_stays_in_its_row_and_before_it(backend):
    rewards, values = _inputs((3, 40))
    clean = rf.discounted_returns(rewards, gamma=GAMMA)
    rewards[1, 25] = float("nan")
    dirty = rf.discounted_returns(rewards, gamma=GAMMA)
    assert bool(dirty[1, :26].isnan().all())
    contract.assert_bitwise(dirty[[0, 2]], clean[[0, 2]])
    for advantages in _gae(rewards, values):
        assert advantages.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8], ids=str)
def test_integer_masks(backend, dtype):
    rewards, values = _inputs((3, 40))
    flags = [torch.rand(3, 40) > 0.5 for _ in range(3)]
    given = dict(zip(("mask", "terminated", "truncated"), flags, strict=True))
    expected = _gae(rewards, values, bootstrap_values=rewards, **given)
    whole = {k: x.to(dtype) for k, x in given.items()}
    for a, e in zip(_gae(rewards, values, bootstrap_values=rewards, **whole), expected, strict=True):
        contract.assert_bitwise(a, e)


def test_numpy_in_numpy_out():
    rewards, values = (x.numpy() for x in _inputs((3, 10)))
    mask = np.random.default_rng(0).random((3, 10)) > 0.3
    found = _gae(rewards, values, mask=mask)
    expected = _gae(torch.from_numpy(rewards), torch.from_numpy(values), mask=torch.from_numpy(mask))
    for f, e in zip(found, expected, strict=True):
        assert isinstance(f, np.ndarray)
        np.testing.assert_array_equal(f, e.numpy())
    assert isinstance(rf.discounted_returns(rewards, gamma=GAMMA), np.ndarray)
    assert isinstance(rf.reverse_linear_scan(values, rewards), np.ndarray)


def test_compiles(backend):
    rewards, values = (x.requires_grad_() for x in _inputs((4, 9)))
    mask = torch.rand(4, 9) > 0.3
    contract.assert_compiles(lambda r, v: torch.stack(_gae(r, v, mask=mask)), rewards, values)
    contract.assert_compiles(lambda r: rf.discounted_returns(r, gamma=GAMMA, mask=mask), rewards)
    contract.assert_compiles(lambda a, b: rf.reverse_linear_scan(a, b), rewards, values)


def test_inference_mode_autocast_and_meta(backend):
    rewards, values = _inputs((3, 8))
    expected = _gae(rewards, values)
    with torch.inference_mode():
        inference = _gae(rewards, values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = _gae(rewards, values)
    for found in (inference, autocast):
        for f, e in zip(found, expected, strict=True):
            contract.assert_bitwise(f, e)
    for meta in _gae(rewards.to("meta").bfloat16(), values.to("meta").bfloat16()):
        assert (meta.shape, meta.dtype, meta.device.type) == ((3, 8), torch.float32, "meta")


FULL = torch.ones(2, 3)
FLAT, EDGES = torch.ones(5), torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"gamma": "1"}, TypeError, "gamma must be a number, got str"),
        ({"gamma": float("nan")}, ValueError, "gamma must be in"),
        ({"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"),
        ({"lam": torch.ones(3)}, ValueError, "lam must be"),
        ({"lam": torch.ones(2).int()}, TypeError, "lam must be"),
        ({"rewards": [[1.0]]}, TypeError, "rewards must be"),
        ({"rewards": FULL.int()}, TypeError, "rewards must be float32, bfloat16"),
        ({"rewards": torch.ones(3)}, ValueError, "rewards must be"),
        ({"rewards": torch.ones(2, 3, 4)}, ValueError, "rewards must be"),
        ({"values": torch.ones(2, 4)}, ValueError, r"values must be \[2, 3\] like rewards, got \[2, 4\]"),
        ({"values": FULL.double()}, TypeError, "values must be float32 like rewards, got float64"),
        ({"values": FULL.to("meta")}, ValueError, "values must be on cpu like rewards, got meta"),
        ({"last_values": torch.ones(3)}, ValueError, "last_values must be"),
        ({"last_values": torch.ones(2).double()}, TypeError, "last_values must be"),
        ({"mask": FULL}, TypeError, "mask must be bool or an integer 0/1 mask, got float32"),
        ({"mask": torch.ones(2, 2).bool()}, ValueError, r"mask must be \[2, 3\] like rewards"),
        ({"mask": FULL.bool().to("meta")}, ValueError, "mask must be on cpu like rewards"),
        ({"terminated": FULL}, TypeError, "terminated must be bool"),
        ({"truncated": FULL.bool()}, ValueError, "bootstrap_values"),
        ({"truncated": FULL, "bootstrap_values": FULL}, TypeError, "truncated must be bool"),
        ({"truncated": FULL.bool(), "bootstrap_values": torch.ones(2)}, ValueError, "bootstrap_values must"),
        ({"cu_seqlens": EDGES}, ValueError, "rewards must be"),
    ],
)
def test_bad_input_is_refused(options, error, text):
    given = {"rewards": FULL, "values": FULL, "gamma": GAMMA, "lam": LAM, **options}
    with pytest.raises(error, match=text):
        rf.gae(given.pop("rewards"), given.pop("values"), **given)


@pytest.mark.parametrize(
    ("cu_seqlens", "error"),
    [
        (torch.tensor([0, 2, 4]), ValueError),  # does not end at N
        (torch.tensor([1, 2, 5]), ValueError),  # does not start at 0
        (torch.tensor([0, 4, 2, 5]), ValueError),  # runs backwards
        (torch.tensor([0, 9, 5]), ValueError),  # leaves the pack
        (torch.tensor([], dtype=torch.int64), ValueError),
        (torch.tensor([[0, 5]]), ValueError),
        (torch.tensor([0.0, 5.0]), TypeError),
        (EDGES.to("meta"), ValueError),
        ([0, 5], TypeError),
    ],
)
def test_bad_cu_seqlens_is_refused(cu_seqlens, error):
    for op in (
        lambda: _gae(FLAT, FLAT, cu_seqlens=cu_seqlens),
        lambda: rf.discounted_returns(FLAT, gamma=GAMMA, cu_seqlens=cu_seqlens),
        lambda: rf.reverse_linear_scan(FLAT, FLAT, cu_seqlens=cu_seqlens),
    ):
        with pytest.raises(error, match="cu_seqlens must"):
            op()


def test_compiled_graph_refuses_bad_cu_seqlens():
    """Tracing looks at no value; the run must, before it reads memory."""
    compiled = torch.compile(
        lambda x, edges: rf.discounted_returns(x, gamma=GAMMA, cu_seqlens=edges), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    compiled(FLAT, EDGES)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5"):
        compiled(FLAT, torch.tensor([0, 2**40, 5]))


def test_bad_scan_is_refused():
    with pytest.raises(ValueError, match=r"(a|b) must be"):
        rf.reverse_linear_scan(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="init must be"):
        rf.reverse_linear_scan(FULL, FULL, init=torch.ones(3))


def test_opcheck(backend):
    """Schema, fake kernels, autograd registration and AOT dispatch, padded and packed, forward and backward."""
    x = torch.randn(2, 5, requires_grad=True)
    flags = [torch.rand(2, 5) > 0.7, torch.rand(2, 5) > 0.7, torch.rand(2, 5) > 0.3]
    contract.assert_opcheck("gae", x, x, torch.randn(2), torch.randn(2, 5), *flags, None, None, 0.9, 0.8)
    flat, bounds = torch.randn(10, requires_grad=True), torch.tensor([0, 3, 10])
    contract.assert_opcheck(
        "gae", flat, None, None, None, None, None, None, bounds, torch.rand(2).double(), 0.9, 1.0
    )
    contract.assert_opcheck("reverse_linear_scan", x, torch.randn(2, 5), torch.randn(2), None)


def test_every_op_is_registered():
    """Whatever the public functions dispatch to is a torch operator, so that compile and autograd see it."""
    assert {"gae", "reverse_linear_scan"} <= set(backends.registered_ops())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chosen", ["cpu", "reference", "triton"])
def test_the_scan_in_the_caller_s_memory(chosen, dtype):
    a, b = torch.rand(3, 37).to(dtype), torch.randn(3, 37).to(dtype)
    with rf.use_backend(chosen):
        wanted = rf.reverse_linear_scan(a, b)
        out = torch.empty_like(wanted)
        assert rf.reverse_linear_scan(a, b, out=out) is out
        assert torch.equal(out, wanted)
        if dtype == wanted.dtype:
            assert rf.reverse_linear_scan(a, b, out=b) is b
            assert torch.equal(b, wanted)


def test_the_scan_refuses_memory_that_is_not_free():
    a, b = torch.rand(2, 6), torch.rand(2, 6)
    both = torch.rand(24)
    for out, error in (
        (a, "must be b or share no memory"),
        (both[6:18].view(2, 6), "must be b or share no memory"),
        (torch.empty(6, 2).t(), "must be contiguous"),
        (torch.empty(2, 5), r"out must be \[2, 6\] like a"),
        (torch.empty(2, 6, requires_grad=True), "where a gradient is wanted"),
    ):
        with pytest.raises(ValueError, match=error):
            rf.reverse_linear_scan(
                a, both[:12].view(2, 6) if out.data_ptr() == both[6:].data_ptr() else b, out=out
            )
    with pytest.raises(TypeError, match="out must be float32 like the result"):
        rf.reverse_linear_scan(a, b, out=torch.empty(2, 6, dtype=torch.float64))
