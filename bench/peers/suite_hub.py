"""A pytest plugin in the place of the model hub: tiny random models and data sets under the names that tests use.

As a script it makes the folder REACT_FAST_SUITE_HUB; HF_HUB_CACHE has to be the same, since models and tokenizers
are found there as if they had been downloaded. `datasets.load_dataset` takes our rows for `.../zen`. Numbers that
the real models gave cannot come out, with or without the patch.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

HUB = Path(os.environ.get("REACT_FAST_SUITE_HUB", ""))
_SIZES = {
    "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, tuple[str, str, dict[str, int]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", "CausalLM", {}),
    "small-Qwen2ForCausalLM-2.5": ("qwen2", "CausalLM", {"hidden_size": 32}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", "SequenceClassification", {}),
    "tiny-Qwen3ForCausalLM": ("qwen3", "CausalLM", {"head_dim": 4}),
    "small-Qwen3ForCausalLM": ("qwen3", "CausalLM", {"hidden_size": 32, "head_dim": 8}),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", "SequenceClassification", {"head_dim": 4}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "CausalLM", {"head_dim": 4, **_MOE}),
    "tiny-LlamaForCausalLM-3.2": ("llama", "CausalLM", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", "SequenceClassification", {}),
}
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COLUMNS = {
    "language_modeling": ("text",),
    "prompt_only": ("prompt",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "implicit_prompt_preference": ("chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "stepwise_supervision": ("prompt", "completions", "labels"),
}
_SPLITS = {"train": range(17), "test": range(17, 19)}


def _row(number: int, kind: str, conversational: bool) -> dict[str, Any]:
    def said(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if conversational else text

    good, bad = f" It is {number + 1}, then {number + 2}.", f" It may be {number * 3} or less."
    prompt = said("user", f"What comes after {number}?")
    answers = {"completion": good, "chosen": good, "rejected": bad}
    row: dict[str, Any] = {name: said("assistant", text) for name, text in answers.items()}
    if kind == "implicit_prompt_preference":
        row = {name: prompt + answer for name, answer in row.items()}
    row |= {"prompt": prompt, "text": prompt + said("assistant", good), "label": number % 2 == 0}
    row |= {"completions": [good, bad], "labels": [True, False]}
    names = {"text": "messages"} if conversational else {}
    return {names.get(column, column): row[column] for column in _COLUMNS[kind]}


def _write_rows(folder: Path) -> None:
    for style in ("standard", "conversational"):
        for kind in _COLUMNS:
            for split, numbers in _SPLITS.items():
                path = folder / f"{style}_{kind}" / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = (_row(number, kind, style == "conversational") for number in numbers)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [str(_row(number, "prompt_completion", True)) for number in range(19)]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[0], eos_token=special[2], chat_template=_TEMPLATE
    )


def _write_models(folder: Path) -> None:
    import torch
    import transformers

    tokenizer = _tokenizer()
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    for name, (family, task, sizes) in MODELS.items():
        place = folder / f"models--trl-internal-testing--{name}"
        extra = {"num_labels": 1} if task == "SequenceClassification" else {}
        config = transformers.AutoConfig.for_model(
            family, vocab_size=len(tokenizer), **_SIZES | sizes, **ends, **extra
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
        for part in (model, tokenizer):
            part.save_pretrained(place / "snapshots" / "0")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0")


@pytest.hookimpl(tryfirst=True)  # before anything binds the loader
def pytest_configure(config: pytest.Config) -> None:
    import datasets

    load = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        rows = HUB / "zen" / f"{name}"
        if path.rpartition("/")[2] != "zen" or not rows.exists():
            return load(path, name, *args, **kwargs)
        files = {split: str(rows / f"{split}.jsonl") for split in _SPLITS}
        return load("json", *args, data_files=files, **kwargs)

    datasets.load_dataset = load_dataset


if __name__ == "__main__" and not (HUB / "zen").exists():
    _write_models(HUB)
    _write_rows(HUB / "zen")
