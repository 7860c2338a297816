"""Every objective of the table equals the float64 reference and its printed equation, gradient included.

What all objectives share (masks, layouts, aggregations, KL) is tested in test_policy_loss.py and
test_policy_loss_contract.py with two of them.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

import react_fast as rf
from react_fast import (
    CISPO,
    DRO,
    GMPO,
    GSPO,
    LUSPO,
    SAPO,
    VESPO,
    ClipCov,
    DPPOBinaryKL,
    DPPOBinaryTV,
    GSPOToken,
    KLCov,
    PPOClip,
    Reinforce,
)
from react_fast.ops._objectives import OBJECTIVES

from . import contract
from .policy_cases import ALL, BATCH, ROW, SMALL, batch, everything, named, row_advantages, token_weights

# Whose gradient is not that of the loss's value: a weight in front of log p is a constant.
WEIGHTED = (CISPO, DPPOBinaryTV, DPPOBinaryKL, GSPOToken, VESPO)


def test_every_objective_is_tested():
    assert {type(o) for o in (*ALL, Reinforce(), PPOClip())} == set(OBJECTIVES)
    assert {type(o) for o in BATCH + ROW} == {o for o, entry in OBJECTIVES.items() if entry.whole_rows}


@pytest.mark.parametrize("objective", named(ALL))
def test_equals_float64_reference(backend, objective):
    # Below and above a vector, and on a CPU above a chunk of 1024 tokens. Kernels in float64: the next test.
    for dtype, shape in (
        product((torch.float32, torch.bfloat16, torch.float64), ((4, 7), (3, 40), (2, 1300)))
        if backend == "cpu"
        else product((torch.float32, torch.bfloat16), ((3, 40),))
    ):
        b = batch(shape, dtype)
        for given in (b, row_advantages(b)):
            actual = everything(given, objective=objective, **SMALL)
            with rf.use_backend("reference"):
                expected = everything(given.floats(torch.Tensor.double), objective=objective, **SMALL)
            eps = contract.EPS[actual[0].dtype]
            # A float32 sum over a row of log-ratios below 2 loses 1024 / 4 half eps of it, which exp turns into a
            # relative error of every term; slopes are then rounded to the input's dtype. Terms are below 20.
            bound = 300 * eps
            for a, e in zip(actual[:2], expected[:2], strict=True):
                torch.testing.assert_close(a.double(), e, rtol=bound, atol=20 * bound)
            for a, e in zip(actual[2:], expected[2:], strict=True):
                size = float(e.abs().amax())
                torch.testing.assert_close(a.double(), e, rtol=contract.EPS[dtype] + bound, atol=bound * size)


# ---- the printed equations, over a padded batch at once ----------------------------------------------------


def _mean(x, mask):
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _clipped(o, r, A):
    cap, dual = o.ratio_cap or float("inf"), o.dual_clip or float("inf")
    loss = torch.maximum(-r.clip(max=cap) * A, -r.clip(o.ratio_min, o.ratio_max) * A)
    return torch.where(A < 0, torch.minimum(loss, -dual * A), loss)


def _selected(o, b):
    """By sorting; of KLCov only, since ClipCov draws."""
    A, logp = b.advantages[b.mask], b.logprobs[b.mask].detach()
    covariance = (A - A.mean()) * (logp - logp.mean())
    chosen = torch.zeros_like(b.mask)
    bound = covariance.sort(descending=True).values[max(1, int(o.fraction * len(A))) - 1]
    chosen[b.mask] = covariance >= bound
    return chosen


def _terms(o, b):
    """L of every token with its importance weight, as the docstring of the objective prints it."""
    A, logp = b.advantages, b.logprobs
    mask = b.mask.double()
    log_ratio = logp - b.old_logprobs
    r, p, p_old = log_ratio.exp(), logp.exp(), b.old_logprobs.exp()
    weight = b.importance
    if isinstance(o, CISPO):
        loss = -r.clip(o.ratio_min, o.ratio_max).detach() * A * logp
    elif isinstance(o, SAPO):
        tau = torch.where(A > 0, torch.tensor(o.tau_pos).double(), torch.tensor(o.tau_neg).double())
        loss = -A * 4 / tau * torch.sigmoid(tau * (r - 1))
    elif isinstance(o, DPPOBinaryTV):
        kept = torch.where(A > 0, p - p_old <= o.increase_max, p_old - p <= o.decrease_max)
        loss = -(r.clip(max=o.ratio_cap) * kept).detach() * A * logp
    elif isinstance(o, DPPOBinaryKL):
        kl = p_old * (p_old / p).log() + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
        kept = torch.where(
            A > 0, (kl <= o.increase_max) | (p <= p_old), (kl <= o.decrease_max) | (p >= p_old)
        )
        loss = -(r.clip(max=o.ratio_cap) * kept).detach() * A * logp
    elif isinstance(o, DRO):
        loss = -(A * logp - o.beta / 2 * log_ratio**2)
    elif isinstance(o, KLCov):
        loss = -A * r + _selected(o, b) * o.kl_coef * log_ratio.abs()
    elif isinstance(o, GSPOToken):
        s = _mean(log_ratio, mask).exp().detach() * p / p.detach()
        loss = _clipped(o, s, A)
    elif isinstance(o, GSPO):
        loss = _clipped(o, _mean(log_ratio, mask).exp(), A)
        if isinstance(o, LUSPO):
            loss = loss * mask.sum(1, keepdim=True)
    elif isinstance(o, GMPO):
        sign = A.sign()
        held = sign * torch.minimum(sign * log_ratio, sign * r.clip(o.ratio_min, o.ratio_max).log())
        loss = -A * _mean(held, mask).exp()
    else:
        w = ((log_ratio + b.importance.log()) * mask).sum(1, keepdim=True).exp().detach()
        phi = torch.where(
            A >= 0, w**o.k_pos * (o.lambda_pos * (1 - w)).exp(), w**o.k_neg * (o.lambda_neg * (1 - w)).exp()
        )
        return -phi * A * logp
    return weight * loss


@pytest.mark.parametrize("objective", named(o for o in ALL if not isinstance(o, ClipCov)))
def test_equals_the_printed_equation(backend, objective):
    b = batch((5, 9), torch.float64)
    b = replace(b, mask=b.mask & (torch.arange(5) != 2)[:, None], ref_logprobs=None, entropy=None)
    for aggregation in (
        ("token_mean", "seq_mean_token_mean") if backend == "cpu" else ("seq_mean_token_mean",)
    ):
        leaf = b.logprobs.clone().requires_grad_()
        expected = (
            token_weights(b.mask, aggregation, None) * _terms(objective, replace(b, logprobs=leaf))
        ).sum()
        (slopes,) = torch.autograd.grad(expected, leaf)
        loss, d_logprobs = b.gradients(objective=objective, aggregation=aggregation)
        # About 100 float64 operations on terms of size 10.
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(d_logprobs, slopes, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("objective", named(o for o in ALL if not isinstance(o, WEIGHTED)))
def test_gradcheck(backend, objective):
    """Values away from every bound by more than the step, as drawn; a selection stays the same over a step."""
    b = batch((2, 6) if backend == "cpu" else (1, 4), torch.float64)
    contract.assert_gradcheck(
        lambda x: replace(b, logprobs=x).loss(objective=objective, kl_coef=0.3).loss, b.logprobs
    )


# ---- what the objectives say of each other -----------------------------------------------------------------


@pytest.mark.parametrize("objective", named(ALL))
def test_on_policy_gradient(backend, objective):
    """At ratio 1 all have the gradient of REINFORCE, averaged over the row where the ratio is the row's."""
    b = replace(batch((4, 9), torch.float64, full=False), old_logprobs=None)
    mask, weights = b.mask.double(), token_weights(b.mask, "token_mean", None)
    expected = -weights * b.advantages
    if type(objective) in (GSPO, LUSPO, GMPO):
        expected = -weights * _mean(b.advantages, mask) * mask
    if isinstance(objective, LUSPO):
        expected = expected * mask.sum(1, keepdim=True)
    if isinstance(objective, ClipCov):
        drawn = round(float(b.loss(objective=objective).metrics["clip_ratio/dual"] * mask.sum()))
        gradient = b.gradients(objective=objective)[1]
        assert int(((gradient == 0) & b.mask).sum()) == drawn > 0
        expected = torch.where(gradient == 0, 0.0, expected)
    torch.testing.assert_close(b.gradients(objective=objective)[1], expected, rtol=1e-12, atol=1e-15)
    metrics = b.loss(objective=objective).metrics
    assert metrics["ratio/mean"].item() == pytest.approx(1, rel=1e-12)
    assert metrics["approx_kl/k3"].item() == 0


