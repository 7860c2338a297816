"""Advantages as the papers name them: thin compositions of the ops, torch or numpy in and out.

Each gives what its paper's equation says; where a framework of that name computes something else, its docstring
says what and which argument reproduces it. Rewards are outcomes, [N] one for each response, unless said otherwise;
`group_ids` [N] says which responses answer the same prompt. NaN rewards and those with `valid` false are left out
and get 0. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import _check
from ._arrays import numpy_too
from .advantage import discounted_returns, gae, reverse_linear_scan, td_lambda_returns
from .backend import accumulation_dtype
from .group_advantages import group_advantages
from .whiten import whiten

Tensor = torch.Tensor
Maybe = torch.Tensor | None


@numpy_too
def grpo(rewards: Tensor, group_ids: Tensor, *, eps: float = 1e-4, valid: Maybe = None) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) of the group, std with n - 1.

    Source: Shao et al. 2024 (arXiv:2402.03300). TRL: eps 1e-4; verl: 1e-6, and a group of one keeps its raw
        reward; OpenRLHF: 1e-9.
    """
    return group_advantages(rewards, group_ids, eps=eps, valid=valid)


@numpy_too
def grpo_batch_std(rewards: Tensor, group_ids: Tensor, *, eps: float = 1e-4, valid: Maybe = None) -> Tensor:
    """A_i = (r_i - mean of the group) / (std of the batch + eps): easy and hard prompts keep their weight.

    Source: Liu et al. 2025 (arXiv:2508.08221), "Lite PPO"; TRL's scale_rewards="batch", whose batch is that of all
        processes: gather the rewards first.
    """
    return group_advantages(rewards, group_ids, scale="batch_std", eps=eps, valid=valid)


@numpy_too
def dr_grpo(rewards: Tensor, group_ids: Tensor, *, valid: Maybe = None) -> Tensor:
    """A_i = r_i - mean of the group.

    Its other half is the loss: aggregation "token_sum_norm" by a constant. Source: Liu et al. 2025
        (arXiv:2503.20783).
    """
    return group_advantages(rewards, group_ids, scale="none", valid=valid)


@numpy_too
def rloo(rewards: Tensor, group_ids: Tensor, *, valid: Maybe = None) -> Tensor:
    """A_i = r_i - mean of the others in the group.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740). A group of one gets 0; verl's loop gives the
        raw reward, its vectorised twin 0, OpenRLHF 0/0.
    """
    return group_advantages(rewards, group_ids, baseline="leave_one_out", scale="none", valid=valid)


@numpy_too
def remax(rewards: Tensor, greedy_rewards: Tensor, *, valid: Maybe = None) -> Tensor:
    """A_i = r_i - b_i, b the reward [N] of the greedy response to the same prompt.

    Source: Li et al. 2023 (arXiv:2310.10505).
    """
    everyone = torch.zeros(
        _check.floating("rewards", rewards).shape, dtype=torch.int64, device=rewards.device
    )
    return group_advantages(
        rewards, everyone, baseline="given", baselines=greedy_rewards, scale="none", valid=valid
    )


@numpy_too
def opo(rewards: Tensor, group_ids: Tensor, lengths: Tensor, *, valid: Maybe = None) -> Tensor:
    """A_i = r_i - sum_j l_j r_j / sum_j l_j of the group: the variance-optimal baseline when a response's squared
    gradient grows with its length l [N] (integers, in tokens).

    Source: Hao et al. 2025 (arXiv:2505.23585), eq. 8. verl keeps the raw reward of a group of one.
    """
    return group_advantages(
        rewards, group_ids, baseline="length_weighted", lengths=lengths, scale="none", valid=valid
    )


@numpy_too
def reinforce_pp(
    rewards: Tensor, *, gamma: float = 1.0, mask: Maybe = None, cu_seqlens: Maybe = None, group: Any = None
) -> Tensor:
    """Whitened returns of token rewards [B, T] or packed [N], the KL penalty among them.

        G_t = r_t + gamma G_{t+1}      A = (G - mean) / sqrt(var + 1e-8) over all counting tokens of the batch

    `group`: a process group, over whose ranks the batch extends. Source: Hu 2025 (arXiv:2501.03262). OpenRLHF and
        NeMo-RL divide the variance by n (`whiten`'s ddof=0); verl resets the return at masked tokens.
    """
    returns = discounted_returns(rewards, gamma=gamma, mask=mask, cu_seqlens=cu_seqlens)
    return whiten(returns, mask=mask, group=group)


