"""Turn benchmark results into tables of ratios and a picture: `python -m bench.report [JSON ...]`.

Without a file it takes the newest run under bench/out; `--run` (or no run there) runs the benchmarks first. Cases
that were not run again stay as they are in bench/results/cpu.json (cuda.json for a run on a GPU); each case points
to the run it comes from. Writes cpu.json (without paths and machine names), cpu.md and cpu.png there, and prints
the tables.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import LIMIT, OURS, RESULTS

HERE = Path(__file__).parent
OUT = HERE / "out"
FILES = {"cpu": "Measured on CPU", "cuda": "Measured on CUDA"}


def chosen(only: Sequence[str]) -> list[Path]:
    """Every bench file, or those whose name ends in one of `only`: "logprob" is linear_logprob as well."""
    found = sorted(HERE.glob("bench_*.py"))
    if not only:
        return found
    picked = [file for file in found if any(file.stem.endswith(f"_{name}") for name in only)]
    if not picked:
        names = ", ".join(map(_group, found))
        sys.exit(f"bench.report: --only must name some of {names}, got {' '.join(only)}")
    return picked


def _group(file: Path) -> str:
    return file.stem.removeprefix("bench_")


def run_benchmarks(only: Sequence[str]) -> Path:
    """One process a file, so that a crash in one leaves the others' results."""
    OUT.mkdir(exist_ok=True)
    merged: dict[str, Any] = {}
    files = chosen(only)
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
    merged["whole_files"] = [_group(file) for file in files]
    target = OUT / "run.json"
    target.write_text(json.dumps(merged))
    return target


def distilled(raw: dict[str, Any]) -> dict[str, Any]:
    """What to keep of pytest-benchmark's JSON: {"runs": {key: where}, "cases": [...]}; no path, no host name."""
    import torch

    cpu = raw["machine_info"].get("cpu", {})
    commit = raw["commit_info"].get("id", "")[:12]
    key = f"{raw['datetime'][:16]} {commit}"
    run = {
        "date": raw["datetime"][:10],
        "commit": commit,
        "uncommitted_changes": raw["commit_info"].get("dirty", None),
        "device": cpu.get("brand_raw", platform.machine()),
        "cores": cpu.get("count"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_peer_versions()},
    }
    cases = []
    for b in raw["benchmarks"]:
        group = _group(Path(b["fullname"].split("::")[0]))
        if "case" in b["extra_info"]:
            cases.append({"case": b["extra_info"]["case"], "group": group, "run": key, **b["extra_info"]})
    return {"runs": {key: run}, "cases": cases, "whole_files": raw.get("whole_files", [])}


