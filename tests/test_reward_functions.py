"""Rewards from users' functions: TRL's form, several with weights, batched, asynchronous, late and failing."""

import asyncio
import functools
import math
import pickle
import threading

import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from react_fast.envs import Record, RewardError, RewardFunction, TextEnv, WeightedRewards, calls, reward

RECORDS = [Record("ab", "AB", {"level": 1}), Record("cde", None, {"level": 2, "kind": "x"}), Record("f", "F")]


def length(state, action, record):
    return len(action) / 10


def trl(prompts, completions, level, **columns):
    return [len(p) + len(c) + (n or 0) for p, c, n in zip(prompts, completions, level, strict=True)]


def constant(state, action, record):
    return 1


@reward(weight=0.5, name="upper")
def only_with_reference(state, action, record):
    return None if record.reference is None else float(action == record.reference)


async def slowly(state, action, record):
    await asyncio.sleep(0.02)
    return len(action)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.01)


def begun(rewards, **options):
    env = TextEnv(RECORDS, reward=rewards, **options)
    envs = [env.clone() for _ in RECORDS]
    for i, one in enumerate(envs):
        one.reset(seed=i, options={"index": i})
    return envs


ANSWERS = ["AB", "x", ""]


@pytest.mark.parametrize(
    "rewards",
    [
        length,
        trl,
        slowly,
        [length, trl, only_with_reference],
        WeightedRewards(
            [slowly, RewardFunction(lambda s, a, r: [len(x) for x in a], batched=True, name="b")]
        ),
        [RewardFunction(length, timeout=5)],
    ],
    ids=["plain", "trl", "async", "several", "batched", "timeout"],
)
@pytest.mark.parametrize("max_turns", [1, 2])
def test_many_at_once_is_step_by_step(rewards, max_turns):
    together, alone = begun(rewards, max_turns=max_turns), begun(rewards, max_turns=max_turns)
    for _ in range(max_turns):
        expected = [env.step(action) for env, action in zip(alone, ANSWERS, strict=True)]
        assert TextEnv.step_many(together, ANSWERS) == expected


def test_total_is_the_weighted_sum_of_what_applies():
    rewards = WeightedRewards([length, trl, only_with_reference], weights=[10, 2, 0.5])
    steps = TextEnv.step_many(begun(rewards), ANSWERS)
    assert [s[1] for s in steps] == pytest.approx([10 * 0.2 + 2 * 5 + 0.5, 1 + 2 * 6, 2 * 1])
    assert [s[4]["rewards"] for s in steps] == [
        {"length": 0.2, "trl": 5, "upper": 1},
        {"length": 0.1, "trl": 6, "upper": None},
        {"length": 0, "trl": 1, "upper": 0},
    ]
    assert rewards("ab", "AB", RECORDS[0]) == steps[0][1]


def test_trls_form_gets_the_columns_in_one_call():
    seen = []

    def judge(prompts, completions, completion_ids=None, trainer_state="?", **columns):
        columns.pop("log_metric")("n", 2)
        columns.pop("log_extra")("first", [c[:1] for c in completions])
        seen.append((prompts, completions, completion_ids, trainer_state, columns))
        return [1.0] * len(prompts)

    steps = TextEnv.step_many(begun(judge), ANSWERS, ids=[[1, 2], [3], []])
    assert [step[4]["logged"] for step in steps] == [{"n": 2}] * 3
    columns = {"level": [1, 2, None], "kind": [None, "x", None], "reference": ["AB", None, "F"]}
    assert seen == [(["ab", "cde", "f"], ANSWERS, [[1, 2], [3], []], None, columns)]


def test_a_turn_without_reward_is_allowed_an_episode_is_not():
    def at_the_end(state, action, record):
        return 3.0 if len(state) > 2 else None

    env = TextEnv([Record("ab")], reward=[at_the_end], max_turns=2)
    env.reset(options={"index": 0})
    assert env.step("c")[1] == 0
    assert env.step("d")[1] == 3
    env.reset(options={"index": 0})
    env.step("")
    with pytest.raises(RewardError, match="no reward applies to the record with prompt 'ab': all gave None"):
        env.step("")
    with pytest.raises(RewardError, match="no reward applies"):
        env.reward("ab", "x", Record("ab"))


def test_rows_of_an_asynchronous_function_run_together_up_to_the_limit():
    active, most = 0, 0

    async def counted(state, action, record):
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.02)
        active -= 1
        return 1

    env = TextEnv(RECORDS, reward=[RewardFunction(counted, concurrency=4)])
    envs = [env.clone() for _ in range(12)]
    for one in envs:
        one.reset(seed=0)
    assert [s[1] for s in TextEnv.step_many(envs, ["x"] * 12)] == [1] * 12
    assert most == 4


