"""What the tracker finds, as plain Python values: the report draws them, JSON holds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KeyToken:
    """Mean attribution or effect of one token of the vocabulary over everything the tracker saw.

    Attributes:
        token_id, token: of the vocabulary; its text.
        kind: "attribution" (observational, gradient x input) or "effect" (interventional).
        count: observations.
        mean, standard_error: of them; the unit is the outcome's (nats for log-probabilities and losses).
        low, high: 95% interval of the mean.
        p_value: two-sided, of the mean being 0.
        significant: after Benjamini-Hochberg at a false discovery rate of 5% over all tokens of this kind.
    """

    token_id: int
    token: str
    kind: str
    count: int
    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float
    significant: bool


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
        scores: R rows of P + R numbers; row i belongs to response token i, and is 0 from that token on.
        title: what the page writes above it.
    """

    prompt_tokens: tuple[str, ...]
    response_tokens: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    title: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HeatMap":
        """The inverse of dataclasses.asdict, after JSON too, which has no tuples."""
        prompt, response = tuple(values["prompt_tokens"]), tuple(values["response_tokens"])
        return cls(prompt, response, tuple(tuple(row) for row in values["scores"]), values["title"])


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
