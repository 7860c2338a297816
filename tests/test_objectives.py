"""Every objective of the table equals the float64 reference and its printed equation, gradient included.

What all objectives share (masks, layouts, aggregations, KL) is tested in test_policy_loss.py and
test_policy_loss_contract.py with two of them.
"""

from dataclasses import replace

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
from .policy_cases import batch, token_weights

# Bounds narrow enough that a batch meets each; soft gates steep enough to close; covariances on both sides.
TOKEN = (
    CISPO(0.8, 1.2),
    SAPO(3.0, 4.0),
    DPPOBinaryTV(0.05, 0.04, 1.3),
    DPPOBinaryKL(0.01, 0.02, 1.3),
    DRO(0.7),
)
BATCH = (KLCov(0.1, 0.5), ClipCov(0.7, 1.3, 0.1, 0.02, 2.0, seed=3))
ROW = (
    GSPO(0.95, 1.05),
    GSPO(0.9, 1.1, dual_clip=1.02, ratio_cap=1.05),
    GSPOToken(0.95, 1.05),
    LUSPO(0.95, 1.05),
    GMPO(0.8, 1.3),
    VESPO(0.5, 0.3, 0.4, 0.2),
)
ALL = TOKEN + BATCH + ROW
# Whose gradient is not that of the loss's value: a weight in front of log p is a constant.
WEIGHTED = (CISPO, DPPOBinaryTV, DPPOBinaryKL, GSPOToken, VESPO)
SMALL = {"kl_coef": 0.1, "entropy_coef": 0.01, "aggregation": "seq_mean_token_mean"}


def _named(values):
    return [pytest.param(v, id=str(v)) for v in values]


def _everything(b, **options):
    loss, metrics = b.loss(**options)
    return [loss.detach(), torch.stack(list(metrics.values())), *b.gradients(**options)[1:]]


def _row_advantages(b):
    return replace(b, advantages=b.advantages[:, 0].contiguous())


def test_every_objective_is_tested():
    assert {type(o) for o in (*ALL, Reinforce(), PPOClip())} == set(OBJECTIVES)
    assert {type(o) for o in BATCH + ROW} == {o for o, entry in OBJECTIVES.items() if entry.whole_rows}


@pytest.mark.parametrize("objective", _named(ALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_float64_reference(backend, objective, dtype):
    # Below and above a vector, and on a CPU above a chunk of 1024 tokens.
    for shape in [(4, 7), (3, 40), (2, 1300)] if backend == "cpu" else [(3, 40)]:
        b = batch(shape, dtype)
        for given in (b, _row_advantages(b)):
            actual = _everything(given, objective=objective, **SMALL)
            with rf.use_backend("reference"):
                expected = _everything(given.floats(torch.Tensor.double), objective=objective, **SMALL)
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


@pytest.mark.parametrize("objective", _named(o for o in ALL if not isinstance(o, ClipCov)))
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_equals_the_printed_equation(backend, objective, aggregation):
    b = batch((5, 9), torch.float64)
    b = replace(b, mask=b.mask & (torch.arange(5) != 2)[:, None], ref_logprobs=None, entropy=None)
    leaf = b.logprobs.clone().requires_grad_()
    expected = (token_weights(b.mask, aggregation, None) * _terms(objective, replace(b, logprobs=leaf))).sum()
    (slopes,) = torch.autograd.grad(expected, leaf)
    loss, d_logprobs = b.gradients(objective=objective, aggregation=aggregation)
    # About 100 float64 operations on terms of size 10.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(d_logprobs, slopes, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("objective", _named(o for o in ALL if not isinstance(o, WEIGHTED)))
def test_gradcheck(backend, objective):
    """Values away from every bound by more than the step, as drawn; a selection stays the same over a step."""
    b = batch((2, 6), torch.float64)
    contract.assert_gradcheck(
        lambda x: replace(b, logprobs=x).loss(objective=objective, kl_coef=0.3).loss, b.logprobs
    )


# ---- what the objectives say of each other -----------------------------------------------------------------


@pytest.mark.parametrize("objective", _named(ALL))
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
    b = batch((40, 1), torch.float64)
    for kind in (GSPO, GSPOToken, LUSPO):
        actual = _everything(b, objective=kind(0.8, 1.2, 1.5, 1.4), **SMALL)
        expected = _everything(b, objective=PPOClip(0.8, 1.2, 1.5, 1.4), **SMALL)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-14)


def test_gspo_kinds_agree(backend):
    """One advantage a row and no weights: GSPO-token has GSPO's gradient; LUSPO is GSPO summed over the row."""
    b = _row_advantages(batch((6, 20), torch.float64, full=False))
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


# ---- masks, layouts, extremes ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", _named(ALL))
@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), 1e30])
def test_masked_elements_influence_nothing(backend, objective, poison):
    b = batch((4, 20))
    b = replace(b, mask=b.mask & (torch.arange(4) != 2)[:, None])
    dirty = b.floats(lambda x: torch.where(b.mask, x, poison))
    clean = _everything(b, objective=objective, **SMALL)
    for a, e in zip(_everything(dirty, objective=objective, **SMALL), clean, strict=True):
        contract.assert_bitwise(a, e)
    assert bool((clean[2][~b.mask] == 0).all())


