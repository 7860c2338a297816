"""What a tracker has found so far: moments by feature, examples; their state and their merge."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist

from ..ops import _check
from ..ops.moments import RunningMoments
from .features import (
    FAMILIES,
    LONGEST,
    SIDES,
    UNITS,
    Features,
    Labels,
    action_kind,
    kind_name,
    measurement_key,
    span_key,
)
from .findings import key_features, position_means
from .intervention import Effects
from .policy import Policy
from .records import EffectRow, HeatMap, KeyFeature, PositionMean
from .text import check_count, token_name, token_texts

# Where the features of a kind are kept.
KINDS = {"attribution": "observed", "effect": "tested", "return_effect": "credited"}
# The newest examples are kept.
EXAMPLES = 32
# Measurements that are told from a repetition.
MEASURED = 1024


class Accumulation:
    """The part of a CausalityTracker that accumulates. Its size hangs on vocabulary, groups and longest sequence,
    not on the number of steps.

    Attributes:
        observed: Features of the attribution that `observe` read.
        tested: Features of the effects that `intervene` measured, each action's mean as one observation. What
            comes again with the text, actions and numbers of one of the newest 1024 is not counted again.
        credited: Features of the effects on the return that `add_return_effects` was given.
        calls: of `observe`. step: of the training, the last that was seen.
        heat_maps, effects: of the newest 32 examples.
    """

    def __init__(
        self, policy: Policy, tokenizer: Any, *, groups: Sequence[str] = (), decay: float = 1.0
    ) -> None:
        listed = isinstance(groups, Sequence) and not isinstance(groups, str)
        if not listed or not all(isinstance(name, str) for name in groups):
            raise TypeError(f"groups must be a list of names, got {groups!r}")
        _check_apart("groups", groups)
        self.policy, self.tokenizer, self.groups = policy, tokenizer, tuple(groups)
        self.decay = decay
        self.heat_maps: list[HeatMap] = []
        self.effects: list[EffectRow] = []
        # Keys of the newest measurements, in order.
        self._measured: dict[int, None] = {}
        self._clear()

    @property
    def by_token(self) -> RunningMoments:
        """Attribution by token of the vocabulary."""
        return self.observed.by_token

    @property
    def by_position(self) -> RunningMoments:
        """Attribution by place in the sequence."""
        return self.observed.by_position

    @property
    def effects_by_token(self) -> RunningMoments:
        """Effects of single tokens."""
        return self.tested.by_token

    def key_features(
        self,
        k: int = 20,
        *,
        kind: str = "attribution",
        families: Sequence[str] = ("token", "span", "position"),
        min_count: int = 5,
    ) -> list[KeyFeature]:
        """The k features that most reliably raise or lower the outcome: those whose 95% interval of the mean is
        farthest from 0 come first.

        Args:
            k: most rows.
            kind: "attribution" (of `observe`, whose spans are two neighbouring tokens), "effect" (of
                `intervene`, whose spans are its actions of up to 16 tokens) or "return_effect" (of
                `add_return_effects`).
            families: of "token", "span", "position", "kind" (such as "prompt word"), "group" and, for
                "return_effect", "token_at_position".
            min_count: observations a feature needs, at least 2; effective ones where there is decay.
        """
        _check.choice("kind", kind, tuple(KINDS))
        for family in families:
            _check.choice("families", family, FAMILIES)
        _check_apart("families", families)
        limits = check_count("k", k, 0), check_count("min_count", min_count, 2)
        return key_features(getattr(self, KINDS[kind]), kind, tuple(families), *limits, name=self._name)

    def add_return_effects(
        self,
        effects: Sequence[float],
        spans: Sequence[Sequence[int]],
        positions: Sequence[int],
        by_token: Sequence[tuple[float, int, int]],
        *,
        unit: str,
        step: int,
        group: int | None = None,
    ) -> None:
        """Accumulate what the actions of one response did to its return, as the trainer's credit measured it: by
        span, position, kind and group, and `by_token` by token and by token at position.

        Args:
            effects: [n], of each action: the return, less that with something else in its place.
            spans: [n] token ids of every action. positions: [n] of its first token, counted from the response's.
            by_token: (effect, token, position) of everything that is told of single tokens.
            unit: what the actions are, one of `actions` of `intervene`.
            step: of the training. group: number of the response's group.
        Raises: TypeError or ValueError in one line, IndexError for another group.
        """
        _check.choice("unit", unit, UNITS)
        self._check_group(group)
        self._at(check_count("step", step, 0))
        if not effects:
            return
        special = [bool(self._special[self._numbers(span)].all()) for span in spans]
        labels = Labels(
            position=self._numbers(positions),
            kind=self._numbers([action_kind(unit, SIDES.index("response") + last) for last in special]),
            token=self._numbers([-1] * len(spans)),
            group=None if group is None else self._numbers([group] * len(spans)),
        )
        self.credited.reach(max(positions) + 1)
        self._add(self.credited, self._reals(effects), spans, labels)
        values, tokens, places = zip(*by_token, strict=True)
        self.credited.update_tokens(step, self._reals(values), self._numbers(tokens), self._numbers(places))

    def positions(self, *, min_count: int = 2) -> list[PositionMean]:
        """Mean attribution at every position of the sequence with at least `min_count` observations."""
        return position_means(self.by_position, check_count("min_count", min_count, 2))

    def settings(self) -> dict[str, Any]:
        """What a report says about how it came about."""
        return {}

    def findings(self, k: int = 50) -> dict[str, Any]:
        """What the report shows: the arguments of `CausalityReport`, with the k features of each kind, and beside
        them all kinds of actions and groups."""
        narrow, wide = ("token", "span", "position", "token_at_position"), ("kind", "group")
        size = len(self.by_token.count)
        features = [
            feature
            for kind, least in (("attribution", 5), ("effect", 2), ("return_effect", 5))
            for feature in (
                *self.key_features(k, kind=kind, families=narrow, min_count=least),
                *self.key_features(size, kind=kind, families=wide, min_count=2),
            )
        ]
        return {
            "features": features,
            "by_position": self.positions(),
            "heat_maps": list(self.heat_maps),
            "effects": list(self.effects),
            "meta": {
                **self.settings(),
                "training_steps": self.step,
                "observed_calls": self.calls,
                "observed_tokens": int(self.by_token.count.sum()),
                "interventions": int(self.tested.by_kind.count.sum()),
                "return_effects": int(self.credited.by_kind.count.sum()),
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
            "step": self.step,
            "decay": self.decay,
            "groups": list(self.groups),
            "observed": self.observed.state_dict(),
            "tested": self.tested.state_dict(),
            "credited": self.credited.state_dict(),
            "heat_maps": [asdict(heat_map) for heat_map in self.heat_maps],
            "effects": [asdict(row) for row in self.effects],
            "measured": list(self._measured),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a `state_dict`.

        Raises: ValueError if it is of another vocabulary, decay or other groups, or something else; the tracker
            then stays as it was.
        """
        try:
            calls, step = int(state["calls"]), int(state["step"])
            size = len(state["observed"]["by_token"]["count"])
            self._check_same("state", size, state["groups"], state["decay"])
            features = {name: self._features() for name in KINDS.values()}
            for name, one in features.items():
                one.load_state_dict(state[name])
            heat_maps = [HeatMap.from_dict(values) for values in state["heat_maps"]]
            effects = [EffectRow.from_dict(values) for values in state["effects"]]
            measured = dict.fromkeys(map(int, state["measured"]))
        except KeyError as error:
            raise ValueError(f"state must be a tracker's state_dict, got one without {error}") from None
        except TypeError as error:
            raise ValueError(f"state must be a tracker's state_dict, got another: {error}") from None
        self.calls, self.step = calls, step
        self.observed, self.tested, self.credited = features.values()
        self.heat_maps, self.effects, self._measured = heat_maps, effects, measured

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state into one file, for `merge`."""
        torch.save(self.state_dict(), path)

    def merge(self, other: "Accumulation | str | PathLike[str]") -> None:
        """Add what another tracker found, as if this one had seen both; it may be the file that its `save` wrote.
        Effects that both measured count twice.

        With decay, of two that ended at different steps the earlier one is as old as it is late. Where more tokens
        or spans were seen than there is room for, which of them are followed may differ from one that saw both.

        Raises: TypeError for something else; ValueError for another file, vocabulary, decay or other groups.
        """
        if isinstance(other, (str, PathLike)):
            other = self._of_state(_loaded(other))
        if not isinstance(other, Accumulation):
            raise TypeError(f"other must be a CausalityTracker, got {type(other).__name__}")
        self._check_same("other", other.policy.vocab_size, other.groups, other.decay)
        latest = max(self.step, other.step)
        late, lag = latest - self.step, latest - other.step
        for name in KINDS.values():
            getattr(self, name).merge(getattr(other, name), late=late, lag=lag)
        self.step = latest
        self.calls += other.calls
        shift = len(self.heat_maps)
        self.heat_maps += other.heat_maps
        self.effects += [replace(row, example=row.example + shift) for row in other.effects]
        self._measured |= other._measured
        self._keep_newest()

    def gather(self, group: Any = None) -> "Accumulation":
        """What all ranks of a process group found, merged in the order of the ranks: the same on every rank.

        This tracker stays as it is, so that it may go on and be gathered again.

        Args:
            group: of torch.distributed; None: the default one.
        """
        states: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self.state_dict(), group)
        whole = self._of_state(states[0])
        for state in states[1:]:
            whole.merge(self._of_state(state))
        return whole

    # ---- inside ------------------------------------------------------------------------------------------

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Text of every token, as `token_texts` tells them; its number without a tokenizer."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        return token_texts(self.tokenizer, ids)

    def _clear(self) -> None:
        self.calls = self.step = 0
        self.observed, self.tested, self.credited = (self._features() for _ in KINDS)
        self.heat_maps, self.effects = [], []
        self._measured = {}
        special = sorted(set(getattr(self.tokenizer, "all_special_ids", ())))
        self._special = torch.zeros(self.policy.vocab_size, dtype=torch.bool, device=self.policy.device)
        self._special[[i for i in special if i < self.policy.vocab_size]] = True

    def _features(self) -> Features:
        return Features(self.policy.vocab_size, len(self.groups), self.policy.device, self.decay)

    def _of_state(self, state: dict[str, Any]) -> "Accumulation":
        """One like this, with another state."""
        found = copy.copy(self)
        found._clear()
        found.load_state_dict(state)
        return found

    def _check_same(self, name: str, vocab_size: int, groups: Sequence[str], decay: float) -> None:
        own = {"tokens": self.policy.vocab_size, "groups": list(self.groups), "decay": self.decay}
        for what, value in {"tokens": vocab_size, "groups": list(groups), "decay": decay}.items():
            if value != own[what]:
                wanted = f"{own[what]} tokens" if what == "tokens" else f"{what} {own[what]}"
                raise ValueError(f"{name} must have {wanted} like this tracker, got {value}")

    def _check_group(self, group: int | None) -> None:
        if group is not None and check_count("group", group, 0) >= len(self.groups):
            raise IndexError(f"group must be in [0, {len(self.groups)}), got {group}")

    def _at(self, step: int) -> None:
        """Training is at this step."""
        if step > self.step:
            for name in KINDS.values():
                getattr(self, name).advance(step - self.step)
            self.step = step

    def _keep_newest(self) -> None:
        drop = max(0, len(self.heat_maps) - EXAMPLES)
        self.heat_maps = self.heat_maps[drop:]
        self.effects = [
            replace(row, example=row.example - drop) for row in self.effects if row.example >= drop
        ]
        self._measured = dict.fromkeys(list(self._measured)[-MEASURED:])

    def _sides(self, input_ids: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        """Number in SIDES of every token; `response` is true where the policy chose it."""
        return torch.where(self._special[input_ids.long()], SIDES.index("special"), response.long())

    def _accumulate(self, effects: Effects, unit: str, group: int | None) -> None:
        key = measurement_key(effects, unit, group)
        if key in self._measured:
            return
        self._measured[key] = None
        self._keep_newest()
        ids, prompt = effects.token_ids, effects.prompt_length
        spans = [ids[start:end] for start, end in effects.spans]
        sides = self._sides(self._numbers(ids), self._numbers(range(len(ids))) >= prompt).tolist()
        labels = Labels(
            position=self._numbers([start for start, _ in effects.spans]),
            # A longer action is special only if it holds nothing else.
            kind=self._numbers([action_kind(unit, min(sides[slice(*span)])) for span in effects.spans]),
            token=self._numbers([span[0] if len(span) == 1 else -1 for span in spans]),
            group=None if group is None else self._numbers([group] * len(spans)),
        )
        self.tested.reach(len(ids))
        self._add(self.tested, effects.mean.to(self.policy.device), spans, labels)

    def _add(
        self, features: Features, scores: torch.Tensor, spans: Sequence[Sequence[int]], labels: Labels
    ) -> None:
        """Add effects [n] of actions with these tokens to features."""
        features.update(self.step, scores, scores.isfinite(), labels)
        told = self._numbers([1 < len(span) <= LONGEST for span in spans]).bool()
        keys = [span_key(span) for span in spans]
        features.update_spans(self.step, scores, self._numbers(keys), told & scores.isfinite())
        features.keep_names(dict(zip(keys, map(tuple, spans), strict=True)))

    def _numbers(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.policy.device)

    def _reals(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.policy.device)

    def _name(self, family: str, ids: Sequence[int]) -> str:
        """A feature's name: the text of its tokens, or what its number stands for."""
        if family in ("token", "token_at_position"):
            return str(ids[0]) if self.tokenizer is None else token_name(self.tokenizer, ids[0])
        if family == "span":
            return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(list(ids))
        if family == "kind":
            return kind_name(ids[0])
        return self.groups[ids[0]] if family == "group" else str(ids[0])


def _check_apart(name: str, values: Sequence[str]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must differ from each other, got {list(values)}")


def _loaded(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # whatever a file of another kind makes of itself
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"other must be a file that CausalityTracker.save wrote, got {path}")
    return state
