"""Few long rows in chunks: to the bit what walking them gives, in the launches that are promised."""

import pytest
import torch
from triton.runtime import interpreter

import react_fast as rf
from react_fast.kernels import advantage, advantage_chunks

from . import contract

GAMMA, LAM = 0.99, 0.95
# The interpreter's block has 16 steps: a ragged multiple of it; in the pack, rows of all lengths about a block,
# empty ones at both ends and in the middle, and one that begins and ends at a multiple of a block.
SHAPE = (2, 53)
LENGTHS = (0, 5, 16, 11, 0, 32, 37, 1, 0)


@pytest.fixture(autouse=True)
def _triton():
    with rf.use_backend("triton"):
        yield


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far."""
    seen, run = [], interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return seen


def _batch(shape, rows, dtype, every=True):
    rewards = torch.randn(shape).to(dtype)
    values = torch.randn(shape).to(dtype)
    if not every:
        return {"rewards": rewards, "values": values, "lam": LAM}
    mask = torch.rand(shape) > 0.4
    mask[..., -20:] = False
    return {
        "rewards": rewards.masked_fill(~mask, float("nan")), "values": values.masked_fill(~mask, float("nan")),
        "mask": mask, "terminated": torch.rand(shape) < 0.05, "truncated": torch.rand(shape) < 0.05,
        "bootstrap_values": torch.randn(shape).to(dtype), "last_values": torch.randn(rows).to(dtype),
        "lam": torch.rand(rows).double(),
    }  # fmt: skip


def _run(op, batch, gamma=GAMMA, **more):
    given = dict(batch)
    if op == "discounted_returns":
        del given["values"], given["lam"]
    found = getattr(rf, op)(given.pop("rewards"), gamma=gamma, **given, **more)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(
    ("op", "dtype", "every"),
    [
        ("gae", torch.float32, False),
        ("gae", torch.float32, True),
        ("gae", torch.bfloat16, True),
        ("td_lambda_returns", torch.float64, True),
        ("discounted_returns", torch.float32, True),
    ],
    ids=str,
)
def test_is_the_walk_and_the_reference(op, dtype, every, monkeypatch, launches):
    for shape, rows, more in (
        (SHAPE, SHAPE[0], {}),
        ((sum(LENGTHS),), len(LENGTHS), {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0)}),
    ):
        batch = _batch(shape, rows, dtype, every)
        walked = _run(op, batch, **more)
        launches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(advantage_chunks, "LONG_ROW", 1)
            chunked = _run(op, batch, **more)
        assert launches == ["tally_kernel", "list_kernel"] * every + ["summary_kernel", "gae_kernel"]
        with rf.use_backend("reference"):
            wide = {k: x.double() if k != "lam" and x.is_floating_point() else x for k, x in batch.items()
                    if isinstance(x, torch.Tensor)}  # fmt: skip
            expected = _run(op, {**batch, **wide}, **more)
        for c, w, e in zip(chunked, walked, expected, strict=True):
            contract.assert_bitwise(c, w)
            # Sums of some hundred discounted terms of size 1.
            tolerance = 200 * contract.EPS[w.dtype]
            torch.testing.assert_close(c.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("gamma", "lam", "steps", "bound"), [(1.0, 1.0, 131072, 1e-5), (0.999, 0.95, 16384, 2e-6)], ids=str
)
def test_long_row_keeps_its_digits(gamma, lam, steps, bound, monkeypatch, launches):
    """Float32 in the blocks of 1024 that GPUs use, relative to the largest result; the shorter row has gaps."""
    monkeypatch.setattr(advantage, "INTERPRETED_BLOCK", advantage.BLOCK)
    shape, gaps = (1, steps), gamma < 1
    rewards, values = torch.randn(shape), torch.randn(shape)
    options = {"mask": torch.rand(shape) > 0.2} if gaps else {}
    found = rf.gae(rewards, values, gamma=gamma, lam=lam, **options)
    assert launches == ["tally_kernel", "list_kernel"] * gaps + ["summary_kernel", "gae_kernel"]
    with rf.use_backend("cpu"):
        exact = rf.gae(rewards.double(), values.double(), gamma=gamma, lam=lam, **options)
    for f, e in zip(found, exact, strict=True):
        assert float((f - e).abs().max() / e.abs().max()) < bound


@pytest.mark.parametrize("shape", [(7, 33), (1, 200)], ids=["walked", "chunked"])
def test_whitened_in_two_launches(shape, monkeypatch, launches):
    """The scan and the scaling, and before them what chunks need; with a gradient too."""
    monkeypatch.setattr(advantage_chunks, "LONG_ROW", 200)
    few = ["tally_kernel", "list_kernel", "summary_kernel"] if shape[0] == 1 else []
    batch = {"rewards": torch.randn(shape), "values": torch.randn(shape), "mask": torch.rand(shape) > 0.3}
    batch |= {"gamma": GAMMA, "lam": LAM}
    advantages, returns = rf.gae(**batch)
    expected = rf.whiten(advantages, mask=batch["mask"])
    for leaf in (batch["values"], batch["values"].clone().requires_grad_()):
        launches.clear()
        found, same = rf.gae(**{**batch, "values": leaf}, whiten=True)
        assert launches == [*few, "gae_kernel", "whiten_kernel"]
        contract.assert_bitwise(same.detach(), returns)
        # The moments are other float64 sums: a rounding of the result.
        tolerance = 2 * contract.EPS[torch.float32]
        torch.testing.assert_close(found.detach(), expected, rtol=tolerance, atol=tolerance)


def test_whitened_twice_is_the_same():
    batch = {"rewards": torch.randn(30, 20), "values": torch.randn(30, 20), "gamma": GAMMA, "lam": LAM}
    contract.assert_bitwise(rf.gae(**batch, whiten=True)[0], rf.gae(**batch, whiten=True)[0])


def test_only_few_long_rows_are_chunked():
    limit = advantage_chunks.LONG_ROW
    few = advantage_chunks.ROWS.value
    assert advantage_chunks.is_long(1, limit)
    assert advantage_chunks.is_long(few, few * limit)
    assert not advantage_chunks.is_long(1, limit - 1)
    assert not advantage_chunks.is_long(few + 1, (few + 1) * limit)
    assert not advantage_chunks.is_long(few, few * limit - 1)  # the mean row counts
    assert not advantage_chunks.is_long(0, 0)
