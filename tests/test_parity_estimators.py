"""The same tensors through other libraries' estimators; where a definition differs, what reproduces it.

Float64 on both sides unless said otherwise; 1e-12 is some thousand roundings.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import react_fast as rf

from .peers import jax64, openrlhf, peer

B, T, GAMMA, LAM = 4, 19, 0.97, 0.9
# verl divides its means by n + 1e-8, torchrl keeps its discounts in float32.
VERL, TORCHRL = 1e-8, 5e-6


def _steps(*names):
    return [torch.randn(B, T, dtype=torch.float64) for _ in names]


def _answers():
    """Right padding."""
    return torch.arange(T) < torch.tensor([T, 12, 7, 1])[:, None]


def _with_tool(mask):
    mask = mask.clone()
    mask[:2, 4:7] = False
    return mask


def _close(found, expected, tolerance=1e-12):
    expected = expected if isinstance(expected, torch.Tensor) else torch.as_tensor(np.array(expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---- language-model trainers ---------------------------------------------------------------------------------


def test_verl_gae():
    """Gaps are stepped over alike. verl whitens unasked, and leaves -mean / std where nothing counts."""
    verl = peer("verl.trainer.ppo.core_algos")
    rewards, values = _steps("rewards", "values")
    mask = _with_tool(_answers())
    found, returns = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, whiten=True)
    theirs, their_returns = verl.compute_gae_advantage_return(rewards, values, mask.double(), GAMMA, LAM)
    _close(found[mask], theirs[mask], VERL)
    _close(returns[mask], their_returns[mask])
    assert bool((found[~mask] == 0).all())
    assert bool((theirs[~mask] != 0).any())


def test_verl_reinforce_plus_plus():
    """verl's return restarts behind every masked token; without gaps it is the whitened return."""
    verl = peer("verl.trainer.ppo.core_algos")
    (rewards,) = _steps("rewards")
    mask = _answers()
    config = SimpleNamespace(gamma=GAMMA)
    theirs, their_returns = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, mask.double(), config=config
    )
    found = rf.recipes.reinforce_pp(rewards, gamma=GAMMA, mask=mask)
    _close(found[mask], theirs[mask], VERL)
    _close(rf.discounted_returns(rewards, gamma=GAMMA, mask=mask)[mask], their_returns[mask])


def test_verl_remax():
    """verl's baseline comes off every token's undiscounted return: with outcome rewards that is r - b."""
    verl = peer("verl.trainer.ppo.core_algos")
    mask = _answers()
    outcome, greedy = torch.randn(B, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    theirs, _ = verl.compute_remax_outcome_advantage(outcome[:, None] * last, greedy, mask.double())
    found = rf.recipes.remax(outcome, greedy)
    _close((found[:, None] * mask), theirs)


def test_openrlhf_gae_and_returns():
    """OpenRLHF zeroes what is masked but takes steps over it: equal for right padding, not across a gap."""
    file = "trainer/ppo_utils/experience_maker.py"
    maker = openrlhf(get_advantages_and_returns=file, get_cumulative_returns=file)
    rewards, values = _steps("rewards", "values")
    mask = _answers()
    theirs, returns = maker.get_advantages_and_returns(None, values, rewards, mask, GAMMA, LAM)
    found = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask)
    _close(found[0][mask], theirs[mask])
    _close(found[1][mask], returns[mask])
    _close(
        rf.discounted_returns(rewards, gamma=GAMMA, mask=mask)[mask],
        maker.get_cumulative_returns(None, rewards, mask, GAMMA)[mask],
    )
    gap = _with_tool(mask)
    theirs, _ = maker.get_advantages_and_returns(None, values, rewards, gap, GAMMA, LAM)
    before = gap & (torch.arange(T) < 4)
    assert not torch.allclose(
        rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=gap)[0][before], theirs[before]
    )


# ---- reinforcement-learning libraries ------------------------------------------------------------------------


def _ends():
    """(terminated, truncated, the last column among the truncated)."""
    terminated, truncated = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    terminated[0, 6] = terminated[2, 11] = truncated[1, 9] = truncated[2, 3] = True
    truncated[:, -1] = True
    return terminated, truncated


