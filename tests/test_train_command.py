"""`react-fast train` as a user runs it: what it leaves, stopping it, going on, bad checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def test_evaluate_repeats_the_results_of_the_run(whole, capsys):
    assert cli.main(["evaluate", str(whole)]) == 0
    results = json.loads((whole / "results.json").read_text())["rl"]["greedy"]["chrf"]
    assert f"{results[0]:.1f} [{results[1]:.1f}, {results[2]:.1f}]" in capsys.readouterr().out


def test_report_draws_curves_and_page_again(whole, capsys):
    for name in ("curves.png", "report.html"):
        (whole / name).unlink()
    assert cli.main(["report", str(whole)]) == 0
    assert (whole / "curves.png").exists()
    assert (whole / "report.html").exists()
    assert "report.html" in capsys.readouterr().out


def test_explain_shows_tokens_and_writes_a_page(whole, capsys, tmp_path):
    page = tmp_path / "why.html"
    assert cli.main(["explain", str(whole), "--text", "say 1:", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "answer: " in printed
    for column in ("attribution", "effect"):
        assert column in printed
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


def test_a_killed_run_resumes_to_the_same_weights(whole, tmp_path):
    """Nothing is saved on a kill: the newest complete checkpoint is what there is."""
    words = [*train_words(tmp_path), "--trainer.credit", "attribution"]
    process = subprocess.Popen([sys.executable, "-m", "react_fast.cli", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while newest_complete(tmp_path / "run" / "checkpoints" / "warm_start") is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert cli.main([*words, "--resume", "auto"]) == 0
    assert _same(_weights(tmp_path / "run"), _weights(whole))


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
