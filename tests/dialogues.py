"""A small policy, its alphabet, and dialogues of two turns whose reward hangs on context."""

from typing import Any

import torch
from torch import nn

from react_fast.envs import Record, TextEnv
from react_fast.trainer.config import TrainerConfig


class Characters:
    """The tokenizer of a ground truth's texts, or of an alphabet."""

    eos_token_id = None

    def __init__(self, alphabet: str) -> None:
        self.alphabet, self.pad_token_id = alphabet, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.alphabet.index(character) for character in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.alphabet[i] for i in ids)


class Ending(Characters):
    """With an end token, which no text shows."""

    def __init__(self) -> None:
        super().__init__(ALPHABET + "$")
        self.eos_token_id = len(ALPHABET)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return super().decode(ids).replace("$", "" if skip_special_tokens else "$")


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


def counts(state: str, action: str, record: Record) -> float:
    """A word's worth hangs on its neighbour, so that effects differ by context."""
    return action.count("a") + 2.0 * action.count("ab") - 0.5 * action.count(".")


def dialogues() -> TextEnv:
    return TextEnv([Record("?"), Record("??")], transition=_dialogue, reward=counts, max_turns=2)


def settings(**changes: Any) -> TrainerConfig:
    few = {"seed": 5, "steps": 3, "prompts_per_step": 1, "group_size": 4, "max_new_tokens": 4}
    return TrainerConfig(**{**few, "learning_rate": 5e-2, "credit_floor": 0.1, **changes})


def policy(vocab_size: int = len(ALPHABET), length: int = 40, seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return Policy(vocab_size, length).double()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
