"""What a run starts from, as its configuration names it: environments, model and tokenizer, algorithm."""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from ..envs import (
    Record,
    RewardFunction,
    Rules,
    TextEnv,
    ToolEnv,
    WeightedRewards,
    load_conll,
    load_jsonl,
    load_squad,
    rules_of,
    tools_preface,
)
from ..envs.calls import cause
from ..envs.metrics import CORPUS_METRICS
from ..envs.notes import as_number
from ..envs.reward_functions import as_reward, needs_care
from ..envs.rewards import REWARDS
from ..envs.tasks.splits import SPLITS
from .config import RunConfig
from .env_config import EnvConfig, RewardModelConfig
from .folder import RunFolder, UserError
from .model_config import ModelConfig
from .named import function, imported
from .section import ConfigError, nearest

READERS = {"jsonl": load_jsonl, "squad": load_squad, "conll": load_conll}


@contextmanager
def user_input() -> Iterator[None]:
    """What goes wrong inside comes from what the user gave: one line, no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def load_environments(config: EnvConfig, device: Any = None) -> dict[str, TextEnv]:
    """The environments "train", "validation" and "test".

    Args: device: of reward models; None: the CPU; "meta": without their weights.
    Raises: UserError for a bad file, reward, metric or language pair.
    """
    with user_input():
        metric_names(config)
        if config.gym.id is not None:
            from .gym_source import gym_environments

            return gym_environments(config)
        make: Callable[..., TextEnv] = TextEnv
        rules = _rules(config, device)
        if config.tools:
            tools = [function("env.tools", name) for name in config.tools]
            make = functools.partial(ToolEnv, tools=tools, **_tool_options(config, tools))
        records = _files(config) if config.train else _task(config)
        limits = {"validation": config.eval_prompts, "test": config.test_prompts}
        return {
            split: make(_spread(found, limits.get(split)), max_turns=config.turns, **rules)
            for split, found in records.items()
        }


def load_policy(config: ModelConfig, texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    """The model and tokenizer of `config.path`, or fresh ones whose tokenizer is trained on `texts`.

    Raises: UserError for a folder that is no causal language model with a tokenizer.
    """
    from .model import fresh_model, load_model, with_template

    dtype = getattr(torch, config.dtype)
    with user_input():
        if config.path is not None:
            model, tokenizer = load_model(config.path, dtype)
        else:
            others = ("path", "dtype", "chat_template", "lora")
            sizes = {name: getattr(config, name) for name in ModelConfig.model_fields if name not in others}
            model, tokenizer = fresh_model(texts, seed=seed, **sizes)
        return model.to(dtype), with_template(tokenizer, config.chat_template)


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
    return [text for record in records for text in record.texts]


def metric_names(config: EnvConfig) -> tuple[str, ...]:
    """Metrics of the result table.

    Raises: ConfigError for an unknown one.
    """
    for name in config.metrics or ():
        if name not in CORPUS_METRICS:
            problem = f"must be among {', '.join(CORPUS_METRICS)}, got {name!r}"
            raise ConfigError("env.metrics", problem, nearest(name, CORPUS_METRICS))
    if config.metrics is None:
        return () if config.gym.id is not None else tuple(_module(config).METRICS)
    return tuple(config.metrics)


def _tool_options(config: EnvConfig, tools: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "preface": tools_preface(tools) if config.tools_described else "",
        "timeout": config.tool_timeout,
        "concurrency": config.tool_concurrency,
        "longest": config.tool_longest,
    }
    if config.tool_parse is not None:
        options["parse"] = function("env.tool_parse", config.tool_parse)
    if config.tool_response is not None:
        options["response"] = config.tool_response
    return options


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


def _rules(config: EnvConfig, device: Any) -> dict[str, Any]:
    """Reward, transition and terminal of the environments; what a key names comes before the marked functions."""
    if config.reward and config.rewards:
        raise ConfigError("env.rewards", "must not stand beside env.reward; give one of them")
    marked = rules_of(imported("env.rules", config.rules)) if config.rules else Rules((), None, None)
    found: dict[str, Any] = {"terminal": marked.terminal, "reward": list(marked.rewards)}
    if marked.transition:
        found["transition"] = marked.transition
    if config.rewards:
        found["reward"] = WeightedRewards([_weighted(*entry, device) for entry in config.rewards.items()])
    elif config.reward or not marked.rewards:
        found["reward"] = _reward("env.reward", config.reward or _module(config).REWARD)
    for key in ("transition", "terminal"):
        if name := getattr(config, key):
            found[key] = function(f"env.{key}", name)
    wanted = {"reward": as_number, "transition": lambda state: state if isinstance(state, str) else None}
    for key, rule in found.items():
        if inspect.isfunction(rule) and not needs_care(rule) and rule not in REWARDS.values():
            found[key] = _in_one_line(f"env.{key}", rule, wanted.get(key))
    return found


def _in_one_line(key: str, rule: Callable[..., Any], wanted: Callable[[Any], Any] | None) -> Any:
    """The rule, whose failures are UserErrors, and its results where `wanted` gives None for them."""

    @functools.wraps(rule)
    def told(*arguments: Any) -> Any:
        try:
            found = rule(*arguments)
        except (Exception, SystemExit) as error:
            problem = cause(error) if isinstance(error, Exception) else repr(error)
            raise UserError(f"{key} {rule.__name__} failed: {problem}") from error
        if wanted is not None and wanted(found) is None:
            kind = "number" if key == "env.reward" else "str"
            raise UserError(f"{key} {rule.__name__} must give a {kind}, got {type(found).__name__}")
        return found

    return told


def _weighted(name: str, entry: float | RewardModelConfig, device: Any) -> RewardFunction:
    """One of several rewards, by its name or the section of a reward model."""
    if not isinstance(entry, RewardModelConfig):
        return as_reward(_reward("env.rewards", name), weight=entry)
    from .reward_models import load_reward_model

    try:
        model = load_reward_model(entry, name, device)
    except (ValueError, OSError) as error:
        raise ConfigError(f"env.rewards.{name}:", str(error)) from error
    return RewardFunction(model, weight=entry.weight, name=name)


def _reward(key: str, name: str) -> Callable[..., Any]:
    return REWARDS[name] if name in REWARDS else function(key, name, REWARDS)


def load_augmentation(config: EnvConfig) -> Any:
    """The function of `config.augment`, or None.

    Raises: UserError if there is no such function.
    """
    if config.augment is None:
        return None
    with user_input():
        return function("env.augment", config.augment)


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
