"""Checkpoints that survive being killed at any moment.

A checkpoint is a folder `step-00000100` in Hugging Face layout (`transformers` loads it) plus three
files: tensors.safetensors (optimiser moments, random states), state.json, and manifest.json with the
size and SHA-256 of every file. It is written into a temporary folder beside its final place, every file
is synced, the manifest comes last, and one rename makes it appear; so a folder is either complete or
seen to be incomplete.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .adapters import adapter_weights, has_adapters
from .state import shard_like

MANIFEST, TENSORS, STATE, WEIGHTS = "manifest.json", "tensors.safetensors", "state.json", "model.safetensors"
ADAPTERS, BEST = "adapter_model.safetensors", "best.json"
_FOLDER = re.compile(r"step-(\d+)(\.old)?")
_BLOCK = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, in one line that names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a verified checkpoint folder holds beside the model.

    Attributes:
        path: the folder; `transformers` loads a Hugging Face model from it, `load_weights` any module.
        step: step it was saved at.
        tensors: what save_checkpoint got as `tensors`, on the CPU.
        state: what save_checkpoint got as `state`.
    """

    path: Path
    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor] | None = None,
    tokenizer: Any = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
    keep: int | None = None,
    best: int | None = None,
) -> Path:
    """Write a checkpoint and remove the ones that are no longer kept.

    Args:
        folder: where the checkpoints of a run lie; made when missing.
        step: training step, 0 or more.
        model: a `transformers` model (saved by save_pretrained; with PEFT adapters, those alone) or any module
            (its state_dict).
        weights: the model's state_dict where it holds shards only; None: its own.
        tokenizer: saved by save_pretrained; None: none.
        tensors: any tensors by name, any dtype; scalars are kept as they are.
        state: values that JSON holds; NaN and infinity are allowed.
        keep: newest checkpoints kept, the new one included; None: all.
        best: step of a checkpoint that is kept beside them; `best.json` will name it. None: no best one.
    Returns: the checkpoint's folder.
    Raises: CheckpointError when the disk is full or a file cannot be written; earlier checkpoints stay as
        they were, and nothing of the failed one is left.
    """
    folder = Path(folder)
    target = _folder(folder, step)
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        _write_model(temporary, model, weights, tokenizer)
        _write_tensors(temporary / TENSORS, tensors or {})
        _write_text(temporary / STATE, json.dumps(dict(state or {}), indent=1))
        _write_manifest(temporary, step)
        _publish(temporary, target)
        if best is not None:
            _name_best(folder, best)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {target} was not written: {_reason(error)}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if keep is not None:
        _keep_newest(folder, keep, target, best)
    return target


