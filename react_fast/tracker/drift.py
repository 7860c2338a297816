"""Moments over windows of training steps, and the commonest keys, both in a fixed amount of memory."""

from typing import Any

import torch

from ..ops import _check
from ..ops.moments import RunningMoments

WINDOWS = 32
_FREE = -1
# Odd, so that keys of the same remainder scatter over all slots of a power of two.
_SPREAD = 40503


class Drift:
    """Moments of `size` features in each of 32 windows of equally many steps.

    Windows begin at multiples of their width. When a step lies behind the last one, neighbours are merged and the
    width doubles, so that what is kept does not grow, and does not depend on when steps came.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.width = size, 1
        self.moments = RunningMoments(WINDOWS * size, device)

    def update(
        self, step: int, scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Add scores of a step to features `ids`, in [0, size) where the mask is true."""
        while step >= WINDOWS * self.width:
            self._halve()
        self.moments.update(scores, ids + step // self.width * self.size, mask)

    def forget(self, features: torch.Tensor) -> None:
        """Forget features [n] int64."""
        rows = torch.arange(WINDOWS, device=features.device) * self.size
        self.moments.forget((rows[:, None] + features).reshape(-1))

    def merge(self, other: "Drift") -> None:
        """Add what another one saw of the same steps or of others; `other` ends as wide as this one."""
        while self.width < other.width:
            self._halve()
        while other.width < self.width:
            other._halve()
        self.moments.merge(other.moments)

    def windows(self) -> list[tuple[int, int, RunningMoments]]:
        """(first step, last step, moments of all features) of every window up to the last that saw anything."""
        used = _wide(self.moments.count).any(1).nonzero()
        last = int(used[-1]) + 1 if len(used) else 0
        return [(w * self.width, (w + 1) * self.width - 1, self._rows(slice(w, w + 1))) for w in range(last)]

    def state_dict(self) -> dict[str, Any]:
        return {"width": self.width, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.width = int(state["width"])
        self._load({name: state[name] for name in self._state()})

    def _state(self) -> dict[str, torch.Tensor]:
        return self.moments.state_dict()

    def _load(self, state: dict[str, torch.Tensor]) -> None:
        self.moments.load_state_dict(state)

    def _rows(self, rows: slice) -> RunningMoments:
        found = {name: _wide(value)[rows].reshape(-1) for name, value in self._state().items()}
        moments = RunningMoments(len(found["count"]), found["count"].device)
        moments.load_state_dict(found)
        return moments

    def _halve(self) -> None:
        pairs = self._rows(slice(0, None, 2))
        pairs.merge(self._rows(slice(1, None, 2)))
        room = {
            name: torch.cat([value, torch.zeros_like(value)]) for name, value in pairs.state_dict().items()
        }
        self._load(room)
        self.width *= 2


class CommonKeys:
    """Which of many keys come often: a fixed number of slots, each for one key.

    A key has one slot that it may take, if that is free. Each time it comes it gets a vote, each time another key
    of this slot comes it loses one; below 0 it loses the slot. Keys below `slots` never meet. Which key holds a
    slot may depend on how a stream is cut; what is counted while a key holds it does not.

    Attributes:
        keys: [slots] int64, -1 where free. votes: [slots] int64.
    Source: Boyer & Moore 1981 (majority vote); Yang et al. 2018, Elastic Sketch, for one vote a slot.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.keys = torch.full((slots,), _FREE, dtype=torch.int64, device=device)
        self.votes = torch.zeros(slots, dtype=torch.int64, device=device)

    def vote(self, keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Count keys [N] int64, at least 0 where the mask [N] is true.

        Returns: ([N] slot of every key, [N] bool whether the key holds it, [slots] bool which slots became free).
        """
        slot, endless = self.slot(keys), torch.iinfo(torch.int64).max
        least = torch.full_like(self.keys, endless)
        least.scatter_reduce_(0, slot, keys.masked_fill(~mask, endless), "amin")
        free = (self.keys == _FREE) & (least < endless)
        self.keys = torch.where(free, least, self.keys)
        held = mask & (self.keys[slot] == keys)
        self.votes = self.votes.scatter_add(0, slot, 2 * held.long() - mask.long())
        lost = self.votes < 0
        self._drop(lost)
        return slot, held & ~lost[slot], lost

    def slot(self, keys: torch.Tensor) -> torch.Tensor:
        """The slot that each key may take."""
        slots = len(self.keys)
        return (keys + keys // slots * _SPREAD) % slots

    def merge(self, other: "CommonKeys") -> tuple[torch.Tensor, torch.Tensor]:
        """Count what another one counted. Of two keys of a slot the one with more votes stays, then the lesser.

        Returns: [slots] bool each: where what was counted here is void, and where what was counted there is.
        """
        same = self.keys == other.keys
        wins = (other.votes > self.votes) | ((other.votes == self.votes) & (other.keys < self.keys))
        taken = ~same & (other.keys != _FREE) & ((self.keys == _FREE) | wins)
        void = ~same & ~taken
        apart = (self.votes - other.votes).abs()
        self.votes = torch.where(same, self.votes + other.votes, apart)
        self.keys = torch.where(taken, other.keys, self.keys)
        return taken, void

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"keys": self.keys.clone(), "votes": self.votes.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises: TypeError for another dtype, ValueError for another size."""
        own = self.state_dict()
        for name, value in own.items():
            _check.dtype(name, _check.tensor(name, state[name]), value.dtype, "these keys")
            _check.shape(name, state[name], value.shape, "these keys")
        self.keys, self.votes = (state[name].to(self.keys.device).clone() for name in own)

    def _drop(self, lost: torch.Tensor) -> None:
        self.keys = self.keys.masked_fill(lost, _FREE)
        self.votes = self.votes.masked_fill(lost, 0)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.view(WINDOWS, -1)
