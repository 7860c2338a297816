"""A whole run in seconds: a policy of a few thousand parameters on a handful of words."""

import json
from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "model": {"vocab_size": 260, "hidden_size": 16, "layers": 1, "heads": 2, "max_length": 48},
    "warm_start": {"steps": 3, "batch_size": 4, "lr_warmup_steps": 0},
    "trainer": {
        "steps": 3,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_new_tokens": 4,
        "save_every": 1,
        "threads": 1,
    },
    "tracker": {"intervention_prompts": 1},
}


def odd(state: str, action: str, record: Any) -> float:
    """The share of letters with odd numbers: a reward that random letters have, too."""
    return sum(ord(letter) % 2 for letter in action) / max(len(action), 1)


def records(path: Path, count: int = 6) -> str:
    """Write a JSONL file; returns its path."""
    lines = [json.dumps({"prompt": f"say {i}:", "reference": f"word{i}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def train_words(folder: Path, **changes: Any) -> list[str]:
    """Write the tiny configuration, with changes, and return the words of its `train` command."""
    files: dict[str, Any] = {
        split: records(folder / f"{split}.jsonl") for split in ("train", "validation", "test")
    }
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "env": {**files, "reward": "tests.tiny:odd"},
        **TINY,
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["train", "--config", str(path)]
