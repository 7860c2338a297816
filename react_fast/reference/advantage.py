"""Returns, advantages and whitening as the equations say them; see react_fast.ops.advantage."""

from collections.abc import Sequence
from itertools import pairwise

import torch

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: torch.Tensor | None, cu_seqlens: torch.Tensor | None, count: int) -> list[torch.Tensor | None]:
    """The sequences of a padded [B, T] or packed [N] tensor, one by one."""
    if x is None:
        return [None] * count
    if cu_seqlens is None:
        return list(x)
    return [x[begin:end] for begin, end in pairwise(cu_seqlens.tolist())]


def _joined(
    rows: Sequence[torch.Tensor], like: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    if not rows:
        return _wide(like) * 0
    return torch.stack(list(rows)) if cu_seqlens is None else torch.cat(list(rows))


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    count = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    columns = [
        _rows(x, cu_seqlens, count) for x in (rewards, values, terminated, truncated, bootstrap_values, mask)
    ]
    lams = lam.tolist() if isinstance(lam, torch.Tensor) else [lam] * count
    found = []
    for i, row in enumerate(zip(*columns, strict=True)):
        r, v, *flags = row
        assert r is not None
        assert v is not None
        last = _wide(v.new_zeros(())) if last_values is None else _wide(last_values[i])
        found.append(_gae_row(_wide(r), _wide(v), flags, last, gamma, lams[i]))
    advantages = _joined([a for a, _ in found], rewards, cu_seqlens)
    returns = _joined([g for _, g in found], rewards, cu_seqlens)
    return advantages, returns


def _gae_row(
    r: torch.Tensor,
    v: torch.Tensor,
    flags: Sequence[torch.Tensor | None],
    last: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    terminated, truncated, bootstrap, mask = flags
    nothing = r[:0].sum()
    advantages, returns = [nothing] * len(r), [nothing] * len(r)
    next_value, next_advantage = last, nothing
    for t in reversed(range(len(r))):
        if mask is not None and not mask[t]:
            continue
        if terminated is not None and terminated[t]:
            next_value, next_advantage = nothing, nothing
        elif truncated is not None and truncated[t]:
            assert bootstrap is not None
            next_value, next_advantage = _wide(bootstrap[t]), nothing
        delta = r[t] + gamma * next_value - v[t]
        advantages[t] = delta + gamma * lam * next_advantage
        returns[t] = advantages[t] + v[t]
        next_value, next_advantage = v[t], advantages[t]
    if not len(r):
        return r, r
    return torch.stack(advantages), torch.stack(returns)


def td_lambda_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    count = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    given = (rewards, values, terminated, truncated, bootstrap_values, mask)
    columns = [_rows(x, cu_seqlens, count) for x in given]
    lams = lam.tolist() if isinstance(lam, torch.Tensor) else [lam] * count
    found = []
    for i, (r, v, ends, cuts, bootstrap, counts) in enumerate(zip(*columns, strict=True)):
        assert r is not None
        assert v is not None
        r, v = _wide(r), _wide(v)
        nothing = r[:0].sum()
        returns = [nothing] * len(r)
        behind = nothing if last_values is None else _wide(last_values[i])  # (1 - lam) V' + lam G'
        for t in reversed(range(len(r))):
            if counts is not None and not counts[t]:
                continue
            if ends is not None and ends[t]:
                behind = nothing
            elif cuts is not None and cuts[t]:
                assert bootstrap is not None
                behind = _wide(bootstrap[t])
            returns[t] = r[t] + gamma * behind
            behind = (1 - lams[i]) * v[t] + lams[i] * returns[t]
        found.append(torch.stack(returns) if returns else r)
    return _joined(found, rewards, cu_seqlens)


def discounted_returns(
    rewards: torch.Tensor,
    *,
    gamma: float,
    mask: torch.Tensor | None = None,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    count = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    columns = [_rows(x, cu_seqlens, count) for x in (rewards, terminated, truncated, bootstrap_values, mask)]
    found = []
    for i, (r, ends, cuts, bootstrap, counts) in enumerate(zip(*columns, strict=True)):
        assert r is not None
        r = _wide(r)
        nothing = r[:0].sum()
        returns = [nothing] * len(r)
        behind = nothing if last_values is None else _wide(last_values[i])
        for t in reversed(range(len(r))):
            if counts is not None and not counts[t]:
                continue
            if ends is not None and ends[t]:
                behind = nothing
            elif cuts is not None and cuts[t]:
                assert bootstrap is not None
                behind = _wide(bootstrap[t])
            behind = returns[t] = r[t] + gamma * behind
        found.append(torch.stack(returns) if returns else r)
    return _joined(found, rewards, cu_seqlens)


def reverse_linear_scan(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    init: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    count = len(a) if cu_seqlens is None else len(cu_seqlens) - 1
    found = []
    for i, (a_row, b_row) in enumerate(
        zip(_rows(a, cu_seqlens, count), _rows(b, cu_seqlens, count), strict=True)
    ):
        assert a_row is not None
        assert b_row is not None
        y = _wide(a_row.new_zeros(())) if init is None else _wide(init[i])
        ys: list[torch.Tensor] = []
        for t in reversed(range(len(a_row))):
            y = _wide(b_row[t]) + _wide(a_row[t]) * y
            ys.insert(0, y)
        found.append(torch.stack(ys) if ys else _wide(a_row))
    return _joined(found, a, cu_seqlens)


def moments(x: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    counting = _wide(x) if mask is None else _wide(x)[mask.bool()]
    values = counting.detach().double().reshape(-1)
    count = torch.tensor(float(len(values)), dtype=torch.float64)
    mean = values.sum() / max(len(values), 1)
    return count, mean, ((values - mean) ** 2).sum()


def merge_moments(*parts: Moments) -> Moments:
    """n = n_a + n_b, mean = mean_a + d n_b / n, M2 = M2_a + M2_b + d^2 n_a n_b / n, d = mean_b - mean_a."""
    count, mean, m2 = parts[0]
    for other_count, other_mean, other_m2 in parts[1:]:
        total = count + other_count
        gap = other_mean - mean
        if total > 0:
            mean = mean + gap * other_count / total
            m2 = m2 + other_m2 + gap**2 * count * other_count / total
        count = total
    return count, mean, m2


def whiten(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    moments: Moments | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    ddof: int = 1,
) -> torch.Tensor:
    wide = _wide(x)
    counts = torch.ones_like(wide, dtype=torch.bool) if mask is None else mask.bool()
    values = wide[counts].double()
    if moments is None:
        n = len(values)
        mean = values.sum() / max(n, 1)
        m2 = ((values - mean) ** 2).sum()
    else:
        count, mean, m2 = (torch.as_tensor(m, dtype=torch.float64) for m in moments)
        n = int(count)
    spread = m2 / (n - ddof) + eps if n > max(1, ddof) else 0.0
    scale = spread**-0.5 if spread != 0 else 1.0
    white = (values - mean) * scale + (0.0 if shift_mean else mean)
    return torch.zeros_like(wide).masked_scatter(counts, white.to(wide.dtype))
