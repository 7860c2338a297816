"""Credit that plays episodes again: equal to the loops, resumable, exact where the causes are known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from react_fast.envs import Record, TextEnv
from react_fast.envs.slots import GroundTruth, ground_truth
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.trainer.algorithms import GRPO, REINFORCE
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.credit import turns_of, units_of
from react_fast.trainer.rollout import Trajectory
from react_fast.trainer.trainer import Trainer


class Characters:
    """The tokenizer of a ground truth's texts, or of an alphabet."""

    eos_token_id = None

    def __init__(self, alphabet: str) -> None:
        self.alphabet, self.pad_token_id = alphabet, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.alphabet.index(character) for character in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.alphabet[i] for i in ids)


class Policy(nn.Module):
    """Each next token hangs on the last one and on the position."""

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 8)
        self.place = nn.Parameter(torch.randn(length, 8))
        self.head = nn.Linear(8, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids) + self.place[: ids.shape[1]]))


ALPHABET = "ab \n.?"


def _dialogue(state: str, action: str, record: Record) -> str:
    return state + action + "?"


def _counts(state: str, action: str, record: Record) -> float:
    """A word's worth hangs on its neighbour, so that effects differ by context."""
    return action.count("a") + 2.0 * action.count("ab") - 0.5 * action.count(".")


def _dialogues() -> TextEnv:
    return TextEnv([Record("?"), Record("??")], transition=_dialogue, reward=_counts, max_turns=2)


def _config(**changes: Any) -> TrainerConfig:
    few = {"seed": 5, "steps": 4, "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 5}
    return TrainerConfig(**{**few, "learning_rate": 5e-2, "credit_floor": 0.1, **changes})


def _policy(vocab_size: int = len(ALPHABET), length: int = 40, seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return Policy(vocab_size, length).double()


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class _Log:
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)


CASES = {
    "causal, tokens": (GRPO(), {"credit": "causal"}),
    "causal, words at positions": (
        GRPO(),
        {"credit": "causal", "credit_actions": "word", "credit_by": "token_at_position", "credit_interventions": 7},
    ),
    "causal, turns, every other step": (
        REINFORCE(),
        {"credit": "causal", "credit_actions": "turn", "credit_by": "token", "credit_every": 2, "steps": 8},
    ),
    "monte carlo, tokens": (GRPO(), {"credit": "monte_carlo", "credit_samples": 2}),
    "monte carlo, lines": (
        REINFORCE(),
        {"credit": "monte_carlo", "credit_actions": "line", "credit_samples": 3, "temperature": 0.8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_reference(case):
    """Parameters equal to 1e-9 after a few steps in float64, on episodes of two turns that each plays itself."""
    algorithm, changes = CASES[case]
    config = _config(**changes)
    fast, slow, plain = _policy(), _policy(), _policy()
    tokenizer, log = Characters(ALPHABET), _Log()
    trainer = Trainer(fast, tokenizer, _dialogues(), algorithm=algorithm, config=config, reporter=log)
    reference = ReferenceTrainer(slow, tokenizer, _dialogues(), algorithm=algorithm, config=config)
    for _ in range(config.steps):
        trainer.train_step()
        expected = reference.train_step(reference.collect())
        assert log.metrics[-1]["environment_steps"] == expected["environment_steps"]
    torch.testing.assert_close(_weights(fast), _weights(slow), rtol=0, atol=1e-9)
    uniform = config.replace(credit="uniform")
    Trainer(plain, tokenizer, _dialogues(), algorithm=algorithm, config=uniform).train()
    assert float((_weights(plain) - _weights(fast)).abs().max()) > 1e-3, "credit must change the update"
