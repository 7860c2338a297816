"""Returns, GAE and the scan: equal the float64 reference, exact gradients, steps and boundaries."""

import itertools

import pytest
import torch

import react_fast as rf
from react_fast import _core, reference

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One step; below, at and above a vector; a ragged multiple.
SHAPES = [(1, 1), (3, 7), (2, 16), (5, 17), (3, 100)]
LONG = (2, 1051)  # above the Triton block of 1024
CASES = ("plain", "mask", "last", "ended", "everything")
GAMMA, LAM = 0.99, 0.95


def _options(case, shape, dtype=torch.float32):
    """Keyword arguments of gae and discounted_returns."""
    rows = shape[0]
    ended = {
        "terminated": torch.rand(shape) > 0.8,
        "truncated": torch.rand(shape) > 0.8,  # often on the same step as terminated, which wins
        "bootstrap_values": torch.randn(shape).to(dtype),
    }
    last = {"last_values": torch.randn(rows).to(dtype)}
    mask = {"mask": torch.rand(shape) > 0.3}
    return {"plain": {}, "mask": mask, "last": last, "ended": ended, "everything": {**ended, **last, **mask}}[
        case
    ]


def _inputs(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def _reference(op, *inputs, **options):
    wide = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in options.items()
    }
    return contract.reference(op, *inputs, **wide)


