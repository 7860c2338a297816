"""V-trace and Retrace; the equations are in react_fast/ops/off_policy.py.

    V-trace   x_t = rho_t (r_t + gamma V' - V_t) + gamma c_t x',   target V_t + x_t,
              advantage rho_t (r_t + gamma (V' + x') - V_t)
    Retrace   m_t = c_t (r_t + gamma V' - Q_t) + gamma c_t m',     target r_t + gamma (V' + m')

Roofline, per step in float32 with a mask: V-trace reads 13 bytes and writes 8 (7 ns a thousand steps of 3 TB/s),
Retrace reads 17 and writes 4; each further flag 1 byte. Some 15 flops, one exponential and 3 log2(BLOCK) of the
scan: bandwidth-bound. A program walks one row, as in kernels/advantage.py.
"""

import torch
import triton
import triton.language as tl

from .advantage import FREE, _or, _rows, _wide, places_for
from .advantage_rows import (
    _bounds,
    _counting_steps,
    _flag,
    _lam_of,
    _number,
    _pick,
    _places,
)
from .aot import Variant

# Retrace has four inputs a step under way: 4 steps a thread fit the registers where 8 do not.
RETRACE_WARPS = 8


@triton.jit
def _next(x, behind, i, BLOCK: tl.constexpr):
    """x one step later in the block; `behind` after the last one."""
    return tl.where(i + 1 < BLOCK, tl.gather(x, tl.where(i + 1 < BLOCK, i + 1, 0), 0), behind)


@triton.jit
def _join_stop(a_near, b_near, a_far, b_far):
    """Compose y -> b + a y; a = 0 is a cut that neither NaN nor inf crosses, as slope (a ratio) or as offset."""
    cut = a_far == 0.0
    return tl.where(cut, 0.0, a_near * a_far), tl.where(cut, b_far, b_far + a_far * b_near)


@triton.jit
def _clipped(rho, clip, WIDE: tl.constexpr):
    most = tl.full([], clip, tl.float64).to(WIDE)
    return tl.where(rho > most, most, rho)