@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"])
def test_torchrl_gae(name):
    """torchrl's next_state_value is V' of every step, its done says terminated or truncated."""
    functional = peer("torchrl.objectives.value.functional")
    rewards, values, after = _steps("rewards", "values", "after")
    terminated, truncated = _ends()
    inside = ~(terminated | truncated)
    after[:, :-1] = torch.where(inside[:, :-1], values[:, 1:], after[:, :-1])
    columns = [x[..., None] for x in (values, after, rewards, terminated | truncated, terminated)]
    theirs, returns = getattr(functional, name)(GAMMA, LAM, *columns)
    ends = {"terminated": terminated, "truncated": truncated, "bootstrap_values": after}
    found = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, **ends)
    _close(found[0], theirs[..., 0], TORCHRL)
    _close(found[1], returns[..., 0], TORCHRL)
    lambdas = functional.td_lambda_return_estimate(GAMMA, LAM, *columns[1:])
    _close(rf.td_lambda_returns(rewards, values, gamma=GAMMA, lam=LAM, **ends), lambdas[..., 0], TORCHRL)
    _close(
        rf.discounted_returns(rewards, gamma=GAMMA, terminated=terminated | truncated),
        functional.reward2go(rewards[..., None], columns[3], GAMMA)[..., 0],
        TORCHRL,
    )


def test_torchrl_vtrace():
    functional = peer("torchrl.objectives.value.functional")
    rewards, values, after, log_pi, log_mu = _steps("rewards", "values", "after", "pi", "mu")
    terminated, truncated = _ends()
    inside = ~(terminated | truncated)
    after[:, :-1] = torch.where(inside[:, :-1], values[:, 1:], after[:, :-1])
    columns = [
        x[..., None] for x in (log_pi, log_mu, values, after, rewards, terminated | truncated, terminated)
    ]
    theirs, targets = functional.vtrace_advantage_estimate(GAMMA, *columns, rho_thresh=1.1, c_thresh=0.9)
    found = rf.vtrace(
        rewards, values, log_pi - log_mu, gamma=GAMMA, rho_clip=1.1, c_clip=0.9, terminated=terminated,
        truncated=truncated, bootstrap_values=after,
    )  # fmt: skip
    _close(found[0], targets[..., 0], TORCHRL)
    _close(found[1], theirs[..., 0], TORCHRL)


def test_stable_baselines3():
    """[T, B] float32; "this observation starts an episode" at t is "the transition at t - 1 ended" here."""
    buffers = peer("stable_baselines3.common.buffers")
    spaces = peer("gymnasium").spaces
    box = spaces.Box(-1, 1, (1,))
    buffer = buffers.RolloutBuffer(T, box, box, device="cpu", gae_lambda=LAM, gamma=GAMMA, n_envs=B)
    rewards, values = (x.float() for x in _steps("rewards", "values"))
    last = torch.randn(B)
    ended = torch.rand(B, T) < 0.2
    buffer.rewards, buffer.values = rewards.T.numpy(), values.T.numpy()
    buffer.episode_starts = torch.cat([torch.ones(1, B), ended.T[:-1].float()]).numpy()
    buffer.compute_returns_and_advantage(last, ended[:, -1].numpy())
    found = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, last_values=last, terminated=ended)
    # Float32 on both sides, 19 steps.
    torch.testing.assert_close(found[0], torch.as_tensor(buffer.advantages).T, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found[1], torch.as_tensor(buffer.returns).T, rtol=1e-5, atol=2e-6)


def test_tianshou_gae():
    """One flat array of episodes: V' of every step, and where the recursion is cut; 0 is V' where terminated."""
    base = peer("tianshou.algorithm.algorithm_base")
    rewards, values, after = (x.flatten() for x in _steps("rewards", "values", "after"))
    terminated, truncated = (x.flatten() for x in _ends())
    inside = ~(terminated | truncated)
    after[:-1] = torch.where(inside[:-1], values[1:], after[:-1])
    theirs = base._gae(
        values.numpy(),
        (after * ~terminated).numpy(),
        rewards.numpy(),
        (terminated | truncated).numpy(),
        GAMMA,
        LAM,
    )
    found = rf.gae(
        rewards, values, gamma=GAMMA, lam=LAM, terminated=terminated, truncated=truncated, bootstrap_values=after,
        cu_seqlens=torch.tensor([0, B * T]),
    )  # fmt: skip
    _close(found[0], theirs)


