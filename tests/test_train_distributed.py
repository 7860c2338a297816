"""`react-fast train` under torchrun: the results, answers and weights of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from react_fast.cli import main

from . import tiny


def _words(folder: Path) -> list[str]:
    folder.mkdir()
    changes = {"model": {"dtype": "float64"}, "trainer": {"group_size": 4, "kl_coef": 0.1}}
    return tiny.train_words(folder, **changes)


def test_two_processes_that_share_the_weights_end_as_one(tmp_path):
    assert main(_words(tmp_path / "one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "react_fast.cli"]
    finished = subprocess.run(
        [*command, *_words(tmp_path / "two"), "--sharded", "true"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    one, two = tmp_path / "one/run", tmp_path / "two/run"
    for name in ("results.json", "answers/rl.sampled.json"):
        assert json.loads((one / name).read_text()) == json.loads((two / name).read_text())
    weights = [load_file(run / "checkpoints/rl/step-00000003/model.safetensors") for run in (one, two)]
    # float64 sums in another order, through six updates.
    torch.testing.assert_close(*weights, rtol=1e-7, atol=1e-9)
    steps = [len((run / "metrics.jsonl").read_text().splitlines()) for run in (one, two)]
    assert steps == [6, 6]  # one process writes
