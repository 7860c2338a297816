"""linear_token_logprobs with the vocabulary over processes (tp_group): what one process gives with all of it."""

import pytest
import torch
import torch.distributed as dist

import react_fast as rf

from . import contract
from .oracle import from_hidden
from .ranks import Collectives

# float64; sums of up to 4101 exponentials and 4 shards, of terms below 100: 1e-11 is 400 ulp of them.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}

OPTIONS = {
    "plain": {},
    "capped": {"softcap": 2.0, "logit_scale": 1.5},
    "everything": {"softcap": 3.0, "logit_scale": 0.5, "temperature": "row", "bias": True, "mask": True},
    "nothing counts": {"mask": False},
    "one owner": {"owner": True},
}
# Shards of the same size; what torch.chunk makes of 4099; ragged, with one row and with several fold units.
SIZES = {
    2: {"equal": (20, 20), "chunks": (2050, 2049), "ragged": (1, 4100)},
    4: {"equal": (9, 9, 9, 9), "chunks": (1025, 1025, 1025, 1024), "ragged": (3000, 1, 5, 2)},
}


def _shards(rank, world, sizes, name, group=None):
    group, options = group or dist.group.WORLD, dict(OPTIONS[name])
    vocab, rows = sum(sizes), 70
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    leaves = [torch.randn(rows, 6), torch.randn(vocab, 6), torch.randn(vocab)]
    leaves = [x.double().requires_grad_() for x in leaves[: 3 if options.pop("bias", False) else 2]]
    ids = torch.randint(sizes[0] if options.pop("owner", False) else vocab, (rows,))
    if "mask" in options:
        options["mask"] = (torch.rand(rows) > 0.3) & options["mask"]
        ids[~options["mask"]] = -100
    if options.get("temperature") == "row":
        options["temperature"] = (torch.rand(rows) + 0.5).double()
    g, h = torch.randn(2, rows).double()
    logp, entropy = from_hidden(*leaves[:2], ids, bias=leaves[2] if leaves[2:] else None, **options)
    slopes = torch.autograd.grad((g * logp + h * entropy).sum(), leaves)
    own = [x.detach()[part if i else slice(None)].clone().requires_grad_() for i, x in enumerate(leaves)]
    with Collectives() as forward:
        found = rf.linear_token_logprobs(
            *own[:2], ids, bias=own[2] if own[2:] else None, tp_group=group, return_entropy=True, **options
        )
    with Collectives() as backward:
        grads = torch.autograd.grad((g * found[0] + h * found[1]).sum(), own)
    assert (forward.count, backward.count) == (1 if len(set(sizes)) == 1 else 2, 1)
    for f, e in zip(
        (*found, *grads), (logp, entropy, slopes[0], *(x[part] for x in slopes[1:])), strict=True
    ):
        torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", ["equal", "chunks", "ragged"])
def test_vocabulary_over_processes(ranks, sizes, name):
    """One all-gather forward (two where the shards differ), one sum of hidden's gradient backward."""
    ranks.run(_shards, SIZES[ranks.world][sizes], name)


def _in_subgroup(rank, world):
    """Two groups of two: ranks count inside the group."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(rank % 2)
    _shards(rank // 2, 2, (30, 11), "everything", groups[rank % 2])


@pytest.mark.parametrize("ranks", [4], indirect=True, scope="session")
def test_vocabulary_over_a_part_of_the_processes(ranks):
    ranks.run(_in_subgroup)


def _only_what_is_needed(rank, world):
    hidden, ids = torch.randn(5, 6), torch.randint(3 * world, (5,))
    weight = torch.randn(3 * world, 6)[3 * rank : 3 * rank + 3].requires_grad_()
    logp = rf.linear_token_logprobs(hidden, weight, ids, tp_group=dist.group.WORLD)
    with Collectives() as counted:
        logp.sum().backward()
    assert counted.count == 0  # a shard's gradient concerns no one else
    with torch.no_grad(), Collectives() as counted:
        same = rf.linear_token_logprobs(hidden.requires_grad_(), weight, ids, tp_group=dist.group.WORLD)
    assert counted.count == 1
    contract.assert_bitwise(same, logp.detach())
    for wrong in (3 * world, -1):
        ids[2] = wrong
        with pytest.raises(IndexError, match=rf"token_ids must be in \[0, {3 * world}\) .*, got {wrong}"):
            rf.linear_token_logprobs(hidden, weight, ids, tp_group=dist.group.WORLD)


def test_vocabulary_over_processes_does_no_more_than_needed(ranks):
    ranks.run(_only_what_is_needed)


def _forbidden_shard(rank, world):
    """A rank whose every token is forbidden adds nothing, and no NaN."""
    size = 7
    hidden, weight = torch.randn(5, 6).double(), torch.randn(size * world, 6).double()
    bias = torch.zeros(size * world).double()
    bias[size : 2 * size] = float("-inf")
    ids = torch.tensor([0, 3, 0, 2 * size - 1, 6])
    allowed = torch.isfinite(bias)
    own = slice(rank * size, (rank + 1) * size)
    h, w = (x.clone().requires_grad_() for x in (hidden, weight[own]))
    found = rf.linear_token_logprobs(
        h, w, ids, bias=bias[own], tp_group=dist.group.WORLD, return_entropy=True
    )
    counts = ids < size
    leaf = hidden.clone().requires_grad_()
    expected = from_hidden(leaf, weight[allowed], ids.where(counts, 0), bias=bias[allowed])
    assert float(found[0][3]) == float("-inf")
    torch.testing.assert_close(found[0][counts], expected[0][counts], **CLOSE)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    slopes = torch.autograd.grad(found[0][counts].sum() + found[1].sum(), (h, w))
    (slope,) = torch.autograd.grad(expected[0][counts].sum() + expected[1].sum(), leaf)
    torch.testing.assert_close(slopes[0], slope, **CLOSE)
    assert bool(slopes[1].isfinite().all())


def test_forbidden_shard(ranks):
    ranks.run(_forbidden_shard)


def _invariant(rank, world):
    rows, size = 150, 40
    hidden, ids = torch.randn(rows, 24), torch.randint(size * world, (rows,))
    weight = torch.randn(size * world, 24)[rank * size : (rank + 1) * size]

    def results(picked):
        part = hidden[picked].requires_grad_()
        logp, entropy = rf.linear_token_logprobs(
            part, weight, ids[picked], tp_group=dist.group.WORLD, return_entropy=True, batch_invariant=True
        )
        (slope,) = torch.autograd.grad(logp.sum() + 2 * entropy.sum(), part)
        return logp.detach(), entropy.detach(), slope

    whole = results(torch.arange(rows))
    for picked in (torch.randperm(rows), torch.tensor([149]), torch.arange(3, 73)):
        for found, expected in zip(results(picked), whole, strict=True):
            contract.assert_bitwise(found, expected[picked])
    logp, old = whole[0].clone(), whole[0].clone()
    dist.broadcast(logp, 0)
    contract.assert_bitwise(logp, old)  # and every rank has the same


def test_batch_invariant_over_processes(ranks):
    ranks.run(_invariant)
