"""`react-fast train --dry-run`: the configuration and what follows from it, without weights or a run folder."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from ..envs import Record, RewardModel, TextEnv
from .config import RunConfig, TrainerConfig
from .estimate import Memory, in_units, memory
from .explain import quiet_libraries
from .model import outline
from .rollout import encode, opening
from .sources import load_augmentation, load_environments, make_algorithm, texts, user_input


def describe(config: RunConfig) -> None:
    """Print the resolved configuration, the batch numbers, and steps, updates, tokens and memory of each phase.

    Raises: UserError in one line for what the user can mend.
    """
    quiet_libraries()
    algorithm, env = make_algorithm(config), load_environments(config.env, "meta")["train"]
    load_augmentation(config.env)
    print(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), end="")
    print(f"# {config.trainer.batch_line()}")
    with user_input():
        model, tokenizer = outline(config.model, texts(env.records))
        records = env.rendered(tokenizer).records
    for name, size in _reward_models(env):
        print(f"# reward model {name}: about {in_units(size)} of memory a process")
    copies = {"warm_start": 0, "rl": _copies(algorithm, config)}
    for phase, supervised in (("warm_start", True), ("rl", algorithm.supervised)):
        if phase == "warm_start" and not config.warm_start.steps:
            continue
        training = config.training(phase)
        longest = _longest(tokenizer, records, supervised, training.max_new_tokens * config.env.turns)
        if config.env.gym.id is not None:  # every turn but the last adds an observation
            longest = longest[0], longest[1] + (config.env.turns - 1) * longest[0]
        print(f"# {phase}: {_tokens(training, *longest)}")
        length = sum(longest)
        with user_input():
            found = memory(model, training, length=length, copies=copies[phase], supervised=supervised)
        print(f"# {phase}: {_memory(found)}")


def _reward_models(env: TextEnv) -> Iterator[tuple[str, int]]:
    """(name, bytes of its parameters) of every reward model."""
    for one in getattr(env.reward, "functions", ()):
        if isinstance(one.function, RewardModel):
            yield one.label, sum(p.numel() * p.element_size() for p in one.function.model.parameters())


def _copies(algorithm: Any, config: RunConfig) -> int:
    """Whole policies beside the one in training; adapters are compared with the weights beneath them."""
    reference = algorithm.compares(config.trainer) and not config.model.lora.r
    return int(reference) + algorithm.copies


def _longest(tokenizer: Any, records: Sequence[Record], supervised: bool, new: int) -> tuple[int, int]:
    """(tokens of the longest prompt, most tokens behind it)."""

    answers = [encode(tokenizer, r.reference, special=False) for r in records if r.reference]
    longest = max(len(opening(tokenizer, record.prompt, record)) for record in records)
    return longest, max(map(len, answers), default=0) + 1 if supervised else new


def _tokens(config: TrainerConfig, prompt: int, response: int) -> str:
    sequences = config.sequences_per_step
    each, total = sequences * (prompt + response), config.steps * sequences * response
    return (
        f"{config.steps} steps, {config.steps * config.updates_per_step} updates; {sequences} sequences a step of"
        f" at most {prompt} + {response} tokens, {each:,} tokens a step; {total:,} response tokens in all"
    )


def _memory(found: Memory) -> str:
    parts = {name: in_units(value) for name, value in vars(found).items()}
    update = f"update: activations {parts.pop('activations')} + {{head {parts.pop('head')}"
    update += f" or backward {parts.pop('backward')}}}"
    lasting = " + ".join(f"{name} {value}" for name, value in parts.items() if name != "generation")
    return (
        f"about {in_units(found.peak)} of memory a process beside Python and libraries: {lasting}"
        f" + the larger of {{{update}}} and {{generation: {parts['generation']}}}"
    )
