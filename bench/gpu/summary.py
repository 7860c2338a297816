"""Tables out of runs' records: `summary.md` of one, and the kernels' table of bench/results/README.md of all."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import LIMIT, OURS, RESULTS
from ..roofline import Work
from . import launches
from .events import replace

BEGIN, END = "<!-- begin: python -m bench.gpu --readme -->", "<!-- end -->"
UNKNOWN = "not yet measured"
# Kernel files that are measured inside another's cases.
INSIDE = {"policy_loss_layout": "policy_loss"}
Record = dict[str, Any]
Case = dict[str, Any]


def rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def share(case: Case, ceilings: dict[str, float]) -> float | None:
    """The least time that the device needs for the case's bytes and FLOPs over ours; None if it is not known."""
    ours = case["median_seconds"].get(OURS)
    if not ours:
        return None
    if case.get("bytes_moved") and len(ceilings) == 2:
        rates = ceilings["copy_bytes_per_second"], ceilings["gemm_flops_per_second"]
        return Work(case["path"], case["bytes_moved"], 0, case.get("flops") or 0).seconds(*rates) / ours
    limit = case["median_seconds"].get(LIMIT)
    return limit / ours if limit else None


def peers(case: Case) -> dict[str, float]:
    """Everyone else's time over ours."""
    medians = case["median_seconds"]
    if OURS not in medians:
        return {}
    return {name: t / medians[OURS] for name, t in medians.items() if name not in (OURS, LIMIT)}


def _told(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.2g}x" for name, ratio in ratios.items())


def _timed(record: Record) -> list[Case]:
    return [case for case in record["cases"] if OURS in case.get("median_seconds", {})]


def _of_file(record: Record, path: str) -> Case | None:
    """The case of a kernel file that moves most bytes."""
    own = [case for case in _timed(record) if case.get("path") == path]
    return max(own, key=lambda case: case.get("bytes_moved") or 0, default=None)


def _verified(record: Record, path: str) -> tuple[int, list[str], list[str]]:
    """(passed tests that launched the file's kernels, kernels never launched, kernels in a failed test)"""
    found = {name: record["tests"]["kernels"].get(f"{path}.{name}", {}) for name in launches.kernels()[path]}
    idle = [name for name, n in found.items() if not n.get("passed") and not n.get("failed")]
    wrong = [name for name, n in found.items() if n.get("failed")]
    return max((n.get("passed", 0) for n in found.values()), default=0), idle, wrong


def _where(record: Record) -> str:
    device = record["device"]
    return f"{device['name'] if device else 'no GPU'}, {record['date']}"


def _state(runs: Sequence[Record], path: str) -> str:
    """Verified on what and when, out of the newest run that launched the file's kernels."""
    for run in runs:
        passed, idle, wrong = _verified(run, path)
        if passed or wrong:
            notes = [f"in a failed test: {', '.join(wrong)}"] if wrong else []
            notes += [f"never launched: {', '.join(idle)}"] if idle else []
            return "; ".join([f"{_where(run)}, {passed} tests", *notes])
    return "never run on a GPU"


def kernel_table(runs: Sequence[Record]) -> str:
    """For every kernel file, of runs with the newest first."""
    lines = []
    for path in launches.kernels():
        found = next(((run, case) for run in runs if (case := _of_file(run, path))), None)
        cells = [f"with `{INSIDE[path]}`" if path in INSIDE else UNKNOWN, UNKNOWN]
        if found:
            part = share(found[1], found[0]["ceilings"])
            cells = [
                f"{part:.0%}: {found[1]['case']}" if part else UNKNOWN,
                _told(peers(found[1])) or "no peer",
            ]
        lines.append([f"`{path}`", _state(runs, path), *cells])
    return rows(["kernels", "verified on", "of the limit", "peers' time / ours"], lines)


