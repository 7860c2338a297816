"""A stage's process: its own process group, its own time, its end told in one word."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# Seconds between asking a process to end and ending it, and between two looks at it.
GRACE, LOOK = 3.0, 0.2
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_C = ctypes.CDLL(None)  # loaded before a fork, behind which little may be done


def _with_parent() -> None:
    """If the suite is killed the stage is, too; where the system cannot do that, it ends with its own time."""
    with suppress(OSError, AttributeError):
        _C.prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _end(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run(
    command: Sequence[str],
    seconds: float,
    *,
    cwd: Path,
    environment: Mapping[str, str],
    log: Path,
    meanwhile: Callable[[], None] = lambda: None,
) -> str:
    """Run a command for at most `seconds`: "done", "ended by its time", or "failed with code 1".

    `meanwhile` is called about five times a second; what the command prints is appended to `log`.
    """
    deadline = time.monotonic() + seconds
    with log.open("ab") as out:
        out.write(f"\n=== {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_with_parent,
        )
    late = False
    try:
        while process.poll() is None:
            meanwhile()
            if time.monotonic() > deadline:
                if late:
                    _end(process, signal.SIGKILL)
                else:
                    _end(process, signal.SIGTERM)
                    late, deadline = True, deadline + GRACE
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
    finally:
        _end(process, signal.SIGKILL)  # what it may have left running, too
        process.wait()
    if late:
        return "ended by its time"
    return "done" if process.returncode == 0 else f"failed with code {process.returncode}"
