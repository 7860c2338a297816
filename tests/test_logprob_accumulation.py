"""Gradients in training: accumulated over micro-batches, of parts of the inputs, for odd upstream gradients."""

import pytest
import torch

import react_fast as rf

from . import contract
from .oracle import from_hidden, from_logits

BATCHES, ROWS, DIM, VOCAB = 64, 24, 16, 2100  # one fold unit and a tail


def _batches():
    hidden = torch.randn(BATCHES, ROWS, DIM).bfloat16()
    weight = torch.randn(VOCAB, DIM).bfloat16().float()  # exact in both, so that only sums can differ
    ids, advantages = torch.randint(VOCAB, (BATCHES, ROWS)), torch.randn(BATCHES, ROWS)
    return hidden, weight, ids, advantages


def _accumulated(hidden, weight, ids, advantages):
    """weight.grad of float32 masters under bfloat16 autocast, one backward a leading index."""
    leaf = weight.clone().requires_grad_()
    for h, y, a in zip(hidden, ids, advantages, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logp = rf.linear_token_logprobs(h, leaf, y)
        (a * logp).sum().backward()
    return leaf.grad


def test_64_micro_batches_drift_no_more_than_their_own_rounding():
    """No further from float64 than the sum of what each micro-batch alone is off, and float32 additions."""
    hidden, weight, ids, advantages = _batches()
    found = _accumulated(hidden, weight, ids, advantages)
    leaf, alone, sizes = weight.double().requires_grad_(), 0.0, 0.0
    exact = torch.zeros_like(leaf)
    for i in range(BATCHES):
        logp, _ = from_hidden(hidden[i].double(), leaf, ids[i])
        (slope,) = torch.autograd.grad((advantages[i] * logp).sum(), leaf)
        one = _accumulated(hidden[i : i + 1], weight, ids[i : i + 1], advantages[i : i + 1])
        exact, alone, sizes = exact + slope, alone + (one.double() - slope), sizes + one.double().abs()
    # 63 additions, each half an ulp of a partial sum that is at most the sum of sizes.
    additions = (BATCHES - 1) * contract.EPS[torch.float32] / 2 * sizes
    assert bool(((found.double() - exact - alone).abs() <= additions).all())
    # The bfloat16 roundings of 64 micro-batches are independent, so that together they are as large as those of
    # one batch of all rows; over 33600 elements the two norms agree within 1 / sqrt(33600), half a percent.
    whole = _accumulated(hidden.reshape(1, -1, DIM), weight, ids.reshape(1, -1), advantages.reshape(1, -1))
    assert float((found - exact).norm()) <= 1.03 * float((whole - exact).norm()) + float(additions.norm())


def test_blocks_of_rows_are_summed_in_float32(monkeypatch):
    """64 blocks of rows of one sign: a bfloat16 sum of them would lose half an ulp of the total each time."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")  # 256 rows of bfloat16 and one fold unit
    rows, vocab = 16384, 2048
    hidden = (torch.rand(rows, 8) + 0.1).bfloat16()
    leaf = (0.01 * torch.randn(vocab, 8)).bfloat16().requires_grad_()
    ids, g = torch.zeros(rows, dtype=torch.int64), torch.rand(rows) + 0.5
    (slope,) = torch.autograd.grad((g * rf.linear_token_logprobs(hidden, leaf, ids)).sum(), leaf)
    z = hidden.double() @ leaf.detach().double().T
    own = g.double() * -torch.expm1(torch.log_softmax(z, -1)[:, 0])
    exact = own @ hidden.double()  # the chosen token's row; all terms are positive, so sizes add up to it
    # Half a bfloat16 ulp each for d loss / d logit, for a block's product on the CPU and for the result. The
    # logits' own rounding moves 1 - p by p = 1 / 2048 of that; float32 sums by less: a hundredth for both.
    bound = 3.03 * contract.EPS[torch.bfloat16] / 2 * exact
    assert bool(((slope[0].double() - exact).abs() <= bound).all())


# Upstream gradients as losses make them: one number for all rows, a broadcast, a strided view, mostly zeros.
UPSTREAM = {
    "expanded": lambda n: torch.tensor(0.7).expand(n),
    "strided": lambda n: torch.randn(n, 2)[:, 0],
    "reversed": lambda n: torch.randn(n).flip(0),
    "mostly zero": lambda n: torch.where(torch.arange(n) % 5 == 0, torch.randn(n), 0.0),
    "all zero": lambda n: torch.zeros(n),
}


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_upstream_gradients(upstream):
    hidden, weight = torch.randn(20, 6).double(), torch.randn(50, 6).double()
    ids, g = torch.randint(50, (20,)), upstream(20).double()
    given = [x.clone().requires_grad_() for x in (hidden, weight)]
    found = torch.autograd.grad(rf.linear_token_logprobs(*given, ids), given, g)
    expected = torch.autograd.grad(from_hidden(*given, ids)[0], given, g.clone())
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)  # float64 sums of 50 terms
    assert not bool(found[0][g == 0].any())


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_upstream_gradients_from_logits(backend, upstream):
    logits, ids, g = (
        torch.randn(20, 50).double().requires_grad_(),
        torch.randint(50, (20,)),
        upstream(20).double(),
    )
    (found,) = torch.autograd.grad(rf.token_logprobs(logits, ids), logits, g)
    (expected,) = torch.autograd.grad(from_logits(logits, ids)[0], logits, g.clone())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not bool(found[g == 0].any())


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)], ids=str)
def test_only_some_inputs_need_a_gradient(wanted):
    """Of hidden, weight and bias; the bias alone still needs a second pass over the logits."""
    leaves = [torch.randn(9, 5).double(), torch.randn(30, 5).double(), torch.randn(30).double()]
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(leaves)]
    ids, g = torch.randint(30, (9,)), torch.randn(9).double()
    picked = [leaves[i] for i in wanted]
    logp, entropy = rf.linear_token_logprobs(*leaves[:2], ids, bias=leaves[2], return_entropy=True)
    found = torch.autograd.grad((g * logp + entropy).sum(), picked)
    logp, entropy = from_hidden(*leaves[:2], ids, bias=leaves[2])
    for f, e in zip(found, torch.autograd.grad((g * logp + entropy).sum(), picked), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rest", [0.1, 1e-2, 1e-4, 1e-7], ids=lambda x: f"p = 1 - {x:g}")
def test_confident_rows_keep_their_gradient(rest):
    """1 - p of the chosen token is -expm1(logp), so that its relative error is that of logp, not 1 / (1 - p)."""
    gap = -torch.log(torch.tensor(rest / (1 - rest) / 9, dtype=torch.float64)).float()
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.zeros(10, 2)
    weight[4] = torch.stack([gap, torch.tensor(1.0)])
    hidden.requires_grad_()
    logp = rf.linear_token_logprobs(hidden, weight, torch.tensor([4]))
    (slope,) = torch.autograd.grad(logp.sum(), hidden)
    others = 9 * torch.exp(-gap.double())
    left = others / (1 + others)  # 1 - p; d logp / d hidden = (1 - p) W_4, since the others' rows are 0
    expected = left * weight[4].double()
    torch.testing.assert_close(slope[0].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logp[0].double(), -torch.log1p(others), rtol=1e-5, atol=0)


def test_two_runs_are_bitwise_equal():
    hidden, weight, ids, _ = _batches()
    leaves = [hidden.reshape(-1, DIM).requires_grad_(), weight.bfloat16().requires_grad_()]

    def run():
        logp, entropy = rf.linear_token_logprobs(*leaves, ids.reshape(-1), return_entropy=True)
        slopes = torch.autograd.grad(logp.sum() + entropy.sum(), leaves)
        return torch.cat([x.detach().double().flatten() for x in (logp, entropy, *slopes)])

    contract.assert_bitwise(run(), run())


def test_mixed_dtypes_are_refused():
    """float32 masters with bfloat16 activations: autocast casts, the op does not guess."""
    hidden, weight, ids = torch.ones(2, 3).bfloat16(), torch.ones(5, 3), torch.tensor([0, 4])
    with pytest.raises(TypeError, match="weight must be bfloat16 like hidden, got float32"):
        rf.linear_token_logprobs(hidden, weight, ids)
    with pytest.raises(TypeError, match="bias must be bfloat16 like hidden, got float32"):
        rf.linear_token_logprobs(hidden, weight.bfloat16(), ids, bias=torch.ones(5))
