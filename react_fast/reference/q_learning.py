"""Q targets and values over a vocabulary as the equations say them; see react_fast.ops.q_learning."""

from collections.abc import Iterable, Sequence

import torch

from .advantage import _joined, _rows, _wide
from .logprob import token_logprobs

Pair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def _walk(
    columns: Sequence[torch.Tensor | None],
    last: torch.Tensor | None,
    gamma: float,
    n: int,
    behind: bool,
) -> torch.Tensor:
    """One row, windows added up step by step. `behind`: values stand behind their step, not at its state."""
    r, v, ends, cuts, bootstrap, mask = columns
    assert r is not None
    assert v is not None
    counting = [t for t in range(len(r)) if mask is None or mask[t]]
    nothing = _wide(r[:0]).sum()
    out = [nothing] * len(r)
    for place, start in enumerate(counting):
        total, discount = nothing, 1.0
        window = counting[place : place + n]
        for i, t in enumerate(window):
            total = total + discount * _wide(r[t])
            discount *= gamma
            final = place + i + 1 == len(counting)
            if ends is not None and ends[t]:
                break
            if cuts is not None and cuts[t]:
                total = total + discount * _wide(v[t] if bootstrap is None else bootstrap[t])
                break
            if final:
                if last is not None:
                    total = total + discount * _wide(last)
                elif behind:
                    total = total + discount * _wide(v[t])
            elif i + 1 == n:
                total = total + discount * _wide(v[t] if behind else v[counting[place + n]])
        out[start] = total
    return torch.stack(out) if out else _wide(r)


