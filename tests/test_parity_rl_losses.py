"""PPO's losses as Stable-Baselines3, torchrl and rlax compute them, and ours on the same numbers."""

import numpy as np
import pytest
import torch

import react_fast as rf

from .peers import jax64, peer

N, ACTIONS = 64, 4


def _steps():
    logits = torch.randn(N, ACTIONS, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(ACTIONS, (N,))
    old = logits.detach().log_softmax(-1)[torch.arange(N), actions] + 0.3 * torch.randn(
        N, dtype=torch.float64
    )
    return logits, actions, old, torch.randn(N, dtype=torch.float64)


def _taken(logits, actions):
    return logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]


def _ours(logits, actions, old, advantages, objective):
    """One packed sequence; the value, and the gradient of the logits."""
    loss = rf.policy_loss(
        _taken(logits, actions), old, advantages, torch.ones(N, dtype=torch.bool), objective=objective
    ).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def _close(found, expected, tolerance=1e-12):
    for x, y in zip(found, expected, strict=True):
        y = y.detach() if isinstance(y, torch.Tensor) else torch.as_tensor(np.array(y))
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Rlax softmax")
@pytest.mark.parametrize("clipped", [True, False])
def test_rlax(clipped):
    """clipped_surrogate_pg_loss and policy_gradient_loss. Float64: 1e-12 is some thousand roundings."""
    rlax, jax = peer("rlax"), jax64()
    logits, actions, old, advantages = _steps()
    found = _ours(logits, actions, old, advantages, rf.PPOClip() if clipped else rf.Reinforce())
    a, b, A = actions.numpy(), old.numpy(), advantages.numpy()

    def loss(x):
        if not clipped:
            return rlax.policy_gradient_loss(x, a, A, np.ones(N))
        logp = jax.nn.log_softmax(x)[np.arange(N), a]
        return rlax.clipped_surrogate_pg_loss(jax.numpy.exp(logp - b), A, 0.2)

    _close(found, jax.value_and_grad(loss)(logits.detach().numpy()))


def test_torchrl_clip_ppo():
    """It clips the log-ratio between log(1 - eps) and log(1 + eps), in float32: 2e-7 is a few roundings."""
    objectives, modules = peer("torchrl.objectives"), peer("torchrl.modules")
    tensordict, nn = peer("tensordict"), peer("tensordict.nn")
    logits, actions, old, advantages = _steps()
    actor = modules.ProbabilisticActor(
        nn.TensorDictModule(torch.nn.Identity(), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    loss = objectives.ClipPPOLoss(actor, critic_network=None, clip_epsilon=0.2, entropy_bonus=False)
    loss.set_keys(sample_log_prob="old")
    batch = {"observation": logits, "action": actions, "old": old, "advantage": advantages[:, None]}
    theirs = loss(tensordict.TensorDict(batch, [N]))["loss_objective"]
    expected = theirs, torch.autograd.grad(theirs, logits)[0]
    _close(_ours(logits, actions, old, advantages, rf.PPOClip()), expected, 2e-7)


def test_stable_baselines3_ppo():
    """PPO.train on its own rollout, the policy moved in between: SB3 whitens with eps beside the std.

    Its value loss has no 1/2. Float32 and sums over 64 steps on both sides.
    """
    ppo, gymnasium = peer("stable_baselines3.ppo"), peer("gymnasium")

    class Line(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (3,))
        action_space = gymnasium.spaces.Discrete(ACTIONS)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), float(action), bool(action == 0), False, {}

    model = ppo.PPO("MlpPolicy", Line(), n_steps=N, batch_size=N, n_epochs=1, seed=0, device="cpu")
    _, callback = model._setup_learn(N)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    steps = next(model.rollout_buffer.get(N))
    values, logp, _ = model.policy.evaluate_actions(steps.observations, steps.actions.long().flatten())
    everything = torch.ones(N, dtype=torch.bool)
    advantages = rf.whiten(steps.advantages, mask=everything)
    loss = rf.policy_loss(logp.detach(), steps.old_log_prob, advantages, everything).loss
    squares = rf.value_loss(values.detach().flatten(), None, steps.returns, everything)
    model.train()
    logged = model.logger.name_to_value
    assert float(loss) == pytest.approx(logged["train/policy_gradient_loss"], rel=1e-4, abs=1e-6)
    assert 2 * float(squares) == pytest.approx(logged["train/value_loss"], rel=1e-5)
