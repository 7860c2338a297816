"""Reward functions in the trainer: what it logs of them, and what it tells them."""

import math

import numpy as np
import pytest

from react_fast.envs import Record, RewardError, RewardFunction, TextEnv, TrainerState, WeightedRewards
from react_fast.trainer.algorithms import GRPO, ILQL
from react_fast.trainer.evaluation import answer
from react_fast.trainer.meters import describe, samples
from react_fast.trainer.trainer import Trainer

from . import training
from .training import vowels


def constant(state, action, record):
    return 1


def test_trainer_logs_every_part_and_counts_failures():
    async def shaky(state, action, record):
        if record.metadata["rejected"] == "J":
            raise ConnectionError("busy")
        return len(action)

    def sometimes(completions, completion_ids, log_metric, log_extra, **columns):
        log_extra("size", [len(c) for c in completions])
        log_metric("judge/rows", len(completions))
        log_metric("judge/rows", 0)
        assert all(ids and isinstance(ids[0], int) for ids in completion_ids)
        return [vowels("", c, None) if len(c) % 2 else None for c in completions]

    def never(state, action, record):
        return None

    judge = RewardFunction(shaky, name="judge", on_error="skip", weight=0.1)
    env = TextEnv(training.RECORDS, reward=[judge, sometimes, never, constant])
    model, tokenizer = training.make_policy()
    log = training.Log()
    config = training.make_config(steps=2, prompts_per_step=5, group_size=4)
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=config, reporter=log)
    played = trainer.collect()
    trainer.train()
    texts = [tokenizer.decode(t.token_ids[t.action_mask].tolist(), skip_special_tokens=True) for t in played]
    lengths = [len(x) for x, t in zip(texts, played, strict=True) if t.record != 4]
    odd = [vowels("", x, None) for x in texts if len(x) % 2]
    assert all(t.extra == {"size": len(x)} for x, t in zip(texts, played, strict=True))
    assert all(row["size"] == len(row["response"]) for row in samples(played, training.RECORDS, tokenizer))
    logged = log.metrics[0]
    whole = [sum(t.rewards) for t in played]
    assert logged["reward_std"] == pytest.approx(np.std(whole, ddof=1))
    assert logged["rewards/judge/mean"] == pytest.approx(np.mean(lengths))
    assert logged["rewards/judge/std"] == pytest.approx(np.std(lengths, ddof=1))
    assert logged["rewards/judge/failed"] == 4
    assert logged["rewards/sometimes/mean"] == pytest.approx(np.mean(odd))
    assert logged["rewards/constant/std"] == 0
    assert logged["judge/rows"] == 10
    assert logged["reward"] == pytest.approx(1 + (0.1 * sum(lengths) + sum(odd)) / 20)
    assert not any(name.startswith("rewards/never") for name in logged)
    assert all(math.isfinite(value) for metrics in log.metrics for value in metrics.values())


@pytest.mark.parametrize("name", ["loss", "reward", "entropy", "completions/mean_length", "time/rollout"])
def test_reward_functions_cannot_log_over_the_trainers_numbers(name):
    def logs(completions, log_metric, **columns):
        log_metric(name, 99.0)
        return [1.0] * len(completions)

    model, tokenizer = training.make_policy()
    env = TextEnv([Record("ab")], reward=logs)
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=training.make_config(steps=1))
    with pytest.raises(RewardError, match=f"a name that the trainer does not log, got '{name}'"):
        trainer.train()


@pytest.mark.parametrize(("last", "share"), [(0.1, 1.0), (0.2, 0.5)])
def test_groups_of_equal_rewards_are_counted_whatever_they_round_to(last, share):
    """The standard deviation of three times 0.1 is not 0 in float64."""
    env = TextEnv([Record("ab")], reward=lambda state, action, record: 0.1)
    model, tokenizer = training.make_policy()
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=training.make_config(group_size=6))
    played = trainer.collect()[:6]
    for i, trajectory in enumerate(played):
        trajectory.group = i // 3
    played[-1].rewards = [last]
    assert np.std([0.1] * 3) > 0
    assert describe(played, supervised=False)["frac_reward_zero_std"] == share


