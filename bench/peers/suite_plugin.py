"""A pytest plugin for another package's tests: patches the package and counts the calls of what it replaced.

In the environment: REACT_FAST_SUITE, the package; REACT_FAST_SUITE_CALLS, the JSON file that is written at the
end, {replaced name: [calls, how many of them went on to the original]}. With REACT_FAST_DISABLE the package stays
as it is and all else is the same. Processes that a test starts itself are not patched.
"""

import dataclasses
import functools
import importlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from react_fast.integrations import PatchError, patching
from react_fast.integrations.points import Point

NAME = os.environ.get("REACT_FAST_SUITE", "")
ENTERED: Counter[str] = Counter()
HANDED_ON: Counter[str] = Counter()


def _counting(counter: Counter[str], target: str, called: Any, wrapped: Any) -> Any:
    """A function, class method or class with `apply`, its calls counted; outwards a wrapper of `wrapped`."""
    if isinstance(called, classmethod):
        return classmethod(_counting(counter, target, called.__func__, wrapped.__func__))
    function = getattr(called, "apply", called)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counter[target] += 1
        return function(*args, **kwargs)

    if isinstance(called, type):
        return type(called.__name__, (called,), {"apply": staticmethod(counted)})
    counted.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return counted


def counted(point: Point) -> Point:
    def replacement(original: Any) -> Any:
        ours = point.replacement(_counting(HANDED_ON, point.target, original, original))
        return _counting(ENTERED, point.target, ours, original)

    return dataclasses.replace(point, replacement=replacement)


def pytest_configure(config: pytest.Config) -> None:
    integration = patching.find(NAME)
    points = tuple(map(counted, integration.points))
    module: Any = importlib.import_module(f"react_fast.integrations.{NAME}")
    module.INTEGRATION = dataclasses.replace(integration, points=points)
    try:
        patching.patch(NAME)
    except PatchError as error:
        raise pytest.UsageError(f"{NAME} cannot be patched: {error}") from error
    for counter in (ENTERED, HANDED_ON):
        counter.clear()  # of the comparison before the swap


def pytest_unconfigure(config: pytest.Config) -> None:
    found = {
        point.target: (ENTERED[point.target], HANDED_ON[point.target]) for point in patching.find(NAME).points
    }
    if path := os.environ.get("REACT_FAST_SUITE_CALLS"):
        Path(path).write_text(json.dumps(found))
