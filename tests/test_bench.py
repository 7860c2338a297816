"""The benchmarks run: every file imports, the smallest cases finish, missing peers are told, results merge."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from bench import (
    bench_linear_logprob,
    bench_logprob,
    common,
    errors,
    heads,
    memory,
    oracle,
    picture,
    report,
)
from bench.peers import contestants

FOLDER = Path(report.__file__).parent
PEERS = ("trl", "liger_kernel", "cut_cross_entropy", "quack", "verl")
TINY = heads.Head("tiny", 16, 300, rows=24)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contestant once, none that compiles for seconds, and no peer."""
    monkeypatch.setattr(common, "QUICK", True)
    monkeypatch.setenv("REACT_FAST_BENCH_CONTESTANTS", "react_fast,torch,TRL selective,TRL chunked")
    imported = [name for name in sys.modules if name.split(".")[0] in PEERS]
    for name in {*PEERS, *imported}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_every_bench_file_imports(file: Path) -> None:
    importlib.import_module(f"bench.{file.stem}")


@pytest.mark.parametrize("entropy", bench_logprob.ENTROPY)
@pytest.mark.parametrize("run", [bench_logprob.test_forward, bench_logprob.test_forward_and_backward])
def test_smallest_logprob_case(benchmark, run, entropy) -> None:
    run(benchmark, (64, 512), torch.bfloat16, entropy)
    found = benchmark.extra_info
    assert {"react_fast", "torch", "limit"} <= found["median_seconds"].keys()
    assert "not installed" in found["absent"]["TRL selective"]
    assert found["absent"]["torch.compile"] == "not selected in this run"


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("mode", bench_linear_logprob.MODES)
def test_smallest_linear_case(benchmark, mode, softcap) -> None:
    inputs = heads.Inputs(heads.Head("tiny", 16, 300, softcap, rows=24), torch.float32)
    bench_linear_logprob.test_linear(benchmark, (inputs, oracle.truth(inputs)), mode)
    found = benchmark.extra_info
    assert {"react_fast", "torch", "limit"} <= found["median_seconds"].keys()
    assert found["unit"] == "GEMM"
    assert {"TRL chunked", "CCE", "QuACK", "verl"} <= found["absent"].keys()


def test_smallest_policy_case(benchmark) -> None:
    inputs = heads.Inputs(TINY, torch.float32)
    bench_linear_logprob.test_policy_loss(benchmark, (inputs, oracle.truth(inputs)))
    assert {"react_fast", "torch", "limit"} <= benchmark.extra_info["median_seconds"].keys()


@pytest.mark.parametrize("wrong", ["log-prob", "gradient of hidden", "gradient of weight"])
def test_a_contestant_that_computes_something_else_is_refused(wrong: str) -> None:
    inputs = heads.Inputs(TINY, torch.float32)
    leaves = inputs.require(True, True)
    logp = contestants.eager_linear(inputs.hidden, inputs.weight, inputs.ids, None)
    right = (logp, *heads.gradients(logp, leaves, inputs.upstream))
    check = oracle.linear_check(oracle.truth(inputs), 2)
    check("torch", right)
    place = ["log-prob", "gradient of hidden", "gradient of weight"].index(wrong)
    spoilt = [x * 1.05 if i == place else x for i, x in enumerate(right)]
    with pytest.raises(AssertionError, match=f"torch computes another {wrong}"):
        check("torch", tuple(spoilt))


def test_a_peer_that_fails_is_absent_and_ours_is_an_error(benchmark, monkeypatch) -> None:
    monkeypatch.delenv("REACT_FAST_BENCH_CONTESTANTS")

    def broken() -> None:
        raise RuntimeError("no such device")

    common.race(benchmark, {"react_fast": lambda: 1, "peer": broken}, case="broken peer")
    assert benchmark.extra_info["absent"] == {"peer": "RuntimeError: no such device"}
    with pytest.raises(RuntimeError, match="no such device"):
        common.race(benchmark, {"react_fast": broken, "peer": lambda: 1}, case="broken")


