"""Kernels of the returns: GAE, discounted returns (V = 0, lam = 1) and y_t = b_t + a_t y_{t+1}.

    m_t = b_t + a_t m_{t+1},  m_t = (1 - lam) V_t + lam G_t,  G_t = r_t + gamma m_{t+1},  A_t = G_t - V_t
    an action: a = gamma lam, b = (1 - lam) V_t + lam r_t;   terminated: a = 0
    truncated: a = 0, b = (1 - lam) V_t + lam (r_t + gamma V_boot);   masked: a = 1, b = 0

Roofline, per step in float32: r, V, mask read, A, G written, 17 bytes (5.7 ns a thousand steps of 3 TB/s), each
further flag 1 byte, for 6 flops and 3 log2(BLOCK) of the scan: bandwidth-bound. Backward: dA, dG, mask read, dr,
dV written, 17 bytes. The scan: 12 bytes forward, 20 backward.

A program walks one row in blocks of BLOCK counting steps and hands one carry from block to block; of few long rows
(GAE, TD(lambda) and discounted returns; the backward, the scan and kernels/off_policy.py always walk) a program
takes one block, see kernels/advantage_chunks.py. Blocks are counted from the row's first counting step, and the
row's length and strides are not specialised on, so that every row is laid out over the threads in the same way:
neither padding, gaps, packing, chunks nor the other rows change a bit. For that a row with gaps lists its counting
steps first, 8 bytes a step more, most of them in the L2 cache.
"""

import torch
import triton
import triton.language as tl

from . import advantage_chunks as chunks
from .advantage_chunks import BLOCK, FREE, WARPS, _carried, _chunk_of, _listed_steps, gae_signature
from .advantage_rows import (
    _after,
    _bounds,
    _counting_steps,
    _flags_of,
    _join,
    _join_cut,
    _lam_of,
    _messages,
    _number,
    _pick,
    _places,
)
from .aot import Variant

# The interpreter takes a scan element by element: short blocks, and with them many carries, for its tests.
INTERPRETED_BLOCK = 16


