"""Every returns op over generated shapes, gaps, cuts, gammas and lambdas: what must change no bit, and what may
change roundings alone (hypothesis)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import react_fast as rf

from . import contract

Batch = dict[str, torch.Tensor]
VALUE_OPS = ("gae", "td_lambda_returns")
OPS = (*VALUE_OPS, "discounted_returns", "vtrace", "retrace")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EDGES = st.sampled_from([0.0, 0.5, 0.99, 1.0])
# What each op reads beside rewards and mask.
READS = {
    "gae": ("values", "last_values", "terminated", "truncated", "bootstrap_values", "lam"),
    "td_lambda_returns": ("values", "last_values", "terminated", "truncated", "bootstrap_values", "lam"),
    "discounted_returns": ("last_values", "terminated", "truncated", "bootstrap_values"),
    "vtrace": ("values", "log_rhos", "last_values", "terminated", "truncated", "bootstrap_values", "lam"),
    "retrace": ("q_values", "next_values", "log_rhos", "terminated", "truncated", "lam"),
}
ROWS = ("last_values", "lam")  # one number a row


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, float]:
    """Rows with gaps, padding on both sides and cuts; NaN at masked steps."""
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    dtype = draw(st.sampled_from(DTYPES))
    density, cuts = draw(st.sampled_from([0.0, 0.1, 0.6, 0.95, 1.0])), draw(st.sampled_from([0.0, 0.05, 0.5]))
    mask = uniform(B, T) < density
    for row in mask:
        start, stop = sorted(draw(st.tuples(st.integers(0, T), st.integers(0, T))))
        row[:start], row[stop:] = False, False
    fields = ("rewards", "values", "log_rhos", "q_values", "next_values", "bootstrap_values")
    batch = {name: normal(B, T).masked_fill(~mask, float("nan")) for name in fields}
    batch["terminated"], batch["truncated"] = uniform(B, T) < cuts / 2, uniform(B, T) < cuts
    lam = uniform(B).double() if draw(st.booleans()) else torch.full((B,), draw(EDGES), dtype=torch.float64)
    batch |= {"mask": mask, "last_values": normal(B), "lam": lam}
    return batch, draw(EDGES)


def _run(op: str, batch: Batch, gamma: float, **more: torch.Tensor) -> tuple[torch.Tensor, ...]:
    given = {name: batch[name] for name in READS[op]}
    if "mask" in batch:
        given["mask"] = batch["mask"]
    found = getattr(rf, op)(batch["rewards"], gamma=gamma, **given, **more)
    return found if isinstance(found, tuple) else (found,)


def _per_step(batch: Batch, change) -> Batch:
    return {name: x if name in ROWS else change(x) for name, x in batch.items()}


def _check(op: str, batch: Batch, gamma: float) -> None:
    mask = batch["mask"]
    whole = _run(op, batch, gamma)
    for x in whole:
        assert bool((x[~mask] == 0).all())
    # Deleted masked steps: what is left, packed, has no mask and no padding.
    cu_seqlens = torch.tensor([0, *mask.sum(1)]).cumsum(0)
    kept = _per_step(batch, lambda x: x[mask])
    del kept["mask"]
    for x, y in zip(whole, _run(op, kept, gamma, cu_seqlens=cu_seqlens), strict=True):
        contract.assert_bitwise(y, x[mask])
    # Padding on the left, on the right.
    for left, right in ((3, 0), (0, 21), (17, 17)):
        pad = (left, right)
        long = _per_step(batch, lambda x, pad=pad: torch.nn.functional.pad(x, pad))
        for x, y in zip(whole, _run(op, long, gamma), strict=True):
            contract.assert_bitwise(y[:, left : left + x.shape[1]], x)
    # Other rows, in another order.
    order = torch.randperm(len(mask))
    for rows in (order, order[:1]):
        for x, y in zip(whole, _run(op, {k: x[rows] for k, x in batch.items()}, gamma), strict=True):
            contract.assert_bitwise(y, x[rows])


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=batches())
def test_what_changes_no_bit(op, drawn):
    with rf.use_backend("cpu"):
        _check(op, *drawn)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=batches())
def test_what_changes_no_bit_in_kernels(op, drawn):
    with rf.use_backend("triton"):
        _check(op, *drawn)


def _wide(batch: Batch) -> Batch:
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=batches())
def test_equals_float64_reference(op, drawn):
    batch, gamma = drawn
    with rf.use_backend("reference"):
        expected = _run(op, _wide(batch), gamma)
    for backend in ("cpu", "triton"):
        with rf.use_backend(backend):
            found = _run(op, batch, gamma)
        for x, y in zip(found, expected, strict=True):
            # At most 70 terms of size 5, weighed by clipped ratios: 70 roundings of a sum below 350.
            assert float((x.double() - y).abs().max()) <= 70 * 350 * contract.EPS[x.dtype]


@pytest.mark.parametrize("gap", [1, 16, 17, 1000])
def test_scaled_rewards_and_a_gap(backend, gap):
    """A power of two scales every result to the bit; masked steps, as many as a vector and more, change none."""
    rewards, values = torch.randn(2, 2, 21)
    plain = rf.gae(rewards, values, gamma=0.9, lam=0.8)
    for found, one in zip(rf.gae(4 * rewards, 4 * values, gamma=0.9, lam=0.8), plain, strict=True):
        contract.assert_bitwise(found, 4 * one)
    hole = torch.full((2, gap if backend == "cpu" else min(gap, 40)), float("nan"))
    wide = [torch.cat([x[:, :9], hole, x[:, 9:]], 1) for x in (rewards, values)]
    for found, one in zip(rf.gae(*wide, gamma=0.9, lam=0.8, mask=~wide[0].isnan()), plain, strict=True):
        contract.assert_bitwise(torch.cat([found[:, :9], found[:, 9 + hole.shape[1] :]], 1), one)


@pytest.mark.parametrize("op", OPS)
def test_split_at_a_truncation(op, backend):
    """What follows a cut is another episode: a row of two is two rows."""
    batch, gamma = _two_episodes(), 0.97
    whole = _run(op, batch, gamma)
    parts = (slice(0, 25), slice(25, None))
    left, right = (_per_step(batch, lambda x, cut=cut: x[:, cut]) for cut in parts)
    left["last_values"] = batch["bootstrap_values"][:, 24]
    left["truncated"] = torch.zeros_like(left["truncated"])
    if op == "retrace":  # a row's end is a cut
        left["truncated"] = batch["truncated"][:, :25] & (torch.arange(25) < 24)
    for part, cut in zip((left, right), parts, strict=True):
        for x, y in zip(whole, _run(op, part, gamma), strict=True):
            # The same float64 terms of size 5 in other blocks.
            torch.testing.assert_close(x[:, cut], y, rtol=1e-12, atol=1e-12)


def _two_episodes() -> Batch:
    fields = ("rewards", "values", "log_rhos", "q_values", "next_values", "bootstrap_values")
    batch = {name: torch.randn(2, 60, dtype=torch.float64) for name in fields}
    batch["truncated"] = torch.arange(60).expand(2, 60) == 24
    batch["terminated"] = torch.zeros(2, 60, dtype=torch.bool)
    batch["mask"] = torch.ones(2, 60, dtype=torch.bool)
    return batch | {"last_values": torch.randn(2, dtype=torch.float64), "lam": torch.tensor([0.9, 1.0])}


@pytest.mark.parametrize("op", VALUE_OPS)
@pytest.mark.parametrize(("gamma", "lam", "bound"), [(1.0, 1.0, 1e-5), (0.99, 0.95, 2e-6), (1.0, 0.95, 2e-6)])
def test_long_rows_keep_their_digits(op, gamma, lam, bound):
    """8 rows of 131,072 steps: the issue's bounds, relative to the largest result."""
    rewards, values = torch.randn(8, 131072), torch.randn(8, 131072)
    found = getattr(rf, op)(rewards, values, gamma=gamma, lam=lam)
    expected = getattr(rf, op)(rewards.double(), values.double(), gamma=gamma, lam=lam)
    for x, y in zip(*((f if isinstance(f, tuple) else (f,)) for f in (found, expected)), strict=True):
        assert float((x - y).abs().max() / y.abs().max()) < bound


