"""Every algorithm learns a task at which a random policy fails, and refuses what it cannot work with."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from react_fast.envs import Record, TextEnv
from react_fast.trainer import algorithms
from react_fast.trainer.algorithms import ALGORITHMS
from react_fast.trainer.batch import collate
from react_fast.trainer.config import AlgorithmConfig, RunConfig, TrainerConfig
from react_fast.trainer.folder import UserError
from react_fast.trainer.section import ConfigError
from react_fast.trainer.sources import make_algorithm
from react_fast.trainer.trainer import Trainer

from .policies import Recurrent
from .training import weights

LETTERS = "abcdefghijklmnop"


class Letters:
    """A token a letter."""

    eos_token_id, pad_token_id = None, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(LETTERS[i] for i in ids)


def _reward(state: str, action: str, record: Record) -> float:
    return float(action == record.reference)


def _task() -> TextEnv:
    """The letter after the prompt's: chance finds one in sixteen. A preference knows a wrong answer, too."""
    after = LETTERS[1:] + LETTERS[:1]
    pairs = zip(LETTERS, after, strict=True)
    return TextEnv([Record(a, b, {"rejected": a}) for a, b in pairs], reward=_reward)


def _model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(LETTERS), max_position_embeddings=8, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _trainer(algorithm: Any, **changes: Any) -> Trainer:
    few = {"prompts_per_step": 16, "group_size": 8, "max_new_tokens": 1, "learning_rate": 1e-2, "steps": 20}
    config = TrainerConfig(**{**few, "max_grad_norm": None, "threads": 1, **changes})
    return Trainer(_model(), Letters(), _task(), algorithm=algorithm, config=config, eval_env=_task())


OFF_POLICY = {"steps": 24, "epochs": 2}
# Where an algorithm takes other settings than those above; recipes for old samples get some.
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"group_size": 1, "steps": 10},
    "dpo": {"group_size": 1, "steps": 10},
    "online_dpo": {"steps": 40},
    "dqn": {"steps": 60, "epochs": 2},
    "soft_q": {"steps": 60, "epochs": 2, "temperature": 0.1},
    "ilql": {"group_size": 1, "steps": 10},
    **dict.fromkeys(("ppo", "gspo", "cispo", "gmpo", "sapo", "rloo"), OFF_POLICY),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learns_what_chance_does_not_find(name):
    trainer = _trainer(ALGORITHMS[name](), **SETTINGS.get(name, {}))
    assert trainer.evaluate()["eval/reward"] < 0.2
    found = 0.0
    while found < 0.9 and trainer.step < trainer.config.steps:
        for _ in range(3):
            trainer.train_step()
        found = trainer.evaluate()["eval/reward"]
    assert found >= 0.9


