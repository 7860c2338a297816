"""Trajectories as padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..envs import TextEnv
from .rollout import Trajectory


@dataclass
class Batch:
    """Trajectories padded on the right. T is the longest one's length; column t of a [B, T-1] tensor belongs to
    token t + 1, which the policy chose (or not) after reading tokens 0 to t.

    Attributes:
        input_ids, attention_mask: [B, T] int64.
        mask: [B, T-1] bool, true where token t + 1 is an action.
        sampler_logprobs: [B, T-1] float32, NaN where the sampler did not tell.
        logit_floor: [B, T-1] float32, of what the sampler kept, or None if it kept all tokens.
        rewards: [B] float32 or float64, sum over turns.  step_rewards: [B, T-1], each turn's at its last action.
        groups: [B] int64.  records: [B] int64, index of the environment's record.
        truncated: [B] bool, the episode was cut and not over; None: none was.
        old_logprobs, ref_logprobs: [B, T-1] or None, set by `score`.
        heads: outputs [B, T-1, ...] of the algorithm's heads before the update, by name, set by `score`.
        attribution, effects, step_advantages: [B, T-1] or None, set by `score` when credit asks for it.
        advantages: [B] or [B, T-1] or None, set by `credit`.
        last_values: [B] value of the state behind every row, returns: [B, T-1], or None, set for a critic.
        importance: [B, T-1] weights of tokens that another policy sampled, or None, set in the update.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    rewards: torch.Tensor
    step_rewards: torch.Tensor
    groups: torch.Tensor
    records: torch.Tensor
    truncated: torch.Tensor | None = None
    logit_floor: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    attribution: torch.Tensor | None = None
    effects: torch.Tensor | None = None
    step_advantages: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    last_values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    importance: torch.Tensor | None = None

    @property
    def targets(self) -> torch.Tensor:
        """[B, T-1]: the tokens whose log-probabilities the other [B, T-1] tensors hold."""
        return self.input_ids[:, 1:]

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int64: tokens of every trajectory."""
        return self.attention_mask.sum(1)

    @classmethod
    def of_ids(cls, input_ids: torch.Tensor) -> "Batch":
        """[B, T] tokens without padding, all but the first of each row actions, and nothing known about them."""
        rows, width = input_ids.shape
        nothing = torch.zeros(rows, width - 1, device=input_ids.device)
        numbers = torch.arange(rows, device=input_ids.device)
        return cls(
            input_ids,
            torch.ones_like(input_ids),
            torch.ones_like(nothing, dtype=torch.bool),
            nothing,
            nothing.sum(1),
            nothing,
            numbers,
            numbers,
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: torch.Tensor) -> "Batch":
        """Some rows, cut to the longest of them."""
        width = int(self.lengths[rows].max()) if len(rows) else 1

        def part(name: str, value: torch.Tensor) -> torch.Tensor:
            chosen = value[rows]
            columns = width if name in ("input_ids", "attention_mask") else width - 1
            return chosen[:, :columns] if chosen.dim() > 1 else chosen

        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        chosen: dict[str, Any] = {name: part(name, x) for name, x in tensors.items()}
        chosen["heads"] = {name: part(name, x) for name, x in self.heads.items()}
        return replace(self, **chosen)

    def with_one_more_token(self) -> "Batch":
        """The rows' tokens with one behind each, whatever it is: a policy's outputs there say what it makes of
        the whole row."""

        def longer(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, 1))

        seen = torch.arange(self.input_ids.shape[1] + 1, device=self.mask.device) <= self.lengths[:, None]
        zeros = longer(torch.zeros_like(self.sampler_logprobs))
        return Batch(
            longer(self.input_ids), seen.to(self.attention_mask.dtype), longer(self.mask), zeros,
            self.rewards, longer(self.step_rewards), self.groups, self.records, self.truncated,
        )  # fmt: skip


def collate(
    trajectories: Sequence[Trajectory], pad_id: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Batch:
    """Pad trajectories into a batch; rewards are of `dtype`, which the policy's log-probabilities have.

    Raises: ValueError for no trajectories, or for one without a token before its first action.
    """
    if not trajectories:
        raise ValueError("trajectories must hold at least one trajectory, got none")
    for i, trajectory in enumerate(trajectories):
        if len(trajectory.token_ids) == 0 or bool(trajectory.action_mask[0]):
            raise ValueError(f"trajectories[{i}] must begin with a prompt token, got an action or nothing")

    def pad(tensors: Sequence[torch.Tensor], value: float) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)

    ids = pad([t.token_ids for t in trajectories], pad_id)
    attention = pad([torch.ones_like(t.token_ids) for t in trajectories], 0)
    actions = pad([t.action_mask for t in trajectories], 0)
    return Batch(
        input_ids=ids.to(device),
        attention_mask=attention.to(device),
        mask=actions[:, 1:].to(device),
        sampler_logprobs=pad([t.sampler_logprobs for t in trajectories], 0.0)[:, 1:].to(device),
        rewards=torch.tensor([float(sum(t.rewards)) for t in trajectories], device=device, dtype=dtype),
        step_rewards=_step_rewards(trajectories, ids.shape[1]).to(device, dtype),
        groups=torch.tensor([t.group for t in trajectories], device=device),
        records=torch.tensor([t.record for t in trajectories], device=device),
        truncated=torch.tensor([t.truncated for t in trajectories], device=device),
        logit_floor=_floors(trajectories, pad, device),
    )


def _floors(trajectories: Sequence[Trajectory], pad: Any, device: torch.device) -> torch.Tensor | None:
    if all(t.logit_floor is None for t in trajectories):
        return None
    everything = (torch.full(t.token_ids.shape, -torch.inf) for t in trajectories)
    floors = [
        whole if t.logit_floor is None else t.logit_floor
        for t, whole in zip(trajectories, everything, strict=True)
    ]
    return pad(floors, -torch.inf)[:, 1:].to(device)


def _step_rewards(trajectories: Sequence[Trajectory], width: int) -> torch.Tensor:
    """Each turn's reward stands at the turn's last action. A turn without one hands its reward to the action
    before it, or to none if there is none."""
    placed = torch.zeros(len(trajectories), width, dtype=torch.float64)
    for row, trajectory in enumerate(trajectories):
        for turn, reward in enumerate(trajectory.rewards):
            upto = (trajectory.action_mask & (trajectory.turn_index <= turn)).nonzero()
            if len(upto):
                placed[row, int(upto[-1])] += reward
    return placed[:, 1:]


def group_numbers(groups: Sequence[str], env: TextEnv) -> torch.Tensor:
    """[records] int64: number of every record's group among the tracker's."""
    names = [record.metadata.get("group") for record in env.records]
    for i, name in enumerate(names):
        if name not in groups:
            raise ValueError(
                f"records[{i}] must have one of {list(groups)} as metadata 'group', got {name!r}"
            )
    return torch.tensor([groups.index(name) for name in names])
