"""Monte-Carlo values of the states between the steps of a response, and what each step is worth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .intervention import Effects, Experiment, continued, summary
from .outcomes import outcomes
from .policy import Policy
from .statistics import student_interval
from .text import Span


@dataclass(frozen=True, eq=False)
class StepValues:
    """Values before, between and behind S steps that follow each other.

    Attributes:
        effects: of the steps: value behind - value before, from paired samples. A step's effect is its advantage.
        values: [S + 1] float64, mean outcome of the responses continued from each state.
        standard_error, low, high: [S + 1]; 0 and the value itself where the response has ended.
    """

    effects: Effects
    values: torch.Tensor
    standard_error: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def step_values(policy: Policy, text: Experiment, steps: Sequence[Span], samples: int) -> StepValues:
    """See CausalityTracker.step_values; `text.limit` is the longest response."""
    before = policy.tokens
    places = [start for start, _ in steps] + [steps[-1][1]]
    found = []
    for place in places:
        written = place - text.prompt_length
        prefixes = [(list(text.ids[:place]), text.prompt_length, s) for s in range(samples)]
        if written < text.limit:
            left = replace(text, limit=text.limit - written)
            rows = continued(policy, left, prefixes, first=written)
        else:
            rows = [(ids, start) for ids, start, _ in prefixes]
        found.append(outcomes(policy, text.outcome, rows))
    values = np.array(found)
    mean, error = values.mean(1), values.std(1, ddof=1) / np.sqrt(samples)
    low, high = student_interval(mean, error, np.full(len(mean), samples))
    effects = summary(text, steps, np.diff(values, axis=0), policy.tokens - before)
    return StepValues(effects, *(torch.from_numpy(x) for x in (mean, error, low, high)))
