"""Q-learning on tokens, online: every token is an action, its logit is its Q, and the greedy policy is the model's
own greedy decoding."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...ops.q_learning import double_q_values, n_step_returns, soft_values
from ...ops.q_loss import q_loss
from ..batch import Batch
from ..scoring import Scores
from .base import Algorithm, Loss
from .loss_options import check_count, check_numbers
from .q_policies import Logits, Memory, SteeredEngine, epsilon_greedy


@dataclass(frozen=True, kw_only=True)
class QLearning(Algorithm):
    """What the forms of Q-learning share; they differ in the value V of a state and in how they explore.

        y_t = r_t + gamma r_{t+1} + ... + gamma^n V_{t+n},    loss = 1/n sum_t Huber(Q(s_t, a_t) - y_t)

    t counts action tokens; behind the end of an episode V is 0, behind a truncated one the last state's. Every
    step trains on trajectories drawn from memory. Q of all tokens is held, [B, T, V]: for small vocabularies.

    Args:
        gamma: discount per action token, in [0, 1].  n: tokens until the value is trusted.
        huber: where the loss becomes linear, above 0.
        capacity: newest trajectories kept.  target_every, target_tau: training steps between updates of the target
            network and how far each goes; 1 and 0.05 is Polyak's average.
    """

    copies: ClassVar[int] = 1
    gamma: float = 1.0
    n: int = 1
    huber: float = 1.0
    capacity: int = 1024
    target_every: int = 1
    target_tau: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(self, "gamma", "target_tau", low=0.0, high=1.0)
        check_numbers(self, "huber", low=0.0, low_open=True)
        check_count(self, "n", "capacity", "target_every")

    def check(self, config: Any) -> None:
        super().check(config)
        if config.credit != "uniform" or config.sharded or config.kl_coef or config.entropy_coef:
            raise ValueError(
                f"{type(self).__name__} learns values: trainer.credit must be 'uniform', sharded false, "
                "kl_coef and entropy_coef 0"
            )

    def heads(self, model: Any) -> dict[str, nn.Module]:
        linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {"q": nn.Identity() if linear is None else Logits(model)}  # the scorer says what a model lacks

    def memory(self, trainer: Any) -> Memory:
        return Memory(trainer, capacity=self.capacity, every=self.target_every, tau=self.target_tau)

    def remembers(self, config: Any) -> bool:
        return True

    def values(
        self, config: Any, online: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """[B, T-1] of the states in which the tokens were taken, from both networks' Q [B, T-1, V]."""
        raise NotImplementedError

    def score(self, trainer: Any, batch: Batch) -> None:
        batch.returns = self._targets(trainer, batch)
        batch.heads = {}

    def _targets(self, trainer: Any, batch: Batch) -> torch.Tensor:
        whole = batch.with_one_more_token()
        known = whole.mask.clone()
        known.scatter_(1, (whole.lengths - 2)[:, None], True)  # the state behind a row's last token, too
        online = trainer.scores(whole).heads["q"]
        target = trainer.scores(whole, trainer.memory.target).heads["q"]
        values = self.values(trainer.config, online, target, known).to(batch.step_rewards.dtype)
        last = values.gather(1, (whole.lengths - 2)[:, None]).squeeze(1)
        truncated = torch.zeros_like(last, dtype=torch.bool) if batch.truncated is None else batch.truncated
        return n_step_returns(
            batch.step_rewards,
            values[:, : batch.mask.shape[1]],
            gamma=self.gamma,
            n=self.n,
            last_values=torch.where(truncated, last, 0.0),
            mask=batch.mask,
        )

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return torch.zeros_like(batch.rewards)

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        assert part.returns is not None, "scoring comes before update"
        taken = scores.heads["q"].gather(2, part.targets[..., None]).squeeze(2)
        count = denominator.clamp_min(1).to(part.returns.dtype)
        return q_loss(taken, part.returns, part.mask, huber=self.huber, denominator=count)


@dataclass(frozen=True, kw_only=True)
class TokenDQN(QLearning):
    """Double DQN: V(s) = Q_target(s, argmax_a Q(s, a)); it explores epsilon-greedily.

    Args:
        epsilon, epsilon_end: chance of a random token in the first step, and after `epsilon_share` of all steps.
        gamma, n, huber, capacity, target_every, target_tau: see `QLearning`.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Mnih et al. 2015; van Hasselt et al. 2016 (arXiv:1509.06461).
    """

    epsilon: float = 1.0
    epsilon_end: float = 0.05
    epsilon_share: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self, "epsilon", "epsilon_end", "epsilon_share", low=0.0, high=1.0)
        super().__post_init__()

    def engine(self, trainer: Any) -> SteeredEngine:
        def explore(hidden: torch.Tensor, q: torch.Tensor, params: Any) -> torch.Tensor:
            if params.greedy:
                return q
            chances = epsilon_greedy(q.float(), self.exploration(trainer.step, trainer.config.steps))
            return chances * params.temperature  # which the engine divides by

        return SteeredEngine(trainer.policy_engine, trainer.policy.output, explore)

    def exploration(self, step: int, steps: int) -> float:
        """Epsilon of a training step, counted from 0."""
        done = min(step / max(self.epsilon_share * steps, 1e-9), 1.0)
        return self.epsilon + done * (self.epsilon_end - self.epsilon)

    def values(
        self, config: Any, online: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return double_q_values(online, target, mask=mask)


@dataclass(frozen=True, kw_only=True)
class SoftQ(QLearning):
    """Soft Q-learning: V(s) = alpha log sum_a exp(Q_target(s, a) / alpha), and the policy is softmax(Q / alpha):
    the model sampled at temperature alpha, which is trainer.temperature.

    Args:
        gamma, n, huber, capacity, target_every, target_tau: see `QLearning`.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Haarnoja et al. 2017 (arXiv:1702.08165); on language models: Guo et al. 2021 (arXiv:2106.07704).
    """

    def values(
        self, config: Any, online: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return soft_values(target, alpha=config.temperature, mask=mask)
