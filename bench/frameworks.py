"""Advantages and losses of other libraries, each called as it calls them itself.

A builder prepares what its library keeps between calls (layouts, buffers, compiled functions), so that a call is
the computation alone; it raises ImportError where the library is not installed.
    GAE        builder(rewards, values [B, T]) -> op() -> advantages; no mask, zero behind the last step
    SURROGATE  builder(logp, old, advantages, mask [B, T]) -> op() -> gradient of PPO's clip, mean over tokens
"""

import ast
import importlib.util
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tensor = torch.Tensor
GAMMA, LAM, CLIP = 0.99, 0.95, 0.2


def openrlhf(**wanted: str) -> Any:
    """Functions and classes by the file that defines them, with torch and each other and nothing else.

    The package's modules import deepspeed, flash_attn and vllm; what is compared uses none of them.
    """
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        raise ImportError("openrlhf is not installed: make parity")
    root = Path(package.submodule_search_locations[0])
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "List": list}
    names |= {"Optional": typing.Optional, "Tuple": tuple, "Union": typing.Union}
    for name, file in wanted.items():
        tree = ast.parse((root / file).read_text())
        found: list[Any] = [
            n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name
        ]
        exec(compile(ast.Module(found[:1], []), file, "exec"), names)
    return types.SimpleNamespace(**{name: names[name] for name in wanted})


def openrlhf_gae(rewards: Tensor, values: Tensor) -> Callable[[], Tensor]:
    maker = openrlhf(get_advantages_and_returns="trainer/ppo_utils/experience_maker.py")
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return lambda: maker.get_advantages_and_returns(None, values, rewards, mask, GAMMA, LAM)[0]


def _torchrl(name: str) -> Callable[[Tensor, Tensor], Callable[[], Tensor]]:
    def build(rewards: Tensor, values: Tensor) -> Callable[[], Tensor]:
        from torchrl.objectives.value import functional

        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        columns = [x[..., None] for x in (values, after, rewards, done, done)]
        return lambda: getattr(functional, name)(GAMMA, LAM, *columns)[0][..., 0]

    return build


def sb3_gae(rewards: Tensor, values: Tensor) -> Callable[[], Tensor]:
    """RolloutBuffer, which holds [T, B] in numpy."""
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    box = spaces.Box(-1, 1, (1,))
    rows, length = rewards.shape
    buffer = RolloutBuffer(length, box, box, device="cpu", gae_lambda=LAM, gamma=GAMMA, n_envs=rows)
    buffer.rewards, buffer.values = (np.ascontiguousarray(x.T.numpy()) for x in (rewards, values))
    last, ended = torch.zeros(rows), np.ones(rows)

    def op() -> Tensor:
        buffer.compute_returns_and_advantage(last, ended)
        return torch.as_tensor(buffer.advantages).T

    return op


def tianshou_gae(rewards: Tensor, values: Tensor) -> Callable[[], Tensor]:
    """Numba over the episodes in one flat array."""
    from tianshou.algorithm import algorithm_base

    gae: Any = algorithm_base._gae

    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    ended = torch.zeros_like(rewards, dtype=torch.bool)
    ended[:, -1] = True
    arrays: list[Any] = [x.flatten().numpy() for x in (values, after, rewards, ended)]
    return lambda: torch.as_tensor(gae(*arrays, GAMMA, LAM)).view(rewards.shape)


def rlax_gae(rewards: Tensor, values: Tensor) -> Callable[[], Any]:
    """vmap over rows under jit; the arrays are JAX's already."""
    import jax
    import rlax

    rows, length = rewards.shape
    function = jax.jit(jax.vmap(rlax.truncated_generalized_advantage_estimation, in_axes=(0, 0, None, 0)))
    states = torch.cat([values, values.new_zeros(rows, 1)], 1)
    arrays = jax.device_put((rewards.numpy(), torch.full((rows, length), GAMMA).numpy(), LAM, states.numpy()))
    return lambda: function(*arrays).block_until_ready()


GAE: dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]] = {
    "OpenRLHF": openrlhf_gae,
    "torchrl": _torchrl("generalized_advantage_estimate"),
    "torchrl vec": _torchrl("vec_generalized_advantage_estimate"),
    "SB3": sb3_gae,
    "Tianshou": tianshou_gae,
    "rlax jit": rlax_gae,
}


def verl_gae_whiten(rewards: Tensor, values: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """verl keeps its mask in int64 and always whitens."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    counts = mask.long()
    return lambda: compute_gae_advantage_return(rewards, values, counts, GAMMA, LAM)[0]


def verl_surrogate(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """loss_mode "vanilla", whose dual clip at 3 cannot be left out."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config.actor import ActorConfig

    vanilla: Any = core_algos.compute_policy_loss_vanilla
    config, counts = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True), mask.long()

    def op() -> Tensor:
        loss = vanilla(old, logp, advantages, counts, "token-mean", config)[0]
        return torch.autograd.grad(loss, logp)[0]

    return op


def openrlhf_surrogate(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    file = "models/loss.py"
    theirs = openrlhf(masked_mean="models/utils.py", aggregate_loss=file, PolicyLoss=file)
    loss, counts = theirs.PolicyLoss(CLIP, CLIP, 3.0), mask.long()
    return lambda: torch.autograd.grad(loss(logp, old, advantages, counts)[0], logp)[0]


def rlax_surrogate(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Callable[[], Any]:
    """The loss of one sequence, without a mask: a plain mean, no dual clip."""
    import jax
    import jax.numpy as jnp
    import rlax

    def loss(x: Any, old: Any, advantages: Any) -> Any:
        return rlax.clipped_surrogate_pg_loss(jnp.exp(x - old), advantages, CLIP)

    function = jax.jit(jax.grad(loss))
    arrays = jax.device_put(tuple(x.detach().flatten().numpy() for x in (logp, old, advantages)))
    return lambda: function(*arrays).block_until_ready()


SURROGATE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Callable[[], Any]]] = {
    "verl": verl_surrogate,
    "OpenRLHF": openrlhf_surrogate,
    "rlax jit": rlax_surrogate,
}
