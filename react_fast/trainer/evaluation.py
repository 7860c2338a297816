"""A policy on an environment's records: its responses, greedy or sampled, and held-out means while it trains."""

from typing import Any

import numpy as np
import torch

from ..envs import TextEnv
from .algorithms.sft import demonstrations
from .batch import collate
from .results import Answers
from .rollout import Episodes, PolicyEngine, SamplingParams, key, synchronise

# Keeps the draws of a test apart from those of the training rollouts of the same seed.
_TEST = 3


def answer(
    model: Any,
    tokenizer: Any,
    env: TextEnv,
    *,
    greedy: bool,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
) -> Answers:
    """One episode of every record, in the records' order.

    Args:
        model, tokenizer: a `transformers` causal language model and its tokenizer.
        env: its clones are stepped; it is left as it was.
        greedy: the most probable token each time; else sampled at temperature 1 from the whole vocabulary.
        max_new_tokens: longest action in tokens.
        batch_size: episodes generated together; changes nothing but memory.
        seed: of the sampling; each record draws from a stream of its own.
    Returns: the last action and the sum of rewards of every episode.
    """
    engine = PolicyEngine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    episodes = Episodes(engine, tokenizer, env)
    responses: list[str] = []
    rewards: list[float] = []
    for rows in torch.arange(len(env.records)).split(batch_size):
        part = rows.tolist()
        params = SamplingParams(max_new_tokens, greedy=greedy, seed=key(seed, _TEST), rows=part)
        for trajectory in episodes.play(part, part, params):
            last = trajectory.action_mask & (trajectory.turn_index == len(trajectory.rewards) - 1)
            responses.append(tokenizer.decode(trajectory.token_ids[last].tolist(), skip_special_tokens=True))
            rewards.append(sum(trajectory.rewards))
    references = [record.reference for record in env.records]
    known = [reference for reference in references if reference is not None]
    return Answers(responses, rewards, known if len(known) == len(references) else None)


def held_out_reward(trainer: Any, env: TextEnv, *, greedy: bool) -> float:
    """Mean return of the trainer's policy, one episode of every record."""
    synchronise(trainer.engine, trainer.model, trainer.updates)
    episodes = Episodes(trainer.engine, trainer.tokenizer, env)
    config = trainer.config
    returns = []
    for rows in torch.arange(len(env.records)).split(config.eval_batch):
        part = rows.tolist()
        params = SamplingParams(config.max_new_tokens, greedy=greedy, seed=key(config.seed, _TEST), rows=part)
        returns += [sum(t.rewards) for t in episodes.play(part, part, params)]
    return float(np.mean(returns))


def held_out_loss(trainer: Any, env: TextEnv) -> float:
    """Cross-entropy per token of the records' references."""
    total, tokens = 0.0, 0
    for rows in torch.arange(len(env.records)).split(trainer.config.eval_batch):
        references = demonstrations(trainer.tokenizer, env.records, rows.tolist())
        batch = collate(references, trainer.pad_id, trainer.accelerator.device)
        total -= float(trainer.logprobs(trainer.model, batch).double().sum())
        tokens += int(batch.mask.sum())
    return total / max(tokens, 1)
