"""What a GPU machine's Python lacks, carried there as wheels: `--wheels DIR`.

`python -m bench.gpu.wheels DIR` (bench/out/ is ignored by git) fills a folder where there is a network, with what
is installed there, for the machine's Python 3.12; torch and CUDA's libraries are the machine's own. On the machine
`bench.gpu --wheels DIR` installs, for the run alone, those of the folder that its Python does not have.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# Modules of each stage that are no part of torch; a benchmark's peers are absent by themselves.
NEEDED: dict[str, tuple[str, ...]] = {
    "tests": ("hypothesis", "pytest", "scipy", "triton"),
    "measure": ("pytest", "pytest_benchmark"),
    "training": (
        "accelerate", "gymnasium", "pydantic", "safetensors", "scipy", "tokenizers", "transformers", "yaml",
    ),
}  # fmt: skip
WANTED = ("react-fast[train]", "trl", "hypothesis", "pytest-benchmark", "pytest-timeout", "pytest-xdist")
OWN = ("react-fast", "torch", "triton", "nvidia-", "cuda-")  # the machine's, and this library


def missing() -> dict[str, list[str]]:
    """Stage -> modules that it needs and this Python does not have; only stages that lack one."""
    lacking = {s: [m for m in own if importlib.util.find_spec(m) is None] for s, own in NEEDED.items()}
    return {stage: own for stage, own in lacking.items() if own}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def pinned(wanted: Iterable[str]) -> list[str]:
    """ "name==version" of `wanted` and all that they require, as installed here, but for the machine's own."""
    from packaging.requirements import Requirement

    waiting, seen, found = [Requirement(w) for w in wanted], set(), {}
    while waiting:
        one = waiting.pop()
        name, extras = _plain(one.name), one.extras or {""}
        if (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        try:
            there = distribution(name)
        except PackageNotFoundError:  # nothing here imports it
            continue
        if not name.startswith(OWN):
            found[name] = there.version
        elif name != "react-fast":
            continue
        for text in there.requires or ():
            part = Requirement(text)
            if part.marker is None or any(part.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(part)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def lacking(folder: Path) -> list[Path]:
    """Wheels of libraries that this Python does not have."""
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        try:
            distribution(wheel.name.partition("-")[0])
        except PackageNotFoundError:
            found.append(wheel)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu.wheels", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the wheels")
    parser.add_argument("--into", type=Path, help="install what is lacking from `folder` here, offline")
    parser.add_argument("--python", default="3.12", help="the machine's Python")
    given = parser.parse_args()
    pip = [sys.executable, "-m", "pip"]
    if given.into is None:
        options = ["--no-deps", "--only-binary", ":all:", "--python-version", given.python]
        subprocess.run([*pip, "download", *options, "--dest", given.folder, *pinned(WANTED)], check=True)
    elif wheels := lacking(given.folder):
        options = ["--no-deps", "--no-index", "--no-compile", "--target", str(given.into)]
        subprocess.run([*pip, "install", *options, *wheels], check=True)


if __name__ == "__main__":
    main()
