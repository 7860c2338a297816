"""Optimisers and learning rates by the names of the configuration; which records a step sees."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .config import TrainerConfig
from .rollout import permutation

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainerConfig) -> torch.optim.Optimizer:
    trained = [p for p in parameters if p.requires_grad]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    return OPTIMIZERS[config.optimizer](trained, **options)


def learning_rate(update: int, config: TrainerConfig) -> float:
    """Rate of an optimiser update (counted from 0): linear warm-up, then the schedule down to the last one."""
    warmup, total = config.lr_warmup_steps, config.steps * config.updates_per_step
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, total - warmup)
    return config.learning_rate * SCHEDULES[config.lr_schedule](min(done, 1.0))


def prompts(step: int, count: int, size: int, seed: int) -> list[int]:
    """`size` of `count` records: every pass over the records is a new permutation, keyed by the seed."""
    positions = range(step * size, (step + 1) * size)
    orders = {
        position // count: permutation(count, seed, position // count) for position in positions[::count]
    }
    orders |= {positions[-1] // count: permutation(count, seed, positions[-1] // count)}
    return [int(orders[position // count][position % count]) for position in positions]
