"""Prioritised replay in Stable-Baselines3: its own samples, weights, n steps, saved files, and a task it helps."""

import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from .peers import peer

BOX, ACTIONS = spaces.Box(-1, 1, (2,)), spaces.Discrete(3)


@pytest.fixture(scope="module")
def ours():
    peer("stable_baselines3")
    from react_fast.integrations import stable_baselines3

    return stable_baselines3


def _fill(buffer, steps, envs=1, seed=0):
    """The same transitions in any buffer: steps in order, some of them ends, some cut by time."""
    numbers = np.random.default_rng(seed)
    for _ in range(steps):
        done = numbers.random(envs) < 0.15
        cut = [{"TimeLimit.truncated": bool(d and numbers.random() < 0.5)} for d in done]
        before, after = numbers.normal(size=(2, envs, 2)).astype(np.float32)
        buffer.add(before, after, numbers.integers(3, size=(envs, 1)), numbers.normal(size=envs), done, cut)
    return buffer


def _same(ours, theirs):
    for name in ("observations", "actions", "next_observations", "dones", "rewards", "discounts"):
        got, wanted = getattr(ours, name), getattr(theirs, name)
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [7, 30])  # not full; written over
@pytest.mark.parametrize("n_steps", [1, 3])
def test_transitions_are_stable_baselines3_s(ours, n_steps, steps):
    kinds = peer("stable_baselines3.common.buffers")
    options = {"n_steps": n_steps, "gamma": 0.9} if n_steps > 1 else {}
    theirs = kinds.NStepReplayBuffer if n_steps > 1 else kinds.ReplayBuffer
    mine = _fill(ours.PrioritizedReplayBuffer(20, BOX, ACTIONS, device="cpu", **options), steps)
    other = _fill(theirs(20, BOX, ACTIONS, device="cpu", **options), steps)
    batch = mine.sample(64)
    _same(batch, other._get_samples(batch.indices))
    assert batch.indices.max() < min(steps, 20)


def test_every_environment_of_a_step_is_drawn(ours):
    mine = _fill(ours.PrioritizedReplayBuffer(20, BOX, ACTIONS, device="cpu", n_envs=3), 4, envs=3)
    batch = mine.sample(24)
    assert sorted(set(batch.indices.tolist())) == list(range(12))
    step, env = np.divmod(batch.indices, 3)
    np.testing.assert_array_equal(batch.rewards[:, 0], mine.rewards[step, env])
    np.testing.assert_array_equal(batch.observations, mine.observations[step, env])


