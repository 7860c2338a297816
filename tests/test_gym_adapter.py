"""Gymnasium environments as environments of texts: described, acted on by names, and learnt."""

import functools
import threading
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from transformers import LlamaConfig, LlamaForCausalLM

from react_fast.envs import GymTextEnv, TextEnv
from react_fast.envs.gym_adapter import render
from react_fast.trainer.algorithms import GRPO
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.trainer import Trainer

from . import training

LAKE = functools.partial(gymnasium.make, "FrozenLake-v1", desc=["SF", "HG"], is_slippery=False)
SLIPPERY = functools.partial(gymnasium.make, "FrozenLake-v1", map_name="4x4", is_slippery=True)
NAMES = ["left", "down", "right", "up"]


def lake(**options):
    return GymTextEnv(LAKE, **{"actions": NAMES, "seeds": 3, "layout": "at {observation}\n>", **options})


def test_episode_is_the_environments_in_words():
    env = lake(instruction="Find the goal.\n")
    state, info = env.reset(seed=1, options={"index": 2})
    assert (state, info) == ("Find the goal.\nat 0\n>", {"index": 2, "turn": 0})
    state, reward, terminated, truncated, info = env.step(" Right\n")
    assert state == "Find the goal.\nat 0\n> Right\n\nat 1\n>"
    assert (reward, terminated, truncated, info["counts"]) == (0, False, False, {"actions/illegal": 0})
    assert env.step("1")[1:4] == (1, True, False)  # down, by its number
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("up")


def test_the_same_actions_give_what_the_environment_gives():
    env, twin = GymTextEnv(SLIPPERY, seeds=[7], max_turns=99), SLIPPERY()
    env.reset(seed=5, options={"index": 0})
    twin.reset(seed=7)
    twin.unwrapped.np_random = np.random.default_rng(5)
    for action in np.random.default_rng(0).integers(4, size=99):
        state, *found, _ = env.step(str(action))
        seen, *expected, _ = twin.step(int(action))
        assert found == expected
        assert state.endswith(f"{action}\n{seen}\n>")
        if any(expected[1:]):
            break


def test_records_begin_alike_and_go_their_ways():
    env = GymTextEnv("CartPole-v1", seeds=2)
    starts = [[env.reset(seed=seed, options={"index": i})[0] for seed in (1, 2)] for i in (0, 1)]
    assert starts[0][0] == starts[0][1] != starts[1][0] == starts[1][1]
    assert [record.prompt for record in env.records] == [start[0] for start in starts]
    slippery = GymTextEnv(SLIPPERY, seeds=1)
    walks = set()
    for seed in range(8):
        slippery.reset(seed=seed, options={"index": 0})
        walks.add(slippery.step("2")[0])
    assert len(walks) > 1


@pytest.mark.parametrize(
    ("on_illegal", "expected"), [("noop", (-0.5, False, False)), ("truncate", (-0.5, False, True))]
)
def test_illegal_actions(on_illegal, expected):
    env = lake(on_illegal=on_illegal, penalty=-0.5)
    env.reset(options={"index": 0})
    state, *found, info = env.step("fly")
    assert tuple(found) == expected
    assert info["counts"] == {"actions/illegal": 1}
    assert state == "at 0\n>fly\nat 0\n>"


def test_turns_run_out():
    env = lake(max_turns=2)
    env.reset(options={"index": 0})
    assert env.step("left")[2:4] == (False, False)
    assert env.step("left")[2:4] == (False, True)


def test_clones_go_on_alone():
    env = GymTextEnv("CartPole-v1", seeds=2)
    env.reset(seed=3, options={"index": 1})
    env.step("1")
    other = env.clone()
    assert [env.step("0") for _ in range(3)] == [other.step("0") for _ in range(3)]
    assert env.step("0")[0] != other.step("1")[0]
    fresh = env.clone()
    assert fresh.reset(seed=4, options={"index": 0}) == other.reset(seed=4, options={"index": 0})