@pytest.mark.parametrize("objective", _named(ALL))
def test_packed_equals_padded(backend, objective):
    b = batch((4, 33))
    kept = torch.arange(33) < torch.tensor([33, 1, 0, 17])[:, None]
    padded = replace(b, mask=b.mask & kept)
    bounds = torch.tensor([0, 33, 34, 34, 51])
    for rows in (padded, _row_advantages(padded)):
        packed = rows.each(lambda x: x[kept] if x.dim() == 2 else x)
        actual = _everything(packed, objective=objective, **SMALL, cu_seqlens=bounds)
        expected = _everything(rows, objective=objective, **SMALL)
        for a, e in zip(actual[:2], expected[:2], strict=True):  # sums are grouped otherwise
            torch.testing.assert_close(a, e, rtol=64 * 2.0**-23, atol=64 * 2.0**-23)
        for a, e in zip(actual[2:], expected[2:], strict=True):
            if backend == "cpu" and not isinstance(objective, KLCov | ClipCov):
                contract.assert_bitwise(a, e[kept])
            torch.testing.assert_close(a, e[kept], rtol=64 * 2.0**-23, atol=1e-9)


@pytest.mark.parametrize("objective", _named(TOKEN + ROW))
def test_denominator_makes_micro_batches_sum_to_the_batch(backend, objective):
    """And a row's gradient does not depend on the other rows, bitwise."""
    b = batch((5, 40))
    options = {"objective": objective, "aggregation": "token_mean", "denominator": float(b.mask.sum())}
    whole = b.gradients(**options)
    parts = [b.each(lambda x, i=i, j=j: x[i:j]).gradients(**options) for i, j in ((0, 1), (1, 3), (3, 5))]
    contract.assert_bitwise(torch.cat([p[1] for p in parts]), whole[1])
    # Three float32 roundings of sums below 10 times the row length for LUSPO.
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", _named(ALL))
@pytest.mark.parametrize("on_policy", [False, True])
def test_a_forbidden_token_stays_put(backend, objective, on_policy):
    """logprobs -inf, and both -inf (top-p), with log-ratios far outside beside them."""
    b = batch((3, 9), torch.float64)
    b = replace(b, mask=torch.ones(3, 9).bool(), old_logprobs=None if on_policy else b.old_logprobs)
    b.logprobs[1, 4] = float("-inf")
    if not on_policy:
        b.logprobs[2, 3] = b.old_logprobs[2, 3] = float("-inf")
        b.old_logprobs[0, 0], b.old_logprobs[0, 1] = b.logprobs[0, 0] - 200, b.logprobs[0, 1] + 21
    actual = _everything(b, objective=objective, **SMALL)
    assert all(bool(x.isfinite().all()) for x in actual)
    assert actual[2][1, 4] == 0
    with rf.use_backend("reference"):
        expected = _everything(b, objective=objective, **SMALL)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12 * float(e.abs().amax()))
    assert b.loss(objective=objective).metrics["clamped"] == (1 if on_policy else 4)


@pytest.mark.parametrize("objective", _named(ROW))
def test_nan_of_a_counting_token_stays_in_its_row(backend, objective):
    b = replace(batch((3, 9), full=False), mask=torch.ones(3, 9).bool())
    clean = b.gradients(objective=objective)[1]
    b.logprobs[1, 4] = float("nan")
    loss, d_logprobs = b.gradients(objective=objective)
    assert bool(loss.isnan())
    contract.assert_bitwise(d_logprobs[[0, 2]], clean[[0, 2]])
    assert bool(d_logprobs[1, 4].isnan())


@pytest.mark.parametrize("objective", _named(ALL))
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0), (0,)], ids=str)
def test_nothing_counts(backend, objective, shape):
    b = replace(batch(shape), mask=torch.zeros(shape).bool()).floats(lambda x: x * float("nan"))
    bounds = None if len(shape) == 2 else torch.tensor([0, *shape])
    for x in _everything(b, objective=objective, cu_seqlens=bounds):
        assert bool((x == 0).all())


@pytest.mark.parametrize("objective", _named(ALL))
def test_threads_and_instruction_sets_agree(isa, objective):
    b = batch((120, 701))
    with rf.use_backend("cpu"):
        for rows in (b, _row_advantages(b)):
            for i in range(3):
                contract.assert_threads_agree(
                    lambda rows=rows, i=i: _everything(rows, objective=objective, **SMALL)[i], (1, 2, 3)
                )
        small = batch((9, 37))
        actual = _everything(small, objective=objective, **SMALL)
        with rf.use_backend("reference"):
            expected = _everything(small.floats(torch.Tensor.double), objective=objective, **SMALL)
    for a, e in zip(actual, expected, strict=True):  # a wrong lane or tail would be an error of order 1
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", _named((SAPO(), ClipCov(0.7, 1.3, 0.1, 0.02), GSPO(0.9, 1.1))))
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


@pytest.mark.parametrize("objective", _named(ROW))
def test_rows_need_cu_seqlens(objective):
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=r"cu_seqlens must be given for packed tokens and .*, got None"):
        rf.policy_loss(ones, None, ones, ones.bool(), objective=objective)
