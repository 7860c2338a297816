"""What replays ask of engines, and causal credit where engines tell less than the policy's own."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from react_fast.envs import Record, TextEnv
from react_fast.envs.slot_models import Writer
from react_fast.envs.slots import GroundTruth
from react_fast.reference.credit import add_effects
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.trainer.algorithms import DPO, GRPO, ILQL, SFT
from react_fast.trainer.batch import Batch
from react_fast.trainer.credit import in_advantages
from react_fast.trainer.rollout import PolicyEngine, Sample, SamplingParams
from react_fast.trainer.trainer import Trainer

from .training import Characters, make_config, make_policy, vowels

ALPHABET = "abei"
LENGTH = 5


class Recorder(PolicyEngine):
    """Remembers what it was asked."""

    def generate(self, prompts: Any, params: SamplingParams) -> list[Sample]:
        self.asked = [*getattr(self, "asked", []), params]
        return super().generate(prompts, params)


def _env() -> TextEnv:
    return TextEnv([Record("ab"), Record("a")], reward=vowels)


def _config(**changes: Any) -> Any:
    return make_config(**{"max_new_tokens": LENGTH, "group_size": 4, "credit_floor": 0.1, **changes})


def _gpt2(positions: int = 40) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(ALPHABET), "n_positions": positions, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes)).double()


def _trainer(model: Any, config: Any, **options: Any) -> Trainer:
    return Trainer(model, Characters(ALPHABET), _env(), algorithm=GRPO(), config=config, **options)


@pytest.mark.parametrize("credit", ["causal", "monte_carlo"])
def test_replays_ask_for_what_is_left_of_a_response(credit):
    """So they fit where the rollout did, in a table of positions that it fills; monte_carlo's states of one length
    share a call."""
    model = _gpt2(positions=2 + LENGTH)
    engine = Recorder(model, eos_id=None, pad_id=0)
    trainer = _trainer(model, _config(credit=credit, credit_samples=2), engine=engine)
    trainer.policy_engine = engine
    trainer.train_step()
    replays = engine.asked[1:]
    assert {p.max_new_tokens for p in replays} == set(range(1, LENGTH + 1))
    assert all(skip + p.max_new_tokens == LENGTH for p in replays for skip in p.skip)
    tokens = sum(p.max_new_tokens * len(p.rows) for p in replays)
    assert trainer.replays.metrics["credit/generated_tokens"] == tokens
    if credit == "monte_carlo":
        assert len(replays) == LENGTH


class Unnamed(PolicyEngine):
    """Draws anew in every call, and as it likes."""

    calls = 0

    def generate(self, prompts: Any, params: SamplingParams) -> list[Sample]:
        self.calls += 1
        return super().generate(prompts, replace(params, seed=self.calls, skip=None))


def test_effects_are_measured_under_one_noise_whatever_engine_plays():
    """A slot that counts for nothing gets none of its neighbour's worth."""
    truth = GroundTruth((0.0, 1.0), (0.0,) * 2, (0.0,) * 2, (-1,) * 2, noise=0.0)
    config = _config(
        max_new_tokens=2, prompts_per_step=4, group_size=32, credit="causal", credit_interventions=10**6
    )
    model, tokenizer, env = Writer(truth).double(), Characters(truth.characters), truth.env(noisy=False)
    engine = Unnamed(model, eos_id=None, pad_id=0)
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=config, engine=engine)
    batch = trainer.score(trainer.collect())
    assert not bool(batch.effects[:, 0].any())
    error = batch.effects[:, 1].abs().mean() - 0.5
    assert abs(float(error)) < 4 * math.sqrt(0.25 / len(batch)), error


def test_a_table_uses_the_policys_probability_where_the_sampler_tells_none():
    config = _config(credit="causal", credit_by="token", credit_every=2, credit_interventions=100)
    fast, slow = _gpt2(), _gpt2()
    trainer = _trainer(fast, config)
    reference = ReferenceTrainer(slow, Characters(ALPHABET), _env(), algorithm=GRPO(), config=config)
    trainer.train_step()
    reference.train_step(reference.collect())
    told = trainer.collect()
    untold = [replace(one, sampler_logprobs=torch.full_like(one.sampler_logprobs, math.nan)) for one in told]
    expected, batch = (trainer.score(some) for some in (told, untold))
    assert bool((expected.effects != 0).any())
    torch.testing.assert_close(batch.effects[batch.mask], expected.effects[batch.mask], rtol=0, atol=1e-6)
    for row, one in enumerate(reference.score(untold)):
        found = batch.effects[row, : len(one.mask)][one.mask]
        torch.testing.assert_close(found, one.effects[one.mask], rtol=0, atol=1e-9)


def test_rewards_equal_but_for_rounding_scale_no_effects():
    """Three times 0.1 in float64 have a mean that is not 0.1."""
    batch = Batch.of_ids(torch.zeros(3, 3, dtype=torch.int64))
    batch.rewards = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    batch.groups = torch.zeros(3, dtype=torch.int64)
    batch.advantages = (batch.rewards - batch.rewards.sum() / 3) / 1e-4
    assert bool((batch.advantages != 0).all())
    batch.effects = torch.ones(3, 2, dtype=torch.float64)
    assert not bool(in_advantages(batch).any())
    scored = [_Scored(batch, row) for row in range(3)]
    add_effects(scored, 0.0)
    for row, one in enumerate(scored):
        assert torch.equal(one.advantages, batch.advantages[row].expand(2))


class _Scored:
    """A row as the reference has it."""

    def __init__(self, batch: Batch, row: int) -> None:
        self.mask, self.effects = batch.mask[row], batch.effects[row]
        self.reward, self.group = float(batch.rewards[row]), 0
        self.advantages = batch.advantages[row].expand(2).clone()


@pytest.mark.parametrize("algorithm", [SFT(), DPO(), ILQL()])
@pytest.mark.parametrize("credit", ["causal", "monte_carlo"])
def test_credit_is_refused_where_there_are_no_rollouts(algorithm, credit):
    model, tokenizer = make_policy()
    with pytest.raises(ValueError, match=r"trainer\.credit must be 'uniform' for") as caught:
        Trainer(model, tokenizer, _env(), algorithm=algorithm, config=make_config(credit=credit))
    assert "\n" not in str(caught.value)
