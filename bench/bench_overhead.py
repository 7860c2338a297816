"""Python overhead: every op on a few numbers, where checks and dispatch are all there is; no gradient."""

from collections.abc import Callable

import pytest
import torch

import react_fast as rf

from .common import race

X, V = torch.randn(2, 4), torch.randn(2, 4)
MASK = torch.ones(2, 4, dtype=torch.bool)
LOGITS, IDS = torch.randn(2, 4, 16), torch.randint(0, 16, (2, 4))
GROUPS, REWARDS = torch.tensor([0, 0, 1, 1]), torch.randn(4)
EDGES = torch.tensor([0, 1, 4])


def _loss() -> torch.Tensor:
    ratio = torch.exp(X - V)
    loss = -torch.minimum(ratio * REWARDS[:2, None], ratio.clamp(0.8, 1.2) * REWARDS[:2, None])
    return (loss * MASK).sum() / MASK.sum()


def _whiten() -> torch.Tensor:
    return (X - X.mean()) * torch.rsqrt(X.var() + 1e-8)


# What trainers write in plain torch, without any check.
CASES: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
    "token_logprobs": (
        lambda: rf.token_logprobs(LOGITS, IDS),
        lambda: torch.log_softmax(LOGITS, -1).gather(-1, IDS[..., None])[..., 0],
    ),
    "discounted_returns": (lambda: rf.discounted_returns(X, gamma=0.9), None),
    "gae": (lambda: rf.gae(X, V, gamma=0.99, lam=0.95, mask=MASK), None),
    "group_advantages": (lambda: rf.group_advantages(REWARDS, GROUPS), None),
    "whiten": (lambda: rf.whiten(X), _whiten),
    "policy_loss": (lambda: rf.policy_loss(X, V, REWARDS[:2], MASK), _loss),
    "attribution_scores": (lambda: rf.attribution_scores(X, V), lambda: (X * V).sum(-1)),
    "segment_sum": (
        lambda: rf.segment_sum(REWARDS, EDGES),
        lambda: torch.segment_reduce(REWARDS, "sum", offsets=EDGES),
    ),
}


@pytest.mark.parametrize("op", CASES)
def test_overhead(benchmark, op):
    ours, plain = CASES[op]
    contestants = {"react_fast": ours, **({"torch": plain} if plain is not None else {})}
    with torch.no_grad():
        race(benchmark, contestants, case=f"{op}, a few numbers: overhead")
