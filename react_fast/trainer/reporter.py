"""What a run shows and writes: metrics, progress, samples, curves.

metrics.jsonl is the record (one JSON object a line, flushed at once); TensorBoard, the progress display, the
plain lines and curves.png show the same numbers.
"""

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .records import append, cut_after, drop_torn_line, read_records

METRICS, SAMPLES, WARNINGS = "metrics.jsonl", "samples.jsonl", "warnings.jsonl"
CURVES, TENSORBOARD = "curves.png", "tensorboard"
# Shown beside the progress bar, in this order, when a phase logs them.
HEADLINES = {
    "reward": "reward", "loss": "loss", "eval/reward": "eval/reward", "kl": "kl", "entropy": "entropy",
    "tokens_per_second": "tokens/s",
}  # fmt: skip
_PLAIN_WIDTH = 110


class Reporter:
    """Writes a run's metrics and samples into its folder and shows how far it is.

    Args:
        run_dir: folder of the run; made when missing. Metrics and samples are appended to what is there.
        total_steps: steps of every phase, by phase name, for the progress bar and the ETA.
        console: where to print; None: standard output. Off a terminal, plain lines replace the progress bar.
        every_seconds: least time between two plain lines of a phase.
        tensorboard: write TensorBoard events into run_dir/tensorboard/<phase>.
        trackers: started trackers of accelerate; they get every phase's metrics as PHASE/NAME, at steps counted
            over the phases of total_steps, and are finished with the reporter.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: Mapping[str, int] | None = None,
        *,
        console: Console | None = None,
        every_seconds: float = 10.0,
        tensorboard: bool = True,
        trackers: Sequence[Any] = (),
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.console = console or _default_console()
        self._totals = dict(total_steps or {})
        self._every_seconds = every_seconds
        self._tensorboard, self._trackers = tensorboard, trackers
        self._writers: dict[str, Any] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase: str | None = None
        self._step = 0
        self._phase_start = (0.0, 0)
        self._last_line = -math.inf
        self._shown: dict[str, float] = {}
        for name in (METRICS, SAMPLES, WARNINGS):
            drop_torn_line(self.run_dir / name)
        self._metrics = (self.run_dir / METRICS).open("a", encoding="utf-8")
        self._samples = (self.run_dir / SAMPLES).open("a", encoding="utf-8")
        self._warnings = (self.run_dir / WARNINGS).open("a", encoding="utf-8")

    def rewind(self, phase: str, step: int) -> None:
        """Forget what was recorded after `step` of `phase`, before that phase resumes from there."""
        for file in (self._metrics, self._samples, self._warnings):
            cut_after(Path(file.name), phase, step)
            file.seek(0, os.SEEK_END)
        self._rewrite_tensorboard()

    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one step.

        Args:
            step: step within the phase; the first is 1.
            phase: such as "warm_start" or "rl".
            metrics: numbers (or one-element tensors) by name. NaN and infinity are recorded as such.
        Raises: TypeError for a value that is no number.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        self._enter(phase, step)
        append(self._metrics, {"phase": phase, "step": step, "time": round(time.time(), 3), **values})
        self._plot(step, phase, values, time.time())
        self._send(step, phase, values)
        self._shown |= {shown: float(values[name]) for name, shown in HEADLINES.items() if name in values}
        self._show(step, phase)

    def samples(
        self, rows: Sequence[Mapping[str, Any]], *, step: int | None = None, phase: str | None = None
    ) -> None:
        """Print a table of samples and append them to samples.jsonl.

        Args:
            rows: each with any of prompt, response, reference (texts) and reward (number).
            step, phase: where they come from; by default what was logged last.
        """
        step, phase = self._step if step is None else step, phase or self._phase or ""
        for row in rows:
            append(self._samples, {"phase": phase, "step": step, **row})
        columns = [
            name for name in ("prompt", "response", "reference", "reward") if any(name in r for r in rows)
        ]
        table = Table(title=f"{phase} step {step}", title_justify="left", show_lines=False)
        for name in columns:
            table.add_column(name, justify="right" if name == "reward" else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_cell(row.get(name)) for name in columns))
        self.console.print(table)

    def warn(self, name: str, text: str) -> None:
        """Print a warning about the step that was logged last, and add it to warnings.jsonl."""
        append(self._warnings, {"phase": self._phase, "step": self._step, "warning": name, "text": text})
        self.line(f"warning after {self._phase} step {self._step}: {text}")

    def line(self, text: str) -> None:
        """Print one line above the progress display."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """End the progress display, flush everything and draw curves.png. May be called twice."""
        self._stop_progress()
        self._close_writers()
        if self._metrics.closed:
            return
        for tracker in self._trackers:
            tracker.finish()
        self._metrics.close()
        self._samples.close()
        self._warnings.close()
        from .curves import draw_curves

        draw_curves(self.run_dir / METRICS, self.run_dir / CURVES)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, phase: str, step: int) -> None:
        self._step = step
        if phase == self._phase:
            return
        self._stop_progress()
        self._phase, self._shown = phase, {}
        self._phase_start, self._last_line = (time.monotonic(), step), -math.inf
        if self.console.is_terminal:
            self._progress = _progress(self.console)
            self._task = self._progress.add_task(phase, total=self._totals.get(phase), headline="")
            self._progress.start()

    def _show(self, step: int, phase: str) -> None:
        headline = "  ".join(f"{name} {value:.4g}" for name, value in self._shown.items())
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, headline=headline)
            return
        total, now = self._totals.get(phase), time.monotonic()
        if step != total and now - self._last_line < self._every_seconds:
            return
        self._last_line = now
        self.line(
            f"{phase} step {step}{f'/{total}' if total else ''}  {headline}{self._eta(step, total, now)}"
        )

    def _eta(self, step: int, total: int | None, now: float) -> str:
        started, first = self._phase_start
        if not total or step <= first or step >= total:
            return ""
        return f"  ETA {_duration((now - started) / (step - first) * (total - step))}"

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _plot(self, step: int, phase: str, values: Mapping[str, Any], when: float) -> None:
        if not self._tensorboard:
            return
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[phase] = SummaryWriter(str(self.run_dir / TENSORBOARD / phase))
        for name, value in values.items():
            self._writers[phase].add_scalar(name, value, step, walltime=when)

    def _send(self, step: int, phase: str, values: Mapping[str, Any]) -> None:
        phases = list(self._totals)
        before = phases[: phases.index(phase)] if phase in phases else []
        for tracker in self._trackers:
            named = {f"{phase}/{name}": value for name, value in values.items()}
            tracker.log(named, step=sum(self._totals[name] for name in before) + step)

    def _rewrite_tensorboard(self) -> None:
        """Event files only grow, so after a cut they are written again from the record."""
        self._close_writers()
        shutil.rmtree(self.run_dir / TENSORBOARD, ignore_errors=True)
        for record in read_records(self.run_dir / METRICS):
            self._plot(record.pop("step"), record.pop("phase"), record, record.pop("time"))

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, console: Console | None = None
) -> None:
    """Print a table of results: the first column is a name, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    (console or _default_console()).print(table)


def _default_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[headline]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )


class Silent:
    """The reporter of a process whose run another one shows."""

    def __init__(self) -> None:
        self.console = Console(quiet=True)

    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        pass

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def rewind(self, phase: str, step: int) -> None:
        pass

    def warn(self, name: str, text: str) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _number(name: str, value: Any) -> int | float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"metric {name} must be a number, got {type(value).__name__}")
    return value


def _cell(value: Any) -> Text:
    return Text(f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
