"""The tracker: attribution, intervention, credit and their statistics."""

from .credit import attribution_credit, uniform_credit
from .intervention import Deletion, Effects, Replacement
from .tracker import Attribution, CausalityTracker

__all__ = [
    "Attribution",
    "CausalityTracker",
    "Deletion",
    "Effects",
    "Replacement",
    "attribution_credit",
    "uniform_credit",
]
