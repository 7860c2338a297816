"""Shared by all tests: Triton kernels run in the interpreter, torch runs on one thread.

With REACT_FAST_TEST_DEVICE=cuda tensors are made on the GPU and the kernels run there: `python -m bench.gpu` does
so with the tests of the ops.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", str(int(os.environ.get("REACT_FAST_TEST_DEVICE") != "cuda")))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch

import react_fast
from react_fast import _core

from . import interpreter
from .contract import DEVICE
from .ranks import Ranks

THREADS = 1  # tests of threads set their own

if DEVICE == "cpu":
    interpreter.quicken()
else:
    torch.set_default_device(DEVICE)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker starts the gloo processes, not every one."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(autouse=True)
def _fixed_threads() -> Iterator[None]:
    """On a loaded machine four threads were seen to be 50 times slower than one."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread(_fixed_threads: None) -> None:
    """For tiny matrices."""
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "triton"] if DEVICE == "cpu" else ["triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every compiled backend in turn."""
    with react_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two, then four gloo processes, started when first needed."""
    group = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this machine can run, in turn."""
    previous = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(previous)
