"""Other trainers' own tests without and with our patch: `python -m bench.peers.run_suites [NAMES] [--out FILE]`.

Each peer's newest release goes into a virtual environment of its own, beside torch at the version that runs here
and react_fast as it is installed here. Its tests are those of its source distribution, or of --tests NAME=FOLDER,
a copy of its repository at that version. They run twice, in one thread; the exit status is 1 if one passes without
the patch and not with it, 2 if a run cannot be made.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import react_fast
from react_fast import _core, kernels

from .outcomes import KINDS, Result, broken, counts, differing, outcomes, write

TORCH = torch.__version__.partition("+")[0]


class SuiteError(RuntimeError):
    """Why a suite cannot run, in one line."""


@dataclass(frozen=True)
class Suite:
    """A peer and those of its tests that reach what we replace.

    tests: files and folders in its repository. requires: what they import beside the peer.
    alone: install it without its dependencies, which want a GPU. options: of pytest, such as tests left out.
    """

    distribution: str
    tests: tuple[str, ...]
    requires: tuple[str, ...] = ()
    alone: bool = False
    options: tuple[str, ...] = ()


SUITES = {
    "stable_baselines3": Suite(
        "stable-baselines3",
        tuple(
            f"tests/test_{name}.py"
            for name in ("gae", "buffers", "run", "deterministic", "dict_env", "identity", "sde")
        ),
        requires=("tqdm", "rich"),
    ),
    "torchrl": Suite(
        "torchrl",
        ("test/objectives/test_values.py", "test/objectives/test_ppo.py"),
        requires=("gymnasium", "scipy"),
    ),
    "trl": Suite(
        "trl",
        (
            "tests/test_utils.py",
            *(f"tests/test_{name}_trainer.py" for name in ("grpo", "rloo", "dpo", "kto", "sft")),
            *(f"tests/experimental/test_{name}_trainer.py" for name in ("cpo", "orpo", "sdpo", "tpo", "a2po")),
        ),
        requires=("trl[peft]", "psutil"),
    ),
    "verl": Suite(
        "verl",
        (
            "tests/trainer/ppo/test_core_algos_on_cpu.py",
            "tests/trainer/ppo/test_reinforce_pp_multiturn_on_cpu.py",
            "tests/trainer/ppo/test_rollout_corr.py",
            "tests/trainer/ppo/test_rollout_corr_integration.py",
            "tests/trainer/ppo/test_value_loss_normalization_on_cpu.py",
            "tests/trainer/test_multi_trajectories_advantage_on_cpu.py",
            "tests/models/test_fused_kernels_ulysses_sp_on_cpu.py",
            "tests/workers/test_distillation_topk_symmetry_on_cpu.py",
        ),
        requires=(
            "accelerate", "codetiming", "hydra-core", "pandas", "peft", "ray", "tensordict", "TransferQueue",
            "transformers>=5.5.3,<5.11",
        ),
        alone=True,
    ),
}  # fmt: skip


def _run(command: list[str | Path], what: str, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise SuiteError(f"{what}: {lines[-1]}")
    return done.stdout


def environment(suite: Suite, folder: Path) -> Path:
    """The interpreter of a virtual environment with the peer and its tests' needs; one that is there is taken."""
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    _run([sys.executable, "-m", "venv", folder], "no virtual environment")
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", f"torch=={TORCH}"]
    needed = [*suite.requires, "numpy", "pytest", "pytest-timeout"]
    _run(
        [*install, *needed, *([] if suite.alone else [suite.distribution])],
        f"{suite.distribution} not installed",
    )
    if suite.alone:
        _run([*install, "--no-deps", suite.distribution], f"{suite.distribution} not installed")
    (folder / "complete").touch()
    return python


def version(python: Path, suite: Suite) -> str:
    code = f"import importlib.metadata as m; print(m.version({suite.distribution!r}))"
    return _run([python, "-c", code], f"{suite.distribution} is not installed for {python}").strip()


def downloaded(suite: Suite, release: str, folder: Path) -> Path:
    """The tests that come with the source distribution of that version."""
    wanted = f"{suite.distribution}=={release}"
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
    ]
    _run([*pip, "--dest", folder, wanted], f"no source distribution of {wanted}; --tests takes a folder")
    top = {Path(name).parts[0] for name in suite.tests}
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        members = [m for m in archive.getmembers() if len(p := Path(m.name).parts) > 1 and p[1] in top]
        archive.extractall(folder, members, filter="data")
    return next((path for path in folder.iterdir() if path.is_dir()), folder)


def present(name: str, suite: Suite, folder: Path) -> list[str]:
    """Those of the suite's tests that the folder has; the others are told. Raises: SuiteError for none."""
    found = [path for path in suite.tests if (folder / path).exists()]
    if not found:
        raise SuiteError(f"{name}: no tests such as {suite.tests[0]} in {folder}; --tests takes a folder")
    if missing := sorted({*suite.tests} - {*found}):
        print(f"{name}: not in {folder.name}: {', '.join(missing)}", flush=True)
    return found


def our_path(folder: Path) -> Path:
    """A folder for PYTHONPATH with react_fast and the plugins in it, as links, and nothing else."""
    package = folder / "react_fast"
    package.mkdir(parents=True)
    source = Path(react_fast.__file__).parent
    links = {path.name: path for path in (*source.iterdir(), Path(_core.__file__))} | {
        "kernels": Path(kernels.__path__[0])
    }
    for name, path in links.items():
        (package / name).symlink_to(path.resolve())
    for path in Path(__file__).parent.glob("suite_*.py"):
        (folder / path.name).symlink_to(path.resolve())
    return folder


