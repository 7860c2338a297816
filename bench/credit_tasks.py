"""Two tasks with a sparse signal for `bench.credit`, and the policy that learns them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from react_fast.envs import Record, TextEnv
from react_fast.envs.slots import NoisyEnv, ground_truth
from react_fast.trainer.batch import Batch
from react_fast.trainer.rollout import Sample, SamplingParams, uniforms
from react_fast.trainer.rollout.truncation import choose

WORDS = {"?": "go", "!": "hi"}
LETTERS = "abcdefghijklmnopqrst"


class Policy(nn.Module):
    """ids [B, T] -> logits [B, T, V] from the prompt's token, the last token and the position; about 10k
    parameters.
    """

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
    """The policy as a rollout engine that computes the last position alone. Texts have one length."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        draws = uniforms(params, len(prompts))
        prompt = self.policy.embed(torch.tensor([ids[0] for ids in prompts]))
        last, begin = (
            torch.tensor([ids[-1] for ids in prompts]),
            torch.tensor([len(ids) for ids in prompts]) - 1,
        )
        chosen, logprobs = [], []
        for t in range(params.max_new_tokens):
            place = self.policy.place[(begin + t).clamp_max(len(self.policy.place) - 1)]
            logits = self.policy.logits(self.policy.embed(last), prompt, place)
            last, scores, _ = choose(logits, draws[:, t], params)
            chosen.append(last)
            logprobs.append(scores)
        rows = zip(torch.stack(chosen, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        return [Sample(*row, "length") for row in rows]


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
    """What is learned: the environment, its texts, a response's part of the best reward, and an action's true
    effect, out of the batch and the policy's probabilities [B, T-1, V].
    """

    env: TextEnv
    characters: str
    length: int
    steps: int
    interventions: int
    by: Literal["episode", "token", "token_at_position"]
    quality: Callable[[str, Record], float]
    effects: Callable[[Batch, torch.Tensor], torch.Tensor]


def slots(seed: int) -> Task:
    """32 slots of 67 characters each; three pay, the noise of a reward is as large as what one pays."""
    truth = ground_truth(32, causes=3, mediated=0, confounded=4, noise=1.0, seed=seed)
    weights, best = torch.tensor(truth.weights), sum(truth.weights)

    def quality(text: str, record: Record) -> float:
        return float(truth.values(text) @ truth.weights) / best

    def effects(batch: Batch, probabilities: torch.Tensor) -> torch.Tensor:
        slots = torch.arange(truth.slots)
        on = batch.targets == 2 * slots + 1
        return weights * (on.double() - probabilities[:, slots, 2 * slots + 1].double())

    return Task(
        truth.env(noisy=True),
        truth.characters,
        truth.slots,
        240,
        6,
        "token_at_position",
        quality,
        effects,
    )


def text(seed: int) -> Task:
    """32 letters of 20; the reward is 1 if the prompt's word of two letters is among them, else 0, and the
    episode's judge adds noise of deviation 1.
    """
    characters, length = LETTERS + "".join(WORDS), 32

    def quality(text: str, record: Record) -> float:
        return float(WORDS[record.prompt] in text)

    def effects(batch: Batch, probabilities: torch.Tensor) -> torch.Tensor:
        """Probability of another letter, for the letters of the word where it first stands."""
        found = torch.zeros(batch.mask.shape, dtype=torch.float64)
        for row, ids in enumerate(batch.input_ids.tolist()):
            written = "".join(characters[i] for i in ids)
            place = written.find(WORDS[written[0]])
            if place > 0:
                found[row, place - 1 : place + 1] = 1.0
        return found * (1 - probabilities.double().gather(2, batch.targets[..., None])[..., 0])

    env = NoisyEnv(
        [Record(prompt) for prompt in WORDS],
        reward=lambda state, action, record: quality(action, record),
        deviation=1.0,
    )
    return Task(env, characters, length, 100, 20, "token_at_position", quality, effects)


TASKS = {"slots": slots, "text": text}
