"""Estimators and the clipped loss beside the libraries of the field; the limit is a stream of the same bytes.

A contestant's first result is held against ours before it is timed; bench/frameworks.py says how each is called.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import react_fast as rf

from . import roofline
from .bench_advantage import SHAPES, _mask
from .common import LIMIT, OURS, built, race, stream
from .frameworks import GAE, GAMMA, LAM, SURROGATE, verl_gae_whiten


def _equal(
    expected: torch.Tensor, where: torch.Tensor | None = None, tied: float = 0.0, most: float = 1e-3
) -> Callable[[str, Any], None]:
    """Apart at most `most` of the largest number; by default float32 on both sides over thousands of steps.

    `tied`: the share of elements that may differ, since a rounding decides on which side of a bound they are.
    """
    scale = float(expected.abs().max())

    def check(name: str, result: Any) -> None:
        first = result[0] if isinstance(result, tuple) else result
        found = first if isinstance(first, torch.Tensor) else torch.as_tensor(np.array(first))
        found = found.reshape(expected.shape)
        apart = (found - expected).abs() / scale
        apart = apart if where is None else apart[where]
        wrong = float((~(apart < most)).double().mean())
        assert wrong <= tied, f"{name} is {float(apart.max()):.1e} apart, in {wrong:.1e} of its numbers"

    return check


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae(benchmark, shape):
    """No mask and no end inside a row: what everyone has. `out=`: SB3's buffer keeps its results as well."""
    rewards, values = torch.randn(shape), torch.randn(shape)
    out = torch.empty(shape), torch.empty(shape)
    contestants, absent = built(GAE, rewards, values)
    ours = {
        OURS: lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM),
        "react_fast, out=": lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, out=out),
        LIMIT: stream([rewards, values], list(out)),
    }
    race(
        benchmark, {**ours, **contestants}, case=f"gae {list(shape)} float32", absent=absent, rounds=9,
        limit="stream of reward, value, advantage, return", work=roofline.gae(rewards.numel()),
        check=_equal(rf.gae(rewards, values, gamma=GAMMA, lam=LAM)[0]),
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae_whiten(benchmark, shape):
    """Prompt, tool reply and padding masked: of the peers only verl steps over them."""
    rewards, values, mask = torch.randn(shape), torch.randn(shape), _mask(shape)
    whitened = lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, whiten=True)  # noqa: E731
    peers, absent = built({"verl": verl_gae_whiten}, rewards, values, mask)
    scratch = [torch.empty(shape) for _ in range(3)]
    traffic = stream([rewards, values, mask, scratch[0], mask], scratch)
    race(
        benchmark, {OURS: whitened, LIMIT: traffic, **peers}, absent=absent, rounds=9,
        case=f"gae with mask, whiten {list(shape)} float32",
        limit="stream: gae's, and the advantages once more", work=roofline.gae_whitened(rewards.numel()),
        check=_equal(whitened()[0], mask),
    )  # fmt: skip


def test_group_advantages(benchmark):
    """Rewards of 100,000 responses in random order, about 16 to a prompt; verl's loop and its vectorised form."""
    rewards, ids = torch.rand(100_000), torch.randint(6250, (100_000,))

    def verl(name: str) -> Callable[[], Any]:
        from verl.trainer.ppo import core_algos

        mask, index = torch.ones(100_000, 1), ids.numpy()
        return lambda: getattr(core_algos, name)(rewards[:, None], mask, index)[0]

    names = {"verl": "grpo", "verl vectorised": "grpo_vectorized"}
    peers, absent = built({k: lambda v=v: verl(f"compute_{v}_outcome_advantage") for k, v in names.items()})
    ours = lambda: rf.group_advantages(rewards, ids, eps=1e-6, singleton="raw")  # noqa: E731
    race(
        benchmark, {OURS: ours, LIMIT: stream([rewards, ids], [torch.empty(100_000)]), **peers},
        case="group_advantages [100000], random ids", limit="stream of reward, id, advantage", absent=absent,
        rounds=9, work=roofline.group_advantages(100_000), check=_equal(ours()),
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy_loss(benchmark, shape):
    """PPO's clip with a dual clip, no KL, forward and backward; everyone's gradient held against ours."""
    logp = (-3 * torch.rand(shape)).requires_grad_()
    old, A = logp.detach() + 0.2 * torch.randn(shape), torch.randn(shape[0])
    mask, spread = torch.ones(shape, dtype=torch.bool), A[:, None].expand(shape).contiguous()
    objective = rf.PPOClip(0.8, 1.2, dual_clip=3.0)
    ours = lambda: torch.autograd.grad(rf.policy_loss(logp, old, A, mask, objective=objective).loss, logp)[0]  # noqa: E731
    peers, absent = built(SURROGATE, logp, old, spread, mask)
    traffic = stream([logp.detach(), old, mask], [torch.empty(shape)])
    race(
        benchmark, {OURS: ours, LIMIT: traffic, **peers}, absent=absent, rounds=9,
        case=f"policy_loss, PPO clip {list(shape)} float32 forward + backward",
        limit="stream read of logprobs, old and mask, write of the gradient",
        work=roofline.policy_loss(logp.numel(), streams=2),
        check=_equal(ours(), tied=1e-5),
    )  # fmt: skip
