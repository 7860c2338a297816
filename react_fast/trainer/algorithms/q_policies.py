"""What Q-learning needs beside its loss: Q as a head, policies that follow it, replay and the target network."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...ops.target_network import TargetUpdate
from ..output_layer import OutputLayer
from ..rollout import PolicyEngine, Sample, SamplingParams, Trajectory, key

# A stream of random numbers of its own: which trajectories are replayed.
_REPLAY = 10


class Logits(nn.Module):
    """The policy's own output layer as a head: its logits are Q, so that the trained model is a plain one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._linear = (model.get_output_embeddings(),)  # in a tuple: its weights are the model's

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear[0](hidden)


class SteeredEngine:
    """The policy, with other logits wherever it chooses a token.

    Args:
        engine: of the policy.  output: its output layer.
        steer: (hidden states [..., D], logits [..., V], params) -> the logits to choose from.
    """

    def __init__(
        self,
        engine: PolicyEngine,
        output: OutputLayer,
        steer: Callable[[torch.Tensor, torch.Tensor, SamplingParams], torch.Tensor],
    ) -> None:
        self.engine, self.output, self.steer = engine, output, steer

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        def steered(module: nn.Module, args: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
            return self.steer(args[0], logits, params)

        handle = self.output.linear.register_forward_hook(steered)
        try:
            return self.engine.generate(prompts, params)
        finally:
            handle.remove()


def epsilon_greedy(q: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Log-probabilities [..., V]: the best token, and with probability epsilon any one."""
    p = torch.full_like(q, epsilon / q.shape[-1])
    best = q.argmax(-1, keepdim=True)
    return p.scatter_add(-1, best, torch.full_like(best, 1 - epsilon, dtype=q.dtype)).log()


class Memory:
    """The newest trajectories, drawn from with equal probability, and the target network.

    Args:
        trainer: whose policy is copied.  capacity: trajectories.
        every, tau: training steps between updates of the target network, and how far it then goes.
    """

    def __init__(self, trainer: Any, *, capacity: int, every: int, tau: float) -> None:
        self.trainer, self.capacity = trainer, capacity
        self.trajectories: list[Trajectory] = []
        self.target = copy.deepcopy(trainer.policy).eval().requires_grad_(False)
        self._moves = TargetUpdate(self.target, trainer.policy, every=every, tau=tau)

    def replay(self, fresh: Sequence[Trajectory]) -> list[Trajectory]:
        """Keep the fresh ones; return as many of all that are kept, each at most once."""
        self.trajectories = [*self.trajectories, *fresh][-self.capacity :]
        draw = np.random.default_rng(key(self.trainer.config.seed, _REPLAY, self.trainer.step))
        count = min(len(fresh), len(self.trajectories))
        chosen = draw.choice(len(self.trajectories), size=count, replace=False)
        return [self.trajectories[i] for i in sorted(chosen.tolist())]

    def after_update(self) -> None:
        self._moves.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "trajectories": [dict(vars(one)) for one in self.trajectories],
            "target": self.target.state_dict(),
            "moves": self._moves.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trajectories = [Trajectory(**one) for one in state["trajectories"]]
        self.target.load_state_dict(state["target"])
        self._moves.load_state_dict(state["moves"])
