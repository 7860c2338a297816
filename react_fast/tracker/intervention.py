"""Interventions: what happens to the outcome when an action is taken out of the text.

effect(A) = E[outcome | as it is] - E[outcome | do(A := counterfactual)]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ops import _check
from .counterfactuals import draws, fits, replacements
from .outcomes import Row, logprob_sums, outcomes
from .policy import Policy, gumbel
from .records import EffectRow
from .statistics import CORRECTIONS, bootstrap_interval, student_interval, student_p_value
from .text import Span, Text

INTERVALS = ("student_t", "bootstrap")


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of the actions of one prompt and response.

    Attributes:
        token_ids: prompt and response. prompt_length: tokens of the prompt.
        spans: [A] places (start, end) of the actions in token_ids.
        tokens: tokens that the policy computed for it; what came from the key/value cache is not counted.
        values: [A, n] float64, the effect in each of n samples, or of n replacements in a fixed response; n = 1
            for the response as given and one replacement.
        mean, standard_error, low, high: [A] float64; for n = 1 nothing was sampled, so the error is 0 and the
            interval is the mean.
        p_value: [A], two-sided, of the mean being 0; NaN for n = 1.
        significant: [A] bool, after the correction at 5% over the A actions; False for n = 1.
        special: [A] bool, whether the action holds a special token of the tokenizer, such as a chat's marks.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    spans: tuple[Span, ...]
    tokens: int
    values: torch.Tensor
    mean: torch.Tensor
    standard_error: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    p_value: torch.Tensor
    significant: torch.Tensor
    special: torch.Tensor

    def rows(self, texts: Sequence[str], example: int = 0) -> list[EffectRow]:
        """The effects as records; `texts` are those of token_ids."""
        return [
            EffectRow(
                tokens=tuple(texts[start:end]),
                mean=float(self.mean[i]),
                low=float(self.low[i]),
                high=float(self.high[i]),
                example=example,
                start=start,
                end=end,
                in_response=end > self.prompt_length,
                samples=self.values.shape[1],
                p_value=float(self.p_value[i]) if self.values.shape[1] > 1 else None,
                significant=bool(self.significant[i]),
            )
            for i, (start, end) in enumerate(self.spans)
        ]


@dataclass(frozen=True)
class Experiment(Text):
    """A text, what an intervention makes of it, and how its effects are measured; see
    CausalityTracker.intervene."""

    counterfactual: Any
    outcome: Any = "logprob"
    samples: int | None = None
    seed: int = 0
    limit: int = 1
    eos_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    interval: str = "student_t"
    correction: str = "benjamini_hochberg"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check.choice("interval", self.interval, INTERVALS)
        _check.choice("correction", self.correction, tuple(CORRECTIONS))

    def changed(self, span: Span, tokens: Sequence[int], end: int | None = None) -> list[int]:
        """The text up to `end` (of the original; None: all) with these tokens in the action's place."""
        start, stop = span
        return [*self.ids[:start], *tokens, *self.ids[stop:end]]

    def begin(self, span: Span, tokens: Sequence[int]) -> int:
        """Where the response begins in a changed text: an action that began in the prompt belongs to it."""
        start, stop = span
        if start >= self.prompt_length:
            return self.prompt_length
        return start + len(tokens) + max(0, self.prompt_length - stop)

    def is_special(self, span: Span) -> bool:
        return not self.special_ids.isdisjoint(self.ids[slice(*span)])

    def prefix(self, span: Span) -> list[int]:
        """What the policy had read when it continued behind the action: at least the whole prompt."""
        return list(self.ids[: max(span[1], self.prompt_length)])


def intervene(policy: Policy, text: Experiment, spans: Sequence[Span]) -> Effects:
    """See CausalityTracker.intervene."""
    before = policy.tokens
    count = _count(text, spans)
    values = np.empty((0, count))
    if spans:
        instead = replacements(
            text.counterfactual, policy, text, spans, count, seed=text.seed,
            eos_id=None if text.samples is None else text.eos_id,
        )  # fmt: skip
        values = (_fixed if text.samples is None else _sampled)(policy, text, spans, instead)
    return summary(text, spans, values, policy.tokens - before)


def summary(text: Experiment, spans: Sequence[Span], values: np.ndarray, tokens: int) -> Effects:
    """Means, errors and intervals of [A, n] effects."""
    count = values.shape[1]
    mean = values.mean(1) if len(values) else np.empty(0)
    error, low, high = np.zeros_like(mean), mean, mean
    p_value, significant = np.full_like(mean, np.nan), np.zeros(len(mean), dtype=bool)
    if count > 1 and len(values):
        error = values.std(1, ddof=1) / np.sqrt(count)
        p_value = student_p_value(mean, error, np.full(len(mean), count))
        significant = CORRECTIONS[text.correction](p_value)
        low, high = student_interval(mean, error, np.full(len(mean), count))
        if text.interval == "bootstrap":
            low, high = bootstrap_interval(values, seed=text.seed)
    special = np.array([text.is_special(span) for span in spans], dtype=bool)
    found = (values, mean, error, low, high, p_value, significant, special)
    arrays = (torch.from_numpy(np.array(x)) for x in found)
    return Effects(text.ids, text.prompt_length, tuple(spans), tokens, *arrays)


