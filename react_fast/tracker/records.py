"""What the tracker finds, as plain Python values: the report draws them, JSON holds them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """Mean of a feature over the training steps first to last, with its 95% interval, NaN if not known."""

    first: int
    last: int
    count: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class KeyFeature:
    """Mean attribution or effect of what actions have in common, over everything the tracker saw.

    Attributes:
        kind: "attribution" (observational, gradient x input), "effect" (interventional, of `intervene`) or
            "return_effect" (interventional, on the return, which the trainer's credit measured).
        family: "token", "span", "position", "kind" (of action), "group" or "token_at_position".
        name: text of the token or span; number of the position; name of the kind or group.
        ids: of the tokens; token and position; else the number.
        count: observations, the feature's support. effective_count: of equally weighted ones; less under decay.
        mean, standard_error: of them; the unit is the outcome's (nats for log-probabilities and losses).
        low, high: 95% interval of the mean. p_value: two-sided, of the mean being 0. All three are NaN where the
            observations are all the same, as nothing is then known about their spread.
        significant: after Benjamini-Hochberg at a false discovery rate of 5% over all features of this kind in the
            families that were asked for.
        drift: mean over the later half of the training minus that over the earlier; NaN if it is not known.
        drift_low, drift_high: its 95% interval.
        drift_significant: as `significant`, over the drifts whose interval has a width.
        windows: the mean over training, without decay.
    """

    kind: str
    family: str
    name: str
    ids: tuple[int, ...]
    count: int
    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float
    significant: bool
    effective_count: float = math.nan
    drift: float = math.nan
    drift_low: float = math.nan
    drift_high: float = math.nan
    drift_significant: bool = False
    windows: tuple[Window, ...] = ()

    @property
    def direction(self) -> str:
        """Whether the feature reliably "raises" or "lowers" the outcome, or that is "unclear"."""
        return "unclear" if not self.significant else "raises" if self.mean > 0 else "lowers"


@dataclass(frozen=True)
class PositionMean:
    """Mean attribution of the tokens at one position of the sequence, counted from 0, with its 95%
    interval."""

    position: int
    count: int
    mean: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class HeatMap:
    """Attribution of every response token to every token before it.

    Attributes:
        prompt_tokens, response_tokens: texts of the P and R tokens.
        scores: R rows of P + R numbers; row i belongs to response token i, and is 0 from that token on. No row at
            all for a long text, of which only `totals` are known.
        title: what the page writes above it.
        totals: P + R numbers, the attribution of the whole response; none: the sums over `scores`.
    """

    prompt_tokens: tuple[str, ...]
    response_tokens: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    title: str = ""
    totals: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HeatMap":
        """The inverse of dataclasses.asdict, after JSON too, which has no tuples."""
        prompt, response = tuple(values["prompt_tokens"]), tuple(values["response_tokens"])
        scores = tuple(tuple(row) for row in values["scores"])
        return cls(prompt, response, scores, values["title"], tuple(values["totals"]))

    def sums(self) -> list[float]:
        """Attribution of the whole response to each token; NaN where a number is missing."""
        if self.totals:
            return list(self.totals)
        empty = [math.nan] * (len(self.prompt_tokens) + len(self.response_tokens))
        return [_sum(column) for column in zip(*self.scores, strict=True)] or empty


@dataclass(frozen=True)
class EffectRow:
    """Effect of one action of one example: outcome(as it is) - outcome(do(action := counterfactual)).

    Attributes:
        tokens: texts of the action's tokens.
        mean, low, high: effect and 95% interval; all three are equal when the response is fixed and nothing
            was sampled.
        example: number of the example; the heat map of the same number shows the same text.
        start, end: place in prompt + response.
        in_response: false for a part of the prompt.
        samples: responses that the mean is over.
        p_value: two-sided, of the effect being 0; None when nothing was sampled.
        significant: after Benjamini-Hochberg at 5% over the actions of the example.
    """

    tokens: tuple[str, ...]
    mean: float
    low: float
    high: float
    example: int = 0
    start: int = 0
    end: int = 0
    in_response: bool = False
    samples: int = 1
    p_value: float | None = None
    significant: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EffectRow":
        """The inverse of dataclasses.asdict, after JSON too, which has no tuples."""
        return cls(**{**values, "tokens": tuple(values["tokens"])})


def _sum(scores: Sequence[float]) -> float:
    return math.fsum(scores) if all(map(math.isfinite, scores)) else math.nan
