"""n-step returns by doubling, forward and backward.

    link_t    the next counting step of the same segment, -1 behind its last
    x_t       the reward, and at a segment's last step the discounted value behind it too
    B_2k(t) = B_k(t) + gamma^k B_k(link_k(t))        link_2k(t) = link_k(link_k(t))
    R_{m+k}(t) = R_m(t) + gamma^m B_k(at_m(t))       at_{m+k}(t) = link_k(at_m(t)), for every bit k of n - 1

The last step of the window is added with the value behind it. Nothing is subtracted: no cancellation, a NaN stays
in the windows that hold it, and masks, cuts and packing are links alone. The backward is the same sum along the
links reversed.

Roofline, per step in float32, at least 12 bytes: links 22, each doubling 24 read (8 gathered), 12 to 24 written,
the end 29: some 50 + 40 log2(n) bytes, so a five-step return costs as much as ten passes over its rewards; n = 1
takes the two passes without doubling. All launches but the links are one element a thread.
"""

import torch
import triton
import triton.language as tl

from .advantage import FREE, _or, _rows, _wide
from .advantage_rows import _bounds, _flag, _number
from .aot import Variant

TILE = 1024

Tensor = torch.Tensor
Maybe = torch.Tensor | None


@triton.jit
def _least(a, b):
    return tl.minimum(a, b)


