"""What the options of policy-gradient algorithms may be; a wrong one is refused before anything is trained."""

from typing import Any

from ...ops import _check
from ...ops._objectives import OBJECTIVES
from ...ops._policy_loss import AGGREGATIONS, KL_ESTIMATORS, KL_GRADIENTS


def check_loss_options(algorithm: Any) -> None:
    """Raises: TypeError or ValueError for an objective (bounds that cross), aggregation, kl_estimator or
    kl_gradient that `policy_loss` does not take."""
    if type(algorithm.objective) not in OBJECTIVES:
        raise TypeError(f"objective must be one of policy_loss's, got {algorithm.objective!r}")
    _check.choice("aggregation", algorithm.aggregation, AGGREGATIONS)
    _check.choice("kl_estimator", algorithm.kl_estimator, KL_ESTIMATORS)
    _check.choice("kl_gradient", algorithm.kl_gradient, KL_GRADIENTS)


def check_switch(name: str, value: Any) -> None:
    """Raises: TypeError for anything but true and false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def check_numbers(algorithm: Any, *names: str, **bounds: Any) -> None:
    """Raises: TypeError or ValueError, naming the option; `bounds` as in `_check.number`."""
    for name in names:
        _check.number(name, getattr(algorithm, name), **bounds)


def check_on_policy(algorithm: Any, config: Any) -> None:
    """Raises: ValueError where samples would be used more than once without a probability ratio."""
    if config.epochs > 1:
        raise ValueError(
            f"trainer.epochs must be 1 for {type(algorithm).__name__}, whose loss has no probability ratio, "
            f"got {config.epochs}"
        )


def check_count(algorithm: Any, *names: str) -> None:
    """Raises: TypeError or ValueError for anything but an integer of at least 1."""
    for name in names:
        value = getattr(algorithm, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