def test_shared_observations_leave_out_the_step_that_lost_its_next_one(ours):
    options = {"optimize_memory_usage": True, "handle_timeout_termination": False}
    mine = ours.PrioritizedReplayBuffer(10, BOX, ACTIONS, device="cpu", n_envs=2, **options)
    for steps in (3, 2, 4, 1):
        _fill(mine, steps, envs=2)
        batch = mine.sample(200)
        drawn = set((batch.indices // 2).tolist())
        assert drawn == set(range(mine.pos)) if not mine.full else drawn == set(range(5)) - {mine.pos}
        mine.update_priorities(np.arange(10)[: 2 * mine.size()], np.ones((2 * mine.size(), 1)))
        step, env = np.divmod(batch.indices, 2)
        np.testing.assert_array_equal(batch.next_observations, mine.observations[(step + 1) % 5, env])


def test_priorities_and_weights(ours):
    mine = _fill(ours.PrioritizedReplayBuffer(8, BOX, ACTIONS, device="cpu", alpha=0.7, beta=0.5, eps=0.1), 8)
    assert mine.tree.priorities.tolist() == [1.0] * 8  # new ones: the largest so far
    errors = torch.tensor([[0.0], [-3.0], [0.5], [1.0]])
    mine.update_priorities(np.array([0, 1, 2, 3]), errors)
    wanted = np.array([0.1, 3.1, 0.6, 1.1] + [1.0] * 4) ** 0.7
    np.testing.assert_allclose(mine.tree.priorities, wanted, rtol=1e-6)
    _fill(mine, 1)
    assert float(mine.tree.priorities[0]) == pytest.approx(3.1**0.7)
    wanted[0] = 3.1**0.7
    for progress, beta in ((0.0, 0.5), (0.5, 0.75), (1.0, 1.0)):
        mine.progress = progress
        batch = mine.sample(50)
        shares = wanted / wanted.sum()
        weights = (8 * shares) ** -beta
        np.testing.assert_allclose(
            batch.weights[:, 0], (weights / weights.max())[batch.indices], rtol=1e-5, err_msg=str(progress)
        )
    with pytest.raises(ValueError, match="priorities must be finite"):
        mine.update_priorities(np.array([0]), torch.tensor([float("nan")]))


def test_refusals(ours):
    make = ours.PrioritizedReplayBuffer
    for wrong in ({"alpha": -1.0}, {"beta": 1.5}, {"eps": 0.0}, {"n_steps": 0}, {"gamma": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(8, BOX, ACTIONS, **wrong)
    with pytest.raises(ValueError, match="n_steps > 1 needs next observations"):
        make(8, BOX, ACTIONS, n_steps=2, optimize_memory_usage=True, handle_timeout_termination=False)
    with pytest.raises(ValueError, match="the tree is empty"):
        make(8, BOX, ACTIONS).sample(2)
    with pytest.raises(TypeError, match="must be a prioritised one, got ReplayBuffer"):
        ours.DQN("MlpPolicy", Chain(), buffer_size=10, device="cpu",
                 replay_buffer_class=peer("stable_baselines3.common.buffers").ReplayBuffer)  # fmt: skip


class Chain(gym.Env):
    """Of two actions one goes on, another one at every state; the other ends. Reward 1 behind the last state."""

    def __init__(self, length=5, keys=False):
        self.length, self.keys = length, keys
        box = spaces.Box(0, 1, (length + 1,))
        self.observation_space = spaces.Dict({"place": box}) if keys else box
        self.action_space = spaces.Discrete(2)

    def _seen(self):
        seen = np.eye(self.length + 1, dtype=np.float32)[self.at]
        return {"place": seen} if self.keys else seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self._seen(), {}

    def step(self, action):
        right = action == self.at % 2
        self.at += int(right)
        goal = self.at == self.length
        return self._seen(), float(goal), bool(goal or not right), False, {}


SMALL = {"device": "cpu", "seed": 0, "learning_starts": 16, "batch_size": 16, "buffer_size": 200}


def test_the_chain_is_learned_and_a_seed_is_a_run(ours):
    def learned():
        model = ours.DQN(
            "MlpPolicy", Chain(), **SMALL, learning_rate=5e-3, target_update_interval=25, train_freq=1,
            exploration_fraction=0.8, exploration_final_eps=0.1, policy_kwargs={"net_arch": [16]},
        )  # fmt: skip
        return model.learn(400)

    first, second = learned(), learned()
    weights = [torch.nn.utils.parameters_to_vector(m.policy.parameters()) for m in (first, second)]
    assert torch.equal(*weights)
    priorities = first.replay_buffer.tree.priorities
    assert torch.equal(priorities, second.replay_buffer.tree.priorities)
    assert len(set(priorities.tolist())) > 20  # TD errors came back
    assert first.replay_buffer.progress > 0.95
    env = Chain()
    seen, ended, reward = env.reset()[0], False, 0.0
    while not ended:
        action, _ = first.predict(seen, deterministic=True)
        seen, reward, ended, *_ = env.step(int(action))
    assert reward == 1.0


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("envs", [1, 3])
def test_n_steps_dictionaries_and_several_environments(ours, keys, envs):
    vector = peer("stable_baselines3.common.vec_env").DummyVecEnv([lambda: Chain(3, keys)] * envs)
    policy = "MultiInputPolicy" if keys else "MlpPolicy"
    model = ours.DQN(policy, vector, **SMALL, n_steps=3, gamma=0.9).learn(60)
    assert model.replay_buffer.n_steps == 3
    discounts = model.replay_buffer.sample(32).discounts.flatten()
    assert all(min(abs(float(x) - 0.9**k) for k in (1, 2, 3)) < 1e-6 for x in discounts)


def test_one_gradient_step_is_the_weighted_loss(ours, monkeypatch):
    """Against plain DQN: the loss of the same batch with weights of 1 is bitwise Stable-Baselines3's."""
    theirs = peer("stable_baselines3").DQN
    found = []
    for kind in (theirs, ours.DQN):
        model = kind("MlpPolicy", Chain(), **SMALL, replay_buffer_class=ours.PrioritizedReplayBuffer)
        model.learn(20)
        model.replay_buffer.update_priorities(np.arange(20), np.zeros(20))
        batch = model.replay_buffer.sample(16)._replace(weights=torch.ones(16, 1))
        fixed = types.MethodType(lambda self, size, env=None, batch=batch: batch, model.replay_buffer)
        monkeypatch.setattr(model.replay_buffer, "sample", fixed)
        model.train(2, 16)
        found.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert torch.equal(*found)


def test_plain_dqn_draws_every_transition_alike(ours):
    model = peer("stable_baselines3").DQN(
        "MlpPolicy", Chain(), **SMALL, replay_buffer_class=ours.PrioritizedReplayBuffer,
        replay_buffer_kwargs={"alpha": 0.6, "beta": 0.4},
    ).learn(60)  # fmt: skip
    assert model.replay_buffer.tree.priorities[:60].tolist() == [1.0] * 60
    assert set(model.replay_buffer.sample(16).weights.flatten().tolist()) == {1.0}


def test_saved_and_loaded(ours, tmp_path):
    model = ours.DQN("MlpPolicy", Chain(), **SMALL).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    again = ours.DQN.load(tmp_path / "model", env=Chain())
    again.load_replay_buffer(tmp_path / "buffer")
    drawn = []
    for buffer in (model.replay_buffer, again.replay_buffer):
        np.random.seed(3)
        drawn.append(buffer.sample(20))
    assert drawn[0].indices.tolist() == drawn[1].indices.tolist()
    assert torch.equal(drawn[0].weights, drawn[1].weights)
    again.learn(20)
