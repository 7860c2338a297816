"""policy_loss: equals the float64 reference and the printed equations, in value, metrics and gradient."""

from dataclasses import replace

import pytest
import torch

import react_fast as rf
from react_fast import PPOClip, Reinforce

from . import contract
from .policy_cases import (
    AGGREGATIONS,
    DTYPES,
    KL,
    OBJECTIVES,
    batch,
    formula,
    magnitude,
    surrogate,
    token_weights,
)

# One token; below, at and above a vector; a ragged multiple; above a summation chunk of 1024.
SHAPES = [(1, 1), (3, 7), (5, 16), (4, 33), (2, 1300)]
FULL = {"kl_coef": 0.1, "entropy_coef": 0.01}
DUAL = {**FULL, "objective": PPOClip(dual_clip=1.5)}
# Float sums take at most 1024 / 4 additions a lane before they turn into float64, each half an eps of the sum
# of magnitudes; the terms' own errors are in `magnitude`.
ADDITIONS = 256


def _named(values):
    return [pytest.param(v, id=str(v)) for v in values]


def _options(aggregation, **more):
    return {
        "aggregation": aggregation,
        "denominator": 37.0 if aggregation == "token_sum_norm" else None,
        **more,
    }


def _close(actual, expected, bound):
    assert bool(((actual.double() - expected.double()).abs() <= bound + 1e-300).all())


def _reference(b, **options):
    with rf.use_backend("reference"):
        return b.floats(torch.Tensor.double).loss(**options)


