"""Prioritised replay for Stable-Baselines3, as mix-ins over its buffers and its DQN; see `stable_baselines3`."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from ..ops import _check
from ..ops.sum_tree import SumTree


class PrioritizedSamples(NamedTuple):
    """What Stable-Baselines3's buffers return, and two columns more.

    Attributes:
        weights: [B, 1] float32, importance weights (least P / P(i))^beta, at most 1.
        indices: [B] int64 numpy, for `update_priorities`.
    """

    observations: Any
    actions: torch.Tensor
    next_observations: Any
    dones: torch.Tensor
    rewards: torch.Tensor
    discounts: torch.Tensor | None
    weights: torch.Tensor
    indices: np.ndarray


class PrioritizedReplay:
    """Transitions drawn with P(i) in proportion to (|TD error| + eps)^alpha; new ones with the largest so far.

    An entry is a step of one environment, number step * n_envs + environment. Random numbers are numpy's global
    ones, which Stable-Baselines3 seeds.

    Args:
        alpha: 0 draws uniformly. beta: exponent of the weights at first; it goes to 1 with `progress` in [0, 1],
            which our DQN sets. eps: > 0, so that every transition can be drawn again.
        n_steps, gamma: rewards of n steps, the last one's next observation and, for n_steps > 1, gamma to the
            power of the steps, as Stable-Baselines3's NStepReplayBuffer; not with optimize_memory_usage.
    Source: Schaul et al. 2016 (arXiv:1511.05952), proportional variant, algorithm 1.
    """

    # Of Stable-Baselines3's buffer, the other base.
    buffer_size: int
    n_envs: int
    pos: int
    full: bool
    optimize_memory_usage: bool
    observations: Any
    next_observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    timeouts: np.ndarray
    to_torch: Any
    _normalize_obs: Any
    _normalize_reward: Any

    def __init__(
        self, *args: Any, alpha: float = 0.6, beta: float = 0.4, eps: float = 1e-6, n_steps: int = 1,
        gamma: float = 0.99, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        self.alpha = _check.number("alpha", alpha, low=0.0)
        self.beta = _check.number("beta", beta, low=0.0, high=1.0)
        self.eps = _check.number("eps", eps, low=0.0, low_open=True)
        self.gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
        if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
            raise ValueError(f"n_steps must be an int >= 1, got {n_steps!r}")
        if n_steps > 1 and self.optimize_memory_usage:
            raise ValueError("n_steps > 1 needs next observations: optimize_memory_usage must be False")
        self.n_steps, self.progress = n_steps, 0.0
        self.tree, self._most = SumTree(self.buffer_size * self.n_envs), 1.0

    def add(self, *args: Any, **options: Any) -> None:
        written = self.pos
        super().add(*args, **options)  # type: ignore[misc]
        self._set_step(written, self._most)
        if self.optimize_memory_usage and self.full:  # its observation is now the written step's next one
            self._set_step(self.pos, 0.0)

    def _set_step(self, step: int, priority: float) -> None:
        entries = np.arange(step * self.n_envs, (step + 1) * self.n_envs)
        self.tree.update(entries, np.full(self.n_envs, priority))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.tree, self._most = SumTree(len(self.tree)), 1.0

    def sample(self, batch_size: int, env: Any = None) -> PrioritizedSamples:
        """[batch_size] transitions, one from each stratum of equal probability.

        Raises: ValueError for a buffer that is empty.
        """
        indices, priorities = self.tree.sample(np.random.random_sample(batch_size))
        beta = self.beta + (1 - self.beta) * self.progress
        weights = (self.tree.least / priorities[:, None]) ** beta
        steps, envs = np.divmod(indices, self.n_envs)
        columns = *self._transitions(steps, envs, env), self.to_torch(weights.astype(np.float32)), indices
        return PrioritizedSamples(*columns)

    def update_priorities(self, indices: np.ndarray, td_errors: torch.Tensor | np.ndarray) -> None:
        """Priorities of entries that were drawn, from their new TD errors [B] or [B, 1]; the sign does not matter.

        Raises: ValueError for errors that are not finite, and for indices outside the buffer.
        """
        if self.optimize_memory_usage:
            live = indices // self.n_envs != self.pos
            indices, td_errors = indices[live], td_errors[live]
        errors = torch.as_tensor(td_errors).detach().flatten().to("cpu", torch.float64).numpy()
        priorities = (np.abs(errors) + self.eps) ** self.alpha
        self.tree.update(indices, priorities)
        self._most = max(self._most, float(priorities.max(initial=0.0)))

    def _transitions(self, steps: np.ndarray, envs: np.ndarray, env: Any) -> tuple[Any, ...]:
        """Observations, actions, next observations, dones, rewards and, of several steps, discounts."""
        newest, last = (self.pos - 1) % self.buffer_size, steps
        on = np.ones(len(steps), dtype=bool)
        rewards = np.zeros(len(steps), dtype=np.float32)
        discounts = np.ones(len(steps), dtype=np.float32)
        for ahead in range(self.n_steps):
            at = (steps + ahead) % self.buffer_size
            last = np.where(on, at, last)
            rewards += on * discounts * self._normalize_reward(self.rewards[at, envs], env)
            discounts = np.where(on, np.float32(self.gamma) * discounts, discounts)
            on &= (self.dones[at, envs] == 0) & (self.timeouts[at, envs] == 0) & (at != newest)
        ended = self.dones[last, envs] * (1 - self.timeouts[last, envs])
        after = self.observations if self.optimize_memory_usage else self.next_observations
        return (
            self._tensors(self._rows(self.observations, steps, envs), env),
            self.to_torch(self.actions[steps, envs]),
            self._tensors(
                self._rows(after, (last + self.optimize_memory_usage) % self.buffer_size, envs), env
            ),
            self.to_torch(ended[:, None]),
            self.to_torch(rewards[:, None]),
            self.to_torch(discounts[:, None]) if self.n_steps > 1 else None,
        )

    @staticmethod
    def _rows(stored: Any, steps: np.ndarray, envs: np.ndarray) -> Any:
        if isinstance(stored, dict):
            return {name: x[steps, envs] for name, x in stored.items()}
        return stored[steps, envs]

    def _tensors(self, rows: Any, env: Any) -> Any:
        normal = self._normalize_obs(rows, env)
        if isinstance(normal, dict):
            return {name: self.to_torch(x) for name, x in normal.items()}
        return self.to_torch(normal)


class PrioritizedDQN:
    """DQN that weights its loss by the buffer's importance weights and reports TD errors to it.

    The loss is Stable-Baselines3's Huber loss, mean of w_i huber(delta_i); beta goes to 1 over `learn`. Without a
    `replay_buffer_class` the buffer is ours, and `n_steps` is passed on to it.
    """

    # Of Stable-Baselines3's DQN, the other base.
    policy: Any
    q_net: Any
    q_net_target: Any
    replay_buffer: Any
    replay_buffer_class: Any
    replay_buffer_kwargs: dict[str, Any]
    n_steps: int
    gamma: float
    max_grad_norm: float
    logger: Any
    _n_updates: int
    _current_progress_remaining: float
    _vec_normalize_env: Any
    observation_space: Any

    def _setup_model(self) -> None:
        if self.replay_buffer_class is None:
            self.replay_buffer_class = self._default_buffer()
            own = {"n_steps": getattr(self, "n_steps", 1), "gamma": self.gamma}
            self.replay_buffer_kwargs = own | self.replay_buffer_kwargs
        with warnings.catch_warnings():
            if "n_steps" in self.replay_buffer_kwargs:
                warnings.filterwarnings("ignore", ".*is ignored because a custom `replay_buffer_class`")
            super()._setup_model()  # type: ignore[misc]
        if not isinstance(self.replay_buffer, PrioritizedReplay):
            found = type(self.replay_buffer).__name__
            raise TypeError(f"replay_buffer_class must be a prioritised one, got {found}")

    def _default_buffer(self) -> Any:
        from gymnasium import spaces

        from . import stable_baselines3 as doors

        if isinstance(self.observation_space, spaces.Dict):
            return doors.PrioritizedDictReplayBuffer
        return doors.PrioritizedReplayBuffer

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)  # type: ignore[attr-defined]
        self.replay_buffer.progress = 1.0 - self._current_progress_remaining
        losses = [self._gradient_step(batch_size) for _ in range(gradient_steps)]
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", float(np.mean(losses)))

    def _gradient_step(self, batch_size: int) -> float:
        batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
        discounts = self.gamma if batch.discounts is None else batch.discounts
        with torch.no_grad():
            after = self.q_net_target(batch.next_observations).amax(1, keepdim=True)
            targets = batch.rewards + (1 - batch.dones) * discounts * after
        values = self.q_net(batch.observations).gather(1, batch.actions.long())
        loss = (batch.weights * F.smooth_l1_loss(values, targets, reduction="none")).mean()
        self.policy.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        self.replay_buffer.update_priorities(batch.indices, (targets - values).detach())
        return loss.item()
