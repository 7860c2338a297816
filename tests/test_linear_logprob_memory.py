"""What linear_token_logprobs keeps, reuses and writes: kept logits, main_grad, a CUDA graph's capture."""

import pytest
import torch

import react_fast as rf

from . import contract
from .test_linear_logprob import Gemms, _all, _call, _case

VOCAB = 20000


@pytest.mark.parametrize(
    ("mib", "rows", "dim", "gemms"),
    [
        (0, 64, 13, 4.0),
        (0, 64, 16, 3 + (VOCAB - 4096) / VOCAB),
        (0, 64, 64, 3.0),
        (0, 20, 64, 3.0),
        (3, 64, 16, 3 + (VOCAB - 3 * 4096) / VOCAB),
        (8, 64, 16, 3.0),
    ],
)
def test_kept_logits_save_their_gemm(monkeypatch, mib, rows, dim, gemms):
    """A MiB holds one tile of 4096 columns of 64 float32 rows; tiles of one MiB. The memory of the weight's
    gradient holds 20000 D logits; with D 13 less than a tile of 64 rows."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    monkeypatch.setenv("REACT_FAST_KEEP_MIB", str(mib))
    h, w = torch.randn(rows, dim, requires_grad=True), torch.randn(VOCAB, dim, requires_grad=True)
    with Gemms(rows * dim * VOCAB) as counted:
        logp = rf.linear_token_logprobs(h, w, torch.zeros(rows, dtype=torch.int64))
        found = torch.autograd.grad(logp.sum(), (h, w), retain_graph=True)
    assert counted.count == pytest.approx(gemms, abs=1e-12)
    for a, b in zip(found, torch.autograd.grad(logp.sum(), (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the second computes logits again


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [8, 90])
def test_logits_in_the_memory_of_the_gradient_change_nothing(monkeypatch, dim, dtype, blocks):
    """More rows than D and fewer; with tiles of a third of the rows, a tile's gradient is a sum of three."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    leaves, ids, options = _case((60, dim, 9000), "softcap", dtype)
    options["mask"] = torch.arange(60) % 7 != 0

    def slopes(**more):
        given = leaves["hidden"], leaves["weight"]
        logp = _call(leaves, ids, options | more, entropy=False)
        loss = (logp * (torch.arange(len(ids)) % 3)).sum()
        with monkeypatch.context() as backward:
            if blocks > 1:
                backward.setattr(rf.ops._tiles, "budget", lambda device: 20 * 2048 * dtype.itemsize)
            return torch.autograd.grad(loss, given, allow_unused=True)

    d_hidden, d_weight = slopes()
    total = torch.zeros(9000, dim, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    again, none = slopes(main_grad=total)  # lends nothing
    assert none is None
    contract.assert_bitwise(d_hidden, again)
    # The GEMMs of other shapes round on their own, and the result once more to its dtype.
    near = 16 * contract.EPS[dtype]
    assert float((d_weight.double() - total.double()).norm()) <= near * float(total.double().norm())


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("invariant", [False, True])
def test_kept_logits_change_nothing(monkeypatch, name, invariant):
    """Twice backward from one graph, some rows without upstream gradient; 2 MiB keep a part of the columns."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    leaves, ids, options = _case((60, 8, 9000), name)
    options["batch_invariant"] = invariant

    def slopes():
        logp, entropy = _call(leaves, ids, options)
        upstream = torch.arange(len(ids), dtype=torch.float64) % 3
        mixture = (logp * upstream).sum() + (entropy * (upstream - 1).clamp_min(0)).sum()
        given = list(leaves.values())
        first = torch.autograd.grad(mixture, given, retain_graph=True)
        second = torch.autograd.grad(
            mixture, given, retain_graph=True
        )  # logits in the gradient's memory are gone
        for a, b, c in zip(first, second, torch.autograd.grad(mixture, given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            contract.assert_bitwise(b, c)
        return first

    expected = slopes()
    monkeypatch.setenv("REACT_FAST_KEEP_MIB", "2")
    for a, b in zip(slopes(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bad_workspace_is_refused(monkeypatch):
    monkeypatch.setenv("REACT_FAST_KEEP_MIB", "-1")
    w = torch.ones(5, 3, requires_grad=True)
    with pytest.raises(
        ValueError, match="REACT_FAST_KEEP_MIB must be a whole number of MiB from 0 up, got '-1'"
    ):
        rf.linear_token_logprobs(torch.ones(2, 3), w, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_takes_the_sum(monkeypatch, dtype):
    """Three micro-batches into one float32 sum equal the gradient of all; weight.grad stays None."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    leaves, ids, _ = _case((90, 16, 5000), "plain", dtype)
    h, w = leaves["hidden"], leaves["weight"]
    total = torch.zeros(w.shape)
    for part in torch.arange(90).split(30):
        rf.linear_token_logprobs(h[part], w, ids[part], main_grad=total).sum().backward()
    assert w.grad is None
    assert h.grad is not None
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    (exact,) = torch.autograd.grad(_call(wide, ids, {}, entropy=False).sum(), wide["weight"])
    (whole,) = torch.autograd.grad(_call(leaves, ids, {}, entropy=False).sum(), w)
    ours, theirs = (float((x.double() - exact).norm() / exact.norm()) for x in (total, whole))
    # The GEMMs round as those of one batch do; the sum adds a float32 rounding a micro-batch.
    assert ours <= 1.5 * theirs + 3 * contract.EPS[torch.float32]


def test_main_grad_may_be_the_gradient_itself():
    leaves, ids, options = _case((9, 4, 30), "everything")
    expected = _all(leaves, ids, options)
    w = leaves["weight"]
    w.grad = torch.ones_like(w)
    logp, entropy = rf.linear_token_logprobs(
        **leaves, token_ids=ids, return_entropy=True, main_grad=w.grad, **options
    )
    ((logp * torch.arange(1, len(ids) + 1)).sum() + (entropy**2).sum()).backward()
    torch.testing.assert_close(w.grad, 1 + expected[3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaves["bias"].grad, expected[4], rtol=1e-12, atol=1e-12)


W = torch.ones(5, 3)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (torch.ones(4, 3), ValueError, r"main_grad must be \[5, 3\] like weight, got \[4, 3\]"),
        (torch.ones(5, 3).bfloat16(), TypeError, "main_grad must be float32 like the sums, got bfloat16"),
        (torch.ones(5, 3, device="meta"), ValueError, "main_grad must be on cpu like weight, got meta"),
        (torch.ones(5, 3, requires_grad=True), ValueError, "main_grad must not require a gradient"),
        ("grad", TypeError, "main_grad must be a torch.Tensor, got str"),
    ],
)
def test_bad_main_grad_is_refused(given, error, text):
    with pytest.raises(error, match=text):
        rf.linear_token_logprobs(torch.ones(2, 3), W, torch.zeros(2, dtype=torch.int64), main_grad=given)


def test_capture_keeps_every_row_and_gives_the_same(monkeypatch):
    """Inside the capture of a CUDA graph rows cannot be counted: the masked ones are computed and dropped."""
    leaves, ids, options = _case((9, 4, 30), "everything")
    with torch.no_grad():
        leaves["hidden"][~options["mask"]] = float("nan")
    expected = _all(leaves, ids, options)
    monkeypatch.setattr(rf.ops._tiles, "capturing", lambda device: True)
    for f, e in zip(_all(leaves, ids, options), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
