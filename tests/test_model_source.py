"""Where the policy comes from: fresh models are reproducible and reload; a broken folder is one line."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from react_fast.trainer.model import MIN_VOCAB, fresh_model, load_model

TEXTS = ["es>pt:Alemania=", "Alemanha", "es>it:metros cúbicos=", "metri cubi", "el niño está"] * 3
SMALL = {"vocab_size": 300, "hidden_size": 32, "layers": 2, "heads": 2, "max_length": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = fresh_model(TEXTS, **SMALL, seed=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_fresh_model_has_the_sizes_and_marks_asked_for():
    model, tokenizer = fresh_model(TEXTS, **SMALL, dropout=0.1)
    assert model.config.vocab_size == len(tokenizer) <= 300
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for mark in ("pad_token_id", "bos_token_id", "eos_token_id"):
        values = {getattr(thing, mark) for thing in (tokenizer, model.config, model.generation_config)}
        assert len(values) == 1
        assert None not in values
    assert tokenizer.padding_side == "left"
    assert not model.training
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    "text", ["el niño está", "Ünïcödé 中文 🙂\n\t x  y ", "<eos>"], ids=["seen", "unseen", "mark"]
)
def test_tokenizer_round_trips_any_text(text):
    tokenizer = fresh_model(TEXTS, **SMALL)[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_same_seed_same_model_and_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    (first, first_tokenizer), (second, second_tokenizer) = (
        fresh_model(TEXTS, **SMALL, seed=3) for _ in range(2)
    )
    assert torch.rand(1) == expected
    assert first_tokenizer.get_vocab() == second_tokenizer.get_vocab()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    other = fresh_model(TEXTS, **SMALL, seed=4)[0]
    assert not torch.equal(other.get_input_embeddings().weight, first.get_input_embeddings().weight)


def test_dropout_acts_in_training_mode_only():
    model, tokenizer = fresh_model(TEXTS, **SMALL, dropout=0.5)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_transformers_loads_the_saved_folder_unchanged(saved):
    model, tokenizer = fresh_model(TEXTS, **SMALL, seed=1)
    for loaded_model, loaded_tokenizer in (
        load_model(saved),
        (AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)),
    ):
        assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
        for text in (*TEXTS, "a<eos> e\u0301  x"):
            assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded_model.state_dict()[name], weight)
        assert loaded_model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_loaded_model_is_ready_to_generate(saved):
    model, tokenizer = load_model(saved, torch.float64)
    assert model.dtype == torch.float64
    assert not model.training
    batch = tokenizer(["es>pt:Alemania=", "x"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][1, 0] == 0
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] <= batch["input_ids"].shape[1] + 3


def test_padding_token_falls_back_to_the_end_token(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    tokenizer = load_model(folder)[1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("vocab_size must be at least 259", {"vocab_size": MIN_VOCAB - 1}),
        ("hidden_size must be an even multiple of heads \\(2\\), got 30", {"hidden_size": 30}),
        ("layers must be at least 1, got 0", {"layers": 0}),
        ("heads must be at least 1, got 0", {"heads": 0}),
        ("max_length must be at least 1, got -1", {"max_length": -1}),
        ("dropout must be in \\[0, 1\\), got 1.0", {"dropout": 1.0}),
    ],
)
def test_fresh_model_refuses(match, change):
    with pytest.raises(ValueError, match=match):
        fresh_model(TEXTS, **{**SMALL, **change})


def test_fresh_model_needs_texts():
    for texts in ([], ["", ""]):
        with pytest.raises(ValueError, match="texts must hold at least one text"):
            fresh_model(texts, **SMALL)


def _fails(folder, error, match):
    with pytest.raises(error, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert "copy" in str(caught.value) or "nowhere" in str(caught.value)


def test_missing_parts_are_named(saved, tmp_path):
    _fails(tmp_path / "nowhere", FileNotFoundError, "does not exist")
    for name, match in (
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "has no weights"),
    ):
        folder = _copy(saved, tmp_path)
        (folder / name).unlink()
        _fails(folder, FileNotFoundError, match)
        shutil.rmtree(folder)


def test_damaged_parts_are_named(saved, tmp_path):
    for name, match in (
        ("config.json", "cannot be"),
        ("tokenizer.json", "the tokenizer cannot be read"),
        ("model.safetensors", "cannot be loaded"),
    ):
        folder = _copy(saved, tmp_path)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        _fails(folder, ValueError, match)
        shutil.rmtree(folder)


def test_incomplete_weights_are_refused_not_filled_with_random_numbers(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = _copy(saved, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.c_fc.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    _fails(folder, ValueError, f"1 missing keys, first {name}")
    save_file({**weights, name: weights[name][:5].clone()}, folder / "model.safetensors", {"format": "pt"})
    _fails(folder, ValueError, "mismatched|size")


def test_more_tokens_than_embeddings_are_refused(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    _fails(folder, ValueError, "the tokenizer has .* tokens, the model only")


def test_another_kind_of_model_is_refused(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    _fails(folder, ValueError, "no_such_model")
