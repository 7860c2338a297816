"""Monte-Carlo values of the states between the turns of an episode: the return as the outcome."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ops import _check
from .intervention import Experiment, summary
from .policy import gumbel
from .statistics import student_interval
from .step_values import StepValues
from .text import Ids, Span, check_count, check_ids


@dataclass
class _Episode:
    """An episode under way: its environment, the tokens so far, what it has earned, and the turn that is next."""

    env: Any
    ids: list[int]
    state: str
    earned: float = 0.0
    turn: int = 0
    over: bool = False

    def copy(self) -> "_Episode":
        return _Episode(self.env.clone(), list(self.ids), self.state, self.earned, self.turn, self.over)

    def act(self, tokenizer: Any, tokens: Sequence[int], gamma: float) -> None:
        """Take the turn: its reward, and the tokens of what the environment adds to the text."""
        action = tokenizer.decode(list(tokens), skip_special_tokens=True)
        state, reward, terminated, truncated, _ = self.env.step(action)
        self.earned += gamma**self.turn * float(reward)
        self.turn, self.over = self.turn + 1, bool(terminated or truncated)
        self.ids += tokens
        seen = self.state + action
        if not self.over:
            if not state.startswith(seen):
                raise ValueError(
                    "env must have a transition that continues the text so far (state + action), "
                    f"got {state[:60]!r} after {seen[:60]!r}"
                )
            if state != seen:
                self.ids += tokenizer(state[len(seen) :], add_special_tokens=False)["input_ids"]
        self.state = state


def turn_values(
    tracker: Any,
    env: Any,
    index: int,
    turns: Sequence[Ids],
    samples: int,
    *,
    max_new_tokens: int,
    gamma: float = 1.0,
    interval: str = "student_t",
    correction: str = "benjamini_hochberg",
) -> StepValues:
    """Values of an episode's states: the policy plays to the end n times from before and behind every turn.

    A value is the mean return of the whole episode, sum_k gamma^k r_k, with what was earned before the state; so a
    turn's effect, value behind - value before, is what the turn brings to the return beyond what the policy would
    have done in its place.

    Args:
        tracker: CausalityTracker with a tokenizer.
        env: environment of texts with clone(), reset(options={"index": i}) and step(text), such as a TextEnv; its
            clones are played. Randomness of its own goes on the same in every clone.
        index: of the environment's record.
        turns: token ids of each action, from the episode's first one on.
        samples: episodes from each state, at least 2.
        max_new_tokens: longest action.
        gamma: discount a turn, in [0, 1].
        interval, correction: as of `CausalityTracker.intervene`.
    Returns: StepValues of the turns; its effects' token_ids are those of the episode as it was.
    Raises: TypeError, ValueError or IndexError in one line.
    Source: Kazemnejad et al. 2024, VinePPO (arXiv:2410.01679), with turns for steps.
    """
    if tracker.tokenizer is None:
        raise ValueError("tokenizer must be given to the tracker for turn_values, got None")
    check_count("samples", samples, 2)
    check_count("max_new_tokens", max_new_tokens, 1)
    _check.number("gamma", gamma, low=0.0, high=1.0)
    policy, before = tracker.policy, tracker.policy.tokens
    states, spans = _replayed(tracker, env, index, turns, gamma)
    values = np.array(
        [_returns(tracker, state, samples, limit=max_new_tokens, gamma=gamma) for state in states]
    )
    mean, error = values.mean(1), values.std(1, ddof=1) / np.sqrt(samples)
    low, high = student_interval(mean, error, np.full(len(mean), samples))
    text = Experiment(
        tuple(states[-1].ids),
        len(states[0].ids),
        tracker.interventions,
        seed=tracker.seed,
        interval=interval,
        correction=correction,
    )
    effects = summary(text, spans, np.diff(values, axis=0), policy.tokens - before)
    return StepValues(effects, *(torch.from_numpy(x) for x in (mean, error, low, high)))


def _replayed(
    tracker: Any, env: Any, index: int, turns: Sequence[Ids], gamma: float
) -> tuple[list[_Episode], list[Span]]:
    """The episode before its first turn and behind each, and the places of the turns in its tokens."""
    clone = env.clone()
    state, _ = clone.reset(options={"index": index})
    prompt = check_ids("the prompt", tracker.tokenizer(state)["input_ids"], tracker.policy.vocab_size)
    states, spans = [_Episode(clone, prompt, state)], []
    for k, turn in enumerate(turns):
        tokens = check_ids(f"turns[{k}]", turn, tracker.policy.vocab_size)
        if states[-1].over:
            raise ValueError(f"turns must end with the episode, got {len(turns)} where it has {k}")
        states.append(states[-1].copy())
        start = len(states[-1].ids)
        states[-1].act(tracker.tokenizer, tokens, gamma)
        spans.append((start, start + len(tokens)))
    if not spans:
        raise ValueError("turns must hold at least one turn, got none")
    return states, spans


def _returns(tracker: Any, state: _Episode, samples: int, *, limit: int, gamma: float) -> list[float]:
    """Returns of the episodes that go on from a state, sample s with the same noise in the same turn."""
    episodes = [state.copy() for _ in range(samples)]
    noise = gumbel(tracker.seed)
    turn = state.turn
    while running := [s for s, episode in enumerate(episodes) if not episode.over]:
        drawn = tracker.policy.continuations(
            [episodes[s].ids for s in running],
            streams=running,
            limit=limit,
            eos_id=getattr(tracker.tokenizer, "eos_token_id", None),
            noise=lambda stream, position, size, first=turn * limit: noise(stream, first + position, size),
        )
        for s, tokens in zip(running, drawn, strict=True):
            episodes[s].act(tracker.tokenizer, tokens, gamma)
        turn += 1
    return [episode.earned for episode in episodes]
