"""What half precision could lose in linear_token_logprobs, and what a caller could change behind its back."""

import pytest
import torch

import react_fast as rf

from . import contract


def _slopes(loss, *leaves):
    return [x.double() for x in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_all_embeddings_share_cancels_in_the_entropy(dtype, shift):
    """A head whose rows have a mean in common: it moves no probability, and so no entropy.

    Beside the error of materialised logits: the weights p_j and p_j d_j of the two sums are rounded on their own,
    each by up to u, which the mean multiplies; errors of many tokens add like random ones, held at 4 deviations.
    """
    rows, dim, vocab = 100, 64, 6000
    hidden = (torch.randn(rows, dim) / 8).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim) * 0.3 + shift).to(dtype)
    ids, g = torch.randint(0, vocab, (rows,)), torch.randn(rows)

    def eager(h, w):
        logits = h @ w.T
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        return -(log_p.exp() * log_p).sum(-1), log_p

    entropy = rf.linear_token_logprobs(hidden, weight, ids, return_entropy=True)[1]
    (ours,) = _slopes((g * entropy).sum(), hidden)
    (theirs,) = _slopes((g * eager(hidden, weight)[0]).sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    exact, log_p = eager(wide, weight.double())
    (expected,) = _slopes((g.double() * exact).sum(), wide)
    d = (log_p - log_p.amax(-1, keepdim=True)).detach()
    p = log_p.detach().exp()
    mean = (p * d).sum(-1, keepdim=True)
    rounding = contract.EPS[dtype] / 2 * (p**2 * (d**2 + mean**2)).sum(-1).sqrt()
    share = float((g * rounding).norm()) * float(weight.double().mean(0).norm())
    assert float((ours - expected).norm()) <= 2 * float((theirs - expected).norm()) + 4 * share


@pytest.mark.parametrize("upstream", [1 / 65536, 1 / 4096, 1.0, 7e4])
@pytest.mark.parametrize("sum_apart", [False, True], ids=["grad", "main_grad"])
def test_float16_weight_gradient_at_any_loss_scale(upstream, sum_apart):
    """d loss / d logits is written in units of the largest slope: 1 / n times a probability and a loss scale above
    float16's range both stay. The result itself is float16, or float32 in main_grad."""
    hidden, ids = torch.randn(64, 16).half() / 16, torch.randint(500, (64,))
    weight = (torch.randn(500, 16) / 8).half().requires_grad_()
    main_grad = torch.zeros(500, 16) if sum_apart else None
    loss = (rf.linear_token_logprobs(hidden, weight, ids, main_grad=main_grad) * upstream).sum()
    loss.backward()
    wide = weight.detach().double().requires_grad_()
    (expected,) = _slopes((rf.linear_token_logprobs(hidden.double(), wide, ids) * upstream).sum(), wide)
    found = (weight.grad if main_grad is None else main_grad).double()
    # Logits, their gradient and the product are each rounded once; below 2^-14 float16 has steps of 2^-24.
    steps = 0.0 if sum_apart else 2.0**-25 * expected.numel() ** 0.5
    assert (
        float((found - expected).norm()) <= 2 * contract.EPS[torch.float16] * float(expected.norm()) + steps
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_float16_policy_loss_at_any_advantage(scale):
    """The same for advantages far from 1, under an upstream gradient that brings the result into range."""
    hidden, ids = (torch.randn(64, 16) / 16).half(), torch.randint(500, (64,))
    weight = (torch.randn(500, 16) / 8).half().requires_grad_()
    advantages, mask = scale * torch.randn(64), torch.ones(64, dtype=torch.bool)
    loss = rf.linear_policy_loss(hidden, weight, ids, None, advantages, mask).loss
    (found,) = _slopes(loss / scale, weight)
    wide = weight.detach().double().requires_grad_()
    loss = rf.linear_policy_loss(hidden.double(), wide, ids, None, advantages.double(), mask).loss
    (expected,) = _slopes(loss / scale, wide)
    steps = 2.0**-25 * expected.numel() ** 0.5
    assert (
        float((found - expected).norm()) <= 2 * contract.EPS[torch.float16] * float(expected.norm()) + steps
    )


@pytest.mark.parametrize("name", ["token_ids", "temperature"])
def test_what_the_backward_reads_may_not_change(name):
    given = {"token_ids": torch.randint(9, (6,)), "temperature": torch.rand(6, dtype=torch.float64) + 0.5}
    weight = torch.randn(9, 4, requires_grad=True)
    logp = rf.linear_token_logprobs(torch.randn(6, 4), weight, **given)
    given[name].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.parametrize("support", [None, (torch.tensor([1, 4]), torch.tensor([0, 1, 2, 2]))])
def test_hidden_states_of_no_dimension(support):
    """Every logit is 0: a uniform distribution over the vocabulary, or over the kept set."""
    leaves = torch.zeros(3, 0, requires_grad=True), torch.zeros(5, 0, requires_grad=True)
    logp = rf.linear_token_logprobs(*leaves, torch.tensor([0, 1, 2]), support=support)
    kept = torch.tensor([5.0, 5.0, 5.0] if support is None else [2.0, 2.0, 1.0])
    torch.testing.assert_close(logp.detach(), -kept.log(), rtol=1e-6, atol=0)
    logp.sum().backward()


def test_sparse_and_shared_memory_are_refused():
    hidden, weight, ids = torch.ones(2, 3), torch.ones(5, 3, requires_grad=True), torch.tensor([0, 1])
    for given in (
        (hidden.to_sparse(), weight),
        (hidden, weight.detach().to_sparse()),
        (hidden.to_mkldnn(), weight),
    ):
        with pytest.raises(TypeError, match=r"^(hidden|weight) must be dense, got a tensor of layout"):
            rf.linear_token_logprobs(*given, ids)
    for main_grad in (torch.zeros(1, 3).expand(5, 3), weight.detach()):
        with pytest.raises(ValueError, match="main_grad must be memory of its own"):
            rf.linear_token_logprobs(hidden, weight, ids, main_grad=main_grad)
    with pytest.raises(ValueError, match="main_grad must be None for a weight that requires no gradient"):
        rf.linear_token_logprobs(hidden, weight.detach(), ids, main_grad=torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_half_precision_gemms_nothing_but_inputs_and_results_is_rounded(monkeypatch, dtype):
    """Tiles are float32 then, logits and their gradients too, under autocast as well."""
    monkeypatch.setattr(rf.ops._tiles, "_half_gemms", lambda kind: False)
    hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((64, 16), (500, 16), (500,)))
    ids, upstream = torch.randint(500, (64,)), torch.rand(64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logp, entropy = rf.linear_token_logprobs(*leaves[:2], ids, bias=leaves[2], return_entropy=True)
        found = _slopes((logp * upstream + entropy).sum(), *leaves)
    expected, uncertainty = rf.linear_token_logprobs(*wide[:2], ids, bias=wide[2], return_entropy=True)
    for x, y in zip((logp, entropy), (expected, uncertainty), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)
    for x, y in zip(found, _slopes((expected * upstream + uncertainty).sum(), *wide), strict=True):
        assert (x.double() - y).norm() <= contract.EPS[dtype] * y.norm()
