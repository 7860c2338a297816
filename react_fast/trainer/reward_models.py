"""Reward models from Hugging Face folders."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from ..envs import RewardModel
from .env_config import RewardModelConfig
from .model import load_weights, model_folder, read_tokenizer


def load_reward_model(config: RewardModelConfig, name: str, device: Any = None) -> RewardModel:
    """The sequence classifier of a local folder; nothing is downloaded.

    Args:
        config: the folder, and how the model is called.
        name: in logs.
        device: of the model; None: the CPU; "meta": shapes alone, no weights are read.
    Raises: FileNotFoundError or ValueError in one line for a folder that holds no sequence classifier with one
        label and its tokenizer, or whose tokenizer lacks the pad token that batches need.
    """
    folder, dtype = model_folder(config.model or ""), getattr(torch, config.dtype)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model folder {folder} has no config.json")
    tokenizer = read_tokenizer(folder)
    shape = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if shape.num_labels != 1:
        raise ValueError(
            f"model folder {folder} must hold a classifier with one label, got {shape.num_labels}"
        )
    shape.get_text_config().pad_token_id = tokenizer.pad_token_id
    if str(device) == "meta":
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(shape, dtype=dtype)
    else:
        model = load_weights(folder, AutoModelForSequenceClassification, config=shape).to(device, dtype)
    model.requires_grad_(False)
    size, longest = config.batch_size, config.max_length
    return RewardModel(model, tokenizer, batch_size=size, max_length=longest, name=name)
