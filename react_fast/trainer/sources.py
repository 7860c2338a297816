"""What a run starts from, as its configuration names it: environments, model and tokenizer, algorithm."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from ..envs import Record, TextEnv, load_conll, load_jsonl, load_squad
from ..envs.metrics import CORPUS_METRICS
from ..envs.rewards import REWARDS
from ..envs.tasks.splits import SPLITS
from .config import EnvConfig, ModelConfig, RunConfig
from .folder import RunFolder, UserError
from .section import ConfigError, nearest

READERS = {"jsonl": load_jsonl, "squad": load_squad, "conll": load_conll}


@contextmanager
def user_input() -> Iterator[None]:
    """What goes wrong inside comes from what the user gave: one line, no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def load_environments(config: EnvConfig) -> dict[str, TextEnv]:
    """The environments "train", "validation" and "test".

    Raises: UserError for a bad file, reward, metric or language pair.
    """
    with user_input():
        metric_names(config)
        reward = _reward(config.reward or _module(config).REWARD)
        records = _files(config) if config.train else _task(config)
        limits = {"validation": config.eval_prompts, "test": config.test_prompts}
        return {
            split: TextEnv(_spread(found, limits.get(split)), reward=reward, max_turns=config.max_turns)
            for split, found in records.items()
        }


def load_policy(config: ModelConfig, texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    """The model and tokenizer of `config.path`, or fresh ones whose tokenizer is trained on `texts`.

    Raises: UserError for a folder that is no causal language model with a tokenizer.
    """
    from .model import fresh_model, load_model

    dtype = getattr(torch, config.dtype)
    with user_input():
        if config.path is not None:
            return load_model(config.path, dtype)
        others = ("path", "dtype", "lora")
        sizes = {name: getattr(config, name) for name in ModelConfig.model_fields if name not in others}
        model, tokenizer = fresh_model(texts, seed=seed, **sizes)
        return model.to(dtype), tokenizer


def adapt(model: Any, tokenizer: Any, config: ModelConfig, folder: RunFolder, seed: int) -> Any:
    """The model with the adapters of `config.lora`, if any; a fresh model is kept in the run folder beneath them.

    Raises: UserError for layers that the model does not have.
    """
    from .adapters import add_adapters
    from .model import model_folder

    if not config.lora.r:
        return model
    with user_input():
        base = model_folder(config.path) if config.path is not None else folder.keep_base(model, tokenizer)
        return add_adapters(model, config.lora, base=base, seed=seed)


def texts(records: Sequence[Record]) -> list[str]:
    """Every prompt and reference: what a fresh tokenizer learns from."""
    return [text for record in records for text in (record.prompt, record.reference) if text]


def metric_names(config: EnvConfig) -> tuple[str, ...]:
    """Metrics of the result table.

    Raises: ConfigError for an unknown one.
    """
    for name in config.metrics or ():
        if name not in CORPUS_METRICS:
            problem = f"must be among {', '.join(CORPUS_METRICS)}, got {name!r}"
            raise ConfigError("env.metrics", problem, nearest(name, CORPUS_METRICS))
    return tuple(_module(config).METRICS if config.metrics is None else config.metrics)


def _files(config: EnvConfig) -> dict[str, list[Record]]:
    if not (config.train and config.validation and config.test):
        missing = "env.validation" if not config.validation else "env.test"
        raise ConfigError(missing, "must name a file when env.train does")
    return {split: READERS[config.format](getattr(config, split)) for split in SPLITS}


def _task(config: EnvConfig) -> dict[str, list[Record]]:
    task = _module(config)
    options = {name: getattr(config, name) for name in task.OPTIONS}
    return {split: task.load(split=split, **options) for split in SPLITS}


def _module(config: EnvConfig) -> Any:
    return importlib.import_module(f"react_fast.envs.tasks.{config.task}")


def _reward(name: str) -> Callable[[str, str, Record], float]:
    if name in REWARDS:
        return REWARDS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        problem = f"must be {', '.join(REWARDS)} or module:function, got {name!r}"
        raise ConfigError("env.reward", problem, nearest(name, REWARDS))
    function = getattr(importlib.import_module(module), attribute, None)
    if not callable(function):
        raise ConfigError("env.reward", f"names no function of {module}, got {name!r}")
    return function


def load_augmentation(config: EnvConfig) -> Any:
    """The function of `config.augment`, or None.

    Raises: UserError if there is no such function.
    """
    if config.augment is None:
        return None
    module, _, attribute = config.augment.partition(":")
    with user_input():
        function = getattr(importlib.import_module(module), attribute, None) if attribute else None
        if not callable(function):
            raise ConfigError("env.augment", f"must be module:function, got {config.augment!r}")
        return function


def _spread(records: Sequence[Record], limit: int | None) -> Sequence[Record]:
    """`limit` records at even distances, so that every language pair and kind of name is among them."""
    if limit is None or len(records) <= limit:
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def make_algorithm(config: RunConfig) -> Any:
    """The algorithm of `config.algorithm`.

    Raises: UserError for an option that the algorithm does not have, or a value that it refuses.
    """
    from .algorithms import ALGORITHMS

    chosen = ALGORITHMS[config.algorithm.name]
    known = [field.name for field in dataclasses.fields(cast(Any, chosen))]
    unknown = sorted(set(config.algorithm.options) - set(known))
    if unknown:
        raise UserError(
            f"algorithm.options.{unknown[0]} is not a key; {chosen.__name__} has {', '.join(known)}"
        )
    try:
        algorithm = chosen(**config.algorithm.options)
    except (TypeError, ValueError) as error:  # its message begins with the option's name
        raise UserError(f"algorithm.options.{error}") from error
    with user_input():
        algorithm.check(config.trainer)
    return algorithm
