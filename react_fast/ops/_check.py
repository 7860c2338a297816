"""Refusal of bad input: one line that names the argument, what came and what was wanted.

Wrong type or dtype: TypeError. Wrong shape, device or value: ValueError.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import _core

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
_MASKS = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8)


def tensor(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(
            f"{name} must be dense, got a tensor of layout {_short(value.layout)}; use .to_dense()"
        )
    return value


def floating(name: str, value: Any) -> torch.Tensor:
    if tensor(name, value).dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_short(value.dtype)}")
    return value


def integer(name: str, value: Any) -> torch.Tensor:
    if tensor(name, value).dtype not in INTEGERS:
        raise TypeError(f"{name} must be int64 or int32, got {_short(value.dtype)}")
    return value


def shape(name: str, value: torch.Tensor, expected: Sequence[int], like: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must be {list(expected)} like {like}, got {list(value.shape)}")


def dtype(name: str, value: torch.Tensor, expected: torch.dtype, like: str) -> None:
    if value.dtype != expected:
        raise TypeError(f"{name} must be {_short(expected)} like {like}, got {_short(value.dtype)}")


def device(name: str, value: torch.Tensor, expected: torch.device, like: str) -> None:
    if value.device != expected:
        raise ValueError(f"{name} must be on {expected} like {like}, got {value.device}")


def mask(name: str, value: Any, expected: Sequence[int], like: str, on: torch.device) -> torch.Tensor:
    """The mask as bool. Integer masks hold 0 and 1; float masks are refused, since a weight is no mask."""
    if tensor(name, value).dtype not in _MASKS:
        raise TypeError(f"{name} must be bool or an integer 0/1 mask, got {_short(value.dtype)}")
    shape(name, value, expected, like)
    device(name, value, on, like)
    return value if value.dtype == torch.bool else value != 0


def bounds(name: str, value: Any, packed: torch.Tensor, like: str, size: str) -> None:
    """Offsets [size] that cut the packed tensor into sequences; `rising` looks at their values."""
    integer(name, value)
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name} must be [{size}], got {list(value.shape)}")
    device(name, value, packed.device, like)


def rising(name: str, value: torch.Tensor, total: int, like: str) -> torch.Tensor:
    """The offsets as contiguous int64, once they rise from 0 to total. On a GPU looking would wait for it, and the
    kernels stay inside the arrays; called where memory is read, so that a compiled graph is checked too.
    """
    edges = value.to(torch.int64).contiguous()
    if edges.device.type == "cpu" and not _core.bounds_rise(edges.data_ptr(), edges.shape[0], total):
        raise ValueError(f"{name} must rise from 0 to {total} like {like}, got {_shortened(edges)}")
    return edges


def _shortened(x: torch.Tensor) -> str:
    values = x.tolist()
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


def number(
    name: str,
    value: Any,
    *,
    low: float = float("-inf"),
    high: float = float("inf"),
    low_open: bool = False,
    infinite: bool = False,
) -> float:
    """A Python number in [low, high], or (low, high] with low_open; finite unless `infinite`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (low < value if low_open else low <= value) or not value <= high:
        bracket = "(" if low_open else "["
        raise ValueError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value:g}")
    if not infinite and math.isinf(value):
        raise ValueError(f"{name} must be finite, got {value:g}")
    return float(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
