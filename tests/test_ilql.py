"""CQL and ILQL: their papers' formulas, the float64 reference, layouts, masks and compilers."""

import pytest
import torch

import react_fast as rf
from react_fast import reference
from react_fast.ops._policy_loss import AGGREGATIONS

from . import contract

NAN, INF = float("nan"), float("inf")


def _options(aggregation):
    return {"aggregation": aggregation, "denominator": 37.0 if aggregation == "token_sum_norm" else None}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_cql_is_logsumexp_minus_q(backend, aggregation, alpha):
    q, ids, mask = (
        torch.randn(4, 9, 11, dtype=torch.float64),
        torch.randint(11, (4, 9)),
        torch.rand(4, 9) > 0.3,
    )
    mask[2] = False
    q[0, 0, 3] = -INF
    q = torch.where(mask[..., None], q, NAN).requires_grad_()
    options = {"alpha": alpha, **_options(aggregation)}
    loss = rf.cql_loss(q, ids.where(mask, -100), mask, **options)
    clean = torch.where(mask[..., None], q.detach(), 0.0).requires_grad_()
    gap = alpha * torch.logsumexp(clean / alpha, -1) - clean.gather(-1, ids[..., None]).squeeze(-1)
    gap = torch.where(mask & gap.isfinite(), gap, 0.0)
    count, rows = mask.sum(), mask.any(1).sum()
    by_row = gap.sum(1) / mask.sum(1).clamp_min(1)
    expected = {
        "token_mean": gap.sum() / count, "seq_mean_token_mean": by_row.sum() / rows,
        "seq_mean_token_sum": gap.sum() / rows, "token_sum_norm": gap.sum() / 37.0,
    }[aggregation]  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, q)
    (wanted,) = torch.autograd.grad(expected, clean)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        reference.cql_loss(clean, ids, mask, **options), expected, rtol=1e-12, atol=1e-12
    )


def test_cql_names_its_arguments(backend):
    q, ids, mask = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(4).bool()
    with pytest.raises(ValueError, match=r"^q must be \[B, T, V\] or packed \[N, V\], got \[3\]"):
        rf.cql_loss(q[0], ids[0], mask[0])
    if backend == "cpu":  # looking at ids on a GPU would wait for it
        with pytest.raises(IndexError):
            rf.cql_loss(q, ids + 3, mask)


def test_cql_of_a_forbidden_token(backend):
    """A taken token whose Q is -inf adds nothing, and no NaN to the gradient."""
    q = torch.tensor([[[0.0, 1.0, -INF], [0.5, 0.0, 0.0]]], requires_grad=True)
    mask = torch.ones(1, 2).bool()
    loss = rf.cql_loss(q, torch.tensor([[2, 1]]), mask)
    expected = (torch.logsumexp(q.detach()[0, 1], 0) - q.detach()[0, 1, 1]) / 2
    torch.testing.assert_close(loss.detach(), expected)
    (grad,) = torch.autograd.grad(loss, q)
    assert bool(grad.isfinite().all())
    assert bool((grad[0, 0] == 0).all())


# ---- ILQL ------------------------------------------------------------------------------------------------------


def _ilql_batch(shape=(4, 12), dtype=torch.float64):
    names = ("q", "other", "target", "target_other", "values", "rewards", "logp", "logp_other", "pi", "boot")
    b = {name: torch.randn(shape).to(dtype) for name in names}
    for name in ("logp", "logp_other", "pi"):
        b[name] = -b[name].abs()
    b["last"], b["mask"] = torch.randn(shape[0]).to(dtype), torch.rand(shape) > 0.3
    b |= {name: torch.rand(shape) > 0.85 for name in ("terminated", "truncated")}
    return b


TRAINED = ("q", "other", "values", "logp", "logp_other", "pi")


def _ilql(b, function=rf.ilql_loss, **options):
    return function(
        (b["q"], b["other"]), (b["target"], b["target_other"]), b["values"], b["rewards"], b["mask"], gamma=0.97,
        tau=0.8, q_coef=0.7, value_coef=1.3, q_logprobs=(b["logp"], b["logp_other"]), cql_coef=0.2,
        logprobs=b["pi"], awac_coef=0.4, awac_beta=2.0, awac_max=3.0, last_values=b["last"],
        terminated=b["terminated"], truncated=b["truncated"], bootstrap_values=b["boot"], **options,
    )  # fmt: skip


