"""One small class per algorithm; each is read from top to bottom.

An algorithm has `collect(trainer, step)`, `advantages(batch)`, `denominator(batch)` and `loss(...)`; a new one is
a class with these four and a line in the table.
"""

from .grpo import GRPO
from .reinforce import REINFORCE
from .sft import SFT

ALGORITHMS = {"grpo": GRPO, "reinforce": REINFORCE, "sft": SFT}

__all__ = ["ALGORITHMS", "GRPO", "REINFORCE", "SFT"]