def check_spans(text: Experiment, spans: Sequence[Span], *, drop: bool) -> list[Span]:
    """Those that leave something to continue from; the others are dropped, or refused in one line."""
    fitting = [span for span in spans if fits(text.counterfactual, text, span)]
    if not drop and len(fitting) < len(spans):
        i, span = next((i, span) for i, span in enumerate(spans) if span not in fitting)
        raise ValueError(f"actions[{i}] must leave a prompt token to continue from, got {span}")
    return fitting


def _count(text: Experiment, spans: Sequence[Span]) -> int:
    """Samples, or replacements of a fixed response, as the budget allows."""
    wanted = draws(text.counterfactual) if text.samples is None else text.samples
    if text.max_tokens is None or not spans:
        return wanted
    if text.samples is None:
        lengths, least = len(text.ids) * len(spans), 1
    else:
        rolled = 2 * sum(max(end, text.prompt_length) + text.limit for _, end in spans)
        lengths, least = rolled * (1 if callable(text.outcome) else 2), 2
    affordable = text.max_tokens // lengths
    if affordable < least:
        raise ValueError(
            f"max_tokens must be at least {least * lengths} for {len(spans)} actions, got {text.max_tokens}"
        )
    return min(wanted, affordable)


def _fixed(
    policy: Policy, text: Experiment, spans: Sequence[Span], instead: list[list[list[int]]]
) -> np.ndarray:
    """[A, n]: effects on the response as given, for n replacements of every action."""
    pairs = [(span, tokens) for span, drawn in zip(spans, instead, strict=True) for tokens in drawn]
    if text.outcome == "logprob":
        effects = _logprob_effects(policy, text, pairs)
    else:
        changed = [(text.changed(span, tokens), text.begin(span, tokens)) for span, tokens in pairs]
        found = outcomes(policy, text.outcome, [(list(text.ids), text.prompt_length), *changed])
        effects = found[0] - found[1:]
    return effects.reshape(len(spans), -1)


def _logprob_effects(policy: Policy, text: Experiment, pairs: Sequence[tuple[Span, list[int]]]) -> np.ndarray:
    """[N]: both sums are over the response tokens behind the action; those before it do not change."""
    firsts = [max(end, text.prompt_length) for (_, end), _ in pairs]
    given = policy.response_logprobs([text.ids], [text.prompt_length])[0].cpu().numpy()
    tails = np.append(np.cumsum(given[::-1])[::-1], 0.0)
    changed = [text.changed(span, tokens) for span, tokens in pairs]
    places = [len(row) - (len(text.ids) - first) for row, first in zip(changed, firsts, strict=True)]
    after = logprob_sums(policy, list(zip(changed, places, strict=True)))
    return tails[firsts] - after


def _sampled(
    policy: Policy, text: Experiment, spans: Sequence[Span], instead: list[list[list[int]]]
) -> np.ndarray:
    """[A, n]: effects on responses that the policy continues behind the action, sample s under one noise."""
    count = len(instead[0])
    before = [(text.prefix(span), text.prompt_length, s) for span in spans for s in range(count)]
    after = [
        (text.changed(span, tokens, end=max(span[1], text.prompt_length)), text.begin(span, tokens), s)
        for span, drawn in zip(spans, instead, strict=True)
        for s, tokens in enumerate(drawn)
    ]
    if text.outcome == "logprob":
        given = continued(policy, text, before)
        drawn = [row[len(prefix) :] for (row, _), (prefix, _, _) in zip(given, before, strict=True)]
        sides = [
            [([*prefix, *tokens], len(prefix)) for (prefix, _, _), tokens in zip(side, drawn, strict=True)]
            for side in (before, after)
        ]
        sums = [logprob_sums(policy, rows) for rows in sides]
    else:
        sums = np.split(outcomes(policy, text.outcome, continued(policy, text, [*before, *after])), 2)
    return (sums[0] - sums[1]).reshape(len(spans), count)


def continued(
    policy: Policy, text: Experiment, wanted: Sequence[tuple[list[int], int, int]], *, first: int = 0
) -> list[Row]:
    """(ids, place of the response) of every (prefix, place of the response, sample), continued by the policy.

    Sample s has the same noise behind every prefix, from number `first` on; the same prefix and sample run once; a
    response that has ended is not continued.
    """
    keys = [(tuple(ids), s) for ids, _, s in wanted]
    over = {
        key for key, (ids, start, _) in zip(keys, wanted, strict=True) if ids[start:][-1:] == [text.eos_id]
    }
    running = [key for key in dict.fromkeys(keys) if key not in over]
    noise = gumbel(text.seed)
    drawn = policy.continuations(
        [ids for ids, _ in running],
        streams=[s for _, s in running],
        limit=text.limit,
        eos_id=text.eos_id,
        noise=lambda stream, position, size: noise(stream, first + position, size),
    )
    tokens: dict[Any, list[int]] = {key: [] for key in over}
    tokens |= dict(zip(running, drawn, strict=True))
    return [([*ids, *tokens[key]], start) for key, (ids, start, _) in zip(keys, wanted, strict=True)]
