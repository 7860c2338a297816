"""Every objective of the table: masks, layouts, extremes, threads, compilers, and what the selections select."""

from dataclasses import replace

import pytest
import torch

import react_fast as rf
from react_fast import GSPO, SAPO, ClipCov, KLCov
from react_fast.ops._objectives import OBJECTIVES

from . import contract
from .policy_cases import ALL, ROW, SMALL, TOKEN, batch, everything, named, row_advantages


@pytest.mark.parametrize("objective", named(ALL))
def test_masked_elements_influence_nothing(backend, objective):
    b = batch((4, 20))
    b = replace(b, mask=b.mask & (torch.arange(4) != 2)[:, None])
    clean = everything(b, objective=objective, **SMALL)
    for poison in (float("nan"), float("-inf"), 1e30) if backend == "cpu" else (float("nan"),):
        dirty = b.floats(lambda x, poison=poison: torch.where(b.mask, x, poison))
        for a, e in zip(everything(dirty, objective=objective, **SMALL), clean, strict=True):
            contract.assert_bitwise(a, e)
    assert bool((clean[2][~b.mask] == 0).all())


@pytest.mark.parametrize("objective", named(ALL))
def test_packed_equals_padded(backend, objective):
    b = batch((4, 33))
    kept = torch.arange(33) < torch.tensor([33, 1, 0, 17])[:, None]
    padded = replace(b, mask=b.mask & kept)
    bounds = torch.tensor([0, 33, 34, 34, 51])
    for rows in (padded, row_advantages(padded)):
        packed = rows.each(lambda x: x[kept] if x.dim() == 2 else x)
        actual = everything(packed, objective=objective, **SMALL, cu_seqlens=bounds)
        expected = everything(rows, objective=objective, **SMALL)
        for a, e in zip(actual[:2], expected[:2], strict=True):  # sums are grouped otherwise
            torch.testing.assert_close(a, e, rtol=64 * 2.0**-23, atol=64 * 2.0**-23)
        for a, e in zip(actual[2:], expected[2:], strict=True):
            if backend == "cpu" and not isinstance(objective, KLCov | ClipCov):
                contract.assert_bitwise(a, e[kept])
            torch.testing.assert_close(a, e[kept], rtol=64 * 2.0**-23, atol=1e-9)


@pytest.mark.parametrize("objective", named(TOKEN + ROW))
def test_denominator_makes_micro_batches_sum_to_the_batch(backend, objective):
    """And a row's gradient does not depend on the other rows, bitwise."""
    b = batch((5, 40))
    options = {"objective": objective, "aggregation": "token_mean", "denominator": float(b.mask.sum())}
    whole = b.gradients(**options)
    parts = [b.each(lambda x, i=i, j=j: x[i:j]).gradients(**options) for i, j in ((0, 1), (1, 3), (3, 5))]
    contract.assert_bitwise(torch.cat([p[1] for p in parts]), whole[1])
    # Three float32 roundings of sums below 10 times the row length for LUSPO.
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", named(ALL))
@pytest.mark.parametrize("on_policy", [False, True])
def test_a_forbidden_token_stays_put(backend, objective, on_policy):
    """logprobs -inf, and both -inf (top-p), with log-ratios far outside beside them."""
    b = batch((3, 9), torch.float64)
    b = replace(b, mask=torch.ones(3, 9).bool(), old_logprobs=None if on_policy else b.old_logprobs)
    b.logprobs[1, 4] = float("-inf")
    if not on_policy:
        b.logprobs[2, 3] = b.old_logprobs[2, 3] = float("-inf")
        b.old_logprobs[0, 0], b.old_logprobs[0, 1] = b.logprobs[0, 0] - 200, b.logprobs[0, 1] + 21
    actual = everything(b, objective=objective, **SMALL)
    assert all(bool(x.isfinite().all()) for x in actual)
    assert actual[2][1, 4] == 0
    with rf.use_backend("reference"):
        expected = everything(b, objective=objective, **SMALL)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12 * float(e.abs().amax()))
    assert b.loss(objective=objective).metrics["clamped"] == (1 if on_policy else 4)


@pytest.mark.parametrize("objective", named(ROW))
def test_nan_of_a_counting_token_stays_in_its_row(backend, objective):
    b = replace(batch((3, 9), full=False), mask=torch.ones(3, 9).bool())
    clean = b.gradients(objective=objective)[1]
    b.logprobs[1, 4] = float("nan")
    loss, d_logprobs = b.gradients(objective=objective)
    assert bool(loss.isnan())
    contract.assert_bitwise(d_logprobs[[0, 2]], clean[[0, 2]])
    assert bool(d_logprobs[1, 4].isnan())


