"""One training step of the demo behind its rollouts; the limit is the model's forward and backward alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

import react_fast as rf
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.trainer.config import RunConfig
from react_fast.trainer.sources import load_environments, load_policy, texts

from .common import race

CONFIG = Path(__file__).parent.parent / "examples" / "translation.yaml"


@pytest.fixture(scope="module")
def demo() -> tuple[RunConfig, Any, Any, Any]:
    config = RunConfig.from_yaml(CONFIG)
    env = load_environments(config.env)["train"]
    model, tokenizer = load_policy(config.model, texts(env.records), config.trainer.seed)
    return config, env, model, tokenizer


def _trainer(demo: Any, tracker: Any = None) -> rf.Trainer:
    config, env, model, tokenizer = demo
    # Parameters stay where they are, so that every round does the same work.
    still = config.trainer.replace(threads=None, learning_rate=1e-30, weight_decay=0.0)
    return rf.Trainer(model, tokenizer, env, algorithm=rf.GRPO(), tracker=tracker, config=still)


def _grpo(
    logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """GRPO's loss the way trainers write it: log_softmax, gather, ratio, clip, masked mean."""
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    ratio = torch.exp(logprobs - logprobs.detach())
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    return (loss * mask).sum() / mask.sum()


def test_update(benchmark, demo):
    """score, credit and update of one GRPO step: 16 prompts x 8 responses of the random policy."""
    _, env, model, tokenizer = demo
    trainer = _trainer(demo)
    trajectories = trainer.collect()
    slow = ReferenceTrainer(model, tokenizer, env, algorithm=rf.GRPO(), config=trainer.config)
    batch = trainer.credit(trainer.score(trajectories))
    compiled = torch.compile(_grpo)

    def plain(loss_of: Any) -> None:
        trainer.updater.optimizer.zero_grad(set_to_none=True)
        scored = trainer.score(trajectories)
        advantages = trainer.credit(scored).advantages
        logits = model(
            input_ids=scored.input_ids, attention_mask=scored.attention_mask, use_cache=False
        ).logits
        loss_of(logits, scored.input_ids, scored.mask, advantages).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.updater.optimizer.step()

    def limit() -> None:
        trainer.updater.optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits.backward(torch.ones_like(logits))

    race(
        benchmark,
        {
            "react_fast": lambda: trainer.update(trainer.credit(trainer.score(trajectories))),
            "torch": lambda: plain(_grpo),
            "torch.compile": lambda: plain(compiled),
            "reference": lambda: slow.update(slow.credit(slow.score(trajectories))),
            "limit": limit,
        },
        case="GRPO update of the demo, 128 sequences",
        limit="forward and backward of the model alone",
    )


def test_tracker(benchmark, demo):
    """The same step with and without the tracker watching its backward."""
    _, _, model, tokenizer = demo
    watched, alone = _trainer(demo, rf.CausalityTracker(model, tokenizer)), _trainer(demo)
    trajectories = alone.collect()

    def step(trainer: rf.Trainer) -> None:
        trainer.update(trainer.credit(trainer.score(trajectories)))

    race(
        benchmark,
        {"react_fast": lambda: step(watched), "without tracker": lambda: step(alone)},
        case="GRPO update of the demo, tracker on",
    )
