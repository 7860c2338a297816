"""What each objective says of a token: (loss, d loss / d log p, and where a bound holds it: low, high, dual).

The equations are those of react_fast/reference/surrogates.py; the numbers of the objectives are those of
csrc/policy_loss.h. Objectives from GSPO on take a ratio of their row (kernels/sequence_objectives.py), KLCov and
ClipCov what was selected over the batch (kernels/selection.py).

Roofline: registers alone, 10 to 60 flops a token between the loads and stores of kernels/policy_loss.py.
"""

import triton
import triton.language as tl

from .aot import Variant
from .policy_loss_layout import exp20, real

REINFORCE = tl.constexpr(0)
PPO_CLIP = tl.constexpr(1)
CISPO = tl.constexpr(2)
SAPO = tl.constexpr(3)
DPPO_TV = tl.constexpr(4)
DPPO_KL = tl.constexpr(5)
DRO = tl.constexpr(6)
KL_COV = tl.constexpr(7)
CLIP_COV = tl.constexpr(8)
GSPO = tl.constexpr(9)
GSPO_TOKEN = tl.constexpr(10)
LUSPO = tl.constexpr(11)
GMPO = tl.constexpr(12)
VESPO = tl.constexpr(13)


@triton.jit
def within(x, low, high):
    """x in [low, high]; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def weighted_logp(logp, A, weight):
    """L = -weight A log p with a constant weight; a token the policy forbids stays put."""
    forbidden = logp == float("-inf")
    slope = tl.where(forbidden, 0.0, -weight * A)
    return slope * tl.where(forbidden, 0.0, logp), slope


@triton.jit
def clip(A, ratio, live_ratio, low, high, dual, cap):
    """L = -A bound: A's sign decides which bound binds; the gradient passes where that is the ratio."""
    capped = tl.where(ratio > cap, cap, ratio)
    clipped = within(ratio, low, high)
    upper = tl.where(capped < clipped, clipped, capped)
    upper = tl.where(upper > dual, dual, upper)
    bound = tl.where(A < 0.0, upper, tl.where(capped > clipped, clipped, capped))
    raised = bound > ratio
    lowered = bound < ratio
    passing = tl.where(raised | lowered, 0.0, live_ratio)
    return -A * bound, -A * passing, raised, lowered & (A > 0.0), lowered & (A < 0.0)


@triton.jit
def _faded(gate, ratio, A, positive):
    """A soft gate holds a token where it is below one half: by the side of the ratio and of the advantage."""
    closed = (gate < 0.5) & (A != 0.0)
    above = closed & (ratio > 1.0)
    return closed & (ratio < 1.0), above & positive, above & (positive == 0)


@triton.jit
def _cispo(logp, A, ratio, low, high):
    value, slope = weighted_logp(logp, A, within(ratio, low, high))
    above = ratio > high
    return value, slope, (ratio < low) & (A != 0.0), above & (A > 0.0), above & (A < 0.0)


@triton.jit
def _sapo(A, ratio, live_ratio, tau_pos, tau_neg, WIDE: tl.constexpr):
    """sigmoid(x) and its complement from exp(-|x|), which cannot overflow; below exp(-80) nothing is left."""
    tau = tl.where(A > 0.0, tau_pos, tau_neg)
    x = tau * (ratio - 1.0)
    e, _ = exp20(within(-tl.abs(x), real(-80.0, WIDE), real(0.0, WIDE)), WIDE)
    inverse = 1.0 / (1.0 + e)
    gate = 4.0 * e * inverse * inverse
    value = -A * (4.0 / tau) * tl.where(x < 0.0, e, 1.0) * inverse
    low, high, dual = _faded(gate, ratio, A, A > 0.0)
    return value, -A * gate * live_ratio, low, high, dual