@numpy_too
def reinforce_pp_baseline(
    rewards: Tensor, group_ids: Tensor, mask: Tensor, *, cu_seqlens: Maybe = None, valid: Maybe = None,
    group: Any = None,
) -> Tensor:  # fmt: skip
    """r_i - mean of the group for every token of response i, whitened over the batch's counting tokens.

    `mask` [N, T], or [tokens] with `cu_seqlens` [N + 1]; the result is like it.
    Source: Hu 2025 (arXiv:2501.03262), group sampling; verl, OpenRLHF, slime and NeMo-RL alike, but for `whiten`'s
        ddof.
    """
    relative = group_advantages(rewards, group_ids, scale="none", valid=valid)
    if cu_seqlens is None:
        if mask.dim() != 2 or len(mask) != len(rewards):
            raise ValueError(f"mask must be [{len(rewards)}, T] like rewards, got {list(mask.shape)}")
        spread = relative[:, None].expand(mask.shape)
    else:
        lengths = _check.integer("cu_seqlens", cu_seqlens).diff()
        _check.shape("cu_seqlens", cu_seqlens, (len(rewards) + 1,), "rewards and one more")
        spread = relative.repeat_interleave(lengths, output_size=len(mask))
    return whiten(spread, mask=mask, group=group)


@numpy_too
def gdpo(
    rewards: Tensor, group_ids: Tensor, *, weights: Sequence[float] | None = None, eps: float = 1e-4,
    valid: Maybe = None, group: Any = None,
) -> Tensor:  # fmt: skip
    """Several rewards [N, K] for each response: normalised in its group one by one, summed, whitened.

        a_ik = (r_ik - mean_k) / (std_k + eps) of the group      s_i = sum_k w_k a_ik      A = whiten(s)

    Summing first would let one reward of wide spread drown the others. weights [K], all 1 by default. A NaN reward
    is left out alone: its response keeps the others. Source: Liu et al. 2026 (arXiv:2601.05242).
    """
    if _check.floating("rewards", rewards).dim() != 2:
        raise ValueError(f"rewards must be [N, K], got {list(rewards.shape)}")
    w = [1.0] * rewards.shape[1] if weights is None else [float(x) for x in weights]
    if len(w) != rewards.shape[1]:
        raise ValueError(f"weights must be [{rewards.shape[1]}] like a row of rewards, got [{len(w)}]")
    total = rewards.new_zeros(len(rewards), dtype=accumulation_dtype(rewards.dtype))
    for k, weight in enumerate(w):
        total = total + weight * group_advantages(rewards[:, k], group_ids, eps=eps, valid=valid)
    counting = ~rewards.isnan().all(1)
    return whiten(total, mask=counting if valid is None else counting & (valid != 0), group=group)


