"""Rollouts: token ids in, token ids out, and the one record that trainer, tracker and export share."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ..envs import TextEnv
from ..tracker.policy import cache_argument

_ENVIRONMENT = 4  # stream of the seeds that environments are reset with


@dataclass
class Trajectory:
    """One sequence of tokens that the policy read and wrote.

    Attributes:
        token_ids: [L] int64: the prompt, then actions and what the environment answered.
        action_mask: [L] bool, true for the tokens that the policy chose.
        turn_index: [L] int64, turn of every token, counted from 0; the prompt belongs to turn 0.
        sampler_logprobs: [L] float32, log-probability under the sampler in nats; 0 where no action stands.
        rewards: one per turn.
        state_ids: one per turn and one for the end: a 63-bit hash of the state's text.
        record: index of the environment's record.
        group: trajectories of one prompt that are compared with each other share it.
        finished: false if the last action hit the token limit.
        truncated: the environment cut the episode, which was not over.
        seed: of the environment's reset.
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


@dataclass(frozen=True)
class SamplingParams:
    """How actions are sampled. Row r of a call draws from the stream (seed, step, turn, rows[r]), so a sample
    does not depend on how the rows are split into calls.

    Args:
        max_new_tokens: longest action, at least 1.
        temperature: above 0; the limit 0 is `greedy`.
        greedy: the most probable token each time.
        seed, step, turn: not negative. rows: one number for each prompt; None: 0, 1, 2, ...
    Raises: ValueError for a number out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0
    step: int = 0
    turn: int = 0
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0 (greedy=True is its limit), got {self.temperature:g}"
            )


@dataclass
class Sample:
    """One generated action.

    Attributes:
        ids: generated token ids, the end token included.
        logprobs: log-probability of each under the sampler (its temperature included), in nats.
        finish_reason: "stop" (end token) or "length".
        exact_tokens: false if the engine returned text that had to be tokenised again.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    exact_tokens: bool = True


class RolloutEngine(Protocol):
    """Anything that continues token sequences: the policy itself, or a server that holds a copy of it."""

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]: ...


def key(*numbers: int) -> int:
    """A 63-bit key of its own for every tuple of numbers; what random streams are named by."""
    words = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)
    return int(words[0] >> 1)


def permutation(count: int, *keys: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key(*keys))).permutation(count)


def state_id(state: str) -> int:
    return int.from_bytes(hashlib.blake2b(state.encode(), digest_size=8).digest(), "big") >> 1


def answered(tokenizer: Any, state: str, seen: str) -> list[int]:
    """Tokens that the environment added to the text so far.

    Raises: ValueError if its transition rewrites that text, which one sequence of tokens cannot express.
    """
    if not state.startswith(seen):
        raise ValueError(
            "the transition of a multi-turn environment must continue the text so far (state + action), "
            f"got {state[:60]!r} after {seen[:60]!r}"
        )
    return encode(tokenizer, state[len(seen) :], special=False) if len(state) > len(seen) else []


def uniforms(params: SamplingParams, count: int) -> torch.Tensor:
    """[rows, max_new_tokens] float64 in [0, 1) from Philox streams keyed by (seed, step) and (turn, row)."""
    rows = params.rows if params.rows is not None else range(count)
    key = np.array([params.seed, params.step], dtype=np.uint64)
    draws = np.empty((count, params.max_new_tokens))
    for i, row in enumerate(rows):
        counter = np.array([0, 0, params.turn, row], dtype=np.uint64)
        draws[i] = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(
            params.max_new_tokens
        )
    return torch.from_numpy(draws)


