"""Text environments: Gymnasium's contract, replaceable f and g, rewards, metrics and the JSONL loader."""

import json
import pickle
import warnings

import gymnasium
import numpy as np
import pytest
import sacrebleu
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from react_fast.envs import Record, TextEnv, UnicodeText, load_jsonl
from react_fast.envs.metrics import corpus_difference, corpus_metric
from react_fast.envs.rewards import REWARDS, bleu, chrf, chrf_bleu, exact_match

RECORDS = [
    Record("Alemania", "Alemanha"),
    Record("el niño 🙂", "o menino"),
    Record("cañón", "canhão", {"n": 3}),
]


def reply(state, action, record):
    return f"{state}|{action}"


def length(state, action, record):
    return len(state) + len(action) / 100


def says_stop(state, record):
    return state.endswith("stop")


async def later(*arguments):
    return ""


def make_env():
    return TextEnv(RECORDS, transition=reply, reward=length, max_turns=2)


# --- Gymnasium's contract


@pytest.mark.parametrize(("max_turns", "terminal"), [(1, None), (3, None), (3, says_stop)])
def test_passes_gymnasiums_checker_without_a_warning(max_turns, terminal):
    env = TextEnv(RECORDS, max_turns=max_turns, terminal=terminal)
    # With a spec the checker can build a second one; without, it says that it cannot.
    env.spec = gymnasium.envs.registration.EnvSpec(
        "Text-v0", entry_point=TextEnv, kwargs={"records": RECORDS, "max_turns": max_turns}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


def test_episode_follows_the_equations():
    """S_0 = I, S_t = f(S_{t-1}, A_{t-1}, I), R_t = g(S_t, A_t, I, T)."""
    seen = []

    def f(state, action, record):
        seen.append(("f", state, action, record))
        return f"{state}+{action}"

    def g(state, action, record):
        seen.append(("g", state, action, record))
        return 0.5

    env = TextEnv(RECORDS, transition=f, reward=g, max_turns=2)
    state, info = env.reset(options={"index": 2})
    assert (state, info) == ("cañón", {"index": 2, "turn": 0})
    assert env.step("a") == ("cañón+a", 0.5, False, False, {"index": 2, "turn": 1})
    assert env.step("b") == ("cañón+a+b", 0.5, True, False, {"index": 2, "turn": 2})
    record = RECORDS[2]
    assert seen == [
        ("g", "cañón", "a", record), ("f", "cañón", "a", record),
        ("g", "cañón+a", "b", record), ("f", "cañón+a", "b", record),
    ]  # fmt: skip


def test_default_f_appends_the_action_and_one_turn_terminates():
    env = TextEnv(RECORDS)
    env.reset(options={"index": 0})
    assert env.step(" Alemanha") == ("Alemania Alemanha", 1.0, True, False, {"index": 0, "turn": 1})


def test_terminal_state_terminates_and_running_out_of_turns_truncates():
    env = TextEnv(RECORDS, transition=reply, reward=length, max_turns=2, terminal=says_stop)
    env.reset(seed=0)
    assert env.step("go")[2:4] == (False, False)
    assert env.step("go")[2:4] == (False, True)
    env.reset()
    assert env.step("stop")[2:4] == (True, False)
    env.reset()
    env.step("go")
    assert env.step("stop")[2:4] == (True, False)


def test_no_step_outside_an_episode():
    env = TextEnv(RECORDS)
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        env.step("x")
    env.reset()
    env.step("x")
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        env.step("x")


def test_seed_fixes_the_records_drawn():
    def drawn(seed):
        env = TextEnv([Record(str(i)) for i in range(1000)])
        return [env.reset(seed=seed)[0], *(env.reset()[0] for _ in range(5))]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_an_index_does_not_use_up_random_numbers():
    first, second = TextEnv(RECORDS * 100), TextEnv(RECORDS * 100)
    first.reset(seed=3)
    second.reset(seed=3)
    first.reset(options={"index": 1})
    assert first.reset()[1] == second.reset()[1]


def test_clone_goes_on_alone_from_the_same_state():
    env = TextEnv(RECORDS * 50, transition=reply, reward=length, max_turns=3)
    env.reset(seed=1)
    env.step("a")
    other = env.clone()
    assert other.records is env.records
    assert env.step("b") == other.step("b")
    assert env.step("left")[0] != other.step("right")[0]
    assert [env.reset()[0] for _ in range(5)] == [other.reset()[0] for _ in range(5)]


def test_pickle_keeps_the_episode():
    env = make_env()
    env.reset(seed=1)
    env.step("ñ")
    copy = pickle.loads(pickle.dumps(env))
    assert copy.step("b") == env.step("b")


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_vector_environments_carry_the_texts_unharmed(vector):
    makers = [make_env] * 2
    envs = (
        SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        if vector == "sync"
        else AsyncVectorEnv(makers, shared_memory=False, autoreset_mode=AutoresetMode.SAME_STEP)
    )
    try:
        states, info = envs.reset(seed=[1, 2], options={"index": 1})
        assert states == ("el niño 🙂", "el niño 🙂")
        assert info["index"].tolist() == [1, 1]
        states, rewards, terminated, truncated, _ = envs.step(("é 1", "中"))
        assert states == ("el niño 🙂|é 1", "el niño 🙂|中")
        np.testing.assert_allclose(rewards, [9.03, 9.01], rtol=1e-6)
        assert not terminated.any()
        states, _, terminated, truncated, info = envs.step(("x", "y"))
        assert terminated.all()
        assert not truncated.any()
        assert list(info["final_obs"]) == ["el niño 🙂|é 1|x", "el niño 🙂|中|y"]
    finally:
        envs.close()


def test_shared_memory_is_refused_instead_of_returning_garbage():
    with pytest.raises(ValueError, match="shared_memory=False"):
        AsyncVectorEnv([make_env])


# --- space


def test_space_holds_any_text_and_nothing_else():
    space = UnicodeText(10)
    for member in ("", "a b", "é\n中🙂", "x" * 10):
        assert member in space
    for stranger in ("x" * 11, "\ud800", b"x", 3, None):
        assert stranger not in space


def test_space_samples_are_seeded_members():
    first, second = UnicodeText(100, seed=5), UnicodeText(100, seed=5)
    samples = [first.sample() for _ in range(50)]
    assert samples == [second.sample() for _ in range(50)]
    assert all(sample and sample in first for sample in samples)
    assert any(not sample.isascii() for sample in samples)
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(ValueError, match="mask"):
        first.sample(mask=1)


# --- refusals


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "records must hold at least one", {"records": []}),
        (TypeError, "records must hold Record objects, got dict", {"records": [{"prompt": "x"}]}),
        (TypeError, "records must hold Record objects, got str", {"records": [Record("a"), "b"]}),
        (TypeError, "records must be a list of Record objects, got Record", {"records": Record("a")}),
        (TypeError, "records must be a list of Record objects, got str", {"records": "a"}),
        (ValueError, "max_turns must be at least 1, got 0", {"max_turns": 0}),
        (TypeError, "max_turns must be an integer, got float", {"max_turns": 1.5}),
        (TypeError, "terminal must be a plain function, got an asynch", {"terminal": later}),
        (TypeError, "transition must be a plain function, got an asynch", {"transition": later}),
        (TypeError, "max_turns must be an integer, got bool", {"max_turns": True}),
        (TypeError, "max_length must be an integer, got str", {"max_length": "9"}),
        (ValueError, "max_length must be at least 1, got 0", {"max_length": 0}),
        (TypeError, "transition must be a function, got str", {"transition": "append"}),
        (TypeError, "terminal must be a function, got bool", {"terminal": True}),
    ],
)
def test_constructor_refuses(error, match, arguments):
    with pytest.raises(error, match=match):
        TextEnv(**{"records": RECORDS, **arguments})


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (IndexError, r"options\['index'\] must be in \[0, 3\), got 3", {"index": 3}),
        (IndexError, r"must be in \[0, 3\), got -1", {"index": -1}),
        (TypeError, r"options\['index'\] must be an integer, got str", {"index": "1"}),
        (ValueError, "options may hold 'index', got 'idx'", {"idx": 1}),
    ],
)
def test_reset_refuses(error, match, options):
    with pytest.raises(error, match=match):
        TextEnv(RECORDS).reset(options=options)


