"""The examples run, and do what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_seed_model_learns_its_permutation(capsys):
    example = runpy.run_path(str(EXAMPLES / "react_model.py"))
    accuracy = example["train"](size=60, hidden=32, epochs=100)
    assert accuracy["random"] < 0.2
    assert accuracy["trained"] == 1.0
    assert "epoch 100/100  cross-entropy 0." in capsys.readouterr().out
