"""Responses of a policy to the records of an environment, greedy or sampled."""

from typing import Any

import torch

from ..envs import TextEnv
from .results import Answers
from .rollout import Episodes, PolicyEngine, SamplingParams, key

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
