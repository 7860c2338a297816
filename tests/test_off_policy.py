"""V-trace and Retrace: equal the float64 reference and the papers' sums, steps and boundaries, the op contract."""

import itertools

import numpy as np
import pytest
import torch

import react_fast as rf
from react_fast import _core

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One step; below, at and above a vector; a ragged multiple; above the Triton block.
SHAPES = [(1, 1), (3, 7), (2, 16), (5, 17), (2, 100)]
GAMMA, LAM = 0.97, 0.9


def _batch(shape, dtype=torch.float32, mask=True):
    """(arguments of vtrace, arguments of retrace) with everything that there is."""
    flags = {
        name: torch.rand(shape) > 0.85 for name in ("terminated", "truncated")
    }  # both at once: terminated
    if mask:
        flags["mask"] = torch.rand(shape) > 0.3
    r, v, following, log_rhos = (torch.randn(shape).to(dtype) for _ in range(4))
    ends = {"last_values": torch.randn(shape[0]).to(dtype), "bootstrap_values": following}
    return (
        {"rewards": r, "values": v, "log_rhos": log_rhos, **flags, **ends},
        {"rewards": r, "q_values": v, "next_values": following, "log_rhos": log_rhos, **flags},
    )


def _both(vtrace, retrace, **options):
    options = {"gamma": GAMMA, "lam": LAM, **options}
    return *rf.vtrace(**vtrace, rho_clip=1.5, c_clip=1.1, **options), rf.retrace(**retrace, **options)


def _expected(vtrace, retrace, **options):
    def wide(given):
        return {k: x.double() if x.is_floating_point() else x for k, x in given.items()}

    with rf.use_backend("reference"):
        return _both(wide(vtrace), wide(retrace), **options)


def _assert_close(actual, expected, dtype):
    # Each result is a sum of discounted terms of size below 20 with weights that shrink like (gamma lam c)^k, each
    # rounded a few times: a hundred roundings of that size.
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - e).abs().max()) <= 20 * 100 * contract.EPS[dtype]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_reference(backend, shape, dtype, masked):
    given = _batch(shape, dtype, masked)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _assert_close(_both(*given), _expected(*given), wide)


def test_every_instruction_set_agrees(isa):
    given = _batch((9, 131))
    _assert_close(_both(*given), _expected(*given), torch.float32)
    given = _batch((9, 131), mask=False)
    given = [{k: x for k, x in g.items() if k not in ("terminated", "truncated")} for g in given]
    _assert_close(_both(*given), _expected(*given), torch.float32)
    assert _core.isa() == isa


def test_vtrace_is_the_papers_sum(backend):
    """v_s = V_s + sum_t gamma^{t-s} (prod_{i<t} c_i) delta_t (arXiv:1802.01561, eq. 1), and q_s - V_s weighed."""
    T = 9
    r, v, log_rhos = (torch.randn(1, T, dtype=torch.float64) for _ in range(3))
    last = torch.randn(1, dtype=torch.float64)
    rho = log_rhos[0].exp()
    following = torch.cat([v[0, 1:], last])
    delta = rho.clamp_max(1.2) * (r[0] + GAMMA * following - v[0])
    c = LAM * rho.clamp_max(0.9)
    target = v[0] + torch.stack(
        [sum(GAMMA ** (t - s) * c[s:t].prod() * delta[t] for t in range(s, T)) for s in range(T)]
    )
    advantage = rho.clamp_max(2.0) * (r[0] + GAMMA * torch.cat([target[1:], last]) - v[0])
    options = {"gamma": GAMMA, "lam": LAM, "rho_clip": 1.2, "c_clip": 0.9, "advantage_rho_clip": 2.0}
    found = rf.vtrace(r, v, log_rhos, last_values=last, **options)
    torch.testing.assert_close(found[0][0], target, rtol=1e-12, atol=1e-12)  # nine float64 terms of size 10
    torch.testing.assert_close(found[1][0], advantage, rtol=1e-12, atol=1e-12)


def test_vtrace_reproduces_rlax(backend):
    """rlax mixes the advantage's bootstrap, lam v' + (1 - lam) V': two calls, as the docstring says."""
    T, lam = 12, 0.7
    r, v, log_rhos = (torch.randn(1, T, dtype=torch.float64) for _ in range(3))
    last = torch.zeros(1, dtype=torch.float64)
    targets, advantages = rf.vtrace(r, v, log_rhos, gamma=GAMMA, lam=lam)
    one_step = rf.vtrace(r, v, log_rhos, gamma=GAMMA, lam=0.0)[0] - v
    mixed = torch.cat([lam * targets[0, 1:] + (1 - lam) * v[0, 1:], last])
    rlax = log_rhos[0].exp().clamp_max(1) * (r[0] + GAMMA * mixed - v[0])
    ours = lam * advantages[0] + (1 - lam) * one_step[0]
    torch.testing.assert_close(ours, rlax, rtol=1e-12, atol=1e-12)


