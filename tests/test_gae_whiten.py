"""gae(whiten=True) and gae(out=...): `whiten(gae(...))` in fewer passes, and the caller's memory."""

import pytest
import torch

import react_fast as rf

from . import contract

SHAPE = (5, 37)


def _batch(dtype=torch.float32):
    mask = torch.rand(SHAPE) > 0.3
    mask[2] = False
    ends, cuts = torch.rand(SHAPE) < 0.05, torch.rand(SHAPE) < 0.05
    batch = {name: torch.randn(SHAPE).to(dtype) for name in ("rewards", "values", "bootstrap_values")}
    batch = {name: x.masked_fill(~mask, float("nan")) for name, x in batch.items()}
    return batch | {
        "mask": mask, "terminated": ends, "truncated": cuts, "last_values": torch.randn(5).to(dtype),
        "gamma": 0.99, "lam": 0.95,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_is_whiten_of_gae(backend, dtype):
    """The moments come from other float64 sums; the scale moves by 1e-15 of itself: a rounding of the result."""
    batch = _batch(dtype)
    advantages, returns = rf.gae(**batch)
    found, same = rf.gae(**batch, whiten=True)
    contract.assert_bitwise(same, returns)
    expected = rf.whiten(advantages, mask=batch["mask"])
    tolerance = 2 * contract.EPS[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert bool((found[~batch["mask"]] == 0).all())


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_moments_keep_their_digits(backend, offset):
    """An offset of 1e5 standard deviations; the values are what float32 holds, so only the sums can err."""
    rewards, mask = torch.randn(8, 90) + offset, torch.rand(8, 90) > 0.2
    zero = torch.zeros_like(rewards)
    found, _ = rf.gae(rewards, zero, gamma=0.0, lam=0.0, mask=mask, whiten=True)
    x = rewards.double()[mask]
    expected = (x - x.mean()) / (x.var() + 1e-8).sqrt()
    torch.testing.assert_close(found[mask].double(), expected, rtol=1e-6, atol=1e-6)


def test_packed_equals_rows(backend):
    batch = _batch(torch.float64)
    padded, _ = rf.gae(**batch, whiten=True)
    flat = {k: x.flatten() if isinstance(x, torch.Tensor) and x.dim() == 2 else x for k, x in batch.items()}
    packed, _ = rf.gae(**flat, cu_seqlens=torch.arange(6) * SHAPE[1], whiten=True)
    torch.testing.assert_close(packed, padded.flatten(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_no_spread_is_zero_and_nothing_counts_is_zero(backend, constant):
    rewards, zero = torch.full(SHAPE, constant), torch.zeros(SHAPE)
    assert bool((rf.gae(rewards, zero, gamma=0.0, lam=0.0, whiten=True)[0] == 0).all())
    nothing = rf.gae(
        rewards, zero, gamma=1.0, lam=1.0, mask=torch.zeros(SHAPE, dtype=torch.bool), whiten=True
    )[0]
    assert bool((nothing == 0).all())


def test_threads_agree():
    batch = {k: torch.randn(300, 400) for k in ("rewards", "values")} | {"mask": torch.rand(300, 400) > 0.3}
    contract.assert_threads_agree(lambda: rf.gae(**batch, gamma=0.99, lam=0.95, whiten=True)[0])


def test_gradcheck(backend):
    shape = (2, 5) if backend == "cpu" else (2, 3)
    rewards, values, boot = torch.randn(3, *shape, dtype=torch.float64)
    flags = {"mask": torch.rand(shape) > 0.2, "truncated": torch.rand(shape) < 0.2}

    def op(r, v, b):
        return rf.gae(r, v, gamma=0.99, lam=0.95, bootstrap_values=b, whiten=True, **flags)[0]

    contract.assert_gradcheck(op, rewards, values, boot)


def test_out_is_filled_and_returned(backend):
    batch = _batch()
    expected = rf.gae(**batch)
    out = torch.full(SHAPE, float("nan")), torch.full(SHAPE, float("nan"))
    found = rf.gae(**batch, out=out)
    for a, b, c in zip(found, out, expected, strict=True):
        assert a.data_ptr() == b.data_ptr()
        contract.assert_bitwise(a, c)
    whitened = rf.gae(**batch, out=out, whiten=True)
    contract.assert_bitwise(whitened[0], rf.gae(**batch, whiten=True)[0])


def test_compiles_and_opchecks(backend):
    x, mask = torch.randn(2, 5), torch.rand(2, 5) > 0.3
    op = lambda r, v: rf.gae(r, v, gamma=0.9, lam=0.8, mask=mask, whiten=True)[0]  # noqa: E731
    contract.assert_compiles(op, x, x + 1)
    contract.assert_compiles(op, x, (x + 1).requires_grad_())
    flags = (None, None, mask, None, None, 0.9, 0.8)
    contract.assert_opcheck("gae_moments", x, x.clone().requires_grad_(), None, None, *flags)
    contract.assert_opcheck("gae_out", torch.empty(2, 5), torch.empty(2, 5), x, x, None, None, *flags, True)
    contract.assert_opcheck(
        "whiten_in_place", x.clone(), mask, torch.tensor([7.0, 0.1, 3.0]).double(), 1e-8, 1
    )


RESULT = torch.empty(2, 3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"group": object()}, ValueError, "group must be None without whiten=True"),
        ({"out": RESULT}, ValueError, r"out must be a tuple \(advantages, returns\), got Tensor"),
        (
            {"out": (RESULT, RESULT.double())},
            TypeError,
            r"out\[1\] must be float32 like the results, got float64",
        ),
        ({"out": (RESULT, torch.empty(3, 2))}, ValueError, r"out\[1\] must be \[2, 3\] like rewards"),
        (
            {"out": (torch.empty(3, 2).t(), RESULT)},
            ValueError,
            r"out\[0\] must be contiguous, got strides",
        ),
        ({"out": (RESULT, RESULT)}, ValueError, r"out\[0\] must not share memory"),
    ],
)
def test_bad_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        rf.gae(torch.ones(2, 3), torch.ones(2, 3), gamma=1.0, lam=1.0, **options)


def test_out_is_refused_where_it_would_lose_something():
    rewards, values = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="out must be None where a gradient is wanted"):
        rf.gae(rewards, values, gamma=1.0, lam=1.0, out=(torch.empty(2, 3), torch.empty(2, 3)))
    with pytest.raises(ValueError, match="must not share memory with another tensor"):
        rf.gae(rewards, values.detach(), gamma=1.0, lam=1.0, out=(rewards, torch.empty(2, 3)))
