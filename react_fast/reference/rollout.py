"""One sequence, a token sampled, and the weights of tokens that another policy sampled, as the equations say."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .importance_weights import importance_weights


@dataclass
class Trajectory:
    """One sequence; every list but `rewards` (one a turn) has an entry for each token. Where no action stands, the
    log-probability under the sampler is 0 and the logit floor of what it kept -inf."""

    token_ids: Any
    action_mask: Any
    turn_index: Any
    rewards: list[float] = field(default_factory=list)
    group: int = 0
    record: int = 0
    seed: int = 0  # of the environment's reset
    truncated: bool = False
    sampler_logprobs: Any = field(default_factory=list)
    logit_floor: Any = None

    def extend(self, tokens: list[tuple[int, float, float]], chosen: bool, turn: int) -> None:
        for token, logprob, floor in tokens:
            self.token_ids.append(token)
            self.action_mask.append(chosen)
            self.turn_index.append(turn)
            self.sampler_logprobs.append(logprob)
            self.logit_floor.append(floor)


def step_rewards(trajectory: Any) -> torch.Tensor:
    """Every turn's reward at the turn's last action, or at the last one before it."""
    placed = torch.zeros(len(trajectory.token_ids), dtype=torch.float64)
    for turn, reward in enumerate(trajectory.rewards):
        for t in reversed(range(len(placed))):
            if trajectory.action_mask[t] and trajectory.turn_index[t] <= turn:
                placed[t] += reward
                break
    return placed


def draw(logits: torch.Tensor, u: float, config: Any) -> tuple[int, float, float]:
    """A token by inverse transform of u in [0, 1), its log-probability, and the logit floor of what was kept.

    Args:
        logits: [V]. config: has temperature, top_k, top_p and min_p.
    """
    logits = logits.float()
    kept = kept_tokens(logits, config)
    dropped = [i for i in range(len(logits)) if i not in kept]
    floor = -math.inf
    if dropped:
        floor = float(logits[sorted(kept)].min() + logits[dropped].max()) / 2
        logits = logits.index_fill(0, torch.tensor(dropped), -math.inf)
    logprobs = torch.log_softmax(logits / config.temperature, 0)
    whole = float(logprobs.double().exp().sum())
    mass = 0.0
    for i in sorted(kept):
        mass += math.exp(logprobs[i])
        if mass > u * whole:
            break
    return i, float(logprobs[i]), floor


def kept_tokens(logits: torch.Tensor, config: Any) -> set[int]:
    """What top_k, then top_p, then min_p leave; tokens that tie with the last one stay."""
    p = torch.softmax(logits.double() / config.temperature, 0)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if config.top_k is not None:
        order = _with_ties(logits, order, order[: config.top_k])
    if config.top_p < 1:
        whole, mass = sum(float(p[i]) for i in order), 0.0
        chosen: list[int] = []
        for i in order:
            if chosen and mass >= config.top_p * whole:
                break
            chosen.append(i)
            mass += float(p[i])
        order = _with_ties(logits, order, chosen)
    if config.min_p > 0:
        order = [i for i in order if p[i] >= config.min_p * p[order[0]]]
    return set(order)


def _with_ties(logits: torch.Tensor, order: list[int], chosen: list[int]) -> list[int]:
    return [i for i in order if logits[i] >= logits[chosen[-1]]]


def importance(
    config: Any, logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor | None:
    """[L] weights p/q of one sequence, q taken as p where it is NaN; None if `config` wants none."""
    if config.importance == "none":
        return None
    known = mask & ~sampler_logprobs.isnan()
    sampler = torch.where(known, sampler_logprobs.to(logprobs.dtype), logprobs)
    weights, _ = importance_weights(
        logprobs[None],
        sampler[None],
        mask[None],
        level=config.importance_level,
        mode=config.importance,
        low=config.importance_low,
        high=config.importance_high,
    )
    return weights[0]
