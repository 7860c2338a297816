"""The table of objectives: what the operator and the kernels know of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..reference.objectives import (
    CISPO,
    DRO,
    GMPO,
    GSPO,
    LUSPO,
    SAPO,
    VESPO,
    ClipCov,
    DPPOBinaryKL,
    DPPOBinaryTV,
    GSPOToken,
    KLCov,
    PPOClip,
    Reinforce,
)

# Length of every parameter list; objectives with fewer leave zeros behind.
PARAMETERS = 6


def _numbers(*names: str) -> Callable[[Any], list[float]]:
    """The named attributes, None as infinity."""

    def parameters(objective: Any) -> list[float]:
        values = [getattr(objective, name) for name in names]
        numbers = [float("inf") if v is None else float(v) for v in values]
        return numbers + [0.0] * (PARAMETERS - len(numbers))

    return parameters


class Entry(NamedTuple):
    """An objective as the operator takes it."""

    tag: int  # csrc/policy_loss.h, enum Objective
    parameters: Callable[[Any], list[float]]
    whole_rows: bool  # a token's loss depends on other tokens of its row or of the batch


_CLIP = _numbers("ratio_min", "ratio_max", "dual_clip", "ratio_cap")
_DPPO = _numbers("decrease_max", "increase_max", "ratio_cap")

OBJECTIVES: dict[type, Entry] = {
    Reinforce: Entry(0, _numbers(), False),
    PPOClip: Entry(1, _CLIP, False),
    CISPO: Entry(2, _numbers("ratio_min", "ratio_max"), False),
    SAPO: Entry(3, _numbers("tau_pos", "tau_neg"), False),
    DPPOBinaryTV: Entry(4, _DPPO, False),
    DPPOBinaryKL: Entry(5, _DPPO, False),
    DRO: Entry(6, _numbers("beta"), False),
    KLCov: Entry(7, _numbers("fraction", "kl_coef"), True),
    ClipCov: Entry(8, _numbers("ratio_min", "ratio_max", "fraction", "cov_min", "cov_max", "seed"), True),
    GSPO: Entry(9, _CLIP, True),
    GSPOToken: Entry(10, _CLIP, True),
    LUSPO: Entry(11, _CLIP, True),
    GMPO: Entry(12, _numbers("ratio_min", "ratio_max"), True),
    VESPO: Entry(13, _numbers("k_pos", "lambda_pos", "k_neg", "lambda_neg"), True),
}

# The tags whose `whole_rows` is true.
WHOLE_ROWS = frozenset(entry.tag for entry in OBJECTIVES.values() if entry.whole_rows)
# Those whose loss needs the rows, not only the batch.
BY_ROW = frozenset(OBJECTIVES[o].tag for o in (GSPO, GSPOToken, LUSPO, GMPO, VESPO))
