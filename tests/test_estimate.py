"""The memory estimate is near what torch's allocator hands out in real steps; a dry run prints it."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from react_fast.cli import main
from react_fast.envs import Record, TextEnv
from react_fast.trainer.adapters import add_adapters
from react_fast.trainer.algorithms import GRPO, SFT
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.estimate import in_units, memory
from react_fast.trainer.model import fresh_model, outline
from react_fast.trainer.model_config import LoraConfig, ModelConfig
from react_fast.trainer.trainer import Trainer

from .tiny import train_words

SIZES = {"vocab_size": 512, "hidden_size": 64, "layers": 3, "heads": 4, "max_length": 128}
ENV = TextEnv([Record("ab", "".join(chr(97 + i % 26) for i in range(60)))], reward=lambda s, a, r: len(a) % 3)


def _allocated(run: Any) -> int:
    """Most bytes that torch held at a time, of those it allocated meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    return int(torch.tensor([change for _, _, change in changes]).cumsum(0).max())


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (SFT(), {}),
    "sft checkpointed": (SFT(), {"gradient_checkpointing": True}),
    "sgd": (SFT(), {"optimizer": "sgd", "micro_batch": 4}),
    "reference": (GRPO(), {"kl_coef": 0.1}),
    "adapters": (SFT(), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_estimate_is_near_what_two_steps_allocate(case, tmp_path):
    algorithm, options = CASES[case]
    config = TrainerConfig(
        **{"steps": 2, "prompts_per_step": 16, "group_size": 1, "max_new_tokens": 60, **options}
    )
    model: Any = None

    def train() -> None:
        nonlocal model
        model, tokenizer = fresh_model(["ab"], **SIZES)
        if case == "adapters":
            model = add_adapters(model, LoraConfig(r=4), base=tmp_path)
        trainer = Trainer(model, tokenizer, ENV, algorithm=algorithm, config=config)
        for _ in range(2):
            trainer.train_step()

    measured = _allocated(train)
    lora = LoraConfig(r=4) if case == "adapters" else LoraConfig()
    shapes, tokenizer = outline(ModelConfig(**SIZES, lora=lora), ["ab"])
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in model.parameters()]
    length = max(len(tokenizer(ENV.records[0].reference)["input_ids"]) + 1, 60) + 2
    copies = int(algorithm.compares(config))
    found = memory(shapes, config, length=length, copies=copies, supervised=algorithm.supervised)
    assert 0.9 < found.peak / measured < 1.25  # 0.96 to 1.17 was seen


def test_a_forward_on_shapes_keeps_what_a_real_one_keeps():
    """So the estimate of any other model stands on its own layers."""
    model, _ = fresh_model(["ab"], **SIZES)
    shapes, _ = outline(ModelConfig(**SIZES), ["ab"])
    config = TrainerConfig(prompts_per_step=4, group_size=1)
    real, told = (memory(one, config, length=20) for one in (model, shapes))
    # The real forward sees that nothing is padded and drops the mask, [4, 1, 20, 20] float32 a layer.
    assert 0 <= told.activations - real.activations <= 3 * 4 * 20 * 20 * 4
    assert vars(told) | {"activations": 0} == vars(real) | {"activations": 0}


def test_units():
    assert [in_units(size) for size in (999, 1_500, 12_340_000, 4_560_000_000)] == [
        "999 bytes", "1.5 kB", "12.3 MB", "4.6 GB",
    ]  # fmt: skip


def test_a_dry_run_tells_steps_tokens_and_memory_and_reads_no_weights(tmp_path, capsys):
    words = train_words(tmp_path, trainer={"minibatches": 2, "epochs": 3})
    model, tokenizer = fresh_model(["say 1: word1"], vocab_size=260, hidden_size=16, layers=1, heads=2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main([*words, "--dry-run", "--model.path", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    # "say 0:" has 6 bytes, one fewer for the merged pair; "word0" 5 and the end token.
    assert "# warm_start: 3 steps, 3 updates; 4 sequences a step of at most" in shown
    assert "# rl: 3 steps, 18 updates; 4 sequences a step of at most" in shown
    assert "+ 4 tokens" in shown
    assert "48 response tokens in all" in shown
    size = sum(p.numel() for p in model.parameters()) * 4
    assert (
        f"parameters {in_units(size)} + gradients {in_units(size)} + optimizer {in_units(2 * size)}" in shown
    )
    assert not (tmp_path / "run").exists()


def test_a_forward_that_fits_no_memory_is_told_in_one_line(tmp_path, capsys):
    assert main([*train_words(tmp_path), "--dry-run", "--max_new_tokens", "100000000000"]) == 2
    assert "react-fast: a forward of 4 sequences of 100,000,000,00" in capsys.readouterr().err
