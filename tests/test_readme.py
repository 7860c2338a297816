"""The README's examples run as they are written, with a small model in the places they name."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import react_fast as rf
from react_fast.cli import main

from . import tiny

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _example(heading: str) -> str:
    """The Python block under a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert 8 <= len(code.splitlines()) <= 30
    return code


@pytest.mark.parametrize(
    "page", sorted((Path(__file__).parent.parent / "docs").glob("*.md")), ids=lambda p: p.stem
)
def test_pages_name_what_there_is(page):
    """Python blocks parse, what they import of ours exists, and so do `rf.` names and linked files."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"\brf\.([a-zA-Z_]+)", text):
        assert hasattr(rf, name), name
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for found in ast.walk(ast.parse(code)):
            if isinstance(found, ast.ImportFrom) and str(found.module).startswith("react_fast"):
                module = importlib.import_module(str(found.module))
                assert all(hasattr(module, one.name) for one in found.names), code


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_you_train(here):
    tiny.records(here / "train.jsonl")
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64}
    model, tokenizer = rf.fresh_model(["say 1: word1"], vocab_size=260, **sizes)
    for part in (model, tokenizer):
        part.save_pretrained("path/to/model")
    code = _example("You train")
    assert "steps=200, prompts_per_step=16, group_size=8," in code
    names: dict[str, Any] = {}
    exec(code.replace("steps=200, prompts_per_step=16, group_size=8,", "steps=2, group_size=2,"), names)
    assert names["trainer"].step == 2
    assert "<html" in (here / "report.html").read_text(encoding="utf-8")


def test_you_have_a_trainer():
    shape, vocab = (3, 7), 11
    logits = torch.randn(*shape, vocab, requires_grad=True)
    names: dict[str, Any] = {
        "logits": logits,
        "hidden": torch.randn(*shape, 5),
        "lm_head": torch.randn(vocab, 5),
        "token_ids": torch.randint(0, vocab, shape),
        "mask": torch.rand(shape) > 0.2,
        "cut": torch.zeros(shape, dtype=torch.bool),
        **{name: torch.randn(shape) for name in ("rewards", "values", "next_values")},
        **{name: -torch.rand(shape) for name in ("old_logp", "ref_logp")},
    }
    exec(_example("You have a trainer"), names)
    assert bool(torch.isfinite(names["loss"]))
    assert float(logits.grad.abs().sum()) > 0


def test_you_ask_why(here, capsys):
    words = tiny.train_words(here)
    assert main([*words, "--run_dir", "runs/translation"]) == 0
    capsys.readouterr()
    exec(_example("You ask why"), {})
    assert "<html" in (here / "why.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out
    for command in re.findall(r"`react-fast ((?:explain|report) runs/translation[^`]*)`", TEXT):
        text = re.findall(r'"(.*?)"', command)
        assert main([*command.split(" --text ")[0].split(), *(["--text", *text] if text else [])]) == 0


def test_commands_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+) ", TEXT, re.MULTILINE):
        assert f"\n{target}:" in makefile
