"""The GPU suite, rehearsed: its stages run, a kill leaves what was known, tables follow from it."""

import json
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import react_fast as rf

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

from bench.gpu import events, launches, process, record, sessions, summary, watch, wheels
from bench.gpu.__main__ import Stage, Suite
from react_fast.kernels import tuned

with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv(events.REHEARSAL, "1")  # their sizes are chosen when they are imported
    from bench.gpu import autotune, touch, training

ROOT = Path(__file__).parents[1]


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def _command(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(out), *words]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shortest rehearsal, of one stage."""
    out = tmp_path_factory.mktemp("gpu")
    command = _command(out, "--minutes", "2", "--only", "ceilings")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-4000:]
    return out


def test_a_rehearsal_gives_a_whole_record(rehearsed: Path) -> None:
    found = json.loads((rehearsed / "run.json").read_text())
    assert found["schema"] == record.SCHEMA
    assert found["rehearsed"] is True
    assert found["device"] is None
    assert {"python", "torch", "triton"} <= found["versions"].keys()
    assert found["stages"].keys() == {"ceilings"}
    assert found["stages"]["ceilings"]["state"] == "done"
    assert all(rate > 0 for rate in found["ceilings"].values())
    assert set(found["ceilings"]) == {"copy_bytes_per_second", "gemm_flops_per_second"}
    assert found["cases"] == found["training"] == found["tuned"] == found["sanitizer"] == []


def test_its_summary_says_that_it_is_one(rehearsed: Path) -> None:
    text = (rehearsed / "summary.md").read_text()
    assert "A rehearsal in Triton's interpreter" in text
    assert "| ceilings | done |" in text
    with pytest.raises(SystemExit, match="is a rehearsal"):
        summary.take([rehearsed / "run.json"])


def test_a_kill_leaves_what_was_known(tmp_path: Path) -> None:
    """Killed in the middle of one kernel file's tests; nothing that it started goes on."""
    words = ("--only", "tests", "moments", "--minutes", "4")
    suite = subprocess.Popen(_command(tmp_path, *words), cwd=ROOT, stdout=subprocess.DEVNULL)
    partial: dict = {}
    give_up = time.time() + 100
    while time.time() < give_up and not partial.get("tests", {}).get("passed"):
        time.sleep(0.05)
        if (tmp_path / "run.json").exists():
            partial = json.loads((tmp_path / "run.json").read_text())  # whole at any moment
    suite.send_signal(signal.SIGKILL)
    suite.wait()
    assert partial["tests"]["passed"] > 0
    assert partial["tests"]["failures"] == partial["tests"]["not_collected"] == []
    assert partial["tests"]["kernels"]["moments.accumulate_by_id_kernel"]["passed"] > 0
    assert "n_step.link_kernel" in partial["tests"]["never_launched"]
    assert "tests" not in partial["stages"]
    time.sleep(0.3)
    known = len(events.told(tmp_path / "events.jsonl"))
    time.sleep(0.7)
    assert len(events.told(tmp_path / "events.jsonl")) == known
    summary.write(tmp_path)


