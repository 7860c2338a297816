"""Shared by all tests: Triton kernels run in the interpreter, torch runs on two threads."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

import react_fast
from react_fast import _core

from .ranks import Ranks

THREADS = 2


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter calls int() on one-element arrays, which numpy 2.5 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if triton.__version__.startswith("3.6"):
    _mend_interpreter()


def _scan_by_doubling(self: Any, given: Any) -> list[Any]:
    """The interpreter's scan in log2(n) joins of whole blocks, as GPUs do it, instead of one join an element."""
    found, shift = [x.handle.data for x in given], 1
    if found[0].ndim != 1:
        return _scan_by_element(self, given)
    while shift < found[0].size:
        near = [self.to_tensor(np.roll(part, shift), x.dtype) for part, x in zip(found, given, strict=True)]
        far = [self.to_tensor(part, x.dtype) for part, x in zip(found, given, strict=True)]
        joined = self.combine_fn.fn(*near, *far)
        joined = joined if isinstance(joined, tuple) else (joined,)
        first = np.arange(found[0].size) < shift
        found = [
            np.where(first, part, y.handle.data).astype(part.dtype)
            for part, y in zip(found, joined, strict=True)
        ]
        shift *= 2
    return [self.to_tensor(part, x.dtype) for part, x in zip(found, given, strict=True)]


_scan_by_element = interpreter.ScanOps.generic_scan
interpreter.ScanOps.generic_scan = _scan_by_doubling


@pytest.fixture(autouse=True)
def _fixed_threads() -> Iterator[None]:
    """On a loaded machine four threads were seen to be 50 times slower than one; two keep it honest."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread(_fixed_threads: None) -> None:
    """For tiny matrices."""
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "triton"])
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
