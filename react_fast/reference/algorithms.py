"""The algorithms' equations, for the trainer in plain loops: one sequence after another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from . import objectives
from .advantage import discounted_returns, gae, whiten
from .group_advantages import group_advantages
from .kl_rewards import kl_rewards
from .policy_loss import policy_loss, value_loss

Loss = tuple[torch.Tensor, Mapping[str, Any]]


def _row(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[None]


# ---- rewards and advantages --------------------------------------------------------------------------------


def _step_rewards(trainer: Any, one: Any) -> torch.Tensor:
    """r_t - kl_coef (log p - log p_ref)_t where the KL is paid in rewards."""
    if one.ref_logprobs is None or not trainer.algorithm.kl_in_reward:
        return one.step_rewards
    rows = [x[None] for x in (one.step_rewards, one.old_logprobs, one.ref_logprobs, one.mask)]
    return kl_rewards(*rows, kl_coef=trainer.config.kl_coef)[0][0]


def _rewards(trainer: Any, batch: list[Any]) -> torch.Tensor:
    """[N]: of whole responses."""
    totals = [one.reward + float((_step_rewards(trainer, one) - one.step_rewards).sum()) for one in batch]
    return torch.tensor(totals, dtype=batch[0].step_rewards.dtype)


def _long_rewards(trainer: Any, batch: list[Any]) -> torch.Tensor:
    """DAPO's: less up to 1 in the last overlong_buffer tokens."""
    rewards = _rewards(trainer, batch)
    buffer, longest = trainer.algorithm.overlong_buffer, trainer.config.max_new_tokens
    for i, one in enumerate(batch):
        if buffer:
            rewards[i] -= min(max((int(one.mask.sum()) - (longest - buffer)) / buffer, 0.0), 1.0)
    return rewards


def _groups(batch: list[Any]) -> torch.Tensor:
    return torch.tensor([one.group for one in batch])


def _spread(batch: list[Any], values: torch.Tensor) -> list[torch.Tensor]:
    return [value.expand(len(one.mask)) for one, value in zip(batch, values, strict=True)]


def _whitened(batch: list[Any], advantages: list[torch.Tensor]) -> list[torch.Tensor]:
    """Over the actions of the whole batch."""
    whole = whiten(torch.cat(advantages), mask=torch.cat([one.mask for one in batch]))
    return list(whole.split([len(one.mask) for one in batch]))


def _returns(trainer: Any, one: Any) -> torch.Tensor:
    gamma = trainer.algorithm.gamma
    return discounted_returns(_step_rewards(trainer, one)[None], gamma=gamma, mask=one.mask[None])[0]


