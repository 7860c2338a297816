"""A vocabulary whose rows lie on several ranks: what they tell each other about a row of hidden, never logits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import _linear_logprob as tiles

Folded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _rank(group: Any) -> int:
    # torch.distributed.new_group gives a process outside the group a number instead of one.
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group must be a process group that holds this process, got {type(group).__name__}"
        )
    return dist.get_rank(group)


def _states(state: torch.Tensor, shard: int, group: Any) -> tuple[list[torch.Tensor], list[int]]:
    """Every rank's state [N, 5] and number of vocabulary rows, which travels as one row more: one collective."""
    own = torch.cat([state, state.new_full((1, state.shape[1]), shard)])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    sizes = torch.stack([part[-1, 0] for part in parts]).tolist()
    return [part[:-1] for part in parts], [int(size) for size in sizes]


def fold(
    rows: tiles.Rows, shard: int, group: Any, own: Callable[[torch.Tensor], Folded]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(state over the whole vocabulary, this rank's U and Q relative to it, ids inside this rank's shard).

    One all-gather of 40 bytes a row when every rank holds equally many rows of the vocabulary; otherwise the ranks
    that do not start where equal ones would fold again, and there is a second.

    Args:
        shard: vocabulary rows of this rank, above 0; the ranks' rows follow each other in rank order.
        own: ids [N] inside the shard -> (state, U, Q) of the shard.
    Raises: IndexError, on every rank, for an id outside the whole vocabulary.
    """
    rank = _rank(group)
    begin = rank * shard
    state, U, Q = own(rows.ids - begin)
    states, sizes = _states(state, shard, group)
    rows.check(sum(sizes))
    if len(set(sizes)) > 1:
        if begin != sum(sizes[:rank]):
            begin = sum(sizes[:rank])
            state, U, Q = own(rows.ids - begin)
        states, _ = _states(state, shard, group)
    whole = states[0]
    for other in states[1:]:
        whole = tiles.merge(whole, other, rows.inverse_t)
    _shift(state[:, 0], whole[:, 0], U, Q, rows.inverse_t)
    return whole, U, Q, rows.ids - begin


def _shift(
    before: torch.Tensor, now: torch.Tensor, U: torch.Tensor, Q: torch.Tensor, inverse_t: torch.Tensor | float
) -> None:
    """U and Q of the shard's largest logit become those of the vocabulary's."""
    if len(U) == 0:
        return
    shift = torch.where(before == float("-inf"), 0.0, (before - now) * inverse_t).clamp_min(-800.0)
    factor = shift.exp().to(U.dtype)[:, None]
    if len(Q):
        Q.addcmul_(U, shift.to(U.dtype)[:, None]).mul_(factor)
    U.mul_(factor)


def total(d_hidden: torch.Tensor, group: Any, invariant: bool) -> torch.Tensor:
    """hidden's gradient [N, D] summed over the shards.

    `invariant`: in rank order, since an all-reduce picks the order by an element's place in the buffer.
    """
    if not invariant:
        dist.all_reduce(d_hidden, group=group)
        return d_hidden
    parts = [torch.empty_like(d_hidden) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, d_hidden.contiguous(), group=group)
    out = parts[0]
    for part in parts[1:]:
        out.add_(part)
    return out
