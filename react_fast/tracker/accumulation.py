"""What a tracker has found so far: moments by token and position, examples; their state and their merge."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ..ops import _check
from ..ops.moments import RunningMoments
from .findings import key_tokens, position_means
from .intervention import Effects
from .policy import Policy
from .records import EffectRow, HeatMap, KeyToken, PositionMean
from .text import check_count

KINDS = ("attribution", "effect")
_MOMENTS = ("by_token", "by_position", "effects_by_token")


class Accumulation:
    """The part of a CausalityTracker that grows; its size hangs on vocabulary and longest sequence alone, examples
    aside.

    Attributes:
        by_token, by_position: moments of the attribution that `observe` read.
        effects_by_token: moments of the effects of single tokens. calls: of `observe`.
        heat_maps, effects: of the examples.
    """

    def __init__(self, policy: Policy, tokenizer: Any) -> None:
        self.policy, self.tokenizer = policy, tokenizer
        self.calls = 0
        self.by_token = RunningMoments(policy.vocab_size, policy.device)
        self.by_position = RunningMoments(1, policy.device)
        self.effects_by_token = RunningMoments(policy.vocab_size, policy.device)
        self.heat_maps: list[HeatMap] = []
        self.effects: list[EffectRow] = []

    def key_tokens(self, k: int = 20, *, kind: str = "attribution", min_count: int = 5) -> list[KeyToken]:
        """The k tokens whose 95% interval of the mean is farthest from 0, the most telling first.

        Args:
            k: most rows.
            kind: "attribution" (of `observe`) or "effect" (of `intervene`).
            min_count: observations a token needs, at least 2.
        """
        _check.choice("kind", kind, KINDS)
        moments = self.by_token if kind == "attribution" else self.effects_by_token
        limits = check_count("k", k, 0), check_count("min_count", min_count, 2)
        return key_tokens(moments, kind, *limits, text=lambda token_id: self.texts([token_id])[0])

    def positions(self, *, min_count: int = 2) -> list[PositionMean]:
        """Mean attribution at every position of the sequence with at least `min_count` observations."""
        return position_means(self.by_position, check_count("min_count", min_count, 2))

    def settings(self) -> dict[str, Any]:
        """What a report says about how it came about."""
        return {}

    def findings(self, k: int = 50) -> dict[str, Any]:
        """What the report shows: the arguments of `CausalityReport`."""
        observed, tested = self.key_tokens(k), self.key_tokens(k, kind="effect", min_count=2)
        return {
            "key_tokens": observed + tested,
            "by_position": self.positions(),
            "heat_maps": list(self.heat_maps),
            "effects": list(self.effects),
            "meta": {
                **self.settings(),
                "observed_calls": self.calls,
                "observed_tokens": int(self.by_token.count.sum()),
                "interventions": int(self.effects_by_token.count.sum()),
            },
        }

    def report(self) -> Any:
        """The findings as a CausalityReport: .to_html(path), .to_json(path), ..."""
        from .report import CausalityReport

        return CausalityReport(**self.findings())

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything found so far: tensors and plain JSON values."""
        return {
            "calls": self.calls,
            **{name: getattr(self, name).state_dict() for name in _MOMENTS},
            "heat_maps": [asdict(heat_map) for heat_map in self.heat_maps],
            "effects": [asdict(row) for row in self.effects],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a `state_dict`.

        Raises: ValueError if it is of a policy with another vocabulary, or something else.
        """
        missing = [name for name in ("calls", *_MOMENTS, "heat_maps", "effects") if name not in state]
        if missing:
            raise ValueError(f"state must be a tracker's state_dict, got one without {missing[0]!r}")
        size = _size(state["by_token"])
        if size != self.policy.vocab_size:
            raise ValueError(f"state must be of {self.policy.vocab_size} tokens like the policy, got {size}")
        self.by_position = RunningMoments(_size(state["by_position"]), self.policy.device)
        for name in _MOMENTS:
            getattr(self, name).load_state_dict(state[name])
        self.calls = int(state["calls"])
        self.heat_maps = [HeatMap.from_dict(values) for values in state["heat_maps"]]
        self.effects = [EffectRow.from_dict(values) for values in state["effects"]]

    def merge(self, other: "Accumulation") -> None:
        """Add what another tracker of the same vocabulary found, as if this one had seen both.

        Raises: TypeError for something else, ValueError for another vocabulary.
        """
        if not isinstance(other, Accumulation):
            raise TypeError(f"other must be a CausalityTracker, got {type(other).__name__}")
        if other.policy.vocab_size != self.policy.vocab_size:
            raise ValueError(
                f"other must have {self.policy.vocab_size} tokens, got {other.policy.vocab_size}"
            )
        self._reach(other._length)
        self.by_token.merge(other.by_token)
        self.effects_by_token.merge(other.effects_by_token)
        self.by_position.merge(_resized(other.by_position, self._length, self.policy.device))
        shift = len(self.heat_maps)
        self.calls += other.calls
        self.heat_maps += other.heat_maps
        self.effects += [replace(row, example=row.example + shift) for row in other.effects]

    # ---- inside ------------------------------------------------------------------------------------------

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Text of every token on its own; its number without a tokenizer."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        return [self.tokenizer.decode([i]) for i in ids]

    @property
    def _length(self) -> int:
        return _size(self.by_position.state_dict())

    def _reach(self, length: int) -> None:
        """Room for sequences of this length, doubled so that it is seldom needed."""
        if length > self._length:
            self.by_position = _resized(self.by_position, max(length, 2 * self._length), self.policy.device)

    def _accumulate(self, effects: Effects) -> None:
        single = [i for i, (start, end) in enumerate(effects.spans) if end - start == 1]
        ids = torch.tensor([effects.token_ids[effects.spans[i][0]] for i in single], dtype=torch.int64)
        self.effects_by_token.update(effects.mean[single].to(self.policy.device), ids.to(self.policy.device))


def _resized(moments: RunningMoments, size: int, device: torch.device) -> RunningMoments:
    """The same moments with room for `size` ids."""
    state = moments.state_dict()
    longer = RunningMoments(size, device)
    room = longer.state_dict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            room[name] = torch.cat([value.to(device), value.new_zeros(size - len(value), device=device)])
    longer.load_state_dict(room)
    return longer


def _size(state: dict[str, Any]) -> int:
    return len(state["count"])