def test_a_peer_that_computes_something_else_is_absent(benchmark, monkeypatch) -> None:
    monkeypatch.delenv("REACT_FAST_BENCH_CONTESTANTS")

    def check(name: str, result: object) -> None:
        assert result == 1, f"{name} computes another number"

    with pytest.raises(AssertionError, match="react_fast computes another number"):
        common.race(benchmark, {"react_fast": lambda: 2, "peer": lambda: 1}, case="wrong", check=check)
    common.race(benchmark, {"react_fast": lambda: 1, "peer": lambda: 2}, case="wrong peer", check=check)
    assert "peer computes another number" in benchmark.extra_info["absent"]["peer"]


def test_memory_of_one_call(monkeypatch) -> None:
    """A tiny call takes less than the budget of one tile of logits, 64 MiB."""
    monkeypatch.setattr(heads, "QUICK", True)
    monkeypatch.setattr(memory, "QUICK", True)
    assert 0 <= memory.measure("react_fast", memory.CASES["trained-bfloat16"]) < 64 << 20
    with pytest.raises(ImportError):
        memory.measure("TRL chunked", memory.CASES["trained-bfloat16"])


def test_ulps() -> None:
    want = torch.tensor([1.0, 0.0, -torch.inf, 2.0], dtype=torch.float64)
    exact = want.float()
    assert errors.ulps(exact, want) == (0.0, 0.0)
    off = exact + torch.tensor([2.0**-23, 0.0, 0.0, 0.0])
    assert errors.ulps(off, want) == (1.0, 0.25)
    assert errors.ulps(torch.full((4,), torch.nan), want)[0] == float("inf")


def _raw(cases: dict[str, float], commit: str, whole: list[str]) -> dict:
    """pytest-benchmark's JSON of bench_logprob.py, as far as the report reads it."""
    info = {"limit": "stream", "isa": "avx2", "threads": 2, "absent": {"peer": "not installed"}}
    return {
        "datetime": "2030-01-01T00:00:00", "commit_info": {"id": commit, "dirty": False},
        "machine_info": {"cpu": {"brand_raw": "a CPU", "count": 2}}, "whole_files": whole,
        "benchmarks": [
            {
                "fullname": "bench/bench_logprob.py::test",
                "extra_info": {"case": name, "median_seconds": {"react_fast": t, "limit": t / 2}, **info},
            }
            for name, t in cases.items()
        ],
    }  # fmt: skip


def test_a_partial_run_replaces_its_own_cases_only(tmp_path: Path) -> None:
    first = report.distilled(_raw({"a": 1.0, "b": 2.0}, "old", []))
    other = {"case": "gae", "group": "advantage", "run": "x", **first["cases"][0], "peak_bytes": {}}
    other = {**other, "case": "gae", "group": "advantage"}
    old = {"runs": first["runs"], "cases": [*first["cases"], other]}
    new = report.merged(old, report.distilled(_raw({"b": 3.0, "c": 4.0}, "new", [])))
    commits = {c["case"]: new["runs"][c["run"]]["commit"] for c in new["cases"]}
    assert commits == {"a": "old", "b": "new", "c": "new", "gae": "old"}
    whole = report.merged(old, report.distilled(_raw({"c": 4.0}, "new", ["logprob"])))
    assert {c["case"] for c in whole["cases"]} == {"c", "gae"}
    text = report.document(new, "Measured")
    assert "commit old" in text
    assert "commit new" in text
    assert "- peer: not installed" in text
    picture.picture(new["cases"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_memory_and_gemm_tables() -> None:
    case = {"case": "x", "group": "g", "limit": "how", "unit": "GEMM", "isa": "avx2", "threads": 2}
    timed = {**case, "median_seconds": {"react_fast": 2.0, "peer": 6.0, "limit": 1.0}}
    assert "| x | 1 s | 2.00 | 6.00 | how |" in report.units([timed])
    weighed = {**case, "peak_bytes": {"react_fast": 64 << 20, "peer": 4 << 30}}
    assert "| x | 64 | 4,096 | how |" in report.memory([weighed])


def test_only_names_bench_files() -> None:
    assert [file.stem for file in report.chosen(["logprob"])] == ["bench_linear_logprob", "bench_logprob"]
    with pytest.raises(SystemExit, match="--only must name some of"):
        report.chosen(["nonsense"])
