"""The committed table of launch options, tuned.json: kernel -> device capability ("90") or "default" -> options.

Read once, never searched at import or at a launch. A block decides how a sum is cut, so an entry may depend on the
device, never on the number of rows. `python -m bench.gpu --only autotune` searches, and writes a table to take.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_TABLE = json.loads((Path(__file__).parent / "tuned.json").read_text())


@cache
def options(kernel: str, device: torch.device) -> dict[str, int]:
    """Options of a kernel ("logprob.forward") on a device; those of "default" where it has no entry of its own.

    Raises: KeyError for a kernel that the table does not know.
    """
    if device.type != "cuda":
        return _TABLE[kernel]["default"]
    major, minor = torch.cuda.get_device_capability(device)
    return of_capability(kernel, 10 * major + minor)


def of_capability(kernel: str, capability: int) -> dict[str, int]:
    """The same for a compute capability (90), as the ahead-of-time build asks."""
    entry = _TABLE[kernel]
    return entry.get(str(capability), entry["default"])


def table() -> dict[str, dict[str, dict[str, int]]]:
    """A copy of the whole table."""
    return {kernel: {key: dict(found) for key, found in entry.items()} for kernel, entry in _TABLE.items()}


@contextmanager
def trial(kernel: str, candidate: Mapping[str, int]) -> Iterator[None]:
    """Every device launches a kernel with other options inside, for the search."""
    entry = _TABLE[kernel]
    _TABLE[kernel] = {"default": dict(candidate)}
    options.cache_clear()
    try:
        yield
    finally:
        _TABLE[kernel] = entry
        options.cache_clear()
