"""The one record that trainer, tracker and export share, and the texts that become its tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...envs import Record


@dataclass
class Trajectory:
    """One sequence of tokens that the policy read and wrote.

    Attributes:
        token_ids: [L] int64: the prompt, then actions and what the environment answered.
        action_mask: [L] bool, true for the tokens that the policy chose.
        turn_index: [L] int64, turn of every token, counted from 0; the prompt belongs to turn 0.
        sampler_logprobs: [L] float32, log-probability under the sampler in nats; 0 where no action stands, NaN
            where the sampler did not tell.
        rewards: one per turn.
        state_ids: one per turn and one for the end: a 63-bit hash of the state's text.
        record: index of the environment's record.
        group: trajectories of one prompt that are compared with each other share it.
        finished: false if the last action hit the token limit.
        truncated: the environment cut the episode, which was not over.
        seed: of the environment's reset.
        logit_floor: [L] float32, `logit_floor` of `token_logprobs` at every action, -inf elsewhere; None if the
            sampler kept all tokens.
        retokenised: actions that came back as text and were tokenised again; drifted: those of them whose text,
            or whose prompt's, does not give the same tokens again.
        reward_parts: return of every reward function by name, without its weight, where the environment has
            `WeightedRewards`; None if it applied in no turn.
        counts: sums of what the environment counted, such as "rewards/judge/failed", "tools/calls".
        logged: what the reward functions logged, a value a turn.  extra: the newest of what they gave to
            `log_extra`, by column.
        weights_version: oldest weights that an action was sampled with; None: the policy's own.
    """

    token_ids: torch.Tensor
    action_mask: torch.Tensor
    turn_index: torch.Tensor
    sampler_logprobs: torch.Tensor
    rewards: list[float] = field(default_factory=list)
    state_ids: list[int] = field(default_factory=list)
    record: int = 0
    group: int = 0
    finished: bool = True
    truncated: bool = False
    seed: int = 0
    logit_floor: torch.Tensor | None = None
    retokenised: int = 0
    drifted: int = 0
    reward_parts: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    weights_version: int | None = None


def state_id(state: str) -> int:
    return int.from_bytes(hashlib.blake2b(state.encode(), digest_size=8).digest(), "big") >> 1


def retokenised(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Actions of a step that came back as text, and their share that does not give the same tokens again; nothing
    if there are none. The oldest version of the weights that sampled, if an engine numbers them."""
    count = sum(t.retokenised for t in trajectories)
    versions = [t.weights_version for t in trajectories if t.weights_version is not None]
    metrics = {"rollout/weights_version": float(min(versions))} if versions else {}
    if count:
        metrics["rollout/retokenised"] = float(count)
        metrics["rollout/drift"] = sum(t.drifted for t in trajectories) / count
    return metrics


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text; `special` lets the tokenizer add what opens a sequence."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def pad_token(tokenizer: Any) -> int:
    """What fills rows: the tokenizer's pad token, else its end token, else 0."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return next((token for token in (pad, end) if token is not None), 0)


def opening(tokenizer: Any, state: str, record: Record) -> list[int]:
    """Tokens of the state that a record's episode begins with."""
    return encode(tokenizer, state, special=record.conversation is None)


def demonstration(tokenizer: Any, record: Record, reference: str, number: int) -> Trajectory:
    """The reference as if the policy had chosen it: the record's prompt, reference, end token."""
    begun, answer = opening(tokenizer, record.prompt, record), encode(tokenizer, reference, special=False)
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    ids = torch.tensor(begun + answer)
    actions = torch.arange(len(ids)) >= len(begun)
    return Trajectory(
        token_ids=ids,
        action_mask=actions,
        turn_index=torch.zeros_like(ids),
        sampler_logprobs=torch.zeros(len(ids)),
        rewards=[0.0],
        state_ids=[state_id(record.prompt)],
        record=number,
        group=number,
    )
