"""Sampling from all tokens or from the most probable ones, and what the trainer needs to score it exactly."""

import math

import torch

from .sampling import SamplingParams

_CANDIDATES = 1024  # most nuclei are smaller, and finding so many is faster than sorting a vocabulary


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
    largest = logits.amax(-1, keepdim=True)
    smallest = torch.full_like(largest, -torch.inf)
    if params.top_k is not None and params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k).values[:, -1:]
    if params.top_p < 1:
        left = logits.masked_fill(logits < smallest, -torch.inf)
        smallest = torch.maximum(smallest, _nucleus(left / params.temperature, left, params.top_p))
    if params.min_p > 0:
        smallest = torch.maximum(smallest, largest + params.temperature * math.log(params.min_p))
    return floors_between(logits, logits >= smallest)


def _nucleus(z: torch.Tensor, logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """[B, 1] smallest logit among the fewest most probable tokens whose mass under softmax(z) reaches top_p."""
    total = torch.logsumexp(z.double(), -1, keepdim=True)
    for size in (min(_CANDIDATES, z.shape[-1]), z.shape[-1]):
        ordered, places = z.topk(size)
        mass = (ordered.double() - total).exp().cumsum(-1)
        if bool((mass[:, -1] >= top_p).all()):
            break
    # What lies before a kept token has not reached top_p yet; the first is always kept.
    last = (mass < top_p).sum(-1, keepdim=True).clamp_max(size - 1)
    return logits.gather(1, places.gather(1, last))


def floors_between(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[...] float32: the floor that separates the `kept` [..., V] logits from the others, -inf where none does."""
    smallest = logits.float().masked_fill(~kept, torch.inf).amin(-1)
    largest = logits.float().masked_fill(kept, -torch.inf).amax(-1)
    return torch.where(smallest > largest, _middle(smallest, largest), -torch.inf)


def _middle(kept: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """A number in (dropped, kept]; -inf where nothing is dropped."""
    middle = dropped + (kept - dropped) / 2
    return torch.where(middle > dropped, middle, kept).masked_fill(dropped == -torch.inf, -torch.inf)
