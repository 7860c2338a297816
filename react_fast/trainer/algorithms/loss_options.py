"""What the options of policy-gradient algorithms may be; a wrong one is refused before anything is trained."""

from typing import Any

from ...ops import _check
from ...ops._policy_loss import AGGREGATIONS, KL_ESTIMATORS, KL_GRADIENTS

# An update divides by its own count of tokens or sequences; "token_sum_norm" has none.
_COUNTED = tuple(name for name in AGGREGATIONS if name != "token_sum_norm")


def check_loss_options(algorithm: Any) -> None:
    """Raises: ValueError for an aggregation, kl_estimator or kl_gradient that `policy_loss` does not know."""
    _check.choice("aggregation", algorithm.aggregation, _COUNTED)
    _check.choice("kl_estimator", algorithm.kl_estimator, KL_ESTIMATORS)
    _check.choice("kl_gradient", algorithm.kl_gradient, KL_GRADIENTS)


def check_switch(name: str, value: Any) -> None:
    """Raises: TypeError for anything but true and false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