def test_retrace_is_the_papers_sum(backend):
    """Q_s + sum_t gamma^{t-s} (prod_{s<i<=t} c_i) (r_t + gamma V'_t - Q_t) (arXiv:1606.02647, eq. 3 and 4)."""
    T = 9
    r, q, following, log_rhos = (torch.randn(1, T, dtype=torch.float64) for _ in range(4))
    c = LAM * log_rhos[0].exp().clamp_max(1)
    delta = r[0] + GAMMA * following[0] - q[0]
    expected = q[0] + torch.stack(
        [sum(GAMMA ** (t - s) * c[s + 1 : t + 1].prod() * delta[t] for t in range(s, T)) for s in range(T)]
    )
    found = rf.retrace(r, q, following, log_rhos, gamma=GAMMA, lam=LAM)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    sarsa = rf.retrace(r, q, following, log_rhos, gamma=GAMMA, lam=0.0)  # expected SARSA
    torch.testing.assert_close(sarsa, r + GAMMA * following, rtol=1e-12, atol=1e-12)


def test_on_policy_vtrace_is_td_lambda_and_gae(backend):
    vtrace, _ = _batch((3, 33), torch.float64)
    vtrace["log_rhos"] = torch.zeros(3, 33, dtype=torch.float64)
    rest = {k: x for k, x in vtrace.items() if k != "log_rhos"}
    targets, _ = rf.vtrace(**vtrace, gamma=GAMMA, lam=LAM)
    returns = rf.td_lambda_returns(**rest, gamma=GAMMA, lam=LAM)
    torch.testing.assert_close(targets, returns, rtol=1e-12, atol=1e-12)
    _, advantages = rf.vtrace(**vtrace, gamma=GAMMA)
    torch.testing.assert_close(
        advantages, rf.gae(**rest, gamma=GAMMA, lam=1.0)[0], rtol=1e-12, atol=1e-12
    )  # fmt: skip


def test_masked_steps_touch_nothing(backend):
    vtrace, retrace = _batch((4, 50))
    mask = vtrace["mask"]
    mask[2] = False  # a whole row
    expected = _both(vtrace, retrace)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = [
            {
                k: x.masked_fill(~mask, poison) if x.is_floating_point() and x.dim() == 2 else x
                for k, x in given.items()
            }
            for given in (vtrace, retrace)
        ]
        for given in dirty:
            given.update({k: given[k] | ~mask for k in ("terminated", "truncated")})
        for a, e in zip(_both(*dirty), expected, strict=True):
            contract.assert_bitwise(a, e)
            assert bool((a[~mask] == 0).all())


def test_nothing_crosses_a_cut(backend):
    """NaN behind a termination or a truncation stays there, in whole vectors and in ragged ones."""
    vtrace, retrace = _batch((1, 64), mask=False)
    for name in ("terminated", "truncated"):
        for given in (vtrace, retrace):
            given["terminated"] = given["truncated"] = torch.zeros(1, 64, dtype=torch.bool)
            given[name] = torch.arange(64)[None] == 37
        clean = _both(vtrace, retrace)
        dirty = [
            {k: x.clone() if k != "bootstrap_values" else x for k, x in g.items()} for g in (vtrace, retrace)
        ]
        for given in dirty:
            for field in ("rewards", "log_rhos"):
                given[field][0, 38:] = float("nan")
        for a, e in zip(_both(*dirty), clean, strict=True):
            contract.assert_bitwise(a[:, :38], e[:, :38])
            assert bool(a[:, 38:].isnan().all())


