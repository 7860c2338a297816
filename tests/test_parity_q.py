"""The same tensors through other libraries' Q-learning; where a definition differs, what reproduces it.

Float64 on both sides; 1e-12 is some thousand roundings. Retrace is in test_parity_estimators.py.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import react_fast as rf

from .peers import jax64, peer

B, T, VOCAB = 4, 19, 11
GAMMA = 31 / 32  # exact in float32, in which torchrl keeps its numbers


def _close(found, expected):
    expected = expected if isinstance(expected, torch.Tensor) else torch.as_tensor(np.array(expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _transitions():
    """rewards, terminated [N]; taken tokens [N]; Q of s and of s' by two networks [N, V]."""
    n = B * T
    tables = [torch.randn(n, VOCAB, dtype=torch.float64) for _ in range(3)]
    return torch.randn(n, dtype=torch.float64), torch.rand(n) < 0.2, torch.randint(VOCAB, (n,)), *tables


@pytest.mark.parametrize("n", [1, 3, 40])
def test_rlax_n_step(n):
    """Its v_t is the value behind step t, its discount 0 where the episode ends."""
    jax, rlax = jax64(), peer("rlax")
    rewards, values = torch.randn(2, B, T, dtype=torch.float64)
    last, terminated = torch.randn(B, dtype=torch.float64), torch.rand(B, T) < 0.1
    after = torch.cat([values[:, 1:], last[:, None]], 1)
    discounts = GAMMA * (~terminated).double()
    each = jax.vmap(lambda r, d, v: rlax.n_step_bootstrapped_returns(r, d, v, n))
    expected = each(*(x.numpy() for x in (rewards, discounts, after)))
    _close(
        rf.n_step_returns(rewards, values, gamma=GAMMA, n=n, last_values=last, terminated=terminated),
        expected,
    )
    _close(rf.q_targets(rewards, after, gamma=GAMMA, n=n, terminated=terminated), expected)


@pytest.mark.parametrize("kind", ["q_learning", "double_q_learning", "expected_sarsa"])
def test_rlax_td_errors(kind):
    """A transition a row, in any order; n = 1."""
    jax, rlax = jax64(), peer("rlax")
    rewards, terminated, tokens, q, online, target = _transitions()
    logits = torch.randn_like(q)
    further, values = {
        "q_learning": ((target,), lambda: rf.max_q_values(target)),
        "double_q_learning": ((target, online), lambda: rf.double_q_values(online, target)),
        "expected_sarsa": ((target, logits.softmax(-1)), lambda: rf.expected_q_values(target, logits)),
    }[kind]
    discounts = GAMMA * (~terminated).double()
    given = (q, tokens, rewards, discounts, *further)
    expected = jax.vmap(getattr(rlax, kind))(*(x.numpy() for x in given))
    targets = rf.q_targets(rewards[:, None], values()[:, None], gamma=GAMMA, terminated=terminated[:, None])[
        :, 0
    ]
    taken = q.gather(1, tokens[:, None])[:, 0]
    _close(targets - taken, expected)
    loss = rf.q_loss(taken, targets, torch.ones_like(terminated), huber=0.7).loss
    _close(loss, np.mean(rlax.huber_loss(expected, 0.7)))


def _table(network):
    """A Q network of torchrl that returns rows of a table [states, V]."""
    modules = peer("torchrl.modules")
    return modules.QValueActor(
        network,
        in_keys=["observation"],
        spec=peer("torchrl.data").Categorical(VOCAB),
        action_space="categorical",
    )


class _Rows(nn.Module):
    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(q.clone())

    def forward(self, state):
        return self.q[state[..., 0].long()]


def _batch(rewards, terminated, tokens):
    """torchrl's transitions: state i moves to state N + i."""
    n, tensordict = len(rewards), peer("tensordict").TensorDict
    ends = {"terminated": terminated[:, None], "done": terminated[:, None]}
    state = torch.arange(n)[:, None]
    after = {"observation": n + state, "reward": rewards[:, None], **ends}
    return tensordict({"observation": state, "action": tokens, "next": after}, [n])