def test_tianshou_n_step():
    """n = 1 is lambda = 0, with n at least the episode's length the discounted return, Q behind its end."""
    base = peer("tianshou.algorithm.algorithm_base")
    rewards, after = (x[0] for x in _steps("rewards", "after"))
    ended, steps = torch.arange(T) == T - 1, torch.arange(T)
    ends = {"truncated": ended[None], "bootstrap_values": after[None]}
    values = torch.cat([torch.zeros(1, dtype=torch.float64), after[:-1]])
    for n in (1, T):
        indices = torch.stack([(steps + i).clamp_max(T - 1) for i in range(n)])
        behind = after if n == 1 else after[-1:].repeat(T)
        given = (rewards.numpy(), ended.numpy(), behind[:, None].numpy(), indices.numpy())
        theirs = base._nstep_return(*given, GAMMA, n)
        if n == 1:
            found = rf.td_lambda_returns(rewards[None], values[None], gamma=GAMMA, lam=0.0, **ends)
        else:
            found = rf.discounted_returns(rewards[None], gamma=GAMMA, **ends)
        _close(found[0], theirs[:, 0])


def test_rlax_gae_and_lambda_returns():
    """One sequence, V of T + 1 states, a discount of 0 where the episode terminated."""
    rlax, jax = peer("rlax"), jax64()
    rewards, values = _steps("rewards", "values")
    last, terminated = torch.randn(B, dtype=torch.float64), torch.rand(B, T) < 0.1
    found = rf.gae(rewards, values, gamma=GAMMA, lam=LAM, last_values=last, terminated=terminated)
    states = torch.cat([values, last[:, None]], 1).numpy()
    discounts = (GAMMA * (~terminated).double()).numpy()
    advantages = jax.vmap(rlax.truncated_generalized_advantage_estimation, in_axes=(0, 0, None, 0))
    _close(found[0], advantages(rewards.numpy(), discounts, LAM, states))
    returns = jax.vmap(rlax.lambda_returns, in_axes=(0, 0, 0, None))
    _close(found[1], returns(rewards.numpy(), discounts, states[:, 1:], LAM))
    _close(
        rf.discounted_returns(rewards, gamma=GAMMA, last_values=last, terminated=terminated),
        jax.vmap(rlax.discounted_returns)(rewards.numpy(), discounts, states[:, 1:] * np.eye(T)[-1]),
    )


@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_rlax_vtrace(lam):
    """Errors are targets minus values; rlax's advantage mixes the bootstrap, lam v' + (1 - lam) V'."""
    rlax, jax = peer("rlax"), jax64()
    rewards, values, log_rhos = _steps("rewards", "values", "log_rhos")
    last, terminated = torch.randn(B, dtype=torch.float64), torch.rand(B, T) < 0.1
    given = {"gamma": GAMMA, "last_values": last, "terminated": terminated}
    targets, advantages = rf.vtrace(rewards, values, log_rhos, lam=lam, **given)
    after = torch.cat([values[:, 1:], last[:, None]], 1)
    function = jax.vmap(lambda *x: tuple(rlax.vtrace_td_error_and_advantage(*x, lam)))
    arrays = [x.numpy() for x in (values, after, rewards, GAMMA * (~terminated).double(), log_rhos.exp())]
    errors, theirs, _ = function(*arrays)
    _close(targets - values, errors)
    one_step, _ = rf.vtrace(rewards, values, log_rhos, lam=0.0, **given)
    _close(lam * advantages + (1 - lam) * (one_step - values), theirs)


def test_rlax_retrace():
    """rlax wants q, v, c of the step behind: one shift, and no correction behind the last."""
    rlax, jax = peer("rlax"), jax64()
    rewards, q_values, after, log_rhos = _steps("rewards", "q_values", "next_values", "log_rhos")
    terminated = torch.rand(B, T) < 0.1
    found = rf.retrace(rewards, q_values, after, log_rhos, gamma=GAMMA, lam=LAM, terminated=terminated)
    c = LAM * log_rhos.exp().clamp_max(1)
    function = jax.vmap(rlax.general_off_policy_returns_from_q_and_v)
    arrays = (q_values[:, 1:], after, rewards, GAMMA * (~terminated).double(), c[:, 1:])
    _close(found, function(*(x.numpy() for x in arrays)))
