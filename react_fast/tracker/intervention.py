"""Interventions: what happens to the outcome when an action is taken out of the text.

effect(A) = E[outcome | as it is] - E[outcome | do(A deleted)]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ops import _check
from .policy import Policy, gumbel
from .records import EffectRow
from .statistics import benjamini_hochberg, bootstrap_interval, student_interval, student_p_value
from .text import Span, Text

Outcome = str | Callable[[list[int]], float]
INTERVALS = ("student_t", "bootstrap")


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


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of the actions of one prompt and response.

    Attributes:
        token_ids: prompt and response. prompt_length: tokens of the prompt.
        spans: [A] places (start, end) of the actions in token_ids.
        values: [A, n] float64, the effect in each of n samples; n = 1 for the response as given.
        mean, standard_error, low, high: [A] float64; for n = 1 nothing was sampled, so the error is 0 and the
            interval is the mean.
        p_value: [A], two-sided, of the mean being 0; NaN for n = 1.
        significant: [A] bool, after Benjamini-Hochberg at 5% over the A actions; False for n = 1.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    spans: tuple[Span, ...]
    values: torch.Tensor
    mean: torch.Tensor
    standard_error: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    p_value: torch.Tensor
    significant: torch.Tensor

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
    """A text and what an intervention makes of it."""

    intervention: Any

    def changed(self, span: Span, end: int | None = None) -> list[int]:
        """The tokens up to `end` (of the original; None: all) with the action replaced."""
        start, stop = span
        tokens = list(self.ids[start:stop])
        return [*self.ids[:start], *self.intervention.replacement(tokens), *self.ids[stop:end]]

    def response_of(self, span: Span, changed: list[int]) -> list[int]:
        """The response in a changed text; an action that began in the prompt belongs to the prompt."""
        if span[0] >= self.prompt_length:
            return changed[self.prompt_length :]
        behind = len(self.ids) - max(span[1], self.prompt_length)
        return changed[len(changed) - behind :] if behind else []

    def prefix(self, span: Span) -> list[int]:
        """What the policy had read when it continued behind the action: at least the whole prompt."""
        return list(self.ids[: max(span[1], self.prompt_length)])


def intervene(
    policy: Policy,
    text: Experiment,
    actions: str | Sequence[Span],
    outcome: Outcome,
    *,
    texts: Sequence[str] | None,
    samples: int | None,
    interval: str,
    seed: int,
    limit: int,
    eos_id: int | None,
) -> Effects:
    """See CausalityTracker.intervene; `texts` are the tokens', `limit` is the longest continuation."""
    spans = _spans(actions, text, texts)
    if not callable(outcome) and outcome != "logprob":
        raise ValueError(f"outcome must be 'logprob' or a function of response ids, got {outcome!r}")
    _check.choice("interval", interval, INTERVALS)
    if not spans:
        values = np.empty((0, samples or 1))
    elif samples is None:
        values = _fixed(policy, text, spans, outcome)
    else:
        values = _sampled(
            policy, text, spans, outcome, samples=samples, seed=seed, limit=limit, eos_id=eos_id
        )
    return _summary(text, spans, values, interval=interval, seed=seed)


def _fixed(policy: Policy, text: Experiment, spans: Sequence[Span], outcome: Outcome) -> np.ndarray:
    """[A, 1]: effects on the response as given."""
    if callable(outcome):
        given = outcome(list(text.ids[text.prompt_length :]))
        changed = [outcome(text.response_of(span, text.changed(span))) for span in spans]
        return np.array([[float(given) - float(value)] for value in changed])
    changed_rows = [text.changed(span) for span in spans]
    shifts = torch.tensor([len(row) - len(text.ids) for row in changed_rows])
    starts, ends = torch.tensor(spans).T
    firsts = torch.where(starts < text.prompt_length, text.prompt_length + shifts, text.prompt_length)
    rows = [list(text.ids), *changed_rows]
    found = policy.response_logprobs(rows, [text.prompt_length, *firsts.clamp_min(1).tolist()]).cpu()
    # Both sums are over the response tokens outside the action; those behind it have moved by the shift.
    place = torch.arange(len(text.ids)).expand(len(spans), -1)
    outside = (place >= text.prompt_length) & ((place < starts[:, None]) | (place >= ends[:, None]))
    moved = place + torch.where(place >= ends[:, None], shifts[:, None], 0)
    after = found[1:].gather(1, moved.clamp(0, found.shape[1] - 1))
    effect = torch.where(outside, found[0, : len(text.ids)] - after, 0.0).sum(1, keepdim=True)
    return effect.numpy()


