"""Moments of a stream of scores, for every id: what attribution accumulates into over training."""

import os
from typing import Any, NamedTuple

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

    With `decay` below 1 a score that came k steps before now weighs w = decay^k; `advance` ends a step.

        mean = sum w x / sum w                    n = (sum w)^2 / sum w^2, the effective count
        M2 = n * sum w (x - mean)^2 / sum w       variance = M2 / (n - 1)      standard error = sqrt(variance / n)

    For equal weights that is what it is without decay. Of independent scores the variance is unbiased whatever
    they weigh, and variance / n is that of the weighted mean. An id without new scores keeps its mean and n, as
    its weights keep their proportions.

    Args:
        size: ids are in [0, size).
        device: of the state and of what `update` gets.
        decay: in (0, 1].
    Source: Welford 1962; Chan, Golub & LeVeque 1979 for merging; Kish 1965, section 8.2, for the effective count.
    """

    def __init__(self, size: int, device: torch.device | str | None = None, *, decay: float = 1.0) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"size must be a whole number of ids, got {size!r}")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise ValueError(f"decay must be a number in (0, 1], got {decay!r}")
        self.decay = float(decay)
        self.count = torch.zeros(size, dtype=torch.int64, device=device)
        self._mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._m2 = torch.zeros(size, dtype=torch.float64, device=device)
        self._aged = None if decay == 1 else _Aged(self._mean.clone(), self._mean.clone())

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
        if self._aged is None:
            accumulate(scores.detach(), ids, mask, self.count, self._mean, self._m2)
            return
        now = RunningMoments(len(self.count), self.count.device)
        accumulate(scores.detach(), ids, mask, now.count, now._mean, now._m2)
        weight = now.count.double()
        self._add(now, _Aged(weight, weight))

    def advance(self, steps: int = 1) -> None:
        """Let steps go by: all that was seen so far weighs decay**steps times as much from now on."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be a whole number, got {steps!r}")
        if self._aged is not None:
            self._aged = _Aged(self._aged.weight * self.decay**steps, self._aged.effective)

    def forget(self, ids: torch.Tensor) -> None:
        """Let ids [n] int64 be as if nothing had been seen of them."""
        for values in (self.count, self._mean, self._m2, *(self._aged or ())):
            values.index_fill_(0, _check.integer("ids", ids).long(), 0)

    def merge(self, other: "RunningMoments") -> None:
        """Add what `other`, of the same size and decay, has seen up to the same step.

        One that ended k steps earlier is advanced by k first.
        """
        _check.shape("other", other.count, self.count.shape, "these moments")
        if other.decay != self.decay:
            raise ValueError(f"other must have decay {self.decay:g} like these moments, got {other.decay:g}")
        if self._aged is not None:
            assert other._aged is not None
            self._add(other, other._aged)
            return
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
    def weight(self) -> torch.Tensor:
        """[size] float64: sum of the weights as they are now; `count` without decay."""
        return self.count.double() if self._aged is None else self._aged.weight.clone()

    @property
    def effective_count(self) -> torch.Tensor:
        """[size] float64: as many equally weighted observations tell as much; `count` without decay."""
        return self.count.double() if self._aged is None else self._aged.effective.clone()

    @property
    def variance(self) -> torch.Tensor:
        """[size] float64, M2 / (effective count - 1); NaN for fewer than two observations."""
        freedom = self.effective_count - 1
        # One score alone may have an effective count of 1 + rounding.
        return torch.where((self.count > 1) & (freedom > 1e-9), self._m2 / freedom, torch.nan)

    @property
    def standard_error(self) -> torch.Tensor:
        """[size] float64, of the mean; NaN for fewer than two observations."""
        return (self.variance / self.effective_count).sqrt()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of "count", "mean" and "m2"; with decay also of "weight", the sum of weights, and "effective"."""
        state = {"count": self.count.clone(), "mean": self._mean.clone(), "m2": self._m2.clone()}
        if self._aged is not None:
            state |= {"weight": self._aged.weight.clone(), "effective": self._aged.effective.clone()}
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to a state of the same size, as `state_dict` gave it.

        Raises: TypeError for another dtype, ValueError for another size, or if only one of both has a decay.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"state must hold {', '.join(own)} like these moments, got {', '.join(state)}")
        for name, value in own.items():
            _check.dtype(name, _check.tensor(name, state[name]), value.dtype, "these moments")
            _check.shape(name, state[name], value.shape, "these moments")
        found = {name: state[name].to(value.device).contiguous().clone() for name, value in own.items()}
        self.count, self._mean, self._m2 = (found[name] for name in ("count", "mean", "m2"))
        if self._aged is not None:
            self._aged = _Aged(found["weight"], found["effective"])

    def _add(self, other: "RunningMoments", aged: "_Aged") -> None:
        """Merge under weights: shares of the weight take the place of shares of the count."""
        assert self._aged is not None
        total = self._aged.weight + aged.weight
        # Weights that decayed to 0 on both sides stay as they are here, unless there is nothing here.
        share = torch.where(total > 0, aged.weight / total, (self.count == 0).double())
        rest = 1 - share
        delta = other._mean - self._mean
        spread = _quotient(rest * self._m2, self._aged.effective) + _quotient(
            share * other._m2, aged.effective
        )
        squares = _quotient(rest * rest, self._aged.effective) + _quotient(share * share, aged.effective)
        effective = _quotient(torch.ones_like(squares), squares)
        self._mean = self._mean + delta * share
        self._m2 = (spread + delta * delta * rest * share) * effective
        self.count = self.count + other.count
        self._aged = _Aged(total, effective)


class _Aged(NamedTuple):
    """Sum of weights, which decays, and effective count, which does not; [size] float64."""

    weight: torch.Tensor
    effective: torch.Tensor


def _quotient(value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """value / by; 0 where `by` is 0."""
    return torch.where(by > 0, value / by, 0.0)


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
