"""The tokens that KLCov and ClipCov choose over the batch; `selection` of react_fast/reference/surrogates.py.

    c_t = (A_t - mean A) (log p_t - mean log p)
    KLCov     the largest c: key -c
    ClipCov   of those with cov_min < c < cov_max that the clip does not hold, drawn: key a hash of the rank

Roofline: two streams of log-probs, advantages and mask (18 bytes a token in float32) and one key of 4 or 8 bytes
written, then torch's stable radix sort of the keys, which is the cost: some 100 bytes a token. Nothing waits for
the device: how many to choose stays there.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant
from .objectives import CLIP_COV
from .policy_loss_layout import (
    BLOCK,
    Layout,
    exp20,
    load_wide,
    log_ratio,
    programs_of,
    real,
    row_of,
    warps,
    wide,
)

# Partial sums that the finishing program loads at a time, and what they are of.
FOLD = 256
COUNT = tl.constexpr(0)
POSSIBLE = tl.constexpr(1)
ADVANTAGE = tl.constexpr(2)
LOGPROB = tl.constexpr(3)
SLOTS = tl.constexpr(4)
# Above every hash of 32 bits: a token that is no candidate.
NEVER = tl.constexpr(1 << 32)


@triton.jit
def _loaded(logprobs, advantages, mask, token, at, tokens, WIDE: tl.constexpr):
    """(live, counting, possible under the policy, log p of those, A)."""
    live = token < tokens
    on = live & (tl.load(mask + token, live, 0) != 0)
    logp = load_wide(logprobs, token, live, on, WIDE)
    possible = on & (logp != float("-inf"))
    return live, on, possible, tl.where(possible, logp, 0.0), load_wide(advantages, at, live, on, WIDE)


@triton.jit
def _at(
    token, start, cu_seqlens, rows, row_length, search_steps, row_stride, token_stride,
    ROW_ADVANTAGES: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = token * token_stride
    if ROW_ADVANTAGES:
        at += row_of(token, start, cu_seqlens, rows, row_length, search_steps, PACKED, BLOCK) * row_stride
    return at


@triton.jit
def means_kernel(
    logprobs, advantages, mask, cu_seqlens, partial, tokens, rows, row_length, search_steps, steps, row_stride,
    token_stride, ROW_ADVANTAGES: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, SLOTS)
    sums = tl.zeros([SLOTS], tl.float64)
    for step in range(steps):
        start = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK
        token = start + tl.arange(0, BLOCK)
        at = _at(
            token, start, cu_seqlens, rows, row_length, search_steps, row_stride, token_stride, ROW_ADVANTAGES,
            PACKED, BLOCK,
        )  # fmt: skip
        _, on, possible, logp, A = _loaded(logprobs, advantages, mask, token, at, tokens, WIDE)
        sums += tl.where(slot == COUNT, tl.sum(on.to(tl.int32), 0).to(tl.float64), 0.0)
        sums += tl.where(slot == POSSIBLE, tl.sum(possible.to(tl.int32), 0).to(tl.float64), 0.0)
        sums += tl.where(slot == ADVANTAGE, tl.sum(A, 0).to(tl.float64), 0.0)
        sums += tl.where(slot == LOGPROB, tl.sum(logp, 0).to(tl.float64), 0.0)
    tl.store(partial + tl.program_id(0) * SLOTS + slot, sums)


@triton.jit
def finish_means_kernel(partial, means, programs, fraction: tl.float64, FOLD: tl.constexpr):
    """means: mean A, mean log p, how many to choose."""
    slot = tl.arange(0, SLOTS)
    total = tl.zeros([SLOTS], tl.float64)
    for first in range(0, programs, FOLD):
        program = first + tl.arange(0, FOLD)
        x = tl.load(partial + program[:, None] * SLOTS + slot[None, :], (program < programs)[:, None], 0.0)
        total += tl.sum(x, 0)
    n = tl.sum(tl.where(slot == COUNT, total, 0.0), 0)
    possible = tl.sum(tl.where(slot == POSSIBLE, total, 0.0), 0)
    wanted = tl.maximum(tl.floor(fraction * n), 1.0)
    tl.store(means, tl.sum(tl.where(slot == ADVANTAGE, total, 0.0), 0) / tl.maximum(n, 1.0))
    tl.store(means + 1, tl.sum(tl.where(slot == LOGPROB, total, 0.0), 0) / tl.maximum(possible, 1.0))
    tl.store(means + 2, tl.where(n > 0.0, wanted, 0.0))


@triton.jit
def _hash(rank, seed):
    """32 bits of every rank: the finaliser of MurmurHash3, in 64 bits whose upper half is dropped."""
    low = 0xFFFFFFFF
    x = (rank * 0x9E3779B9 + seed) & low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)


@triton.jit
def keys_kernel(
    logprobs, old_logprobs, advantages, mask, ranks, cu_seqlens, means, keys, tokens, rows, row_length,
    search_steps, row_stride, token_stride, low: tl.float64, high: tl.float64, cov_min: tl.float64,
    cov_max: tl.float64, seed,
    DRAW: tl.constexpr, OLD: tl.constexpr, ROW_ADVANTAGES: tl.constexpr, PACKED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smaller the key, the earlier the choice; `ranks` counts the counting tokens up to each."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    token = start + tl.arange(0, BLOCK)
    at = _at(
        token, start, cu_seqlens, rows, row_length, search_steps, row_stride, token_stride, ROW_ADVANTAGES,
        PACKED, BLOCK,
    )  # fmt: skip
    live, on, possible, logp, A = _loaded(logprobs, advantages, mask, token, at, tokens, WIDE)
    covariance = (A - tl.load(means).to(WIDE)) * (logp - tl.load(means + 1).to(WIDE))
    if DRAW:
        x = logp * 0.0
        if OLD:
            x, _ = log_ratio(logp, load_wide(old_logprobs, token, live, on, WIDE))
        ratio, _ = exp20(x, WIDE)
        held = ((A < 0.0) & (ratio < real(low, WIDE))) | ((A > 0.0) & (ratio > real(high, WIDE)))
        drawn = (
            possible & (covariance > real(cov_min, WIDE)) & (covariance < real(cov_max, WIDE)) & (held == 0)
        )
        key = tl.where(drawn, _hash(tl.load(ranks + token, live, 1) - 1, seed), NEVER)
        tl.store(keys + token, key, live)
    else:
        tl.store(keys + token, tl.where(possible, -covariance, float("inf")), live)


def selection(
    logprobs: torch.Tensor, old: torch.Tensor | None, advantages: torch.Tensor, strides: tuple[int, int],
    layout: Layout, objective: int, parameters: list[float],
) -> torch.Tensor:  # fmt: skip
    """bool [tokens]: what is chosen."""
    device, tokens, kind = logprobs.device, layout.tokens, wide(logprobs.dtype)
    selected = torch.zeros(tokens, dtype=torch.bool, device=device)
    programs, steps = programs_of(tokens)
    if not programs:
        return selected
    draws = objective == CLIP_COV.value
    low, high, fraction, cov_min, cov_max, seed = (
        parameters if draws else [0.0, 0.0, parameters[0], 0.0, 0.0, 0.0]
    )
    bounds, rows, row_length, search_steps = layout.row_arguments()
    shared = {
        "ROW_ADVANTAGES": strides[0] != 0, "PACKED": layout.cu_seqlens is not None, "WIDE": kind, "BLOCK": BLOCK,
        "num_warps": warps(logprobs.dtype),
    }  # fmt: skip
    partial = torch.empty((programs, SLOTS.value), dtype=torch.float64, device=device)
    means = torch.empty(3, dtype=torch.float64, device=device)
    means_kernel[(programs,)](
        logprobs, advantages, layout.mask, bounds, partial, tokens, rows, row_length, search_steps, steps,
        *strides, **shared,
    )  # fmt: skip
    finish_means_kernel[(1,)](partial, means, programs, fraction, FOLD=FOLD)
    ranks = layout.mask.flatten().cumsum(0) if draws else layout.mask
    key_dtype = torch.float64 if kind == tl.float64 else torch.float32
    keys = torch.empty(tokens, dtype=torch.int64 if draws else key_dtype, device=device)
    keys_kernel[(triton.cdiv(tokens, BLOCK),)](
        logprobs, logprobs if old is None else old, advantages, layout.mask, ranks, bounds, means, keys, tokens,
        rows, row_length, search_steps, *strides, low, high, cov_min, cov_max, int(seed), DRAW=draws,
        OLD=old is not None, **shared,
    )  # fmt: skip
    ordered, order = keys.sort(stable=True)
    chosen = ordered < (NEVER.value if draws else float("inf"))
    chosen &= torch.arange(tokens, device=device) < means[2]
    return selected.scatter_(0, order, chosen)


def _variants() -> list[Variant]:
    """Both choices with an advantage a token or a row, padded and packed; one in float64."""
    found = []
    sizes = dict.fromkeys(("tokens", "rows", "row_length", "search_steps", "steps"), "i32")
    strides = {"row_stride": "i32", "token_stride": "i32"}
    layout = {"mask": "*i1", "ranks": "*i64", "cu_seqlens": "*i32", "partial": "*fp64", "means": "*fp64"}
    numbers = dict.fromkeys(("low", "high", "cov_min", "cov_max"), "fp64") | {"seed": "i64"}
    for dtype, draws, by_row, packed in (
        ("*fp32", False, False, False),
        ("*fp32", False, True, True),
        ("*bf16", True, True, False),
        ("*fp64", True, True, True),
    ):
        double = dtype == "*fp64"
        signature = dict.fromkeys(("logprobs", "old_logprobs", "advantages"), dtype)
        signature |= layout | sizes | strides | numbers
        signature |= {"keys": "*i64" if draws else "*fp32"}
        flags = {"ROW_ADVANTAGES": by_row, "PACKED": packed, "WIDE": tl.float64 if double else tl.float32}
        flags |= {"BLOCK": BLOCK} | ({} if by_row else {"token_stride": 1})
        num_warps = warps(torch.float64 if double else torch.float32)
        even = ("tokens", "row_length")
        found.append(Variant(means_kernel, signature, flags, num_warps, even))
        found.append(Variant(keys_kernel, signature, flags | {"DRAW": draws, "OLD": True}, num_warps, even))
    finish = {"partial": "*fp64", "means": "*fp64", "programs": "i32", "fraction": "fp64"}
    return [*found, Variant(finish_means_kernel, finish, {"FOLD": FOLD})]


VARIANTS = _variants()
