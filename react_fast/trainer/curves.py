"""The training curves of a run as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .records import read_records

RAW, SMOOTH, HELD_OUT = "#9db7d5", "#1f4e8c", "#c8553d"
# (metric, title, y label, held-out metric drawn over it), for the phases that log the metric.
PANELS = (
    ("loss", "loss", "cross-entropy (nats per token)", "eval/loss"),
    ("reward", "reward", "mean reward", "eval/reward"),
    ("entropy", "entropy", "entropy (nats per token)", None),
    ("kl", "KL to the start", "KL (nats per token)", None),
)
PHASE_TITLES = {"warm_start": "Warm start", "rl": "RL"}
# The window's standard deviation as a share of the steps shown: trends stay, noise of single steps goes.
SMOOTHING = 1 / 40


def draw_curves(metrics: str | Path, picture: str | Path, *, title: str | None = None) -> Path | None:
    """Draw loss, reward, entropy and KL of every phase from metrics.jsonl into a PNG.

    Args:
        metrics: JSONL file written by Reporter.
        picture: PNG to write.
        title: headline; None: the name of the run folder.
    Returns: the picture's path, or None when there is nothing to draw.
    """
    records = read_records(metrics)
    panels = _panels(records)
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.4 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or Path(metrics).resolve().parent.name, fontsize=12, fontweight="bold")
    for index, (phase, (metric, name, label, held_out)) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, _series(records, phase, metric), _series(records, phase, held_out))
        axes.set_title(f"{PHASE_TITLES.get(phase, phase)}: {name}", fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
    figure.savefig(picture)
    return Path(picture)


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Average under a Gaussian window, y_t = sum_k w_k x_{t+k} / sum_k w_k, w_k = exp(-k^2 / (2 width^2)).

    The window is centred, so the curve does not lag; the weights are renormalised at the ends and at gaps.

    Args:
        values: [N] float. NaN and infinity are gaps.
        width: standard deviation of the window in steps, above 0.
    Returns: [N] float64, NaN where the window holds gaps only.
    """
    reach = min(int(np.ceil(3 * width)), len(values))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    present = np.isfinite(values)
    total, weight = (
        np.convolve(x, window)[reach : reach + len(values)]
        for x in (np.where(present, values, 0.0), present.astype(float))
    )
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def _panels(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple]]:
    """Pairs of phase and panel with at least two points; the loss of a policy gradient says nothing."""
    phases = list(dict.fromkeys(record["phase"] for record in records))
    logged = {phase: set().union(*(r.keys() for r in records if r["phase"] == phase)) for phase in phases}
    return [
        (phase, panel)
        for panel in PANELS
        for phase in phases
        if not (panel[0] == "loss" and "reward" in logged[phase])
        and len(_series(records, phase, panel[0])[0]) > 1
    ]


def _series(
    records: Sequence[Mapping[str, Any]], phase: str, metric: str | None
) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[metric]) for r in records if metric and r["phase"] == phase and metric in r]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _draw(
    axes: Any, training: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]
) -> None:
    steps, values = training
    axes.plot(steps, values, color=RAW, linewidth=0.8, label="each step")
    axes.plot(
        steps,
        smooth(values, max(len(values) * SMOOTHING, 1.0)),
        color=SMOOTH,
        linewidth=1.8,
        label="smoothed",
    )
    if len(held_out[0]):
        axes.plot(*held_out, color=HELD_OUT, linewidth=1.2, marker="o", markersize=4, label="held out")
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.02)
    axes.legend(fontsize=8, frameon=False)