@triton.jit(do_not_specialize=FREE)
def gae_kernel(
    rewards, values, last_values, bootstrap_values, terminated, truncated, mask, places, offsets, lams, counts,
    slopes, shifts, gamma: tl.float64, lam: tl.float64, advantages, returns, parts, length, total, rows, items,
    VALUES: tl.constexpr, ADVANTAGES: tl.constexpr, LAST: tl.constexpr, ENDS: tl.constexpr, CUTS: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, PER_ROW: tl.constexpr, CHUNKED: tl.constexpr,
    MOMENTS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    discount = tl.full([], gamma, tl.float64).to(WIDE)
    zero = tl.full([], 0, tl.int32)
    n_seen = tl.zeros([], tl.float64)
    shift = tl.zeros([], tl.float64)
    plain = tl.zeros([], tl.float64)  # sum of A - shift, and of its square
    square = tl.zeros([], tl.float64)
    beyond, stride = tl.program_id(0) + 1, 1
    if MOMENTS:  # all items on the programs of a fixed grid
        beyond, stride = items, tl.num_programs(0)
    for item in tl.range(tl.program_id(0), beyond, stride, disable_licm=tl.float64 == WIDE):
        row, first = item, zero
        if CHUNKED:
            row, first = _chunk_of(item, offsets, length, total, rows, PACKED, BLOCK)
        begin, n = _bounds(row, offsets, length, total, PACKED)
        lam_row = _lam_of(row, lams, lam, PER_ROW, WIDE)
        m = _number(last_values, row, True, LAST, WIDE)
        if CHUNKED:  # one block of the row
            count, low, listed = _listed_steps(counts, row, n, MASKED)
            blocks = tl.cdiv(count, BLOCK)
            m = _carried(slopes, shifts, item - first, item - first + tl.minimum(first, blocks), m)
            if first >= blocks:  # no block stands in this slot
                first, count, blocks = zero, zero, zero + 1
            last = first + 1  # a single round, which the compiler sees
        else:  # all blocks, from the row's end on
            count, low, listed = _counting_steps(
                mask + begin, places + begin, returns + begin, advantages + begin, n, MASKED, ADVANTAGES, BLOCK,
            )  # fmt: skip
            blocks = tl.cdiv(count, BLOCK)
            last = blocks
        for k in tl.range(first, last, disable_licm=not MOMENTS and tl.float32 == WIDE):
            rank = (blocks - 1 - k) * BLOCK + i
            inside = rank < count
            at = _places(places + begin, low, listed, rank, MASKED)
            r, v, boot, stops, a, b = _messages(
                rewards + begin, values + begin, bootstrap_values + begin, terminated + begin, truncated + begin,
                at, inside, discount, lam_row, VALUES, ENDS, CUTS, WIDE,
            )  # fmt: skip
            message = _after(a, b, m)
            behind = tl.gather(message, tl.where(i + 1 < BLOCK, i + 1, 0), 0)
            behind = tl.where(i + 1 < BLOCK, behind, m)
            target = r + discount * tl.where(stops, boot, behind)
            tl.store(returns + begin + at, target, inside)
            if ADVANTAGES:
                tl.store(advantages + begin + at, target - v, inside)
            m = _pick(message, i, 0)
            if MOMENTS:
                shift = tl.where(n_seen == 0.0, _pick(target - v, i, 0).to(tl.float64), shift)
                gap = tl.where(inside, (target - v).to(tl.float64) - shift, 0.0)
                n_seen += tl.minimum(count - (blocks - 1 - k) * BLOCK, BLOCK).to(tl.float64)
                plain += tl.sum(gap, 0)
                square += tl.sum(gap * gap, 0)
    if MOMENTS:
        part = parts + tl.program_id(0)
        off = plain / tl.maximum(n_seen, 1.0)
        tl.store(part, n_seen)
        tl.store(part + tl.num_programs(0), shift + off)
        tl.store(part + 2 * tl.num_programs(0), tl.maximum(square - plain * off, 0.0))


@triton.jit(do_not_specialize=FREE)
def gae_backward_kernel(
    d_advantages, d_returns, terminated, truncated, mask, offsets, lams, gamma: tl.float64, lam: tl.float64,
    d_rewards, d_values, d_last_values, d_bootstrap_values, length, total,
    VALUES: tl.constexpr, ENDS: tl.constexpr, CUTS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    PER_ROW: tl.constexpr, WANT_VALUES: tl.constexpr, WANT_LAST: tl.constexpr, WANT_BOOTSTRAP: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The adjoint x_t = dL/dr_t = u_t + lam c_t runs forward, with u_t = dL/dG_t and c_t = dL/dm_t the carry:
    # c_{t+1} = gamma x_t behind an action, 0 behind a cut, c_t behind a masked step.
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    i = tl.arange(0, BLOCK)
    discount = tl.full([], gamma, tl.float64).to(WIDE)
    lam_row = _lam_of(tl.program_id(0), lams, lam, PER_ROW, WIDE)
    carry = tl.zeros([], WIDE)
    for k in range(tl.cdiv(n, BLOCK)):
        step = k * BLOCK + i
        at = begin + step
        inside = step < n
        counts, ends, cut = _flags_of(terminated, truncated, mask, at, inside, ENDS, CUTS, MASKED)
        through = _number(d_advantages, at, counts, VALUES, WIDE)
        u = _number(d_returns, at, counts, True, WIDE) + through
        stops = ends | cut
        a = tl.where(counts, tl.where(stops, 0.0, discount * lam_row), 1.0)
        b = tl.where(counts & (stops == 0), discount * u, 0.0)
        a, b = tl.associative_scan((a, b), 0, _join_cut)
        after = tl.where(a == 0.0, b, b + a * carry)
        before = tl.where(i > 0, tl.gather(after, tl.where(i > 0, i - 1, 0), 0), carry)
        x = tl.where(counts, u + lam_row * before, 0.0)
        tl.store(d_rewards + at, x, inside)
        if WANT_VALUES:
            tl.store(d_values + at, tl.where(counts, (1.0 - lam_row) * before - through, 0.0), inside)
        if WANT_BOOTSTRAP:
            tl.store(d_bootstrap_values + at, tl.where(cut, discount * x, 0.0), inside)
        carry = _pick(after, i, BLOCK - 1)
    if WANT_LAST:
        tl.store(d_last_values + tl.program_id(0), carry)


@triton.jit(do_not_specialize=FREE)
def scan_kernel(
    a, b, init, offsets, out, length, total,
    INIT: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    i = tl.arange(0, BLOCK)
    y = tl.zeros([], WIDE)
    if INIT:
        y = tl.load(init + tl.program_id(0)).to(WIDE)
    blocks = tl.cdiv(n, BLOCK)
    for k in range(blocks):
        step = (blocks - 1 - k) * BLOCK + i
        at = begin + step
        inside = step < n
        slope = tl.load(a + at, inside, 1.0).to(WIDE)
        offset = tl.load(b + at, inside, 0.0).to(WIDE)
        slope, offset = tl.associative_scan((slope, offset), 0, _join, reverse=True)
        found = offset + slope * y
        tl.store(out + at, found, inside)
        y = _pick(found, i, 0)


@triton.jit(do_not_specialize=FREE)
def scan_backward_kernel(
    upstream, a, y, init, offsets, d_a, d_b, d_init, length, total,
    INIT: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # s_t = dL/dy_t = upstream_t + a_{t-1} s_{t-1} runs forward; db = s, da_t = s_t y_{t+1}.
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    i = tl.arange(0, BLOCK)
    last = tl.zeros([], WIDE)
    if INIT:
        last = tl.load(init + tl.program_id(0)).to(WIDE)
    carry = tl.zeros([], WIDE)
    for k in range(tl.cdiv(n, BLOCK)):
        step = k * BLOCK + i
        at = begin + step
        inside = step < n
        slope = tl.load(a + at - 1, inside & (step > 0), 0.0).to(WIDE)
        offset = tl.load(upstream + at, inside, 0.0).to(WIDE)
        slope, offset = tl.associative_scan((slope, offset), 0, _join)
        s = offset + slope * carry
        behind = tl.where(step + 1 < n, tl.load(y + at + 1, step + 1 < n, 0.0).to(WIDE), last)
        tl.store(d_b + at, s, inside)
        tl.store(d_a + at, s * behind, inside)
        carry = _pick(s, i, tl.minimum(n - k * BLOCK, BLOCK) - 1)
    if INIT:
        if n > 0:
            carry = carry * tl.load(a + begin + n - 1).to(WIDE)
        tl.store(d_init + tl.program_id(0), carry)


# ---- launchers: the arguments and results of the operators in react_fast/ops/_advantage.py ---------------------

Tensor = torch.Tensor
Maybe = torch.Tensor | None


def _wide(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _rows(x: Tensor, cu_seqlens: Maybe) -> tuple[int, dict]:
    """(number of rows, the arguments every kernel shares)."""
    _, WIDE = _wide(x)
    block = INTERPRETED_BLOCK if triton.knobs.runtime.interpret else BLOCK
    shared = {"total": x.numel(), "PACKED": cu_seqlens is not None, "WIDE": WIDE, "BLOCK": block}
    if cu_seqlens is None:
        return x.shape[0], {**shared, "offsets": x, "length": x.shape[1]}
    return cu_seqlens.shape[0] - 1, {**shared, "offsets": cu_seqlens.long().contiguous(), "length": 0}


def _or(x: Maybe, unread: Tensor) -> Tensor:
    """x, unit stride; a kernel that does not read it gets some other pointer."""
    return unread if x is None else x.contiguous()


def places_for(mask: Maybe, like: Tensor) -> Tensor:
    """Room for where the counting steps of rows with gaps stand."""
    return like if mask is None else torch.empty(mask.shape, dtype=torch.int32, device=mask.device)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def gae(
    rewards: Tensor, values: Maybe, last_values: Maybe, bootstrap_values: Maybe, terminated: Maybe,
    truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, lams: Maybe, gamma: float, lam: float,
    want_advantages: bool = True, out: tuple[Tensor, Tensor] | None = None, parts: Maybe = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, returns) [B, T] or [N], in `out` if given; advantages that are not wanted are empty.

    `parts` [3, P] float64 gets the advantages' moments in P parts, see kernels/whiten.py.
    """
    rewards = rewards.contiguous()
    want_advantages = want_advantages and values is not None
    if out is None:
        returns = rewards.new_empty(rewards.shape, dtype=_wide(rewards)[0])
        advantages = torch.empty_like(returns) if want_advantages else _nothing(returns)
    else:
        advantages, returns = out
    rows, shared = _rows(rewards, cu_seqlens)
    if rewards.numel() == 0:
        if parts is not None:
            parts.zero_()
        return advantages, returns
    inputs = {
        "rewards": rewards, "values": _or(values, rewards), "last_values": _or(last_values, rewards),
        "bootstrap_values": _or(bootstrap_values, rewards), "terminated": _or(terminated, rewards),
        "truncated": _or(truncated, rewards), "mask": _or(mask, rewards), "places": places_for(mask, rewards),
        "lams": _or(lams, rewards), "gamma": gamma, "lam": lam, "advantages": advantages, "returns": returns,
    }  # fmt: skip
    options = {
        "VALUES": values is not None, "ADVANTAGES": want_advantages, "LAST": last_values is not None,
        "ENDS": terminated is not None, "CUTS": truncated is not None, "MASKED": mask is not None,
        "PER_ROW": lams is not None,
    }  # fmt: skip
    shared["num_warps"] = chunks.WARPS[shared["WIDE"]]
    chunked = chunks.is_long(rows, rewards.numel())
    items, maps = rows, dict.fromkeys(("counts", "slopes", "shifts"), rewards)
    if chunked:
        items = rewards.numel() // shared["BLOCK"] + rows
        maps = chunks.summaries(items, rows, inputs, options, shared)
    gae_kernel[(items if parts is None else parts.shape[1],)](
        **inputs, **maps, parts=returns if parts is None else parts, rows=rows,
        items=items, CHUNKED=chunked, MOMENTS=parts is not None, **options, **shared,
    )  # fmt: skip
    return advantages, returns


def gae_backward(
    d_returns: Tensor, d_advantages: Maybe, terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe,
    lams: Maybe, gamma: float, lam: float, want_values: bool, want_last: bool, want_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_rewards, d_values, d_last_values, d_bootstrap_values); one that is not wanted is empty."""
    d_returns = d_returns.contiguous()
    rows, shared = _rows(d_returns, cu_seqlens)
    d_rewards, nothing = torch.empty_like(d_returns), _nothing(d_returns)
    d_values = torch.empty_like(d_returns) if want_values else nothing
    d_last = d_returns.new_zeros(rows) if want_last else nothing.clone()
    d_bootstrap = torch.empty_like(d_returns) if want_bootstrap else nothing.clone()
    if d_returns.numel():
        gae_backward_kernel[(rows,)](
            _or(d_advantages, d_returns), d_returns, _or(terminated, d_returns), _or(truncated, d_returns),
            _or(mask, d_returns), lams=_or(lams, d_returns), gamma=gamma, lam=lam, d_rewards=d_rewards,
            d_values=d_values, d_last_values=d_last, d_bootstrap_values=d_bootstrap,
            VALUES=d_advantages is not None, ENDS=terminated is not None, CUTS=truncated is not None,
            MASKED=mask is not None, PER_ROW=lams is not None, WANT_VALUES=want_values, WANT_LAST=want_last,
            WANT_BOOTSTRAP=want_bootstrap, **shared,
        )  # fmt: skip
    return d_rewards, d_values, d_last, d_bootstrap


def reverse_linear_scan(a: Tensor, b: Tensor, init: Maybe, cu_seqlens: Maybe) -> Tensor:
    a = a.contiguous()
    out = a.new_empty(a.shape, dtype=_wide(a)[0])
    rows, shared = _rows(a, cu_seqlens)
    if a.numel():
        scan_kernel[(rows,)](a, b.contiguous(), _or(init, a), out=out, INIT=init is not None, **shared)
    return out


def reverse_linear_scan_backward(
    upstream: Tensor, a: Tensor, y: Tensor, init: Maybe, cu_seqlens: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_a, d_b, d_init), dtype of upstream; d_init is 0 without an init."""
    upstream, a = upstream.contiguous(), a.contiguous()
    rows, shared = _rows(upstream, cu_seqlens)
    d_a, d_b, d_init = torch.empty_like(upstream), torch.empty_like(upstream), upstream.new_zeros(rows)
    if upstream.numel():
        scan_backward_kernel[(rows,)](
            upstream, a, y.contiguous(), _or(init, a), d_a=d_a, d_b=d_b, d_init=d_init, INIT=init is not None,
            **shared,
        )  # fmt: skip
    return d_a, d_b, d_init


# ---- what ahead-of-time compilation looks at --------------------------------------------------------------------


def _variants() -> list[Variant]:
    found = []
    for pointer, WIDE in (("*fp32", tl.float32), ("*bf16", tl.float32), ("*fp64", tl.float64)):
        signature = gae_signature(pointer)
        wide = signature["returns"]
        grads = ("d_rewards", "d_values", "d_last_values", "d_bootstrap_values")
        backward = {
            **signature, **dict.fromkeys(("d_advantages", "d_returns", *grads), wide),
        }  # fmt: skip
        scan = {
            **signature, **dict.fromkeys(("a", "b", "init"), pointer),
            **dict.fromkeys(("upstream", "y", "out", "d_a", "d_b", "d_init"), wide),
        }  # fmt: skip
        for every in (False, True):
            shape = {"PACKED": every, "WIDE": WIDE, "BLOCK": BLOCK}
            steps = {"ENDS": every, "CUTS": every, "MASKED": True, "PER_ROW": every, **shape}
            wants = {"VALUES": True, "WANT_VALUES": True, "WANT_LAST": every, "WANT_BOOTSTRAP": every}
            forward = {"VALUES": True, "ADVANTAGES": True, "LAST": every, **steps}
            found += [
                Variant(
                    gae_kernel, signature, {**forward, "CHUNKED": chunked, "MOMENTS": moments}, WARPS[WIDE]
                )
                for chunked in (False, True)
                for moments in (False, True)
            ]
            found += [
                Variant(scan_kernel, scan, {"INIT": every, **shape}),
                Variant(scan_backward_kernel, scan, {"INIT": every, **shape}),
            ]
            if pointer == wide:  # its inputs are never narrow
                found.append(Variant(gae_backward_kernel, backward, {**wants, **steps}))
    return found


VARIANTS = _variants()
