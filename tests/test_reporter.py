"""The reporter records every step, shows the same numbers, and forgets what a resumed run will do again."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from react_fast.trainer.curves import draw_curves, smooth
from react_fast.trainer.records import read_records
from react_fast.trainer.reporter import Reporter


def _console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def _reporter(folder, **options):
    options.setdefault("console", _console())
    return Reporter(folder, {"warm_start": 4, "rl": 4}, **options)


def _steps(folder, file="metrics.jsonl"):
    return [(record["phase"], record["step"]) for record in read_records(folder / file)]


def test_metrics_are_on_disk_at_once(tmp_path):
    reporter = _reporter(tmp_path)
    reporter.log(1, "rl", {"reward": 0.5, "count": 3, "loss": torch.tensor(2.0), "kl": math.nan})
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert (record["phase"], record["step"], record["reward"], record["count"]) == ("rl", 1, 0.5, 3)
    assert record["loss"] == 2.0
    assert math.isnan(record["kl"])
    reporter.close()


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    with (
        _reporter(tmp_path) as reporter,
        pytest.raises(TypeError, match="metric name must be a number, got str"),
    ):
        reporter.log(1, "rl", {"name": "grpo"})


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _reporter(tmp_path) as reporter:
        for step in range(1, 4):
            reporter.log(step, "rl", {"reward": step / 4})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rl")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_plain_lines_are_few_and_end_with_the_last_step(tmp_path):
    console = _console()
    with Reporter(tmp_path, {"rl": 100}, console=console, every_seconds=3600) as reporter:
        for step in range(1, 101):
            reporter.log(step, "rl", {"reward": 0.25, "loss": 1.5, "step_time": 9.0})
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["rl step 1/100", "rl step 100/100"]
    assert "reward 0.25" in lines[1]
    assert "loss 1.5" in lines[1]


def test_plain_lines_tell_the_time_left(tmp_path):
    console = _console()
    with Reporter(tmp_path, {"rl": 100}, console=console, every_seconds=0) as reporter:
        for step in (1, 2):
            reporter.log(step, "rl", {"reward": 0.25})
    assert "ETA 0:00:" in console.file.getvalue().splitlines()[1]


def test_a_terminal_gets_a_progress_display(tmp_path):
    console = _console(terminal=True)
    with _reporter(tmp_path, console=console) as reporter:
        for step in range(1, 5):
            reporter.log(step, "rl", {"reward": 0.125 * step, "loss": 1.0})
        reporter.line("checkpoint written")
    shown = console.file.getvalue()
    for part in ("rl", "4/4", "reward 0.5", "loss 1", "ETA", "checkpoint written"):
        assert part in shown


def test_samples_are_printed_as_they_are_and_appended(tmp_path):
    console = _console()
    rows = [
        {"prompt": "en-de: [Norway]", "response": "Norwegen [/b]", "reward": 0.75, "reference": "Norwegen"}
    ]
    with _reporter(tmp_path, console=console) as reporter:
        reporter.log(3, "rl", {"reward": 0.75})
        reporter.samples(rows)
    shown = console.file.getvalue()
    for part in ("rl step 3", "en-de: [Norway]", "Norwegen [/b]", "0.750"):
        assert part in shown
    assert read_records(tmp_path / "samples.jsonl") == [{"phase": "rl", "step": 3, **rows[0]}]


def test_resuming_drops_what_will_be_done_again(tmp_path):
    with _reporter(tmp_path) as reporter:
        for phase in ("warm_start", "rl"):
            for step in range(1, 5):
                reporter.log(step, phase, {"reward": float(step)})
                reporter.samples([{"prompt": "a", "response": "b"}])
    with _reporter(tmp_path) as reporter:
        reporter.rewind("rl", 2)
        reporter.log(3, "rl", {"reward": 30.0})
    expected = [("warm_start", s) for s in range(1, 5)] + [("rl", 1), ("rl", 2)]
    assert _steps(tmp_path) == [*expected, ("rl", 3)]
    assert _steps(tmp_path, "samples.jsonl") == expected
    with _reporter(tmp_path) as reporter:
        reporter.rewind("warm_start", 1)
    assert _steps(tmp_path) == [("warm_start", 1)]


def test_tensorboard_forgets_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _reporter(tmp_path) as reporter:
        for step in range(1, 5):
            reporter.log(step, "rl", {"reward": float(step)})
    with _reporter(tmp_path) as reporter:
        reporter.rewind("rl", 2)
        reporter.log(3, "rl", {"reward": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rl")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    with _reporter(tmp_path) as reporter:
        reporter.log(1, "rl", {"reward": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl", "st')
    assert _steps(tmp_path) == [("rl", 1)]
    with _reporter(tmp_path) as reporter:
        reporter.log(2, "rl", {"reward": 0.5})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]


def test_curves_are_drawn_at_the_end(tmp_path):
    with _reporter(tmp_path) as reporter:
        for step in range(1, 41):
            reporter.log(step, "warm_start", {"loss": 3 / step})
        for step in range(1, 41):
            reporter.log(step, "rl", {"loss": 0.0, "reward": step / 40, "entropy": 1.0, "kl": math.nan})
        reporter.log(40, "rl", {"eval/reward": 0.9})
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    reporter.close()


def test_nothing_to_draw_draws_nothing(tmp_path):
    with _reporter(tmp_path) as reporter:
        reporter.log(1, "rl", {"reward": 0.5})
    assert not (tmp_path / "curves.png").exists()
    assert draw_curves(tmp_path / "metrics.jsonl", tmp_path / "x.png") is None


def test_smoothing_is_an_unlagged_average_over_what_is_there():
    # The weights are renormalised, so a constant stays constant up to the ends and across gaps.
    constant = np.full(30, 3.0)
    constant[[4, 5]] = np.nan
    np.testing.assert_allclose(smooth(constant, 2), 3.0, rtol=1e-14)
    # A centred symmetric window keeps a line where it is, away from the ends (3 widths).
    np.testing.assert_allclose(smooth(np.arange(30.0), 2)[6:-6], np.arange(30.0)[6:-6], rtol=1e-13)
    assert np.isnan(smooth(np.full(3, np.nan), 1)).all()
