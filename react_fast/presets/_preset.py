"""The type of a preset and what the frameworks' modules share."""

from typing import Any

from ..ops import _check


class Preset(dict[str, Any]):
    """Keyword arguments of `policy_loss`; `advantages`: those of `group_advantages`."""

    def __init__(self, advantages: dict[str, Any], **loss: Any) -> None:
        super().__init__(**loss)
        self.advantages = advantages

    def __repr__(self) -> str:
        return f"Preset({dict(self)}, advantages={self.advantages})"


def ratio_bounds(low: float, high: float | None) -> dict[str, float]:
    """Absolute bounds of a ratio from distances to 1; `high` None: as far as `low`."""
    low = _check.number("the lower clip range", low, low=0.0, high=1.0)
    high = low if high is None else _check.number("the upper clip range", high, low=0.0, infinite=True)
    return {"ratio_min": 1 - low, "ratio_max": 1 + high}


def kl_term(coef: float, estimator: str = "k3", gradient: str = "value") -> dict[str, Any]:
    """No term at all for a coefficient of 0, so that `ref_logprobs` need not be given."""
    if _check.number("the KL coefficient", coef, low=0.0) == 0:
        return {}
    return {"kl_coef": coef, "kl_estimator": estimator, "kl_gradient": gradient}
