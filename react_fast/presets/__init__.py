"""What other trainers' option names and defaults mean here.

    preset = presets.trl.dapo(epsilon_high=0.28)
    advantages = react_fast.group_advantages(rewards, group_ids, **preset.advantages)
    loss, metrics = react_fast.policy_loss(logprobs, old_logprobs, advantages, mask, **preset)

A preset is a function of the framework's own options, by their names there. It returns a `Preset`: a dict with the
keyword arguments of `policy_loss`, and in `advantages` those of `group_advantages`. Change a field by passing the
option, or by `preset | {"kl_coef": 0.01}`.
"""

from . import openrlhf, trl, verl
from ._preset import Preset

__all__ = ["Preset", "openrlhf", "trl", "verl"]
