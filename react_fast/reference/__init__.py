"""The specification: every op, the trainer and the tracker in plain loops over plain torch.

Written for reading and for checking the fast paths; same names and signatures, no speed.
"""

from .attribution import attribution_scores
from .logprob import token_logprobs
from .policy_loss import PolicyLoss, PPOClip, Reinforce, importance_weights, policy_loss, value_loss
from .tracker import Tracker

__all__ = [
    "PPOClip",
    "PolicyLoss",
    "Reinforce",
    "Tracker",
    "attribution_scores",
    "importance_weights",
    "policy_loss",
    "token_logprobs",
    "value_loss",
]
