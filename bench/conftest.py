"""Threads of every benchmark: all cores, or REACT_FAST_BENCH_THREADS."""

import os

import pytest
import torch

THREADS = int(os.environ.get("REACT_FAST_BENCH_THREADS", os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _fixed_threads() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return
