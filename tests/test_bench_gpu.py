"""The GPU suite, rehearsed: its stages run, a kill leaves what was known, tables follow from it."""

import json
import os
import signal
import subprocess
import sys
import time
from ast import get_docstring, parse
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

from bench import roofline
from bench.gpu import events, launches, process, record, summary, watch

ROOT = Path(__file__).parents[1]


def _command(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(out), *words]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small rehearsal: the tests and the benchmarks of one kernel file, and its search."""
    out = tmp_path_factory.mktemp("gpu")
    words = ("--minutes", "4", "--only", "ceilings", "tests", "autotune", "moments", "logprob")
    done = subprocess.run(_command(out, *words), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-4000:]
    return out


def test_a_rehearsal_gives_a_whole_record(rehearsed: Path) -> None:
    found = json.loads((rehearsed / "run.json").read_text())
    assert found["schema"] == record.SCHEMA
    assert found["rehearsed"] is True
    assert found["device"] is None
    assert {"python", "torch", "triton"} <= found["versions"].keys()
    assert {name: stage["state"] for name, stage in found["stages"].items()} == dict.fromkeys(
        ("ceilings", "tests", "autotune"), "done"
    )
    assert all(rate > 0 for rate in found["ceilings"].values())
    assert set(found["ceilings"]) == {"copy_bytes_per_second", "gemm_flops_per_second"}
    assert found["tests"]["passed"] > 5
    assert found["tests"]["failures"] == found["tests"]["not_collected"] == []
    assert found["tests"]["kernels"]["moments.accumulate_by_id_kernel"]["passed"] > 5
    assert "n_step.link_kernel" in found["tests"]["never_launched"]
    tuned = {t["name"]: t for t in found["tuned"]}
    assert tuned.keys() == {"logprob.forward", "logprob.backward"}
    assert all(
        "seconds" in t["tried"][0] and t["options"].keys() == {"BLOCK", "num_warps"} for t in tuned.values()
    )
    table = json.loads((rehearsed / "tuned.json").read_text())
    assert table.keys() == json.loads((ROOT / "kernels" / "tuned.json").read_text()).keys()


def test_its_summary_says_that_it_is_one(rehearsed: Path) -> None:
    text = (rehearsed / "summary.md").read_text()
    assert "A rehearsal in Triton's interpreter" in text
    assert "| tests | done |" in text
    with pytest.raises(SystemExit, match="is a rehearsal"):
        summary.take([rehearsed / "run.json"])


def test_a_kill_leaves_what_was_known(tmp_path: Path) -> None:
    """Killed in the middle of the tests; nothing that it started goes on."""
    words = ("--only", "tests", "moments", "--minutes", "4")
    suite = subprocess.Popen(_command(tmp_path, *words), cwd=ROOT, stdout=subprocess.DEVNULL)
    give_up = time.time() + 100
    while time.time() < give_up and not events.told(tmp_path / "events.jsonl"):
        time.sleep(0.05)
    while time.time() < give_up and not json.loads((tmp_path / "run.json").read_text())["tests"]["passed"]:
        time.sleep(0.05)
    suite.send_signal(signal.SIGKILL)
    suite.wait()
    partial = json.loads((tmp_path / "run.json").read_text())
    assert partial["tests"]["passed"] > 0
    assert "tests" not in partial["stages"]
    time.sleep(0.3)
    known = len(events.told(tmp_path / "events.jsonl"))
    time.sleep(0.5)
    assert len(events.told(tmp_path / "events.jsonl")) == known
    summary.write(tmp_path)


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
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_failing_stage_is_told(tmp_path: Path) -> None:
    state = process.run(
        [sys.executable, "-c", "exit(3)"], 20, cwd=tmp_path, environment={}, log=tmp_path / "log"
    )
    assert state == "failed with code 3"


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    events.tell("tests", file, kind="test", test="a")
    with file.open("a") as out:
        out.write('{"stage": "tests", "ki')
    assert events.told(file) == [{"stage": "tests", "kind": "test", "test": "a"}]


def test_items_come_from_every_file_in_turn() -> None:
    items = [SimpleNamespace(nodeid=name) for name in ("a::1", "a::2", "a::3", "b::1", "c::1", "c::2")]
    assert [item.nodeid for item in watch.in_turn(items)] == ["a::1", "b::1", "c::1", "a::2", "c::2", "a::3"]


@pytest.mark.parametrize("path", roofline.NOTES)
def test_notes_agree_with_what_the_suite_computes(path: str) -> None:
    note = " ".join((get_docstring(parse((ROOT / "kernels" / f"{path}.py").read_text())) or "").split())
    for said in roofline.NOTES[path]:
        assert said in note, f"kernels/{path}.py's roofline does not say {said!r}"


def test_every_kernel_file_has_a_counted_note() -> None:
    """But the one that is another's few-row form, whose note refers to it."""
    assert launches.kernels().keys() - roofline.NOTES.keys() == {"linear_logprob_few"}


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


def test_a_rehearsal_takes_one_of_every_function() -> None:
    items = [SimpleNamespace(nodeid=name) for name in ("a::x[1]", "a::x[2]", "a::y", "b::x[1]")]
    assert [item.nodeid for item in watch.firsts(items)] == ["a::x[1]", "a::y", "b::x[1]"]


def test_a_kernel_in_a_failed_test_is_not_verified() -> None:
    run = _run({"case": "x"}, {"moments.accumulate_by_id_kernel": {"passed": 3, "failed": 1}})
    line = next(line for line in summary.kernel_table([run]).splitlines() if line.startswith("| `moments` "))
    assert "in a failed test: accumulate_by_id_kernel" in line


def test_the_readme_is_what_its_runs_say() -> None:
    text = (summary.RESULTS / "README.md").read_text()
    assert summary.section(summary.kept()) in text, "renew it with python -m bench.gpu --readme"


def test_names_of_kernels_are_those_that_are_launched() -> None:
    """By the table of compiled kernels, which is made from what the launchers use."""
    table = json.loads((ROOT / "kernels" / "resources.json").read_text())
    assert {f"{row['path']}.{row['variant'].partition('[')[0]}" for row in table} == set(launches.names())


def test_left_is_what_the_deadline_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(events.DEADLINE, str(time.time() + 100))
    assert 90 < events.left() <= 100
    monkeypatch.delenv(events.DEADLINE)
    assert events.left() == float("inf")
    assert os.environ.get(events.FILE) is None
