"""Whitening over a process group: what one process gives with everyone's elements."""

import pytest
import torch

import react_fast as rf
from react_fast import recipes

from .ranks import Collectives

SHAPE = (6, 40)


def _everyone(world, dtype):
    """(elements, mask) of all ranks; rank 1 has no counting element, the last one no row at all."""
    generator = torch.Generator().manual_seed(7)
    shards = []
    for rank in range(world):
        rows = 0 if rank == world - 1 and world > 2 else SHAPE[0] + rank
        x = torch.randn(rows, SHAPE[1], generator=generator) * (rank + 1) + 1000
        mask = torch.rand(rows, SHAPE[1], generator=generator) > 0.3
        shards.append((x.to(dtype), mask & (rank != 1)))
    return shards


def _whitens_as_one(rank, world, dtype):
    shards = _everyone(world, dtype)
    x, mask = shards[rank]
    everything, counts = (torch.cat(parts) for parts in zip(*shards, strict=True))
    for ddof in (0, 1):
        for shift_mean in (True, False):
            with Collectives() as seen:
                found = rf.whiten(
                    x, mask=mask, group=torch.distributed.group.WORLD, ddof=ddof, shift_mean=shift_mean
                )
            assert seen.count == 1
            whole = rf.whiten(everything, mask=counts, ddof=ddof, shift_mean=shift_mean)
            start = sum(len(s[0]) for s in shards[:rank])
            # The moments are float64 sums of up to 2000 numbers of size 1000 in another order, 1e-12 of them; one
            # rounding of the result in x's precision.
            tolerance = 1e-9 if dtype == torch.float64 else 1e-3 * 2.0**-23 * 1000 + 2.0**-22
            torch.testing.assert_close(found, whole[start : start + len(x)], rtol=tolerance, atol=tolerance)
            assert bool((found[~mask] == 0).all())


def _same_bits_on_every_rank(rank, world):
    """Everyone merges in the same order: a row whitened here is the row whitened there."""
    x, mask = _everyone(world, torch.float32)[rank]
    probe = torch.linspace(-3, 3, 101) + 1000
    moments = [torch.empty(3, dtype=torch.float64) for _ in range(world)]
    torch.distributed.all_gather(moments, torch.stack(rf.moments(x, mask)))
    merged = rf.merge_moments(*[tuple(m) for m in moments])
    own = rf.whiten(probe, moments=merged)
    everyone = [torch.empty_like(own) for _ in range(world)]
    torch.distributed.all_gather(everyone, own)
    for other in everyone:
        assert torch.equal(own, other)


def _recipes_extend_over_ranks(rank, world):
    x, mask = _everyone(world, torch.float64)[rank]
    found = recipes.reinforce_pp(x, gamma=0.9, mask=mask, group=torch.distributed.group.WORLD)
    sums = torch.tensor([found.sum(), found.square().sum(), mask.sum()])
    torch.distributed.all_reduce(sums)
    # Mean 0 and variance 1 over all ranks, of some hundred float64 numbers.
    assert abs(float(sums[0])) < 1e-6
    assert abs(float(sums[1] / (sums[2] - 1)) - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_one_process(ranks, dtype):
    ranks.run(_whitens_as_one, dtype)


def test_ranks_agree_bitwise_and_recipes_pass_the_group(ranks):
    ranks.run(_same_bits_on_every_rank)
    ranks.run(_recipes_extend_over_ranks)
