"""Counterfactuals: what stands in an action's place in do(action := counterfactual)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .policy import Policy, gumbel
from .text import Span, Text, check_count

# Streams of the noise that an action is drawn anew with; what follows it has the streams below.
_ANEW = 2**32


@dataclass(frozen=True)
class Deletion:
    """The action's tokens are left out; what follows moves up."""

    def replacement(self, tokens: list[int]) -> list[int]:
        return []


@dataclass(frozen=True)
class Replacement:
    """A baseline token stands in the place of each of the action's tokens."""

    token_id: int

    def replacement(self, tokens: list[int]) -> list[int]:
        return [self.token_id] * len(tokens)


@dataclass(frozen=True)
class Resample:
    """The policy draws the action anew, as many tokens, from what stands before it.

    The effect is then the action's advantage: what it brings beyond what the policy would have done.

    Attributes:
        draws: redrawn actions where the response is fixed; with `samples` there is one for each sample.
    """

    draws: int = 8

    def __post_init__(self) -> None:
        check_count("draws", self.draws, 1)


@dataclass(frozen=True)
class DonorSwap:
    """Tokens of other texts stand in the action's place: donor s in sample s, and from the first one again.

    Attributes:
        donors: token ids of each donor, at least one donor and one token each.
    """

    donors: tuple[tuple[int, ...], ...]

    def __init__(self, donors: Sequence[Sequence[int]]) -> None:
        object.__setattr__(self, "donors", tuple(tuple(donor) for donor in donors))
        if not self.donors or not all(self.donors):
            raise ValueError(f"donors must hold at least one text of at least one token, got {donors!r}")


def check_counterfactual(name: str, value: Any) -> Any:
    """One of the above, or an object with a method replacement(tokens)."""
    if not isinstance(value, (Resample, DonorSwap)) and not hasattr(value, "replacement"):
        raise TypeError(f"{name} must have a method replacement(tokens), got {value!r}")
    return value


def draws(counterfactual: Any) -> int:
    """Different replacements of one action while the response is fixed."""
    if isinstance(counterfactual, Resample):
        return counterfactual.draws
    return len(counterfactual.donors) if isinstance(counterfactual, DonorSwap) else 1


def fits(counterfactual: Any, text: Text, span: Span) -> bool:
    """Whether something is left that the response can be a continuation of."""
    start, end = span
    if isinstance(counterfactual, Resample):
        return start > 0
    if start > 0 or end < text.prompt_length or isinstance(counterfactual, DonorSwap):
        return True
    return len(counterfactual.replacement(list(text.ids[start:end]))) > 0


def replacements(
    counterfactual: Any,
    policy: Policy,
    text: Text,
    spans: Sequence[Span],
    count: int,
    *,
    seed: int,
    eos_id: int | None,
) -> list[list[list[int]]]:
    """[A][count] token ids that stand in place of each action; a redrawn action ends behind `eos_id`.

    Raises: IndexError in one line for an id outside the vocabulary.
    """
    if isinstance(counterfactual, Resample):
        return _redrawn(policy, text, spans, count, seed=seed, eos_id=eos_id)
    if isinstance(counterfactual, DonorSwap):
        donors = [list(donor) for donor in counterfactual.donors]
        found = [[donors[s % len(donors)] for s in range(count)] for _ in spans]
    else:
        found = [[list(counterfactual.replacement(list(text.ids[a:b])))] * count for a, b in spans]
    for token in {token for row in found for tokens in row for token in tokens}:
        if not 0 <= token < policy.vocab_size:
            raise IndexError(f"counterfactual must hold ids in [0, {policy.vocab_size}), got {token}")
    return found


def _redrawn(
    policy: Policy, text: Text, spans: Sequence[Span], count: int, *, seed: int, eos_id: int | None
) -> list[list[list[int]]]:
    found: dict[Span, list[list[int]]] = {}
    noise = gumbel(seed)
    for length in sorted({end - start for start, end in spans}):
        part = [span for span in dict.fromkeys(spans) if span[1] - span[0] == length]
        drawn = policy.continuations(
            [text.ids[:start] for start, _ in part for _ in range(count)],
            streams=[_ANEW + s for _ in part for s in range(count)],
            limit=length,
            eos_id=eos_id,
            noise=noise,
        )
        found |= {span: drawn[i * count : (i + 1) * count] for i, span in enumerate(part)}
    return [found[span] for span in spans]