@pytest.mark.parametrize(
    ("error", "match", "action", "arguments"),
    [
        (TypeError, "action must be a str, got int", 3, {}),
        (ValueError, "action must be UTF-8 text of at most 10 characters, got 11 characters", "x" * 11, {}),
        (
            TypeError,
            "the state from transition must be a str, got NoneType",
            "x",
            {"transition": lambda *_: None},
        ),
        (TypeError, "the result of reward must be a number, got NoneType", "x", {"reward": lambda *_: None}),
    ],
)
def test_step_refuses(error, match, action, arguments):
    env = TextEnv(RECORDS, max_length=10, **arguments)
    env.reset(seed=0)
    with pytest.raises(error, match=match):
        env.step(action)


# --- rewards and metrics


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_reward_is_one_for_the_reference_zero_for_nothing_alike_and_between_otherwise(reward):
    right, near = "ARG0 o menino\nARG1 na casa", "ARG0 o menino\nARG1 no rio"
    record = Record("", right)
    assert reward("", right, record) == pytest.approx(1)
    assert reward("", "", record) == 0
    assert reward("", "xyz", record) == 0
    assert 0 <= reward("", near, record) < 1
    assert reward("", right, Record("", "xyz", {"answers": ["xyz", right]})) == pytest.approx(1)
    with pytest.raises(ValueError, match="reference must be a str for this reward, got None"):
        reward("", "x", Record("x"))


