"""Rewards of every token with a penalty for leaving the reference policy; the equation is in
react_fast/ops/kl_rewards.py.

    r_t = rewards_t - kl_coef k(log p_t - log ref_t), one reward a row at its last counting token

Roofline, per token of e bytes an element: 2 e of log-probs and e of rewards read, mask 1, 4 written (float32: 17
bytes), 10 to 30 flops: bandwidth-bound. One reward a row reads the mask once more, from the rows' ends.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant
from .objectives import within
from .policy_loss_layout import (
    BLOCK,
    Layout,
    bounds_of,
    kl_estimate,
    load_wide,
    log_ratio,
    programs_of,
    real,
    row_of,
    warps,
    wide,
)

# Partial sums that the last program loads at a time.
FOLD = 1024


@triton.jit
def last_kernel(mask, cu_seqlens, lasts, tokens, row_length, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The last counting token of every row, or -1."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of(row, cu_seqlens, tokens, row_length, PACKED)
    found = tl.full([], -1, tl.int64)
    while (found < 0) & (begin < end):
        token = end - BLOCK + tl.arange(0, BLOCK)
        on = tl.load(mask + token, token >= begin, 0) != 0
        found = tl.max(tl.where(on, token, -1), 0)
        end -= BLOCK
    tl.store(lasts + row, found)


@triton.jit
def kl_rewards_kernel(
    rewards, logprobs, ref_logprobs, mask, cu_seqlens, lasts, shaped, partial, tokens, rows, row_length,
    search_steps, steps, kl_coef: tl.float64, clip: tl.float64,
    ESTIMATOR: tl.constexpr, ROW_REWARDS: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [programs, 2]: counting tokens, and their estimates."""
    total = tl.zeros([1], tl.float64)
    n = tl.zeros([1], tl.int64)
    for step in range(steps):
        start = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK
        token = start + tl.arange(0, BLOCK)
        live = token < tokens
        on = live & (tl.load(mask + token, live, 0) != 0)
        x, _ = log_ratio(
            load_wide(logprobs, token, live, on, WIDE), load_wide(ref_logprobs, token, live, on, WIDE)
        )
        k, _ = kl_estimate(x, ESTIMATOR, WIDE)
        k = within(k, -real(clip, WIDE), real(clip, WIDE))
        if ROW_REWARDS:
            row = row_of(token, start, cu_seqlens, rows, row_length, search_steps, PACKED, BLOCK)
            last = on & (tl.load(lasts + row, on, -1) == token)
            reward = tl.where(last, tl.load(rewards + row, last, 0.0).to(WIDE), 0.0)
        else:
            reward = load_wide(rewards, token, live, on, WIDE)
        tl.store(shaped + token, tl.where(on, reward - real(kl_coef, WIDE) * k, 0.0), live)
        total += tl.sum(tl.where(on, k, 0.0), 0).to(tl.float64)
        n += tl.sum(on.to(tl.int32), 0)
    one = tl.arange(0, 1)
    tl.store(partial + 2 * tl.program_id(0) + one, n.to(tl.float64))
    tl.store(partial + 2 * tl.program_id(0) + 1 + one, total)


@triton.jit
def finish_kernel(partial, stats, programs, FOLD: tl.constexpr):
    n = tl.zeros([FOLD], tl.float64)
    total = tl.zeros([FOLD], tl.float64)
    for first in range(0, programs, FOLD):
        program = first + tl.arange(0, FOLD)
        n += tl.load(partial + 2 * program, program < programs, 0.0)
        total += tl.load(partial + 2 * program + 1, program < programs, 0.0)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(n, 0), 1.0)
    tl.store(stats, mean.to(stats.dtype.element_ty))


def kl_rewards(
    rewards: torch.Tensor, row_rewards: bool, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, layout: Layout,
    kl_coef: float, estimator: int, clip: float, shaped: torch.Tensor, stats: torch.Tensor,
) -> None:  # fmt: skip
    """Fill shaped and stats ([1]: mean estimate) from contiguous inputs; `clip` may be infinite."""
    programs, steps = programs_of(layout.tokens)
    packed = layout.cu_seqlens is not None
    bounds, rows, row_length, search_steps = layout.row_arguments()
    lasts = torch.empty(rows if row_rewards else 0, dtype=torch.int64, device=shaped.device)
    if len(lasts):
        last_kernel[(rows,)](
            layout.mask, bounds, lasts, layout.tokens, row_length, PACKED=packed, BLOCK=BLOCK
        )
    partial = torch.empty((programs, 2), dtype=torch.float64, device=shaped.device)
    if programs:
        kl_rewards_kernel[(programs,)](
            rewards, logprobs, ref_logprobs, layout.mask, bounds, lasts, shaped, partial, layout.tokens, rows,
            row_length, search_steps, steps, kl_coef, clip, ESTIMATOR=estimator, ROW_REWARDS=row_rewards,
            PACKED=packed, WIDE=wide(logprobs.dtype), BLOCK=BLOCK, num_warps=warps(logprobs.dtype),
        )  # fmt: skip
    finish_kernel[(1,)](partial, stats, programs, FOLD=FOLD)


def _variants() -> list[Variant]:
    """Rewards of tokens, and of rows in both layouts."""
    found = []
    sizes = dict.fromkeys(("tokens", "rows", "row_length", "search_steps", "steps"), "i32")
    arrays = {"mask": "*i1", "cu_seqlens": "*i32", "lasts": "*i64", "shaped": "*fp32", "partial": "*fp64"}
    arrays |= {"kl_coef": "fp64", "clip": "fp64"} | sizes
    for dtype in ("*fp32", "*bf16"):
        signature = dict.fromkeys(("rewards", "logprobs", "ref_logprobs"), dtype) | arrays
        for estimator, by_row, packed in ((0, False, False), (2, True, False), (2, True, True)):
            flags = {"ESTIMATOR": estimator, "ROW_REWARDS": by_row, "PACKED": packed}
            flags |= {"WIDE": tl.float32, "BLOCK": BLOCK}
            found.append(Variant(kl_rewards_kernel, signature, flags, divisible=("tokens", "row_length")))
    for packed in (False, True):
        flags = {"PACKED": packed, "BLOCK": BLOCK}
        found.append(Variant(last_kernel, arrays, flags, divisible=("tokens", "row_length")))
    finish = {"partial": "*fp64", "stats": "*fp32", "programs": "i32"}
    return [*found, Variant(finish_kernel, finish, {"FOLD": FOLD})]


VARIANTS = _variants()
