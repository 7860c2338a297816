"""Moments of one kind of score by everything that an action may be told by: token, span, position, kind, group."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..ops.moments import RunningMoments
from .drift import CommonKeys, Drift
from .intervention import Effects

# What one action is, and where it stands; `action_kind` numbers the pairs.
UNITS = ("token", "word", "sentence", "line", "step", "turn", "match", "span")
SIDES = ("prompt", "response", "special")
# Longest span that is told by its tokens, and how many spans, tokens and positions are followed over training.
LONGEST = 16
SPANS, TOKENS, POSITIONS = 512, 1024, 128
# How many tokens are told apart by their position.
PLACES = 1024
FAMILIES = ("token", "position", "kind", "group", "span", "token_at_position")
_FOLLOWED = ("tokens", "spans", "places", "drift")


def action_kind(unit: str, side: int | torch.Tensor) -> Any:
    """Number of an action's kind; `side` numbers SIDES."""
    return UNITS.index(unit) * len(SIDES) + side


def kind_name(number: int) -> str:
    unit, side = divmod(number, len(SIDES))
    return f"{SIDES[side]} {UNITS[unit]}"


def span_key(ids: Sequence[int]) -> int:
    """48 bits that stand for a span."""
    return _digest(",".join(map(str, ids)))


def measurement_key(effects: Effects, unit: str, group: int | None) -> int:
    """48 bits that stand for a text, its actions and their measured effects."""
    told = effects.token_ids, effects.prompt_length, effects.spans, effects.mean.tolist(), unit, group
    return _digest(repr(told))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


@dataclass(frozen=True)
class Labels:
    """What is told of N actions, [N] each.

    Attributes:
        position, kind: int64. group: int64, or None. token: int64, -1 where the action is no single token.
    """

    position: torch.Tensor
    kind: torch.Tensor
    token: torch.Tensor
    group: torch.Tensor | None = None


