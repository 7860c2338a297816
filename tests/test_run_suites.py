"""Others' tests with and without the patch: outcomes compared, refusals in one line, calls counted, rows kept."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.peers import run_suites, suite_hub, suite_plugin
from bench.peers.outcomes import Result, broken, counts, differing, outcomes, write
from react_fast.integrations.points import Point

CASES = {
    "passed": "", "failed": "<failure/>", "error": "<error/>", "skipped": "<skipped/>",
    "error at its teardown": "<failure/><error/>",
}  # fmt: skip


def _junit(path: Path, **tests: str) -> Path:
    lines = (
        f'<testcase classname="a.B" name="{name}">{CASES[kind]}</testcase>' for name, kind in tests.items()
    )
    path.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    return path


def test_outcomes_are_compared_test_by_test(tmp_path):
    same = {"p": "passed", "s": "skipped", "f": "failed", "e": "error", "t": "error at its teardown"}
    without = outcomes(
        _junit(tmp_path / "without.xml", **same, breaks="passed", mended="failed", gone="passed")
    )
    patched = outcomes(
        _junit(tmp_path / "patched.xml", **same, breaks="failed", mended="passed", new="passed")
    )
    assert counts(without) == "3 / 2 / 2 / 1"
    assert differing(without, patched) == {
        "a.B::breaks": ("passed", "failed"),
        "a.B::mended": ("failed", "passed"),
        "a.B::gone": ("passed", "missing"),
        "a.B::new": ("missing", "passed"),
    }
    assert broken(differing(without, patched)) == ["a.B::breaks", "a.B::gone"]
    assert not differing(without, without)


def test_a_fresh_row_leaves_those_of_other_peers(tmp_path):
    def result(peer, version):
        tests = {"a": "passed", "b": "failed"}
        return Result(
            peer, version, tests, {**tests, "b": "passed"}, {f"{peer}.f": (7, 2)}, peer, "2.13.0", "today"
        )

    path = tmp_path / "suites.md"
    write(path, [result("verl", "0.9.1"), result("trl", "1.16.0")])
    write(path, [result("verl", "0.9.2")])
    text = path.read_text()
    assert (
        text.count("| trl | 1.16.0 | 2 | 1 / 1 / 0 / 0 | 2 / 0 / 0 / 0 | 1 | 7 | 2 | 2.13.0 | today |") == 1
    )
    assert "| verl | 0.9.2 |" in text
    assert "0.9.1" not in text
    assert text.count("differs: `b` failed, passed") == text.count("calls: `f` 7") == 2


def test_refusals_take_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_suites.main(["trll"])
    assert "NAME must be one of stable_baselines3, torchrl, trl, verl, got 'trll'" in capsys.readouterr().err
    monkeypatch.setitem(run_suites.SUITES, "trl", run_suites.Suite("pytest", ("tests/test_utils.py",)))
    here = ["--python", sys.executable, "--tests", f"trl={tmp_path}"]
    assert run_suites.main(["trl", *here]) == 2
    wanted = f"trl: no tests such as tests/test_utils.py in {tmp_path}; --tests takes a folder"
    assert capsys.readouterr().err.splitlines() == [wanted]


def test_a_run_has_outcomes_or_a_reason(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = run_suites.once("trl", [*command, "test_two.py"], tmp_path, alone, tmp_path / "run")
    assert found == {"test_two::test_a": "passed", "test_two::test_b": "failed"}
    with pytest.raises(run_suites.SuiteError, match=r"^trl: pytest ended with status 4: .*test_three"):
        run_suites.once("trl", [*command, "test_three.py"], tmp_path, alone, tmp_path / "run")


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(suite_plugin, "ENTERED", Counter())
    monkeypatch.setattr(suite_plugin, "HANDED_ON", Counter())
    return suite_plugin


def _counts(plugin) -> tuple[int, int]:
    return plugin.ENTERED["peer.f"], plugin.HANDED_ON["peer.f"]


def test_calls_are_counted_and_those_handed_on(plugin):
    def theirs(x):
        return x + 1

    def ours(original):
        return lambda x: original(x) if x < 0 else x + 1

    made = plugin.counted(Point("peer.f", "", ours, lambda device: [], "f")).replacement(theirs)
    assert [made(1), made(2), made(-1)] == [2, 3, 0]
    assert _counts(plugin) == (3, 1)
    assert made.__wrapped__ is theirs  # by which verl's replaced estimators are found


def test_calls_of_a_class_are_those_of_apply(plugin):
    class Theirs:
        @staticmethod
        def apply(x):
            return x + 1

    def ours(original):
        return type("Ours", (), {"apply": staticmethod(lambda x: original.apply(x) if x < 0 else x + 1)})

    made = plugin.counted(Point("peer.f", "", ours, lambda device: [], "f", called="apply")).replacement(
        Theirs
    )
    assert [made.apply(1), made.apply(-1)] == [2, 0]
    assert _counts(plugin) == (2, 1)


def test_calls_of_a_class_method_are_counted(plugin):
    class Theirs:
        @classmethod
        def f(cls, x):
            return cls, -x

    def ours(original):
        return classmethod(lambda cls, x: (cls, x) if x > 0 else original.__func__(cls, x))

    point = Point("peer.f", "", ours, lambda device: [], "f", called="__func__")
    Theirs.f = plugin.counted(point).replacement(vars(Theirs)["f"])
    assert [Theirs.f(x) for x in (1, -2, 3)] == [(Theirs, 1), (Theirs, 2), (Theirs, 3)]
    assert _counts(plugin) == (3, 1)


def test_rows_in_the_place_of_the_hub():
    standard, talk = (suite_hub._row(3, "preference", conversational) for conversational in (False, True))
    assert list(standard) == list(talk) == ["prompt", "chosen", "rejected"]
    assert talk["chosen"] == [{"role": "assistant", "content": standard["chosen"]}]
    assert list(suite_hub._row(3, "language_modeling", True)) == ["messages"]
