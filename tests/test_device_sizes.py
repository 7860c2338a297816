"""Sizes at which a device does what the interpreter does at smaller ones: rows in chunks and blocks, wide rows,
heads cut over programs. On the CPU the same properties at sizes that the interpreter takes in a moment."""

import pytest
import torch

import react_fast as rf

from . import contract

GPU = contract.DEVICE == "cuda"
# Beyond kernels/advantage_chunks.py's LONG_ROW; three blocks of a walk; several chunks of a row of logits; several
# blocks of a head, of fewer rows than twice an H100's multiprocessors, and of more.
LONG, ROW, VOCAB, HEAD, MANY = (9001, 2500, 70_001, 4100, 300) if GPU else (70, 40, 600, 2100, 6)
# float32 sums of returns: some hundred terms of size 4 that count, each rounded once.
CLOSE = {"rtol": 1e-5, "atol": 100 * 4 * contract.EPS[torch.float32]}


def _steps(length, rows=2):
    rewards, values = torch.randn(2, rows, length).unbind()
    return rewards, values, torch.rand(rows, length) < 0.8


@pytest.mark.parametrize("masked", [False, True])
def test_few_long_rows(backend, masked):
    rewards, values, mask = _steps(LONG)
    options = {"gamma": 0.99, "lam": 0.95, **({"mask": mask} if masked else {})}
    for found, exact in zip(
        rf.gae(rewards, values, **options),
        contract.reference(rf.gae, rewards, values, **options),
        strict=True,
    ):
        torch.testing.assert_close(found, exact.float(), **CLOSE)


def test_packed_rows_of_several_blocks(backend):
    rewards, values, mask = (x[0] for x in _steps(ROW, rows=1))
    cu_seqlens = torch.tensor([0, 1, ROW // 2, ROW // 2, ROW])
    options = {"gamma": 0.99, "lam": 0.95, "cu_seqlens": cu_seqlens}
    found = rf.gae(rewards, values, mask=mask, **options)
    exact = contract.reference(rf.gae, rewards, values, mask=mask, **options)
    torch.testing.assert_close(found[0], exact[0].float(), **CLOSE)


def test_off_policy_rows_of_several_blocks(backend):
    rewards, values, mask = _steps(ROW)
    given = (rewards, values, 0.3 * torch.randn(2, ROW))
    for op, more in ((rf.vtrace, ()), (rf.retrace, (0.3 * torch.randn(2, ROW),))):
        found = op(*given, *more, gamma=0.99, lam=0.9, mask=mask)
        exact = contract.reference(op, *given, *more, gamma=0.99, lam=0.9, mask=mask)
        for a, e in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, exact)), strict=True):
            torch.testing.assert_close(a, e.float(), **CLOSE)


def test_scan_of_several_blocks_and_its_gradient(backend):
    a, b = torch.rand(2, ROW), torch.randn(2, ROW)
    given = [x.clone().requires_grad_() for x in (a, b)]
    wide = [x.double().requires_grad_() for x in (a, b)]
    upstream = torch.randn(2, ROW)
    found = rf.reverse_linear_scan(*given)
    exact = contract.reference(rf.reverse_linear_scan, *wide)
    torch.testing.assert_close(found, exact.float(), **CLOSE)
    slopes = torch.autograd.grad(exact, wide, upstream.double())
    for found_slope, slope in zip(torch.autograd.grad(found, given, upstream), slopes, strict=True):
        torch.testing.assert_close(found_slope, slope.float(), **CLOSE)


@pytest.mark.parametrize("count", [1, 20_001 if GPU else 101])
def test_whitening_over_many_blocks(backend, count):
    x, mask = 3 + torch.randn(count, 7), torch.rand(count, 7) < 0.9
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    upstream = torch.randn(count, 7)
    with rf.use_backend("reference"):
        exact = rf.whiten(wide, mask=mask)
    found = rf.whiten(x, mask=mask)
    torch.testing.assert_close(found, exact.float(), **CLOSE)
    (slope,) = torch.autograd.grad(found, x, upstream)
    (exact_slope,) = torch.autograd.grad(exact, wide, upstream.double())
    torch.testing.assert_close(slope, exact_slope.float(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows(backend, dtype):
    logits = (2 * torch.randn(3, VOCAB)).to(dtype).requires_grad_()
    ids = torch.tensor([0, VOCAB - 1, VOCAB // 2])
    wide = logits.detach().double().requires_grad_()
    exact = torch.log_softmax(wide, -1).gather(-1, ids[:, None])[:, 0]
    found = rf.token_logprobs(logits, ids)
    torch.testing.assert_close(found, exact.float(), rtol=1e-6, atol=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    # One rounding to the dtype, on top of that of exponents below 20 in float32.
    rtol = contract.EPS[dtype] + 20 * contract.EPS[torch.float32]
    torch.testing.assert_close(slope.double(), exact_slope, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("rows", [3, MANY])
@pytest.mark.parametrize("trained", [False, True])
def test_heads_of_several_blocks(backend, rows, trained):
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(HEAD, 16, requires_grad=trained)
    ids = torch.randint(0, HEAD, (rows,))
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)]
    log_p = torch.log_softmax(wide[0] @ wide[1].T, -1)
    exact = log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    found = rf.linear_token_logprobs(hidden, weight, ids, return_entropy=True)
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-5, atol=1e-4)
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    slopes = torch.autograd.grad(sum(exact).sum(), [x for x in wide if x.requires_grad])
    for a, e in zip(torch.autograd.grad(sum(found).sum(), leaves), slopes, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-4)