def test_long_off_policy_rows_keep_their_digits():
    r, v, log_rhos = torch.randn(8, 131072), torch.randn(8, 131072), torch.randn(8, 131072) / 10
    wide = [x.double() for x in (r, v, log_rhos)]
    for gamma, bound in ((1.0, 1e-5), (0.99, 2e-6)):
        found = (*rf.vtrace(r, v, log_rhos, gamma=gamma), rf.retrace(r, v, v, log_rhos, gamma=gamma))
        exact = (
            *rf.vtrace(*wide, gamma=gamma),
            rf.retrace(wide[0], wide[1], wide[1], wide[2], gamma=gamma),
        )
        for x, y in zip(found, exact, strict=True):
            assert float((x - y).abs().max() / y.abs().max()) < bound


@pytest.mark.parametrize("lam", [0.0, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_where_rewards_and_values_cancel_units_in_the_values_last_place_stay(isa, rows, lam):
    """m and G round in three operations each; sums of delta, as over transposes, round nothing here."""
    value = 0.7
    values, ends = torch.full((rows, 192), value), torch.zeros(rows, 192, dtype=torch.bool)
    ends[:, 63::64] = True
    rewards = torch.where(ends, value, 0.0)
    options = {"gamma": 1.0, "lam": lam, "terminated": ends}
    unit = torch.finfo(torch.float32).eps / 2  # of numbers in [0.5, 1)
    assert float(rf.gae(rewards, values, **options)[0].abs().max()) <= 4 * unit
    out = tuple(torch.empty(192, rows).t() for _ in range(2))
    if rows > 1:  # of one row the transpose is the row
        assert not rf.gae(rewards, values, out=out, **options)[0].any()