@pytest.mark.parametrize("double", [False, True])
def test_torchrl_dqn(double):
    """Its squared loss is the mean of e^2, twice ours; loss and gradient of the online table."""
    objectives = peer("torchrl.objectives")
    rewards, terminated, tokens, q, online, target = _transitions()
    module = objectives.DQNLoss(
        _table(_Rows(torch.cat([q, online]))), loss_function="l2", delay_value=True, double_dqn=double,
        action_space="categorical",
    )  # fmt: skip
    module.make_value_estimator(gamma=GAMMA)
    table = module.value_network_params["module", "0", "module", "q"]
    module.target_value_network_params["module", "0", "module", "q"].data.copy_(torch.cat([q, target]))
    theirs = module(_batch(rewards, terminated, tokens))["loss"]
    (expected,) = torch.autograd.grad(theirs, table)
    leaf = q.clone().requires_grad_()
    values = rf.double_q_values(online, target) if double else rf.max_q_values(target)
    targets = rf.q_targets(rewards[:, None], values[:, None], gamma=GAMMA, terminated=terminated[:, None])[
        :, 0
    ]
    taken = leaf.gather(1, tokens[:, None])[:, 0]
    loss = 2 * rf.q_loss(taken, targets, torch.ones_like(terminated)).loss
    _close(loss, theirs)
    _close(torch.autograd.grad(loss, leaf)[0], expected[: len(q)])


def test_torchrl_discrete_cql():
    """Its conservative term has alpha 1 and is added by the caller."""
    objectives = peer("torchrl.objectives")
    rewards, terminated, tokens, q, online, _ = _transitions()
    module = objectives.DiscreteCQLLoss(_table(_Rows(torch.cat([q, online]))), action_space="categorical")
    module.make_value_estimator(gamma=GAMMA)
    theirs = module(_batch(rewards, terminated, tokens))
    _close(rf.cql_loss(q, tokens, torch.ones_like(terminated)), theirs["loss_cql"].detach())
    targets = rf.q_targets(
        rewards[:, None], rf.max_q_values(online)[:, None], gamma=GAMMA, terminated=terminated[:, None]
    )[:, 0]
    taken = q.gather(1, tokens[:, None])[:, 0]
    _close(rf.q_loss(taken, targets, torch.ones_like(terminated)).loss, theirs["loss_qvalue"].detach())


@pytest.mark.parametrize("tau", [0.5, 0.75])
def test_torchrl_expectile(tau):
    objectives = peer("torchrl.objectives")
    values, targets = torch.randn(2, B, T, dtype=torch.float64)
    expected = objectives.IQLLoss.loss_value_diff(targets - values, tau).mean()
    _close(rf.expectile_loss(values, targets, torch.ones(B, T).bool(), tau=tau).loss, expected)


def test_polyak_of_torchrl_and_sb3():
    """SB3 scales and adds, torchrl interpolates: equal to rounding."""
    objectives, utils = peer("torchrl.objectives"), peer("stable_baselines3.common.utils")
    online = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    targets = [copy.deepcopy(online) for _ in range(2)]
    module = objectives.DQNLoss(
        _table(_Rows(torch.randn(4, VOCAB, dtype=torch.float64))),
        delay_value=True,
        action_space="categorical",
    )
    table = module.value_network_params["module", "0", "module", "q"]
    theirs = module.target_value_network_params["module", "0", "module", "q"]
    updater = objectives.SoftUpdate(module, tau=0.1)  # copies once
    with torch.no_grad():
        for parameter in (*online.parameters(), table):
            parameter.add_(torch.randn_like(parameter))
    ours = theirs.detach().clone()
    for _ in range(3):
        utils.polyak_update(online.parameters(), targets[0].parameters(), 0.1)
        rf.polyak_update(targets[1], online, tau=0.1)
        rf.polyak_update([ours], [table.detach()], tau=0.1)
        updater.step()
    for mine, other in zip(targets[1].parameters(), targets[0].parameters(), strict=True):
        _close(mine.detach(), other.detach())
    _close(ours, theirs.detach())
