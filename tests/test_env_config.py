"""Environments that a configuration names: Gymnasium's by their id, and every option of tools."""

import json
from functools import partial

import gymnasium
import pytest
import yaml
from gymnasium import spaces

from react_fast.cli import main
from react_fast.envs import GymTextEnv, ToolCall
from react_fast.trainer.config import ConfigError, EnvConfig, RunConfig
from react_fast.trainer.folder import UserError
from react_fast.trainer.sources import load_environments

from .tiny import records, train_words


class Count(gymnasium.Env):
    """Starts at a random number below `size`; the reward is the share of actions that say whether it is even."""

    def __init__(self, size=9):
        self.observation_space, self.action_space = spaces.Discrete(size), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(self.observation_space.n))
        return self.number, {}

    def step(self, action):
        paid, self.number = (
            float(action == self.number % 2),
            (self.number + 1) % int(self.observation_space.n),
        )
        return self.number, paid, False, False, {}


gymnasium.register("Count-v0", entry_point=Count)
COUNT = f"{__name__}:Count-v0"


def named(observation):
    return f"number {observation}"


def gym_config(**options):
    few = {"eval_prompts": 3, "test_prompts": 2}
    return EnvConfig(**few, gym={"id": COUNT, "seeds": 4, **options})


def test_a_gymnasium_environment_by_its_id_is_a_gym_text_env():
    options = {
        "actions": ["even", "odd"],
        "layout": "{observation}?",
        "instruction": "Say it. ",
        "penalty": -1.0,
    }
    found = load_environments(gym_config(**options, kwargs={"size": 5}, describe=f"{__name__}:named"))
    assert {split: [r.metadata["seed"] for r in env.records] for split, env in found.items()} == {
        "train": [0, 1, 2, 3],
        "validation": [4, 5, 6],
        "test": [7, 8],
    }
    twin = GymTextEnv(partial(Count, 5), describe=named, seeds=4, max_turns=32, **options)
    for env in (found["train"], twin):
        env.reset(seed=2, options={"index": 3})
    steps = [[env.step(a) for a in ("even", "odd", "ODD ", "neither")] for env in (found["train"], twin)]
    assert steps[0] == steps[1]
    assert steps[0][0][0].startswith("Say it. number ")
    assert found["train"].max_turns == 32
    assert load_environments(EnvConfig(max_turns=3, gym={"id": COUNT}))["test"].max_turns == 3


def lake_words(folder, **gym):
    """A run on FrozenLake in seconds; its episodes are short."""
    options = {
        "id": "FrozenLake-v1",
        "kwargs": {"is_slippery": False},
        "actions": list("LDRU"),
        "seeds": 1,
        **gym,
    }
    words = train_words(folder, warm_start={"steps": 0}, trainer={"steps": 2, "max_new_tokens": 1})
    path = folder / "tiny.yaml"
    env = {"gym": options, "max_turns": 2, "eval_prompts": 2, "test_prompts": 2}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "env": env}))
    return words


def test_the_command_trains_on_the_lake(tmp_path, capsys):
    words = lake_words(tmp_path)
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "id: FrozenLake-v1" in shown
    assert "4 sequences a step of at most 3 + 5 tokens" in shown, (
        "two answers and an observation between them"
    )
    assert main([*words, "--trainer.sample_every", "1"]) == 0
    assert "reward x100" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= step["actions/illegal"] <= 8 for step in metrics)
    assert metrics[-1]["environment_steps"] == 2 * 4 * 2
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--env.gym.id FrozenLak-v1", "env.gym.id names no environment that can be made: NameNotFound: Env"),
        (
            "--env.gym.id FrozenLake-v9",
            "env.gym.id names no environment that can be made: VersionNotFound: E",
        ),
        (
            "--env.gym.id absent:X-v0",
            "env.gym.id names a module that cannot be imported: ModuleNotFoundError",
        ),
        ("--env.gym.id Pendulum-v1 --env.gym.kwargs {}", "env.gym.id must have Discrete actions, got Box"),
        (
            "--env.gym.kwargs {wet:_1}",
            "env.gym.kwargs cannot make FrozenLake-v1: TypeError: FrozenLakeEnv.__i",
        ),
        ("--env.gym.actions [a]", "env.gym.actions must be 4 different names, got ['a']"),
        ("--env.gym.layout x", "env.gym.layout must hold {observation} once, got 'x'"),
        ("--env.gym.describe builtins:absent", "env.gym.describe names no function of builtins"),
        ("--env.gym.describe builtins:int", "env.gym.describe must give a str, got int"),
        ("--env.gym.idd x", "env.gym.idd is not a key; did you mean env.gym.id?"),
        (
            "--env.reward chrf",
            "env.reward must not stand beside env.gym.id FrozenLake-v1, whose tasks and re",
        ),
        ("--env.gym.id none", "env.gym.id must name an environment beside other keys of env.gym, got none"),
        ("--warm_start.steps 3", "warm_start.steps must be 0 for env.gym, which has no references, got 3"),
        ("--algorithm.name dpo", "records[0].reference must be a text for supervised training, got None"),
        ("--algorithm.name ilql", "records must have a reference, metadata 'rejected' or 'answers' for ILQL"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path, capsys, words, message):
    given = [word.replace("_", " ") if word.startswith("{") else word for word in words.split()]
    assert main([*lake_words(tmp_path), *given]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"react-fast: {message}")
    assert told.count("\n") == 1


# --- tools


def shout(action):
    """Calls are written as !name."""
    return [ToolCall(action[1:], {})] if action.startswith("!") else []


def look() -> str:
    """Looks."""
    return "x" * 50


def tool_config(tmp_path, **keys):
    files = {split: records(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return EnvConfig(**files, tools=[f"{__name__}:look"], tools_described=False, **keys)


def test_every_option_of_tools_has_a_key(tmp_path):
    keys = {"tool_parse": f"{__name__}:shout", "tool_response": "<{answer}>", "tool_longest": 3}
    env = load_environments(tool_config(tmp_path, **keys, tool_concurrency=2, tool_timeout=5.0))["train"]
    env.reset(options={"index": 0})
    assert env.step("!look")[0] == "say 0:!look<xxx... (47 characters more)>"
    assert (env.calls.concurrency, env.calls.timeout, env.max_turns) == (2, 5.0, 4)
    assert env.step("done")[2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tool_parse": "builtins:absent"}, "env.tool_parse names no function of builtins"),
        ({"tool_response": "x"}, "response must hold {answer} once, got 'x'"),
    ],
)
def test_wrong_options_of_tools_are_one_line(tmp_path, keys, message):
    with pytest.raises(UserError) as caught:
        load_environments(tool_config(tmp_path, **keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_tools_need_tools():
    with pytest.raises(ConfigError) as caught:
        RunConfig(env={"tool_longest": 3})
    assert str(caught.value) == "env.tool_longest must stand beside env.tools, of which there are none"
