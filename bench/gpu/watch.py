"""A pytest plugin (`-p bench.gpu.watch`): tells every test and every benchmark case, and the kernels it launched.

REACT_FAST_GPU_STAGE names the stage. In "tests" only what runs the ops' kernels is kept: tests with the fixture
`backend`, in its Triton half; of a rehearsal one of each function. Items come from every file in turn, so that a
run cut short has seen each file; of benchmarks the last first, whose shapes are the largest. What an earlier
session of the stage began is left out.
"""

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from . import launches
from .events import CRASHED, FILE, brief, left, rehearsing, tell, told

STAGE = os.environ.get("REACT_FAST_GPU_STAGE", "tests")
# A session's workers must all see the same tests, also one that takes another's place.
SESSION = os.environ.get("REACT_FAST_GPU_SESSION", "")
# Instruction sets and processes of the CPU are no matter of a GPU.
OTHER = {"isa", "ranks"}


def _on_kernels(item: Any) -> bool:
    given = set(item.fixturenames)
    parameters = getattr(item, "callspec", None)
    return (
        "backend" in given
        and not given & OTHER
        and (not parameters or parameters.params.get("backend") != "cpu")
    )


def _begun() -> set[str]:
    """Tests of this stage that an earlier session began."""
    mine = (e for e in told(Path(os.environ.get(FILE, os.devnull))) if e["stage"] == STAGE)
    return {e["test"] for e in mine if e.get("kind") == "began" and e["session"] != SESSION}


def firsts(items: Iterable[Any]) -> list[Any]:
    """One of the parametrisations of every test function, for a rehearsal."""
    return list({item.nodeid.partition("[")[0]: item for item in reversed(list(items))}.values())[::-1]


def in_turn(items: Iterable[Any]) -> list[Any]:
    """The first of every file, the second of every file, ..."""
    files: dict[str, list[Any]] = {}
    for item in items:
        files.setdefault(item.nodeid.split("::")[0], []).append(item)
    return [item for row in zip_longest(*files.values()) for item in row if item is not None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    begun = _begun()
    chosen = [item for item in items if item.nodeid not in begun]
    if STAGE == "tests":
        chosen = [item for item in chosen if _on_kernels(item)]
    else:
        chosen.reverse()
    kept = in_turn(firsts(chosen) if rehearsing() else chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        why = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
        tell(STAGE, kind="file", file=report.nodeid, why=brief(why[-1][1:] if why else report.longrepr))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    if left() <= 0:
        pytest.skip("no time left")
    tell(STAGE, kind="began", test=item.nodeid, session=SESSION)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: Any) -> Any:
    item.launched, item.began = set(), time.time()
    with ExitStack() as stack:
        with suppress(ImportError):  # without Triton nothing is launched
            stack.enter_context(launches.watched(lambda name, _: item.launched.add(name)))
        yield


def _why(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return brief(crash.message)
    told = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
    return brief(told).removeprefix("Skipped: ")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = (yield).get_result()
    if report.when != "call" and report.passed:
        return
    facts: dict[str, Any] = {
        "test": item.nodeid,
        "outcome": report.outcome if report.when == "call" or report.skipped else "failed",
        "seconds": round(time.time() - item.began, 3),
        "kernels": sorted(item.launched),
    }
    if not report.passed:
        facts["why"] = _why(report)
    tell(STAGE, kind="test", **facts)
    if "CUDA error" in facts.get("why", ""):
        os._exit(CRASHED)  # whatever follows here would fail as well
    case = getattr(getattr(item, "funcargs", {}).get("benchmark"), "extra_info", {})
    if "case" in case and report.passed:
        tell(STAGE, kind="case", **case, kernels=facts["kernels"])