def _ones(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    return [torch.ones(len(one.mask)) for one in batch]


def _group_relative(
    trainer: Any, batch: list[Any], rewards: Callable[..., torch.Tensor] = _rewards
) -> list[torch.Tensor]:
    a = trainer.algorithm
    options = {"baseline": a.baseline, "scale": a.scale, "eps": a.eps}
    return _spread(batch, group_advantages(rewards(trainer, batch), _groups(batch), **options))


def _dapo(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    return _group_relative(trainer, batch, _long_rewards)


def _drop_equal_groups(trainer: Any, batch: list[Any]) -> None:
    rewards = _long_rewards(trainer, batch).tolist()
    for one in batch:
        group = [r for other, r in zip(batch, rewards, strict=True) if other.group == one.group]
        if min(group) == max(group):
            one.mask = torch.zeros_like(one.mask)


def _reinforce(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    algorithm, rewards, found = trainer.algorithm, _rewards(trainer, batch).tolist(), []
    for i, one in enumerate(batch):
        returns = _returns(trainer, one)
        others = [
            rewards[j]
            for j, other in enumerate(batch)
            if j != i and (algorithm.baseline == "batch" or other.group == one.group)
        ]
        if algorithm.baseline != "none":
            returns = returns - (sum(others) / len(others) if others else rewards[i])
        found.append(torch.where(one.mask, returns, 0.0))
    return _whitened(batch, found) if algorithm.whiten else found


def _rloo(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    rewards, groups, found = _rewards(trainer, batch).tolist(), [one.group for one in batch], []
    for i, one in enumerate(batch):
        others = [r for j, r in enumerate(rewards) if j != i and groups[j] == groups[i]]
        level = sum(others) / len(others) if others else rewards[i]
        found.append(torch.full((len(one.mask),), rewards[i] - level, dtype=one.step_rewards.dtype))
    return found


def _reinforce_pp(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    return _whitened(batch, [_returns(trainer, one) for one in batch])


def _reinforce_pp_baseline(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    relative = group_advantages(_rewards(trainer, batch), _groups(batch), scale="none")
    return _whitened(batch, _spread(batch, relative))


def _critic(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    algorithm, found = trainer.algorithm, []
    for one in batch:
        last = torch.tensor([one.last_value], dtype=one.step_rewards.dtype)
        rows = [x[None] for x in (_step_rewards(trainer, one), one.values)]
        options = {"gamma": algorithm.gamma, "lam": algorithm.lam, "last_values": last}
        advantages, returns = gae(*rows, mask=one.mask[None], **options)
        one.returns = returns[0]
        found.append(advantages[0])
    return _whitened(batch, found) if algorithm.whiten else found


def _preferences(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    signs: list[float] = []
    for better, worse in zip(batch[0::2], batch[1::2], strict=True):
        sign = float(better.reward > worse.reward) - float(better.reward < worse.reward)
        signs += [sign, -sign]
    return [torch.full((len(one.mask),), s) for one, s in zip(batch, signs, strict=True)]


# ---- losses ------------------------------------------------------------------------------------------------


def _sft_loss(trainer: Any, part: list[Any], now: list[Any], denominator: float) -> Loss:
    (one,), (seen,) = part, now
    tokens = one.mask.sum()
    entropy = seen.entropy.detach().sum() / max(int(tokens), 1)
    return -seen.logprobs.sum() / denominator, {"tokens": tokens, "entropy": entropy}


OBJECTIVES: dict[str, Callable[[Any], Any]] = {
    "REINFORCE": lambda a: objectives.Reinforce(),
    "A2C": lambda a: objectives.Reinforce(),
    "GSPO": lambda a: objectives.GSPO(ratio_min=a.ratio_min, ratio_max=a.ratio_max),
    "CISPO": lambda a: objectives.CISPO(ratio_min=a.ratio_min, ratio_max=a.ratio_max),
    "GMPO": lambda a: objectives.GMPO(ratio_min=a.ratio_min, ratio_max=a.ratio_max),
    "SAPO": lambda a: objectives.SAPO(tau_pos=a.tau_pos, tau_neg=a.tau_neg),
}


def _ppo_clip(a: Any) -> Any:
    return objectives.PPOClip(ratio_min=a.ratio_min, ratio_max=a.ratio_max)


def _policy_gradient(trainer: Any, part: list[Any], now: list[Any], denominator: float) -> Loss:
    algorithm, config = trainer.algorithm, trainer.config
    (one,), (seen,) = part, now
    assert one.advantages is not None
    return policy_loss(
        seen.logprobs[None],
        _row(one.old_logprobs),
        one.advantages[None],
        one.mask[None],
        objective=OBJECTIVES.get(type(algorithm).__name__, _ppo_clip)(algorithm),
        aggregation=algorithm.aggregation,
        ref_logprobs=_row(one.ref_logprobs),
        importance=_row(one.importance),
        kl_coef=0.0 if algorithm.kl_in_reward else config.kl_coef,
        kl_estimator=algorithm.kl_estimator,
        kl_gradient=algorithm.kl_gradient,
        entropy=seen.entropy[None],
        entropy_coef=config.entropy_coef,
        denominator=float(denominator),
    )


def _critic_loss(trainer: Any, part: list[Any], now: list[Any], denominator: float) -> Loss:
    algorithm, (one,), (seen,) = trainer.algorithm, part, now
    policy, metrics = _policy_gradient(trainer, part, now, denominator)
    rows = [x[None] for x in (seen.values, one.values, one.returns, one.mask)]
    value = value_loss(*rows, clip=algorithm.value_clip, denominator=float(denominator))
    tokens = max(int(one.mask.sum()), 1)
    own = {
        "value/mean": seen.values.detach()[one.mask].sum() / tokens,
        "value/loss": value.detach() * denominator / tokens,
    }
    return policy + algorithm.value_coef * value, {**metrics, **own}


PREFERENCE_LOSSES: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "sigmoid": lambda h, beta, e: (
        (1 - e) * torch.log1p(torch.exp(-beta * h)) + e * torch.log1p(torch.exp(beta * h))
    ),
    "ipo": lambda h, beta, e: (h - 0.5 / beta) ** 2,
    "hinge": lambda h, beta, e: torch.relu(1 - beta * h),
}


def _preference_loss(trainer: Any, part: list[Any], now: list[Any], denominator: float) -> Loss:
    algorithm = trainer.algorithm
    moved = [x.logprobs.sum() - one.ref_logprobs.sum() for one, x in zip(part, now, strict=True)]
    h = moved[0] - moved[1]
    counts = _pair_counts(part)
    loss = PREFERENCE_LOSSES[algorithm.loss_type](h, algorithm.beta, algorithm.label_smoothing)
    tokens = sum(int(one.mask.sum()) for one in part)
    entropy = sum(float(x.entropy.detach().sum()) for x in now) / max(tokens, 1)
    return loss * counts / denominator, {
        "rewards/chosen": algorithm.beta * moved[0].detach(),
        "rewards/rejected": algorithm.beta * moved[1].detach(),
        "rewards/margins": algorithm.beta * h.detach(),
        "rewards/accuracies": float(h > 0),
        "logps/chosen": now[0].logprobs.detach().sum(),
        "logps/rejected": now[1].logprobs.detach().sum(),
        "entropy": entropy,
        "tokens": tokens,
    }


# ---- what is counted, chosen and compared ------------------------------------------------------------------


def _tokens(part: Sequence[Any]) -> int:
    return sum(int(one.mask.sum()) for one in part)


def _pair_counts(part: Sequence[Any]) -> int:
    pairs = zip(part[0::2], part[1::2], strict=True)
    return sum(float(a.preference) != 0 and bool(a.mask.any()) and bool(b.mask.any()) for a, b in pairs)


def _aggregated(trainer: Any, batch: list[Any]) -> int:
    """What `policy_loss`'s aggregation divides by."""
    aggregation = getattr(trainer.algorithm, "aggregation", "token_mean")
    if aggregation == "token_mean":
        return _tokens(batch)
    longest = trainer.config.max_new_tokens if aggregation == "token_sum_norm" else 1
    return longest * sum(bool(one.mask.any()) for one in batch)


def _best_and_worst(trajectories: Sequence[Any]) -> list[Any]:
    edges = [i for i, one in enumerate(trajectories) if i == 0 or one.group != trajectories[i - 1].group]
    chosen = []
    for start, end in pairwise([*edges, len(trajectories)]):
        best, worst = start, start
        for i in range(start, end):
            reward = sum(trajectories[i].rewards)
            best = i if reward > sum(trajectories[best].rewards) else best
            worst = i if reward <= sum(trajectories[worst].rewards) else worst
        chosen += [trajectories[best], trajectories[worst]]
    return chosen


@dataclass(frozen=True)
class Rule:
    """What differs between algorithms.

    Attributes:
        advantages(trainer, batch): [L - 1] of every sequence.
        loss(trainer, part, now, denominator): of `together` sequences, with what the policy says of them now.
        denominator(trainer, batch): of an update.  weight(part): what metrics are means over.
        select(trajectories): what is trained on.  score(trainer, batch): changes the batch.
        answers(record): what a supervised algorithm learns, with rewards.
        compares: it always needs the reference policy.  critic: it has a value head.
    """

    advantages: Callable[[Any, list[Any]], list[torch.Tensor]]
    loss: Callable[[Any, list[Any], list[Any], float], Loss] = _policy_gradient
    denominator: Callable[[Any, list[Any]], int] = _aggregated
    weight: Callable[[Sequence[Any]], int] = _tokens
    select: Callable[[Sequence[Any]], list[Any]] = list
    score: Callable[[Any, list[Any]], None] = lambda trainer, batch: None
    answers: Callable[[Any], list[tuple[str, float]]] = lambda record: [(record.reference, 0.0)]
    together: int = 1
    compares: bool = False
    critic: bool = False


_PREFERENCES = Rule(
    _preferences,
    _preference_loss,
    denominator=lambda trainer, batch: _pair_counts(batch),
    weight=_pair_counts,
    together=2,
    compares=True,
)
_CRITIC = Rule(_critic, _critic_loss, critic=True)
_GROUP = Rule(_group_relative)

RULES: dict[str, Rule] = {
    "SFT": Rule(_ones, _sft_loss),
    "REINFORCE": Rule(_reinforce),
    "A2C": _CRITIC,
    "PPO": _CRITIC,
    "GRPO": _GROUP,
    "DAPO": Rule(_dapo, score=_drop_equal_groups),
    "DrGRPO": _GROUP,
    "GSPO": _GROUP,
    "CISPO": _GROUP,
    "GMPO": _GROUP,
    "SAPO": _GROUP,
    "RLOO": Rule(_rloo),
    "ReinforcePlusPlus": Rule(_reinforce_pp),
    "ReinforcePlusPlusBaseline": Rule(_reinforce_pp_baseline),
    "DPO": replace(
        _PREFERENCES, answers=lambda record: [(record.reference, 1.0), (record.metadata["rejected"], 0.0)]
    ),
    "OnlineDPO": replace(_PREFERENCES, select=_best_and_worst),
}