def test_gspo_of_one_token_is_ppo(backend):
    b = batch((40 if backend == "cpu" else 3, 1), torch.float64)
    for kind in (GSPO, GSPOToken, LUSPO):
        actual = everything(b, objective=kind(0.8, 1.2, 1.5, 1.4), **SMALL)
        expected = everything(b, objective=PPOClip(0.8, 1.2, 1.5, 1.4), **SMALL)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-14)


def test_gspo_kinds_agree(backend):
    """One advantage a row and no weights: GSPO-token has GSPO's gradient; LUSPO is GSPO summed over the row."""
    b = row_advantages(batch((6, 20), torch.float64, full=False))
    for a, e in (
        (b.gradients(objective=GSPOToken(0.9, 1.1)), b.gradients(objective=GSPO(0.9, 1.1))),
        (
            b.gradients(objective=LUSPO(0.9, 1.1), aggregation="seq_mean_token_mean"),
            b.gradients(objective=GSPO(0.9, 1.1), aggregation="seq_mean_token_sum"),
        ),
    ):
        for x, y in zip(a, e, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_weights_bounded_at_one_are_reinforce(backend):
    b = batch((3, 20), torch.float64)
    for a, e in zip(b.gradients(objective=CISPO(1.0, 1.0)), b.gradients(objective=Reinforce()), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-15)


# ---- metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "ratios", "advantages", "low", "high", "dual"),
    [
        (CISPO(0.5, 2.0), [0.4, 3.0, 3.0, 1.0, 0.4], [1.0, 1.0, -1.0, 1.0, 0.0], 1, 1, 1),
        # The gate 4 s (1 - s) is below one half where |tau (r - 1)| > 1.76: with tau 2 below 0.12 and above 1.88.
        (SAPO(2.0, 2.0), [0.1, 1.9, 1.9, 1.8, 0.2], [-1.0, 1.0, -1.0, 1.0, 1.0], 1, 1, 1),
        (GMPO(0.5, 2.0), [0.4, 3.0, 0.4, 3.0, 1.0], [-1.0, 1.0, 1.0, -1.0, 1.0], 1, 1, 0),
        (GSPO(0.9, 1.1), [2.0, 2.0, 2.0, 2.0, 2.0], [1.0, -1.0, 1.0, 0.0, -1.0], 0, 2, 0),
        # phi(2^5) of W = 32 is 0 for all practical purposes.
        (VESPO(), [2.0, 2.0, 2.0, 2.0, 2.0], [1.0, -1.0, 1.0, 0.0, -1.0], 0, 2, 2),
        (DPPOBinaryTV(0.1, 0.1, 1.2), [0.5, 1.5, 1.25, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0, -1.0], 1, 1, 1),
    ],
    ids=str,
)
def test_clip_fractions_by_hand(backend, objective, ratios, advantages, low, high, dual):
    old = torch.full((1, 5), 0.5).double().log()
    logprobs = old + torch.tensor([ratios]).double().log()
    A = torch.tensor([advantages]).double()
    metrics = rf.policy_loss(logprobs, old, A, torch.ones(1, 5).bool(), objective=objective).metrics
    found = [round(float(metrics[f"clip_ratio/{name}"]) * 5, 9) for name in ("low", "high", "dual")]
    assert found == [low, high, dual]


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CISPO(1.2, 0.8), "0 <= ratio_min <= ratio_max"),
        (lambda: CISPO(float("nan"), 1.0), "0 <= ratio_min <= ratio_max"),
        (lambda: SAPO(0.0), "tau_pos must be above 0, got 0.0"),
        (lambda: DPPOBinaryTV(ratio_cap=0.0), "ratio_cap must be above 0"),
        (lambda: DPPOBinaryKL(decrease_max=-1.0), "decrease_max must be above 0"),
        (lambda: DRO(0.0), "beta must be above 0"),
        (lambda: KLCov(0.0), r"fraction must be in \(0, 1\], got 0.0"),
        (lambda: ClipCov(fraction=1.5), r"fraction must be in \(0, 1\], got 1.5"),
        (lambda: ClipCov(cov_min=2.0, cov_max=1.0), "cov_min must not exceed cov_max"),
        (lambda: ClipCov(seed=-1), "seed must be an integer in"),
        (lambda: ClipCov(seed=0.5), "seed must be an integer in"),
        (lambda: GSPO(dual_clip=1.0), "dual_clip must be above 1"),
        (lambda: GMPO(0.0), "ratio_min must be above 0"),
        (lambda: VESPO(k_neg=0.0), "k_neg must be above 0"),
    ],
)
def test_bad_parameters_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("objective", named(ROW))
def test_rows_need_cu_seqlens(objective):
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=r"cu_seqlens must be given for packed tokens and .*, got None"):
        rf.policy_loss(ones, None, ones, ones.bool(), objective=objective)
