"""Ours in the place of other packages' functions, and theirs back: all names of a package at once, or none."""

import difflib
import importlib
import logging
import os
import sys
import threading
from types import TracebackType
from typing import Any, NamedTuple

from .points import Integration, PatchError, check_parity, check_signature, check_version, located

_log = logging.getLogger("react_fast")
_lock = threading.RLock()
# Packages with an integration, by the name that `patch` takes; the module has INTEGRATION.
NAMES = ("nemo_rl", "openrlhf", "prime_rl", "slime", "stable_baselines3", "torchrl", "trl", "verl")
_KEPT = __package__.partition(".")[0]  # our own modules hold originals and replacements side by side


class _Swap(NamedTuple):
    """One name: what was there and what is."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any
    place: str


_active: dict[str, list[_Swap]] = {}
_told: set[str] = set()


class Patch:
    """What `patch` returns. As a context it patches where nothing is patched, so that it can be entered again;
    leaving it, or the outermost of several, takes back what it replaced, and nothing that another call did.
    """

    def __init__(self, name: str, swaps: list[_Swap] | None) -> None:
        self.name, self._swaps, self._depth = name, swaps, 0

    def __enter__(self) -> "Patch":
        with _lock:
            self._swaps = _patched(self.name) or self._swaps
            self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            self._depth -= 1
            own = self._swaps is not None and _active.get(self.name) is self._swaps
            if own and self._depth == 0:
                unpatch(self.name)


def patch(name: str) -> Patch:
    """Let another trainer compute with react_fast: `patch("trl")`, or `with patch("trl"):`.

    Every name is checked first: the package's version, the signature, and the numbers and gradients of original
    and ours on a few rows. Then all are replaced, or none. One line a name goes to the logger "react_fast".

    Args:
        name: one of NAMES, "trl" for example; `react-fast info --integrations` lists what each replaces.
    Returns: a context manager that need not be used, and can be used again: entering it patches anew what was
        taken back. Patching what is patched changes nothing.
    Raises: PatchError (a RuntimeError) in one line, with everything left as it was: package missing, another
        version or signature, an attribute that is gone, other numbers. ValueError for a name without integration.

    Where the environment has REACT_FAST_DISABLE=1, or this name in it (a list with commas), nothing is replaced.
    """
    with _lock:
        return Patch(name, _patched(name))


def _patched(name: str) -> list[_Swap] | None:
    """What is replaced now; None where that was before, or is not wanted."""
    integration = find(name)
    if disabled(name):
        if name not in _told:
            _told.add(name)
            _log.warning("%s is left as it is: REACT_FAST_DISABLE", name)
        return None
    if name in _active:
        return None
    swaps = _planned(integration)
    _put(swaps)
    _active[name] = swaps
    for swap in swaps:
        _log.info("%s is replaced by react_fast", swap.place)
    return swaps


def unpatch(name: str) -> None:
    """Put the package's own objects back, also where a module imported ours since. Without a patch: nothing."""
    with _lock:
        find(name)
        swaps = _active.pop(name, [])
        for swap in reversed(swaps):
            if vars(swap.owner).get(swap.attribute) is swap.replacement:
                setattr(swap.owner, swap.attribute, swap.original)
            else:
                _log.warning("%s was replaced again by someone else and is left so", swap.place)
        originals = {id(swap.replacement): swap.original for swap in swaps}
        for owner, attribute, held in _bindings(originals):
            setattr(owner, attribute, originals[id(held)])


def is_patched(name: str) -> bool:
    return name in _active


def disabled(name: str) -> bool:
    words = {word.strip().lower() for word in os.environ.get("REACT_FAST_DISABLE", "").split(",")}
    return not words.isdisjoint({name, "1", "true", "yes", "all"})


def find(name: str) -> Integration:
    """The integration of that name. Raises: ValueError that names those there are."""
    if name not in NAMES:
        near = difflib.get_close_matches(str(name).lower(), NAMES, 1)
        raise ValueError(
            f"name must be one of {', '.join(NAMES)}, got {name!r}{f'; {near[0]}?' if near else ''}"
        )
    return importlib.import_module(f".{name}", __package__).INTEGRATION


def check(integration: Integration) -> list[tuple[Any, str, Any, Any]]:
    """(owner, attribute, original, replacement) of every point once all are checked. Raises: PatchError."""
    check_version(integration)
    places = [located(point) for point in integration.points]
    for point, (_, _, original) in zip(integration.points, places, strict=True):
        check_signature(point, original)
    found = []
    for point, (owner, attribute, original) in zip(integration.points, places, strict=True):
        replacement = point.replacement(original)
        check_parity(point, original, replacement)
        found.append((owner, attribute, original, replacement))
    return found


def _planned(integration: Integration) -> list[_Swap]:
    found = check(integration)
    swaps = [_Swap(*place, point.target) for point, place in zip(integration.points, found, strict=True)]
    by_original = {
        id(swap.original): swap
        for point, swap in zip(integration.points, swaps, strict=True)
        if point.aliases
    }
    own = {(id(swap.owner), swap.attribute) for swap in swaps}
    for module, name, held in _bindings(by_original):
        if (id(module), name) not in own:
            swap = by_original[id(held)]
            place = f"{module.__name__}.{name}"
            swaps.append(_Swap(module, name, swap.original, swap.replacement, place))
    return swaps


def _bindings(wanted: dict[int, Any]) -> list[tuple[Any, str, Any]]:
    """(module, name, object) of every global of an imported module, ours aside, whose id is among `wanted`."""
    found = []
    for name, module in list(sys.modules.items()) if wanted else ():
        if name.partition(".")[0] != _KEPT:
            globals_ = list(getattr(module, "__dict__", {}).items())
            found += [(module, key, held) for key, held in globals_ if id(held) in wanted]
    return found


def _put(swaps: list[_Swap]) -> None:
    done: list[_Swap] = []
    try:
        for swap in swaps:
            setattr(swap.owner, swap.attribute, swap.replacement)
            done.append(swap)
    except Exception as error:
        for past in reversed(done):
            setattr(past.owner, past.attribute, past.original)
        raise PatchError(f"{swap.place} cannot be replaced: {error}") from error
