"""Does causal credit learn from fewer environment steps?

    python -m bench.credit [--seeds 10] [--jobs 1] [--tasks slots text]

Two tasks with a sparse signal, five contestants, the same policy, optimiser and rollouts:

    uniform      GRPO
    causal       credit="causal": interventions are environment steps, and counted
    attribution  credit="attribution": gradient x input of the policy
    oracle       causal's rule with the true effects, which cost nothing
    placebo      causal, interventions and all, with every trajectory's weights shuffled among its actions

A finished run lies in bench/out/credit and is not run again. Writes bench/results/credit.md, credit.json (the curves)
and credit.png.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from react_fast.envs import Record, TextEnv
from react_fast.envs.slots import GroundTruth, ground_truth
from react_fast.tracker import CausalityTracker
from react_fast.trainer.algorithms import GRPO
from react_fast.trainer.batch import Batch
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.rollout import Sample, SamplingParams, uniforms
from react_fast.trainer.trainer import Trainer

from .report import OUT, RESULTS

CONTESTANTS = {
    "uniform": "tab:blue",
    "causal": "tab:red",
    "attribution": "tab:purple",
    "oracle": "tab:green",
    "placebo": "tab:gray",
}
WINDOW = 8  # training steps that a point of a curve is the mean of
WORDS = {"?": "bad", "!": "fed"}
LETTERS = "abcdefgh"


class Policy(nn.Module):
    """ids [B, T] -> logits [B, T, V] from the prompt's token, the last token and the position; about 10k parameters."""

    def __init__(self, vocab_size: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.place = nn.Parameter(0.5 * torch.randn(length, width))
        self.inner = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, vocab_size)
        nn.init.normal_(self.embed.weight, std=0.3)
        nn.init.normal_(self.head.weight, std=0.05)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        seen = self.embed(ids)
        return self.logits(seen, seen[:, :1], self.place[: ids.shape[1]])

    def logits(self, last: torch.Tensor, prompt: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(last + prompt + place)))


class Engine:
    """The policy as a rollout engine that computes the last position alone. Prompts have one token, actions one
    length."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        draws = uniforms(params, len(prompts))
        ids = torch.tensor(prompts)
        prompt, chosen = self.policy.embed(ids[:, 0]), []
        for t in range(params.max_new_tokens):
            logits = self.policy.logits(self.policy.embed(ids[:, 0]), prompt, self.policy.place[t])
            cumulative = logits.double().softmax(-1).cumsum(-1)
            ids = torch.searchsorted(cumulative, draws[:, t : t + 1] * cumulative[:, -1:], right=True)
            ids = ids.clamp_max(logits.shape[1] - 1)
            chosen.append(ids)
        zeros = [0.0] * params.max_new_tokens
        return [Sample(row, zeros, "length") for row in torch.cat(chosen, 1).tolist()]


class Characters:
    """One token a character."""

    eos_token_id, pad_token_id = None, 0

    def __init__(self, characters: str) -> None:
        self.characters = characters

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.characters.index(character) for character in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.characters[i] for i in ids)


@dataclass(frozen=True)
class Task:
    """What is learned: the environment, its texts, a response's part of the best reward, and an action's true effect."""

    env: TextEnv
    characters: str
    length: int
    steps: int
    interventions: int
    by: str
    quality: Callable[[str, Record], float]
    effects: Callable[[Batch], torch.Tensor]


def slots(seed: int) -> Task:
    """32 slots of 67 characters each; three pay, the noise of a reward is as large as what one pays."""
    truth = ground_truth(32, causes=3, mediated=0, confounded=4, noise=1.0, seed=seed)
    weights, best = torch.tensor(truth.weights), sum(truth.weights)

    def quality(text: str, record: Record) -> float:
        return float(truth.values(text) @ truth.weights) / best

    def effects(batch: Batch) -> torch.Tensor:
        on = batch.targets == 2 * torch.arange(truth.slots) + 1
        return torch.where(on, weights, -weights / (truth.vocab_size - 1)).double()

    return Task(truth.env(noisy=True), truth.characters, truth.slots, 260, 4, "token_at_position", quality, effects)


def text(seed: int) -> Task:
    """16 letters of 8; the reward is 1 if the prompt's word of three letters is among them, else 0."""

    def reward(state: str, action: str, record: Record) -> float:
        return float(WORDS[record.prompt] in action)

    def effects(batch: Batch) -> torch.Tensor:
        """1 for the letters of the word where it stands once or more."""
        found = torch.zeros(batch.mask.shape, dtype=torch.float64)
        for row, ids in enumerate(batch.input_ids.tolist()):
            written = "".join(characters[i] for i in ids)
            place = written.find(WORDS[written[0]])
            if place > 0:
                found[row, place - 1 : place + 2] = 1.0
        return found

    characters = LETTERS + "".join(WORDS)
    env = TextEnv([Record(prompt) for prompt in WORDS], reward=reward)
    return Task(env, characters, 16, 260, 4, "token", lambda t, record: reward("", t, record), effects)


