"""A policy on an environment's records: its responses, greedy or sampled, and held-out means while it trains."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..envs import TextEnv
from ..envs.rewards import right_answers
from .results import Answers
from .rollout import Episodes, PolicyEngine, SamplingParams, key, pad_token

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
    share: Callable[[list[int]], list[int]] = list,
    engine: Any = None,
) -> Answers:
    """One episode of every record, in the records' order.

    Args:
        model, tokenizer: a `transformers` causal language model and its tokenizer.
        env: its clones are stepped; it is left as it was.
        greedy: the most probable token each time; else sampled at temperature 1 from the whole vocabulary.
        max_new_tokens: longest action in tokens.
        batch_size: episodes generated together; changes nothing but memory.
        seed: of the sampling; each record draws from a stream of its own.
        share: which of the records' numbers to play; all of them if not given.
        engine: rollout engine; None: the model itself.
    Returns: the last action and the sum of rewards of every episode that was played.
    """
    if engine is None:
        engine = PolicyEngine(model, eos_id=tokenizer.eos_token_id, pad_id=pad_token(tokenizer))
    env = env.rendered(tokenizer)
    episodes = Episodes(engine, tokenizer, env)
    responses: list[str] = []
    rewards: list[float] = []
    numbers = share(list(range(len(env.records))))
    for first in range(0, len(numbers), batch_size):
        part = numbers[first : first + batch_size]
        params = SamplingParams(max_new_tokens, greedy=greedy, seed=key(seed, _TEST), rows=part)
        for trajectory in episodes.play(part, part, params):
            last = trajectory.action_mask & (trajectory.turn_index == len(trajectory.rewards) - 1)
            responses.append(tokenizer.decode(trajectory.token_ids[last].tolist(), skip_special_tokens=True))
            rewards.append(sum(trajectory.rewards))
    played = [env.records[i] for i in numbers]
    known = [right_answers(record) for record in played if record.reference is not None]
    return Answers(responses, rewards, known if len(known) == len(played) else None)


def held_out_reward(trainer: Any, env: TextEnv, *, greedy: bool) -> float:
    """Mean return of the trainer's policy, one episode of every record."""
    trainer.synchronise()
    config = trainer.config
    returns = []
    for rows in torch.arange(len(env.records)).split(config.eval_batch):
        part = rows.tolist()
        params = SamplingParams(config.max_new_tokens, greedy=greedy, seed=key(config.seed, _TEST), rows=part)
        returns += [sum(t.rewards) for t in trainer.play(env, part, part, params)]
    return float(np.mean(returns))


def held_out_loss(trainer: Any, env: TextEnv) -> float:
    """The algorithm's loss on what it would learn from the records, such as cross-entropy per token."""
    algorithm, config = trainer.algorithm, trainer.config
    total, count = 0.0, 0
    for rows in torch.arange(len(env.records)).split(config.eval_batch):
        written = algorithm.demonstrate(trainer.tokenizer, env.records, rows.tolist())
        batch = trainer.credit(trainer.score(written))
        number = algorithm.denominator(config, batch)
        loss, _ = algorithm.loss(config, batch, trainer.scores(batch), torch.ones_like(number))
        total, count = total + float(loss), count + int(number)
    return total / max(count, 1)
