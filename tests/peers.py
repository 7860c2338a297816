"""Other packages' own functions, or a skip that names what is missing."""

import importlib
import importlib.util
import logging
import os
import warnings
from typing import Any

import pytest

from bench import frameworks

# The extra `bench` has those that install by themselves; `make parity` adds verl and OpenRLHF, whose dependencies
# want a GPU.
EXTRA = {"verl": "make parity", "openrlhf": "make parity"}


def peer(module: str) -> Any:
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {EXTRA.get(package, 'the extra `bench`')}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    finally:
        logging.disable(level)


def openrlhf(**wanted: str) -> Any:
    """See bench.frameworks.openrlhf: its functions without its modules, which import deepspeed and vllm."""
    try:
        return frameworks.openrlhf(**wanted)
    except ImportError as error:
        pytest.skip(str(error))


def jax64() -> Any:
    jax = peer("jax")
    jax.config.update("jax_enable_x64", True)
    return jax
