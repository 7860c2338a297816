"""Other packages' own functions, or a skip that names what is missing."""

import ast
import importlib
import importlib.util
import logging
import os
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

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
    """Functions and classes by the file that defines them, with torch and each other and nothing else.

    The package's modules import deepspeed, flash_attn and vllm; what is compared here uses none of them.
    """
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        pytest.skip("openrlhf is not installed: make parity")
    root = Path(package.submodule_search_locations[0])
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "List": list}
    names |= {"Optional": typing.Optional, "Tuple": tuple, "Union": typing.Union}
    for name, file in wanted.items():
        tree = ast.parse((root / file).read_text())
        found = [
            n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name
        ]
        exec(compile(ast.Module(found[:1], []), file, "exec"), names)
    return types.SimpleNamespace(**{name: names[name] for name in wanted})


def jax64() -> Any:
    jax = peer("jax")
    jax.config.update("jax_enable_x64", True)
    return jax
