"""Low-rank adapters (LoRA) through PEFT: few weights are trained, the model's own stay and are the reference."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CONFIG = "adapter_config.json"
BASE = "base"


def add_adapters(model: Any, config: Any, *, base: str | Path, seed: int = 0) -> Any:
    """The model with a fresh adapter at its linear layers; nothing else of it is trained from here on.

        y = W x + alpha / r B A x,    A random, B = 0

    Args:
        model: Hugging Face causal LM.
        config: `LoraConfig` of the configuration, r above 0.
        base: folder that the model's own weights can be loaded from again.
        seed: of A; the global random state is left as it was.
    Raises: ValueError in one line for a model that has adapters, or names of layers that it does not have.
    Source: Hu et al. 2021 (arXiv:2106.09685).
    """
    from peft import get_peft_model

    if has_adapters(model):
        raise ValueError(f"model.lora.r must be 0 for a model.path that holds adapters, got {config.r}")
    wanted = _peft_config(config)
    with torch.random.fork_rng(devices=[]), _quietly():
        torch.manual_seed(seed)
        try:
            found: Any = get_peft_model(model, wanted)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"model.lora.target_modules cannot be used: {reason}") from error
    _set_base(found, base)
    return found.eval()


def outline_adapters(model: Any, folder: Path | None, config: Any) -> Any:
    """A model of fake tensors with the adapters of a folder, or else of `LoraConfig`: their shapes alone."""
    from peft import PeftConfig, get_peft_model

    with _quietly():
        wanted = PeftConfig.from_pretrained(str(folder)) if folder else _peft_config(config)
        return get_peft_model(model, wanted)


def _peft_config(config: Any) -> Any:
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        task_type=TaskType.CAUSAL_LM,
    )


def has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """The adapters' weights by the names that PEFT saves them by; the model's own memory."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def base_folder(folder: Path) -> Path:
    """Where the weights below the adapters of a folder lie: where they lay when it was written, or in the run
    that the folder is part of.

    Raises: ValueError or FileNotFoundError in one line.
    """
    try:
        recorded = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {type(error).__name__}") from error
    places = [Path(recorded)] if recorded else []
    places += [parent / BASE for parent in folder.resolve().parents[:3]]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"model folder {folder} holds adapters of {recorded}, which does not exist")


def load_adapters(model: Any, folder: Path, *, base: Path) -> Any:
    """The model that was read from `base`, with the adapters of a folder.

    Raises: ValueError in one line if they do not belong to it.
    """
    from peft import PeftModel

    try:
        with _quietly():
            found: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # of peft, safetensors or torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model folder {folder}: the adapters cannot be loaded: {reason}") from error
    _set_base(found, base)
    return found


def _set_base(model: Any, base: str | Path) -> None:
    """Where whoever loads the saved adapters finds what is below them."""
    model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without peft's use of what transformers will take away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
