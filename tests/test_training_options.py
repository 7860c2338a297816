"""Options of the update act as they say: precision, gradient checkpointing, adapters; all resume to the bit."""

import json
import math
from typing import Any

import pytest
import torch

from react_fast.cli import main
from react_fast.trainer.adapters import BASE, add_adapters, has_adapters
from react_fast.trainer.algorithms import DPO, GRPO, PPO, SFT, OnlineDPO
from react_fast.trainer.checkpoint import CheckpointError, load_weights
from react_fast.trainer.model import load_model
from react_fast.trainer.model_config import LoraConfig
from react_fast.trainer.recompute import recomputed
from react_fast.trainer.trainer import Trainer

from .tiny import train_words
from .training import Log, make_env, make_policy, weights
from .training import make_config as config


def _trainer(algorithm, model=None, tokenizer=None, **changes) -> Trainer:
    if model is None:
        model, tokenizer = make_policy(torch.float32)
    log = Log()
    return Trainer(model, tokenizer, make_env(), algorithm=algorithm, config=config(**changes), reporter=log)


def test_bfloat16_is_of_the_products_and_not_of_the_parameters():
    trainer = _trainer(GRPO(), steps=2, precision="bfloat16", kl_coef=0.1)
    seen = []
    layer = trainer.model.model.layers[0].mlp.c_fc
    layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    batch = trainer.credit(trainer.score(trainer.collect()))
    seen.clear()
    metrics = trainer.update(batch)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert metrics["kl"] == 0, "the reference is scored in the policy's precision"


def test_bfloat16_learns_what_float32_does():
    results = []
    for precision in ("float32", "bfloat16"):
        trainer = _trainer(SFT(), steps=4, group_size=1, precision=precision, optimizer="sgd")
        results.append(trainer.train()["loss"])
    assert results[1] != results[0]
    assert results[1] == pytest.approx(results[0], rel=0.02)  # bfloat16 has 8 bits: 0.4% a product


@pytest.mark.parametrize(
    ("algorithm", "adapted"),
    [(SFT(), False), (PPO(), False), (SFT(), True)],
    ids=["sft with dropout", "ppo", "adapters"],
)
def test_gradient_checkpointing_runs_the_layers_twice_and_changes_nothing(algorithm, adapted, tmp_path):
    results, calls = [], []
    for on in (False, True):
        model, tokenizer = make_policy(torch.float32, dropout=0.2)
        layer = model.model.layers[1]
        if adapted:
            model = add_adapters(model, LoraConfig(r=2, dropout=0.1), base=tmp_path)
        trainer = _trainer(algorithm, model, tokenizer, steps=2, gradient_checkpointing=on, minibatches=2)
        batch = trainer.credit(trainer.score(trainer.collect()))
        count: list[int] = []
        layer.self_attn.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer.update(batch)
        results.append(weights(model))
        calls.append(len(count))
        assert "forward" not in vars(layer)
    assert calls[1] == 2 * calls[0] > 0
    assert torch.equal(*results)


def test_gradient_checkpointing_keeps_less():
    """Bytes that the backward keeps of a forward, parameters aside."""
    kept = []
    for on in (False, True):
        model, _ = make_policy(torch.float32)
        own, total = {p.data_ptr() for p in model.parameters()}, [0]

        def note(x: torch.Tensor, total: list[int] = total, own: set[int] = own) -> torch.Tensor:
            total[0] += 0 if x.data_ptr() in own else x.nbytes
            return x

        ids = torch.arange(120).view(4, 30)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            if on:
                with recomputed(model):
                    model(ids)
            else:
                model(ids)
        kept.append(total[0])
    assert kept[1] < kept[0] / 2


def test_gradient_checkpointing_needs_layers():
    with pytest.raises(ValueError, match=r"trainer\.gradient_checkpointing must be false for Linear"):
        recomputed(torch.nn.Linear(2, 2)).__enter__()


# ---- adapters ----------------------------------------------------------------------------------------------


