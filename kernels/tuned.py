"""The committed table of launch options, tuned.json: kernel -> device capability ("90") or "default" -> options.

Read once, never searched at import or at a launch. A block decides how a sum is cut, so an entry may depend on the
device, never on the number of rows.
"""

import json
from functools import cache
from pathlib import Path

import torch

_TABLE = json.loads((Path(__file__).parent / "tuned.json").read_text())


@cache
def options(kernel: str, device: torch.device) -> dict[str, int]:
    """Options of a kernel ("logprob.forward") on a device; those of "default" where it has no entry of its own.

    Raises: KeyError for a kernel that the table does not know.
    """
    entry = _TABLE[kernel]
    if device.type != "cuda":
        return entry["default"]
    major, minor = torch.cuda.get_device_capability(device)
    return entry.get(f"{major}{minor}", entry["default"])
