"""Moments of a stream of scores, for every id: what attribution accumulates into over training."""

import os
from typing import Any

import torch

from .. import _core, reference
from . import _check
from ._arrays import as_tensor
from .backend import address, register, use_reference

Maybe = torch.Tensor | None


class RunningMoments:
    """Count, mean and M2 (sum of squared deviations) of a stream of scores, for every id.

        n += 1      d = x - mean      mean += d / n      M2 += d (x - mean)

    The result does not depend, to rounding, on how the stream is cut into updates, and two states merge as if one
    had seen both. Sums are float64; every run gives the same bits.

    Args:
        size: ids are in [0, size).
        device: of the state and of what `update` gets.
    Source: Welford 1962; Chan, Golub & LeVeque 1979 for merging.
    """

    def __init__(self, size: int, device: torch.device | str | None = None) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"size must be a whole number of ids, got {size!r}")
        self.count = torch.zeros(size, dtype=torch.int64, device=device)
        self._mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._m2 = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add scores to the moments of their ids; those with `mask` false do not exist.

        Args:
            scores: [...] float32, bfloat16, float16 or float64, a tensor or a numpy array. A NaN that counts
                makes its own id NaN.
            ids: [...] int32 or int64, in [0, size) where the mask is true, anything elsewhere.
            mask: [...] bool or 0/1 integers.
        Raises: TypeError for another dtype; ValueError if shapes or devices differ; IndexError for a counting id
            outside [0, size), and then nothing has been added. On CUDA, where looking would wait for the device,
            such a score is left out; REACT_FAST_CHECKED=1 in the environment raises there too.
        """
        scores, ids, mask = as_tensor(scores), as_tensor(ids), as_tensor(mask)
        _check.floating("scores", scores)
        _check.integer("ids", ids)
        _check.shape("ids", ids, scores.shape, "scores")
        _check.device("scores", scores, self.count.device, "the moments")
        _check.device("ids", ids, scores.device, "scores")
        if mask is not None:
            mask = _check.mask("mask", mask, scores.shape, "scores", scores.device)
        accumulate = reference.accumulate_by_id if use_reference() else _accumulate_by_id
        accumulate(scores.detach(), ids, mask, self.count, self._mean, self._m2)

    def merge(self, other: "RunningMoments") -> None:
        """Add what `other`, of the same size, has seen."""
        _check.shape("other", other.count, self.count.shape, "these moments")
        share = other.count.double() / (self.count + other.count).clamp_min(1)
        delta = other._mean - self._mean
        self._mean = self._mean + delta * share
        self._m2 = self._m2 + other._m2 + delta * delta * self.count * share
        self.count = self.count + other.count

    @property
    def mean(self) -> torch.Tensor:
        """[size] float64; 0 without observations."""
        return self._mean.clone()

    @property
    def variance(self) -> torch.Tensor:
        """[size] float64, M2 / (count - 1); NaN for fewer than two observations."""
        return torch.where(self.count > 1, self._m2 / (self.count - 1), torch.nan)

    @property
    def standard_error(self) -> torch.Tensor:
        """[size] float64, of the mean; NaN for fewer than two observations."""
        return (self.variance / self.count).sqrt()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of "count", "mean" and "m2"."""
        return {"count": self.count.clone(), "mean": self._mean.clone(), "m2": self._m2.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to a state of the same size, as `state_dict` gave it.

        Raises: TypeError for another dtype, ValueError for another size.
        """
        for name, own in self.state_dict().items():
            _check.dtype(name, _check.tensor(name, state[name]), own.dtype, "these moments")
            _check.shape(name, state[name], own.shape, "these moments")
        device = self.count.device
        self.count, self._mean, self._m2 = (
            state[name].to(device).contiguous().clone() for name in ("count", "mean", "m2")
        )


def _refuse(wrong: int, size: int) -> None:
    raise IndexError(f"ids must be in [0, {size}) where mask is true, got {wrong}")


def _accumulate_cpu(
    scores: torch.Tensor, ids: torch.Tensor, mask: Maybe, count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor
) -> None:  # fmt: skip
    x, places = scores.double().contiguous(), ids.long().contiguous()
    keep = None if mask is None else mask.contiguous()
    first = _core.accumulate_by_id(
        x.data_ptr(), places.data_ptr(), address(keep), x.numel(), len(count), count.data_ptr(), mean.data_ptr(),
        m2.data_ptr(),
    )  # fmt: skip
    if first >= 0:
        _refuse(int(places.reshape(-1)[first]), len(count))


def _accumulate_triton(
    scores: torch.Tensor, ids: torch.Tensor, mask: Maybe, count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor
) -> None:  # fmt: skip
    from ..kernels import moments as kernels

    if os.environ.get("REACT_FAST_CHECKED") == "1":
        outside = (ids < 0) | (ids >= len(count))
        wrong = ids[outside if mask is None else outside & mask]
        if len(wrong):
            _refuse(int(wrong[0]), len(count))
    kernels.accumulate_by_id(scores, ids, mask, count, mean, m2)


def _accumulate_fake(*_: Any) -> None:
    return None


_accumulate_by_id = register(
    "accumulate_by_id",
    "(Tensor scores, Tensor ids, Tensor? mask, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2) -> ()",
    cpu=_accumulate_cpu,
    triton=_accumulate_triton,
    fake=_accumulate_fake,
)
