"""`react-fast train` as a user runs it: what it leaves, stopping it, going on, bad checkpoints."""

import errno
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import react_fast.trainer.checkpoint
import react_fast.trainer.curves
import react_fast.trainer.reporter
import react_fast.trainer.run
from react_fast import cli
from react_fast.trainer.checkpoint import newest_complete

from .tiny import train_words


def _weights(run: Path) -> dict[str, torch.Tensor]:
    newest = newest_complete(run / "checkpoints" / "rl")
    assert newest is not None
    return load_file(newest / "model.safetensors")


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main([*train_words(folder), "--trainer.credit", "attribution"]) == 0
    return folder / "run"


def test_a_run_leaves_config_metrics_curves_checkpoint_and_report(whole):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "results.json",
        "report.html",
        "environment.json",
    ):
        assert (whole / name).stat().st_size > 0, name
    assert list((whole / "tensorboard").rglob("events.out.*"))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["phase"], line["step"]) for line in lines]
    assert steps == [(phase, step) for phase in ("warm_start", "rl") for step in (1, 2, 3)]
    assert {"reward", "reward_std", "entropy", "grad_norm", "step_time", "time/rollout"} <= lines[-1].keys()
    results = json.loads((whole / "results.json").read_text())
    assert results.keys() == {"random", "warm_start", "rl", "gain"}
    for modes in results.values():
        for metrics in modes.values():
            for value, low, high in metrics.values():
                assert low <= value <= high