def test_the_table_is_documented():
    rows = [line.split("|")[1].strip() for line in (algorithms.__doc__ or "").splitlines() if "|" in line]
    assert rows[2:] == list(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_batch_without_actions_changes_nothing(name):
    changes: dict[str, Any] = {"optimizer": "sgd", "prompts_per_step": 2, "group_size": 2, "minibatches": 2}
    if name not in ("dqn", "soft_q"):
        changes |= {"kl_coef": 0.1, "entropy_coef": 0.01}
    trainer = _trainer(ALGORITHMS[name](), **changes)
    trajectories = trainer.collect()
    for trajectory in trajectories:
        trajectory.action_mask[:] = False
    before = weights(trainer.policy)
    metrics = trainer.update(trainer.credit(trainer.score(trainer.algorithm.select(trajectories))))
    assert metrics["loss"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert torch.equal(weights(trainer.policy), before)


def _scored(trainer: Trainer, rewards: list[float]) -> Any:
    """The step's batch with other rewards."""
    trajectories = trainer.collect()
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        trajectory.rewards = [reward]
    return trainer.credit(trainer.score(trainer.algorithm.select(trajectories)))


def test_dapo_leaves_out_groups_of_equal_reward_and_long_answers_pay():
    sizes = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4}
    trainer = _trainer(algorithms.DAPO(), **sizes)
    batch = _scored(trainer, [1.0, 1.0, 1.0, 0.0])
    assert batch.mask.any(1).tolist() == [False, False, True, True]
    assert int(trainer.algorithm.denominator(trainer.config, batch)) == 8  # two answers of four tokens
    strict = algorithms.DAPO(overlong_buffer=4)
    part = collate(trainer.collect(), 0, torch.device("cpu"))
    expected = part.rewards - torch.tensor([1.0] * 4)  # all use the whole buffer
    torch.testing.assert_close(strict.rewards(trainer.config, part), expected)
    part.mask[0, 2:] = False
    assert float(strict.rewards(trainer.config, part)[0]) == float(part.rewards[0]) - 0.5


def test_dr_grpo_divides_by_a_constant():
    trainer = _trainer(algorithms.DrGRPO(), prompts_per_step=2, group_size=2, max_new_tokens=4)
    batch = _scored(trainer, [1.0, 0.0, 1.0, 0.0])
    batch.mask[0, 1:] = False
    assert batch.advantages.tolist() == [0.5, -0.5, 0.5, -0.5]
    assert int(trainer.algorithm.denominator(trainer.config, batch)) == 4 * 4


def test_ppo_first_values_a_state_at_nothing_then_at_its_return():
    trainer = _trainer(algorithms.PPO(whiten=False, value_clip=None), group_size=2, steps=40)
    trainer.env.reward = lambda state, action, record: 1.0
    batch = trainer.credit(trainer.score(trainer.collect()))
    assert bool((batch.heads["value"] == 0).all())
    assert bool((batch.returns[batch.mask] == 1).all())
    assert trainer.train()["value/mean"] == pytest.approx(1, abs=0.1)


def test_dpo_begins_at_log_two_and_prefers_what_is_chosen():
    trainer = _trainer(algorithms.DPO(), group_size=1, steps=10)
    first = trainer.train_step()
    assert first["loss"] == pytest.approx(math.log(2))
    assert first["rewards/margins"] == first["rewards/accuracies"] == 0
    last = trainer.train()
    assert last["rewards/accuracies"] == 1
    assert last["rewards/chosen"] - last["rewards/rejected"] == pytest.approx(last["rewards/margins"])
    assert last["logps/chosen"] > last["logps/rejected"]
    assert trainer.evaluate()["eval/loss"] < first["loss"]


def test_online_dpo_compares_the_best_with_the_worst():
    trainer = _trainer(algorithms.OnlineDPO(), prompts_per_step=2, group_size=3)
    trajectories = trainer.collect()
    for trajectory, reward in zip(trajectories, [0.5, 1.0, 0.0, 1.0, 1.0, 1.0], strict=True):
        trajectory.rewards = [reward]
    chosen = trainer.algorithm.select(trajectories)
    assert [one is trajectories[i] for one, i in zip(chosen, [1, 2, 3, 5], strict=True)] == [True] * 4
    batch = trainer.credit(trainer.score(chosen))
    assert batch.advantages.tolist() == [1, -1, 0, 0]
    assert int(trainer.algorithm.denominator(trainer.config, batch)) == 1


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (algorithms.PPO, {"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        (algorithms.PPO, {"value_clip": 0}, ValueError, r"value_clip must be in \(0, inf\], got 0"),
        (algorithms.PPO, {"whiten": 1}, TypeError, "whiten must be true or false, got 1"),
        (algorithms.PPO, {"ratio_max": 0.5}, ValueError, "ratio_min and ratio_max must satisfy"),
        (algorithms.PPO, {"kl_in_reward": "yes"}, TypeError, "kl_in_reward must be true or false, got 'yes'"),
        (
            algorithms.A2C,
            {"aggregation": "seq_mean_token_sum"},
            ValueError,
            "aggregation must be one of 'token",
        ),
        (algorithms.ReinforcePlusPlus, {"gamma": -1}, ValueError, r"gamma must be in \[0, 1\], got -1"),
        (
            algorithms.DAPO,
            {"overlong_buffer": 0.5},
            TypeError,
            "overlong_buffer must be a whole number, got 0.5",
        ),
        (algorithms.GMPO, {"ratio_min": 0.0}, ValueError, "ratio_min must be above 0, got 0"),
        (algorithms.SAPO, {"tau_neg": 0}, ValueError, r"tau_neg must be in \(0, inf\], got 0"),
        (algorithms.DPO, {"beta": 0}, ValueError, r"beta must be in \(0, inf\], got 0"),
        (
            algorithms.DPO,
            {"loss_type": "kto"},
            ValueError,
            "loss_type must be one of 'sigmoid', .* got 'kto'",
        ),
        (algorithms.DPO, {"label_smoothing": 0.6}, ValueError, r"label_smoothing must be in \[0, 0.5\]"),
        (
            algorithms.DPO,
            {"label_smoothing": 0.1, "loss_type": "ipo"},
            ValueError,
            "must be 0 with loss_type 'ipo', got 0.1",
        ),
    ],
)
def test_wrong_options_are_refused_when_made(make, options, error, text):
    with pytest.raises(error, match=text) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "changes", "text"),
    [
        (algorithms.A2C(), {"epochs": 2}, r"trainer\.epochs must be 1 for A2C, .* got 2"),
        (algorithms.PPO(), {"credit": "monte_carlo"}, r"trainer\.credit must not be 'monte_carlo' for PPO"),
        (algorithms.OnlineDPO(), {"group_size": 1}, r"trainer\.group_size must be at least 2 for OnlineDPO"),
        (algorithms.OnlineDPO(), {"credit": "causal"}, r"trainer\.credit must be 'uniform' for OnlineDPO"),
        (
            algorithms.DAPO(overlong_buffer=9),
            {},
            r"overlong_buffer must be at most trainer\.max_new_tokens, 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_trained(algorithm, changes, text):
    with pytest.raises(ValueError, match=text):
        _trainer(algorithm, **changes)


def test_models_and_records_that_lack_something_are_refused_in_one_line():
    env = TextEnv([Record("a", "b")], reward=_reward)
    trainer = Trainer(_model(), Letters(), env, algorithm=algorithms.DPO())
    with pytest.raises(ValueError, match=r"records\[0\]\.metadata\['rejected'\] must be a text .* got None"):
        trainer.collect()
    with pytest.raises(
        ValueError, match=r"model must be a Hugging Face causal LM .* \(value\), got Recurrent"
    ):
        Trainer(Recurrent(), Letters(), env, algorithm=algorithms.PPO())


def test_the_configuration_knows_the_table():
    assert AlgorithmConfig(name="rloo").name == "rloo"
    with pytest.raises(ConfigError, match=r"^name must be one of sft, .* got 'gropo'; did you mean grpo\?$"):
        AlgorithmConfig(name="gropo")
    with pytest.raises(ConfigError, match=r"^algorithm\.name must be one of "):
        RunConfig(algorithm={"name": "xyzzy"})
    config = RunConfig(algorithm={"name": "a2c"}, trainer={"epochs": 3})
    with pytest.raises(UserError, match=r"trainer\.epochs must be 1 for A2C"):
        make_algorithm(config)
