"""Runs that are killed again and again, in generation, updates and saves, end as the one that nobody killed."""

import io
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import react_fast.trainer.curves
from react_fast import cli
from react_fast.trainer.checkpoint import TENSORS, newest_complete

from .ranks import processes
from .tiny import train_words

KILLS = 50
ANY_TIME = "any time"
KINDS = ("generation", "update", "optimizer step", "write", "rename", "remove", ANY_TIME)
_FILES = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "remove", "os.mkdir": "write"}


class _Moments:
    """Tells `seen` what a run in `folder` is about to do: forwards, optimiser steps, changes of files."""

    def __init__(self, folder: Path, seen: Any) -> None:
        self._folder, self._seen = str(folder), seen
        register_module_forward_pre_hook(self._forward)
        register_optimizer_step_pre_hook(lambda *_: seen("optimizer step"))
        sys.addaudithook(self._audit)

    def _forward(self, module: Any, _: Any) -> None:
        if hasattr(module, "lm_head") or hasattr(module, "get_output_embeddings"):
            self._seen("update" if torch.is_grad_enabled() else "generation")

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            kind = "write" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
        else:
            path, kind = arguments[0] if arguments else None, _FILES.get(event)
        if kind and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._folder):
            self._seen(kind)


def _train(folder: Path, out: Any, words: list[str], kind: str, when: float) -> None:
    """Run the command; die at the event of a kind and that number, or after so many seconds. Tells where it
    ended."""
    events, began = Counter[str](), time.monotonic()

    def die() -> None:
        out.send((kind, events, 0.0))
        os.kill(os.getpid(), signal.SIGKILL)

    def seen(what: str) -> None:
        events[what] += 1
        if what == kind and events[what] == when:
            die()

    sys.stdout = io.StringIO()
    react_fast.trainer.curves.draw_curves = lambda *_: None  # most of the time of so small a run
    if kind == ANY_TIME:
        threading.Timer(when, die).start()
    _Moments(folder, seen)
    code = cli.main([*words, "--resume", "auto"])
    out.send((f"exit {code}", events, time.monotonic() - began))
    os._exit(0)


def _child(folder: Path, kind: str = "", when: float = 0) -> tuple[str, Counter[str], float]:
    """(how a run in the folder ended, its events, seconds)."""
    words = [*train_words(folder), "--trainer.credit", "attribution", "--trainer.epochs", "2"]
    context = processes()
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_train, args=(folder, theirs, words, kind, when))
    child.start()
    theirs.close()
    child.join(100)
    assert child.exitcode is not None, "the run hangs"
    return ours.recv()


def _of_time(name: str) -> bool:
    return "time" in name or name.endswith("_per_second")


def _outcome(run: Path) -> dict[str, Any]:
    newest = newest_complete(run / "checkpoints" / "rl")
    assert newest is not None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(newest / "model.safetensors"),
        "trainer": load_file(newest / TENSORS),
        "results": json.loads((run / "results.json").read_text()),
        "steps": [(line.pop("phase"), line["step"]) for line in lines],
        "metrics": [{name: x for name, x in line.items() if not _of_time(name)} for line in lines],
    }


def test_a_run_killed_at_fifty_moments_ends_as_if_it_had_not_been(tmp_path):
    draw, killed = random.Random(0), Counter[str]()
    (tmp_path / "whole").mkdir()
    end, events, seconds = _child(tmp_path / "whole")
    assert end == "exit 0"
    expected = _outcome(tmp_path / "whole" / "run")
    assert expected["metrics"][-1]["grad_norm"] > 0
    for number in itertools.count():
        if killed.total() >= KILLS:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        while True:
            kind = min(KINDS, key=killed.__getitem__)  # so that every kind has its share
            last = seconds / 2 if kind == ANY_TIME else events[kind] // 4 + 1
            when = draw.uniform(0, last) if kind == ANY_TIME else draw.randint(1, int(last))
            end, *_ = _child(folder, kind, when)
            if end == "exit 0":
                break
            killed[end] += 1
        found = _outcome(folder / "run")
        assert found.pop("steps") == expected["steps"]
        assert found.pop("results") == expected["results"]
        for part, values in found.items():
            torch.testing.assert_close(values, expected[part], rtol=0, atol=0, equal_nan=True)
    assert min(killed[kind] for kind in KINDS) >= KILLS // len(KINDS)