def test_transformers_loads_the_final_checkpoint(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    newest = newest_complete(whole / "checkpoints" / "rl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(newest), AutoTokenizer.from_pretrained(newest)
    ids = model.generate(
        **tokenizer("say 1:", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2
    )
    assert ids.shape[1] > 2


@pytest.fixture
def guided(tmp_path):
    """The folder of a run whose episodes are led by values, not by the policy alone."""
    ilql = {"algorithm": {"name": "ilql", "options": {"beta": 50.0}}, "tracker": {"enabled": False}}
    quick = {"steps": 20, "save_every": 0, "learning_rate": 0.05}
    assert cli.main(train_words(tmp_path, warm_start={"steps": 0}, trainer=quick, **ilql)) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["whole", "guided"])
def test_evaluate_repeats_the_results_of_the_run(kind, request, capsys, monkeypatch):
    run = request.getfixturevalue(kind)
    results = json.loads((run / "results.json").read_text())["rl"]
    expected = [
        f"{v:.1f} [{low:.1f}, {high:.1f}]" for v, low, high in (results[m]["reward"] for m in results)
    ]

    def shown() -> str:
        capsys.readouterr()
        assert cli.main(["evaluate", str(run)]) == 0
        return capsys.readouterr().out

    assert all(value in shown() for value in expected)
    monkeypatch.setattr(react_fast.trainer.run, "_own_engine", lambda *_: None)  # the policy alone
    assert all(value in shown() for value in expected) == (kind == "whole")


def test_report_draws_curves_and_page_again(whole, capsys):
    for name in ("curves.png", "report.html"):
        (whole / name).unlink()
    assert cli.main(["report", str(whole)]) == 0
    assert (whole / "curves.png").exists()
    assert (whole / "report.html").exists()
    assert "report.html" in capsys.readouterr().out


def test_a_trackers_state_of_another_version_is_told_in_one_line(whole, capsys, monkeypatch):
    def older(tracker, state):
        raise ValueError("state must be a tracker's state_dict, got one without 'credited'")

    monkeypatch.setattr(react_fast.tracker.CausalityTracker, "load_state_dict", older)
    assert cli.main(["report", str(whole)]) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"checkpoint \S+ is of another version: its tracker's state .* without 'credited'", error
    )
    assert error.count("\n") == 1


def test_explain_shows_tokens_and_writes_a_page(whole, capsys, tmp_path):
    page = tmp_path / "why.html"
    assert cli.main(["explain", str(whole), "--text", "say 1:", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "answer: " in printed
    for column in ("attribution", "effect"):
        assert column in printed
    words = ["--actions", "word", "--samples", "2", "--method", "saliency"]
    assert cli.main(["explain", str(whole), "--text", "say 1:", *words]) == 0
    assert re.search(r"say\s.*1:.* \[[+-].*, [+-].*\]", capsys.readouterr().out.replace("\n", " "))
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_ctrl_c_saves_exits_cleanly_and_resumes_to_the_same_weights(whole, tmp_path):
    words = [*train_words(tmp_path), "--trainer.credit", "attribution"]
    command = [sys.executable, "-m", "react_fast.cli", *words]
    run = tmp_path / "run"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ,
    )
    deadline = time.monotonic() + 100
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=100)[1]
    assert process.returncode in (0, 130), err  # 0: it was done before the signal came
    assert "Traceback" not in err
    if process.returncode == 130:
        assert "react-fast: interrupted" in err
        assert newest_complete(run / "checkpoints" / "warm_start") is not None
        assert cli.main([*words, "--resume", "auto"]) == 0
    assert _same(_weights(run), _weights(whole))


def test_a_run_of_another_precision_than_the_last_one(whole, tmp_path):
    assert cli.main([*train_words(tmp_path, warm_start={"steps": 1}), "--precision", "bfloat16"]) == 0
    weights = _weights(tmp_path / "run")
    assert {x.dtype for x in weights.values()} == {torch.float32}


def test_a_model_that_does_not_fit_leaves_the_runs_configuration(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = (run / "config.yaml").read_bytes()
    words = [*train_words(tmp_path), "--trainer.credit", "attribution", "--resume", "auto"]
    assert cli.main([*words, "--model.hidden_size", "32"]) == 2
    assert "must be [260, 32] torch.float32, got [260, 16]" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == config


def test_explain_and_report_name_what_they_cannot_read_or_write(whole, tmp_path, capsys):
    assert cli.main(["explain", str(whole), "--text", "say 1:", "--html", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"react-fast: html {tmp_path} cannot be written: Is a directory\n"
    assert cli.main(["explain", str(whole), "--text", ""]) == 2
    assert "text must hold at least one token, got an empty text" in capsys.readouterr().err
    for wrong, told in (
        (
            ["--actions", "turn"],
            "actions must be one of 'token', 'word', 'sentence', 'line', 'step', got 'turn'",
        ),
        (["--method", "lime"], "method must be one of"),
        (["--samples", "1"], "samples must be at least 2, got 1"),
    ):
        assert cli.main(["explain", str(whole), "--text", "say 1:", *wrong]) == 2
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert cli.main(["report", str(run)]) == 2
    assert capsys.readouterr().err == f"react-fast: run {run} has no metrics.jsonl: nothing was recorded\n"


def _full_disk(monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    """From its nth call on, what writes at this place finds the disk full."""
    function, calls = functools.reduce(getattr, place.split("."), react_fast.trainer), itertools.count(1)

    def write(*given: Any, **options: Any) -> Any:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*given, **options)

    monkeypatch.setattr(f"react_fast.trainer.{place}", write)


@pytest.mark.parametrize(
    ("place", "call", "survives"),
    [
        ("checkpoint.save_file", 1, None),
        ("checkpoint.save_file", 3, "rl/step-00000001"),
        ("reporter.append", 2, None),
        ("reporter.append", 5, "rl/step-00000001"),
        ("curves.draw_curves", 1, "rl/step-00000003"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    whole, tmp_path, capsys, monkeypatch, place, call, survives
):
    words = [*train_words(tmp_path), "--trainer.credit", "attribution"]
    checkpoints = tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        _full_disk(patch, place, call)
        assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("react-fast: ")
    assert err.count("\n") == 1
    assert "no space left on the disk" in err
    newest = newest_complete(checkpoints / "rl") or newest_complete(checkpoints / "warm_start")
    assert newest == (checkpoints / survives if survives else None)
    assert cli.main([*words, "--resume", "auto"]) == 0
    assert _same(_weights(tmp_path / "run"), _weights(whole))


def test_a_finished_phase_without_a_checkpoint_is_done_again(whole, tmp_path, capsys):
    """Going on from fresh weights would look like a result and be none."""
    run = tmp_path / "run"
    words = [*train_words(tmp_path), "--trainer.credit", "attribution", "--resume", "auto"]
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "warm_start")  # reinforcement learning has its own: nothing to do
    assert cli.main(words) == 0
    assert "done again" not in capsys.readouterr().out
    assert _same(_weights(run), _weights(whole))
    shutil.rmtree(run / "checkpoints")
    assert cli.main(words) == 0
    assert "warm start: no complete checkpoint is left, so it is done again" in capsys.readouterr().out
    assert _same(_weights(run), _weights(whole))
    assert json.loads((run / "results.json").read_text()) == json.loads((whole / "results.json").read_text())


def test_damaged_checkpoints_are_told_in_lines_of_their_own(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    damaged = sorted(run.glob("checkpoints/*/*/model.safetensors"))
    for path in damaged:
        path.write_bytes(b"damage")
    finished = subprocess.run(
        [sys.executable, "-m", "react_fast.cli", "evaluate", str(run)], capture_output=True, text=True
    )
    assert finished.returncode == 2
    lines = finished.stderr.splitlines()
    assert len(lines) == len(damaged) + 1
    assert all(line.startswith("react-fast: checkpoint passed over: ") for line in lines[:-1])
    assert lines[-1] == f"react-fast: run {run} has no complete checkpoint"
    words = [*train_words(tmp_path), "--resume", str(damaged[0].parent)]
    assert cli.main(words) == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(whole, tmp_path, capsys):
    words = [*train_words(tmp_path), "--trainer.credit", "attribution"]
    assert cli.main([*words, "--trainer.steps", "2"]) == 0
    run = tmp_path / "run"
    newest = newest_complete(run / "checkpoints" / "rl")
    with open(newest / "model.safetensors", "r+b") as file:
        file.write(b"damage")
    state = json.loads((run / "state.json").read_text())
    del state["results"]["rl"]
    (run / "state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match=newest.name):
        assert cli.main([*words, "--resume", "auto"]) == 0
    assert _same(_weights(run), _weights(whole))