def _peer_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    fused = ("triton", "captum", "inseq", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
    for name in (*fused, "openrlhf", "torchrl", "stable-baselines3", "tianshou", "rlax", "jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Cases by name, the new ones in the place of the old, a file's cases together.

    Cases that a file run as a whole no longer has, and runs that no case points to, go.
    """
    fresh = {case["case"]: case for case in new["cases"]}
    whole = new.get("whole_files", [])
    kept = [case for case in old["cases"] if case["case"] in fresh or case["group"] not in whole]
    known = {case["case"] for case in kept}
    cases = [fresh.get(case["case"], case) for case in kept]
    cases += [case for name, case in fresh.items() if name not in known]
    groups = list(dict.fromkeys(case["group"] for case in cases))
    cases.sort(key=lambda case: groups.index(case["group"]))
    used = {case["run"] for case in cases}
    runs = {**old["runs"], **new["runs"]}
    return {"runs": {key: run for key, run in runs.items() if key in used}, "cases": cases}


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _names(cases: Sequence[dict[str, Any]], key: str) -> list[str]:
    found = dict.fromkeys(name for case in cases for name in case[key])
    return [name for name in found if name not in (OURS, LIMIT)]


def _rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def times(cases: Sequence[dict[str, Any]]) -> str:
    """Our median, the other contestants' time over ours, and our time over the limit's."""
    names = _names(cases, "median_seconds")
    head = ["case", "threads", "react_fast", *(f"{n} / ours" for n in names), "ours / limit", "limit"]
    lines = []
    for case in cases:
        medians = case["median_seconds"]
        ours = medians.get(OURS)
        ratios = [f"{medians[n] / ours:.3g}x" if n in medians and ours else "" for n in names]
        over = f"{ours / medians[LIMIT]:.2f}x" if LIMIT in medians and ours else ""
        shown = _time(ours) if ours else "absent"
        name = case["case"] + (", processor time" if case.get("clock") == "cpu" else "")
        lines.append([name, str(case["threads"]), shown, *ratios, over, case["limit"] or ""])
    return _rows(head, lines)


def units(cases: Sequence[dict[str, Any]]) -> str:
    """Everyone's time in that of the limit, which is one of something: how many GEMMs' time each takes."""
    unit = cases[0]["unit"]
    names = [OURS, *_names(cases, "median_seconds")]
    lines = []
    for case in cases:
        medians = case["median_seconds"]
        cells = [f"{medians[n] / medians[LIMIT]:.2f}" if n in medians else "" for n in names]
        lines.append([case["case"], _time(medians[LIMIT]), *cells, case["limit"]])
    return _rows([f"in {unit}s", f"one {unit}", *names, "limit"], lines)


def memory(cases: Sequence[dict[str, Any]]) -> str:
    """MiB at the peak beyond inputs and gradients."""
    names = _names(cases, "peak_bytes")
    lines = []
    for case in cases:
        peak = case["peak_bytes"]
        cells = [f"{peak[n] / 2**20:,.0f}" if n in peak else "" for n in (OURS, *names)]
        lines.append([case["case"], *cells, case["limit"] or ""])
    return _rows(["MiB", OURS, *names, "how"], lines)


def missing(cases: Sequence[dict[str, Any]]) -> str:
    """One line for each contestant and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, why in case.get("absent", {}).items():
            reasons.setdefault((name, why), []).append(case["case"])
    lines = []
    for (name, why), where in reasons.items():
        count = "" if len(where) == len(cases) else f" ({len(where)} of {len(cases)} cases)"
        lines.append(f"- {name}{count}: {why}")
    return "Absent:\n\n" + "\n".join(lines) if lines else ""


def _run_line(run: dict[str, Any], count: int) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    dirty = " with uncommitted changes" if run["uncommitted_changes"] else ""
    return (
        f"- {run['date']}, commit {run['commit']}{dirty}, {run['device']}, {run['cores']} cores, {versions}: "
        f"{count} cases"
    )


def document(results: dict[str, Any], title: str) -> str:
    cases = results["cases"]
    counts = {key: sum(case["run"] == key for case in cases) for key in results["runs"]}
    isas = ", ".join(sorted({c["isa"] for c in cases}))
    accelerators = ", ".join(sorted({c["accelerator"] for c in cases if c.get("accelerator")}))
    parts = [
        f"# {title}",
        "\n".join(_run_line(run, counts[key]) for key, run in results["runs"].items()),
        f"Instruction set {isas}{', ' + accelerators if accelerators else ''}. Command: `python -m bench.report "
        "--run`. Medians of contestants that take turns in one process; `x / ours` says how many times longer x "
        "takes. The limit is the same memory traffic without arithmetic, or the bare GEMM, measured in the same "
        "run with the same threads. In the log-prob cases a contestant is timed after its result was held against "
        "float64.",
    ]
    for group in dict.fromkeys(case["group"] for case in cases):
        own = [case for case in cases if case["group"] == group]
        timed = [case for case in own if "median_seconds" in case]
        weighed = [case for case in own if "peak_bytes" in case]
        parts.append(f"## {group}")
        counted = [case for case in timed if case.get("unit")]
        tables = ((times, timed), (units, counted), (memory, weighed), (missing, own))
        parts += [text for text in (make(rows) for make, rows in tables if rows) if text]
    return "\n\n".join(parts) + "\n"


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
    found = [distilled(json.loads(file.read_text())) for file in files]
    cases = [case for part in found for case in part["cases"]]
    if not cases:
        sys.exit("bench.report: no results in " + ", ".join(map(str, files)))
    stem = "cuda" if any(case.get("accelerator") for case in cases) else "cpu"
    store = arguments.out / f"{stem}.json"
    results = json.loads(store.read_text()) if store.exists() else {"runs": {}, "cases": []}
    for part in found:
        results = merged(results, part)
    arguments.out.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(results, indent=1) + "\n")
    text = document(results, FILES[stem])
    (arguments.out / f"{stem}.md").write_text(text)
    from .picture import picture

    picture(results["cases"], arguments.out / f"{stem}.png")
    print(text)


if __name__ == "__main__":
    main()