class _Groups:
    """Valid members sorted by (group, reward); everything at its sorted place, [N]."""

    def __init__(self, rewards: Tensor, group_ids: Tensor, valid: Maybe) -> None:
        _check.floating("rewards", rewards)
        if rewards.dim() != 1:
            raise ValueError(f"rewards must be [N], got {list(rewards.shape)}")
        _check.integer("group_ids", group_ids)
        _check.shape("group_ids", group_ids, rewards.shape, "rewards")
        _check.device("group_ids", group_ids, rewards.device, "rewards")
        self.dtype = accumulation_dtype(rewards.dtype)
        out = rewards.isnan()
        if valid is not None:
            out = out | ~_check.mask("valid", valid, rewards.shape, "rewards", rewards.device)
        r = torch.where(out, 0.0, rewards.detach().double())
        order = r.argsort(stable=True)
        for key in (group_ids, out.to(torch.int8)):
            order = order[key[order].argsort(stable=True)]
        self.order, self.rewards, self.counts = order, r[order], ~out[order]
        place = torch.arange(len(r), device=r.device)
        ids = group_ids[order]
        edge = torch.ones(len(r) + 1, dtype=torch.bool, device=r.device)
        if len(r) > 1:
            edge[1:-1] = (ids[1:] != ids[:-1]) | (self.counts[1:] != self.counts[:-1])
        self.first = edge[:-1]
        self.start = torch.where(self.first, place, 0).cummax(0)[0] if len(r) else place
        last = torch.where(edge[1:], place, len(r))
        self.end = last.flip(0).cummin(0)[0].flip(0) if len(r) else place
        self.rank, self.size = place - self.start, self.end - self.start + 1

    def sums(self, x: Tensor) -> Tensor:
        """Of integers, over each member's group."""
        running = x.cumsum(0)
        return running[self.end] - running[self.start] + x[self.start]

    def back(self, x: Tensor) -> Tensor:
        x = torch.where(self.counts, x, 0.0).to(self.dtype)
        return torch.zeros_like(x).scatter(0, self.order, x)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of n over k, 0 <= k <= n."""
    n, k = n.double(), k.double()
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _choose_ratio(a: Tensor, b: Tensor, n: Tensor, k: Tensor) -> Tensor:
    """(a over b) / (n over k); 0 where b > a or k > n."""
    some = (b <= a) & (k <= n) & (b >= 0)
    zero = torch.zeros_like(n)
    upper = _log_choose(torch.where(some, a, zero), torch.where(some, b, zero))
    return torch.where(
        some, (upper - _log_choose(torch.where(some, n, zero), torch.where(some, k, zero))).exp(), 0.0
    )


def _whole(k: Any, low: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < low:
        raise ValueError(f"k must be a whole number of at least {low}, got {k!r}")
    return k


def _above_others(groups: _Groups, k: Tensor) -> Tensor:
    """sum_{j < i} (j over k-2) / (n over k) (g_i - g_j), g rising.

    As a prefix sum of rises, so that equal rewards get equal numbers and a flat group exactly 0.
    """
    g = groups.rewards
    rise = torch.where(groups.first, 0.0, g - g.roll(1)) if len(g) else g
    b = _choose_ratio(groups.rank, k - 1, groups.size, k) * rise
    # Sorted rewards: each group's sums restart at its first member.
    keep = torch.where(groups.first, 0.0, 1.0).to(b.dtype)
    return reverse_linear_scan(keep.flip(0)[None], b.flip(0)[None])[0].flip(0)


@numpy_too
def max_at_k(rewards: Tensor, group_ids: Tensor, k: int, *, valid: Maybe = None) -> Tensor:
    """PKPO: unbiased gradient weights for the expected best of k samples, from groups of n >= k.

        A_i = 1 / (n over k) sum_{I of size k, i in I} (max_I r - max_{I without i} r)

    for 0/1 rewards that is pass@k. The estimate of the gradient is sum_i A_i grad log p_i: where the loss takes a
    mean over the group, multiply by n. k at least 2 (k = 1 is `rloo` / n); smaller groups get 0.
    Source: Walder & Karkhanis 2025 (arXiv:2505.15201), the leave-one-out-minus-one baseline.
    """
    groups = _Groups(rewards, group_ids, valid)
    return groups.back(_above_others(groups, torch.full_like(groups.rank, _whole(k, 2))))


@numpy_too
def best_of_n(rewards: Tensor, group_ids: Tensor, *, valid: Maybe = None) -> Tensor:
    """The best response gets its distance to the second best, the others 0; `max_at_k` for k = n.

    Source: Tang et al. 2025 (arXiv:2503.19595); verl's grpo_passk, which divides by std + 1e-6 unless told not to.
    """
    groups = _Groups(rewards, group_ids, valid)
    return groups.back(torch.where(groups.size > 1, _above_others(groups, groups.size), 0.0))


@numpy_too
def pass_at_k(rewards: Tensor, group_ids: Tensor, k: int, *, valid: Maybe = None) -> Tensor:
    """Pass@k training: the advantage of being in a random set of k of the group's n, analytically.

        R = 1 - (n_wrong over k) / (n over k)      s = sqrt(R (1 - R))
        right: (1 - R) / s      wrong: (1 - R - (n_wrong-1 over k-1) / (n-1 over k-1)) / s

    rewards count as right above 0. s = 0, or fewer than k responses: 0. Unlike `max_at_k`, which has the unbiased
    gradient, wrong answers are pushed down and groups scaled by their spread.
    Source: Chen et al. 2025 (arXiv:2508.10751), section 2.3.
    """
    groups = _Groups(rewards, group_ids, valid)
    right = groups.rewards > 0
    ks, n = torch.full_like(groups.rank, _whole(k, 1)), groups.size
    wrong = n - groups.sums(right.to(torch.int64))
    fails = _choose_ratio(wrong, ks, n, ks)  # 1 - R
    spread = (fails * (1 - fails)).sqrt()
    with_wrong = _choose_ratio(wrong - 1, ks - 1, n - 1, ks - 1)
    found = fails - torch.where(right, 0.0, with_wrong)
    # Without a wrong set, or without a right answer, nothing is better than anything.
    some = (wrong >= ks) & (wrong < n) & (n >= ks)
    return groups.back(torch.where(some, found / torch.where(some, spread, 1.0), 0.0))


@numpy_too
def length_adaptive_lam(lengths: Tensor, *, alpha: float = 0.05) -> Tensor:
    """lam [B] = 1 - 1 / (alpha l), at least 0, of lengths l [B]: the weights lam^t add up to alpha l.

    Goes into `gae` as lam. Source: VAPO, Yue et al. 2025 (arXiv:2504.05118), eq. 9.
    """
    alpha = _check.number("alpha", alpha, low=0.0, low_open=True)
    return (1.0 - 1.0 / (alpha * _check.integer("lengths", lengths).double().clamp_min(1))).clamp_min(0.0)


@numpy_too
def vapo(
    rewards: Tensor, values: Tensor, *, gamma: float = 1.0, alpha: float = 0.05, lam_value: float = 1.0,
    mask: Maybe = None, cu_seqlens: Maybe = None, **ends: Maybe,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, returns): GAE with a length-adaptive lam for the policy, TD(lam_value) returns for the critic.

    A row's length is the number of its counting steps. `ends`: last_values, terminated, truncated,
    bootstrap_values as in `gae`. Source: Yue et al. 2025 (arXiv:2504.05118); Yuan et al. 2025 (arXiv:2503.01491)
        for decoupling.
    """
    lengths = _row_lengths(_check.floating("rewards", rewards), mask, cu_seqlens)
    common = {"gamma": gamma, "mask": mask, "cu_seqlens": cu_seqlens, **ends}
    advantages, _ = gae(rewards, values, lam=length_adaptive_lam(lengths, alpha=alpha), **common)
    return advantages, td_lambda_returns(rewards, values, lam=lam_value, **common)


