"""What this installation can do: versions, backends, instruction sets, threads, GPU. Needs no extra."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import numpy as np
import torch

from . import _core
from .ops.backend import get_backend, interpreting

# Packages whose version changes what a run computes.
_PACKAGES = (
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "gymnasium",
    "pydantic",
    "sacrebleu",
    "babel",
)


def environment() -> dict[str, Any]:
    """The facts that `react-fast info` prints and a run folder records.

    Returns: a dict that JSON holds: versions by package (None: not installed), backend chosen and backends
        available, instruction sets (compiled, supported here, active), OpenMP, threads, logical processors,
        load over the last minute, GPUs.
    """
    return {
        "versions": _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": get_backend(),
        "backends": _backends(),
        "isa": _core.isa(),
        "isas_supported": _core.supported_isas(),
        "isas_compiled": _core.compiled_isas(),
        "openmp": _core.openmp,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
    }


def info_lines() -> list[str]:
    """`environment()` for reading, one fact a line."""
    facts = environment()
    found = [f"{name} {version}" for name, version in facts["versions"].items() if version]
    missing = [name for name, version in facts["versions"].items() if not version]
    return [
        f"versions      {', '.join(found)}",
        *([f"not installed {', '.join(missing)}"] if missing else []),
        f"platform      {facts['platform']}, {facts['processors']} processors, load {facts['load']}",
        f"backend       {facts['backend']} (available: {', '.join(facts['backends'])})",
        f"isa           {facts['isa']} (supported here: {', '.join(facts['isas_supported'])}; "
        f"compiled: {', '.join(facts['isas_compiled'])})",
        f"threads       {facts['threads']} ({'OpenMP' if facts['openmp'] else 'built without OpenMP'})",
        f"gpu           {'; '.join(facts['gpus']) or 'none'}",
    ]


def _versions() -> dict[str, str | None]:
    own = importlib.import_module(__package__).__version__
    known = {
        "react_fast": own,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return known | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> list[str]:
    has_triton = importlib.util.find_spec("triton") is not None
    if has_triton and interpreting():
        return ["reference", "cpu", "triton (interpreter)"]
    return ["reference", "cpu"] + (["triton"] if has_triton and torch.cuda.is_available() else [])


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]