@triton.jit(do_not_specialize=FREE)
def vtrace_kernel(
    rewards, values, log_rhos, last_values, bootstrap_values, terminated, truncated, mask, places, offsets, lams,
    gamma: tl.float64, lam: tl.float64, rho_clip: tl.float64, c_clip: tl.float64, advantage_rho_clip: tl.float64,
    targets, advantages, length, total,
    LAST: tl.constexpr, ENDS: tl.constexpr, CUTS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    PER_ROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    rewards, values, log_rhos = rewards + begin, values + begin, log_rhos + begin
    bootstrap_values, mask, places = bootstrap_values + begin, mask + begin, places + begin
    terminated, truncated = terminated + begin, truncated + begin
    targets, advantages = targets + begin, advantages + begin
    i = tl.arange(0, BLOCK)
    discount = tl.full([], gamma, tl.float64).to(WIDE)
    lam_row = _lam_of(tl.program_id(0), lams, lam, PER_ROW, WIDE)
    next_value = tl.zeros([], WIDE)
    if LAST:
        next_value = tl.load(last_values + tl.program_id(0)).to(WIDE)
    last = next_value
    x_behind = tl.zeros([], WIDE)
    count, low, listed = _counting_steps(mask, places, targets, advantages, n, MASKED, True, BLOCK)
    blocks = tl.cdiv(count, BLOCK)
    for k in range(blocks):
        rank = (blocks - 1 - k) * BLOCK + i
        inside = rank < count
        at = _places(places, low, listed, rank, MASKED)
        ends = _flag(terminated, at, inside, ENDS, False)
        cut = _flag(truncated, at, inside, CUTS, False) & (ends == 0)
        stops = ends | cut
        r = _number(rewards, at, inside, True, WIDE)
        v = tl.where(inside, _number(values, at, inside, True, WIDE), last)
        rho = tl.exp(_number(log_rhos, at, inside, True, WIDE))
        boot = _number(bootstrap_values, at, cut, CUTS, WIDE)
        value = tl.where(stops, boot, _next(v, next_value, i, BLOCK))
        step = (r - v) + discount * value
        a = tl.where(stops, 0.0, discount * lam_row * _clipped(rho, c_clip, WIDE))
        a = tl.where(inside, a, 1.0)
        b = tl.where(inside, _clipped(rho, rho_clip, WIDE) * step, 0.0)
        a, b = tl.associative_scan((a, b), 0, _join_stop, reverse=True)
        x = tl.where(a == 0.0, b, b + a * x_behind)
        following = tl.where(stops, 0.0, _next(x, x_behind, i, BLOCK))
        advantage = _clipped(rho, advantage_rho_clip, WIDE) * ((r - v) + discount * (value + following))
        tl.store(targets + at, v + x, inside)
        tl.store(advantages + at, advantage, inside)
        next_value = _pick(v, i, 0)
        x_behind = _pick(x, i, 0)


@triton.jit(do_not_specialize=FREE)
def retrace_kernel(
    rewards, q_values, next_values, log_rhos, terminated, truncated, mask, places, offsets, lams,
    gamma: tl.float64, lam: tl.float64, targets, length, total,
    ENDS: tl.constexpr, CUTS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, PER_ROW: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    rewards, q_values, next_values = rewards + begin, q_values + begin, next_values + begin
    log_rhos, mask, places = log_rhos + begin, mask + begin, places + begin
    terminated, truncated, targets = terminated + begin, truncated + begin, targets + begin
    i = tl.arange(0, BLOCK)
    discount = tl.full([], gamma, tl.float64).to(WIDE)
    lam_row = _lam_of(tl.program_id(0), lams, lam, PER_ROW, WIDE)
    m_behind = tl.zeros([], WIDE)
    count, low, listed = _counting_steps(mask, places, targets, targets, n, MASKED, False, BLOCK)
    blocks = tl.cdiv(count, BLOCK)
    for k in range(blocks):
        rank = (blocks - 1 - k) * BLOCK + i
        inside = rank < count
        at = _places(places, low, listed, rank, MASKED)
        ends = _flag(terminated, at, inside, ENDS, False)
        stops = ends | _flag(truncated, at, inside, CUTS, False)
        r = _number(rewards, at, inside, True, WIDE)
        q = _number(q_values, at, inside, True, WIDE)
        value = _number(next_values, at, inside & (ends == 0), True, WIDE)
        rho = tl.exp(_number(log_rhos, at, inside, True, WIDE))
        c = lam_row * tl.where(rho > 1.0, 1.0, rho)
        one_step = r + discount * value
        a = tl.where(inside, tl.where(stops, 0.0, discount * c), 1.0)
        b = tl.where(inside, c * (one_step - q), 0.0)
        a, b = tl.associative_scan((a, b), 0, _join_stop, reverse=True)
        m = tl.where(a == 0.0, b, b + a * m_behind)
        target = one_step + discount * tl.where(stops, 0.0, _next(m, m_behind, i, BLOCK))
        tl.store(targets + at, target, inside)
        m_behind = _pick(m, i, 0)


# ---- launchers: the arguments and results of the operators in react_fast/ops/_off_policy.py --------------------

Tensor = torch.Tensor
Maybe = torch.Tensor | None


def vtrace(
    rewards: Tensor, values: Tensor, log_rhos: Tensor, last_values: Maybe, bootstrap_values: Maybe,
    terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, lams: Maybe, gamma: float, lam: float,
    rho_clip: float, c_clip: float, advantage_rho_clip: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(targets, advantages) [B, T] or [N]."""
    rewards = rewards.contiguous()
    targets = rewards.new_empty(rewards.shape, dtype=_wide(rewards)[0])
    advantages = torch.empty_like(targets)
    rows, shared = _rows(rewards, cu_seqlens)
    if rewards.numel():
        vtrace_kernel[(rows,)](
            rewards, values.contiguous(), log_rhos.contiguous(), _or(last_values, rewards),
            _or(bootstrap_values, rewards), _or(terminated, rewards), _or(truncated, rewards), _or(mask, rewards),
            places_for(mask, rewards), lams=_or(lams, rewards), gamma=gamma, lam=lam, rho_clip=rho_clip,
            c_clip=c_clip, advantage_rho_clip=advantage_rho_clip, targets=targets, advantages=advantages,
            LAST=last_values is not None, ENDS=terminated is not None, CUTS=truncated is not None,
            MASKED=mask is not None, PER_ROW=lams is not None, **shared,
        )  # fmt: skip
    return targets, advantages


def retrace(
    rewards: Tensor, q_values: Tensor, next_values: Tensor, log_rhos: Tensor, terminated: Maybe,
    truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, lams: Maybe, gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    """Targets [B, T] or [N]."""
    rewards = rewards.contiguous()
    targets = rewards.new_empty(rewards.shape, dtype=_wide(rewards)[0])
    rows, shared = _rows(rewards, cu_seqlens)
    if rewards.numel():
        retrace_kernel[(rows,)](
            rewards, q_values.contiguous(), next_values.contiguous(), log_rhos.contiguous(),
            _or(terminated, rewards), _or(truncated, rewards), _or(mask, rewards), places_for(mask, rewards),
            lams=_or(lams, rewards), gamma=gamma, lam=lam, targets=targets, ENDS=terminated is not None,
            CUTS=truncated is not None, MASKED=mask is not None, PER_ROW=lams is not None,
            num_warps=RETRACE_WARPS, **shared,
        )  # fmt: skip
    return targets


# ---- what ahead-of-time compilation looks at --------------------------------------------------------------------


def _variants() -> list[Variant]:
    from .advantage import BLOCK

    found = []
    flags = {
        "terminated": "*i1", "truncated": "*i1", "mask": "*i1", "places": "*i32", "offsets": "*i64",
        "lams": "*fp64", "gamma": "fp64", "lam": "fp64",
    }  # fmt: skip
    clips = dict.fromkeys(("rho_clip", "c_clip", "advantage_rho_clip"), "fp64")
    sizes = {"length": "i32", "total": "i64"}
    for pointer, WIDE in (("*fp32", tl.float32), ("*bf16", tl.float32), ("*fp64", tl.float64)):
        wide = "*fp64" if WIDE is tl.float64 else "*fp32"
        names = ("rewards", "values", "log_rhos", "last_values", "bootstrap_values")
        vtrace = {
            **dict.fromkeys(names, pointer), **flags, **clips, "targets": wide, "advantages": wide, **sizes,
        }  # fmt: skip
        inputs = ("rewards", "q_values", "next_values", "log_rhos")
        retrace = {**dict.fromkeys(inputs, pointer), **flags, "targets": wide, **sizes}
        for every in (False, True):
            shape = {"PACKED": every, "WIDE": WIDE, "BLOCK": BLOCK}
            steps = {"ENDS": every, "CUTS": every, "MASKED": True, "PER_ROW": every, **shape}
            found += [
                Variant(vtrace_kernel, vtrace, {"LAST": every, **steps}),
                Variant(retrace_kernel, retrace, steps, RETRACE_WARPS),
            ]
    return found


VARIANTS = _variants()