def _n_step(
    rewards: torch.Tensor,
    values: torch.Tensor,
    gamma: float,
    n: int,
    behind: bool,
    last_values: torch.Tensor | None,
    terminated: torch.Tensor | None,
    truncated: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    count = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    given = (rewards, values, terminated, truncated, bootstrap_values, mask)
    columns = zip(*(_rows(x, cu_seqlens, count) for x in given), strict=True)
    lasts = [None] * count if last_values is None else list(last_values)
    found = [_walk(row, last, gamma, n, behind) for row, last in zip(columns, lasts, strict=True)]
    return _joined(found, rewards, cu_seqlens)


def n_step_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    n: int,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    flags = (terminated, truncated, bootstrap_values, mask, cu_seqlens)
    return _n_step(rewards, values, gamma, n, False, last_values, *flags)


@torch.no_grad()
def q_targets(
    rewards: torch.Tensor,
    next_values: torch.Tensor,
    *,
    gamma: float,
    n: int = 1,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    flags = (terminated, truncated, bootstrap_values, mask, cu_seqlens)
    return _n_step(rewards, next_values, gamma, n, True, last_values, *flags)


def path_consistency(
    values: torch.Tensor,
    rewards: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    gamma: float,
    alpha: float,
    span: int | None = None,
    ref_logprobs: torch.Tensor | None = None,
    last_values: torch.Tensor | None = None,
    terminated: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    price = _wide(logprobs) if ref_logprobs is None else _wide(logprobs) - _wide(ref_logprobs)
    paid = _wide(rewards) - alpha * price
    flags = (terminated, truncated, bootstrap_values, mask, cu_seqlens)
    n = span if span is not None else max(rewards.shape[-1], 1)
    found = _n_step(paid, values, gamma, n, False, last_values, *flags)
    counts = torch.ones_like(found, dtype=torch.bool) if mask is None else mask.bool()
    return torch.where(counts, found - _wide(values), 0.0)


def _pair(x: Pair) -> tuple[torch.Tensor, ...]:
    return tuple(_wide(q) for q in x) if isinstance(x, tuple) else (_wide(x),)


def _lower(values: Iterable[torch.Tensor]) -> torch.Tensor:
    found = list(values)
    return found[0] if len(found) == 1 else torch.minimum(found[0], found[1])


def _by_row(rows: Sequence[torch.Tensor], like: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    wide = _wide(like)[..., 0] if like.shape[-1] else _wide(like).sum(-1)
    found = torch.stack(list(rows)) if rows else wide.reshape(-1)
    return found.reshape(wide.shape)


@torch.no_grad()
def max_q_values(q: Pair, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    return _chosen(_pair(q), None, mask)


@torch.no_grad()
def double_q_values(q_online: Pair, q_target: Pair, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    return _chosen(_pair(q_online), _pair(q_target), mask)


def _chosen(
    online: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...] | None, mask: torch.Tensor | None
) -> torch.Tensor:
    shape, vocab = online[0].shape[:-1], online[0].shape[-1]
    score = _lower(online).reshape(shape.numel(), vocab)
    values = score if target is None else _lower(target).reshape(shape.numel(), vocab)
    counts = None if mask is None else mask.reshape(-1)
    out = score.new_zeros(len(score))
    for i, row in enumerate(score):
        if counts is not None and not counts[i]:
            continue
        if row.isnan().any():
            out[i] = float("nan")
        elif vocab == 0 or row.max() == float("-inf"):
            out[i] = float("-inf")
        else:
            first = min(j for j in range(vocab) if row[j] == row.max())
            out[i] = values[i, first]
    return out.reshape(shape)


@torch.no_grad()
def expected_q_values(
    q: torch.Tensor, logits: torch.Tensor, *, temperature: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    shape = q.shape[:-1]
    z = _wide(logits).reshape(shape.numel(), q.shape[-1]) / temperature
    wide = _wide(q).reshape(shape.numel(), q.shape[-1])
    out = wide.new_zeros(len(wide))
    for i in range(len(wide)):
        if mask is not None and not mask.reshape(-1)[i]:
            continue
        if z.shape[1] == 0 or bool((z[i] == float("-inf")).all()):
            out[i] = float("-inf")
            continue
        p = torch.softmax(z[i], 0)
        out[i] = torch.where(p == 0, 0.0, p * wide[i]).sum()
    return out.reshape(shape)


def soft_values(
    q: torch.Tensor,
    *,
    alpha: float,
    prior_logprobs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    wide = _wide(q)
    z = wide / alpha if prior_logprobs is None else wide / alpha + _wide(prior_logprobs)
    counts = torch.ones_like(wide[..., :1], dtype=torch.bool) if mask is None else mask.bool().unsqueeze(-1)
    z = torch.where(counts, z, 0.0)
    return torch.where(counts.squeeze(-1), alpha * torch.logsumexp(z, -1), 0.0)


def guided_logits(
    logits: torch.Tensor, q: Pair, values: torch.Tensor | None = None, *, beta: float
) -> torch.Tensor:
    lowest, z = _lower(_pair(q)), _wide(logits)
    advantage = lowest if values is None else lowest - _wide(values).unsqueeze(-1)
    forbidden = (z == float("-inf")) | (lowest == float("-inf"))
    return torch.where(forbidden, float("-inf"), z + beta * advantage).detach()


@torch.no_grad()
def polyak_update(
    target: torch.nn.Module | Iterable[torch.Tensor],
    online: torch.nn.Module | Iterable[torch.Tensor],
    *,
    tau: float,
) -> None:
    modules = isinstance(target, torch.nn.Module) and isinstance(online, torch.nn.Module)
    old = list(target.parameters() if isinstance(target, torch.nn.Module) else target)
    new = list(online.parameters() if isinstance(online, torch.nn.Module) else online)
    for mine, yours in zip(old, new, strict=True):
        mine.copy_(yours if tau == 1 else mine + tau * (yours - mine))
    if modules:
        assert isinstance(target, torch.nn.Module)
        assert isinstance(online, torch.nn.Module)
        for mine, yours in zip(target.buffers(), online.buffers(), strict=True):
            mine.copy_(yours)


def cql_logprobs(q: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """q_a / alpha - logsumexp(q / alpha): the log-probability of the token under the softmax of q."""
    found = token_logprobs(q, token_ids, temperature=alpha, mask=mask)
    assert isinstance(found, torch.Tensor)
    return found
