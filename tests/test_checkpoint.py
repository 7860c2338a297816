"""Checkpoints: what is loaded is what was saved, and no moment to be killed leaves nothing to load."""

import errno
import json
import random
import subprocess
import sys
import time
import warnings
from contextlib import suppress

import pytest
import torch
from torch import nn

from react_fast.trainer import checkpoint
from react_fast.trainer.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    newest_complete,
    save_checkpoint,
)

from . import contract
from .ranks import processes


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def _save(folder, step, **options):
    torch.manual_seed(step)
    tensors = {"moment": torch.full((3,), float(step)), "rng": torch.get_rng_state()}
    model = nn.Linear(3, 2)
    return save_checkpoint(folder, step, model=model, tensors=tensors, state={"step": step}, **options)


def _language_model():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(12)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1")


def test_round_trip_keeps_every_bit(tmp_path):
    tensors = {
        "half": torch.randn(5).bfloat16(),
        "double": torch.randn(2, 3, dtype=torch.float64).mT,
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    state = {"phase": "rl", "history": [1.5, float("inf")], "best": None, "text": "Åland"}
    path = save_checkpoint(tmp_path, 12, model=nn.Linear(2, 2), tensors=tensors, state=state)
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step, loaded.state) == (path, 12, state)
    assert loaded.tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded.tensors[key].dtype == value.dtype
        assert loaded.tensors[key].shape == value.shape
        assert torch.equal(loaded.tensors[key], value)


def test_transformers_loads_the_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = _language_model()
    path = save_checkpoint(tmp_path, 1, model=model, tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(path)("w3 w4")["input_ids"] == [3, 4]
    fresh, _ = _language_model()
    load_weights(fresh, path)
    contract.assert_bitwise(fresh.lm_head.weight.detach(), model.lm_head.weight.detach())


def test_plain_modules_and_tied_weights(tmp_path):
    model, other = _Tied(), _Tied()
    path = save_checkpoint(tmp_path, 1, model=model)
    load_weights(other, path)
    assert torch.equal(other.head.weight, model.embed.weight)
    assert other.head.weight is other.embed.weight


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 5), r"weight weight must be \[5, 3\] torch.float32, got \[2, 3\] torch.float32"),
        (nn.Linear(3, 2).double(), r"weight weight must be \[2, 3\] torch.float64, got \[2, 3\]"),
        (nn.Linear(3, 2, bias=False), "has an unknown weight bias of Linear"),
        (nn.Sequential(nn.Linear(3, 2)), "lacks weight 0.weight of Sequential"),
    ],
    ids=["shape", "dtype", "unknown", "missing"],
)
def test_weights_of_another_model_are_refused(tmp_path, other, message):
    with pytest.raises(CheckpointError, match=message):
        load_weights(other, _save(tmp_path, 1))


def test_newest_complete_is_the_highest_step(tmp_path):
    assert newest_complete(tmp_path / "nothing") is None
    assert newest_complete(tmp_path) is None
    for step in (9, 100, 20):
        _save(tmp_path, step)
    assert newest_complete(tmp_path).name == "step-00000100"


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_step_below_a_damaged_one_is_kept(tmp_path):
    (_save(tmp_path, 9) / "state.json").unlink()
    _save(tmp_path, 5, keep=1)
    assert newest_complete(tmp_path).name == "step-00000005"


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 3, model=nn.Linear(2, 2), state={"try": 1})
    path = save_checkpoint(tmp_path, 3, model=nn.Linear(2, 2), state={"try": 2})
    assert load_checkpoint(path).state == {"try": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["model.safetensors", "tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["unlink", "truncate", "flip"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, file, harm):
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    {"unlink": lambda path: path.unlink(), "truncate": _truncate, "flip": _flip}[harm](bad / file)
    with pytest.warns(UserWarning, match="checkpoint passed over") as caught:
        assert newest_complete(tmp_path) == good
    text = str(caught[0].message)
    assert str(bad / file) in text
    assert "\n" not in text
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(bad)
    assert str(bad / file) in str(error.value)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path / 'gone'} does not exist"):
        load_checkpoint(tmp_path / "gone")


@pytest.mark.parametrize("writer", ["save_file", "_write_text", "_sync"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, writer):
    good = _save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, writer, full)
    with pytest.raises(CheckpointError, match="step-00000002 was not written: no space left on the disk"):
        _save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert newest_complete(tmp_path) == good


def test_a_real_write_failure_leaves_the_previous_checkpoint(tmp_path):
    good = _save(tmp_path, 1)
    # The kernel refuses every byte past 4 KiB of a file, for this process only.
    code = (
        "import resource, sys, torch\n"
        "from react_fast.trainer.checkpoint import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "try:\n    save_checkpoint(sys.argv[1], 2, model=torch.nn.Linear(100, 100))\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "step-00000002 was not written: " in done.stdout
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_state_that_json_cannot_hold_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, model=nn.Linear(2, 2), state={"x": object()})
    assert list(tmp_path.iterdir()) == []


def _save_for_ever(folder, out):
    model, step = nn.Linear(128, 128), 1
    while True:
        for _ in range(2):  # the second write of a step takes the replacing path
            tensors = {"step": torch.full((1000,), step)}
            save_checkpoint(folder, step, model=model, tensors=tensors, state={"step": step}, keep=2)
            out.send(step)
        step += 1


def test_killed_at_any_moment_the_newest_loads(tmp_path):
    draw, context = random.Random(0), processes()
    for _ in range(8):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_save_for_ever, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        finished = ours.recv()
        time.sleep(draw.uniform(0, 0.15))
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                finished = ours.recv()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill never leaves a damaged folder under a final name
            loaded = load_checkpoint(newest_complete(tmp_path))
        assert loaded.step >= finished
        assert loaded.state == {"step": loaded.step}
        assert torch.equal(loaded.tensors["step"], torch.full((1000,), loaded.step))


def test_killed_between_the_two_renames(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 3, model=nn.Linear(2, 2), state={"try": 1})
    rename = type(tmp_path).rename

    def killed(self, target):
        if self.name.startswith("."):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, model=nn.Linear(2, 2), state={"try": 2})
    monkeypatch.undo()
    assert load_checkpoint(newest_complete(tmp_path)).state == {"try": 1}
    _save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_manifest_lists_every_file(tmp_path):
    path = _save(tmp_path, 1)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == {p.name for p in path.iterdir()} - {"manifest.json"}