def _bound(rewards, values, decay, dtype, mask=None, last_values=None, bootstrap_values=None, **_):
    """Rounding of a sum of discounted terms: the term k steps ahead is rounded at most 8 (k + 1) times.

    Two nested discounted sums of the terms' magnitudes give sum_k (k + 1) decay^k |term_k|.
    """
    size = rewards.double().abs() + 2 * values.double().abs()
    size = size + (values.double().abs().max() if values.numel() else 0)
    for x in (last_values, bootstrap_values):
        if x is not None and x.numel():
            size = size + x.double().abs().max()
    once = reference.discounted_returns(size, gamma=decay, mask=mask)
    return reference.discounted_returns(once, gamma=decay, mask=mask) * 4 * contract.EPS[dtype] + 1e-300


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize(
    ("shape", "dtype", "case"),
    [*itertools.product(SHAPES, DTYPES, CASES), *((LONG, torch.float32, case) for case in CASES)],
    ids=str,
)
def test_gae_equals_float64_reference(backend, shape, dtype, case):
    (rewards, values), options = _inputs(shape, dtype), _options(case, shape, dtype)
    actual = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, **options)
    expected = _reference(rf.gae, rewards, values, gamma=GAMMA, lam=LAM, **options)
    bound = _bound(rewards, values, GAMMA * LAM, _wide(dtype), **options)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == _wide(dtype)
        assert bool(((a.double() - e).abs() <= bound).all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_returns_equal_float64_reference(backend, dtype, case):
    shape = (3, 100)
    rewards, options = _inputs(shape, dtype)[0], _options(case, shape, dtype)
    actual = rf.discounted_returns(rewards, gamma=GAMMA, **options)
    expected = _reference(rf.discounted_returns, rewards, gamma=GAMMA, **options)
    assert actual.dtype == _wide(dtype)
    bound = _bound(rewards, torch.zeros(shape), GAMMA, _wide(dtype), **options)
    assert bool(((actual.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan_equals_float64_reference(backend, shape):
    a, b, init = torch.rand(shape), torch.randn(shape), torch.randn(shape[0])
    actual = rf.reverse_linear_scan(a, b, init=init)
    expected = _reference(rf.reverse_linear_scan, a, b, init=init)
    # Coefficients of at most 1 enlarge no error: the sum of magnitudes, rounded twice a step.
    size = contract.reference(rf.reverse_linear_scan, a, b.abs() + init.abs().max())
    bound = 4 * shape[1] * size * contract.EPS[torch.float32]
    assert bool(((actual.double() - expected).abs() <= bound).all())


def test_every_instruction_set_agrees(isa):
    (rewards, values), options = _inputs((9, 131)), _options("everything", (9, 131))
    actual = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, **options)
    expected = _reference(rf.gae, rewards, values, gamma=GAMMA, lam=LAM, **options)
    bound = _bound(rewards, values, GAMMA * LAM, torch.float32, **options)
    for a, e in zip(actual, expected, strict=True):
        assert bool(((a.double() - e).abs() <= bound).all())
    assert _core.isa() == isa


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_gradcheck(backend, lam):
    shape = (2, 5) if backend == "cpu" else (2, 2)
    options = {k: x for k, x in _options("everything", shape).items() if x.dtype == torch.bool}

    def op(rewards, values, last_values, bootstrap_values):
        return rf.gae(
            rewards, values, gamma=0.9, lam=lam, last_values=last_values, bootstrap_values=bootstrap_values,
            **options,
        )  # fmt: skip

    contract.assert_gradcheck(op, *_inputs(shape), torch.randn(2), torch.randn(shape))


def test_returns_and_scan_gradcheck(backend):
    shape = (2, 5) if backend == "cpu" else (2, 2)
    options = {k: x for k, x in _options("everything", shape).items() if x.dtype == torch.bool}

    def op(rewards, last_values, bootstrap_values):
        return rf.discounted_returns(
            rewards, gamma=0.9, last_values=last_values, bootstrap_values=bootstrap_values, **options
        )

    contract.assert_gradcheck(op, torch.randn(shape), torch.randn(2), torch.randn(shape))
    contract.assert_gradcheck(
        lambda a, b, init: rf.reverse_linear_scan(a, b, init=init), torch.rand(shape), torch.randn(shape),
        torch.randn(2),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_equals_reference(backend, dtype):
    shape = (3, 40)
    options = _options("everything", shape, dtype)
    leaves = [x.requires_grad_() for x in (*_inputs(shape, dtype), options["bootstrap_values"])]
    upstream = [torch.randn(shape, dtype=_wide(dtype)) for _ in range(2)]

    def gradients():
        out = rf.gae(*leaves[:2], gamma=GAMMA, lam=LAM, **options)
        return torch.autograd.grad(out, leaves, upstream)

    actual = gradients()
    with rf.use_backend("reference"):
        expected = gradients()
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        # Sums of at most 40 float32 terms of size 1 to 10 in another order, then one rounding to the input's.
        torch.testing.assert_close(a.double(), e.double(), rtol=2 * contract.EPS[dtype], atol=1e-5)


def test_masked_steps_touch_nothing(backend):
    shape = (4, 50)
    options = _options("everything", shape)
    mask = options["mask"]
    mask[2] = False  # a whole row
    clean = [x.requires_grad_() for x in (*_inputs(shape), options["bootstrap_values"])]
    expected = rf.gae(*clean[:2], gamma=GAMMA, lam=LAM, **options)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = [x.detach().masked_fill(~mask, poison).requires_grad_() for x in clean]
        flags = {k: options[k] | ~mask for k in ("terminated", "truncated")}
        given = {**options, **flags, "bootstrap_values": dirty[2]}
        actual = rf.gae(*dirty[:2], gamma=GAMMA, lam=LAM, **given)
        for a, e in zip(actual, expected, strict=True):
            contract.assert_bitwise(a, e)
            assert bool((a[~mask] == 0).all())
        found = torch.autograd.grad(sum(a.sum() for a in actual), dirty)
        wanted = torch.autograd.grad(sum(e.sum() for e in expected), clean, retain_graph=True)
        for f, w in zip(found, wanted, strict=True):
            contract.assert_bitwise(f, w)
            assert bool((f[~mask] == 0).all())


def test_gap_changes_nothing(backend):
    """A tool's reply in the middle of a row: the actions get what they would get without it."""
    for gap in (1, 16, 17, 300):
        (rewards, values), terminated = _inputs((2, 40), torch.float64), torch.rand(2, 40) > 0.9
        whole = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, terminated=terminated)
        here = torch.cat([torch.arange(13), torch.arange(13, 40) + gap])
        wide = [torch.full((2, 40 + gap), float("nan"), dtype=torch.float64) for _ in range(2)]
        mask, ended = torch.zeros(2, 40 + gap, dtype=torch.bool), torch.ones(2, 40 + gap, dtype=torch.bool)
        wide[0][:, here], wide[1][:, here], mask[:, here], ended[:, here] = rewards, values, True, terminated
        gapped = rf.gae(*wide, gamma=GAMMA, lam=LAM, terminated=ended, mask=mask)
        for g, w in zip(gapped, whole, strict=True):
            # The same 40 terms of size at most 10, in another order.
            torch.testing.assert_close(g[:, here], w, rtol=1e-12, atol=1e-12)


def test_padding_changes_no_bit(backend):
    (rewards, values), last = _inputs((3, 45)), torch.randn(3)
    mask = torch.ones(3, 45, dtype=torch.bool)
    short = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, last_values=last)
    for padding in (1, 3, 19, 200):
        long = [torch.nn.functional.pad(x, (0, padding)) for x in (rewards, values, mask)]
        padded = rf.gae(*long[:2], gamma=GAMMA, lam=LAM, mask=long[2], last_values=last)
        for p, s in zip(padded, short, strict=True):
            contract.assert_bitwise(p[:, :45], s)
            assert bool((p[:, 45:] == 0).all())


def test_row_does_not_depend_on_the_batch(backend):
    count = 40 if backend == "cpu" else 8
    (rewards, values), options = _inputs((count, 70)), _options("everything", (count, 70))
    whole = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, **options)
    order = torch.randperm(count)
    for rows in (order, torch.tensor([0]), torch.tensor([count // 2 - 1]), torch.tensor([count - 1])):
        part = {k: x[rows] for k, x in options.items()}
        found = rf.gae(rewards[rows], values[rows], gamma=GAMMA, lam=LAM, **part)
        for f, w in zip(found, whole, strict=True):
            contract.assert_bitwise(f, w[rows])


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_packed_equals_rows(backend, integer):
    lengths = [3, 0, 20, 16, 1, 0, 1100 if backend == "cpu" else 90, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    total = sum(lengths)
    rewards, values = _inputs((total,))
    flat = {k: x[0] for k, x in _options("everything", (1, total)).items()}
    flat["last_values"] = torch.randn(len(lengths))
    lam = torch.rand(len(lengths))
    packed = rf.gae(rewards, values, gamma=GAMMA, lam=lam, cu_seqlens=cu_seqlens, **flat)
    returns = rf.discounted_returns(rewards, gamma=GAMMA, cu_seqlens=cu_seqlens, **flat)
    scan = rf.reverse_linear_scan(values, rewards, init=flat["last_values"], cu_seqlens=cu_seqlens)
    edges = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        row = {k: x[None, start:stop] for k, x in flat.items() if k != "last_values"}
        row["last_values"] = flat["last_values"][i : i + 1]
        one = (rewards[None, start:stop], values[None, start:stop])
        for p, r in zip(packed, rf.gae(*one, gamma=GAMMA, lam=lam[i : i + 1], **row), strict=True):
            contract.assert_bitwise(p[start:stop], r[0])
        alone = rf.discounted_returns(one[0], gamma=GAMMA, **row)
        contract.assert_bitwise(returns[start:stop], alone[0])
        alone = rf.reverse_linear_scan(one[1], one[0], init=row["last_values"])
        contract.assert_bitwise(scan[start:stop], alone[0])


def test_truncation_splits_a_row(backend):
    """What follows a cut is another episode: even V(reset) = 1e6 leaks nothing over it."""
    (rewards, values), bootstrap = _inputs((1, 30), torch.float64), torch.randn(1, 30, dtype=torch.float64)
    values[0, 12] = 1e6
    truncated = torch.arange(30)[None] == 11
    whole = rf.gae(
        rewards, values, gamma=GAMMA, lam=LAM, truncated=truncated, bootstrap_values=bootstrap
    )  # fmt: skip
    left = rf.gae(rewards[:, :12], values[:, :12], gamma=GAMMA, lam=LAM, last_values=bootstrap[:, 11])
    right = rf.gae(rewards[:, 12:], values[:, 12:], gamma=GAMMA, lam=LAM)
    for w, before, after in zip(whole, left, right, strict=True):
        # Float64 terms of size 1 before the cut, of size 1e6 after it.
        torch.testing.assert_close(w[:, :12], before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(w[:, 12:], after, rtol=1e-12, atol=1e-8)


def test_lam_one_and_zero(backend):
    (rewards, values), options = _inputs((3, 33), torch.float64), _options("last", (3, 33), torch.float64)
    returns = rf.discounted_returns(rewards, gamma=GAMMA, **options)
    advantages, targets = rf.gae(rewards, values, gamma=GAMMA, lam=1.0, **options)
    torch.testing.assert_close(advantages, returns - values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(targets, returns, rtol=1e-12, atol=1e-12)
    following = torch.cat([values[:, 1:], options["last_values"][:, None]], 1)
    advantages, _ = rf.gae(rewards, values, gamma=GAMMA, lam=0.0, **options)
    torch.testing.assert_close(advantages, rewards + GAMMA * following - values, rtol=1e-12, atol=1e-12)


def test_constant_value_and_no_reward_give_zero(backend):
    values = torch.full((2, 50), 0.5, dtype=torch.float64)
    advantages, _ = rf.gae(
        torch.zeros_like(values), values, gamma=1.0, lam=0.75, last_values=values[:, 0],
        truncated=torch.arange(50).expand(2, 50) == 20, bootstrap_values=values,
    )  # fmt: skip
    assert bool((advantages == 0).all())  # every operation on these numbers is exact


def test_lam_per_row(backend):
    (rewards, values), lam = _inputs((4, 60)), torch.tensor([0.0, 0.3, 0.95, 1.0], dtype=torch.float64)
    together = rf.gae(rewards.double(), values.double(), gamma=GAMMA, lam=lam)
    for i in range(4):
        alone = rf.gae(
            rewards[i : i + 1].double(), values[i : i + 1].double(), gamma=GAMMA, lam=float(lam[i])
        )
        for t, a in zip(together, alone, strict=True):
            torch.testing.assert_close(t[i], a[0], rtol=1e-12, atol=1e-12)


def test_long_row_keeps_its_digits():
    """gamma = lam = 1 over 131,072 steps: 1e-5 of the result's size."""
    rewards, values = _inputs((1, 131072))
    advantages, _ = rf.gae(rewards, values, gamma=1.0, lam=1.0)
    exact = rewards.double().flip(1).cumsum(1).flip(1) - values
    assert float((advantages - exact).abs().max() / exact.abs().max()) < 1e-5


def test_compiled_block_size(monkeypatch):
    """The block that GPUs use, which the interpreter's tests cut short: two blocks, both directions."""
    from react_fast.kernels import advantage as kernels

    monkeypatch.setattr(kernels, "INTERPRETED_BLOCK", kernels.BLOCK)
    shape = (1, kernels.BLOCK + 9)
    rewards, values = (x.requires_grad_() for x in _inputs(shape, torch.float64))
    mask = torch.rand(shape) > 0.2
    found = {}
    for name in ("cpu", "triton"):
        with rf.use_backend(name):
            out = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask)
            found[name] = (
                *out,
                *torch.autograd.grad(out[0].sum() + out[1].square().sum(), (rewards, values)),
            )
    for a, e in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)  # a thousand float64 roundings of size 10


def test_threads_agree():
    (rewards, values), options = _inputs((300, 515)), _options("everything", (300, 515))
    contract.assert_threads_agree(
        lambda: torch.stack(rf.gae(rewards, values, gamma=GAMMA, lam=LAM, **options))
    )
