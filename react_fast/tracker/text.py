"""One prompt and response as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import _check

Ids = Sequence[int] | torch.Tensor
Span = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """Token ids of prompt and response, P + R; prompt_length: P."""

    ids: tuple[int, ...]
    prompt_length: int


def check_ids(name: str, value: Ids, vocab_size: int) -> list[int]:
    """One sequence of token ids as a list.

    Raises: TypeError, ValueError or IndexError in one line.
    """
    if isinstance(value, torch.Tensor):
        if _check.integer(name, value).dim() != 1:
            raise ValueError(f"{name} must be one sequence of token ids, got {list(value.shape)}")
        value = value.tolist()
    ids = list(value)
    if not ids:
        raise ValueError(f"{name} must hold at least one token, got none")
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name}[{i}] must be an integer, got {token!r}")
        if not 0 <= token < vocab_size:
            raise IndexError(f"{name}[{i}] must be in [0, {vocab_size}), got {token}")
    return ids


def check_count(name: str, value: Any, least: int) -> int:
    """A whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def before_last(actions: torch.Tensor) -> torch.Tensor:
    """[B, T] true where an action comes later in the row."""
    count = actions.cumsum(1)
    return count < count[:, -1:]


def check_rectangle(name: str, value: torch.Tensor) -> None:
    if value.dim() != 2:
        raise ValueError(f"{name} must be [B, T], got {list(value.shape)}")