def test_the_suite_starts_where_nothing_is_built() -> None:
    script = "import sys; sys.modules['react_fast'] = None; import bench.gpu.__main__, bench.gpu.build"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_search_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has this device's winners and is otherwise as it was."""
    monkeypatch.setenv(events.OUT, str(tmp_path))
    monkeypatch.setenv(events.FILE, str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(events.ONLY, "logprob")
    present = tuned.table()
    times = iter([1.0, 2.0, 0.5, 1.0, 1.0, 1.0])
    monkeypatch.setattr(autotune, "seconds", lambda run, rounds: next(times))
    autotune.main()
    told = {e["name"]: e for e in events.told(tmp_path / "events.jsonl")}
    assert told.keys() == {"logprob.forward", "logprob.backward"}
    assert told["logprob.forward"]["gain"] == 2.0
    assert told["logprob.forward"]["options"] == {"BLOCK": 64, "num_warps": 4}
    assert told["logprob.backward"]["options"] == present["logprob.backward"]["default"]
    table = json.loads((tmp_path / "tuned.json").read_text())
    assert table["logprob.forward"] == {"default": {"BLOCK": 64, "num_warps": 4}}
    assert {**table, "logprob.forward": None} == {**present, "logprob.forward": None}
    assert tuned.table() == present
    monkeypatch.setattr(tuned, "_TABLE", table)  # in place of kernels/tuned.json
    assert {k: tuned.of_capability(k, 90) for k in table} == {k: table[k]["default"] for k in table}


def test_a_candidate_that_computes_something_else_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([torch.ones(3), torch.ones(3), torch.full((3,), 1.1), torch.ones(3)])
    monkeypatch.setitem(autotune.CASES, "logprob.forward", lambda: lambda: next(results))
    monkeypatch.setattr(autotune, "seconds", lambda run, rounds: 1.0)
    options = [{"BLOCK": block, "num_warps": 4} for block in (16, 32, 64)]
    monkeypatch.setattr(autotune, "candidates", lambda kernel: options)
    found = autotune.searched("logprob.forward")["tried"]
    assert ["out" in t for t in found] == [False, False, True]
    assert found[2]["out"] == "computes something else"


TOUCHED = {
    "q_loss": "q_loss.q_loss_kernel",
    "RunningMoments.update": "moments.accumulate_by_id_kernel",
    "few long rows": "advantage.gae_kernel",
    "objectives of rows and batches": "selection.keys_kernel",
    "heads of several blocks": "linear_logprob_few.merge_kernel",
    "wide rows": "logprob.finish_kernel",
    "several steps": "kl_rewards.last_kernel",
}


@pytest.mark.parametrize("name", TOUCHED)
def test_ops_are_touched(name: str) -> None:
    """Forward and backward; bench.gpu.touch tells what each launched."""
    seen: list[str] = []
    with rf.use_backend("triton"), launches.watched(lambda kernel, _: seen.append(kernel)):
        touch.CASES[name]()
    assert TOUCHED[name] in seen


def test_contestants_of_the_training_compute_the_same() -> None:
    """The ops and plain torch: the same parameters after an update."""
    pytest.importorskip("transformers")
    models = []
    for logprobs, loss in (
        (rf.linear_token_logprobs, lambda *given: rf.policy_loss(*given).loss),
        (training.plain_logprobs, training.plain_loss),
    ):
        model, step = training.loop(logprobs, loss)
        step()
        models.append(model)
    for ours, plain in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_stage_and_its_children_end_with_their_time(tmp_path: Path) -> None:
    """One that does not listen to SIGTERM, and whose child would live on."""
    script = "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True);"
    script += "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    start, log = time.monotonic(), tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "GRACE", 0.3)
        state = process.run([sys.executable, "-c", script], 1.0, cwd=tmp_path, environment={}, log=log)
    assert state == "ended by its time"
    assert time.monotonic() - start < 5
    child = int(log.read_text().split()[-1])
    give_up = time.monotonic() + 10
    while _runs(child) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not _runs(child)


def test_a_failing_stage_is_told(tmp_path: Path) -> None:
    state = process.run(
        [sys.executable, "-c", "exit(3)"], 20, cwd=tmp_path, environment={}, log=tmp_path / "log"
    )
    assert state == "failed with code 3"


class Script(Stage):
    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", SCRIPTS[self.name]]


SCRIPTS = {
    "crash": "import os; os.abort()",
    "hang": "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)",
    "last": "from bench.gpu.events import tell; tell('ceilings', kind='rate', what='a', rate=1.0)",
}


def test_a_run_never_exceeds_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that crashes costs itself, one that hangs its share; those behind them still run."""
    monkeypatch.setattr(process, "GRACE", 0.5)
    monkeypatch.setattr("bench.gpu.__main__.LEAST", 1.0)
    monkeypatch.setattr("bench.gpu.__main__.RESERVE", 1.0)
    monkeypatch.setattr(Suite, "build", lambda self: True)
    start = time.time()
    suite = Suite(tmp_path, 12 / 60, True, [])
    suite.stages = [Script(name, share) for name, share in (("crash", 1), ("hang", 1), ("last", 4))]
    suite.run()
    assert time.time() - start < 12
    found = json.loads((tmp_path / "run.json").read_text())
    assert {name: stage["state"] for name, stage in found["stages"].items()} == {
        "crash": f"failed with code {-signal.SIGABRT}", "hang": "ended by its time", "last": "done",
    }  # fmt: skip
    assert found["ceilings"] == {"a": 1.0}
    assert "| hang | ended by its time |" in (tmp_path / "summary.md").read_text()
    assert not summary.good(tmp_path)


def test_what_a_stage_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wheels.NEEDED, "training", ("torch", "a_library_that_is_not_installed"))
    suite = Suite(tmp_path, 1, True, ["training"])
    suite.carry()
    summary.write(tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["missing"] == {"training": ["a_library_that_is_not_installed"]}
    text = (tmp_path / "summary.md").read_text()
    assert "Not installed: training lacks a_library_that_is_not_installed" in text


def test_wheels_are_what_the_machine_lacks(tmp_path: Path) -> None:
    """All that the trainer requires, but torch's own, in the versions installed here."""
    pytest.importorskip("pydantic")
    names = {pin.partition("==")[0]: pin.partition("==")[2] for pin in wheels.pinned(["react-fast[train]"])}
    assert {"pydantic", "pydantic-core", "gymnasium", "transformers", "tokenizers"} <= names.keys()
    assert names["pydantic"] == version("pydantic")
    assert not names.keys() & {"torch", "triton", "react-fast"}
    assert "pytest" not in names
    for name in ("torch-2.0.0-py3-none-any.whl", "unheard_of-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert [wheel.name for wheel in wheels.lacking(tmp_path)] == ["unheard_of-1.0-py3-none-any.whl"]


CRASHING = """
import os
import pytest

@pytest.fixture
def backend():
    return "triton"

def test_before(backend): pass
def test_crash(backend): os.abort()
def test_lost(backend): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_behind(backend): pass
def test_other(): assert False, "does not run the kernels"
"""


def test_a_crash_costs_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed, and one whose GPU context is lost, are followed by one that goes on behind it; a
    file that cannot be imported costs itself alone."""
    file = tmp_path / "test_crashing.py"
    file.write_text(CRASHING)
    absent = tmp_path / "test_absent.py"
    absent.write_text("import a_library_that_is_not_installed")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(events.FILE, str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(events.OUT, str(tmp_path))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # quicker
    sessions.run("tests", [str(file), str(absent)])
    found = record.tests(events.told(tmp_path / "events.jsonl"))
    assert (found["passed"], found["failed"]) == (2, 1)
    assert [name.partition("::")[2] for name in found["not_ended"]] == ["test_crash"]
    assert "illegal memory access" in found["failures"][0]["why"]
    assert "a_library_that_is_not_installed" in found["not_collected"][0]["why"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    events.tell("tests", file, kind="test", test="a")
    with file.open("a") as out:
        out.write('{"stage": "tests", "ki')
    assert events.told(file) == [{"stage": "tests", "kind": "test", "test": "a"}]


def test_items_come_from_every_file_in_turn() -> None:
    items = [SimpleNamespace(nodeid=name) for name in ("a::1", "a::2", "a::3", "b::1", "c::1", "c::2")]
    assert [item.nodeid for item in watch.in_turn(items)] == ["a::1", "b::1", "c::1", "a::2", "c::2", "a::3"]


def _run(case: dict, tests: dict[str, dict[str, int]]) -> dict:
    found = record.made({"date": "2030-01-01", "device": {"name": "H100"}, "rehearsed": False}, [])
    return {
        **found,
        "ceilings": {"copy_bytes_per_second": 3e12, "gemm_flops_per_second": 8e14},
        "cases": [case],
        "tests": {**found["tests"], "kernels": {**found["tests"]["kernels"], **tests}},
    }


def test_the_limit_is_the_larger_of_bytes_and_flops() -> None:
    case = {
        "case": "gae [8]", "path": "advantage", "bytes_moved": 3e9, "flops": 8e9,
        "median_seconds": {"react_fast": 2e-3, "torch": 8e-3, "limit": 1.5e-3},
    }  # fmt: skip
    run = _run(case, {"advantage.gae_kernel": {"passed": 3, "failed": 0}})
    assert summary.share(case, run["ceilings"]) == pytest.approx(0.5)
    assert summary.share({**case, "flops": 1.6e12}, run["ceilings"]) == pytest.approx(1.0)
    assert summary.share(case, {}) == pytest.approx(0.75)
    assert summary.peers(case) == {"torch": 4.0}
    line = next(
        line for line in summary.kernel_table([run]).splitlines() if line.startswith("| `advantage` ")
    )
    assert "H100, 2030-01-01, 3 tests; never launched: gae_backward_kernel" in line
    assert "| 50%: gae [8] | torch 4x |" in line
    assert "advantage.gae_kernel" not in summary.never([run])
    assert "advantage.scan_kernel" in summary.never([run])


def test_peak_memory_is_in_the_summary() -> None:
    case = {
        "case": "memory of x", "peak_bytes": {"react_fast": 50 << 20, "Liger": 100 << 20},
        "absent": {"QuACK": "not installed"},
    }  # fmt: skip
    run = _run(case, {})
    line = "| memory of x | 50 | Liger 100 (2x), QuACK absent: not installed |"
    assert line in summary.text_of({**run, "device": None, "commit": None, "versions": {}})
    assert line in summary.section([run])


def test_a_rehearsal_takes_one_of_every_function() -> None:
    items = [SimpleNamespace(nodeid=name) for name in ("a::x[1]", "a::x[2]", "a::y", "b::x[1]")]
    assert [item.nodeid for item in watch.firsts(items)] == ["a::x[1]", "a::y", "b::x[1]"]


def test_a_kernel_in_a_failed_test_is_not_verified() -> None:
    run = _run({"case": "x"}, {"moments.accumulate_by_id_kernel": {"passed": 3, "failed": 1}})
    line = next(line for line in summary.kernel_table([run]).splitlines() if line.startswith("| `moments` "))
    assert "in a failed test: accumulate_by_id_kernel" in line


def test_a_run_is_taken_into_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    run = _run({"case": "x"}, {"moments.accumulate_by_id_kernel": {"passed": 3, "failed": 0}})
    run["training"] = [{"name": "torch", "seconds": 2.0, "tokens_per_second": 8192.0, "peak_bytes": 1 << 30}]
    (tmp_path / "run.json").write_text(json.dumps(run))
    for _ in range(2):
        summary.take([tmp_path / "run.json"])
    assert summary.kept() == [run]
    assert json.loads((tmp_path / "gpu-2030-01-01-h100.json").read_text()) == run
    text = (tmp_path / "README.md").read_text()
    assert text == f"before\n{summary.section([run])}\nafter\n"
    assert "| `moments` | H100, 2030-01-01, 3 tests |" in text
    assert "| torch | 8,192 | 2 s | 1,024 |" in text
    assert "`moments.accumulate_by_id_kernel`" not in text
    assert "`n_step.link_kernel`" in text
    second = {**run, "minutes": 3.0}
    (tmp_path / "run.json").write_text(json.dumps(second))
    summary.take([tmp_path / "run.json"])
    assert summary.kept() == [second, run]


def test_the_readme_is_what_its_runs_say() -> None:
    text = (summary.RESULTS / "README.md").read_text()
    assert summary.section(summary.kept()) in text, "renew it with python -m bench.gpu --readme"


def test_names_of_kernels_are_those_that_are_launched() -> None:
    """By the table of compiled kernels, which is made from what the launchers use."""
    table = json.loads((ROOT / "kernels" / "resources.json").read_text())
    assert {f"{row['path']}.{row['variant'].partition('[')[0]}" for row in table} == set(launches.names())