def never(runs: Sequence[Record]) -> list[str]:
    """Kernels that no run has launched on a GPU in a test."""
    seen = {name for run in runs for name, n in run["tests"]["kernels"].items() if n["passed"] or n["failed"]}
    return [name for name in launches.names() if name not in seen]


def _cases(record: Record) -> str:
    lines = []
    for case in _timed(record):
        part, ours = share(case, record["ceilings"]), case["median_seconds"][OURS]
        lines.append(
            [case["case"], f"{ours * 1e6:.1f} us", f"{part:.0%}" if part else "", _told(peers(case))]
        )
    return rows(["case", "ours", "of the limit", "peers' time / ours"], lines) if lines else UNKNOWN


def _memory(record: Record) -> str:
    """Bytes at the peak of a call beyond its inputs and gradients, everyone in a process of its own."""
    lines = []
    for case in record["cases"]:
        peak = dict(case.get("peak_bytes") or {})
        ours = peak.pop(OURS, None)
        if ours is None:
            continue
        others = [f"{name} {b / 2**20:,.0f} ({b / max(ours, 1):.2g}x)" for name, b in peak.items()]
        others += [f"{name} absent: {why}" for name, why in case.get("absent", {}).items()]
        lines.append([case["case"], f"{ours / 2**20:,.0f}", ", ".join(others) or "no peer"])
    return rows(["case", "ours, MiB", "peers, MiB (over ours)"], lines) if lines else f"{UNKNOWN}."


def _tests(record: Record) -> str:
    found = record["tests"]
    text = [
        f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped "
        f"({found['out_of_time']} for want of time)."
    ]
    text += [f"- {f['test']}: {f['why']}" for f in found["failures"]]
    text += [f"- {f['file']} was not collected: {f['why']}" for f in found["not_collected"]]
    text += [f"- {name} did not end: its process did, or the time" for name in found["not_ended"]]
    if found["never_launched"]:
        text.append(f"\nLaunched by no test: {', '.join(found['never_launched'])}.")
    return "\n".join(text)


def _sanitizer(record: Record) -> str:
    checks = record["sanitizer"]
    lines = [
        [
            tool,
            *(str(sum(c["outcome"] == o for c in checks if c["tool"] == tool)) for o in ("passed", "failed")),
        ]
        for tool in dict.fromkeys(c["tool"] for c in checks)
    ]
    text = rows(["tool", "ops passed", "failed"], lines) if lines else UNKNOWN
    told = [f"- {t['tool']}: {t['outcome']} {t['why']}" for t in record["sanitizer_tools"]]
    told += [f"- {c['case']}: {c['why']}" for c in checks if c["outcome"] == "failed"]
    return "\n".join([text, "", *told])


def _training(record: Record) -> str:
    lines = []
    for found in record["training"]:
        if "absent" in found:
            lines.append([found["name"], found["absent"], "", ""])
            continue
        peak = found.get("peak_bytes")
        lines.append(
            [
                found["name"],
                f"{found['tokens_per_second']:,.0f}",
                f"{found['seconds']:.3g} s",
                f"{peak / 2**20:,.0f}" if peak else "",
            ]
        )
    return rows(["training", "tokens/s", "an update", "peak MiB"], lines) if lines else UNKNOWN


def _tuned(record: Record) -> str:
    lines = [
        [t["name"], str(t.get("present", "")), str(t.get("options", "")), t.get("out") or f"{t['gain']:.2f}x"]
        for t in record["tuned"]
    ]
    return rows(["kernel", "present", "best", "gain"], lines) if lines else UNKNOWN


PARTS: dict[str, Callable[[Record], str]] = {
    "Tests": _tests,
    "Kernels": lambda record: kernel_table([record]),
    "Sanitizer": _sanitizer,
    "Cases": _cases,
    "Peak memory": _memory,
    "Training": _training,
    "Launch options": _tuned,
}


