"""Less padding: micro-batches of sequences of like length, and several sequences in one row.

A packed row's attention multiplies what its mask then hides, unless a kernel skips it; `row_layout` bounds that.
"""

from typing import Any

import torch
from torch import nn

Places = list[torch.Tensor]


def buckets(lengths: torch.Tensor, budget: int, *, together: int = 1, padded: bool = True) -> Places:
    """Rows of micro-batches of at most `budget` tokens, longest first; a row beyond the budget has its own.

    Args:
        lengths: [N] int64, tokens of every row.
        budget: most tokens of a micro-batch.
        together: so many neighbours stay in one; divides N.
        padded: whether every row counts as long as the longest of its micro-batch.
    Returns: index tensors; rows of equal length keep their order.
    """
    units = lengths.view(-1, together)
    longest, own = units.max(1).values, units.sum(1)
    order = torch.argsort(longest, descending=True, stable=True).tolist()
    parts: list[list[int]] = []
    held = 0
    for unit in order:
        width = int(longest[parts[-1][0]]) if parts else 0
        size = width * together if padded else int(own[unit])
        if not parts or held + size > budget:
            parts.append([])
            held, size = 0, int(longest[unit]) * together if padded else int(own[unit])
        parts[-1].append(unit)
        held += size
    return [(torch.tensor(part)[:, None] * together + torch.arange(together)).flatten() for part in parts]


def split_into(parts: Places, count: int, together: int = 1) -> Places:
    """The parts, the largest of them halved until there are `count`: as many forwards as another process does."""
    parts = list(parts)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[largest]) // together // 2 * together
        parts[largest : largest + 1] = parts[largest].tensor_split([half])
    return parts


def row_layout(lengths: list[int]) -> tuple[list[int], list[int], int]:
    """Where each sequence stands when several share a row as long as the longest: first fit, longest first.

    Rows are no longer than that, so that attention, quadratic in a row, costs at most what padding did.

    Returns: (row of every sequence, its first column, number of rows).
    """
    width, used = max(lengths), list[int]()
    rows, columns = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (row for row, filled in enumerate(used) if filled + lengths[i] <= width)
        row = next(fitting, len(used))
        if row == len(used):
            used.append(0)
        rows[i], columns[i] = row, used[row]
        used[row] += lengths[i]
    return rows, columns, len(used)


def packed_hidden(
    body: nn.Module, embedding: nn.Module, ids: torch.Tensor, mask: torch.Tensor, *, one_row: bool = False
) -> torch.Tensor:
    """Last hidden states [B, T, D] of right-padded sequences that share rows in the forward; 0 at padding.

    Positions begin anew with every sequence, from which transformers tells that they do not see each other
    (`find_packed_sequence_indices`), in every attention that it masks, and in flash attention for one row.

    Args:
        body: model from embeddings to hidden states.  embedding: of its tokens.
        ids, mask: [B, T] int64, the mask 1 at tokens.
        one_row: put all sequences in one row.
    """
    lengths = mask.sum(1).tolist()
    width = sum(lengths) if one_row else max(lengths)
    rows, columns, count = ([0] * len(lengths), _starts(lengths), 1) if one_row else row_layout(lengths)
    start = torch.tensor(rows, device=ids.device) * width + torch.tensor(columns, device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    real = mask.bool()
    target = (start[:, None] + places)[real]
    embedded = embedding(ids)
    packed = embedded.new_zeros(count * width, embedded.shape[-1]).index_copy(0, target, embedded[real])
    positions = ids.new_zeros(count * width).index_copy(0, target, places[real])
    out: Any = body(
        inputs_embeds=packed.view(count, width, -1),
        position_ids=positions.view(count, width),
        use_cache=False,
    )
    hidden = out.last_hidden_state.reshape(count * width, -1)[target]
    flat = real.flatten().nonzero().squeeze(1)
    return hidden.new_zeros(ids.numel(), hidden.shape[-1]).index_copy(0, flat, hidden).view(*ids.shape, -1)


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


@torch.no_grad()
def can_pack(model: Any, body: nn.Module, embedding: nn.Module, *, one_row: bool = False) -> bool:
    """Whether a model's hidden states stay what they are when sequences share a row: tried on a few tokens."""
    weight: Any = embedding.weight
    ids = torch.arange(18, device=weight.device).view(3, 6) * 7 % len(weight)
    mask = (
        torch.arange(6, device=weight.device) < torch.tensor([[6], [4], [2]], device=weight.device)
    ).long()
    was_training = model.training
    model.eval()
    try:
        expected = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        found = packed_hidden(body, embedding, ids, mask, one_row=one_row)
    except (TypeError, AttributeError, ValueError, RuntimeError):  # it takes no embeddings or no positions
        return False
    finally:
        model.train(was_training)
    expected = torch.where(mask[..., None].bool(), expected, 0.0).double()
    if not bool(torch.isfinite(expected).all()):
        return False
    # Sums in another order (eager attention takes its softmax in float32); another sequence adds far more.
    tolerance = max(1e-5, 8 * torch.finfo(found.dtype).eps)
    return bool(
        torch.allclose(found.double(), expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))
    )
