"""One small class per algorithm; each is read from top to bottom.

A new one is a class on `Algorithm` or `PolicyGradient` with what differs, and a line in the table.
"""

from .base import Algorithm, PolicyGradient
from .grpo import GRPO
from .reinforce import REINFORCE
from .sft import SFT

ALGORITHMS = {"grpo": GRPO, "reinforce": REINFORCE, "sft": SFT}

__all__ = ["ALGORITHMS", "GRPO", "REINFORCE", "SFT", "Algorithm", "PolicyGradient"]
