"""One text with any of its features taken out, and the outcome of each such text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .actions import Actions, find_actions
from .intervention import Experiment, continued
from .outcomes import Row, logprob_sums, outcomes
from .policy import Policy
from .text import Span

# (features kept [A], first and end of the response tokens that are asked for, counted in the text)
Request = tuple[np.ndarray, int, int]


def features(
    text: Experiment, actions: Actions | None, texts: Sequence[str] | None, inputs: str, vocab_size: int
) -> list[Span]:
    """Places of what can be taken out and changes the outcome; `texts` of every token, None without a tokenizer.

    Raises: TypeError, ValueError or IndexError in one line.
    """
    first, end = _reach(text)
    if inputs == "prompt" or text.samples is not None:
        end = min(end, text.prompt_length)
    if first < text.prompt_length and not _replacement(text, (0, text.prompt_length), vocab_size):
        first = 1
    if actions is None:
        spans = [(i, i + 1) for i in range(first, end)]
    else:
        spans = find_actions(actions, text, texts, None)
        if isinstance(actions, (str, re.Pattern)):
            spans = [(start, stop) for start, stop in spans if first <= start and stop <= end]
    place = first
    for i, (start, stop) in enumerate(spans):
        if not place <= start < stop <= end:
            raise IndexError(
                f"actions[{i}] must be {place} <= start < end <= {end}, got {(start, stop)} behind those before"
            )
        place = stop
    if not spans:
        raise ValueError(f"text must have a token that can be taken out, got none in [{first}, {end})")
    for span in spans:
        _replacement(text, span, vocab_size)
    return spans


def _reach(text: Experiment) -> Span:
    """The tokens that the outcome may hang on."""
    if callable(text.outcome) and text.samples is None:
        return text.prompt_length, len(text.ids)
    return 0, len(text.ids) - (text.outcome == "logprob")


def _replacement(text: Experiment, span: Span, vocab_size: int) -> list[int]:
    if not hasattr(text.counterfactual, "replacement"):
        raise TypeError(
            f"counterfactual must have a method replacement(tokens), got {type(text.counterfactual).__name__}"
        )
    tokens = list(text.counterfactual.replacement(list(text.ids[slice(*span)])))
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise IndexError(f"counterfactual must hold ids in [0, {vocab_size}), got {token}")
    return tokens


@dataclass(frozen=True)
class Game:
    """The outcome as a function of the features that are kept.

    Attributes:
        spans: [A] places of the features, in order.
    """

    policy: Policy
    text: Experiment
    spans: Sequence[Span]

    @property
    def by_token(self) -> bool:
        """Whether the outcome is a sum over response tokens, each known by itself."""
        return self.text.outcome == "logprob" and self.text.samples is None

    @cached_property
    def cost(self) -> int:
        """Tokens that the policy computes for one text, without a cache."""
        if self.text.samples is None:
            return len(self.text.ids)
        sides = 1 if callable(self.text.outcome) else 2
        return sides * self.text.samples * (self.text.prompt_length + self.text.limit)

    def values(self, kept: np.ndarray) -> np.ndarray:
        """[N, A] bool -> [N, R] log-probabilities of the response's tokens, or [N, 1] outcomes."""
        start, end = self.text.prompt_length, len(self.text.ids)
        if self.by_token:
            return np.array(self._logprobs([(row, start, end) for row in kept]))
        return self._outcomes(kept)[:, None]

    def sums(self, requests: Sequence[Request]) -> np.ndarray:
        """[N] outcomes, or log-probabilities of the response tokens that are asked for."""
        if self.by_token:
            return np.array([row.sum() for row in self._logprobs(requests)])
        return self._outcomes(np.array([row for row, _, _ in requests]))

    def _perturbed(self, kept: np.ndarray) -> tuple[list[int], list[int]]:
        """The text's ids, and how many of them stand before each of the original's tokens (and its end)."""
        ids: list[int] = []
        before: list[int] = []
        place = 0
        for keep, (start, end), tokens in zip(kept, self.spans, self._instead, strict=True):
            before += range(len(ids), len(ids) + start - place)
            ids += self.text.ids[place:start]
            new = self.text.ids[start:end] if keep else tokens
            before += [len(ids) + min(i, len(new)) for i in range(end - start)]
            ids += new
            place = end
        before += range(len(ids), len(ids) + len(self.text.ids) - place + 1)
        return ids + list(self.text.ids[place:]), before

    @cached_property
    def _instead(self) -> list[list[int]]:
        return [_replacement(self.text, span, self.policy.vocab_size) for span in self.spans]

    def _logprobs(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Log-probability of each response token asked for; equal texts run once."""
        keys = []
        for kept, first, end in requests:
            ids, before = self._perturbed(kept)
            keys.append((tuple(ids[: before[end - 1]]), tuple(before[first:end]), self.text.ids[first:end]))
        distinct = list(dict.fromkeys(keys))
        found = self.policy.logprobs_at(*map(list, zip(*distinct, strict=True)))
        table: dict[Any, np.ndarray] = dict(zip(distinct, found, strict=True))
        return [table[key] for key in keys]

    def _outcomes(self, kept: np.ndarray) -> np.ndarray:
        """[N]"""
        perturbed = [self._perturbed(row) for row in kept]
        start = self.text.prompt_length
        if self.text.samples is None:
            return outcomes(
                self.policy, self.text.outcome, [(ids, before[start]) for ids, before in perturbed]
            )
        prompts = [ids[: before[start]] for ids, before in perturbed]
        return self._sampled(prompts).reshape(len(prompts), -1).mean(1)

    def _sampled(self, prompts: Sequence[list[int]]) -> np.ndarray:
        """[N * n]: outcomes of n continuations of each prompt."""
        text, samples = self.text, range(self.text.samples or 0)
        if text.outcome != "logprob":
            wanted = [(prompt, len(prompt), s) for prompt in prompts for s in samples]
            return outcomes(self.policy, text.outcome, continued(self.policy, text, wanted))
        given = list(text.ids[: text.prompt_length])
        drawn = [
            ids[start:]
            for ids, start in continued(self.policy, text, [(given, len(given), s) for s in samples])
        ]
        rows: list[Row] = [([*prompt, *tokens], len(prompt)) for prompt in prompts for tokens in drawn]
        return logprob_sums(self.policy, rows)