def test_slow_functions_run_beside_each_other_and_beside_plain_ones():
    order, meet = [], threading.Barrier(3, timeout=5)  # passed by three that run at one time alone

    async def first(state, action, record):
        await asyncio.get_running_loop().run_in_executor(None, meet.wait)
        return 1

    def second(completions, **columns):
        meet.wait()
        return [2] * len(completions)

    def third(state, action, record):
        meet.wait()
        order.append(threading.current_thread() is threading.main_thread())
        return 3

    functions = [first, RewardFunction(second, timeout=5), third]
    assert begun(functions)[0].step("x")[1] == 6
    assert order == [True]
    assert WeightedRewards(functions).many([]) == []


def test_works_inside_a_running_loop():
    async def notebook():
        return begun(slowly)[0].step("abc")[1]

    assert asyncio.run(notebook()) == 3


@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_timeout(asynchronous):
    finished, over = [], threading.Event()

    def hangs(state, action, record):
        if action == "x":
            over.wait(10)
            finished.append(action)
        return 1

    async def waits(state, action, record):
        if action == "x":
            await asyncio.sleep(10)
            finished.append(action)
        return 1

    def judged(on_error):
        options = {"timeout": 0.05, "on_error": on_error, "name": "judge"}
        return [RewardFunction(waits if asynchronous else hangs, **options), length]

    with pytest.raises(RewardError) as caught:
        TextEnv.step_many(begun(judged("raise")), ANSWERS)
    assert str(caught.value) == (
        "reward 'judge' failed on row 1, prompt 'cde': TimeoutError: no answer within 0.05 s"
    )
    skipped = TextEnv.step_many(begun(judged("skip")), ANSWERS)
    assert [s[1] for s in skipped] == pytest.approx([1.2, 0.1, 1])
    assert [s[4].get("counts") for s in skipped] == [None, {"rewards/judge/failed": 1}, None]
    assert TextEnv.step_many(begun(judged(-2)), ANSWERS)[1][1] == pytest.approx(-1.9)
    assert finished == [], "a call that hangs must not be waited for"
    over.set()


@pytest.mark.parametrize("kind", ["plain", "thread", "async"])
def test_retries(kind):
    tries = []

    def shaky(state, action, record):
        tries.append(threading.current_thread() is threading.main_thread())
        if len(tries) < 3:
            raise ConnectionError("busy\nsecond line")
        return 1.0

    async def also(state, action, record):
        return shaky(state, action, record)

    function = functools.partial(RewardFunction, also if kind == "async" else shaky, name="judge")
    timeout = None if kind == "plain" else 5
    assert begun([function(retries=2, timeout=timeout)])[0].step("x")[1] == 1
    assert tries == [kind == "plain"] * 3
    tries.clear()
    with pytest.raises(RewardError, match=r"'judge' failed on row 0, prompt 'ab': ConnectionError: busy$"):
        begun([function(retries=1, timeout=timeout)])[0].step("x")
    assert len(tries) == 2


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (lambda s, a, r: math.nan, "must give a finite number or None, got 'nan'"),
        (lambda s, a, r: -math.inf, "must give a finite number or None, got '-inf'"),
        (lambda s, a, r: "1", "must give a finite number or None, got '1'"),
        (lambda s, a, r: 10**400, "must give a finite number or None, got '1000"),
        (lambda completions, **_: [1.0], "must give a list of 3 rewards, got list [1.0]"),
        (lambda completions, **_: 1.0, "must give a list of 3 rewards, got float 1.0"),
        (lambda completions, **_: "abc", "must give a list of 3 rewards, got str 'abc'"),
        (lambda completions, **_: {1.0, 2.0, 3.0}, "must give a list of 3 rewards, got set {1.0, 2.0, 3.0}"),
        (lambda completions, **_: np.array(1.0), "must give a list of 3 rewards, got ndarray array(1.)"),
        (
            lambda completions, log_metric: log_metric("n", math.nan),
            "log_metric needs a finite number for 'n', got nan",
        ),
        (
            lambda completions, log_extra: log_extra("x", ["a"]),
            "log_extra needs 3 values for 'x', got ['a']",
        ),
        (lambda completions, log_extra: log_extra("x", "abc"), "log_extra needs 3 values for 'x', got 'abc'"),
        (lambda completions, **_: exec("raise SystemExit(3)"), "RuntimeError: SystemExit(3)"),
    ],
)
def test_what_is_no_reward_is_an_error_and_never_a_zero(function, cause):
    check_refused(function, cause)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, asyncio.CancelledError]
)
def test_what_would_end_the_loop_or_the_run_is_an_error_of_its_call(error):
    def late(state, action, record):
        raise error("now")

    async def awaited(state, action, record):
        raise error("now")

    check_refused(late, "RuntimeError: ", timeout=5)
    check_refused(awaited, "RuntimeError: ")
    if error is SystemExit:
        check_refused(late, "RuntimeError: SystemExit('now')")
    assert len(TextEnv.step_many(begun([slowly]), ANSWERS)) == 3


def test_an_asynchronous_function_that_waits_for_another_is_an_error_and_no_wait_forever():
    async def nested(state, action, record):
        return TextEnv.step_many(begun([slowly]), ANSWERS)[0][1]

    check_refused(nested, "RuntimeError: an asynchronous function must not wait for calls of another one")


