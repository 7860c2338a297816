"""Services that take a run's numbers beside its own files, through accelerate's trackers."""

import importlib
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from .config import RunConfig
from .folder import UserError


def open_trackers(config: RunConfig) -> list[Any]:
    """The started accelerate trackers of `config.logging`, TensorBoard aside, which the reporter writes itself: it
    rewrites its files where a run goes on. None is started before all are known to be there.

    Raises: UserError in one line for a package that is missing.
    """
    names = list(dict.fromkeys(config.logging.trackers))
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"logging.trackers names {name}, which is not installed; pip install {name}, or leave it out"
            ) from None
    found = []
    for name in names:
        if name == "tensorboard":
            continue
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(config.logging.project, name=Path(config.run_dir).name)
        tracker.start()
        tracker.store_init_configuration(_flat(config.model_dump()))
        found.append(tracker)
    return found


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted keys; what is no number, text or nothing as text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value if isinstance(value, (int, float, str, type(None))) else str(value)
    return flat