@triton.jit
def _most(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=FREE)
def link_kernel(
    terminated, truncated, mask, offsets, link, back, length, total,
    ENDS: tl.constexpr, CUTS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, BACK: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """link: right to left, the nearest counting step to the right; back: left to right, the nearest to the left;
    -1 where a cut lies between."""
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    i = tl.arange(0, BLOCK)
    nowhere = tl.full([], 1 << 62, tl.int64)
    nearest = nowhere
    blocks = tl.cdiv(n, BLOCK)
    for k in range(blocks):
        step = (blocks - 1 - k) * BLOCK + i
        at = begin + step
        inside = step < n
        counts = _flag(mask, at, inside, MASKED, True)
        cut = _flag(terminated, at, counts, ENDS, False) | _flag(truncated, at, counts, CUTS, False)
        seen = tl.associative_scan(tl.where(counts, at, nowhere), 0, _least, reverse=True)
        behind = tl.gather(seen, tl.where(i + 1 < BLOCK, i + 1, 0), 0)
        behind = tl.minimum(tl.where(i + 1 < BLOCK, behind, nowhere), nearest)
        tl.store(link + at, tl.where(counts & (cut == 0) & (behind < nowhere), behind, -1), inside)
        nearest = tl.minimum(nearest, tl.min(seen, 0))
    if BACK:
        # Twice the position, and one more behind a cut: the larger of two is the nearer.
        nearest = tl.full([], -1, tl.int64)
        for k in range(blocks):
            step = k * BLOCK + i
            at = begin + step
            inside = step < n
            counts = _flag(mask, at, inside, MASKED, True)
            cut = _flag(terminated, at, counts, ENDS, False) | _flag(truncated, at, counts, CUTS, False)
            seen = tl.associative_scan(tl.where(counts, 2 * at + cut.to(tl.int64), -1), 0, _most)
            before = tl.gather(seen, tl.where(i > 0, i - 1, 0), 0)
            before = tl.maximum(tl.where(i > 0, before, -1), nearest)
            open_ = counts & (before >= 0) & (before % 2 == 0)
            tl.store(back + at, tl.where(open_, before // 2, -1), inside)
            nearest = tl.maximum(nearest, tl.max(seen, 0))


@triton.jit(do_not_specialize=FREE)
def reward_kernel(
    rewards, values, last_values, bootstrap_values, terminated, truncated, mask, offsets, link, x,
    gamma: tl.float64, length, total, LAST: tl.constexpr, BOOT: tl.constexpr, ENDS: tl.constexpr,
    CUTS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, BEHIND: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x: the reward of counting steps, with the discounted value behind a segment's last one."""
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    i = tl.arange(0, BLOCK)
    tail = tl.zeros([], WIDE)
    if LAST:
        tail = tl.load(last_values + tl.program_id(0)).to(WIDE)
    for k in range(tl.cdiv(n, BLOCK)):
        at = begin + k * BLOCK + i
        inside = k * BLOCK + i < n
        counts = _flag(mask, at, inside, MASKED, True)
        ends = _flag(terminated, at, counts, ENDS, False)
        cut = _flag(truncated, at, counts, CUTS, False) & (ends == 0)
        final = counts & (tl.load(link + at, inside, 0) < 0)
        own = _number(values, at, final & (ends == 0), BEHIND, WIDE)
        boot = _number(bootstrap_values, at, cut, BOOT, WIDE)
        behind = tl.where(final & (cut == 0), tail, 0.0) if LAST else own
        if BOOT:
            behind = tl.where(cut, boot, behind)
        else:
            behind = tl.where(cut, own, behind)
        behind = tl.where(final & (ends == 0), behind, 0.0)
        r = _number(rewards, at, counts, True, WIDE)
        tl.store(x + at, r + tl.full([], gamma, tl.float64).to(WIDE) * behind, inside)


@triton.jit
def double_kernel(
    total, at, base, link, total_out, at_out, base_out, link_out, gain: tl.float64, base_gain: tl.float64, count,
    TAKE: tl.constexpr, GROW: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One bit of n - 1: TAKE adds the base's window to the total's, GROW doubles the base."""
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = t < count
    if TAKE:
        place = tl.load(at + t, live, -1)
        there = place >= 0
        more = tl.load(base + place, there, 0.0)
        found = tl.load(total + t, live, 0.0) + tl.where(
            there, tl.full([], gain, tl.float64).to(WIDE) * more, 0.0
        )
        tl.store(total_out + t, found, live)
        tl.store(at_out + t, tl.load(link + place, there, -1), live)
    if GROW:
        place = tl.load(link + t, live, -1)
        there = place >= 0
        more = tl.load(base + place, there, 0.0)
        step = tl.where(there, tl.full([], base_gain, tl.float64).to(WIDE) * more, 0.0)
        tl.store(base_out + t, tl.load(base + t, live, 0.0) + step, live)
        tl.store(link_out + t, tl.load(link + place, there, -1), live)


@triton.jit
def finish_kernel(
    total, at, x, link, values, mask, out, gain: tl.float64, last_gain: tl.float64, count,
    MASKED: tl.constexpr, BEHIND: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = R + gamma^(n-1) x(last) + gamma^n V, V of the step behind the window's last one, if there is one."""
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = t < count
    counts = _flag(mask, t, live, MASKED, True)
    place = tl.load(at + t, counts, -1)
    there = place >= 0
    after = tl.load(link + place, there, -1)
    source = place if BEHIND else after
    v = tl.load(values + source, after >= 0, 0.0).to(WIDE)
    r = tl.load(x + place, there, 0.0)
    found = tl.load(total + t, counts, 0.0)
    found += tl.where(there, tl.full([], gain, tl.float64).to(WIDE) * r, 0.0)
    found += tl.where(after >= 0, tl.full([], last_gain, tl.float64).to(WIDE) * v, 0.0)
    tl.store(out + t, tl.where(counts, found, 0.0), live)


@triton.jit(do_not_specialize=FREE)
def finish_backward_kernel(
    summed, at, upstream, link, terminated, truncated, mask, offsets, d_rewards, d_values, d_last_values,
    d_bootstrap_values, gamma: tl.float64, gain: tl.float64, last_gain: tl.float64, length, total,
    LAST: tl.constexpr, BOOT: tl.constexpr, ENDS: tl.constexpr, CUTS: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, BEHIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_values and the tails start as zeros; d_values of the next step is written here, by this step alone."""
    begin, n = _bounds(tl.program_id(0), offsets, length, total, PACKED)
    i = tl.arange(0, BLOCK)
    for k in range(tl.cdiv(n, BLOCK)):
        t = begin + k * BLOCK + i
        inside = k * BLOCK + i < n
        counts = _flag(mask, t, inside, MASKED, True)
        ends = _flag(terminated, t, counts, ENDS, False)
        cut = _flag(truncated, t, counts, CUTS, False) & (ends == 0)
        place = tl.load(at + t, counts, -1)
        there = place >= 0
        g = tl.load(upstream + place, there, 0.0)
        d = tl.load(summed + t, counts, 0.0)
        d = tl.where(counts, d + tl.where(there, tl.full([], gain, tl.float64).to(WIDE) * g, 0.0), 0.0)
        tl.store(d_rewards + t, d, inside)
        behind = tl.load(link + t, counts, -1)
        onward = counts & (behind >= 0)
        slope = tl.where(there, tl.full([], last_gain, tl.float64).to(WIDE) * g, 0.0)
        target = t if BEHIND else behind
        tl.store(d_values + target, slope, onward)
        final = counts & (behind < 0) & (ends == 0)
        tail = tl.full([], gamma, tl.float64).to(WIDE) * d
        if BOOT:
            tl.store(d_bootstrap_values + t, tail, final & cut)
        if LAST:
            tl.store(d_last_values + tl.program_id(0) + i * 0, tail, final & (cut == 0))
        if BEHIND:
            own = final
            if BOOT:
                own = own & (cut == 0)
            if LAST:
                own = own & cut
            tl.store(d_values + t, tail, own)


# ---- launchers ------------------------------------------------------------------------------------------------


def _window(x: Tensor, link: Tensor, gamma: float, n: int) -> tuple[Tensor, Tensor]:
    """(sum of the first n - 1 steps of every window, its n-th step or -1).

    How the sums associate follows from n alone, whatever the rows' length. Doubling ends where a window is as long
    as any row: from there on its sum is that of the rest of its row, and nothing follows.
    """
    count = x.numel()
    at = torch.arange(count, device=x.device)
    total, base, m, k, bits = torch.zeros_like(x), x, 0, 1, n - 1
    while bits:
        longest = k >= x.shape[-1]
        take, grow = bits & 1 == 1 or longest, bits > 1 and not longest
        new = [torch.empty_like(y) if wanted else y for y, wanted in
               ((total, take), (at, take), (base, grow), (link, grow))]  # fmt: skip
        double_kernel[(triton.cdiv(count, TILE),)](
            total, at, base, link, *new, gamma**m, gamma**k, count, TAKE=take, GROW=grow, WIDE=_wide(x)[1],
            TILE=TILE,
        )  # fmt: skip
        total, at, base, link = new
        m, k, bits = m + k * take, 2 * k, bits >> 1 if grow else 0
    return total, at


def _links(
    x: Tensor, flags: list[Tensor], options: dict, shared: dict, rows: int, back: bool
) -> list[Tensor]:
    links = [torch.empty(x.shape, dtype=torch.int64, device=x.device) for _ in range(1 + back)]
    if shared["PACKED"]:  # bounds on a GPU are not looked at: what lies in no row must lead nowhere
        links = [link.fill_(-1) for link in links]
    link_kernel[(rows,)](*flags, link=links[0], back=links[-1], BACK=back, **options, **shared)
    return links


def _flags_of(terminated: Maybe, truncated: Maybe, mask: Maybe, other: Tensor) -> tuple[list[Tensor], dict]:
    options = {"ENDS": terminated is not None, "CUTS": truncated is not None, "MASKED": mask is not None}
    return [_or(x, other) for x in (terminated, truncated, mask)], options


def n_step(
    rewards: Tensor, values: Tensor, last_values: Maybe, bootstrap_values: Maybe, terminated: Maybe,
    truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, gamma: float, n: int, behind: bool,
) -> Tensor:  # fmt: skip
    rewards, values = rewards.contiguous(), values.contiguous()
    out = rewards.new_empty(rewards.shape, dtype=_wide(rewards)[0])
    rows, shared = _rows(rewards, cu_seqlens)
    count = rewards.numel()
    if count == 0:
        return out
    flags, options = _flags_of(terminated, truncated, mask, rewards)
    (link,) = _links(rewards, flags, options, shared, rows, False)
    x = torch.empty_like(out)
    reward_kernel[(rows,)](
        rewards, values, _or(last_values, rewards), _or(bootstrap_values, rewards), *flags, link=link, x=x,
        gamma=gamma, LAST=last_values is not None, BOOT=bootstrap_values is not None, BEHIND=behind, **options,
        **shared,
    )  # fmt: skip
    total, at = _window(x, link, gamma, n)
    finish_kernel[(triton.cdiv(count, TILE),)](
        total, at, x, link, values, flags[2], out, gamma ** (n - 1), gamma**n, count, MASKED=mask is not None,
        BEHIND=behind, WIDE=_wide(rewards)[1], TILE=TILE,
    )  # fmt: skip
    return out


def n_step_backward(
    upstream: Tensor, terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, gamma: float, n: int,
    behind: bool, has_last: bool, has_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_rewards, d_values, d_last_values, d_bootstrap_values); one that is not wanted is empty."""
    upstream = upstream.contiguous()
    rows, shared = _rows(upstream, cu_seqlens)
    d_rewards, d_values = torch.empty_like(upstream), torch.zeros_like(upstream)
    d_last = upstream.new_zeros(rows if has_last else 0)
    d_bootstrap = upstream.new_zeros(upstream.shape if has_bootstrap else (0,))
    if upstream.numel():
        flags, options = _flags_of(terminated, truncated, mask, upstream)
        link, back = _links(upstream, flags, options, shared, rows, True)
        summed, at = _window(upstream, back, gamma, n)
        finish_backward_kernel[(rows,)](
            summed, at, upstream, link, *flags, d_rewards=d_rewards, d_values=d_values, d_last_values=d_last,
            d_bootstrap_values=d_bootstrap, gamma=gamma, gain=gamma ** (n - 1), last_gain=gamma**n, LAST=has_last,
            BOOT=has_bootstrap, BEHIND=behind, **options, **shared,
        )  # fmt: skip
    return d_rewards, d_values, d_last, d_bootstrap


def _variants() -> list[Variant]:
    found = []
    for dtype in ("*fp32", "*bf16", "*fp64"):
        WIDE = tl.float64 if dtype == "*fp64" else tl.float32
        wide = "*fp64" if dtype == "*fp64" else "*fp32"
        signature = dict.fromkeys(("rewards", "values", "last_values", "bootstrap_values"), dtype)
        signature |= dict.fromkeys(("x", "base", "base_out", "total_out", "summed", "upstream", "out"), wide)
        signature |= dict.fromkeys(("d_rewards", "d_values", "d_last_values", "d_bootstrap_values"), wide)
        signature |= dict.fromkeys(("link", "back", "at", "at_out", "link_out", "offsets"), "*i64")
        signature |= dict.fromkeys(("terminated", "truncated", "mask"), "*i1") | {
            "length": "i32",
            "count": "i32",
        }
        signature |= dict.fromkeys(("gamma", "gain", "base_gain", "last_gain"), "fp64")
        rows = dict.fromkeys(("ENDS", "CUTS", "MASKED", "PACKED"), True) | {"WIDE": WIDE, "BLOCK": 1024}
        tails = {"LAST": True, "BOOT": True, "BEHIND": False} | rows
        flat = {"WIDE": WIDE, "TILE": TILE}
        by_row = signature | {"total": "i64"}
        by_step = signature | {"total": wide}
        if dtype != "*bf16":
            found.append(Variant(link_kernel, by_row, rows | {"BACK": True}))
            found.append(Variant(double_kernel, by_step, flat | {"TAKE": True, "GROW": True}, 4, ("count",)))
            found.append(Variant(finish_backward_kernel, by_row, tails))
        found.append(Variant(reward_kernel, by_row, tails))
        found.append(Variant(finish_kernel, by_step, flat | {"MASKED": True, "BEHIND": True}, 4, ("count",)))
    return found


VARIANTS = _variants()