def test_rewards_are_sacrebleus_sentence_scores():
    record, answer = Record("", "dólar das Bahamas"), "dólar da Bahamas"
    assert chrf("", answer, record) == sacrebleu.sentence_chrf(answer, ["dólar das Bahamas"]).score / 100
    expected = sacrebleu.sentence_bleu(answer, ["dólar das Bahamas"], use_effective_order=True).score / 100
    assert bleu("", answer, record) == expected
    assert chrf_bleu("", answer, record) == (chrf("", answer, record) + expected) / 2
    assert exact_match("", " dólar das Bahamas\n", record) == 1


HYPOTHESES = ["dólar das Bahamas", "Alemanha", "o rio", "metros quadrados", "xyz"]
REFERENCES = ["dólar bahamense", "Alemanha", "os rios", "metros quadrados", "o sul"]


@pytest.mark.parametrize("name", ["chrf", "bleu"])
def test_corpus_metric_is_sacrebleus_within_its_interval(name):
    metric = sacrebleu.CHRF() if name == "chrf" else sacrebleu.BLEU(effective_order=True)
    interval = corpus_metric(name, HYPOTHESES, REFERENCES)
    assert interval.value == pytest.approx(metric.corpus_score(HYPOTHESES, [REFERENCES]).score, abs=1e-9)
    assert interval.low <= interval.value <= interval.high
    assert interval == corpus_metric(name, HYPOTHESES, REFERENCES)
    assert corpus_metric(name, HYPOTHESES, REFERENCES, level=0.5).low >= interval.low