def _papers_ilql(b):
    """arXiv:2206.11871, eq. 2 and 3, and the terms that its code adds, for rows without gaps."""
    following = torch.cat([b["values"][:, 1:], b["last"][:, None]], 1).detach()
    following = torch.where(b["truncated"], b["boot"], following)
    y = b["rewards"] + 0.97 * torch.where(b["terminated"], 0.0, following)
    target = torch.minimum(b["target"], b["target_other"])
    u = target - b["values"]
    weight = (2.0 * u.detach()).exp().clamp(max=3.0)
    return (
        0.7 * (((b["q"] - y) ** 2).mean() + ((b["other"] - y) ** 2).mean())
        + 1.3 * ((0.8 - (u < 0).double()).abs() * u**2).mean()
        - 0.2 * (b["logp"].mean() + b["logp_other"].mean())
        - 0.4 * (weight * b["pi"]).mean()
    )


def test_ilql_is_the_papers_loss(backend):
    b = _ilql_batch()
    b["mask"] = torch.ones_like(b["mask"])
    leaves = {k: b[k].clone().requires_grad_() for k in TRAINED}
    found, expected = _ilql({**b, **leaves}).loss, _papers_ilql({**b, **leaves})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad(found, list(leaves.values())), torch.autograd.grad(expected, list(leaves.values())),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ilql_equals_its_reference(backend, aggregation):
    """Gaps, cuts and NaN where masked; only what is trained receives a gradient."""
    b = _ilql_batch()
    dirty = {
        k: x.masked_fill(~b["mask"], NAN) if x.is_floating_point() and x.dim() == 2 else x
        for k, x in b.items()
    }
    leaves = {k: x.clone().requires_grad_() for k, x in dirty.items() if x.is_floating_point()}
    loss, metrics = _ilql({**dirty, **leaves}, n=2, **_options(aggregation))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    trained = {k: x.clone().requires_grad_() for k, x in b.items() if k in TRAINED}
    wanted, wanted_metrics = _ilql({**b, **trained}, reference.ilql_loss, n=2, **_options(aggregation))
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert metrics.keys() == wanted_metrics.keys()
    for k, x in wanted_metrics.items():
        torch.testing.assert_close(metrics[k], x, rtol=1e-12, atol=1e-12)
        assert not metrics[k].requires_grad
    expected = dict(zip(trained, torch.autograd.grad(wanted, list(trained.values())), strict=True))
    for k, grad in zip(leaves, grads, strict=True):
        if k in TRAINED:
            torch.testing.assert_close(grad, expected[k], rtol=1e-12, atol=1e-12)
            assert bool((grad[~b["mask"]] == 0).all())
        else:
            assert grad is None or not bool(grad.any()), k


def test_ilql_in_parts(backend):
    """One head, no conservative term, no policy; packed rows are the padded ones; float32 beside bfloat16."""
    b = _ilql_batch()
    heads = b["q"], b["target"], b["values"], b["rewards"]
    plain = rf.ilql_loss(*heads, b["mask"], gamma=0.97)
    td = rf.q_loss(
        b["q"], rf.n_step_returns(b["rewards"], b["values"], gamma=0.97, n=1, mask=b["mask"]), b["mask"]
    )
    value = rf.expectile_loss(b["values"], b["target"], b["mask"], tau=0.7)
    torch.testing.assert_close(plain.loss, 2 * td.loss + value.loss, rtol=1e-12, atol=1e-12)
    assert set(plain.metrics) == {f"{a}/{k}" for a in ("q", "value") for k in td.metrics} | {
        "loss/q",
        "loss/value",
    }
    cu_seqlens = torch.tensor([0, 12, 24, 36, 48])
    flat = {k: x.flatten() for k, x in b.items()}
    packed = _ilql(flat, cu_seqlens=cu_seqlens, aggregation="seq_mean_token_mean").loss
    padded = _ilql(b, aggregation="seq_mean_token_mean").loss
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)
    narrow = [x.bfloat16() for x in heads]
    exact = rf.ilql_loss(*[x.double() for x in narrow], b["mask"], gamma=0.97).loss
    found = rf.ilql_loss(*narrow, b["mask"], gamma=0.97).loss
    torch.testing.assert_close(
        found.double(), exact, rtol=1e-5, atol=1e-5
    )  # float32 sums of 48 terms below 50
    with pytest.raises(
        ValueError, match=r"^q_logprobs must be given when cql_coef is not 0, got None and cql_coef 0.1"
    ):
        rf.ilql_loss(*heads, b["mask"], gamma=0.97, cql_coef=0.1)
    with pytest.raises(ValueError, match=r"^target_q_values must be a tensor or a pair of two, got 3"):
        rf.ilql_loss(heads[0], (heads[1],) * 3, *heads[2:], b["mask"], gamma=0.97)


def test_ilql_compiles(backend):
    b = _ilql_batch((2, 5), torch.float32)
    leaves = [b[k].clone().requires_grad_() for k in ("q", "values", "pi")]
    contract.assert_compiles(lambda q, v, p: _ilql({**b, "q": q, "values": v, "pi": p}).loss, *leaves)
    q, ids = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    contract.assert_compiles(lambda x: rf.cql_loss(x, ids, b["mask"]), q)
