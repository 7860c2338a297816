"""The environments of `env.gym`: a registered Gymnasium environment, played as text."""

import functools
from typing import Any

import gymnasium

from ..envs import GymTextEnv, TextEnv
from ..envs.calls import cause
from .env_config import EnvConfig
from .named import function, imported
from .section import ConfigError


def gym_environments(config: EnvConfig) -> dict[str, TextEnv]:
    """The environments "train", "validation" and "test", which begin with seeds of their own.

    Raises: ConfigError naming the key, in one line, for an id or arguments that make no environment, or options
        that do not fit it.
    """
    gym, made = config.gym, _maker(config)
    counts = {"train": gym.seeds, "validation": config.eval_prompts, "test": config.test_prompts}
    options: dict[str, Any] = {
        name: getattr(gym, name) for name in ("actions", "on_illegal", "penalty", "layout")
    }
    if gym.describe is not None:
        options["describe"] = function("env.gym.describe", gym.describe)
    options |= {"instruction": gym.instruction or "", "max_turns": config.turns}
    found, first = {}, 0
    for split, count in counts.items():
        try:
            found[split] = GymTextEnv(made, seeds=range(first, first + count), **options)
        except (TypeError, ValueError) as error:
            raise _named(error) from error
        first += count
    return dict(found)


def _maker(config: EnvConfig) -> Any:
    """A function without arguments that makes one, tried out."""
    name, kwargs = str(config.gym.id), dict(config.gym.kwargs)
    if ":" in name:
        imported("env.gym.id", name.partition(":")[0])
    made = functools.partial(gymnasium.make, name, **kwargs)
    try:
        made().close()
    except gymnasium.error.Error as error:
        raise ConfigError("env.gym.id", f"names no environment that can be made: {cause(error)}") from error
    except Exception as error:  # whatever its constructor does
        key = "env.gym.kwargs" if kwargs else "env.gym.id"
        raise ConfigError(key, f"cannot make {name}: {cause(error)}") from error
    return made


def _named(error: Exception) -> ConfigError:
    """An error of GymTextEnv, which begins with an argument, by the key of that argument."""
    argument, _, problem = str(error).partition(" ")
    return ConfigError(f"env.gym.{'id' if argument == 'env' else argument}", problem)
