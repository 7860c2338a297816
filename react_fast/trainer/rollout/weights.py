"""Weights for a server: a Hugging Face folder that is complete as soon as it is there."""

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_KEPT = 2  # a server may still be reading the one before the newest


class WeightFolder:
    """Numbered folders of weights.

    Args:
        path: where they are made. tokenizer: written beside the weights.
    """

    def __init__(self, path: str | Path, tokenizer: Any) -> None:
        self.path, self.tokenizer = Path(path), tokenizer

    def write(self, model: Any, version: int, weights: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write a model, adapters merged, into a folder of its own. Older ones but the last are removed, and what
        a run that was killed or taken back left: half-written folders and higher versions.

        Args: weights: whole ones by name, where the model holds shards; None: the model's.
        Returns: the folder, which appears by one rename.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"version-{version:08d}"
        temporary = self.path / f".version-{version:08d}.{os.getpid()}"
        for left in self.path.glob(".version-*"):
            shutil.rmtree(left, ignore_errors=True)
        if hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(temporary, state_dict=weights)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        found = sorted(self.path.glob("version-*"))
        place = found.index(target)
        for other in found[: max(place + 1 - _KEPT, 0)] + found[place + 1 :]:
            shutil.rmtree(other, ignore_errors=True)
        return target
