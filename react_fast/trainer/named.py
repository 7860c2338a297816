"""What keys of the configuration name by import path."""

import importlib
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

from ..envs.calls import cause
from .section import ConfigError, nearest


def function(key: str, name: str, known: Collection[str] = ()) -> Callable[..., Any]:
    """The function of a name `module:function`; the error names those `known` by bare names, too.

    Raises: ConfigError.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        wanted = f"{', '.join(known)} or module:function" if known else "module:function"
        raise ConfigError(key, f"must be {wanted}, got {name!r}", nearest(name, known))
    found = getattr(imported(key, module), attribute, None)
    if not callable(found):
        raise ConfigError(key, f"names no function of {module}, got {name!r}")
    return found


def imported(key: str, module: str) -> Any:
    """A module, looked for in the working directory too.

    Raises: ConfigError.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a user's module does
        raise ConfigError(key, f"names a module that cannot be imported: {cause(error)}") from error
