"""A policy of a few thousand parameters, five records and a reward that chance already gets: for trainers."""

from typing import Any

import torch

from react_fast.envs import Record, TextEnv
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.model import fresh_model
from react_fast.trainer.trainer import Trainer

RECORDS = [
    Record("es>pt:Alemania=", "Alemanha", {"rejected": "Germany"}),
    Record("es>pt:Francia=", "França", {"rejected": "Francia"}),
    Record("es>it:España=", "Spagna", {"rejected": "Espanha, Espagne"}),
    Record("es>it:Suiza=", "Svizzera", {"rejected": "Suiza"}),
    Record("es>pt:Japón=", "Japão", {"rejected": "J"}),
]


def vowels(state: str, action: str, record: Record) -> float:
    """Rewards from 0 to 1 that a policy without any training already gets now and then."""
    return sum(letter in "aeiou" for letter in action) / 8


def make_env(**options: Any) -> TextEnv:
    return TextEnv(RECORDS, reward=vowels, **options)


def make_policy(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[Any, Any]:
    texts = [text for record in RECORDS for text in (record.prompt, record.reference or "")]
    sizes = {"vocab_size": 300, "hidden_size": 16, "layers": 2, "heads": 2, "max_length": 64}
    model, tokenizer = fresh_model(texts, seed=3, dropout=dropout, **sizes)
    return model.to(dtype), tokenizer


def make_config(**changes: Any) -> TrainerConfig:
    few = {"seed": 11, "steps": 5, "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 6}
    return TrainerConfig(**{**few, "learning_rate": 1e-2, **changes})


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


class Characters:
    """A tokenizer with a token for every character of an alphabet, and no others."""

    eos_token_id, pad_token_id = None, 0

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.alphabet.index(letter) for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.alphabet[i] for i in ids)


class Log:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.warnings: dict[str, str] = {}

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)

    def samples(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def warn(self, name: str, text: str) -> None:
        self.warnings[name] = text


def twins(algorithm: Any, config: TrainerConfig, env: TextEnv) -> tuple[Trainer, ReferenceTrainer, Log]:
    """The trainer and its reference on equal policies, and what the former logs."""
    (fast, tokenizer), (slow, _), log = make_policy(), make_policy(), Log()
    trainer = Trainer(fast, tokenizer, env, algorithm=algorithm, config=config, reporter=log)
    return trainer, ReferenceTrainer(slow, tokenizer, env, algorithm=algorithm, config=config), log
