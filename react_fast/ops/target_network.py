"""The target network of Q-learning: Polyak averages and periodic copies."""

from collections.abc import Iterable
from typing import Any

import torch

from .. import reference
from . import _check
from .backend import use_reference

Parameters = torch.nn.Module | Iterable[torch.Tensor]

# What a small step cannot be added to: tau times the difference is below one unit of the last place.
_NARROW = (torch.bfloat16, torch.float16)


def polyak_update(target: Parameters, online: Parameters, *, tau: float) -> None:
    """Move the target network towards the online one, in place and without gradient.

        target <- target + tau (online - target)

    Two modules: parameters in their order, and buffers are copied whole (running statistics and counters are no
    weights to average). Two iterables of tensors: each is averaged. Sharded parameters (DTensor) are updated in
    their local parts, without communication. tau = 1 is an exact copy.

    Args:
        target, online: modules, or iterables of tensors, alike in number, shape, dtype and device.
        tau: in [0, 1].
    Raises: ValueError for another number of tensors, another shape, device or placement, tau outside [0, 1], or
        one tensor given as both; TypeError for a wrong type or dtype, and for a bfloat16 or float16 target with
        tau below 1: steps below half a unit of the last place are lost, so that it would stop moving. Keep a
        float32 target, or copy with tau = 1.
    Source: Lillicrap et al. 2016 (arXiv:1509.02971).
    """
    tau = _check.number("tau", tau, low=0.0, high=1.0)
    mine, yours = _tensors("target", target), _tensors("online", online)
    old, new = _buffers(target, online)
    _check_alike(mine, yours, tau)
    _check_alike(old, new, 1.0)
    if use_reference():
        return reference.polyak_update(target, online, tau=tau)
    with torch.no_grad():
        _move([_local(x) for x in mine], [_local(x) for x in yours], tau)
        _move([_local(x) for x in old], [_local(x) for x in new], 1.0)
    return None


class TargetUpdate:
    """When and how far the target network moves: `step()` once an optimizer step.

    Args:
        target, online: see `polyak_update`; modules, or lists of tensors.
        every: steps from one update to the next, at least 1.
        tau: how far an update goes; 1 copies. every = 1 and a small tau: Polyak; every = 1000, tau = 1: periodic.
    """

    def __init__(self, target: Parameters, online: Parameters, *, every: int = 1, tau: float = 1.0) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.tau, self.steps = every, _check.number("tau", tau, low=0.0, high=1.0), 0
        self.target = target if isinstance(target, torch.nn.Module) else _tensors("target", target)
        self.online = online if isinstance(online, torch.nn.Module) else _tensors("online", online)
        _check_alike(_tensors("target", self.target), _tensors("online", self.online), self.tau)

    def step(self) -> bool:
        """Count a step; true if the target moved."""
        self.steps += 1
        if self.steps % self.every:
            return False
        polyak_update(self.target, self.online, tau=self.tau)
        return True

    def state_dict(self) -> dict[str, int]:
        """The counter; the target's weights are its own."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        steps = state.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state must be what state_dict() returned, got {state!r}")
        self.steps = steps


def _tensors(name: str, given: Parameters) -> list[torch.Tensor]:
    found = list(given.parameters()) if isinstance(given, torch.nn.Module) else given
    if isinstance(found, torch.Tensor) or not isinstance(found, Iterable):
        raise TypeError(f"{name} must be a module or an iterable of tensors, got {type(given).__name__}")
    return [_check.floating(f"{name}[{i}]", x) for i, x in enumerate(found)]


def _buffers(target: Parameters, online: Parameters) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    if not (isinstance(target, torch.nn.Module) and isinstance(online, torch.nn.Module)):
        return [], []
    return list(target.buffers()), list(online.buffers())


def _check_alike(target: list[torch.Tensor], online: list[torch.Tensor], tau: float) -> None:
    if len(target) != len(online):
        raise ValueError(f"target must have {len(online)} tensors like online, got {len(target)}")
    for i, (mine, yours) in enumerate(zip(target, online, strict=True)):
        name, like = f"target[{i}]", f"online[{i}]"
        _check.shape(name, mine, yours.shape, like)
        _check.dtype(name, mine, yours.dtype, like)
        _check.device(name, mine, yours.device, like)
        if getattr(mine, "placements", None) != getattr(yours, "placements", None):
            raise ValueError(f"{name} must be placed like {like}, got {getattr(mine, 'placements', None)}")
        if mine is yours:
            raise ValueError(f"{name} must not be {like} itself, got the same tensor twice")
        if mine.dtype in _NARROW and tau < 1:
            kind = str(mine.dtype).removeprefix("torch.")
            raise TypeError(
                f"{name} must be float32 or float64 with tau {tau:g}, got {kind}: small steps would round away"
            )


def _local(x: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return x.to_local() if hasattr(x, "to_local") else x


def _move(target: list[torch.Tensor], online: list[torch.Tensor], tau: float) -> None:
    if not target or tau == 0:
        return
    if tau == 1:
        torch._foreach_copy_(target, online)
    else:
        torch._foreach_lerp_(target, online, tau)
