"""An environment whose causes are known: a text of slots with a structural causal model behind it.

    U ~ Bernoulli(1/2)                                                         what the prompt's cue says
    X_i ~ Bernoulli(sigmoid(pull_i (2 U - 1) + link_i (2 X_{parent_i} - 1)))   slot i: one character, on or off
    R = sum_i weight_i X_i + direct U + noise E,   E ~ N(0, 1)                 the reward

A slot is a *cause* if setting it changes the expected reward, *confounded* if it only goes with U, which pays by
itself, and *noise* otherwise. Every effect has a closed form, since R is linear and parents have no parents.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .record import Record
from .text_env import Reward, TextEnv

# Two characters for each slot, off and on; then the cues of U = 0 and U = 1, and one that is no slot's.
_SLOT_CHARACTERS = string.ascii_letters + string.digits + "+/"
_CUES, _NEUTRAL = "?!", "_"
MOST_SLOTS = len(_SLOT_CHARACTERS) // 2


@dataclass(frozen=True)
class GroundTruth:
    """The structural causal model above, K slots. Also the tokenizer of its texts: one token a character.

    Token ids: 2 i for slot i off, 2 i + 1 for on, 2 K and 2 K + 1 for the cues, 2 K + 2 for the neutral
    character, which stands in a slot as off.

    Attributes:
        weights: [K] direct effect of each slot. pulls: [K] log-odds. links: [K] log-odds.
        parents: [K] an earlier slot without parent, or -1 for none.
        direct: what U pays. noise: standard deviation of the reward's noise.
    Raises: ValueError for lists of different lengths, more than 32 slots, or a parent that is none.
    """

    weights: tuple[float, ...]
    pulls: tuple[float, ...]
    links: tuple[float, ...]
    parents: tuple[int, ...]
    direct: float = 0.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MOST_SLOTS:
            raise ValueError(f"weights must hold 1 to {MOST_SLOTS} slots, got {self.slots}")
        for name in ("pulls", "links", "parents"):
            if len(getattr(self, name)) != self.slots:
                raise ValueError(
                    f"{name} must be [{self.slots}] like weights, got {len(getattr(self, name))}"
                )
        for i, parent in enumerate(self.parents):
            if parent != -1 and not (0 <= parent < i and self.parents[parent] == -1):
                raise ValueError(f"parents[{i}] must be -1 or an earlier slot without parent, got {parent}")

    @property
    def slots(self) -> int:
        return len(self.weights)

    @property
    def vocab_size(self) -> int:
        return 2 * self.slots + 3

    @property
    def neutral_id(self) -> int:
        return 2 * self.slots + 2

    @property
    def characters(self) -> str:
        """The character of every token id."""
        return _SLOT_CHARACTERS[: 2 * self.slots] + _CUES + _NEUTRAL

    # ---- text ----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids. Raises: ValueError for a character that has none."""
        ids = [self.characters.find(character) for character in text]
        if -1 in ids:
            raise ValueError(f"text must hold characters of {self.characters!r}, got {text[ids.index(-1)]!r}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        characters = self.characters
        return "".join(characters[i] for i in ids)

    def prompt(self, hidden: int) -> str:
        """The cue of U."""
        return _CUES[hidden]

    def values(self, text: str) -> np.ndarray:
        """[K] float64: 1 where a slot is on; another character than its own, or none, is off."""
        return np.array(
            [text[i : i + 1] == _SLOT_CHARACTERS[2 * i + 1] for i in range(self.slots)], dtype=float
        )

    def write(self, rng: np.random.Generator, hidden: int) -> str:
        """A text as the model writes it."""
        on: list[float] = []
        for i in range(self.slots):
            parent = on[self.parents[i]] if self.parents[i] >= 0 else 0.5
            on.append(float(rng.random() < self._probability(i, hidden, parent)))
        return "".join(_SLOT_CHARACTERS[2 * i + int(x)] for i, x in enumerate(on))

    # ---- reward --------------------------------------------------------------------------------------------

    def reward(self, text: str, hidden: int, rng: np.random.Generator | None = None) -> float:
        """R; without its noise if no `rng` is given."""
        noise = 0.0 if rng is None else self.noise * rng.standard_normal()
        return float(self.values(text) @ self.weights) + self.direct * hidden + noise

    def env(self, *, noisy: bool = False) -> TextEnv:
        """The environment: a prompt is a cue, an action the whole text, its reward R, without noise unless
        `noisy`.

        The noise is the episode's: drawn at the reset, so that its seed brings it back for another action.
        """
        records = [Record(self.prompt(hidden), metadata={"hidden": hidden}) for hidden in (0, 1)]
        if noisy:
            return NoisyEnv(records, reward=self._text_reward, deviation=self.noise)
        return TextEnv(records, reward=self._text_reward)

    # ---- closed forms --------------------------------------------------------------------------------------

    def value(self, text: str, hidden: int) -> float:
        """E[R | U, the text begins so]: the value of a state; its first len(text) slots are given."""
        given = dict(enumerate(self.values(text)[: len(text)]))
        return self._expected(hidden, given)

    def effects(self, hidden: int | None = None) -> np.ndarray:
        """[K] E[R | do(X_i = 1)] - E[R | do(X_i = 0)], given U or over both."""
        return np.mean(
            [
                [self._expected(u, {i: 1.0}) - self._expected(u, {i: 0.0}) for i in range(self.slots)]
                for u in ((0, 1) if hidden is None else (hidden,))
            ],
            axis=0,
        )

    def associations(self) -> np.ndarray:
        """[K] E[R | X_i = 1] - E[R | X_i = 0]: what an observer sees, who does not see U."""
        return np.array([self._seen(i, 1.0) - self._seen(i, 0.0) for i in range(self.slots)])

    @property
    def kinds(self) -> tuple[str, ...]:
        """[K] "cause" | "confounded" | "noise"."""
        return tuple(
            "cause" if abs(effect) > 1e-12 else "confounded" if pull and self.direct else "noise"
            for effect, pull in zip(self.effects(), self.pulls, strict=True)
        )

    # ---- inside --------------------------------------------------------------------------------------------

    def _text_reward(self, state: str, action: str, record: Record) -> float:
        return self.reward(action, record.metadata["hidden"])

    def _probability(self, i: int, hidden: int, parent: float) -> float:
        """P(X_i = 1 | U, parent); a parent of 0.5 is none."""
        return float(1 / (1 + np.exp(-self.pulls[i] * (2 * hidden - 1) - self.links[i] * (2 * parent - 1))))

    def _means(self, hidden: int, given: Mapping[int, float]) -> np.ndarray:
        """[K] P(X_i = 1 | U, do(given)); `given` holds probabilities of slots that are set."""
        means: list[float] = []
        for i, parent in enumerate(self.parents):
            if i in given:
                means.append(given[i])
            elif parent < 0:
                means.append(self._probability(i, hidden, 0.5))
            else:
                both = [self._probability(i, hidden, x) for x in (0.0, 1.0)]
                means.append(both[0] + means[parent] * (both[1] - both[0]))
        return np.array(means)

    def _expected(self, hidden: int, given: Mapping[int, float]) -> float:
        return float(self._means(hidden, given) @ self.weights) + self.direct * hidden

    def _seen(self, i: int, value: float) -> float:
        """E[R | X_i = value]: both causes of X_i, U and its parent, are as the value makes them likely."""
        total, chance = 0.0, 0.0
        for hidden in (0, 1):
            given, likely = {i: value}, self._likely(i, value, hidden, None)
            if self.parents[i] >= 0:
                before = self._means(hidden, {})[self.parents[i]]
                given[self.parents[i]] = before * self._likely(i, value, hidden, 1.0) / likely
            total += likely * self._expected(hidden, given)
            chance += likely
        return total / chance

    def _likely(self, i: int, value: float, hidden: int, parent: float | None) -> float:
        """P(X_i = value | U, parent); None: whatever the parent is."""
        on = self._means(hidden, {})[i] if parent is None else self._probability(i, hidden, parent)
        return float(on if value else 1 - on)


class NoisyEnv(TextEnv):
    """Every episode's reward has an error of its own."""

    def __init__(self, records: Sequence[Record], *, reward: Reward, deviation: float) -> None:
        super().__init__(records, reward=reward)
        self.deviation = deviation

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        found = super().reset(seed=seed, options=options)
        self._error = self.deviation * float(self.np_random.standard_normal())
        return found

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        state, reward, terminated, truncated, info = super().step(action)
        return state, reward + self._error, terminated, truncated, info


def ground_truth(
    slots: int = 16,
    *,
    causes: int = 3,
    mediated: int = 1,
    confounded: int = 4,
    weight: float = 1.0,
    direct: float = 8.0,
    noise: float = 1.0,
    seed: int = 0,
) -> GroundTruth:
    """A structural causal model with its slots in random order.

    Args:
        slots: in all, at most 32; those of no kind below are noise.
        causes: slots that pay `weight` each. mediated: slots that pay nothing but make a cause of their own,
            which follows later, likely; at most `causes`.
        confounded: slots that go with U and pay nothing.
        weight, direct: what a cause and U pay; with 0 for `weight` nothing has an effect.
        noise: standard deviation of the reward's noise.
        seed: of the order.
    Raises: ValueError if the kinds do not fit.
    """
    if min(causes, mediated, confounded) < 0 or mediated > causes or causes + mediated + confounded > slots:
        raise ValueError(
            f"causes + mediated + confounded must fit in {slots} slots, mediated at most causes, "
            f"got {causes} + {mediated} + {confounded}"
        )
    order = np.random.default_rng(seed).permutation(slots)
    weights, pulls, links = np.zeros((3, slots))
    parents = np.full(slots, -1)
    paid, free = order[: causes + mediated], order[causes + mediated :]
    pairs = np.sort(paid[: 2 * mediated].reshape(2, mediated), axis=0)
    links[pairs[1]], parents[pairs[1]] = 2.0, pairs[0]
    weights[np.setdiff1d(paid, pairs[0])] = weight
    pulls[free[:confounded]] = 0.5
    return GroundTruth(
        weights=tuple(weights.tolist()),
        pulls=tuple(pulls.tolist()),
        links=tuple(links.tolist()),
        parents=tuple(parents.tolist()),
        direct=direct,
        noise=noise,
    )