def test_interval_covers_the_true_value_as_often_as_it_says():
    """Segments are right or wrong by a coin; the corpus chrF of right ones alone is 100 times their share."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        hypotheses = ["abcdefgh" if coin else "zzzzzzzz" for coin in random.random(60) < 0.5]
        interval = corpus_metric("chrf", hypotheses, ["abcdefgh"] * 60, resamples=200, seed=trial)
        covered += interval.low <= 50 <= interval.high
    # Binomial(100, 0.95) is below 87 with probability under 0.1%.
    assert covered >= 87


def test_paired_difference_is_narrower_than_two_intervals():
    better = ["dólar bahamense", *HYPOTHESES[1:]]
    difference = corpus_difference("chrf", HYPOTHESES, better, REFERENCES)
    before, after = (corpus_metric("chrf", texts, REFERENCES) for texts in (HYPOTHESES, better))
    assert difference.value == pytest.approx(after.value - before.value)
    assert difference.low >= 0
    assert difference.high - difference.low < (after.high - after.low) + (before.high - before.low)
    assert corpus_difference("chrf", better, better, REFERENCES) == (0, 0, 0)


def test_corpus_metric_refuses():
    with pytest.raises(ValueError, match=r"name must be one of 'chrf', 'bleu', .*'span_f1', got 'rouge'"):
        corpus_metric("rouge", ["a"], ["a"])
    with pytest.raises(ValueError, match="equally many, at least 1, got 1 and 2"):
        corpus_metric("chrf", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="equally many, at least 1, got 0 and 0"):
        corpus_metric("bleu", [], [])


# --- JSONL


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [{"prompt": "niño\u2028x", "reference": "menino", "metadata": {"id": 1}}, {"prompt": "b"}]
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_jsonl(path) == [Record("niño\u2028x", "menino", {"id": 1}), Record("b")]
    assert load_jsonl(str(path)) == load_jsonl(path)


def test_jsonl_takes_preferences(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "metadata": {"by": "x"}}\n')
    assert load_jsonl(path) == [Record("a", "b", {"by": "x", "rejected": "c"})]


@pytest.mark.parametrize(
    ("error", "line", "message"),
    [
        (ValueError, b"{'prompt': 1}", "2: invalid JSON at column 2: "),
        (ValueError, b'{"prompt": "x"', "2: invalid JSON at column "),
        (ValueError, b'["x"]', "2: must be a JSON object, got list"),
        (ValueError, b'{"reference": "x"}', "2: field 'prompt' is missing"),
        (ValueError, b'{"prompt": ""}', "2: field 'prompt' is empty"),
        (ValueError, b'{"prompt": "x", "refrence": "y"}', "2: unknown field 'refrence'; known are"),
        (TypeError, b'{"prompt": 3}', "2: field 'prompt' must be a string or a list of messages, got int"),
        (TypeError, b'{"prompt": "x", "reference": ["y"]}', "2: field 'reference' must be a string or null"),
        (TypeError, b'{"prompt": "x", "metadata": "y"}', "2: field 'metadata' must be an object, got str"),
        (ValueError, b'{"prompt": "x", "chosen": "y"}', "2: field 'rejected' is missing"),
        (ValueError, b'{"prompt": "x", "rejected": "y"}', "2: field 'chosen' is missing"),
        (ValueError, b'{"prompt": "x", "chosen": "y", "rejected": "z", "reference": "y"}', "2: field 'refer"),
        (TypeError, b'{"prompt": "x", "chosen": null, "rejected": "z"}', "2: field 'chosen' must be a string"),
        (ValueError, b'{"prompt": "caf\xe9"}', "2: not UTF-8, byte 16 is 0xe9"),
        (ValueError, b'{"prompt": "\\ud800"}', "2: field 'prompt' is no Unicode text: it holds half"),
    ],
)  # fmt: skip
def test_jsonl_names_file_line_and_fault(tmp_path, error, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good"}\n')
    with pytest.raises(error) as caught:
        load_jsonl(path)
    assert str(caught.value).startswith(f"{path}:{message}")
    assert "\n" not in str(caught.value)


def test_jsonl_refuses_missing_empty_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        load_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no records"):
        load_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_jsonl(tmp_path)
