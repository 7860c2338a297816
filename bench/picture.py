"""The results as dots: one row a case, one dot a contestant, time over ours on a log scale."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import LIMIT, OURS

ROW = 0.24  # inches of a case
MARKERS = "osD^vP*X<>p"


def _styles(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each contestant, the same in every panel; the limit is a grey bar."""
    import matplotlib.pyplot as plt

    names = dict.fromkeys(name for case in cases for name in case["median_seconds"])
    others = [name for name in names if name not in (OURS, LIMIT)]
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    styles = {
        name: {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(others)
    }
    return {**styles, LIMIT: {"color": "grey", "marker": "|"}}


def _panel(axes: Any, group: str, cases: Sequence[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for row, case in enumerate(cases):
        ours = case["median_seconds"][OURS]
        ratios = {n: t / ours for n, t in case["median_seconds"].items() if n != OURS}
        if ratios:
            axes.plot(
                [min(1, *ratios.values()), max(1, *ratios.values())], [row, row], color="0.85", lw=1, zorder=1
            )
        for name, ratio in ratios.items():
            axes.scatter([ratio], [row], s=90 if name == LIMIT else 26, zorder=2, **styles[name])
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [case["case"] for case in cases], fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_title(group, fontsize=9, loc="left")
    axes.grid(axis="x", alpha=0.3)


def picture(cases: Sequence[dict[str, Any]], target: Path) -> None:
    """One panel a bench file. Right of 1 is slower than react_fast; the limit's bar is left of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [case for case in cases if OURS in case.get("median_seconds", {})]
    groups = list(dict.fromkeys(case["group"] for case in timed))
    if not groups:
        return
    styles = _styles(timed)
    sizes = [sum(case["group"] == group for case in timed) for group in groups]
    height = ROW * sum(sizes) + 0.55 * len(groups) + 1.6
    shares = [size + 1 for size in sizes]
    figure, grid = plt.subplots(
        len(groups), 1, figsize=(12, height), height_ratios=shares, sharex=True, squeeze=False
    )
    for axes, group in zip(grid[:, 0], groups, strict=True):
        _panel(axes, group, [case for case in timed if case["group"] == group], styles)
    grid[-1, 0].set_xlabel("time / time of react_fast (log scale; right of 1 is slower than react_fast)")
    handles = [plt.Line2D([], [], linestyle="", label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, fontsize=8, loc="upper center", ncols=6)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / height))
    figure.savefig(target, dpi=110, bbox_inches="tight")
    plt.close(figure)