def check_refused(function, cause, **slow):
    with pytest.raises(RewardError) as caught:
        TextEnv.step_many(begun([RewardFunction(function, name="mine", **slow)]), ANSWERS)
    assert str(caught.value).startswith("reward 'mine' failed on row 0, prompt 'ab': ")
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(RewardError, match="no reward applies"):
        TextEnv.step_many(begun([RewardFunction(function, on_error="skip", **slow)]), ANSWERS)


def test_a_marked_function_stays_a_function_and_keeps_its_options():
    assert only_with_reference("", "AB", RECORDS[0]) == 1
    env = pickle.loads(pickle.dumps(TextEnv(RECORDS, reward=only_with_reference)))
    env.reset(options={"index": 0})
    assert env.step("AB")[1] == 0.5


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "weight must be a finite number, got nan", {"weight": math.nan}),
        (ValueError, "weight must be a finite number, got '1'", {"weight": "1"}),
        (TypeError, "name must be a text or None, got 3", {"name": 3}),
        (TypeError, "timeout must be a number, got str", {"timeout": "1"}),
        (ValueError, "timeout must be a positive number of seconds, got 0", {"timeout": 0}),
        (ValueError, "retries must be at least 0, got -1", {"retries": -1}),
        (TypeError, "retries must be an integer, got float", {"retries": 1.0}),
        (ValueError, "concurrency must be at least 1, got 0", {"concurrency": 0}),
        (ValueError, "on_error must be 'raise', 'skip' or a finite number, got 'zero'", {"on_error": "zero"}),
        (ValueError, "on_error must be 'raise', 'skip' or a finite number, got inf", {"on_error": math.inf}),
        (TypeError, "batched must be True, False or None, got 'yes'", {"batched": "yes"}),
        (TypeError, "batched must be True, False or None, got 1", {"batched": 1}),
        (TypeError, "unexpected keyword argument 'wait'", {"wait": 1}),
    ],
)
def test_options_refused_where_the_function_is_defined(error, match, options):
    with pytest.raises(error, match=match):
        reward(**options)(length)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "weights must be a list of numbers or None, got int", ([length], 1)),
        (TypeError, "weights must be a list of numbers or None, got str", ([length], "1")),
        (ValueError, "functions must hold at least one function, got none", ([],)),
        (TypeError, "functions must be a list of functions, got str", ("length",)),
        (TypeError, "function must be callable, got int", ([1],)),
        (ValueError, "weights must be 2 like functions, got 1", ([length, trl], [1])),
        (ValueError, "functions must have names of their own, got 'length' twice", ([length, length],)),
    ],
)
def test_weighted_rewards_refuse(error, match, arguments):
    with pytest.raises(error, match=match):
        WeightedRewards(*arguments)


def test_one_reward_function_is_a_list_of_one():
    one = TextEnv.step_many(begun(RewardFunction(constant, weight=2.0)), ANSWERS)
    assert one == TextEnv.step_many(begun([RewardFunction(constant, weight=2.0)]), ANSWERS)
    assert [step[1] for step in one] == [2.0] * 3


@pytest.mark.parametrize("weights", [[1e10, 1.0], [1e10, -1e10]])
def test_a_sum_that_is_too_large_is_an_error(weights):
    def one(state, action, record):
        return 1e308

    def other(state, action, record):
        return 1e308

    with pytest.raises(RewardError, match="the sum of weight x reward must be finite, got "):
        begun(WeightedRewards([one, other], weights))[0].step("x")


def test_what_cannot_be_marked_is_told():
    with pytest.raises(TypeError, match="can be marked, got builtin_function_or_method; use RewardFunction"):
        reward(len)


def test_a_plain_reward_that_is_a_text_is_refused():
    with pytest.raises(TypeError, match="the result of reward must be a number, got str"):
        begun(lambda state, action, record: "3.0")[0].step("x")


def test_env_refuses_what_is_no_reward():
    with pytest.raises(TypeError, match="reward must be a function or a list of functions, got str"):
        TextEnv(RECORDS, reward="chrf")


@pytest.mark.parametrize("vector", [SyncVectorEnv, functools.partial(AsyncVectorEnv, shared_memory=False)])
def test_in_vector_environments(vector):
    """Asynchronous functions run in the processes of AsyncVectorEnv, too, which inherit none of the loop."""
    assert begun(slowly)[0].step("abc")[1] == 3
    envs = vector([functools.partial(TextEnv, RECORDS, reward=[slowly, only_with_reference])] * 2)
    try:
        envs.reset(options={"index": 1})
        _, rewards, _, _, info = envs.step(("x", "four"))
        assert rewards.tolist() == [1, 4]
        assert info["rewards"]["slowly"].tolist() == [1, 4]
        assert info["rewards"]["upper"].tolist() == [None, None]
    finally:
        envs.close()