def test_parts_of_turns_add_up():
    env = TextEnv(training.RECORDS, reward=[RewardFunction(lambda s, a, r: len(s), name="seen")], max_turns=3)
    model, tokenizer = training.make_policy()
    played = Trainer(model, tokenizer, env, algorithm=GRPO(), config=training.make_config()).collect()
    assert len({len(t.rewards) for t in played}) == 1
    assert [t.reward_parts for t in played] == [{"seen": sum(t.rewards)} for t in played]


def test_counts_of_a_function_are_sums_of_a_step():
    def judge(completions, log_count, **columns):
        assert "log_count" not in columns
        log_count("long", [float(len(c) > 2) for c in completions])
        return [1.0] * len(completions)

    def plain(completions, **columns):
        assert "log_count" not in columns, "TRL's functions know no such thing"
        return [0.0] * len(completions)

    model, tokenizer = training.make_policy()
    env = TextEnv(training.RECORDS, reward=[judge, plain])
    log = training.Log()
    config = training.make_config(steps=1)
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=config, reporter=log)
    texts = [
        tokenizer.decode(t.token_ids[t.action_mask], skip_special_tokens=True) for t in trainer.collect()
    ]
    trainer.train()
    assert log.metrics[0]["rewards/judge/long"] == sum(len(text) > 2 for text in texts)
    with pytest.raises(RewardError, match="log_count needs 1 values for 'long', got"):
        WeightedRewards([lambda completions, log_count: log_count("long", [1, 2])])("a", "b", Record("a"))


# --- trainer_state


def spying(seen):
    def judge(completions, trainer_state, **columns):
        seen.append(trainer_state)
        return [float(len(c)) for c in completions]

    return judge


def state(step, steps=4):
    return TrainerState(step, steps, step * 2 / len(training.RECORDS), True, True)


def test_functions_know_the_step_in_training_evaluation_and_after_a_resume(tmp_path):
    seen, held_out = [], []
    keys = {"checkpoint_dir": str(tmp_path), "save_every": 1, "eval_every": 2, "keep_checkpoints": 9}
    config = training.make_config(steps=4, **keys)

    def trainer():
        model, tokenizer = training.make_policy()
        envs = [TextEnv(training.RECORDS, reward=spying(calls)) for calls in (seen, held_out)]
        return Trainer(model, tokenizer, envs[0], algorithm=GRPO(), config=config, eval_env=envs[1])

    one = trainer()
    one.train()
    assert seen == [state(step) for step in range(4)]
    assert held_out == [state(2), state(4)]
    one.evaluate(TextEnv(training.RECORDS, reward=spying(held_out)))
    assert held_out[-1] == state(4)
    answer(one.model, one.tokenizer, one.env, greedy=True, max_new_tokens=2)
    assert seen.pop() == state(4), "whatever else is played with the environment later"
    seen.clear()
    trainer().train(resume=tmp_path / "step-00000002")
    assert seen == [state(2), state(3)]
    assert (seen[0].global_step, seen[0].max_steps, seen[0].is_world_process_zero) == (2, 4, True)
    with pytest.raises(AttributeError):
        seen[0].global_step = 3


def test_rewards_of_written_answers_know_it_too():
    seen = []
    model, tokenizer = training.make_policy()
    env = TextEnv(training.RECORDS, reward=spying(seen))
    Trainer(model, tokenizer, env, algorithm=ILQL(), config=training.make_config(steps=2)).train()
    assert {one.global_step for one in seen} == {0, 1}


def test_outside_of_a_trainer_there_is_no_state():
    seen = []
    WeightedRewards([spying(seen)])("a", "b", Record("a"))
    TextEnv([Record("a")], reward=lambda s, a, r: 1.0).inform(state(1))
    assert seen == [None]