def newest_complete(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder` whose every file matches its manifest, or None.

    A damaged checkpoint is passed over with a one-line warning that names what is wrong.
    """
    for path in _checkpoints(Path(folder)):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint passed over: {problem}", stacklevel=2)
    return None


def best_complete(folder: str | Path) -> Path | None:
    """The checkpoint that `best.json` names, or None if there is none.

    Raises: CheckpointError in one line when it is damaged.
    """
    named = Path(folder) / BEST
    if not named.is_file():
        return None
    try:
        path = _folder(Path(folder), int(json.loads(named.read_text())["step"]))
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{named} is damaged: it must name a step") from None
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(problem)
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint folder after verifying every file.

    Raises: CheckpointError in one line when it is missing or damaged.
    """
    path = Path(path)
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(problem)
    manifest = json.loads((path / MANIFEST).read_text())
    state = json.loads((path / STATE).read_text())
    return Checkpoint(path, manifest["step"], load_file(path / TENSORS), state)


def load_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Put a checkpoint's weights, or adapters, into a module of the same architecture, in place.

    Raises: CheckpointError when a weight is missing, unknown or of another shape.
    """
    adapted = has_adapters(model)
    stored = _read_weights(Path(path), ADAPTERS if adapted else "model*.safetensors")
    own = adapter_weights(model) if adapted else model.state_dict()
    groups = tied(own)
    missing = [key for key in own if not groups[key] & stored.keys()]
    unknown = [key for key in stored if key not in own]
    if missing or unknown:
        name = (missing or unknown)[0]
        problem = "lacks" if missing else "has an unknown"
        raise CheckpointError(f"checkpoint {path} {problem} weight {name} of {type(model).__name__}")
    with torch.no_grad():
        for key in filter(stored.__contains__, own):
            value = stored[key]
            if (own[key].shape, own[key].dtype) != (value.shape, value.dtype):
                wanted, came = (f"{list(x.shape)} {x.dtype}" for x in (own[key], value))
                raise CheckpointError(f"checkpoint {path} weight {key} must be {wanted}, got {came}")
            own[key].copy_(shard_like(own[key], value))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in one line that names the file; None when it is complete."""
    if not path.is_dir():
        return f"checkpoint {path} does not exist"
    manifest = path / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is damaged"
    for name, (size, digest) in entries.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} is damaged: {file.stat().st_size} bytes, {size} written"
        if _sha256(file) != digest:
            return f"{file} is damaged: its SHA-256 is not the one written"
    return None


def _folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; one that was being replaced (.old) comes after its successor."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((-int(match[1]), match[2] is not None, path))
    return [path for _, _, path in sorted(found)]


def _write_model(
    folder: Path, model: torch.nn.Module, weights: Mapping[str, torch.Tensor] | None, tokenizer: Any
) -> None:
    save_pretrained = getattr(model, "save_pretrained", None)
    if has_adapters(model):
        model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    elif callable(save_pretrained):
        save_pretrained(folder, state_dict=weights)
    else:
        weights = model.state_dict()
        groups = tied(weights)
        _write_tensors(folder / WEIGHTS, {key: weights[key] for key in weights if key == min(groups[key])})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def tied(weights: Mapping[str, torch.Tensor]) -> dict[str, set[str]]:
    """For every weight the names of all that are the same memory, itself included (tied weights)."""
    by_memory: dict[tuple, set[str]] = {}
    for key, value in weights.items():
        place = (value.device, value.data_ptr(), value.shape, value.stride()) if value.numel() else (key,)
        by_memory.setdefault(place, set()).add(key)
    return {key: group for group in by_memory.values() for key in group}


def _read_weights(path: Path, names: str) -> dict[str, torch.Tensor]:
    files = sorted(path.glob(names))
    if not files:
        raise CheckpointError(f"checkpoint {path} has no {names}")
    return {key: value for file in files for key, value in load_file(file).items()}


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # Two names for one memory are written twice: safetensors refuses shared memory.
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_manifest(folder: Path, step: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    _write_text(folder / MANIFEST, json.dumps({"step": step, "files": entries}, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _publish(temporary: Path, target: Path) -> None:
    """One rename makes the checkpoint appear; an older one of the same step steps aside until then."""
    aside = target.with_name(f"{target.name}.old")
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What a killed process left: temporary folders, and replaced checkpoints whose successor is complete."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)
    for aside in folder.glob("step-*.old"):
        successor = aside.with_suffix("")
        if successor.exists() and damage(successor) is None:
            shutil.rmtree(aside)
        elif not successor.exists():
            aside.rename(successor)


def _name_best(folder: Path, step: int) -> None:
    temporary = folder / f".{BEST}.tmp"
    _write_text(temporary, json.dumps({"step": step}))
    temporary.replace(folder / BEST)


def _keep_newest(folder: Path, keep: int, written: Path, best: int | None) -> None:
    """`written` stays whatever its step: after a fall-back a damaged one may carry a higher number."""
    kept = (written, *([] if best is None else [_folder(folder, best)]))
    others = [path for path in _checkpoints(folder) if path not in kept]
    for path in others[max(keep - 1, 0) :]:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    # safetensors reports the system's error as text.
    full = any(f"os error {number})" in str(error) for number in DISK_FULL)
    if full or (isinstance(error, OSError) and error.errno in DISK_FULL):
        return "no space left on the disk"
    return " ".join(str(error).split())
