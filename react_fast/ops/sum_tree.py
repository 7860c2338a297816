"""Sampling in proportion to priorities that change: a tree of their sums."""

from typing import Any

import numpy as np
import torch

from .. import _core
from . import _check
from ._arrays import as_tensor

Array = torch.Tensor | np.ndarray
_MOST = 1 << 48  # leaves whose bytes still have addresses


class SumTree:
    """Priorities of `capacity` entries, at first 0, to sample from in proportion, O(log n) an entry.

        P(i) = p_i / sum_j p_j

    On the CPU, in float64. Every sum is made of its parts and not of differences, so that it does not drift. numpy
    arrays or tensors in, the same out. Pickled by its priorities.

    Args:
        capacity: number of entries, in [1, 2^48].
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value; nothing changes.
    Source: Schaul et al. 2016 (arXiv:1511.05952), appendix B.2.1.
    """

    def __init__(self, capacity: int) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity must be an int, got {type(capacity).__name__}")
        if not 1 <= capacity <= _MOST:
            raise ValueError(f"capacity must be in [1, {_MOST}], got {capacity}")
        self.capacity = capacity
        self._nodes = torch.zeros(_core.sum_tree_size(capacity), dtype=torch.float64, device="cpu")
        self._address = self._nodes.data_ptr()
        _core.sum_tree_build(self._address, capacity)

    def __len__(self) -> int:
        return self.capacity

    @property
    def priorities(self) -> torch.Tensor:
        """[capacity] float64, a copy."""
        return self._nodes[: self.capacity].clone()

    @property
    def total(self) -> float:
        """Sum of the priorities."""
        return _core.sum_tree_summary(self._address, self.capacity)[0]

    @property
    def least(self) -> float:
        """The smallest priority above 0, which has the largest importance weight; infinity where all are 0."""
        return _core.sum_tree_summary(self._address, self.capacity)[1]

    def update(self, indices: Array, priorities: Array) -> None:
        """Set priorities; of an index that is there twice the last one stays.

        Args:
            indices: [B] int64 or int32, in [0, capacity).
            priorities: [B] float, >= 0 and finite; entries of priority 0 are never drawn.
        """
        which, values = _vector("indices", indices, np.int64), _vector("priorities", priorities, np.float64)
        if len(values) != len(which):
            raise ValueError(f"priorities must be [{len(which)}] like indices, got [{len(values)}]")
        name, i = _core.sum_tree_update(
            self._address, self.capacity, which.ctypes.data, values.ctypes.data, len(which)
        )
        if name == "indices":
            raise ValueError(f"indices must be in [0, {self.capacity}), got {which[i]} at {i}")
        if name:
            raise ValueError(f"priorities must be finite, >= 0 and sum to a float64, got {values[i]} at {i}")

    def sample(self, uniforms: Array) -> tuple[Any, Any]:
        """One entry from each of B strata of equal mass: the first whose prefix sum is above (k + u_k) total / B.

        Args:
            uniforms: [B] float in [0, 1), where in its stratum each entry is drawn.
        Returns: indices [B] int64, their priorities [B] float64.
        """
        places = _vector("uniforms", uniforms, np.float64)
        indices, found = np.empty(len(places), dtype=np.int64), np.empty(len(places))
        name, i = _core.sum_tree_sample(
            self._address,
            self.capacity,
            places.ctypes.data,
            len(places),
            indices.ctypes.data,
            found.ctypes.data,
        )
        if name == "uniforms":
            raise ValueError(f"uniforms must be in [0, 1), got {places[i]} at {i}")
        if name:
            raise ValueError("the tree is empty: every priority is 0")
        if isinstance(uniforms, torch.Tensor):
            return torch.from_numpy(indices), torch.from_numpy(found)
        return indices, found

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "priorities": self.priorities.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["capacity"])  # type: ignore[misc]
        self._nodes[: self.capacity] = torch.from_numpy(state["priorities"])
        _core.sum_tree_build(self._address, self.capacity)


def _vector(name: str, value: Any, dtype: Any) -> np.ndarray:
    """[B] contiguous of the tree's own dtype, which holds every number of those that are taken.

    An array that is so already is what every step of training passes: nothing but the glance is spent on it.
    """
    if not (type(value) is np.ndarray and value.dtype == dtype and value.flags.c_contiguous):
        x = (_check.integer if dtype is np.int64 else _check.floating)(name, as_tensor(value))
        if x.device.type != "cpu":
            raise ValueError(f"{name} must be on cpu like the tree, got {x.device}")
        value = x.detach().to(torch.int64 if dtype is np.int64 else torch.float64).contiguous().numpy()
    if value.ndim != 1:
        raise ValueError(f"{name} must be [B], got {list(value.shape)}")
    return value