def _sampled(
    policy: Policy,
    text: Experiment,
    spans: Sequence[Span],
    outcome: Outcome,
    *,
    samples: int,
    seed: int,
    limit: int,
    eos_id: Any,
) -> np.ndarray:
    """[A, n]: effects on responses that the policy continues behind the action."""
    before = [text.prefix(span) for span in spans]
    after = [text.changed(span, end=len(row)) for span, row in zip(spans, before, strict=True)]
    inside = [span[0] >= text.prompt_length for span in spans]
    openings = [row[text.prompt_length :] for row in before]
    changed_openings = [
        row[text.prompt_length :] if own else [] for row, own in zip(after, inside, strict=True)
    ]
    wanted = list(zip(before, openings, strict=True))
    if callable(outcome):
        wanted += zip(after, changed_openings, strict=True)
    continued = _continuations(policy, wanted, samples, seed=seed, limit=limit, eos_id=eos_id)
    values = np.empty((len(spans), samples))
    for i in range(len(spans)):
        drawn = [continued[tuple(before[i]), s] for s in range(samples)]
        if callable(outcome):
            given = [outcome(openings[i] + tokens) for tokens in drawn]
            others = [continued[tuple(after[i]), s] for s in range(samples)]
            changed = [outcome(changed_openings[i] + tokens) for tokens in others]
            values[i] = np.array(given, dtype=float) - np.array(changed, dtype=float)
        else:
            values[i] = _sums(policy, before[i], drawn) - _sums(policy, after[i], drawn)
    return values


def _summary(
    text: Experiment, spans: Sequence[Span], values: np.ndarray, *, interval: str, seed: int
) -> Effects:
    """Means, errors and intervals of [A, n] effects."""
    count = values.shape[1]
    mean = values.mean(1) if len(values) else np.empty(0)
    error, low, high = np.zeros_like(mean), mean, mean
    p_value, significant = np.full_like(mean, np.nan), np.zeros(len(mean), dtype=bool)
    if count > 1 and len(values):
        error = values.std(1, ddof=1) / np.sqrt(count)
        p_value = student_p_value(mean, error, np.full(len(mean), count))
        significant = benjamini_hochberg(p_value)
        low, high = student_interval(mean, error, np.full(len(mean), count))
        if interval == "bootstrap":
            low, high = bootstrap_interval(values, seed=seed)
    found = (values, mean, error, low, high, p_value, significant)
    return Effects(
        text.ids, text.prompt_length, tuple(spans), *(torch.from_numpy(np.array(x)) for x in found)
    )


def _spans(actions: Any, text: Experiment, texts: Sequence[str] | None) -> list[Span]:
    """Places of the actions. Every token, but not a prompt's only one: nothing could be continued then."""
    if actions == "token":
        return [span for i in range(len(text.ids)) if _keeps_a_prompt(span := (i, i + 1), text)]
    if actions != "span":
        return _checked(actions, text)
    if texts is None:
        raise ValueError("tokenizer must be given to the tracker for actions 'span', got None")
    return _words(text, texts)


def _checked(actions: Any, text: Experiment) -> list[Span]:
    if isinstance(actions, str) or not isinstance(actions, Sequence):
        raise TypeError(f"actions must be 'token', 'span' or a list of (start, end), got {actions!r}")
    spans = []
    for i, span in enumerate(actions):
        pair = isinstance(span, Sequence) and len(span) == 2
        if not pair or not all(isinstance(x, int) and not isinstance(x, bool) for x in span):
            raise TypeError(f"actions[{i}] must be a pair of integers (start, end), got {span!r}")
        start, end = span
        if not 0 <= start < end <= len(text.ids):
            raise IndexError(
                f"actions[{i}] must be 0 <= start < end <= {len(text.ids)}, got ({start}, {end})"
            )
        if not _keeps_a_prompt((start, end), text):
            raise ValueError(f"actions[{i}] must leave a prompt token to continue from, got ({start}, {end})")
        spans.append((start, end))
    return spans


def _words(text: Experiment, texts: Sequence[str]) -> list[Span]:
    """Tokens up to the next one that begins with white space; prompt and response are never one word."""
    begins = [i for i, token in enumerate(texts) if i in (0, text.prompt_length) or token[:1].isspace()]
    spans = zip(begins, [*begins[1:], len(texts)], strict=True)
    return [span for span in spans if _keeps_a_prompt(span, text)]


def _keeps_a_prompt(span: Span, text: Experiment) -> bool:
    return span[0] > 0 or span[1] < text.prompt_length or len(text.changed(span, end=span[1])) > 0


def _continuations(
    policy: Policy,
    wanted: Sequence[tuple[list[int], list[int]]],
    samples: int,
    *,
    seed: int,
    limit: int,
    eos_id: int | None,
) -> dict[tuple[tuple[int, ...], int], list[int]]:
    """Continuation by (prefix, sample), for pairs of a prefix and its part of the response; sample s has the same
    noise behind every prefix, and a response that has ended is not continued."""
    ended = {tuple(prefix): opening[-1:] == [eos_id] for prefix, opening in wanted}
    keys = [(prefix, s) for prefix, over in ended.items() if not over for s in range(samples)]
    drawn = policy.continuations(
        [prefix for prefix, _ in keys],
        streams=[s for _, s in keys],
        limit=limit,
        eos_id=eos_id,
        noise=gumbel(seed),
    )
    over: dict[tuple[tuple[int, ...], int], list[int]] = {(p, s): [] for p in ended for s in range(samples)}
    return over | dict(zip(keys, drawn, strict=True))


def _sums(policy: Policy, prefix: list[int], continuations: Sequence[list[int]]) -> np.ndarray:
    """Log-probability of every continuation behind the prefix."""
    rows = [prefix + tokens for tokens in continuations]
    return policy.response_logprobs(rows, [len(prefix)] * len(rows)).sum(1).cpu().numpy()
