"""Training prompts that change from step to step while their answers stay: against learning them by heart."""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from ..envs import Record, TextEnv
from ..envs.record import rendered
from .rollout import key

# Gives a record whose right answer is the same; evaluations see the records as they are.
Augment = Callable[[Record, random.Random], Record]

_AUGMENTATION = 5  # stream of random numbers


def augmented(
    env: TextEnv, augment: Augment, chosen: Iterable[int], *, seed: int, step: int, tokenizer: Any = None
) -> TextEnv:
    """The environment with some records augmented, drawn by (seed, step, record): a resumed run sees the same, and
    whatever plays a step's episodes again does, too. The tokenizer's chat template renders messages.

    Raises: TypeError if `augment` returns something else than a Record.
    """
    changed = {}
    for i in dict.fromkeys(chosen):
        found: Any = augment(env.records[i], random.Random(key(seed, _AUGMENTATION, step, i)))
        if not isinstance(found, Record):
            raise TypeError(f"env.augment must return a Record, got {type(found).__name__}")
        changed[i] = rendered(found, tokenizer)
    view = copy.copy(env)
    view.records = _Overlay(env.records, changed)
    return view


class _Overlay(Sequence[Record]):
    def __init__(self, records: Sequence[Record], changed: dict[int, Record]) -> None:
        self.records, self.changed = records, changed

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | Sequence[Record]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.changed.get(i, self.records[i])
