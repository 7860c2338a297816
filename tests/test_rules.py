"""Users' f, g and end of episode: by import path, by decorator, by the configuration."""

import functools
import json
import sys
import types

import pytest

from react_fast.cli import main
from react_fast.envs import TextEnv, reward, rules_of, terminal, transition
from react_fast.envs.rewards import chrf
from react_fast.trainer.config import EnvConfig
from react_fast.trainer.folder import UserError
from react_fast.trainer.sources import load_environments

from .tiny import records, train_words

SOURCE = """
from react_fast.envs import reward, terminal, transition

@reward(weight=3.0, name="short")
def brief(state, action, record):
    return float(len(action) < 4)

@reward
def right(prompts, completions, reference, **columns):
    return [float(c == r) for c, r in zip(completions, reference)]

def add(a: int, b: int) -> int:
    '''Adds.

    Args:
        a: one
        b: another
    '''
    return a + b

def broken(state, action, record):
    return 1 / 0

def leaves(state, action, record):
    raise SystemExit(0)

def wordy(state, action, record):
    return "0.5"

def nothing(state, action, record):
    return None

def two(state, action):
    return 1.0

def rewrites(state, action, record):
    return "new"

def plain(state, action, record):
    return 0.25

@transition
def say(state, action, record):
    return f"{state}[{action}]"

@terminal
def done(state, record):
    return state.endswith("stop]")
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Makes configurations with a module `my_rules` in the working directory, as a console script finds it."""
    (tmp_path / "my_rules.py").write_text(SOURCE)
    files = {split: records(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    return lambda **keys: EnvConfig(**files, max_turns=2, **keys)


def _played(env: TextEnv, *actions):
    env.reset(options={"index": 0})
    return [env.step(action) for action in actions]


def test_marked_functions_of_a_module_are_taken(config):
    env = load_environments(config(rules="my_rules"))["train"]
    first, second = _played(env, "word0", "stop")
    assert first[:4] == ("say 0:[word0]", 1.0, False, False)
    assert first[4]["rewards"] == {"short": 0, "right": 1}
    assert second[:4] == ("say 0:[word0][stop]", 0.0, True, False)
    assert _played(env, "no")[0][1] == 3


def test_marked_objects_and_partial_functions_are_taken_too():
    class Judge:
        def __call__(self, state, action, record):
            return 2.0

    module = types.ModuleType("judges")
    module.judge = reward(name="judge")(Judge())
    module.again = module.judge
    module.half = reward(name="half")(functools.partial(lambda factor, s, a, r: factor, 0.5))
    assert rules_of(module).rewards == (module.judge, module.half)


def test_functions_by_import_path_and_weights_by_name(config):
    names = {"my_rules:brief": 0.5, "my_rules:plain": 4, "exact_match": 2}
    rules = {"rewards": names, "transition": "my_rules:say", "terminal": "my_rules:done"}
    for split in ("train", "validation", "test"):
        env = load_environments(config(**rules))[split]
        step = _played(env, "stop")[0]
        assert step[:4] == ("say 0:[stop]", 1.0, True, False)
        assert step[4]["rewards"] == {"short": 0, "plain": 0.25, "exact_match": 0}
    assert load_environments(config(reward="chrf"))["test"].reward is chrf


def test_train_command_logs_them_and_says_in_one_line_what_fails(config, tmp_path, capsys):
    words = train_words(tmp_path, warm_start={"steps": 0}, trainer={"steps": 1}, env={"reward": None})
    rewards = ["--env.rewards", "{my_rules:plain: 4, chrf: 2}", "--tracker.enabled", "false"]
    assert main([*words, *rewards]) == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert logged["rewards/plain/mean"] == 0.25
    assert logged["reward"] == pytest.approx(1 + 2 * logged["rewards/chrf/mean"])
    capsys.readouterr()
    broken = ["--env.rewards", "{my_rules:broken: 1, chrf: 2}", "--run_dir", str(tmp_path / "other")]
    assert main([*words, *broken]) == 2
    shown = capsys.readouterr().err
    assert "reward 'broken' failed on row 0, prompt 'say " in shown
    assert "ZeroDivisionError: division by zero" in shown


def test_tools_by_import_path(config):
    env = load_environments(config(tools=["my_rules:add"], tool_timeout=5.0))["train"]
    start, _ = env.reset(options={"index": 0})
    assert start.endswith("say 0:")
    assert '"name": "add"' in start
    state, _, terminated, _, _ = env.step(
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    )
    assert state.endswith("<tool_response>\n3\n</tool_response>\n")
    assert not terminated
    bare = load_environments(config(tools=["my_rules:add"], tools_described=False))["train"]
    assert bare.reset(options={"index": 0})[0] == "say 0:"


def test_a_key_comes_before_a_marked_function(config):
    keys = {"rules": "my_rules", "reward": "my_rules:plain", "terminal": "builtins:callable"}
    env = load_environments(config(**keys))["train"]
    assert (env.reward.__name__, env.transition.__name__, env.terminal) == ("plain", "say", callable)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward": "chrf", "rewards": {"bleu": 1}}, "env.rewards must not stand beside env.reward"),
        ({"rewards": {"chrff": 1}}, "got 'chrff'; did you mean chrf?"),
        (
            {"rewards": {"my_rules:brief": 1, "my_rules:absent": 1}},
            "env.rewards names no function of my_rules",
        ),
        ({"transition": "my_rules"}, "env.transition must be module:function, got 'my_rules'"),
        ({"terminal": "my_rules:absent"}, "env.terminal names no function of my_rules"),
        (
            {"rules": "no_rules"},
            "env.rules names a module that cannot be imported: ModuleNotFoundError: No mod",
        ),
        ({"rules": "string"}, "string marks no function with @reward, @transition or @terminal"),
        (
            {"rules": "broken"},
            "env.rules names a module that cannot be imported: ZeroDivisionError: division",
        ),
    ],
)
def test_wrong_names_are_one_line(config, tmp_path, keys, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError) as caught:
        load_environments(config(**keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward": "my_rules:broken"}, "env.reward broken failed: ZeroDivisionError: division by zero"),
        ({"reward": "my_rules:leaves"}, "env.reward leaves failed: SystemExit(0)"),
        ({"reward": "my_rules:two"}, "env.reward two failed: TypeError: two() takes 2 positional arguments"),
        ({"reward": "my_rules:wordy"}, "env.reward wordy must give a number, got str"),
        ({"reward": "my_rules:nothing"}, "env.reward nothing must give a number, got NoneType"),
        ({"transition": "my_rules:nothing"}, "env.transition nothing must give a str, got NoneType"),
        ({"terminal": "my_rules:broken"}, "env.terminal broken failed: TypeError: broken() missing 1"),
    ],
)
def test_functions_that_fail_are_one_line(config, keys, message):
    env = load_environments(config(**{"reward": "my_rules:plain", **keys}))["train"]
    with pytest.raises(UserError) as caught:
        _played(env, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env.reward", "my_rules:leaves"], "env.reward leaves failed: SystemExit(0)"),
        (
            ["--env.reward", "my_rules:plain", "--env.transition", "my_rules:rewrites", "--max_turns", "2"],
            "the transition of a multi-turn environment must continue the text so far",
        ),
        (
            ["--rollout.engine", "continuous", "--trainer.min_p", "0.1"],
            "trainer.min_p must be 0 for rollout.en",
        ),
        (
            ["--rollout.engine", "generate", "--rollout.generation_options", "{penalty: 1}"],
            "generation_options must hold fields of GenerationConfig, got 'penalty'",
        ),
    ],
)
@pytest.mark.usefixtures("config")
def test_the_command_says_in_one_line_what_stops_a_rollout(tmp_path, capsys, words, message):
    assert main([*train_words(tmp_path, warm_start={"steps": 0}), *words]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told


def test_marks_refuse_what_cannot_be_called_so():
    with pytest.raises(TypeError, match=r"transition must take \(state, action, record\), got 'f'"):

        @transition
        def f(state, action): ...

    with pytest.raises(TypeError, match=r"terminal must take \(next_state, record\), got 'g'"):

        @terminal
        def g(state): ...

    with pytest.raises(TypeError, match="module must be a module, got str"):
        rules_of("my_rules")
    twice = types.ModuleType("twice")
    twice.a, twice.b = (transition(lambda state, action, record: state) for _ in range(2))
    with pytest.raises(ValueError, match="twice must mark one function with @transition, got <lambda> and"):
        rules_of(twice)
    once = types.ModuleType("once")
    once.a = once.b = reward(lambda state, action, record: 1)
    assert rules_of(once).rewards == (once.a,)