class Features:
    """Moments of scores by feature; their size hangs on vocabulary, groups and longest sequence alone.

    Attributes:
        by_token [V], by_position [at least the longest sequence], by_kind [24], by_group [G]: RunningMoments.
        by_span [512]: of the spans that `spans` holds, each since it holds its slot. names: their tokens, by key.
        by_token_at_position [1024]: of what `places` holds, as by_span.
        drift: the same over training, without decay, of kinds, groups, 128 positions, 1024 tokens and the spans.
    """

    def __init__(self, vocab_size: int, groups: int, device: torch.device, decay: float = 1.0) -> None:
        self._device = device
        sizes = {"kind": len(UNITS) * len(SIDES), "group": groups, "position": POSITIONS}
        sizes |= {"token": TOKENS, "span": SPANS}
        ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
        self.first = {family: ends[family] - size for family, size in sizes.items()}
        self.drift = Drift(ends["span"], device)
        self.tokens, self.spans = CommonKeys(TOKENS, device), CommonKeys(SPANS, device)
        self.places = CommonKeys(PLACES, device)
        self.names: dict[int, tuple[int, ...]] = {}
        sizes |= {"token": vocab_size, "position": 1, "token_at_position": PLACES}
        (
            self.by_token,
            self.by_position,
            self.by_kind,
            self.by_group,
            self.by_span,
            self.by_token_at_position,
        ) = (RunningMoments(sizes[family], device, decay=decay) for family in FAMILIES)

    def reach(self, length: int) -> None:
        """Room for sequences of this length, doubled so that it is seldom needed."""
        size = len(self.by_position.count)
        if length > size:
            self.by_position = _resized(self.by_position, max(length, 2 * size))

    def advance(self, steps: int) -> None:
        """Let training steps go by, for the decay."""
        for moments in self._moments().values():
            moments.advance(steps)

    def update(self, step: int, scores: torch.Tensor, mask: torch.Tensor, labels: Labels) -> None:
        """Add scores [N] of actions at positions within `reach`; those with `mask` [N] false do not exist."""
        single = mask & (labels.token >= 0)
        self.by_token.update(scores, labels.token, single)
        self.by_position.update(scores, labels.position, mask)
        self.by_kind.update(scores, labels.kind, mask)
        slot, held, lost = self.tokens.vote(labels.token.clamp_min(0), single)
        self._forget("token", lost)
        ids, masks = {"kind": labels.kind, "position": labels.position, "token": slot}, [mask]
        masks += [mask & (labels.position < POSITIONS), held]
        if labels.group is not None:
            ids["group"] = labels.group
            masks.append(mask & (labels.group >= 0) & (labels.group < len(self.by_group.count)))
            self.by_group.update(scores, labels.group, masks[-1])
        columns = torch.cat([self.first[family] + found for family, found in ids.items()])
        self.drift.update(step, scores.repeat(len(ids)), columns, torch.cat(masks))

    def update_spans(self, step: int, scores: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> None:
        """Add scores [N] of the spans that `keys` [N] stand for."""
        slot, held, lost = self.spans.vote(keys, mask)
        self._forget("span", lost)
        self.by_span.update(scores, slot, held)
        self.drift.update(step, scores, self.first["span"] + slot, held)

    def update_tokens(
        self, step: int, scores: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Add scores [N] of tokens [N] at positions [N], by token and by token and position alone."""
        every = torch.ones_like(tokens, dtype=torch.bool)
        self.by_token.update(scores, tokens)
        slot, held, lost = self.tokens.vote(tokens, every)
        self._forget("token", lost)
        self.drift.update(step, scores, self.first["token"] + slot, held)
        slot, held, lost = self.places.vote(positions * len(self.by_token.count) + tokens, every)
        self._forget("token_at_position", lost)
        self.by_token_at_position.update(scores, slot, held)

    def merge(self, other: "Features", *, late: int = 0, lag: int = 0) -> None:
        """Add what another one has, which is left as it was; they ended `late` and `lag` steps ago."""
        copy = Features(len(self.by_token.count), len(self.by_group.count), self._device, self.by_token.decay)
        copy.load_state_dict(other.state_dict())
        length = max(len(one.by_position.count) for one in (self, copy))
        self.by_position, copy.by_position = (_resized(one.by_position, length) for one in (self, copy))
        self.advance(late)
        copy.advance(lag)
        for family, table in (("token", "tokens"), ("span", "spans"), ("token_at_position", "places")):
            ours, theirs = getattr(self, table).merge(getattr(copy, table))
            for one, void in ((self, ours), (copy, theirs)):
                one._forget(family, void)
        for name, moments in self._moments().items():
            moments.merge(copy._moments()[name])
        self.drift.merge(copy.drift)
        self.keep_names(copy.names)

    def span_ids(self, slot: int) -> tuple[int, ...]:
        """Tokens of the span in a slot; a key without a name is a pair of tokens, as `pair_keys` made it."""
        key = int(self.spans.keys[slot])
        return self.names.get(key) or divmod(key, len(self.by_token.count))

    def place_ids(self, slot: int) -> tuple[int, int]:
        """(token, position) in a slot."""
        position, token = divmod(int(self.places.keys[slot]), len(self.by_token.count))
        return token, position

    def pair_keys(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T - 1]: keys of neighbouring tokens."""
        return input_ids[:, :-1].long() * len(self.by_token.count) + input_ids[:, 1:]

    def keep_names(self, names: dict[int, tuple[int, ...]]) -> None:
        """Remember the tokens of spans, as far as they hold a slot."""
        held = set(self.spans.keys.tolist())
        self.names = {key: ids for key, ids in sorted((self.names | names).items()) if key in held}

    def state_dict(self) -> dict[str, Any]:
        parts = {**self._moments(), **{name: getattr(self, name) for name in _FOLLOWED}}
        names = [[key, list(ids)] for key, ids in self.names.items()]
        return {name: part.state_dict() for name, part in parts.items()} | {"names": names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_position = _resized(self.by_position, len(state["by_position"]["count"]))
        for name in (*self._moments(), *_FOLLOWED):
            getattr(self, name).load_state_dict(state[name])
        self.names = {int(key): tuple(ids) for key, ids in state["names"]}

    def _forget(self, family: str, slots: torch.Tensor) -> None:
        """Forget what held these slots, [slots] bool, of a family."""
        lost = slots.nonzero()[:, 0]
        if len(lost):
            if family in self.first:
                self.drift.forget(self.first[family] + lost)
            if family != "token":
                getattr(self, f"by_{family}").forget(lost)

    def _moments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (f"by_{family}" for family in FAMILIES)}


def _resized(moments: RunningMoments, size: int) -> RunningMoments:
    """The same moments with room for `size` ids; those without room are lost."""
    longer = RunningMoments(size, moments.count.device, decay=moments.decay)
    room = longer.state_dict()
    for name, value in moments.state_dict().items():
        room[name][: len(value)] = value[:size]
    longer.load_state_dict(room)
    return longer
