"""Sampler and trainer: measured, corrected, equal to the reference loop."""

import math
from typing import Any

import pytest
import torch

from react_fast.ops.importance_weights import importance_weights
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.trainer.algorithms import GRPO, REINFORCE
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.mismatch import correct, finish
from react_fast.trainer.rollout import PolicyEngine, Sample, SamplingParams
from react_fast.trainer.trainer import Trainer

from .test_trainer import _config, _env, _Log, _policy, _weights


class _Other:
    """The policy, behind by noise in its log-probabilities; every fifth is not told."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.policy = PolicyEngine(model, eos_id=eos_id, pad_id=pad_id)

    def generate(self, prompts: Any, params: SamplingParams) -> list[Sample]:
        samples = self.policy.generate(prompts, params)
        for row, sample in enumerate(samples):
            noise = torch.randn(len(sample.ids), generator=torch.Generator().manual_seed(row)).tolist()
            sample.logprobs = [
                math.nan if i % 5 == 4 else lp + 0.5 * noise[i] for i, lp in enumerate(sample.logprobs)
            ]
        return samples


CASES = {
    "tokens clipped": (GRPO(), {"importance": "truncate", "importance_high": 1.2}),
    "tokens masked, off policy": (
        GRPO(),
        {"importance": "mask", "importance_low": 0.5, "importance_high": 1.5, "minibatches": 2, "epochs": 2},
    ),
    "sequences clipped": (REINFORCE(), {"importance": "truncate", "importance_level": "sequence"}),
    "geometric mean masked": (
        GRPO(),
        {
            "importance": "mask",
            "importance_level": "geometric",
            "importance_low": 0.9,
            "importance_high": 1.1,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_reference(case):
    """Parameters equal to 1e-9 after 2 steps in float64, and not those without the weights."""
    algorithm, changes = CASES[case]
    config = _config(**changes)
    (fast, tokenizer), (slow, _), (plain, _) = _policy(), _policy(), _policy()
    trainer = Trainer(
        fast, tokenizer, _env(), algorithm=algorithm, config=config, engine=_Other(fast, tokenizer)
    )
    without = Trainer(plain, tokenizer, _env(), algorithm=algorithm, config=config.replace(importance="none"))
    reference = ReferenceTrainer(slow, tokenizer, _env(), algorithm=algorithm, config=config)
    for _ in range(2):
        trajectories = trainer.collect()
        trainer.train_step()
        without.train_step()
        reference.train_step(trajectories)
    torch.testing.assert_close(_weights(fast), _weights(slow), rtol=0, atol=1e-9)
    assert float((_weights(fast) - _weights(plain)).abs().max()) > 1e-6


@pytest.mark.parametrize(
    "changes", [{"top_k": 5, "kl_coef": 0.1}, {"top_p": 0.7, "min_p": 0.02, "temperature": 0.8}]
)
def test_truncated_sampling_is_scored_over_what_was_kept(changes):
    """The reference draws the same tokens by itself, from the same kept sets, and ends with the same weights."""
    config = _config(**changes, steps=2)
    (fast, tokenizer), (slow, _) = _policy(), _policy()
    log = _Log()
    trainer = Trainer(fast, tokenizer, _env(), algorithm=GRPO(), config=config, reporter=log)
    reference = ReferenceTrainer(slow, tokenizer, _env(), algorithm=GRPO(), config=config)
    for _ in range(config.steps):
        collected = trainer.collect()
        own = reference.collect()
        assert [t.token_ids.tolist() for t in collected] == [t.token_ids for t in own]
        trainer.train_step()
        reference.train_step(own)
    # Sampler in float32, trainer in float64.
    assert log.metrics[0]["sampling/sampling_logp_difference/max"] < 1e-5
    torch.testing.assert_close(_weights(fast), _weights(slow), rtol=0, atol=1e-9)


def test_metrics_are_those_of_their_equations_for_every_micro_batch():
    results = []
    for micro_batch in (None, 1, 4):
        model, tokenizer = _policy()
        config = _config(micro_batch=micro_batch, importance="truncate", importance_high=1.2, steps=1)
        log = _Log()
        engine = _Other(model, tokenizer)
        trainer = Trainer(
            model, tokenizer, _env(), algorithm=GRPO(), config=config, reporter=log, engine=engine
        )
        batch = trainer.score(trainer.collect())
        policy = trainer.scores(batch).logprobs
        trainer.train_step()
        results.append(log.metrics[-1])
    known = batch.mask & ~batch.sampler_logprobs.isnan()
    x = (policy - batch.sampler_logprobs.double())[known]
    weights = x.exp().clamp_max(1.2)
    expected = {
        "sampling/kl_k1": (-x).mean(),
        "sampling/kl_k3": (x.exp() - 1 - x).mean(),
        "sampling/sampling_logp_difference/mean": x.abs().mean(),
        "sampling/sampling_logp_difference/max": x.abs().max(),
        "sampling/importance_sampling_ratio/mean": x.exp().mean(),
        "sampling/importance_sampling_ratio/max": x.exp().max(),
        "sampling/ess": weights.mean() ** 2 / (weights**2).mean(),
        "sampling/clipped_ratio": (x.exp() > 1.2).sum() / batch.mask.sum(),
    }
    for metrics in results:
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-6), name


def test_the_weights_undo_the_sampler():
    """E_q[w f] = E_p[f] for unbounded weights, summed over all tokens of a vocabulary of 6 with their q."""
    torch.manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(1, 6).double(), -1) for _ in range(2))
    f = torch.randn(6).double()
    weights, _ = importance_weights(p, q, torch.ones(1, 6, dtype=torch.bool), low=0.0, high=math.inf)
    torch.testing.assert_close((q.exp() * weights * f).sum(), (p.exp() * f).sum())


def test_what_nobody_told_is_neither_weighed_nor_measured():
    model, tokenizer = _policy()
    config = _config(importance="truncate", importance_high=1.0)
    trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config)
    batch = trainer.score(trainer.collect())
    batch.sampler_logprobs = torch.full_like(batch.sampler_logprobs, math.nan)
    metrics, count = correct(config, batch, trainer.scores(batch).logprobs)
    assert (metrics, count) == ({}, 0.0)
    assert batch.importance is not None
    assert torch.equal(batch.importance, batch.mask.double())
    assert finish({"loss": 1.0}) == {"loss": 1.0}


def test_bounds_out_of_order_are_refused():
    with pytest.raises(ValueError, match="importance_low must be at most importance_high 2, got 3"):
        TrainerConfig(importance_low=3.0)


def test_resume_with_truncation_and_weights_gives_bitwise_the_same(tmp_path):
    changes = {"top_k": 8, "top_p": 0.9, "importance": "truncate", "minibatches": 2}

    def train(folder: str, cut: bool) -> torch.Tensor:
        config = _config(checkpoint_dir=str(tmp_path / folder), steps=2, save_every=1, **changes)
        model, tokenizer = _policy(torch.float32)
        trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config)
        if cut:
            trainer.train_step()
            trainer.save()
            model, tokenizer = _policy(torch.float32)
            trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config)
        trainer.train(resume="auto")
        return _weights(model)

    assert torch.equal(train("whole", cut=False), train("cut", cut=True))