def _row_lengths(x: Tensor, mask: Maybe, cu_seqlens: Maybe) -> Tensor:
    counts = torch.ones_like(x, dtype=torch.int64) if mask is None else (mask != 0).to(torch.int64)
    if cu_seqlens is None:
        return counts.sum(-1)
    running = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return running[cu_seqlens.long()].diff()


@numpy_too
def turn_gae(
    rewards: Tensor, values: Tensor, turns: Tensor, *, gamma: float, lam: float | Tensor, mask: Maybe = None,
    cu_seqlens: Maybe = None, equal_turns: bool = False, **ends: Maybe,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """GAE over the turns of an agent; a turn's tokens inherit its advantage.

        delta_k = r_k + gamma V_{k+1} - V_k      A_k = delta_k + gamma lam A_{k+1}      A_t = A_{turn of t}

    gamma and lam count turns, not tokens: a long answer or a long tool reply discounts nothing.

    Args:
        rewards, values: [B, K] one for each turn, or packed [M] with `cu_seqlens` [B + 1]; mask, ends: see `gae`.
        turns: [B, T] integers, the turn of each token, negative for tokens of none (prompt, tool, padding);
            packed: [N], places in [M].
        equal_turns: each token gets A_k / (tokens of the turn), so that in a sum over tokens every turn weighs the
            same; otherwise a turn weighs as much as it is long.
    Returns: (advantages like turns, turn advantages, turn returns).
    Source: Zhou et al. 2024, ArCHer (arXiv:2402.19446) for turns as actions; GAE: arXiv:1506.02438. verl and TRL
        let the discount run over tokens.
    """
    per_turn, returns = gae(
        rewards, values, gamma=gamma, lam=lam, mask=mask, cu_seqlens=cu_seqlens, **ends
    )  # fmt: skip
    _check.integer("turns", turns)
    _check.device("turns", turns, rewards.device, "rewards")
    if turns.dim() != rewards.dim() or (rewards.dim() == 2 and len(turns) != len(rewards)):
        raise ValueError(f"turns must be [{len(rewards)}, T] or packed [N], got {list(turns.shape)}")
    count = per_turn.shape[-1]
    looked_at = turns.device.type == "cpu" and not torch.compiler.is_compiling() and turns.numel() > 0
    if looked_at and int(turns.max()) >= count:
        raise ValueError(f"turns must be below {count}, got {int(turns.max())}")
    # One more turn, of no advantage, for the tokens of none.
    where = torch.where(turns < 0, count, turns.long())
    if equal_turns:
        tokens = torch.zeros(*per_turn.shape[:-1], count + 1, dtype=torch.int64, device=turns.device)
        tokens = tokens.scatter_add(-1, where, torch.ones_like(where))[..., :count]
        shared = per_turn / tokens.clamp_min(1)
    else:
        shared = per_turn
    return torch.nn.functional.pad(shared, (0, 1)).gather(-1, where), per_turn, returns
