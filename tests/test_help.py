"""`react-fast train --help` explains every key of the tree: walked here field by field, without its schema."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from react_fast.cli import main
from react_fast.trainer import help as explained
from react_fast.trainer.algorithms import ALGORITHMS
from react_fast.trainer.config import RunConfig
from react_fast.trainer.section import Section


def _fields(section: Section, path: str = ""):
    """(section, key, default, description) of every leaf, from the default tree."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _fields(value, f"{path}.{name}".lstrip("."))
        else:
            yield path, name, value, field.description


def _printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    explained.show(console)
    return console.file.getvalue()


def test_every_field_stands_in_its_section_with_default_and_meaning():
    blocks = dict(re.findall(r"^--([\w.]+)\.KEY: (.*?)(?=^--|\Z)", _printed(400), re.MULTILINE | re.DOTALL))
    assert explained.shown(RunConfig().run_dir) in _printed(400)
    for path, name, default, description in _fields(RunConfig()):
        if not path:
            continue
        (row,) = [line.split() for line in blocks[path].splitlines() if line.split()[:1] == [name]]
        line = " ".join(row)
        assert " ".join(description.split()) in line, f"{path}.{name}"
        said = line.removesuffix(" ".join(description.split())).rstrip()
        text = explained.shown(default)
        assert said.endswith(f" {text}"), f"{path}.{name}: {said}"
        assert len(said) > len(f"{name} {text}"), f"{path}.{name} says what it takes"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("learning_rate", "number > 0"),
        ("top_p", "number in (0, 1]"),
        ("steps", "integer >= 1"),
        ("max_grad_norm", "number > 0 | none"),
        ("optimizer", "adamw | adam | sgd"),
        ("sharded", "true | false"),
        ("checkpoint_dir", "text | none"),
    ],
)
def test_what_a_key_takes(key, values):
    ((_, _, keys),) = [section for section in explained.sections() if section[0] == "trainer"]
    assert {one.name: one.values for one in keys}[key] == values


def test_every_option_of_every_algorithm_has_its_default():
    said = {name: options for name, _, options in explained.algorithms()}
    assert list(said) == list(ALGORITHMS)
    for name, kind in ALGORITHMS.items():
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            assert f"{field.name}: {explained.shown(field.default)}" in said[name]


def test_the_command_prints_it_at_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    for _, name, _, _ in _fields(RunConfig()):
        assert re.search(rf"(^|[ -]){name} ", shown, re.MULTILINE), name
    assert "--dry-run" in shown