def text_of(record: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    device = record["device"]
    where = f"{device['name']}, driver {device['driver']}" if device else "no GPU"
    head = f"{record['date']}, commit {record['commit'] or 'unknown'}, {where}; {versions}."
    if record["rehearsed"]:
        head = f"**A rehearsal in Triton's interpreter: the numbers mean nothing.** {head}"
    ceilings = ", ".join(f"{name.replace('_', ' ')} {rate:.3g}" for name, rate in record["ceilings"].items())
    stages = rows(
        ["stage", "state", "seconds"],
        [[n, s["state"], str(s["seconds"])] for n, s in record["stages"].items()],
    )
    lacking = "; ".join(f"{stage} lacks {', '.join(m)}" for stage, m in record.get("missing", {}).items())
    noted = f"Not installed: {lacking} (bench/gpu/wheels.py).\n\n" if lacking else ""
    parts = [f"# A run of bench.gpu\n\n{head}\n\n{noted}Ceilings: {ceilings or UNKNOWN}.\n\n{stages}"]
    parts += [f"## {name}\n\n{make(record)}" for name, make in PARTS.items()]
    return "\n\n".join(parts) + "\n"


def write(out: Path) -> None:
    replace(out / "summary.md", text_of(json.loads((out / "run.json").read_text())))


def good(out: Path) -> bool:
    """Nothing failed; what the time did not suffice for is no failure."""
    record = json.loads((out / "run.json").read_text())
    states = [stage["state"] for stage in record["stages"].values()]
    built = record["stages"].get("build", {"state": "done"})["state"] == "done"
    return built and not (
        record["tests"]["failed"]
        or record["tests"]["not_collected"]
        or any(check["outcome"] == "failed" for check in record["sanitizer"])
        or any(tool["outcome"].startswith(("failed", "found")) for tool in record["sanitizer_tools"])
        or any(state.startswith("failed") for state in states)
    )


def kept() -> list[Record]:
    """The runs of bench/results, the newest first."""
    files = sorted(RESULTS.glob("gpu-*.json"), key=lambda file: (len(file.name), file.name), reverse=True)
    return sorted((json.loads(file.read_text()) for file in files), key=lambda r: r["date"], reverse=True)


def _place(run: Record) -> Path:
    """The file of a run in bench/results: its own if it is there already, and never another's."""
    name = re.sub(r"[^a-z0-9]+", "-", run["device"]["name"].lower()).strip("-")
    stem, number = f"gpu-{run['date']}-{name}", 1
    file = RESULTS / f"{stem}.json"
    while file.exists() and json.loads(file.read_text()) != run:
        number += 1
        file = RESULTS / f"{stem}-{number}.json"
    return file


def section(runs: Sequence[Record]) -> str:
    """What stands between the markers."""
    idle = never(runs)
    listed = (
        "no kernel has run on one"
        if len(idle) == len(launches.names())
        else ", ".join(f"`{n}`" for n in idle)
    )
    weighed = next((run for run in runs if any(case.get("peak_bytes") for case in run["cases"])), None)
    memory = f"{_where(weighed)}.\n\n{_memory(weighed)}" if weighed else f"{UNKNOWN}."
    trained = next((run for run in runs if run["training"]), None)
    training = f"{_where(trained)}.\n\n{_training(trained)}" if trained else f"{UNKNOWN}."
    parts = [
        BEGIN,
        kernel_table(runs),
        f"Never run on a GPU: {listed or 'none'}.",
        f"Peak memory: {memory}",
        f"Training: {training}",
        END,
    ]
    return "\n\n".join(parts)


def take(files: Sequence[Path]) -> None:
    """Copy runs on a GPU into bench/results and renew the README's table."""
    for file in files:
        run = json.loads(file.read_text())
        if run["rehearsed"] or not run["device"]:
            sys.exit(f"bench.gpu: {file} is a rehearsal, which measures nothing")
        replace(_place(run), json.dumps(run, indent=1) + "\n")
    readme = RESULTS / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    replace(readme, before + section(kept()) + rest.split(END, 1)[1])