def choose(
    logits: torch.Tensor, draws: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens [B] by inverse transform sampling (or the most probable ones) and their log-probs [B]."""
    logprobs = torch.log_softmax(logits.float() / params.temperature, -1)
    if params.greedy:
        tokens = logprobs.argmax(-1)
    else:
        # float64, so that the last tokens of a large vocabulary keep their share; the comparison with the sum
        # itself (not with 1) keeps a draw near 1 inside the support.
        cumulative = logprobs.double().exp().cumsum(-1)
        target = draws.to(logits.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


class PolicyEngine:
    """Rollouts from the policy in training, in this process.

    Hugging Face models decode with a key/value cache, prompts padded on the left; finished rows leave the
    batch once half of it is done. Any other module is called as `model(ids [B, T]) -> logits [B, T, V]` and
    computes every position anew.

    Args:
        model: causal language model. eos_id: token that ends an action, or None. pad_id: any valid token.
    """

    def __init__(self, model: Any, *, eos_id: int | None, pad_id: int) -> None:
        self.model, self.eos_id, self.pad_id = model, eos_id, pad_id
        self._cached = hasattr(model, "generate")

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        if not prompts:
            return []
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("prompts must hold at least one token each, got an empty one")
        was_training = self.model.training
        self.model.eval()
        step = _CachedSteps if self._cached else _PlainSteps
        try:
            return self._decode(step(self.model, prompts, self.pad_id), len(prompts), params)
        finally:
            self.model.train(was_training)

    def _decode(self, steps: Any, count: int, params: SamplingParams) -> list[Sample]:
        draws = uniforms(params, count) if not params.greedy else torch.zeros(count, params.max_new_tokens)
        samples = [Sample([], [], "length") for _ in range(count)]
        rows = torch.arange(count)  # sample of every row still in the batch
        running = torch.ones(count, dtype=torch.bool)
        tokens: torch.Tensor | None = None
        for position in range(params.max_new_tokens):
            logits = steps.next_logits(tokens)
            tokens, logprobs = choose(logits, draws[rows, position], params)
            for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
                if not running[i]:
                    continue
                sample = samples[int(rows[i])]
                sample.ids.append(token)
                sample.logprobs.append(logprob)
                if token == self.eos_id:
                    sample.finish_reason = "stop"
                    running[i] = False
            alive = int(running.sum())
            if alive == 0:
                break
            if alive <= len(rows) // 2:
                keep = running.nonzero().squeeze(1)
                steps.keep(keep)
                rows, running, tokens = rows[keep], running[keep], tokens[keep.to(tokens.device)]
        return samples


class _CachedSteps:
    """A Hugging Face model, one token a step behind its key/value cache."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        self.model = model
        width = max(map(len, prompts))
        device = next(model.parameters()).device
        padded = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
        self.ids = torch.tensor(padded, device=device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache: Any = None
        self.name = cache_argument(model)

    def next_logits(self, tokens: torch.Tensor | None) -> torch.Tensor:
        if tokens is not None:
            self.ids = tokens[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -self.ids.shape[1] :]
        out = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.name: self.cache},
        )
        self.cache = getattr(out, self.name)
        return out.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.mask.device)
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


