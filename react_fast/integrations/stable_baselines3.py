"""Stable-Baselines3: advantages and returns of PPO's and A2C's rollout buffers.

`patch("stable_baselines3")` replaces the method for every buffer; `PPO(..., rollout_buffer_class=RolloutBuffer)`
with the class from here does it for one. The same numbers, bit for bit where gamma and lambda are Python floats.
Of a PPO step it is under one percent.

`PrioritizedReplayBuffer` is a `replay_buffer_class` for DQN, with `alpha`, `beta`, `eps`, `n_steps` and `gamma` in
`replay_buffer_kwargs`; `PrioritizedDictReplayBuffer` the same for dictionaries of observations. The `DQN` from
here weights its loss and reports TD errors. Stable-Baselines3's own algorithms take the buffer but do neither:
priorities stay equal, and every transition is as likely as another.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import _core
from ..ops.backend import DTYPE
from .points import Case, Integration, Point
from .stable_baselines3_replay import PrioritizedDQN, PrioritizedReplay

Tensor = torch.Tensor


def advantages_into(buffer: Any, last_values: Tensor, dones: np.ndarray) -> None:
    """Fills a rollout buffer's `advantages` and `returns` [n_steps, n_envs] float32.

    Args:
        buffer: with rewards, values and episode_starts [n_steps, n_envs], gamma and gae_lambda. episode_starts[t]
            says that step t is an episode's first, so that step t - 1 was the end of one.
        last_values: [n_envs] or [n_envs, 1], value behind the last step. dones: [n_envs], whether it was an end.
    Raises: ValueError for another number of last values or ends than environments.
    """
    steps, envs = buffer.rewards.shape
    ends = np.empty((steps, envs), dtype=bool)
    np.not_equal(buffer.episode_starts[1:], 0, out=ends[:-1])
    ends[-1] = dones
    last = last_values.detach().cpu().numpy().astype(np.float32).reshape(envs)
    given = np.ascontiguousarray(buffer.rewards), np.ascontiguousarray(buffer.values), last, ends
    buffer.advantages = np.ascontiguousarray(buffer.advantages)  # filled in place, as Stable-Baselines3 does
    buffer.returns = np.empty_like(buffer.advantages)
    _core.gae_by_time(  # type: ignore[call-arg]
        *(x.ctypes.data for x in given), envs, steps, DTYPE[torch.float32], float(buffer.gamma),
        float(buffer.gamma * buffer.gae_lambda), buffer.advantages.ctypes.data, buffer.returns.ctypes.data,
        torch.get_num_threads(),
    )  # fmt: skip


def _covered(buffer: Any) -> bool:
    """Whether the core may read and write the arrays: it looks at addresses alone."""
    shape = buffer.rewards.shape
    floats = buffer.rewards, buffer.values, buffer.advantages
    return (
        len(shape) == 2
        and all(x.dtype == np.float32 and x.shape == shape for x in floats)
        and buffer.episode_starts.shape == shape
        and buffer.advantages.flags.writeable
    )


def method(original: Callable[..., None]) -> Callable[..., None]:
    def compute_returns_and_advantage(self: Any, last_values: Tensor, dones: np.ndarray) -> None:
        (advantages_into if _covered(self) else original)(self, last_values, dones)

    return compute_returns_and_advantage


def _cases(device: torch.device) -> list[Case]:
    """Five steps of three environments; numpy, so on the CPU alone."""
    if device.type != "cpu":
        return []

    def run(lam: float) -> Any:
        def run(function: Any) -> dict[str, Tensor]:
            from gymnasium import spaces
            from stable_baselines3.common.buffers import RolloutBuffer as Theirs

            space = spaces.Box(-1, 1, (1,))
            buffer = Theirs(5, space, space, device="cpu", gae_lambda=lam, gamma=0.9, n_envs=3)
            numbers = np.random.Generator(np.random.Philox(0))
            buffer.rewards[:], buffer.values[:] = numbers.normal(size=(2, 5, 3))
            buffer.episode_starts[:] = [[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
            last = torch.tensor([[0.5], [-1.0], [2.0]])
            function(buffer, last, np.array([False, True, False]))
            return {name: torch.from_numpy(getattr(buffer, name)) for name in ("advantages", "returns")}

        return run

    return [Case("lambda 0.8", run(0.8)), Case("lambda 1", run(1.0)), Case("lambda 0", run(0.0))]


INTEGRATION = Integration(
    package="stable_baselines3",
    distribution="stable-baselines3",
    at_least=(2, 4),
    below=(3, 0),
    points=(
        Point(
            "stable_baselines3.common.buffers.RolloutBuffer.compute_returns_and_advantage", "808493f76721", method,
            _cases, "gae", aliases=False,
        ),
    ),
)  # fmt: skip


class _Rollout:
    """Advantages and returns from `advantages_into`."""

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        if _covered(self):
            return advantages_into(self, last_values, dones)
        return super().compute_returns_and_advantage(last_values, dones)  # type: ignore[misc]


# Name here: (module, name there, what is mixed in).
_CLASSES: dict[str, tuple[str, str, type]] = {
    "DQN": ("dqn", "DQN", PrioritizedDQN),
    "DictRolloutBuffer": ("common.buffers", "DictRolloutBuffer", _Rollout),
    "PrioritizedDictReplayBuffer": ("common.buffers", "DictReplayBuffer", PrioritizedReplay),
    "PrioritizedReplayBuffer": ("common.buffers", "ReplayBuffer", PrioritizedReplay),
    "RolloutBuffer": ("common.buffers", "RolloutBuffer", _Rollout),
}


def __getattr__(name: str) -> Any:
    """The classes above, once Stable-Baselines3 is there to derive them from."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base, mixed = _CLASSES[name]
    theirs = getattr(importlib.import_module(f"stable_baselines3.{module}"), base)
    made = type(name, (mixed, theirs), {"__module__": __name__, "__doc__": mixed.__doc__})
    globals()[name] = made  # one class, so that a saved algorithm finds it again
    return made
