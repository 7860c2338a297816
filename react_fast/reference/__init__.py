"""The specification: every op, the trainer and the tracker in plain loops over plain torch.

Written for reading and for checking the fast paths; same names and signatures, no speed.
"""

from .attribution import attribution_scores
from .logprob import token_logprobs

__all__ = ["attribution_scores", "token_logprobs"]
