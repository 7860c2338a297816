"""Every algorithm equals its equations in plain loops: parameters and metrics after every update."""

from typing import Any

import pytest
import torch

from react_fast.envs import Record
from react_fast.trainer import algorithms
from react_fast.trainer.algorithms import ALGORITHMS

from .training import make_config as config
from .training import make_env, twins, weights

SFT, REINFORCE, GRPO = algorithms.SFT, algorithms.REINFORCE, algorithms.GRPO
OFF_POLICY = {"minibatches": 2, "epochs": 2}
KL = {"kl_coef": 0.1}

# Every algorithm, and each part of the update that changes the numbers, at least once.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (SFT(), {}),
    "sft of prompts, too": (SFT(learns="all"), {}),
    "sft warm-up and cosine": (SFT(), {"lr_warmup_steps": 2, "lr_schedule": "cosine", "weight_decay": 0.1}),
    "reinforce": (REINFORCE(), {}),
    "reinforce discounted, group baseline, whitened": (
        REINFORCE(gamma=0.9, baseline="group", whiten=True, aggregation="seq_mean_token_mean"),
        {"entropy_coef": 0.01},
    ),
    "grpo": (GRPO(), {}),
    "grpo off policy": (GRPO(ratio_max=1.28), {**OFF_POLICY, "lr_schedule": "linear"}),
    "grpo with KL": (GRPO(), {**KL, "temperature": 0.7, "optimizer": "adam"}),
    "grpo k2, sequences": (
        GRPO(kl_estimator="k2", kl_gradient="value", aggregation="seq_mean_token_sum", scale="none"),
        {**KL, "minibatches": 2, "optimizer": "sgd"},
    ),
    "grpo of a batch's spread, KL in the reward": (GRPO(scale="batch_std", kl_in_reward=True), KL),
    "reinforce with KL in the reward": (REINFORCE(gamma=0.9, kl_in_reward=True), KL),
    "a2c": (algorithms.A2C(gamma=0.95, value_clip=0.1), {"minibatches": 2, **KL}),
    "ppo": (algorithms.PPO(), {**OFF_POLICY, **KL, "micro_batch": 2}),
    "ppo once, KL in the loss, not whitened": (
        algorithms.PPO(gamma=0.9, lam=0.8, whiten=False, kl_in_reward=False, value_coef=0.1),
        {**KL, "entropy_coef": 0.01},
    ),
    "dapo": (algorithms.DAPO(overlong_buffer=3), OFF_POLICY),
    "dr_grpo": (algorithms.DrGRPO(), {"minibatches": 2, "micro_batch": 1}),
    "gspo": (algorithms.GSPO(), OFF_POLICY),
    "cispo": (algorithms.CISPO(ratio_max=1.1), OFF_POLICY),
    "gmpo": (algorithms.GMPO(ratio_max=1.1), OFF_POLICY),
    "sapo": (algorithms.SAPO(), {**OFF_POLICY, "micro_batch": 2}),
    "rloo": (algorithms.RLOO(), {**KL, "epochs": 2}),
    "reinforce_pp": (algorithms.ReinforcePlusPlus(gamma=0.95), {**KL, "minibatches": 2}),
    "reinforce_pp_baseline": (algorithms.ReinforcePlusPlusBaseline(), {**KL, "minibatches": 2}),
    "dpo": (algorithms.DPO(), {"group_size": 1, "prompts_per_step": 4, "epochs": 2, "micro_batch": 2}),
    "dpo smoothed": (algorithms.DPO(beta=0.5, label_smoothing=0.2), {"group_size": 1, "minibatches": 2}),
    "dpo ipo": (algorithms.DPO(loss_type="ipo"), {"group_size": 1}),
    "dpo hinge": (algorithms.DPO(loss_type="hinge", beta=2.0), {"group_size": 1}),
    "online_dpo": (algorithms.OnlineDPO(), {"epochs": 2, "temperature": 0.7, "micro_batch": 1}),
}


# Their targets are held against the equations in tests/test_token_q_learning.py.
VALUES = {algorithms.TokenDQN, algorithms.SoftQ, algorithms.ILQL}


def test_every_other_algorithm_has_a_case():
    assert {type(algorithm) for algorithm, _ in CASES.values()} == set(ALGORITHMS.values()) - VALUES


def _equal_after_every_step(algorithm, changes, *, shared=False, **options):
    settings = config(**{"steps": 2, "max_new_tokens": 4, **changes})
    trainer, reference, log = twins(algorithm, settings, make_env(**options))
    before = weights(trainer.model)
    for _ in range(settings.steps):
        trajectories = trainer.collect()
        trainer.train_step()
        expected = reference.train_step(trajectories if shared else reference.collect())
        for name, value in expected.items():
            assert log.metrics[-1][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert trainer.updates == reference.updates == settings.steps * settings.updates_per_step
    torch.testing.assert_close(weights(trainer.model), weights(reference.model), rtol=0, atol=1e-9)
    if reference.value is not None:
        expected = weights(reference.value)
        torch.testing.assert_close(weights(trainer.policy.heads), expected, rtol=0, atol=1e-9)
        assert float(expected.abs().max()) > 1e-3, "the critic must have learnt something"
    moved = float((weights(trainer.model) - before).abs().max())
    assert moved > 1e-3, "the updates must have moved the parameters"
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_reference(case):
    """Equal to 1e-9 in float64. With rollouts of its own the reference draws the same tokens, since the random
    numbers are keyed."""
    _equal_after_every_step(*CASES[case])


@pytest.mark.parametrize("case", ["grpo off policy", "ppo", "online_dpo"])
def test_parity_on_the_same_rollouts(case):
    _equal_after_every_step(*CASES[case], shared=True)


def _converse(state: str, action: str, record: Record) -> str:
    return f"{state}{action};again:"


def _long(state: str, record: Record) -> bool:
    return len(state) % 3 == 0


@pytest.mark.parametrize("algorithm", [algorithms.PPO(), algorithms.A2C(gamma=0.9)], ids=["ppo", "a2c"])
def test_the_critic_stands_behind_truncated_episodes(algorithm):
    """Two turns, some episodes over and some cut off: their last state has a value, the others' has none."""
    env = {"transition": _converse, "max_turns": 2, "terminal": _long}
    trainer = _equal_after_every_step(algorithm, {"group_size": 4}, **env)
    batch = trainer.score(trainer.collect())
    assert 0 < int(batch.truncated.sum()) < len(batch)
    assert bool(((batch.last_values != 0) == batch.truncated).all())
