"""Shapley credit on games whose shares are known; parity with the loops and resume are in test_causal_credit."""

from typing import Any

import pytest
import torch

from react_fast.envs import Record, TextEnv
from react_fast.trainer.algorithms import GRPO
from react_fast.trainer.rollout import Sample
from react_fast.trainer.trainer import Trainer

from .dialogues import ALPHABET, Characters, policy, settings


def _trained_on(responses: list[str], budget: int, reward: Any) -> Trainer:
    """A trainer whose engine has written these responses already."""

    class Written:
        def generate(self, prompts: Any, params: Any) -> list[Sample]:
            ids = [tokenizer(text)["input_ids"] for text in responses]
            return [Sample(row, [-1.0] * len(row), "length") for row in ids]

    tokenizer = Characters(ALPHABET)
    config = settings(
        credit="shapley",
        credit_actions="word",
        credit_interventions=budget,
        max_new_tokens=16,
        group_size=len(responses),
    )
    env = TextEnv([Record("?")], reward=lambda state, action, record: reward(action))
    return Trainer(policy(), tokenizer, env, algorithm=GRPO(), config=config, engine=Written())


def test_words_that_need_each_other_share_what_they_bring():
    """Alone neither of a and b earns the 3, and whoever comes last earns it all; a third is worth 1."""

    def reward(text: str) -> float:
        return 3.0 * ("a" in text and "b" in text) + text.count(".")

    trainer = _trained_on(["a b .", "?????"], 16, reward)
    batch = trainer.score(trainer.collect())
    assert batch.effects[0].tolist() == [1.5, 1.5, 1.5, 1.0, 1.0]
    assert batch.effects[1].isnan().all(), "one word has nothing to share"
    assert trainer.replays.metrics["credit/environment_steps"] == 7
    credit = trainer.credit(batch).advantages
    torch.testing.assert_close(credit.sum(1), trainer.algorithm.advantages(trainer.config, batch) * 5)


def test_a_budget_too_small_for_any_episode_is_said_once_and_leaves_credit_uniform():
    trainer = _trained_on(["a b .", "?????"], 6, lambda text: float(text.count("a")))
    with pytest.warns(UserWarning, match="credit_interventions 6 is too small for Shapley credit.* up to 7"):
        batch = trainer.score(trainer.collect())
    assert batch.effects.isnan().all()
    with pytest.raises(
        ValueError, match="credit_actions must be longer than 'token' when credit is 'shapley'"
    ):
        settings(credit="shapley")
    with pytest.raises(ValueError, match="credit_samples must be at least 2 when credit is 'shapley'"):
        settings(credit="shapley", credit_actions="line", credit_samples=1)
