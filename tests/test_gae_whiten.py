"""gae(whiten=True) and gae(out=...): `whiten(gae(...))` in fewer passes, and the caller's memory."""

from pathlib import Path

import numpy as np
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


TIMES = {"steps": (7, 5), "one step": (1, 300), "one row": (9, 1), "blocks": (33, 600)}


def _by_time(case, dtype):
    """[T, B] memory, looked at as [B, T]; what stands behind an end is NaN."""
    rewards, values = torch.randn(2, *TIMES[case], dtype=torch.float64).to(dtype)
    ends = torch.rand(TIMES[case]) < 0.2
    last = torch.randn(TIMES[case][1]).to(dtype)
    last[ends[-1]] = float("nan")
    return {"rewards": rewards.t(), "values": values.t(), "terminated": ends.t(), "last_values": last}


@pytest.mark.parametrize("case", TIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [(), ("terminated",), ("terminated", "last_values")], ids=len)
def test_out_that_is_time_major(case, dtype, given):
    batch = {x: y for x, y in _by_time(case, dtype).items() if x in ("rewards", "values", *given)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = tuple(torch.full(TIMES[case], float("nan"), dtype=wide).t() for _ in range(2))
    found = rf.gae(**batch, gamma=0.97, lam=0.9, out=out)
    expected = rf.gae(**batch, gamma=0.97, lam=0.9)
    for x, memory, y in zip(found, out, expected, strict=True):
        assert x.data_ptr() == memory.data_ptr()
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    copied = {name: x.contiguous() for name, x in batch.items()}
    again = tuple(torch.empty(TIMES[case], dtype=wide).t() for _ in range(2))
    rf.gae(**copied, gamma=0.97, lam=0.9, out=again)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_threads_agree_on_time_major_memory():
    batch = {x: y for x, y in _by_time("blocks", torch.float32).items() if x != "last_values"}
    batch = {name: torch.cat([x.t()] * 8).t() for name, x in batch.items()}
    out = tuple(torch.empty_like(batch["rewards"].t()).t() for _ in range(2))
    contract.assert_threads_agree(lambda: rf.gae(**batch, gamma=0.99, lam=0.95, out=out)[0].clone())


def test_numpy_buffers_of_steps_by_environments():
    """Rewards, values and ends [T, N], written out."""
    numbers = np.random.default_rng(0)
    rewards, values = numbers.normal(size=(2, 12, 5)).astype(np.float32)
    ends, last = numbers.random((12, 5)) < 0.2, numbers.normal(size=5).astype(np.float32)
    wanted, behind, carry = np.zeros_like(rewards), last, 0
    for t in reversed(range(12)):
        carry = rewards[t] - values[t] + ~ends[t] * (0.99 * behind + 0.99 * 0.95 * carry)
        wanted[t], behind = carry, values[t]
    advantages, returns = np.empty_like(rewards), np.empty_like(rewards)
    options = {"gamma": 0.99, "lam": 0.95, "terminated": ends.T, "last_values": last}
    fresh = rf.gae(rewards.T, values.T, **options)[0]
    rf.gae(rewards.T, values.T, **options, out=(advantages.T, returns.T))
    for found in (fresh.T, advantages, rf.gae(rewards[::-1].T[:, ::-1], values.T, **options)[0].T):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, wanted + values, rtol=1e-5, atol=1e-5)


def test_the_page_for_cleanrl_has_its_advantages():
    """CleanRL's loop, in whose buffers `dones` holds where episodes begin, beside the page's lines."""
    numbers = np.random.default_rng(0)
    rewards, values = numbers.normal(size=(2, 12, 5)).astype(np.float32)
    dones = (numbers.random((13, 5)) < 0.3).astype(np.float32)
    next_value = numbers.normal(size=(1, 5)).astype(np.float32)
    dones, next_done = dones[:-1], dones[-1]
    wanted, carry = np.zeros_like(rewards), 0
    for t in reversed(range(12)):
        live, behind = (1 - dones[t + 1], values[t + 1]) if t < 11 else (1 - next_done, next_value[0])
        wanted[t] = carry = rewards[t] + 0.99 * behind * live - values[t] + 0.99 * 0.95 * live * carry
    advantages, returns = np.empty_like(rewards), np.empty_like(rewards)
    page = (Path(__file__).parent.parent / "docs" / "numpy.md").read_text(encoding="utf-8")
    exec(page.split("```python\n")[1].split("```")[0], dict(locals()))
    np.testing.assert_allclose(advantages, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, wanted + values, rtol=1e-5, atol=1e-5)


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
        (
            {"out": (torch.empty(3, 2).t(), torch.empty(3, 2).t()), "mask": RESULT.bool()},
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