def test_extreme_ratios(backend):
    """pi = 0 cuts a trace, pi / mu beyond float32 is clipped; no NaN either way."""
    r, v = torch.randn(1, 20), torch.randn(1, 20)
    log_rhos = torch.tensor([[float("-inf"), 200.0] * 10])
    for x in (*rf.vtrace(r, v, log_rhos, gamma=GAMMA), rf.retrace(r, v, v, log_rhos, gamma=GAMMA)):
        assert bool(x.isfinite().all())
    targets, advantages = rf.vtrace(r, v, torch.full((1, 20), float("-inf")), gamma=GAMMA)
    torch.testing.assert_close(targets, v)
    assert bool((advantages == 0).all())


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_packed_equals_rows(backend, integer):
    lengths = [3, 0, 20, 16, 1, 0, 70, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    vtrace, retrace = ({k: x[0] for k, x in given.items()} for given in _batch((1, sum(lengths))))
    last, lam = torch.randn(len(lengths)), torch.rand(len(lengths))
    vtrace["last_values"] = last
    packed = _both(vtrace, retrace, lam=lam, cu_seqlens=cu_seqlens)
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        rows = [{k: x[None, start:stop] for k, x in given.items()} for given in (vtrace, retrace)]
        rows[0]["last_values"] = last[i : i + 1]
        for p, r in zip(packed, _both(*rows, lam=lam[i : i + 1]), strict=True):
            contract.assert_bitwise(p[start:stop], r[0])


def test_lam_per_row(backend):
    given = _batch((4, 20), torch.float64)
    lam = torch.tensor([0.0, 0.3, 0.95, 1.0])
    together = _both(*given, lam=lam)
    for i in range(4):
        alone = _both(*[{k: x[i : i + 1] for k, x in g.items()} for g in given], lam=float(lam[i].double()))
        for t, a in zip(together, alone, strict=True):
            torch.testing.assert_close(t[i], a[0], rtol=1e-12, atol=1e-12)


def test_targets_are_constants(backend):
    """No gradient flows, whichever input requires one."""
    vtrace, retrace = _batch((2, 9))
    for given in (vtrace, retrace):
        for name, x in given.items():
            given[name] = x.clone().requires_grad_() if x.is_floating_point() else x
    for chosen in (backend, "reference"):
        with rf.use_backend(chosen):
            assert not any(x.requires_grad for x in _both(vtrace, retrace))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)], ids=str)
def test_empty_and_single(backend, shape):
    for x in _both(*_batch(shape)):
        assert x.shape == shape
    nothing = torch.empty(0)
    for edges in ([0], [0, 0, 0]):
        cu_seqlens = torch.tensor(edges)
        assert rf.vtrace(nothing, nothing, nothing, gamma=GAMMA, cu_seqlens=cu_seqlens)[0].shape == (0,)
        assert rf.retrace(*[nothing] * 4, gamma=GAMMA, cu_seqlens=cu_seqlens).shape == (0,)


def test_any_strides_and_threads(backend):
    given = _batch((7, 30))
    views = [{k: x.T.contiguous().T if x.dim() == 2 else x for k, x in g.items()} for g in given]
    for s, d in zip(_both(*views), _both(*given), strict=True):
        contract.assert_bitwise(s, d)
    if backend == "cpu":
        large = _batch((300, 515))
        contract.assert_threads_agree(lambda: torch.stack(_both(*large)))


def test_numpy_in_numpy_out():
    given = _batch((3, 10))
    arrays = [{k: x.numpy() for k, x in g.items()} for g in given]
    with_first = (
        *rf.vtrace(arrays[0].pop("rewards"), **arrays[0], rho_clip=1.5, c_clip=1.1, gamma=GAMMA, lam=LAM),
        rf.retrace(arrays[1].pop("rewards"), **arrays[1], gamma=GAMMA, lam=LAM),
    )
    for found, expected in zip(with_first, _both(*given), strict=True):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected.numpy())


def test_compiles_opcheck_and_meta(backend):
    r, v, w, log_rhos = (torch.randn(2, 9) for _ in range(4))
    mask = torch.rand(2, 9) > 0.3
    contract.assert_compiles(lambda *x: torch.stack(rf.vtrace(*x, gamma=GAMMA, mask=mask)), r, v, log_rhos)
    contract.assert_compiles(lambda *x: rf.retrace(*x, gamma=GAMMA, mask=mask), r, v, w, log_rhos)
    flags = (mask, ~mask, mask, None, None, GAMMA, LAM)
    contract.assert_opcheck("vtrace", r, v, log_rhos, torch.randn(2), w, *flags, 1.0, 1.0, 1.0)
    contract.assert_opcheck("retrace", r, v, w, log_rhos, *flags)
    meta = [x.to("meta").bfloat16() for x in (r, v, w, log_rhos)]
    for x in (*rf.vtrace(*meta[:3], gamma=GAMMA), rf.retrace(*meta, gamma=GAMMA)):
        assert (x.shape, x.dtype, x.device.type) == ((2, 9), torch.float32, "meta")
