"""numpy in, numpy out, for functions of tensors."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def numpy_too(function: Callable[..., Any]) -> Callable[..., Any]:
    """numpy arrays in, numpy arrays out; the arrays' memory is shared."""

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        if not (args and isinstance(args[0], np.ndarray)):
            return function(*args, **options)
        found = function(*map(as_tensor, args), **{name: as_tensor(x) for name, x in options.items()})
        return tuple(x.numpy() for x in found) if isinstance(found, tuple) else found.numpy()

    return wrapper


def as_tensor(x: Any) -> Any:
    """An array as a tensor on its memory; whatever else it is, as it is."""
    if isinstance(x, tuple):
        return tuple(map(as_tensor, x))
    if not isinstance(x, np.ndarray):
        return x
    strided = all(step >= 0 and step % x.itemsize == 0 for step in x.strides)  # what torch can look at
    return torch.from_numpy(x if strided else np.ascontiguousarray(x))