class Locked(gymnasium.Env):
    """It cannot be copied, and its actions count from 5."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2, 2)), "b": spaces.Discrete(3)})
    action_space = spaces.Discrete(2, start=5)

    def __init__(self):
        self.lock = threading.Lock()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"a": np.array([[0.12345, -1], [0, 1]], dtype=np.float32), "b": 2}, {}

    def step(self, action):
        return self.reset()[0], float(action), False, False, {}


def test_what_cannot_be_copied_says_so_and_is_made_anew_between_episodes():
    env = GymTextEnv(Locked, seeds=1)
    clone = env.clone()
    assert clone.reset()[0] == "a: 0.123 -1\n0 1\nb: 2\n>"
    assert [clone.step(action)[1] for action in ("5", "6")] == [5, 6]
    with pytest.raises(
        TypeError, match=r"Locked.* cannot be copied within an episode: TypeError: cannot pickle"
    ):
        clone.clone()


@pytest.mark.parametrize(
    ("space", "value", "text"),
    [
        (spaces.Discrete(5), np.int64(3), "3"),
        (spaces.Box(0, 1, (3,)), np.array([0.5, 1e-4, 1], dtype=np.float32), "0.5 0.0001 1"),
        (spaces.Box(0, 255, (2, 2), np.uint8), np.array([[1, 2], [3, 255]], dtype=np.uint8), "1 2\n3 255"),
        (spaces.MultiDiscrete([3, 3]), np.array([0, 2]), "0 2"),
        (spaces.MultiBinary(3), np.array([1, 0, 1], dtype=np.int8), "1 0 1"),
        (spaces.Text(9), "a b", "a b"),
        (spaces.Tuple([spaces.Discrete(32), spaces.Discrete(2)]), (17, 1), "17; 1"),
    ],
)
def test_render(space, value, text):
    assert render(space, value) == text


def test_passes_gymnasiums_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = lake()
        env.spec = gymnasium.envs.registration.EnvSpec(
            "Lake-v0", entry_point=GymTextEnv, kwargs={"env": LAKE, "seeds": 3}
        )
        check_env(env)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (
            TypeError,
            "env must be an id or a function that makes one, got FrozenLakeEnv",
            {"env": LAKE().unwrapped},
        ),
        (TypeError, "env must have Discrete actions, got Box", {"env": "Pendulum-v1"}),
        (ValueError, r"actions must be 4 different names, got \['a'\]", {"actions": ["a"]}),
        (ValueError, "actions must be 4 different names", {"actions": ["a", "A", "b", "c"]}),
        (TypeError, "actions must be a list of names, got 'LDRU'", {"actions": "LDRU"}),
        (ValueError, r"layout must hold \{observation\} once, got 'x'", {"layout": "x"}),
        (ValueError, "on_illegal must be 'noop' or 'truncate', got 'raise'", {"on_illegal": "raise"}),
        (ValueError, "penalty must be a finite number, got nan", {"penalty": float("nan")}),
        (TypeError, "describe must be a function, got str", {"describe": "x"}),
        (TypeError, "describe must give a str, got int", {"describe": int}),
        (ValueError, "seeds must be at least one, .* got 0", {"seeds": 0}),
        (ValueError, r"seeds must be at least one, .* got \[-1\]", {"seeds": [-1]}),
        (ValueError, r"seeds must be at least one, .* got \[1.5\]", {"seeds": [1.5]}),
        (TypeError, "seeds must be their number or a list of integers, got '12'", {"seeds": "12"}),
        (TypeError, "actions must be a list of names, got 4", {"actions": 4}),
        (TypeError, "instruction must be a str, got int", {"instruction": 4}),
        (TypeError, "env must make a gymnasium.Env, got int", {"env": lambda: 4}),
    ],
)
def test_constructor_refuses(error, match, options):
    with pytest.raises(error, match=match):
        GymTextEnv(**{"env": LAKE, **options})


def test_the_trainer_learns_the_way_over_the_lake():
    """Four actions among ten tokens, a hole beside the way: chance arrives in 1 of 12 episodes of 4 turns."""
    env = lake(actions=list("LDRU"), layout="{observation}>", max_turns=4, seeds=4)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=10, max_position_embeddings=32, **sizes))
    steps = {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 1, "learning_rate": 2e-2, "steps": 20}
    config = TrainerConfig(**steps, max_grad_norm=None, threads=1)
    letters = training.Characters("LDRU0123>\n")
    trainer = Trainer(model, letters, env, algorithm=GRPO(), config=config, eval_env=env)
    before = np.mean([sum(t.rewards) for t in trainer.collect()])
    metrics = trainer.train()
    after = np.mean([sum(t.rewards) for t in trainer.collect()])
    assert before < 0.3
    assert after > before + 0.5
    assert trainer.evaluate()["eval/reward"] == 1
    assert metrics["actions/illegal"] < 32


def test_many_at_once_is_step_by_step():
    env = lake()
    envs, others = [env.clone() for _ in range(3)], [env.clone() for _ in range(3)]
    for one in [*envs, *others]:
        one.reset(seed=0, options={"index": 0})
    actions = ["right", "down", "fly"]
    assert TextEnv.step_many(envs, actions) == [e.step(a) for e, a in zip(others, actions, strict=True)]
