"""Episodes of a text environment: token ids in, token ids out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...envs import TextEnv
from .sampling import EngineError, RolloutEngine, Sample, SamplingParams
from .streams import key
from .trajectory import Trajectory, encode, opening, state_id

_ENVIRONMENT = 4  # stream of the seeds that environments are reset with


class EpisodeError(ValueError):
    """Episodes of an environment cannot be one sequence of tokens, in one line."""


def answered(tokenizer: Any, state: str, seen: str) -> list[int]:
    """Tokens that the environment added to the text so far.

    Raises: EpisodeError if its transition rewrites that text, which one sequence of tokens cannot express.
    """
    if not state.startswith(seen):
        raise EpisodeError(
            "the transition of a multi-turn environment must continue the text so far (state + action), "
            f"got {state[:60]!r} after {seen[:60]!r}"
        )
    return encode(tokenizer, state[len(seen) :], special=False) if len(state) > len(seen) else []


class Episodes:
    """Plays episodes of a text environment with an engine, many at a time.

    Args:
        engine: continues token sequences.
        tokenizer: `tokenizer(text)["input_ids"]` and `decode(ids, skip_special_tokens=True)`.
        env: its clones are stepped; it is left as it was. Its prompts are texts, perhaps of `env.rendered`.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: Any, env: TextEnv) -> None:
        self.engine, self.tokenizer, self.env = engine, tokenizer, env

    def play(self, records: Sequence[int], groups: Sequence[int], params: SamplingParams) -> list[Trajectory]:
        """One episode a row, its environment's randomness keyed like the samples.

        The tokens of a trajectory are exactly those the policy saw and chose: an observation that continues the
        text so far adds its own tokens, masked as no action.

        Raises: ValueError for groups or rows of another number than records; EngineError for samples of another
            number; EpisodeError for a prompt without tokens, and if the environment's transition rewrites the
            text so far, which one sequence of tokens cannot express.
        """
        if len(groups) != len(records):
            raise ValueError(f"groups must be {len(records)} like records, got {len(groups)}")
        if params.rows is not None and len(params.rows) != len(records):
            raise ValueError(f"params.rows must be {len(records)} like records, got {len(params.rows)}")
        envs = [self.env.clone() for _ in records]
        numbers = list(params.rows) if params.rows is not None else list(range(len(envs)))
        seeds = [key(params.seed, _ENVIRONMENT, params.step, number) for number in numbers]
        states = [
            env.reset(seed=seed, options={"index": i})[0]
            for env, seed, i in zip(envs, seeds, records, strict=True)
        ]
        begun = [
            opening(self.tokenizer, state, self.env.records[i])
            for state, i in zip(states, records, strict=True)
        ]
        rows = [_Row(*row) for row in zip(begun, records, groups, states, seeds, strict=True)]
        running = list(range(len(rows)))
        turn = 0
        while running:
            keyed = SamplingParams(**{**vars(params), "turn": turn, "rows": [numbers[i] for i in running]})
            samples = self.engine.generate([rows[i].ids for i in running], keyed)
            if len(samples) != len(running):
                raise EngineError(f"the engine must give {len(running)} samples, got {len(samples)}")
            actions = [self.tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in samples]
            steps = TextEnv.step_many([envs[i] for i in running], actions, [s.ids for s in samples])
            still = []
            for i, sample, action, step in zip(running, samples, actions, steps, strict=True):
                state, reward, terminated, truncated, info = step
                over = terminated or truncated
                rows[i].act(self.tokenizer, sample, action, state, float(reward), over)
                rows[i].note(info)
                rows[i].truncated = truncated and not terminated
                if not over:
                    still.append(i)
            running, turn = still, turn + 1
        return [row.trajectory() for row in rows]


class _Row:
    """One episode while it is played."""

    def __init__(self, ids: list[int], record: int, group: int, state: str, seed: int) -> None:
        if not ids:
            raise EpisodeError(
                f"the prompt of record {record} must hold at least one token, got an empty text"
            )
        self.ids, self.state = ids, state
        self.actions = [False] * len(ids)
        self.turns = [0] * len(ids)
        self.logprobs = [0.0] * len(ids)
        self.floors = [-math.inf] * len(ids)
        self.samples: list[Sample] = []
        self.rewards: list[float] = []
        self.states = [state_id(state)]
        self.record, self.group, self.seed, self.finished = record, group, seed, True
        self.truncated = False
        self.parts: dict[str, float | None] = {}
        self.counts: dict[str, float] = {}
        self.logged: dict[str, list[float]] = {}
        self.extra: dict[str, Any] = {}

    def note(self, info: Mapping[str, Any]) -> None:
        """Adds what the environment says about a turn."""
        for name, value in info.get("rewards", {}).items():
            before = self.parts.get(name)
            self.parts[name] = before if value is None else value + (before or 0.0)
        for name, value in info.get("counts", {}).items():
            self.counts[name] = self.counts.get(name, 0.0) + value
        for name, value in info.get("logged", {}).items():
            self.logged.setdefault(name, []).append(value)
        self.extra |= info.get("extra", {})

    def act(self, tokenizer: Any, sample: Sample, action: str, state: str, reward: float, over: bool) -> None:
        turn = len(self.rewards)
        self._extend(sample.ids, True, turn, sample.logprobs, sample.logit_floors)
        self.samples.append(sample)
        self.rewards.append(reward)
        self.states.append(state_id(state))
        self.finished = sample.finish_reason == "stop"
        if not over:
            answer = answered(tokenizer, state, self.state + action)
            self._extend(answer, False, turn + 1, [0.0] * len(answer))
        self.state = state

    def _extend(
        self,
        ids: list[int],
        chosen: bool,
        turn: int,
        logprobs: list[float],
        floors: list[float] | None = None,
    ) -> None:
        self.ids += ids
        self.actions += [chosen] * len(ids)
        self.turns += [turn] * len(ids)
        self.logprobs += logprobs
        self.floors += [-math.inf] * len(ids) if floors is None else floors

    def trajectory(self) -> Trajectory:
        truncated = any(sample.logit_floors is not None for sample in self.samples)
        versions = [s.weights_version for s in self.samples if s.weights_version is not None]
        return Trajectory(
            token_ids=torch.tensor(self.ids),
            action_mask=torch.tensor(self.actions),
            turn_index=torch.tensor(self.turns),
            sampler_logprobs=torch.tensor(self.logprobs),
            rewards=self.rewards,
            state_ids=self.states,
            record=self.record,
            group=self.group,
            finished=self.finished,
            truncated=self.truncated,
            seed=self.seed,
            logit_floor=torch.tensor(self.floors) if truncated else None,
            retokenised=sum(not sample.exact_tokens for sample in self.samples),
            reward_parts=self.parts,
            counts=self.counts,
            logged=self.logged,
            extra=self.extra,
            drifted=sum(sample.drifted for sample in self.samples),
            weights_version=min(versions, default=None),
        )
