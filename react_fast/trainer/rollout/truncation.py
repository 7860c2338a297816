"""Sampling from all tokens or from the most probable ones, and what the trainer needs to score it exactly."""

import torch

from .sampling import SamplingParams


def choose(
    logits: torch.Tensor, draws: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Next tokens by inverse transform sampling, or the most probable ones.

    Args:
        logits: [B, V]. draws: [B] float64 in [0, 1).
    Returns: (tokens [B], their log-probs [B], logit floors [B] or None); see `Sample`.
    """
    logits = logits.float()
    floors = kept_floors(logits, params) if params.truncated else None
    if floors is not None:
        logits = logits.masked_fill(logits < floors[:, None], -torch.inf)
    logprobs = torch.log_softmax(logits / params.temperature, -1)
    if params.greedy:
        tokens = logprobs.argmax(-1)
    else:
        # float64, so that the last tokens of a large vocabulary keep their share; the comparison with what is just
        # below the sum itself (not with 1) keeps a draw near 1 inside the support.
        cumulative = logprobs.double().exp().cumsum(-1)
        total = cumulative[:, -1:]
        target = torch.minimum(
            draws.to(logits.device)[:, None] * total, total.nextafter(torch.zeros_like(total))
        )
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), floors


def kept_floors(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[B] float32: what separates the kept logits [B, V] from the others, -inf where all are kept.

    It lies half-way between the smallest kept and the largest other logit: rounding between this forward and the
    trainer's then moves no token over it.
    Source: top-p: Holtzman et al. 2020 (arXiv:1904.09751); min-p: Nguyen et al. 2024 (arXiv:2407.01082).
    """
    ordered = logits.sort(-1, descending=True).values
    p = torch.softmax(ordered.double() / params.temperature, -1)
    count = torch.full_like(logits[:, :1], logits.shape[-1], dtype=torch.int64)
    if params.top_k is not None:
        count = count.clamp_max(params.top_k)
        count = _with_ties(ordered, count)
    if params.top_p < 1:
        mass = p.cumsum(-1)
        whole = mass.gather(1, count - 1)
        before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
        count = torch.minimum(count, (before < params.top_p * whole).sum(-1, keepdim=True).clamp_min(1))
    if params.min_p > 0:
        count = torch.minimum(count, (p >= params.min_p * p[:, :1]).sum(-1, keepdim=True))
    count = _with_ties(ordered, count)
    return _between(ordered, count).squeeze(1)


def floors_between(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[...] float32: the floor that separates the `kept` [..., V] logits from the others, -inf where none does."""
    smallest = logits.float().masked_fill(~kept, torch.inf).amin(-1)
    largest = logits.float().masked_fill(kept, -torch.inf).amax(-1)
    return torch.where(smallest > largest, _middle(smallest, largest), -torch.inf)


def _with_ties(ordered: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return (ordered >= ordered.gather(1, count - 1)).sum(-1, keepdim=True)


def _between(ordered: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(ordered, (0, 1), value=-torch.inf)
    return _middle(ordered.gather(1, count - 1), padded.gather(1, count))


def _middle(kept: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """A number in (dropped, kept]; -inf where nothing is dropped."""
    middle = dropped + (kept - dropped) / 2
    return torch.where(middle > dropped, middle, kept).masked_fill(dropped == -torch.inf, -torch.inf)
