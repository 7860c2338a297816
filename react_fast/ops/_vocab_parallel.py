"""A vocabulary whose rows lie on several ranks: what they tell each other about a row of hidden, never logits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ._linear_logprob import Head, joined
from ._tiles import Rows, Tensor, capturing

Folded = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def fold(
    rows: Rows, head: Head, own: Callable[[Head], Folded]
) -> tuple[Head, Tensor, Tensor, Tensor, list[Tensor]]:
    """(head with its place, state over the whole vocabulary, this rank's U and Q relative to it, kept logits).

    One all-gather of 40 bytes a row when every rank holds equally many rows of the vocabulary, as the capture of a
    CUDA graph takes for granted; otherwise ranks that do not start where equal ones would fold again, and there is
    a second.

    Args:
        head: this rank's rows of the vocabulary, at least one; the ranks' rows follow each other in rank order.
        own: what a head gives, (state, U, Q, kept logits) of this rank's columns.
    Raises: TypeError for another kind of group.
    """
    _check_group(head.group)
    state, U, Q, kept = own(head)
    states, shards = _exchanged(state, head)
    head, guessed = head._replace(shards=shards), head
    if len(set(shards)) > 1:
        if head.first != guessed.first:
            state, U, Q, kept = own(head)
        states, _ = _exchanged(state, head)
    whole = joined(states, state, U, Q, rows.inverse_t)
    return head, whole, U, Q, kept


def placed(head: Head) -> Head:
    """The head with every rank's number of vocabulary rows, from one collective; as it is without a group."""
    if head.group is None:
        return head
    _check_group(head.group)
    if capturing(head.weight.device):
        return head._replace(shards=(len(head.weight),) * dist.get_world_size(head.group))
    own = torch.tensor([len(head.weight)], device=head.weight.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(head.group))]
    dist.all_gather(parts, own, group=head.group)
    return head._replace(shards=tuple(torch.cat(parts).tolist()))


def whole(
    state: Tensor, head: Head, inverse_t: Tensor | float, U: Tensor | None = None, Q: Tensor | None = None
) -> Tensor:
    """The state [N, 5] over all ranks' columns, from one all-gather; as it is without a group. U and Q of this
    rank's columns, if given, become relative to it."""
    if head.group is None:
        return state
    parts = [torch.empty_like(state) for _ in range(dist.get_world_size(head.group))]
    dist.all_gather(parts, state.contiguous(), group=head.group)
    none = state.new_empty(0)
    return joined(parts, state, none if U is None else U, none if Q is None else Q, inverse_t)


def _check_group(group: Any) -> None:
    """torch.distributed.new_group gives a process outside the group a number instead of one."""
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise TypeError(f"tp_group must be a process group that holds this process, got {kind}")


def _exchanged(state: Tensor, head: Head) -> tuple[list[Tensor], tuple[int, ...]]:
    """Every rank's state [N, 5] and number of vocabulary rows, which travels as one row more: one collective."""
    own = torch.cat([state, state.new_full((1, state.shape[1]), len(head.weight))])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(head.group))]
    dist.all_gather(parts, own, group=head.group)
    if capturing(state.device):
        shards = (len(head.weight),) * len(parts)
    else:
        shards = tuple(map(int, torch.stack([part[-1, 0] for part in parts]).tolist()))
    return [part[:-1] for part in parts], shards


def total(d_hidden: Tensor, group: Any, invariant: bool) -> Tensor:
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
