"""`python -m bench.gpu`: the stages in order, each with its share of the minutes that are left."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import __doc__ as about
from . import events, launches, process, record, summary

ROOT = Path(__file__).parents[2]
RESERVE = 5.0  # seconds for the last record and the tables
EVERY = 1.0  # seconds between two records of a stage
MARGIN = 5.0  # seconds that a stage has to end by itself before it is ended
LEAST = 20.0  # seconds of a stage, or what is left: torch alone takes some of them to start


@dataclass(frozen=True)
class Stage:
    """A module of this package that is run as a process, and its share of the time beside the others'."""

    name: str
    share: float

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", f"bench.gpu.{self.name}"]


STAGES = (
    Stage("ceilings", 2),
    Stage("tests", 28),
    Stage("sanitizer", 12),
    Stage("measure", 28),
    Stage("training", 18),
    Stage("autotune", 12),
)
WHEELS = 60.0  # seconds of installing them
BUILD, BUILD_LEAST = 25, 240.0  # share of the build, where one is needed, and its seconds at least


class Suite:
    """One run into a folder; `minutes` are counted from here on."""

    def __init__(
        self, out: Path, minutes: float, rehearse: bool, only: list[str], carried: Path | None = None
    ) -> None:
        self.end = time.time() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.tree = out.resolve(), ROOT
        self.scratch = Path(tempfile.mkdtemp(prefix="react_fast_gpu_"))
        self.libraries = (
            self.scratch / "site-packages"
        )  # the wheels': dill pickles other folders' modules whole
        self.events, self._seen, self._written = self.out / "events.jsonl", -1, 0.0
        for name in ("events.jsonl", "log.txt"):
            (self.out / name).unlink(missing_ok=True)
        named = {
            *only,
            *(["ceilings"] if "measure" in only else []),
        }  # what a case's share of the limit is of
        self.stages = [s for s in STAGES if s.name in named] or list(STAGES)
        self.kernels = [name for name in only if name in launches.kernels()]
        self.rehearse = rehearse or record.device() is None
        self.carried = carried
        self.head = record.header(ROOT, minutes, self.rehearse)
        self.write()

    def left(self) -> float:
        return self.end - time.time() - RESERVE - process.GRACE

    def look(self) -> None:
        """Write the record about once a second."""
        if time.time() - self._written > EVERY:
            self.write()

    def write(self) -> None:
        """The record as it stands, where something has been told since."""
        self._written = time.time()
        size = self.events.stat().st_size if self.events.exists() else 0
        if size != self._seen:
            self._seen = size
            found = record.made(self.head, events.told(self.events))
            events.replace(self.out / "run.json", record.dumped(found))

    def _environment(self, seconds: float) -> dict[str, str]:
        device = "cpu" if self.rehearse else "cuda"
        given = {
            events.FILE: str(self.events),
            events.DEADLINE: str(time.time() + seconds - min(MARGIN, seconds / 4)),
            events.REHEARSAL: str(int(self.rehearse)),
            events.ONLY: ",".join(self.kernels),
            "REACT_FAST_TEST_DEVICE": device,
            "REACT_FAST_BENCH_DEVICE": device,
            "REACT_FAST_BENCH_QUICK": str(int(self.rehearse)),
            events.OUT: str(self.out),
            "TRITON_INTERPRET": str(int(self.rehearse)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        beside = [str(self.libraries), *filter(None, [os.environ.get("PYTHONPATH")])]
        given["PYTHONPATH"] = os.pathsep.join(beside)
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):  # the home may be read-only
            given.setdefault(name, os.environ.get(name, str(self.scratch / name.lower())))
        return given

    def stage(self, name: str, command: list[str], seconds: float) -> str:
        began = time.time()
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        state = "no time left"
        if seconds > 1:
            state = process.run(
                command,
                seconds,
                cwd=self.tree,
                environment=self._environment(seconds),
                log=self.out / "log.txt",
                meanwhile=self.look,
            )
        events.tell("suite", self.events, name=name, state=state, seconds=round(time.time() - began, 1))
        self.write()
        print(f"{name}: {state} after {time.time() - began:.0f} s", flush=True)
        return state

    def carry(self) -> None:
        """Install what the wheels have and this Python lacks; the record says what is lacking still."""
        if self.carried is not None:
            command = [
                sys.executable,
                "-m",
                "bench.gpu.wheels",
                str(self.carried),
                "--into",
                str(self.libraries),
            ]
            self.stage("wheels", command, min(self.left(), WHEELS))
            sys.path.append(str(self.libraries))
        self.head |= record.libraries()
        self._seen = -1
        self.write()

    def build(self) -> bool:
        """True if react_fast can be imported, from here or from a copy that is built now."""
        try:
            import react_fast._core
            import react_fast.kernels  # noqa: F401

            return True
        except ImportError:
            pass
        tree = self.scratch / "tree"
        command = [sys.executable, "-m", "bench.gpu.build", str(tree)]
        total = BUILD + sum(stage.share for stage in self.stages)
        seconds = min(self.left(), max(BUILD_LEAST, self.left() * BUILD / total))
        if self.stage("build", command, seconds) != "done":
            return False
        self.tree = tree
        return True

    def run(self) -> None:
        self.carry()
        if self.build():
            for i, stage in enumerate(self.stages):
                share = stage.share / sum(s.share for s in self.stages[i:])
                self.stage(stage.name, stage.command, min(self.left(), max(LEAST, self.left() * share)))
        self.write()
        summary.write(self.out)
        shutil.rmtree(self.scratch, ignore_errors=True)


def main() -> int:
    names = [*(stage.name for stage in STAGES), *launches.kernels()]
    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=names,
        help=f"stages and kernels: {', '.join(names)}",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="never more than these (default: 9)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in the interpreter, on the CPU")
    parser.add_argument(
        "--wheels", type=Path, help="folder of what this Python lacks: see bench/gpu/wheels.py"
    )
    parser.add_argument(
        "--readme", nargs="*", type=Path, help="take runs into bench/results, renew its table"
    )
    arguments = parser.parse_args()
    if arguments.readme is not None:
        summary.take(arguments.readme)
        return 0
    if arguments.out is None:
        parser.error("--out is needed")
    carried = arguments.wheels and arguments.wheels.resolve()
    suite = Suite(arguments.out, arguments.minutes, arguments.rehearse, arguments.only, carried)
    suite.run()
    print((suite.out / "summary.md").read_text())
    return 0 if summary.good(suite.out) else 1


if __name__ == "__main__":
    sys.exit(main())