@triton.jit
def _dppo(logp, old, A, x, ratio, on, decrease, increase, cap, KL: tl.constexpr, WIDE: tl.constexpr):
    """-min(r, cap) A log p while the divergence of (p, 1 - p) is small, or A pulls back towards p_old."""
    most = real(20.0, WIDE)
    p, p_less = exp20(within(logp, -most, most), WIDE)  # 1 - p = -(exp(log p) - 1), without cancellation
    p_old, old_less = exp20(within(old, -most, most), WIDE)
    up = A > 0.0
    away = tl.where(up, p - p_old, p_old - p)
    limit = tl.where(up, increase, decrease)
    if KL:
        floor = real(1e-8, WIDE)
        rest = tl.log((floor - old_less) / (floor - p_less))
        kept = (-old_less * rest - p_old * x <= limit) | (away <= 0.0)
    else:
        kept = away <= limit
    value, slope = weighted_logp(logp, A, tl.where(kept, tl.where(ratio > cap, cap, ratio), 0.0))
    return value, slope, (kept == 0) & (A < 0.0), (kept == 0) & (A > 0.0), on & kept & (ratio > cap)


@triton.jit
def _kl_cov(A, ratio, live_ratio, x, clamped, selected, coef):
    pull = tl.where(selected, coef, 0.0)
    side = tl.where(clamped, 0.0, tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)))
    value = pull * tl.abs(x) - A * ratio
    return value, pull * side - A * live_ratio, selected & (A < 0.0), selected & (A > 0.0), x != x


@triton.jit
def token_surrogate(
    logp,
    old,
    A,
    x,
    clamped,
    ratio,
    live_ratio,
    on,
    p0,
    p1,
    p2,
    p3,
    OBJECTIVE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x: log p - log p_old in +-20, `clamped` where it was; ratio: exp(x), live_ratio: 0 where clamped; on: what
    counts, and of KLCov and ClipCov what was selected of it. A is 0 where nothing counts."""
    if OBJECTIVE == REINFORCE:
        value, slope = weighted_logp(logp, A, 1.0)
        low = A < A
        high = low
        dual = low
    elif OBJECTIVE == PPO_CLIP:
        value, slope, low, high, dual = clip(A, ratio, live_ratio, p0, p1, p2, p3)
    elif OBJECTIVE == CISPO:
        value, slope, low, high, dual = _cispo(logp, A, ratio, p0, p1)
    elif OBJECTIVE == SAPO:
        value, slope, low, high, dual = _sapo(A, ratio, live_ratio, p0, p1, WIDE)
    elif (OBJECTIVE == DPPO_TV) | (OBJECTIVE == DPPO_KL):
        value, slope, low, high, dual = _dppo(
            logp, old, A, x, ratio, on, p0, p1, p2, OBJECTIVE == DPPO_KL, WIDE
        )
    elif OBJECTIVE == DRO:
        value, slope = weighted_logp(logp, A, 1.0)
        value += 0.5 * p0 * x * x
        slope += tl.where(clamped, 0.0, p0 * x)
        low = A < A
        high = low
        dual = low
    elif OBJECTIVE == KL_COV:
        value, slope, low, high, dual = _kl_cov(A, ratio, live_ratio, x, clamped, on, p1)
    else:
        unbounded = real(float("inf"), WIDE)
        value, slope, low, high, _ = clip(A, ratio, live_ratio, p0, p1, unbounded, unbounded)
        value = tl.where(on, 0.0, value)
        slope = tl.where(on, 0.0, slope)
        dual = on
    return value, slope, low, high, dual


@triton.jit
def row_surrogate(
    logp, A, x, clamped, row_ratio, a, b, p0, p1, p2, p3, OBJECTIVE: tl.constexpr, WIDE: tl.constexpr
):
    """A token of a row with the ratio `row_ratio`; a and b are what kernels/sequence_objectives.py says of it."""
    if OBJECTIVE == GMPO:  # p0, p1: logarithms of the bounds
        low = (A < 0.0) & (x < p0)
        high = (A > 0.0) & (x > p1)
        dual = A < A
        value = -A * row_ratio
        slope = tl.where(low | high | (A == 0.0) | clamped, 0.0, a)
    elif OBJECTIVE == VESPO:
        positive = A >= 0.0
        phi = tl.where(positive, a, b)
        value, slope = weighted_logp(logp, A, phi)
        low, high, dual = _faded(phi, row_ratio, A, positive)
    else:
        live = tl.where(clamped, 0.0, row_ratio)
        value, slope, low, high, dual = clip(A, row_ratio, live, p0, p1, p2, p3)
        value *= b
        if OBJECTIVE != GSPO_TOKEN:
            slope = tl.where(clamped, 0.0, a)
    return value, slope, low, high, dual


VARIANTS: list[Variant] = []
