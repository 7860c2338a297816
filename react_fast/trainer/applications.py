"""The table of applications: random policy, warm start, RL, and RL with causal credit, on held-out data.

Every configuration is run twice, with uniform and with causal credit, from the same warm start: the second run
begins in a copy of the first one's folder as it was before reinforcement learning.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .folder import PHASES, REPORT, RESULTS, RunFolder, UserError
from .reporter import CURVES, TENSORBOARD
from .results import table
from .run import read_config, run

TABLE, TABLE_JSON = "applications.md", "applications.json"
_QUICK = (
    "--model.hidden_size=16", "--model.layers=1", "--model.heads=2", "--warm_start.steps=2",
    "--warm_start.batch_size=4", "--warm_start.early_stopping=0", "--trainer.steps=2",
    "--trainer.prompts_per_step=2", "--trainer.group_size=2", "--trainer.max_new_tokens=4",
    "--env.eval_prompts=4", "--env.test_prompts=8", "--tracker.enabled=false",
)  # fmt: skip


def applications(
    configs: Sequence[str | Path], out: str | Path, *, quick: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run every configuration with both credits and write OUT/applications.md and OUT/applications.json.

    What is finished is not done again: the runs lie in OUT/NAME/uniform and OUT/NAME/causal and go on from where
    they were stopped; the table is written anew behind each.

    Args:
        configs: YAML files of runs; NAME is a file's name without its ending.
        out: folder.
        quick: tiny models and a few steps, to see that all of it works.
        console: where to print; None: standard output.
    Returns: by NAME, by policy, by mode ("sampled", "greedy"), by metric: [value, low, high].
    Raises: UserError for what the user can mend; KeyboardInterrupt after Ctrl-C, all saved.
    """
    names = [Path(config).stem for config in configs]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"configs must be at least one file, each of another name, got {names}")
    console, out = console or Console(), Path(out)
    found: dict[str, Any] = {}
    for number, (name, config) in enumerate(zip(names, configs, strict=True), 1):
        uniform, causal = out / name / "uniform", out / name / "causal"
        console.rule(f"{number} of {len(names)}: {name}, uniform credit")
        results = _run(config, uniform, "uniform", quick, console)
        console.rule(f"{number} of {len(names)}: {name}, causal credit")
        _begin_at_warm_start(uniform, causal)
        found[name] = _together(results, _run(config, causal, "causal", quick, console))
        _write(found, out)
    console.print((out / TABLE).read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    return found


def _run(config: str | Path, folder: Path, credit: str, quick: bool, console: Console) -> dict[str, Any]:
    overrides = ["--run_dir", str(folder), "--trainer.credit", credit, *(_QUICK if quick else ())]
    resolved = read_config(str(config), overrides)
    if (folder / RESULTS).is_file():
        if changes := RunFolder(folder).changes(resolved):
            raise UserError(
                f"run folder {folder} was finished with another configuration ({changes[0]}); choose another --out"
            )
        console.print(f"finished: {folder}", markup=False, highlight=False)
        return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return run(resolved, resume="auto", console=console)


def _begin_at_warm_start(source: Path, target: Path) -> None:
    """A copy of a finished run as it was before reinforcement learning; nothing if there is a run already."""
    if target.exists():
        return
    copy = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(copy, ignore_errors=True)
    later = (f"{PHASES[-1]}", f"{PHASES[-1]}.*", RESULTS, REPORT, CURVES, TENSORBOARD, ".lock")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*later))
    RunFolder(copy).forget_from(PHASES[-1])
    os.rename(copy, target)


def _together(uniform: Mapping[str, Any], causal: Mapping[str, Any]) -> dict[str, Any]:
    """The policies of both runs; random policy and warm start are the same in both."""
    new = {"rl": "rl_causal", "gain": "gain_causal"}
    found = {**uniform, **{new[name]: causal[name] for name in new if name in causal}}
    return {name: found[name] for name in sorted(found, key=lambda name: "gain" in name)}


def _write(found: Mapping[str, Any], out: Path) -> None:
    lines = [
        "# Applications",
        "",
        "Held-out test records, 95% bootstrap intervals; differences are paired.",
        "",
    ]
    for name, results in found.items():
        columns, rows = table(results)
        lines += [
            f"## {name.replace('_', ' ')}",
            "",
            _row(columns),
            _row(["---", *["---:"] * (len(columns) - 1)]),
        ]
        lines += [*map(_row, rows), ""]
    folder = RunFolder(out)
    folder.write_json(TABLE_JSON, found)
    temporary = out / f".{TABLE}.tmp"
    temporary.write_text("\n".join(lines), encoding="utf-8")
    temporary.replace(out / TABLE)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
