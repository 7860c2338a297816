"""n-step returns, Q targets, path consistency: equal the float64 reference and the textbooks' sums; boundaries."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import react_fast as rf
from react_fast import _core

from . import contract
from . import q_cases as cases
from .q_cases import DTYPES, GAMMA


# One step; below, at and above a vector; several blocks of windows; above the Triton block.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "n"), [((1, 1), 1), ((3, 7), 1), ((3, 7), 3), ((2, 40), 5), ((2, 70), 1000)]
)
def test_equals_float64_reference(backend, shape, n, dtype, masked):
    batch = cases.batch(shape, dtype, mask=masked)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases.assert_close(cases.every(batch, n), cases.expected(batch, n), wide, n, shape[1])


def test_every_instruction_set_agrees(isa):
    for cuts, masked, n in itertools.product((False, True), (False, True), (1, 6)):
        batch = cases.batch((5, 131), cuts=cuts, mask=masked)
        if not cuts:
            del batch["bootstrap_values"]
        cases.assert_close(cases.every(batch, n), cases.expected(batch, n), torch.float32, n, 131)
    assert _core.isa() == isa


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_gap_and_cut(data):
    shape = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 40)))
    n, gamma = data.draw(st.integers(1, 50)), data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    flags = st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    batch = cases.batch(shape, torch.float64, cuts=False, mask=False)
    for name in ("terminated", "truncated", "mask"):
        if data.draw(st.booleans()):
            batch[name] = torch.tensor(data.draw(flags), dtype=torch.bool).view(shape)
    for name in ("last_values",) if "truncated" in batch else ("last_values", "bootstrap_values"):
        if data.draw(st.booleans()):
            del batch[name]
    found = cases.returns(batch, n, gamma)
    with rf.use_backend("reference"):
        expected = cases.returns(batch, n, gamma)
    torch.testing.assert_close(
        found, expected, rtol=1e-12, atol=1e-12
    )  # fifty float64 terms of size below 10


def test_is_the_textbooks_sum(backend):
    """Sutton & Barto, eq. 7.1, without a cut: rewards of n steps and V behind them, or the row's end."""
    T, n = 11, 4
    r, v = torch.randn(1, T, dtype=torch.float64), torch.randn(1, T, dtype=torch.float64)
    last = torch.randn(1, dtype=torch.float64)
    following = torch.cat([v[0, 1:], last])
    expected = [
        sum(GAMMA ** (i - t) * r[0, i] for i in range(t, min(t + n, T)))
        + GAMMA ** (min(t + n, T) - t) * following[min(t + n, T) - 1]
        for t in range(T)
    ]
    returns = rf.n_step_returns(r, v, gamma=GAMMA, n=n, last_values=last)
    targets = rf.q_targets(r, following[None], gamma=GAMMA, n=n)
    for found in (returns, targets):
        torch.testing.assert_close(found[0], torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_limits(backend):
    """One step is TD(0), a whole row discounted returns, and the lambda-return mixes all n, whatever the cuts."""
    batch = cases.batch((3, 17), torch.float64)
    steps = cases.without(batch, "logprobs", "ref_logprobs")
    close = {"rtol": 1e-12, "atol": 1e-12}  # some twenty float64 terms of size below 10
    td0 = rf.td_lambda_returns(**steps, gamma=GAMMA, lam=0.0)
    torch.testing.assert_close(cases.returns(batch, 1), td0, **close)
    whole = rf.discounted_returns(**cases.without(steps, "values"), gamma=GAMMA)
    for n in (17, 18, 10**30):
        torch.testing.assert_close(cases.returns(batch, n), whole, **close)
    lam = 0.8
    mixed = lam**17 * whole
    for n in range(1, 18):
        mixed = mixed + (1 - lam) * lam ** (n - 1) * cases.returns(batch, n)
    torch.testing.assert_close(rf.td_lambda_returns(**steps, gamma=GAMMA, lam=lam), mixed, **close)


def test_q_targets_and_retrace(backend):
    """Retrace without a trace is the one-step target; on policy, with V' = Q, it mixes all n-step targets."""
    batch = cases.batch((3, 17), torch.float64)
    flags = {k: batch[k] for k in ("terminated", "truncated", "mask")}
    r, following = batch["rewards"], batch["values"]
    q, log_rhos = torch.randn_like(r), torch.randn_like(r)
    one = rf.q_targets(r, following, gamma=GAMMA, **flags)
    none = rf.retrace(r, q, following, log_rhos, gamma=GAMMA, lam=0.0, **flags)
    torch.testing.assert_close(none, one, rtol=1e-12, atol=1e-12)
    # The Q behind a step is that of the next counting one; behind a cut and the end it is the bootstrap.
    counting, lam = flags["mask"], 0.7
    q = torch.zeros_like(r)
    for i, row in enumerate(counting):
        at = row.nonzero().flatten()
        q[i, at[1:]] = following[i, at[:-1]]
    mixed = lam**17 * rf.q_targets(r, following, gamma=GAMMA, n=17, **flags)
    for n in range(1, 18):
        mixed = mixed + (1 - lam) * lam ** (n - 1) * rf.q_targets(r, following, gamma=GAMMA, n=n, **flags)
    found = rf.retrace(r, q, following, torch.zeros_like(r), gamma=GAMMA, lam=lam, **flags)
    torch.testing.assert_close(found, mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("span", [1, 3, None])
def test_soft_optimal_paths_are_consistent(backend, span):
    """arXiv:1702.08892, theorem 1: V = alpha log sum exp(Q / alpha) leaves no residual on any path."""
    states, actions, alpha = 6, 4, 0.5
    reward = torch.randn(states, actions, dtype=torch.float64)
    to = torch.randint(states, (states, actions))
    v = torch.zeros(states, dtype=torch.float64)
    for _ in range(800):  # 0.97^800 < 1e-10
        q = reward + GAMMA * v[to]
        v = alpha * torch.logsumexp(q / alpha, 1)
    logp = (q - v[:, None]) / alpha
    path = [torch.randint(states, (3,))]
    taken = torch.randint(actions, (3, 12))
    for t in range(12):
        path.append(to[path[-1], taken[:, t]])
    at = torch.stack(path, 1)
    here = (at[:, :-1], taken)
    options = {"gamma": GAMMA, "alpha": alpha, "span": span, "last_values": v[at[:, -1]]}
    residual = rf.path_consistency(v[at[:, :-1]], reward[here], logp[here], **options)
    assert float(residual.abs().max()) < 1e-8  # what 800 contractions leave of values below 100
    step = reward[here] - alpha * logp[here] + GAMMA * v[at[:, 1:]] - v[at[:, :-1]]
    assert float(step.abs().max()) < 1e-8
    # A prior moves the price: a log-probability and its reference count as their difference.
    prior = torch.randn_like(logp)
    moved = rf.path_consistency(
        v[at[:, :-1]], reward[here], (logp + prior)[here], ref_logprobs=prior[here], **options
    )
    torch.testing.assert_close(moved, residual, rtol=0, atol=1e-12)


# ---- boundaries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_masked_steps_touch_nothing(backend, n):
    batch = cases.batch((4, 50))
    mask = batch["mask"]
    mask[2] = False  # a whole row
    expected = cases.every(batch, n)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = {
            k: x.masked_fill(~mask, poison) if x.is_floating_point() and x.dim() == 2 else x
            for k, x in batch.items()
        }
        dirty |= {k: batch[k] | ~mask for k in ("terminated", "truncated")}
        for a, e in zip(cases.every(dirty, n), expected, strict=True):
            contract.assert_bitwise(a, e)
            assert bool((a[~mask] == 0).all())


def _row(batch, i, keep):
    return {k: x[i : i + 1] if x.dim() == 1 else x[i : i + 1, keep] for k, x in batch.items()}


@pytest.mark.parametrize("n", [1, 2, 5, 12, 100])
def test_deleting_masked_steps_changes_nothing(backend, n):
    """Bitwise: gaps, padding on either side, the other rows and the row's length are no part of a row's result."""
    batch = cases.batch((5, 33))
    batch["mask"][0, :9] = False  # left padding
    batch["mask"][1, 9:] = False  # right padding
    batch["mask"][2] = torch.arange(33) == 20
    together = cases.every(batch, n)
    for i in range(5):
        keep = batch["mask"][i]
        for t, a in zip(together, cases.every(cases.without(_row(batch, i, keep), "mask"), n), strict=True):
            contract.assert_bitwise(t[i, keep], a[0])


@pytest.mark.parametrize("n", [1, 3, 100])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_packed_equals_rows(backend, integer, n):
    lengths = [3, 0, 20, 1, 0, 40, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    batch = {k: x[0] for k, x in cases.batch((1, sum(lengths))).items()}
    batch["last_values"] = last = torch.randn(len(lengths))
    packed = cases.every(batch, n, cu_seqlens=cu_seqlens)
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        row = {k: x[None, start:stop] for k, x in batch.items()} | {"last_values": last[i : i + 1]}
        for p, r in zip(packed, cases.every(row, n), strict=True):
            contract.assert_bitwise(p[start:stop], r[0])


@pytest.mark.parametrize("n", [1, 4])
def test_nothing_crosses_a_cut(backend, n):
    """NaN behind a termination or a truncation stays there."""
    for name in ("terminated", "truncated"):
        batch = cases.batch((1, 64), cuts=False, mask=False)
        batch["terminated"] = batch["truncated"] = torch.zeros(1, 64, dtype=torch.bool)
        batch[name] = torch.arange(64)[None] == 37
        clean = cases.every(batch, n)
        dirty = {k: x.clone() for k, x in batch.items()}
        dirty["rewards"][0, 38:] = dirty["values"][0, 38:] = float("nan")
        for a, e in zip(cases.every(dirty, n), clean, strict=True):
            contract.assert_bitwise(a[:, :38], e[:, :38])
            assert bool(a[:, 38:].isnan().all())


def test_nan_stays_in_its_windows(backend):
    """Windows are sums of their own steps, not differences of running sums, in which a NaN or 1e30 would stay."""
    n, T = 4, 40
    batch = cases.batch((1, T), cuts=False, mask=False)
    clean = cases.returns(batch, n)
    hit = (torch.arange(T) > 20 - n) & (torch.arange(T) <= 20)
    for poison in (float("nan"), 1e30):
        dirty = {k: x.clone() for k, x in batch.items()}
        dirty["rewards"][0, 20] = poison
        found = cases.returns(dirty, n)
        contract.assert_bitwise(found[:, ~hit], clean[:, ~hit])
        assert not bool((found[:, hit] == clean[:, hit]).any())


def test_last_values_bootstrap_and_termination(backend):
    """Which value stands behind the end: nothing, the row's last value, the cut's bootstrap; terminated wins."""
    r, v = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 4.0]])
    flag, boot, last = torch.tensor([[False, False, True]]), torch.full((1, 3), 100.0), torch.tensor([10.0])
    cut = {"truncated": flag, "bootstrap_values": boot}

    def final(function, **options):
        return float(function(r, v, gamma=0.5, n=2, **options)[0, 2])

    assert final(rf.n_step_returns) == 0.0
    assert final(rf.n_step_returns, last_values=last) == 5.0
    assert final(rf.n_step_returns, last_values=last, **cut) == 50.0
    assert final(rf.q_targets) == 2.0  # next_values
    assert final(rf.q_targets, last_values=last) == 5.0
    assert final(rf.q_targets, last_values=last, truncated=flag) == 2.0
    assert final(rf.q_targets, last_values=last, **cut) == 50.0
    for function in (rf.n_step_returns, rf.q_targets):
        assert final(function, last_values=last, terminated=flag, **cut) == 0.0