@pytest.mark.parametrize("objective", named(ALL))
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0), (0,)], ids=str)
def test_nothing_counts(backend, objective, shape):
    b = replace(batch(shape), mask=torch.zeros(shape).bool()).floats(lambda x: x * float("nan"))
    bounds = None if len(shape) == 2 else torch.tensor([0, *shape])
    for x in everything(b, objective=objective, cu_seqlens=bounds):
        assert bool((x == 0).all())


@pytest.mark.parametrize("objective", named(ALL))
def test_threads_and_instruction_sets_agree(isa, objective):
    b = batch((120, 701))
    with rf.use_backend("cpu"):
        for rows in (b, row_advantages(b)):
            for i in range(3):
                contract.assert_threads_agree(
                    lambda rows=rows, i=i: everything(rows, objective=objective, **SMALL)[i], (1, 2, 3)
                )
        small = batch((9, 37))
        actual = everything(small, objective=objective, **SMALL)
        with rf.use_backend("reference"):
            expected = everything(small.floats(torch.Tensor.double), objective=objective, **SMALL)
    for a, e in zip(actual, expected, strict=True):  # a wrong lane or tail would be an error of order 1
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", named((SAPO(), ClipCov(0.7, 1.3, 0.1, 0.02), GSPO(0.9, 1.1))))
def test_compiles(backend, objective):
    b = batch((4, 9))
    contract.assert_compiles(
        lambda x: replace(b, logprobs=x).loss(objective=objective, kl_coef=0.1).loss,
        b.logprobs.requires_grad_(),
    )
    tail = (*OBJECTIVES[type(objective)][:1], OBJECTIVES[type(objective)].parameters(objective))
    tensors = (b.logprobs, b.old_logprobs, b.advantages, b.mask, None, None, None, None, None)
    contract.assert_opcheck("policy_loss", *tensors, 0.0, *tail, 1, 0.0, 2, 2, 0.0, True, False)


# ---- selections --------------------------------------------------------------------------------------------


def _chosen(b, objective):
    """Where ClipCov's gradient is cut though the clip does not hold."""
    open_clip = replace(objective, ratio_min=0.0, ratio_max=float("inf"))
    return (b.gradients(objective=open_clip)[1] == 0) & b.mask


def test_clip_cov_draws_by_seed(backend):
    b = replace(batch((8, 60), torch.float64, full=False), old_logprobs=None)
    objective = ClipCov(fraction=0.05, cov_min=0.0, cov_max=1e9, seed=1)
    chosen = _chosen(b, objective)
    wanted = int(0.05 * int(b.mask.sum()))
    A, logp = b.advantages, b.logprobs
    n = b.mask.sum()
    covariance = (A - (A * b.mask).sum() / n) * (logp - (logp * b.mask).sum() / n)
    assert int(chosen.sum()) == wanted
    assert bool((covariance[chosen] > 0).all())
    assert bool((_chosen(b, objective) == chosen).all())
    other = _chosen(b, replace(objective, seed=2))
    assert int(other.sum()) == wanted
    assert bool((other != chosen).any())
    with rf.use_backend("reference"):
        assert bool((_chosen(b, objective) == chosen).all())
    assert int(_chosen(b, replace(objective, cov_min=1e8)).sum()) == 0
    everyone = _chosen(b, replace(objective, fraction=1.0))
    assert bool((everyone == (b.mask & (covariance > 0))).all())


def test_kl_cov_takes_the_earlier_of_equals(backend):
    logprobs = torch.tensor([[-1.0, -3.0, -1.0, -1.0, -3.0, -1.0]]).double()
    b = replace(
        batch((1, 6), torch.float64, full=False), logprobs=logprobs, old_logprobs=logprobs - 0.1,
        advantages=torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, 1.0]]).double(), mask=torch.ones(1, 6).bool(),
    )  # fmt: skip
    # Covariances 4/3 * 4/3 of A = -1 come first, tokens 1 and 4; then, among four equals, the earliest.
    selected = KLCov(fraction=0.5, kl_coef=2.0)
    slopes = 6 * b.gradients(objective=selected)[1][0]
    plain = -b.advantages[0] * torch.tensor(0.1).double().exp()
    assert (slopes - plain).tolist() == pytest.approx([2, 2, 0, 0, 2, 0], abs=1e-7)