@pytest.mark.parametrize("objective", _named(OBJECTIVES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_equal_float64_reference(backend, shape, dtype, objective):
    b = batch(shape, dtype)
    wide = b.floats(torch.Tensor.double)
    # The interpreter is slow; every aggregation runs on it in test_equals_the_printed_equation.
    for aggregation in AGGREGATIONS if backend == "cpu" else AGGREGATIONS[1:2]:
        options = _options(aggregation, objective=objective, **FULL)
        loss, d_logprobs, d_entropy = b.gradients(**options)
        with rf.use_backend("reference"):
            expected, e_logprobs, e_entropy = wide.gradients(**options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert d_logprobs.dtype == d_entropy.dtype == dtype
        weights, size = magnitude(wide, **options)
        eps = contract.EPS[loss.dtype]
        _close(loss, expected, (weights * size).sum() * ADDITIONS / 2 * eps + expected.abs() * eps)
        # One token's slope, then one rounding to the input's dtype; below its smallest normal, one subnormal.
        rounding = (
            contract.EPS[dtype] * e_logprobs.abs() + torch.finfo(dtype).smallest_normal * contract.EPS[dtype]
        )
        _close(d_logprobs, e_logprobs, weights * size * 4 * eps + rounding)
        _close(d_entropy, e_entropy, 2 * contract.EPS[dtype] * e_entropy.abs() + torch.finfo(dtype).tiny)


@pytest.mark.parametrize("objective", _named(OBJECTIVES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_metrics_equal_float64_reference(backend, dtype, objective):
    b = batch((6, 70), dtype)
    metrics = b.loss(objective=objective, **FULL).metrics
    expected = _reference(b, objective=objective, **FULL).metrics
    assert metrics.keys() == expected.keys()
    eps = contract.EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    x = (b.logprobs.double() - b.old_logprobs.double()).abs().amax()
    y = (b.logprobs.double() - b.ref_logprobs.double()).abs().amax()
    # Every term of every metric is below e^|x| + |x| + 1 (x the larger log-ratio) and has the error of
    # `magnitude`; they are averaged.
    top = torch.maximum(x, y)
    bound = (top.exp() + top + 1) * (4 + top) * ADDITIONS / 2 * eps
    for name, value in metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        if name.startswith("clip_ratio") or name in ("tokens", "clamped"):
            _close(value * b.mask.sum(), expected[name] * b.mask.sum(), 1e-3)  # counts
        else:
            _close(value, expected[name], bound)


def test_metrics_by_hand(backend):
    """Ratios 2, 0.5, 1, 2, 3 and advantages +1, -1, +1, -1, -1 at bounds (0.8, 1.2), dual clip 2.5."""
    ratio, A = (
        torch.tensor([[2.0, 0.5, 1.0, 2.0, 3.0, 9.0]]).double(),
        torch.tensor([[1.0, -1, 1, -1, -1, 9]]).double(),
    )
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    loss, metrics = rf.policy_loss(ratio.log(), ratio.log() * 0, A, mask, objective=PPOClip(dual_clip=2.5))
    assert loss.item() == pytest.approx((-1.2 + 0.8 - 1 + 2 + 2.5) / 5, rel=1e-14)
    wanted = {"tokens": 5, "clip_ratio/low": 0.2, "clip_ratio/high": 0.2, "clip_ratio/dual": 0.2,
              "ratio/mean": 8.5 / 5, "ratio/max": 3, "clamped": 0}  # fmt: skip
    for name, value in wanted.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-14), name
    logs = ratio[0, :5].log()
    assert metrics["approx_kl/k1"].item() == pytest.approx(-logs.mean().item(), rel=1e-13)
    assert metrics["approx_kl/k3"].item() == pytest.approx((ratio[0, :5] - 1 - logs).mean().item(), rel=1e-13)


@pytest.mark.parametrize("objective", _named(OBJECTIVES))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 11.0])
def test_equals_the_printed_equation(backend, objective, aggregation, denominator):
    b = batch((5, 9), torch.float64)
    b = replace(
        b, mask=b.mask & (torch.arange(5) != 2)[:, None]
    )  # a row without counting tokens is no sequence
    options = _options(aggregation, **FULL)
    options["denominator"] = denominator or options["denominator"]
    for estimator in KL:
        for gradient in ("value", "ratio"):
            kl = {"kl_estimator": estimator, "kl_gradient": gradient}
            actual = b.loss(objective=objective, **options, **kl).loss
            # About 100 float64 operations on terms of size 10.
            torch.testing.assert_close(actual, formula(b, objective, **options, **kl), rtol=1e-13, atol=1e-13)
            leaf = b.logprobs.clone().requires_grad_()
            (expected,) = torch.autograd.grad(
                formula(replace(b, logprobs=leaf), objective, **options, **kl), leaf
            )
            slopes = b.gradients(objective=objective, **options, **kl)[1]
            torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("objective", _named(OBJECTIVES))
@pytest.mark.parametrize("gradient", ["value", "ratio"])
def test_gradcheck(backend, objective, gradient):
    b = batch((2, 5) if backend == "cpu" else (1, 4), torch.float64)
    for estimator in KL if backend == "cpu" else ("k3",):  # the others equal the reference, above
        contract.assert_gradcheck(
            lambda logprobs, entropy, estimator=estimator: (
                replace(b, logprobs=logprobs, entropy=entropy)
                .loss(
                    objective=objective,
                    kl_coef=0.3,
                    entropy_coef=0.2,
                    kl_estimator=estimator,
                    kl_gradient=gradient,
                )
                .loss
            ),
            b.logprobs,
            b.entropy,
        )


@pytest.mark.parametrize("estimator", KL)
@pytest.mark.parametrize("on_policy", [False, True])
def test_kl_gradients_in_closed_form(backend, estimator, on_policy):
    """Advantages 0 leave the KL term alone; x = log p - log ref, r = p / p_old."""
    b = batch((4, 9), torch.float64)
    b = replace(b, advantages=b.advantages * 0, importance=None, entropy=None)
    x, r = b.logprobs - b.ref_logprobs, torch.exp(b.logprobs - b.old_logprobs)
    if on_policy:
        b, r = replace(b, old_logprobs=None), torch.ones_like(r)
    k = KL[estimator](x)
    slope = {"k1": torch.ones_like(x), "k2": x, "k3": 1 - torch.exp(-x), "abs": x.sign()}[estimator]
    weights = token_weights(b.mask, "token_mean", None)
    wanted = {"value": (k, slope), "k2": (k, x), "ratio": (r * k, r * (k + slope))}
    for gradient, (value, derivative) in wanted.items():
        loss, d_logprobs = b.gradients(kl_coef=0.7, kl_estimator=estimator, kl_gradient=gradient)
        torch.testing.assert_close(loss, 0.7 * (weights * value).sum(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(d_logprobs, 0.7 * weights * derivative, rtol=1e-12, atol=1e-14)


def test_k3_keeps_its_digits_near_zero(backend):
    """exp(-x) - 1 + x of x = 2e-3 is 2e-6; computed as written in float32 it would lose half of its digits."""
    logprobs = torch.full((1, 40), -1.0)
    ref = logprobs - 2e-3
    x = (logprobs.double() - ref.double())[0, 0]
    kl = rf.policy_loss(logprobs, None, torch.zeros(1), torch.ones(1, 40).bool(), ref_logprobs=ref).metrics[
        "kl"
    ]
    # The sum of expm1(-x) and x rounds at eps |x|, against x^2 / 2.
    assert abs(kl.item() - (torch.expm1(-x) + x).item()) <= 2 * contract.EPS[torch.float32] * x.item()


def test_on_policy_ratio_is_one_with_a_live_gradient(backend):
    b = replace(batch((3, 9), torch.float64, full=False), old_logprobs=None)
    weights = token_weights(b.mask, "token_mean", None)
    for objective in OBJECTIVES:
        loss, d_logprobs = b.gradients(objective=objective)
        expected = surrogate(objective, b.logprobs, torch.ones_like(b.logprobs), b.advantages)
        torch.testing.assert_close(loss, (weights * expected).sum(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(d_logprobs, -weights * b.advantages, rtol=1e-13, atol=0)
        metrics = b.loss(objective=objective).metrics
        assert (
            metrics["ratio/mean"].item(),
            metrics["ratio/max"].item(),
            metrics["approx_kl/k3"].item(),
        ) == (1, 1, 0)


@pytest.mark.parametrize(
    "bounds", _named([PPOClip(1.0, 1.2), PPOClip(0.8, 1.0), PPOClip(0.8, 1.0, ratio_cap=1.0)])
)
def test_gradient_at_a_bound_is_the_one_inside(backend, bounds):
    logprobs = torch.full((2, 3), -1.0).double()
    A, mask = torch.tensor([1.0, -1.0]).double(), torch.ones(2, 3).bool()
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = rf.policy_loss(leaf, logprobs, A, mask, objective=bounds)
    loss.backward()
    torch.testing.assert_close(leaf.grad, (-A / 6)[:, None].expand(2, 3), rtol=1e-15, atol=0)
    assert all(metrics[f"clip_ratio/{name}"] == 0 for name in ("low", "high", "dual"))


@pytest.mark.parametrize("x", [-21.0, 21.0, -1e4, 1e4])
def test_log_ratio_is_clamped_without_gradient(backend, x):
    logprobs = torch.tensor([[x, -1.0]])
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    wide_open = PPOClip(0.0, float("inf"))
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = rf.policy_loss(
        leaf, zeros, torch.ones(1), mask, objective=wide_open, ref_logprobs=zeros, kl_coef=0.5
    )
    loss.backward()
    assert leaf.grad[0, 0] == 0
    assert leaf.grad[0, 1] != 0
    assert metrics["clamped"] == 1
    clamped = rf.policy_loss(
        logprobs.clamp(-20, 20),
        zeros,
        torch.ones(1),
        mask,
        objective=wide_open,
        ref_logprobs=zeros,
        kl_coef=0.5,
    )
    contract.assert_bitwise(loss.detach(), clamped.loss)
    contract.assert_bitwise(metrics["ratio/max"], clamped.metrics["ratio/max"])


@pytest.mark.parametrize("objective", _named(OBJECTIVES))
@pytest.mark.parametrize("on_policy", [False, True])
def test_a_forbidden_token_stays_put(backend, objective, on_policy):
    b = batch((2, 9), torch.float64)
    b = replace(b, mask=torch.ones(2, 9).bool(), old_logprobs=None if on_policy else b.old_logprobs)
    b.logprobs[1, 4] = float("-inf")
    loss, d_logprobs, _ = b.gradients(objective=objective, **FULL)
    assert bool(loss.isfinite())
    assert bool(d_logprobs.isfinite().all())
    assert d_logprobs[1, 4] == 0
    assert int((d_logprobs != 0).sum()) > 0
    with rf.use_backend("reference"):
        expected, e_logprobs, _ = b.gradients(objective=objective, **FULL)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_logprobs, e_logprobs, rtol=1e-12, atol=1e-14)


def test_reinforce_and_ppo_agree_on_policy(backend):
    """At r = 1 both have the policy gradient -A w."""
    b = replace(batch((3, 40), full=False), old_logprobs=None)
    contract.assert_bitwise(b.gradients(objective=PPOClip())[1], b.gradients(objective=Reinforce())[1])


def test_backward_twice_adds_up(backend):
    """A plain backward hands out the saved gradient itself; nothing else may write to it."""
    b = batch((3, 20))
    expected = b.gradients(**DUAL)[1]
    leaf = b.logprobs.clone().requires_grad_()
    loss = replace(b, logprobs=leaf).loss(**DUAL).loss
    loss.backward(retain_graph=True)
    contract.assert_bitwise(leaf.grad, expected)
    loss.backward(retain_graph=True)
    contract.assert_bitwise(leaf.grad, 2 * expected)
    loss.backward()
    contract.assert_bitwise(leaf.grad, 3 * expected)


def test_gradient_is_differentiable_in_the_upstream_one(backend):
    b = batch((3, 20), torch.float64)
    leaf, upstream = (
        b.logprobs.clone().requires_grad_(),
        torch.ones((), dtype=torch.float64, requires_grad=True),
    )
    loss = replace(b, logprobs=leaf).loss(**DUAL).loss
    (gradient,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
    (slope,) = torch.autograd.grad(gradient.sum(), upstream)
    torch.testing.assert_close(slope, b.gradients(**DUAL)[1].sum(), rtol=1e-14, atol=1e-15)


def test_metrics_are_a_mapping(backend):
    b = batch((3, 20))
    metrics = b.loss(**DUAL).metrics
    assert list(metrics) == list(metrics.keys())
    assert len(metrics) == 14
    assert "kl" in metrics
    assert "loss" not in metrics
    assert dict(metrics).keys() == metrics.keys()
    assert set(replace(b, ref_logprobs=None, importance=None, entropy=None).loss().metrics) == {
        name for name in metrics if name.split("/")[0] not in ("kl", "importance", "entropy")
    }
    with pytest.raises(KeyError):
        metrics["loss"]
    assert "clip_ratio/low" in repr(metrics)
