"""The parts of a run: folder, sources, answers, result table, stop requests."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from react_fast.envs import Record, TextEnv
from react_fast.envs.rewards import exact_match
from react_fast.trainer.env_config import EnvConfig
from react_fast.trainer.evaluation import answer
from react_fast.trainer.folder import RunFolder, UserError
from react_fast.trainer.interrupt import StopRequest
from react_fast.trainer.model import fresh_model
from react_fast.trainer.model_config import ModelConfig
from react_fast.trainer.results import Answers, compare, measure, table
from react_fast.trainer.sources import load_environments, load_policy

RECORDS = [Record(f"say {i}:", f"word {i}") for i in range(7)]


@pytest.fixture(scope="module")
def policy():
    return fresh_model([r.prompt for r in RECORDS], vocab_size=262, hidden_size=16, layers=1, heads=2)


def test_a_folder_remembers_what_is_finished(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False)
    assert folder.results == {}
    folder.finish("random", {"greedy": {"chrf": [1.0, 0.5, 2.0]}})
    folder.finish("warm_start", {"greedy": {"chrf": [9.0, 8.0, 10.0]}})
    folder.close()
    again = RunFolder(tmp_path / "run")
    again.open(resume=True)
    assert list(again.results) == ["random", "warm_start"]
    again.forget_from("warm_start")
    assert list(again.results) == ["random"]
    again.close()


def test_a_used_folder_needs_resume(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"already in use \(it holds config.yaml\)"):
        RunFolder(tmp_path).open(resume=False)
    folder = RunFolder(tmp_path)
    folder.open(resume=True)
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder(tmp_path).open(resume=True)
    folder.close()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        RunFolder(tmp_path / "file" / "run").open(resume=False)


def test_a_damaged_state_file_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json is damaged: not JSON"):
        _ = RunFolder(tmp_path).results


def test_answers_are_batch_invariant_seeded_and_leave_the_random_state(policy):
    env = TextEnv(RECORDS, reward=exact_match)
    state = torch.get_rng_state()
    runs = [answer(*policy, env, greedy=True, max_new_tokens=5, batch_size=size) for size in (1, 3, 64)]
    assert runs[0].responses == runs[1].responses == runs[2].responses
    sampled = [
        answer(*policy, env, greedy=False, max_new_tokens=5, seed=seed, batch_size=size)
        for seed, size in ((1, 64), (1, 2), (2, 64))
    ]
    assert sampled[0] == sampled[1]
    assert sampled[0].responses != sampled[2].responses
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].references == [[record.reference] for record in RECORDS]


def test_answers_take_every_turn(policy):
    seen = []

    def reward(state, action, record):
        seen.append(state)
        return 1.0

    env = TextEnv(RECORDS[:2], reward=reward, max_turns=3)
    answers = answer(*policy, env, greedy=True, max_new_tokens=2)
    assert answers.rewards == [3.0, 3.0]
    assert len(seen) == 6


def test_results_without_references_are_rewards_only():
    answers = Answers(["a", "b"], [0.0, 1.0], None)
    assert set(measure(answers, ["chrf"])) == {"reward"}
    assert measure(answers, [])["reward"][0] == 50.0


def test_intervals_hold_the_mean_and_shrink_with_its_standard_error():
    rewards = np.random.default_rng(1).random(400)
    value, low, high = measure(Answers([""] * 400, rewards.tolist(), None), [])["reward"]
    assert value == pytest.approx(100 * rewards.mean(), rel=1e-12)
    # A 95% interval of a mean is 2 * 1.96 standard errors wide; 1000 resamples know it to about 5%.
    width = 2 * 1.96 * 100 * rewards.std() / 20
    assert low < value < high
    assert high - low == pytest.approx(width, rel=0.15)


def test_a_paired_gain_has_no_interval_when_every_prompt_gains_the_same():
    before = Answers(["x"] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], None)
    after = Answers(["x"] * 5, [0.2, 0.3, 0.4, 0.5, 0.6], None)
    assert compare(before, after, [])["reward"] == pytest.approx([10.0, 10.0, 10.0], rel=1e-12)


def test_table_has_a_row_for_every_policy_and_mode():
    metrics = {"reward": [50.0, 40.0, 60.0], "chrf": [51.0, 41.0, 61.0]}
    both = {"sampled": metrics, "greedy": metrics}
    columns, rows = table({"random": both, "rl": both, "gain": {"sampled": {"reward": [3.0, -1.0, 7.0]}}})
    assert columns == ["policy", "chrF", "reward x100"]
    assert [row[0] for row in rows] == [
        "random policy, sampled at T=1",
        "RL, sampled at T=1",
        "RL minus warm start, sampled at T=1",
        "random policy, greedy",
        "RL, greedy",
    ]
    assert rows[0][1:] == ["51.0 [41.0, 61.0]", "50.0 [40.0, 60.0]"]
    assert rows[2][1:] == ["", "+3.0 [-1.0, +7.0]"]


def test_environments_come_from_files_and_are_cut_evenly(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "reference": "r"}) + "\n" for i in range(10)))
    files = {split: str(path) for split in ("train", "validation", "test")}
    envs = load_environments(EnvConfig(**files, eval_prompts=5, test_prompts=100, reward="exact_match"))
    assert {split: len(env.records) for split, env in envs.items()} == {
        "train": 10,
        "validation": 5,
        "test": 10,
    }
    assert [record.prompt for record in envs["validation"].records] == ["p0", "p2", "p4", "p6", "p8"]


def test_a_reward_can_be_any_function(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"prompt": "p"}\n')
    files = {split: str(path) for split in ("train", "validation", "test")}
    env = load_environments(EnvConfig(**files, reward=f"{__name__}:reward_of_length"))["test"]
    env.reset(options={"index": 0})
    assert env.step("four")[1] == 4.0


def reward_of_length(state, action, record):
    return float(len(action))


def test_the_model_has_the_dtype_asked_for():
    config = ModelConfig(vocab_size=260, hidden_size=16, layers=1, heads=2, dtype="float64")
    model, _ = load_policy(config, ["text"], seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_first_signal_asks_and_the_second_stops():
    lines = []
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(lines.append) as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        assert len(lines) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
