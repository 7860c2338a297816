"""Tools that answer in text: what they say is seen, is no action, and never ends a run."""

import asyncio
import itertools
import json
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from react_fast.envs import Record, TextEnv, ToolCall, ToolEnv, tools_preface
from react_fast.trainer.algorithms import GRPO
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.meters import describe
from react_fast.trainer.rollout import EngineError, Episodes, Sample, SamplingParams
from react_fast.trainer.trainer import Trainer

from . import training

RECORDS = [Record("6*7? ", "42"), Record("5*5? ", "25")]


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: the first
        b: the second
    """
    return a * b


running, most_running = set(), []


async def upper(text):
    running.add(text)
    await asyncio.sleep(0.05)
    most_running.append(len(running))
    running.discard(text)
    return text.upper()


def hangs():
    time.sleep(1)


def fails():
    raise ConnectionError("no line\nsecond line")


def unwritable():
    return {(1, 2): 3}


def ends():
    raise SystemExit(0)


class Nameless:
    def __str__(self):
        raise ZeroDivisionError


def nameless():
    return Nameless()


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


TOOLS = [multiply, upper, hangs, fails, unwritable, ends, nameless]


def make_env(**options):
    return ToolEnv(RECORDS, TOOLS, timeout=0.3, **options)


def test_an_episode_goes_on_with_calls_and_ends_with_an_answer():
    env = make_env()
    start, _ = env.reset(options={"index": 0})
    asks = "let me see " + call("multiply", a=6, b=7)
    state, reward, terminated, truncated, info = env.step(asks)
    assert state == start + asks + "\n<tool_response>\n42\n</tool_response>\n"
    assert (reward, terminated, truncated) == (0, False, False)
    assert info["counts"] == {"tools/calls": 1, "tools/failed": 0}
    state, reward, terminated, truncated, info = env.step("42")
    assert state.endswith("</tool_response>\n42")
    assert (reward, terminated, truncated) == (1, True, False)
    assert info["counts"] == {"tools/calls": 0, "tools/failed": 0}


def test_a_call_in_the_last_turn_truncates():
    env = make_env(max_turns=2)
    env.reset(options={"index": 0})
    assert env.step(call("upper", text="x"))[2:4] == (False, False)
    assert env.step(call("upper", text="x"))[2:4] == (False, True)


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (
            call("divide", a=1),
            "error: there is no tool 'divide'; there are multiply, upper, hangs",
        ),
        (call("multiply", a=1), "error: multiply: missing a required argument: 'b'"),
        (call("multiply", a=1, b=2, c=3), "error: multiply: got an unexpected keyword argument 'c'"),
        (call("multiply", a=[1], b="x"), "error: TypeError: can't multiply sequence by non-int"),
        (call("fails"), "error: ConnectionError: no line"),
        (call("hangs"), "error: TimeoutError: no answer within 0.3 s"),
        (call("unwritable"), "error: TypeError: keys must be str"),
        ("<tool_call>{", "error: a call must end with </tool_call>"),
        ("<tool_call>{</tool_call>", "error: a call must be JSON: "),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "error: a call must be JSON: it is nested too deeply"),
        (call("ends"), "error: RuntimeError: SystemExit(0)"),
        (call("nameless"), "error: ZeroDivisionError"),
        ("<tool_call>3</tool_call>", 'error: a call must be an object with "name" and "arguments"'),
        (
            '<tool_call>{"name": "upper", "arguments": "x"}</tool_call>',
            'error: "arguments" must be an object, g',
        ),
    ],
)
def test_what_goes_wrong_is_said_to_the_policy_and_counted(action, answer):
    env = make_env()
    start, _ = env.reset(options={"index": 0})
    state, _, terminated, _, info = env.step(action)
    said = state.removeprefix(f"{start}{action}\n<tool_response>\n")
    assert said.startswith(answer)
    assert said.count("\n") == 2
    assert not terminated
    assert info["counts"] == {"tools/calls": 1, "tools/failed": 1}


def test_calls_of_many_rows_run_at_one_time_and_as_step_by_step():
    actions = [call("upper", text=f"a{i}") + call("multiply", a=i, b=2) for i in range(8)]
    first = make_env()
    envs, others = [first.clone() for _ in actions], [make_env() for _ in actions]
    for env in [*envs, *others]:
        env.reset(options={"index": 1})
    most_running.clear()
    steps = TextEnv.step_many(envs, actions)
    assert max(most_running) > 1
    alone = [env.step(action) for env, action in zip(others, actions, strict=True)]
    assert steps == alone
    assert TextEnv.step_many(others, ["x"] * 8) == [env.step("x") for env in envs]
    assert steps[3][0].endswith("<tool_response>\nA3\n6\n</tool_response>\n")


def test_answers_are_cut_and_always_text():
    def long():
        return "é" * 50

    def half():
        return "\ud800"

    env = ToolEnv(RECORDS, [long, half], longest=10, response="|{answer}|", preface="{answer} ")
    start, _ = env.reset(options={"index": 0})
    assert start == "{answer} 6*7? "
    state = env.step(call("long"))[0]
    assert state.endswith("|éééééééééé... (40 characters more)|")
    assert env.step(call("half"))[0].endswith("|?|")


def test_own_syntax_and_own_end():
    def parse(action):
        return [ToolCall("upper", {"text": action[1:]})] if action.startswith("!") else []

    env = ToolEnv(RECORDS, [upper], parse=parse, response="={answer};", terminal=lambda s, r: "DONE" in s)
    env.reset(options={"index": 0})
    assert env.step("!go")[0:3:2] == ("6*7? !go=GO;", False)
    assert env.step("!done")[0:3:2] == ("6*7? !go=GO;!done=DONE;", True)


def test_a_tool_that_exits_in_the_callers_thread_does_not_end_the_run():
    env = ToolEnv(RECORDS, [ends])
    env.reset(options={"index": 0})
    assert "\nerror: RuntimeError: SystemExit(0)\n" in env.step(call("ends"))[0]


@pytest.mark.parametrize("answer", [None, ["multiply"], "multiply"])
def test_a_parser_that_gives_no_calls_is_refused(answer):
    env = ToolEnv(RECORDS, [multiply], parse=lambda action: answer)
    env.reset(options={"index": 0})
    with pytest.raises(TypeError, match="parse must give a list of ToolCall, got "):
        env.step("x")


def test_preface_names_the_tools():
    text = tools_preface([multiply])
    assert '"name": "multiply"' in text
    assert '"description": "Multiplies two numbers."' in text
    assert "<tools>" in text
    with pytest.raises(ValueError, match="tool 'upper' cannot be described: DocstringParsingException"):
        tools_preface([upper])


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "tools must be a list of at least one function, got \\[\\]", {"tools": []}),
        (TypeError, "tools must be functions with a name, got int", {"tools": [3]}),
        (ValueError, "tools must have names of their own, got 'multiply' twice", {"tools": [multiply] * 2}),
        (TypeError, "parse must be a function, got str", {"parse": "hermes"}),
        (TypeError, "response must be a str, got int", {"response": 3}),
        (ValueError, r"response must hold \{answer\} once, got 'x'", {"response": "x"}),
        (ValueError, "longest must be an integer of at least 1, got 0", {"longest": 0}),
        (ValueError, "timeout must be a positive number of seconds, got -1", {"timeout": -1}),
    ],
)
def test_constructor_refuses(error, match, options):
    with pytest.raises(error, match=match):
        ToolEnv(RECORDS, **{"tools": [multiply], **options})


class Script:
    """An engine that says what it is told, turn by turn, in tokens of its own choice."""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns, self.seen = tokenizer, turns, []

    def generate(self, prompts, params):
        self.seen.append([self.tokenizer.decode(ids) for ids in prompts])
        ids = self.tokenizer(self.turns[params.turn], add_special_tokens=False)["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id]
        return [Sample(list(ids), [-1.0] * len(ids), "stop") for _ in prompts]


def test_tokens_of_tools_are_no_actions_and_the_policy_reads_them():
    _, tokenizer = training.make_policy()
    turns = [call("multiply", a=6, b=7), call("multiply", a=6), "42"]
    script = Script(tokenizer, turns)
    first, second = Episodes(script, tokenizer, make_env()).play([0, 1], [0, 1], SamplingParams(99))
    for one in (first, second):
        for turn, text in enumerate(turns):
            ids = one.token_ids[one.action_mask & (one.turn_index == turn)].tolist()
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        others = tokenizer.decode(one.token_ids[~one.action_mask].tolist())
        assert others.count("<tool_response>") == 2
        assert "error: multiply: missing a required argument: 'b'" in others
        assert "<tool_call>" not in others
        assert bool((one.sampler_logprobs[~one.action_mask] == 0).all())
        assert one.counts == {"tools/calls": 2, "tools/failed": 1}
    assert (first.rewards, second.rewards) == ([0, 0, 1], [0, 0, 0])
    assert "<tool_response>\n42\n</tool_response>" in script.seen[1][0]
    metrics = describe([first, second], supervised=False)
    assert (metrics["tools/calls"], metrics["tools/failed"]) == (4, 2)


def test_rows_groups_and_samples_are_one_for_each_record():
    tokenizer = training.make_policy()[1]
    env = TextEnv([Record("a")], reward=lambda state, action, record: 1.0)
    engine = Script(tokenizer, [])
    engine.generate = lambda prompts, params: []
    episodes = Episodes(engine, tokenizer, env)
    with pytest.raises(ValueError, match="groups must be 1 like records, got 2"):
        episodes.play([0], [0, 1], SamplingParams(2))
    with pytest.raises(ValueError, match=r"params\.rows must be 1 like records, got 2"):
        episodes.play([0], [0], SamplingParams(2, rows=[0, 1]))
    with pytest.raises(EngineError, match="the engine must give 1 samples, got 0"):
        episodes.play([0], [0], SamplingParams(2))


def test_the_trainer_scores_actions_alone():
    model, tokenizer = training.make_policy()
    env = ToolEnv(RECORDS, [multiply], response="{answer}")
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=training.make_config())
    turns = [call("multiply", a=6, b=7), "42"]
    script = Script(tokenizer, turns)
    batch = trainer.score(Episodes(script, tokenizer, env).play([0], [0], SamplingParams(99)))
    chosen = batch.targets[batch.mask].tolist()
    eos = tokenizer.eos_token
    assert tokenizer.decode(chosen) == eos.join(turns) + eos
    assert int((~batch.mask & batch.attention_mask[:, 1:].bool()).sum()) > 0
    assert torch.equal(batch.rewards, torch.tensor([1.0], dtype=batch.rewards.dtype))


def test_a_policy_learns_to_ask_a_tool():
    """Only the tool knows the letter, another one each time: chance asks and repeats it in 1 of 25 episodes."""
    letters = itertools.cycle("abccab")

    def look():
        return next(letters)

    def parse(action):
        return [ToolCall("look", {})] if action == "?" else []

    def repeated(state, action, record):
        return float(state[-1] in "abc" and action == state[-1])

    def asked(state, action, record):
        return 0.25 * (state == ">" and action == "?")

    env = ToolEnv(
        [Record(">")], [look], parse=parse, response="{answer}", reward=[repeated, asked], max_turns=2
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=5, max_position_embeddings=8, **sizes))
    steps = {"prompts_per_step": 1, "group_size": 32, "max_new_tokens": 1, "learning_rate": 2e-2, "steps": 40}
    config = TrainerConfig(**steps, max_grad_norm=None, threads=1)
    trainer = Trainer(model, training.Characters("?abc>"), env, algorithm=GRPO(), config=config)
    before = describe(trainer.collect(), supervised=False)
    trainer.train()
    after = describe(trainer.collect(), supervised=False)
    assert before["rewards/repeated/mean"] < 0.2
    assert after["rewards/repeated/mean"] > 0.8
    assert after["tools/calls"] > 0.8 * 32