def once(
    name: str, command: list[str | Path], root: Path, environ: dict[str, str], stem: Path
) -> dict[str, str]:
    """Outcomes of pytest in `root`, logged under `stem`. Raises: SuiteError with its last line if it broke off."""
    junit, log = stem.with_suffix(".xml"), stem.with_suffix(".log")
    with log.open("w") as told:
        status = subprocess.run(
            [*command, f"--junitxml={junit}"], cwd=root, env=environ, stdout=told, stderr=subprocess.STDOUT
        ).returncode
    try:
        if status in (0, 1):
            return outcomes(junit)
    except (OSError, ET.ParseError):
        pass
    lines = [line for line in log.read_text().splitlines() if line.strip()] or ["no output"]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
    raise SuiteError(f"{name}: pytest ended with status {status}: {reason}")


def run(name: str, options: argparse.Namespace, folder: Path) -> Result:
    """Both runs of one peer, printed. Raises: SuiteError."""
    suite, work = SUITES[name], options.work.absolute()
    python = Path(options.python).absolute() if options.python else environment(suite, work / name)
    release = version(python, suite)
    root = options.tests[name] if name in options.tests else downloaded(suite, release, folder)
    command: list[str | Path] = [
        python, "-m", "pytest", "-p", "suite_plugin", "-p", "no:cacheprovider", "-o", "addopts=",
        "--continue-on-collection-errors", f"--timeout={options.timeout}", *suite.options,
        *shlex.split(options.pytest), *present(name, suite, root),
    ]  # fmt: skip
    environ = os.environ | {
        "PYTHONPATH": str(our_path(folder / "path")), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "REACT_FAST_SUITE": name,
    }  # fmt: skip
    if options.tiny_models:
        hub = str(work / "hub")
        command += ["-p", "suite_hub"]
        environ |= {"REACT_FAST_SUITE_HUB": hub, "HF_HUB_CACHE": hub, "HF_DATASETS_CACHE": f"{hub}/datasets"}
        _run([python, folder / "path" / "suite_hub.py"], "no tiny models", environ)
    counted = work / f"{name}.json"
    print(f"{name} {release}: {' / '.join(KINDS)}", flush=True)
    plain = environ | {"REACT_FAST_DISABLE": name}
    environ |= {"REACT_FAST_DISABLE": "", "REACT_FAST_SUITE_CALLS": str(counted)}
    with ThreadPoolExecutor(2 if options.together else 1) as pool:
        first = pool.submit(once, name, command, root, plain, work / f"{name}-without")
        second = pool.submit(once, name, command, root, environ, work / f"{name}-patched")
        without, patched = first.result(), second.result()
    print(f"  without: {counts(without)}\n  patched: {counts(patched)}")
    calls = {target: tuple(pair) for target, pair in json.loads(counted.read_text()).items()}
    for target, (entered, handed_on) in calls.items():
        print(f"  {target}: {entered} calls, {handed_on} went on to the original")
    for test, (before, after) in differing(without, patched).items():
        print(f"  {test}: {before} without, {after} with the patch")
    if not any(entered for entered, _ in calls.values()):
        raise SuiteError(f"{name}: no test called a replaced name")
    words = [
        "python -m bench.peers.run_suites", name,
        f"--tests {name}=FOLDER" if name in options.tests else "",
        "--tiny-models" if options.tiny_models else "",
        f'--pytest "{options.pytest}"' if options.pytest else "",
    ]  # fmt: skip
    today = str(datetime.date.today())
    return Result(name, release, without, patched, calls, " ".join(filter(None, words)), TORCH, today)


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or name not in SUITES:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, a name of {', '.join(SUITES)}, got {text!r}")
    return name, Path(folder)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.run_suites", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITES)}; by default all")
    parser.add_argument("--tests", action="append", type=_named, default=[], metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, help="folder of environments and logs, to be used again")
    parser.add_argument("--python", help="interpreter that has the peers, in the place of environments")
    parser.add_argument("--pytest", default="", help="further options of pytest, in one word")
    parser.add_argument("--tiny-models", action="store_true", help="ours in the place of the model hub's")
    parser.add_argument("--together", action="store_true", help="both runs at once, on two cores")
    parser.add_argument("--timeout", type=int, default=300, help="seconds that one test may take")
    parser.add_argument("--out", type=Path, help="Markdown file; what it says of other peers stays")
    options = parser.parse_args(words)
    options.tests = dict(options.tests)
    if unknown := [name for name in options.names if name not in SUITES]:
        parser.error(f"NAME must be one of {', '.join(SUITES)}, got {unknown[0]!r}")
    results: list[Result] = []
    status = 0
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        options.work.mkdir(parents=True, exist_ok=True)
        for name in options.names or SUITES:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    results.append(run(name, options, Path(folder)))
            except SuiteError as error:
                print(error, file=sys.stderr)
                status = 2
    if options.out and results:
        write(options.out, results)
    lost = any(broken(differing(result.without, result.patched)) for result in results)
    return max(status, int(lost))


if __name__ == "__main__":
    sys.exit(main())