class _PlainSteps:
    """Any module from ids to logits; sequences are padded on the right and computed anew."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.sequences = [list(p) for p in prompts]
        self.device = next(model.parameters()).device

    def next_logits(self, tokens: torch.Tensor | None) -> torch.Tensor:
        if tokens is not None:
            for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
                sequence.append(token)
        width = max(map(len, self.sequences))
        padded = [s + [self.pad_id] * (width - len(s)) for s in self.sequences]
        logits = self.model(torch.tensor(padded, device=self.device))
        last = torch.tensor([len(s) - 1 for s in self.sequences], device=self.device)
        return logits[torch.arange(len(last), device=self.device), last]

    def keep(self, rows: torch.Tensor) -> None:
        self.sequences = [self.sequences[i] for i in rows.tolist()]


class Episodes:
    """Plays episodes of a text environment with an engine, many at a time.

    Args:
        engine: continues token sequences.
        tokenizer: `tokenizer(text)["input_ids"]` and `decode(ids, skip_special_tokens=True)`.
        env: its clones are stepped; it is left as it was.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: Any, env: TextEnv) -> None:
        self.engine, self.tokenizer, self.env = engine, tokenizer, env

    def play(self, records: Sequence[int], groups: Sequence[int], params: SamplingParams) -> list[Trajectory]:
        """One episode a row, its environment's randomness keyed like the samples.

        The tokens of a trajectory are exactly those the policy saw and chose: an observation that continues the
        text so far adds its own tokens, masked as no action.

        Raises: ValueError if the environment's transition rewrites the text so far, which one sequence of
            tokens cannot express.
        """
        envs = [self.env.clone() for _ in records]
        numbers = list(params.rows) if params.rows is not None else list(range(len(envs)))
        seeds = [key(params.seed, _ENVIRONMENT, params.step, number) for number in numbers]
        states = [
            env.reset(seed=seed, options={"index": i})[0]
            for env, seed, i in zip(envs, seeds, records, strict=True)
        ]
        rows = [_Row(encode(self.tokenizer, state), record, group, state, seed) for state, record, group, seed in
                zip(states, records, groups, seeds, strict=True)]  # fmt: skip
        running = list(range(len(rows)))
        turn = 0
        while running:
            keyed = SamplingParams(**{**vars(params), "turn": turn, "rows": [numbers[i] for i in running]})
            samples = self.engine.generate([rows[i].ids for i in running], keyed)
            still = []
            for i, sample in zip(running, samples, strict=True):
                action = self.tokenizer.decode(sample.ids, skip_special_tokens=True)
                state, reward, terminated, truncated, _ = envs[i].step(action)
                over = terminated or truncated
                rows[i].act(self.tokenizer, sample, action, state, float(reward), over)
                rows[i].truncated = truncated and not terminated
                if not over:
                    still.append(i)
            running, turn = still, turn + 1
        return [row.trajectory() for row in rows]


class _Row:
    """One episode while it is played."""

    def __init__(self, ids: list[int], record: int, group: int, state: str, seed: int) -> None:
        if not ids:
            raise ValueError(f"the prompt of record {record} must hold at least one token, got an empty text")
        self.ids, self.state = ids, state
        self.actions = [False] * len(ids)
        self.turns = [0] * len(ids)
        self.logprobs = [0.0] * len(ids)
        self.rewards: list[float] = []
        self.states = [state_id(state)]
        self.record, self.group, self.seed, self.finished = record, group, seed, True
        self.truncated = False

    def act(self, tokenizer: Any, sample: Sample, action: str, state: str, reward: float, over: bool) -> None:
        turn = len(self.rewards)
        self._extend(sample.ids, True, turn, sample.logprobs)
        self.rewards.append(reward)
        self.states.append(state_id(state))
        self.finished = sample.finish_reason == "stop"
        if not over:
            answer = answered(tokenizer, state, self.state + action)
            self._extend(answer, False, turn + 1, [0.0] * len(answer))
        self.state = state

    def _extend(self, ids: list[int], chosen: bool, turn: int, logprobs: list[float]) -> None:
        self.ids += ids
        self.actions += [chosen] * len(ids)
        self.turns += [turn] * len(ids)
        self.logprobs += logprobs

    def trajectory(self) -> Trajectory:
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
        )


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text; `special` lets the tokenizer add what opens a sequence."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def demonstration(tokenizer: Any, prompt: str, reference: str, record: int) -> Trajectory:
    """The reference as if the policy had chosen it: prompt, reference, end token."""
    opening, answer = encode(tokenizer, prompt), encode(tokenizer, reference, special=False)
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    ids = torch.tensor(opening + answer)
    actions = torch.arange(len(ids)) >= len(opening)
    return Trajectory(
        token_ids=ids,
        action_mask=actions,
        turn_index=torch.zeros_like(ids),
        sampler_logprobs=torch.zeros(len(ids)),
        rewards=[0.0],
        state_ids=[state_id(prompt)],
        record=record,
        group=record,
    )
