"""Turn benchmark results into a table of ratios and a picture: `python -m bench.report [JSON ...]`.

Without a file it takes the newest run under bench/out; `--run` (or no run there) runs the benchmarks first.
Writes bench/results/cpu.json (without paths and machine names), cpu.md and cpu.png, and prints the table.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "out"
RESULTS = HERE / "results"
OURS, LIMIT = "react_fast", "limit"


def run_benchmarks(only: Sequence[str]) -> Path:
    """One process a file, so that a crash in one leaves the others' results."""
    OUT.mkdir(exist_ok=True)
    files = [HERE / f"bench_{name}.py" for name in only] if only else sorted(HERE.glob("bench_*.py"))
    merged: dict[str, Any] = {}
    for file in files:
        part = OUT / f"{file.stem}.part.json"
        part.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", str(file), "-q", f"--benchmark-json={part}"]
        command += ["-p", "no:cacheprovider", "--benchmark-disable-gc", "--benchmark-columns=rounds"]
        print(f"running {file.name}", flush=True)
        finished = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        if finished.returncode or not part.exists():
            sys.exit(f"bench.report: {file.name} failed; run it alone with pytest {file.name}")
        found = json.loads(part.read_text())
        merged = {**found, "benchmarks": merged.get("benchmarks", []) + found["benchmarks"]}
        part.unlink()
    target = OUT / "run.json"
    target.write_text(json.dumps(merged))
    return target


def distilled(raw: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of pytest-benchmark's JSON; no path, no machine name."""
    import torch

    cpu = raw["machine_info"].get("cpu", {})
    return {
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"].get("id", "")[:12],
        "uncommitted_changes": raw["commit_info"].get("dirty", None),
        "device": cpu.get("brand_raw", platform.machine()),
        "cores": cpu.get("count"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cases": [b["extra_info"] for b in raw["benchmarks"] if "median_seconds" in b["extra_info"]],
    }


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def table(results: dict[str, Any]) -> str:
    """Markdown: our median, the other contestants' time over ours, and our time over the limit's."""
    names: list[str] = []
    for case in results["cases"]:
        names += [n for n in case["median_seconds"] if n not in (OURS, LIMIT, *names)]
    head = ["case", "threads", "react_fast", *(f"{n} / ours" for n in names), "ours / limit", "limit"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in results["cases"]:
        medians = case["median_seconds"]
        ours = medians[OURS]
        ratios = [f"{medians[n] / ours:.3g}x" if n in medians else "" for n in names]
        over = f"{ours / medians[LIMIT]:.2f}x" if LIMIT in medians else ""
        cells = [case["case"], str(case["threads"]), _time(ours), *ratios, over, case["limit"] or ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    isas = ", ".join(sorted({c["isa"] for c in results["cases"]}))
    return (
        f"# Measured on CPU\n\n{results['date']}, commit {results['commit']}, {results['device']}, "
        f"{results['cores']} cores, instruction set {isas}, {versions}.\n\n"
        "Command: `python -m bench.report --run`. Medians of contestants that take turns in one process; "
        "`x / ours` says how many times longer x takes. The limit is the same memory traffic without "
        "arithmetic, measured in the same run with the same threads.\n\n" + table(results) + "\n"
    )


def picture(results: dict[str, Any], target: Path) -> None:
    """Horizontal bars on a log scale: time of every contestant over ours; the limit's bar ends left of 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = results["cases"]
    names = sorted({n for c in cases for n in c["median_seconds"]} - {OURS}, key=lambda n: (n != LIMIT, n))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = plt.subplots(figsize=(10, 0.45 * len(cases) + 1.6))
    height = 0.8 / max(len(names), 1)
    for row, case in enumerate(cases):
        ours = case["median_seconds"][OURS]
        for i, name in enumerate(names):
            if name in case["median_seconds"]:
                ratio = case["median_seconds"][name] / ours
                place = row + 0.4 - height * (i + 0.5)
                axes.barh(
                    place, ratio - 1, height, left=1, color=colours[name], label=name if row == 0 else None
                )
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [c["case"] for c in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time / time of react_fast (log scale; right of 1 is slower than react_fast)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[n]) for n in names]
    axes.legend(handles, names, fontsize=8, loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="*", type=Path, help="results of pytest --benchmark-json")
    parser.add_argument("--run", action="store_true", help="run the benchmarks first")
    parser.add_argument("--only", nargs="*", default=[], help="with --run: logprob, advantage, ...")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    arguments = parser.parse_args()
    files: list[Path] = arguments.json
    if not files:
        newest = OUT / "run.json"
        files = [run_benchmarks(arguments.only) if arguments.run or not newest.exists() else newest]
    raw = [json.loads(file.read_text()) for file in files]
    results = distilled({**raw[-1], "benchmarks": [b for r in raw for b in r["benchmarks"]]})
    if not results["cases"]:
        sys.exit("bench.report: no results in " + ", ".join(map(str, files)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "cpu.md").write_text(document(results))
    picture(results, arguments.out / "cpu.png")
    print(document(results))


if __name__ == "__main__":
    main()
