"""gloo processes that stay up for a test module: ranks.run(f, ...) calls f(rank, world, ...) on each."""

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context, set_forkserver_preload
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = (
    120  # a collective that waits longer hangs; starting four processes takes ten seconds on a loaded machine
)

_LIBRARIES = [
    "matplotlib.figure",
    "react_fast.trainer.run",
    "react_fast.trainer.trainer",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
]


def processes() -> Any:
    """Where processes start with everything imported: once, not by each of them."""
    set_forkserver_preload(["torch.distributed.fsdp", "tests.conftest", *_LIBRARIES])
    return get_context("forkserver")


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """Runs what comes through the pipe, and answers None or a traceback."""
    torch.set_num_threads(1)
    os.environ["REACT_FAST_TILE_MIB"] = "1"  # ranks with other rows have another number of tiles
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # the others may be gone, and destroying the group would wait for them
        try:
            torch.manual_seed(0)
            function(rank, world, *arguments)
            pipe.send(None)
        except BaseException:
            with suppress(BrokenPipeError):  # another rank failed first, and no one listens any more
                pipe.send(traceback.format_exc())


class Ranks:
    """`world` processes, one thread each, started at the first run and again after a failure."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self._folder, self._starts = world, folder, 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Raises AssertionError with the traceback of the first rank that failed, or when one does not answer."""
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        waiting = dict(zip(self._pipes, range(self.world), strict=True))
        while waiting:
            ready = wait(list(waiting), SECONDS)
            failure = None if ready else f"ranks {sorted(waiting.values())} do not answer"
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    text = pipe.recv()
                except EOFError:
                    text = "it died"
                failure = failure or (text and f"rank {rank}: {text}")
            if failure:
                self.stop()
                raise AssertionError(failure)

    def _start(self) -> None:
        context = processes()
        self._starts += 1
        store = str(
            self._folder / f"store{self._starts}"
        )  # a used one would answer for processes that are gone
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []


class Collectives(TorchDispatchMode):
    """Counts the collectives, of torch.distributed and of DTensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        own = any(word in func.__name__ for word in ("wait", "wrap"))  # what belongs to a collective
        if func.namespace in ("c10d", "_c10d_functional") and not own:
            self.count += 1
        return func(*args, **(kwargs or {}))
