"""The command line: what the user can mend is told in one line with exit code 2, and a run can be stopped."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from react_fast import cli
from react_fast.trainer.folder import RunFolder

from .tiny import train_words


@pytest.fixture
def tiny(tmp_path):
    return functools.partial(train_words, tmp_path)


def _refused(capsys, words):
    """The one line that a refused command prints."""
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("react-fast: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err.removeprefix("react-fast: ").rstrip("\n")


def test_info_names_versions_backends_and_instruction_set(capsys):
    from react_fast import _core

    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in (
        f"torch {torch.__version__}",
        "numpy",
        "python",
        f"isa           {_core.isa()}",
        "threads",
        "gpu",
    ):
        assert part in shown


_WITHOUT_EXTRA = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"typer", "rich", "pydantic", "transformers", "yaml", "click"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
from react_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _without_extra(*words):
    return subprocess.run([sys.executable, "-c", _WITHOUT_EXTRA, *words], capture_output=True, text=True)


def test_without_the_train_extra_info_works_and_the_rest_tells_what_to_install():
    info = _without_extra("info")
    assert (info.returncode, info.stderr) == (0, "")
    assert "isa" in info.stdout
    train = _without_extra("train")
    assert train.returncode == 2
    assert train.stderr.count("\n") == 1
    assert "pip install 'react-fast[train,tasks]'" in train.stderr


def test_dry_run_prints_the_resolved_config_and_the_batch_numbers(capsys, tiny, tmp_path):
    assert cli.main([*tiny(), "--trainer.learning_rate", "3e-4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 0.0003" in shown
    assert "2 prompts x 2 responses = 4 sequences a step" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--trainer.learning_rat", "1"],
            "trainer.learning_rat is not a key; did you mean trainer.learning_rate?",
        ),
        (["--trainer.seed", "9" * 20], "trainer.seed must be less than 9223372036854775808, got 9"),
        (
            ["--trainer.temperature", "1e300"],
            "trainer.temperature must be in [1e-30, 1e+30], got 1e+300",
        ),
        (["--trainer.temperature", "0"], "trainer.temperature must be greater than 0, got 0"),
        (["--steps", "many"], "trainer.steps must be a valid integer, got 'many'"),
        (
            ["--env.reward", "nicest"],
            "span_f1 or module:function, got 'nicest'",
        ),
        (["--env.reward", "no_such_module:f"], "No module named 'no_such_module'"),
        (["--env.test", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--env.reward", "rouge_L"], "got 'rouge_L'; did you mean rouge_l?"),
        (["--env.metrics", "[chrff]"], "got 'chrff'; did you mean chrf?"),
        (["--env.format", "squat"], "got 'squat'; did you mean squad?"),
        (["--env.task", "summarization"], "got 'summarization'; did you mean summarisation?"),
        (["--env.test", "none"], "env.test must name a file when env.train does"),
        (["--model.path", "gone"], "model path must be a local folder, got gone"),
        (["--model.vocab_size", "7"], "vocab_size must be at least 259"),
        (["--algorithm.options", "{clip: 3}"], "algorithm.options.clip is not a key"),
        (
            ["--algorithm.options", "{ratio_max: wide}"],
            "algorithm.options.ratio_max must be a number, got str",
        ),
        (
            ["--algorithm.name", "reinforce", "--algorithm.options", "{gamma: 1.5}"],
            "algorithm.options.gamma must be in [0, 1], got 1.5",
        ),
        (["--learning_rate", "fast"], "trainer.learning_rate must be a valid number, got 'fast'"),
        (["--trainer.steps"], "trainer.steps needs a value; write --key value"),
        (["--run_dir", "/dev/null/run"], "run folder /dev/null/run cannot be used: Not a directory"),
        (["--resume", "gone"], "checkpoint gone does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_the_user_can_mend_is_one_line(capsys, tiny, words, message):
    assert message in _refused(capsys, [*tiny(), *words])


def test_a_config_file_that_cannot_be_read_is_named(capsys, tmp_path):
    for path, problem in (
        ("gone.yaml", "config gone.yaml cannot be read: No such file or directory"),
        (str(tmp_path), f"config {tmp_path} cannot be read: Is a directory"),
    ):
        assert _refused(capsys, ["train", "--config", path]) == problem
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("run_dir: café".encode("latin-1"))
    assert _refused(capsys, ["train", "--config", str(latin)]) == f"config {latin} is not UTF-8 at byte 13"


def test_an_unknown_command_is_one_line(capsys):
    assert "No such command 'trian'" in _refused(capsys, ["trian"])


def test_a_bad_line_of_a_jsonl_file_is_named(capsys, tiny, tmp_path):
    words = tiny()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": 3}\n')
    assert "train.jsonl:7: field 'prompt' must be a string or a list of messages, got int" in _refused(
        capsys, words
    )


def test_a_model_folder_without_tokenizer_is_refused(capsys, tiny, tmp_path):
    from react_fast.trainer.model import fresh_model

    model, _ = fresh_model(["some text"], vocab_size=260, hidden_size=16, layers=1, heads=2)
    model.save_pretrained(tmp_path / "bare")
    message = _refused(capsys, [*tiny(), "--model.path", str(tmp_path / "bare")])
    assert "bare has no tokenizer" in message


def test_a_run_folder_in_use_is_refused(capsys, tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    message = _refused(capsys, tiny())
    assert "run is already in use (it holds metrics.jsonl); go on with --resume auto" in message


def test_a_run_folder_of_a_running_process_is_refused(capsys, tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False)
    assert "is in use by another process" in _refused(capsys, [*tiny(), "--resume", "auto"])
    folder.close()


@pytest.mark.parametrize("command", ["evaluate RUN", "report RUN", "explain RUN --text hello"])
def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path, command):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        message = _refused(capsys, command.replace("RUN", str(path)).split())
        assert message == f"run {path} has no config.yaml: it is not a run folder"
    (tmp_path / "config.yaml").write_text("trainer: {steps: 1}")
    message = _refused(capsys, command.replace("RUN", str(tmp_path)).split())
    assert message == f"run {tmp_path} has no complete checkpoint"
    (tmp_path / "config.yaml").write_text("trainer: {stepz: 1}")
    assert "did you mean trainer.steps?" in _refused(capsys, command.replace("RUN", str(tmp_path)).split())


def test_examples_are_valid_and_short():
    from react_fast.trainer.config import RunConfig

    for path in sorted((Path(__file__).parent.parent / "examples").glob("*.yaml")):
        RunConfig.from_yaml(path)
