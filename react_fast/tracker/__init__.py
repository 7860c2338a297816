"""The tracker: attribution, intervention, credit and their statistics."""

from .attribution import Attribution
from .counterfactuals import Deletion, DonorSwap, Replacement, Resample
from .credit import attribution_credit, causal_credit, uniform_credit
from .faithfulness import Faithfulness, faithfulness
from .intervention import Effects
from .outcomes import Return, TargetLogprob
from .shapley import Shapley, shapley_values
from .step_values import StepValues
from .tracker import CausalityTracker
from .turn_values import turn_values

__all__ = [
    "Attribution",
    "CausalityTracker",
    "Deletion",
    "DonorSwap",
    "Effects",
    "Faithfulness",
    "Replacement",
    "Resample",
    "Return",
    "Shapley",
    "StepValues",
    "TargetLogprob",
    "attribution_credit",
    "causal_credit",
    "faithfulness",
    "shapley_values",
    "turn_values",
    "uniform_credit",
]
