"""Responses of a policy to the records of an environment, greedy or sampled."""

from collections.abc import Sequence
from typing import Any

import torch

from ..envs import TextEnv
from .results import Answers


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
        model, tokenizer: a `transformers` causal language model and its tokenizer, padding on the left.
        env: its clones are stepped; it is left as it was.
        greedy: the most probable token each time; else sampled at temperature 1 from the whole vocabulary.
        max_new_tokens: longest action in tokens.
        batch_size: episodes generated together.
        seed: of the sampling; the global random state is left as it was.
    Returns: the last action and the sum of rewards of every episode.
    """
    was_training = model.training
    model.eval()
    responses: list[str] = []
    rewards: list[float] = []
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        for start in range(0, len(env.records), batch_size):
            indices = range(start, min(start + batch_size, len(env.records)))
            options = {"do_sample": not greedy, "max_new_tokens": max_new_tokens}
            texts, sums = _episodes(model, tokenizer, env, indices, options)
            responses += texts
            rewards += sums
    model.train(was_training)
    references = [record.reference for record in env.records]
    known = [reference for reference in references if reference is not None]
    return Answers(responses, rewards, known if len(known) == len(references) else None)


def _episodes(
    model: Any, tokenizer: Any, env: TextEnv, indices: Sequence[int], options: dict[str, Any]
) -> tuple[list[str], list[float]]:
    envs = [env.clone() for _ in indices]
    states = [env.reset(options={"index": i})[0] for env, i in zip(envs, indices, strict=True)]
    actions, rewards = [""] * len(envs), [0.0] * len(envs)
    running = list(range(len(envs)))
    while running:
        chosen = generate(model, tokenizer, [states[i] for i in running], **options)
        still = []
        for i, action in zip(running, chosen, strict=True):
            actions[i] = action
            states[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i] += reward
            if not (terminated or truncated):
                still.append(i)
        running = still
    return actions, rewards


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, do_sample: bool, max_new_tokens: int
) -> list[str]:
    """The model's continuation of every prompt, as text."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    # Temperature 1 over the whole vocabulary, whatever the model folder's generation_config says.
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
    ids = model.generate(
        **batch.to(model.device),
        do_sample=do_sample,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _cuda_devices(model: Any) -> list[int]:
    device = next(model.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []
