"""V-trace and Retrace as the equations say them; see react_fast.ops.off_policy."""

import torch

from .advantage import _joined, _rows, _wide


def vtrace(
    rewards: torch.Tensor,
    values: torch.Tensor,
    log_rhos: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    advantage_rho_clip: float | None = None,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    count = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    given = (rewards, values, log_rhos, terminated, truncated, bootstrap_values, mask)
    columns = [_rows(None if x is None else x.detach(), cu_seqlens, count) for x in given]
    lams = lam.tolist() if isinstance(lam, torch.Tensor) else [lam] * count
    pg_clip = rho_clip if advantage_rho_clip is None else advantage_rho_clip
    found = []
    for i, (r, v, log_rho, ends, cuts, bootstrap, counts) in enumerate(zip(*columns, strict=True)):
        assert r is not None
        assert v is not None
        assert log_rho is not None
        r, v, rho = _wide(r), _wide(v), _wide(log_rho).exp()
        targets, advantages = torch.zeros_like(r), torch.zeros_like(r)
        next_value = r.new_zeros(()) if last_values is None else _wide(last_values[i].detach())
        next_target = next_value
        for t in reversed(range(len(r))):
            if counts is not None and not counts[t]:
                continue
            if ends is not None and ends[t]:
                next_value = next_target = r.new_zeros(())
            elif cuts is not None and cuts[t]:
                assert bootstrap is not None
                next_value = next_target = _wide(bootstrap[t])
            c = lams[i] * rho[t].clamp_max(c_clip)
            delta = rho[t].clamp_max(rho_clip) * (r[t] + gamma * next_value - v[t])
            targets[t] = v[t] + delta + gamma * c * (next_target - next_value)
            advantages[t] = rho[t].clamp_max(pg_clip) * (r[t] + gamma * next_target - v[t])
            next_value, next_target = v[t], targets[t]
        found.append((targets, advantages))
    return (
        _joined([t for t, _ in found], rewards.detach(), cu_seqlens),
        _joined([a for _, a in found], rewards.detach(), cu_seqlens),
    )


def retrace(
    rewards: torch.Tensor,
    q_values: torch.Tensor,
    next_values: torch.Tensor,
    log_rhos: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor = 1.0,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    count = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    given = (rewards, q_values, next_values, log_rhos, terminated, truncated, mask)
    columns = [_rows(None if x is None else x.detach(), cu_seqlens, count) for x in given]
    lams = lam.tolist() if isinstance(lam, torch.Tensor) else [lam] * count
    found = []
    for i, (r, q, following, log_rho, ends, cuts, counts) in enumerate(zip(*columns, strict=True)):
        assert r is not None
        assert q is not None
        assert following is not None
        assert log_rho is not None
        r, q, following, c = _wide(r), _wide(q), _wide(following), _wide(log_rho).exp().clamp_max(1) * lams[i]
        targets = torch.zeros_like(r)
        correction = r.new_zeros(())  # c_{t+1} (G_{t+1} - Q_{t+1})
        for t in reversed(range(len(r))):
            if counts is not None and not counts[t]:
                continue
            value = following[t]
            if ends is not None and ends[t]:
                value = correction = r.new_zeros(())
            elif cuts is not None and cuts[t]:
                correction = r.new_zeros(())
            targets[t] = r[t] + gamma * (value + correction)
            correction = c[t] * (targets[t] - q[t])
        found.append(targets)
    return _joined(found, rewards.detach(), cu_seqlens)
