"""Outcomes: the number that an intervention may change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops import _check
from .policy import Policy

# Rows whose log-probabilities are held at once.
_ROWS = 1024

Row = tuple[list[int], int]


@dataclass(frozen=True)
class TargetLogprob:
    """log p(target | prompt, response), in nats: how likely the policy finds a text behind the response.

    Attributes:
        token_ids: of the target, at least one.
    """

    token_ids: tuple[int, ...]

    def __init__(self, token_ids: Sequence[int]) -> None:
        object.__setattr__(self, "token_ids", tuple(token_ids))
        if not self.token_ids:
            raise ValueError("token_ids must hold at least one token, got none")


@dataclass(frozen=True)
class Return:
    """Discounted sum of a response's rewards, sum_k gamma^k r_k.

    Attributes:
        rewards: function from response ids to its rewards in order: one a token, a step or a turn.
        gamma: in [0, 1].
    """

    rewards: Callable[[list[int]], Sequence[float]]
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check.number("gamma", self.gamma, low=0.0, high=1.0)

    def __call__(self, response_ids: list[int]) -> float:
        return float(
            sum(self.gamma**k * float(reward) for k, reward in enumerate(self.rewards(response_ids)))
        )


Outcome = str | TargetLogprob | Callable[[list[int]], float]


def check_outcome(outcome: Any, vocab_size: int) -> Any:
    """Raises: ValueError, or IndexError for a target outside the vocabulary, in one line."""
    if isinstance(outcome, TargetLogprob):
        for token in outcome.token_ids:
            if not 0 <= token < vocab_size:
                raise IndexError(f"outcome must have token_ids in [0, {vocab_size}), got {token}")
    elif not callable(outcome) and outcome != "logprob":
        raise ValueError(
            f"outcome must be 'logprob' or a function of response ids, or a TargetLogprob, got {outcome!r}"
        )
    return outcome


def outcomes(policy: Policy, outcome: Any, rows: Sequence[Row]) -> np.ndarray:
    """[N] outcome, a TargetLogprob or a function, of rows (ids, place where the response begins)."""
    if not isinstance(outcome, TargetLogprob):
        return np.array([float(outcome(ids[start:])) for ids, start in rows])
    return logprob_sums(policy, [([*ids, *outcome.token_ids], len(ids)) for ids, _ in rows])


def logprob_sums(policy: Policy, rows: Sequence[Row]) -> np.ndarray:
    """[N] log-probability of what stands from the place on in rows (ids, place); equal rows run once."""
    keys = [(tuple(ids), start) for ids, start in rows]
    distinct = list(dict.fromkeys(keys))
    found: dict[Any, float] = {}
    for first in range(0, len(distinct), _ROWS):
        part = distinct[first : first + _ROWS]
        sums = policy.response_logprobs([ids for ids, _ in part], [start for _, start in part]).sum(1)
        found |= dict(zip(part, sums.tolist(), strict=True))
    return np.array([found[key] for key in keys])