TASKS = {"slots": slots, "text": text}


class Contest(Trainer):
    """A trainer that records a curve, and whose credit may be an oracle's or a placebo's."""

    def __init__(self, task: Task, contestant: str, seed: int, learning_rate: float) -> None:
        torch.manual_seed(seed)
        policy = Policy(len(task.characters), task.length + 1)
        credit = contestant if contestant in ("attribution", "causal") else "uniform"
        config = TrainerConfig(
            seed=seed,
            steps=task.steps,
            prompts_per_step=2,
            group_size=16,
            max_new_tokens=task.length,
            learning_rate=learning_rate,
            optimizer="adam",
            credit="causal" if contestant == "placebo" else credit,
            credit_floor=0.1,
            credit_interventions=task.interventions,
            credit_by=task.by,
            threads=1,
        )
        super().__init__(
            policy,
            Characters(task.characters),
            _light(task.env),
            algorithm=GRPO(),
            tracker=CausalityTracker(policy, every=task.steps + 1) if credit == "attribution" else None,
            config=config,
            engine=Engine(policy),
        )
        self.task, self.contestant = task, contestant
        self.curve: list[tuple[float, float]] = []

    def score(self, trajectories: Any) -> Batch:
        batch = super().score(trajectories)
        if self.contestant == "oracle":
            batch.effects = self.task.effects(batch)
        responses = [self.tokenizer.decode(t.token_ids[1:].tolist()) for t in trajectories]
        records = [self.env.records[t.record] for t in trajectories]
        qualities = [self.task.quality(*pair) for pair in zip(responses, records, strict=True)]
        self.curve.append((self.replays.environment_steps, float(np.mean(qualities))))
        return batch

    def credit(self, batch: Batch) -> Batch:
        batch = super().credit(batch)
        if self.contestant == "placebo" and batch.advantages is not None:
            generator = torch.Generator().manual_seed(self.step)
            order = torch.rand(batch.advantages.shape, generator=generator).argsort(1)
            batch.advantages = batch.advantages.gather(1, order)  # every token is an action
        return batch


def _light(env: TextEnv) -> TextEnv:
    """Its clones share what is never changed; a reset with a seed makes their random numbers anew."""
    env.clone = partial(copy.copy, env)  # type: ignore[method-assign]
    return env


def run(job: tuple[str, str, int, float]) -> Path:
    """One curve: [[environment steps, quality], ...] as a file."""
    name, contestant, seed, learning_rate = job
    target = OUT / "credit" / f"{name}-{contestant}-{learning_rate:g}-{seed}.json"
    if not target.exists():
        torch.set_num_threads(1)
        contest = Contest(TASKS[name](seed), contestant, seed, learning_rate)
        contest.train()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(contest.curve))
    return target