def _adapted(folder: Any, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = make_policy(torch.float32)
    if not (folder / BASE).is_dir():
        model.save_pretrained(folder / BASE)
        tokenizer.save_pretrained(folder / BASE)
    return add_adapters(model, LoraConfig(r=2, **options), base=folder / BASE, seed=5), tokenizer


def test_adapters_alone_are_trained_and_have_the_only_moments(tmp_path):
    model, tokenizer = _adapted(tmp_path, dropout=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = _trainer(SFT(), model, tokenizer, steps=3, group_size=1, weight_decay=0.1)
    trainer.train()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name
    moments = trainer.updater.optimizer.state_dict()["state"]
    assert len(moments) == sum("lora_" in name for name in before) > 0


def test_adapters_come_back_to_the_bit(tmp_path):
    model, tokenizer = _adapted(tmp_path)
    trainer = _trainer(GRPO(), model, tokenizer, steps=3, kl_coef=0.1, checkpoint_dir=str(tmp_path / "made"))
    trainer.train()
    path = tmp_path / "made" / "step-00000003"
    assert (path / "adapter_model.safetensors").is_file()
    assert not (path / "model.safetensors").exists()
    loaded, _ = load_model(path)
    assert has_adapters(loaded)
    assert torch.equal(weights(loaded), weights(model))
    fresh, _ = _adapted(tmp_path)
    assert not torch.equal(weights(fresh), weights(model))
    load_weights(fresh, path)
    assert torch.equal(weights(fresh), weights(model))
    plain, _ = make_policy(torch.float32)
    with pytest.raises(CheckpointError, match=r"has no model\*\.safetensors"):
        load_weights(plain, path)


def test_wrong_adapters_are_refused_in_one_line(tmp_path):
    model, tokenizer = _adapted(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.lora\.r must be 0 for a model\.path that holds adapters"):
        add_adapters(model, LoraConfig(r=2), base=tmp_path)
    plain, _ = make_policy()
    with pytest.raises(ValueError, match=r"^model\.lora\.target_modules cannot be used: .*nothing") as caught:
        add_adapters(plain, LoraConfig(r=2, target_modules=["nothing"]), base=tmp_path)
    assert "\n" not in str(caught.value)
    model.save_pretrained(tmp_path / "alone", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "alone")
    (tmp_path / BASE).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"holds adapters of .*base, which does not exist"):
        load_model(tmp_path / "alone")


@pytest.mark.parametrize("options", ["ppo", "dpo", "online dpo", "adapters", "adapters after a warm start"])
def test_resume_gives_bitwise_the_same_weights(tmp_path, options):
    """Heads, references and adapters among what is resumed."""
    algorithm = {"ppo": PPO(), "dpo": DPO(), "online dpo": OnlineDPO()}.get(options, GRPO())
    changes: dict[str, Any] = {"epochs": 2, "save_every": 2, "steps": 4, "kl_coef": 0.1}

    def trainer(folder: str) -> Trainer:
        model, tokenizer = _adapted(tmp_path) if "adapters" in options else make_policy(torch.float32)
        if "warm" in options:
            _trainer(SFT(), model, tokenizer, steps=2, group_size=1).train()
        return _trainer(algorithm, model, tokenizer, **changes, checkpoint_dir=str(tmp_path / folder))

    whole = trainer("whole")
    whole.train()
    cut = trainer("cut")
    cut.train_step()
    cut.train_step()
    cut.save()
    resumed = trainer("cut")
    if "warm" in options:  # what is resumed brings its own reference
        resumed = _trainer(GRPO(), *_adapted(tmp_path), **changes, checkpoint_dir=str(tmp_path / "cut"))
    resumed.train(resume="auto")
    assert resumed.step == whole.step
    assert torch.equal(weights(whole.policy), weights(resumed.policy))
    assert not torch.equal(weights(cut.policy), weights(resumed.policy))


# ---- whole runs --------------------------------------------------------------------------------------------


def test_a_run_with_adapters_goes_on_and_is_loaded_by_its_folder(tmp_path, capsys):
    words = train_words(tmp_path, model={"lora": {"r": 2}}, trainer={"kl_coef": 0.1, "steps": 2})
    assert main(words) == 0
    run = tmp_path / "run"
    loaded, _ = load_model(run)
    assert has_adapters(loaded)
    assert main([*words, "--resume", "auto"]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")  # its base goes with it
    assert torch.equal(weights(load_model(tmp_path / "moved")[0]), weights(loaded))
    assert main(["evaluate", str(tmp_path / "moved")]) == 0
    capsys.readouterr()
    again = [*words, "--model.path", str(tmp_path / "moved"), "--run_dir", str(tmp_path / "next")]
    assert main(again) == 2
    assert "model.lora.r must be 0 for a model.path that holds adapters" in capsys.readouterr().err
    assert main([*again, "--model.lora.r", "0", "--warm_start.steps", "0"]) == 0
    assert has_adapters(load_model(tmp_path / "next")[0])


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_run_of_another_algorithm(tmp_path, name, capsys):
    """From preferences on disk; with a critic."""
    words = train_words(tmp_path, algorithm={"name": name}, tracker={"enabled": name == "ppo"})
    pairs = [{"prompt": f"say {i}:", "chosen": f"word{i}", "rejected": f"wird{i}"} for i in range(6)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert main([*words, "--trainer.eval_every", "2", "--warm_start.steps", "1"]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = logged[-1]
    assert {"dpo": "rewards/margins", "ppo": "value/mean"}[name] in last
    assert any("eval/loss" in row for row in logged) == (name == "dpo")


def test_parameters_of_less_precision_train_all_kinds():
    for algorithm in (GRPO(), PPO(), DPO(), OnlineDPO()):
        model, tokenizer = make_policy(torch.bfloat16)
        trainer = _trainer(algorithm, model, tokenizer, steps=2, kl_coef=0.1, epochs=2)
        assert all(math.isfinite(value) for value in trainer.train().values())
