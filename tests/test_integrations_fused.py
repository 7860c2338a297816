"""Log-probabilities of transformers' models without logits, beside those of the logits; PEFT's adapters, too."""

import contextlib
import re

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import react_fast as rf
from react_fast.integrations.transformers import FusedHead, fused
from react_fast.reference import token_logprobs
from react_fast.trainer.scoring import Scorer

from .peers import peer

VOCAB = 61
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
}
MODELS = {
    "Llama": SMALL,
    "Qwen2": {**SMALL, "tie_word_embeddings": True},
    "Gemma2": {**SMALL, "head_dim": 8, "final_logit_softcapping": 30.0},  # at 30 nearly straight for small logits
    "Cohere": {**SMALL, "logit_scale": 0.25},
    "Granite": {**SMALL, "logits_scaling": 4.0},
    "FalconH1": {**SMALL, "lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB},
    "Phi": SMALL,  # its head has a bias
    "OPT": {  # projects its hidden states to what the embedding has
        "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB,
        "word_embed_proj_dim": 8, "max_position_embeddings": 32,
    },
}  # fmt: skip


def _model(name, **changes):
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initial 0.02, so that contexts differ
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def _batch():
    ids = torch.arange(21).view(3, 7) * 5 % VOCAB
    labels, seen = ids.clone(), torch.ones_like(ids)
    labels[0, :3] = labels[1, 4] = labels[2, 5:] = -100
    seen[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


def _from_logits(model, labels, temperature=1.0, **inputs):
    logits = model(**inputs).logits[:, :-1]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, 1:]
    found = token_logprobs(
        logits, labels[:, 1:], mask=labels[:, 1:] != -100, temperature=temperature, return_entropy=True
    )
    return [torch.nn.functional.pad(x, (1, 0)) for x in found]


def _pulled(model, found):
    """Gradients of all that is trained, of an uneven sum."""
    model.zero_grad(set_to_none=True)
    sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in found).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(model, batch, **options):
    found = fused(model, **batch, return_entropy=True, **options)
    wanted = _from_logits(model, **batch, **options)
    # Sums in another order, in float64 but for what transformers does in float32.
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert found[0].requires_grad == wanted[0].requires_grad
    if wanted[0].requires_grad:
        torch.testing.assert_close(_pulled(model, found), _pulled(model, wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_logits(name):
    _assert_same(_model(name), _batch(), temperature=0.7)


def test_it_is_the_model_s_own_loss_and_shifted_labels_are_taken_as_they_are():
    model, batch = _model("Gemma2"), _batch()
    logp = fused(model, **batch)
    assert torch.equal(logp != 0, (batch["labels"] != -100) & (torch.arange(7) > 0))
    loss = -logp.sum() / (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(loss, model(**batch).loss, check_dtype=False)
    labels = batch.pop("labels")
    shifted = fused(model, **batch, shift_labels=torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:])
    torch.testing.assert_close(shifted[:, :-1], logp[:, 1:])
    _assert_same(model, {**batch, "labels": labels}, temperature=torch.rand(3, 7).double() + 0.5)


def test_modes_stay_and_the_head_is_tried_once(monkeypatch):
    model, batch, calls = _model("Llama").train(), _batch(), []
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    logp = fused(model, **batch)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(FusedHead(model)(**batch), logp)
    assert len(calls) == 1


def _hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, y: 30 * torch.tanh(y / 30))


def _other_head(model):
    model.lm_head = torch.nn.Sequential(model.lm_head)


def _prompted(model):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _activated(model):
    options = {"alora_invocation_tokens": [5], "target_modules": ["q_proj"]}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


REFUSED = {
    "a cap that no configuration tells": _hooked,
    "several layers": _other_head,
    "a wrapper": torch.nn.Sequential,
    "tokens before the prompt": _prompted,
    "an adapter that waits for a token": _activated,
    "weight-decomposed": lambda model: get_peft_model(
        model, LoraConfig(use_dora=True, target_modules=["lm_head"])
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_other_heads_are_refused_in_one_line(why):
    model = _model("Llama")
    model = REFUSED[why](model) or model
    with pytest.raises(ValueError, match=r"^model must be a causal language model .*, got \w+$") as caught:
        fused(model, **_batch())
    assert "\n" not in str(caught.value)


def test_labels_are_given_once():
    model, batch = _model("Llama"), _batch()
    labels = batch.pop("labels")
    for given, told in (({}, "none"), ({"labels": labels, "shift_labels": labels}, "both")):
        with pytest.raises(ValueError, match=f"^labels or shift_labels must be given, got {told}$"):
            fused(model, **batch, **given)
    with pytest.raises(ValueError, match=r"^adapter_names must be left out: "):
        fused(model, **batch, labels=labels, adapter_names=["default"] * 3)
    sizes = list(labels.shape)
    for name in ("labels", "shift_labels"):
        with pytest.raises(
            ValueError, match=rf"^{name} must be {re.escape(str(sizes))} like the inputs, got "
        ):
            fused(model, **batch, **{name: labels[:, 1:]})
        with pytest.raises(ValueError, match=rf"^temperature must be .* like {name}, got \[\]$"):
            fused(model, **batch, **{name: labels}, temperature=torch.tensor(0.5))


ADAPTERS = {
    "on attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "on the head with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "rank-stabilised on the head": {"target_modules": ["lm_head"], "use_rslora": True},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied and saved": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "tied, not told so": {"target_modules": ["q_proj", "embed_tokens"]},
}  # fmt: skip


def _adapted(kind, name=None, **changes):
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **ADAPTERS[kind], **changes}
    name = name or ("Phi" if options.get("lora_bias") else "Qwen2" if kind.startswith("tied") else "Llama")
    model = get_peft_model(_model(name), LoraConfig(task_type="CAUSAL_LM", **options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about tied weights
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_count_as_in_the_logits(kind):
    """One model through all its states: on, off, on again, merged, unmerged by being off."""
    model, batch = _adapted(kind), _batch()
    _assert_same(model, batch)
    on = fused(model, **batch)
    with model.disable_adapter():
        _assert_same(model, batch)
        assert not torch.allclose(fused(model, **batch), on, atol=1e-3)
    torch.testing.assert_close(fused(model, **batch), on)
    model.merge_adapter()
    _assert_same(model, batch)
    with model.disable_adapter():
        if (
            kind == "tied"
        ):  # PEFT takes the merged weights back during the first forward, of one layer after the other
            fused(model, **batch)
        _assert_same(model, batch)
    _assert_same(model, batch)


@pytest.mark.parametrize("state", ["a second one", "both", "unloaded"])
def test_other_adapters_of_the_same_head(state):
    model, batch = _adapted("on the head"), _batch()
    before = fused(model, **batch)
    if state == "unloaded":
        model = model.merge_and_unload()
        torch.testing.assert_close(fused(model, **batch), before, rtol=1e-6, atol=1e-6)
    else:
        model.add_adapter("other", LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
        model.double().base_model.set_adapter("other" if state == "a second one" else ["default", "other"])
    _assert_same(model, batch)


def test_a_head_adapted_after_the_first_call_is_seen():
    model, batch = _model("Llama"), _batch()
    fused(model, **batch)
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).double()
    _assert_same(model, batch)  # not the PeftModel: what it has put its layers into


def test_dropout_on_the_way_into_the_head_is_that_of_the_logits():
    model, batch = _adapted("on the head", lora_dropout=0.5), _batch()
    model.train()
    labels = batch.pop("labels")
    found = []
    for way in ("fused", "logits"):
        torch.manual_seed(5)
        if way == "fused":
            y = fused(model, **batch, shift_labels=labels)
        else:
            y = token_logprobs(model(**batch).logits, labels, mask=labels != -100)
        found.append((y.detach(), _pulled(model, [y])))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    model.eval()
    assert not torch.allclose(fused(model, **batch, shift_labels=labels), found[0][0], atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["on attention alone", "a head of its own", "tied and saved"])
@pytest.mark.parametrize("door", ["patch", "trainer's"])
def test_trl_s_fused_head_with_adapters(kind, door):
    """That of the model below the adapters, as TRL's trainers make it; they refuse adapters on the head."""
    utils, head = peer("trl.trainer.utils"), peer("react_fast.integrations.trl_trainer").use_fused_head
    model, batch = _adapted(kind), _batch()
    utils.add_fused_lm_head(model.get_base_model(), 0.7, outputs=("log_probs", "entropy"))
    if door != "patch":
        head(model.get_base_model())
    with rf.patch("trl") if door == "patch" else contextlib.nullcontext():
        for context in (contextlib.nullcontext(), model.disable_adapter()):
            with context:
                out = model(**batch, fused_lm_head=True)
                wanted = _from_logits(model, **batch, temperature=0.7)
            for a, b in zip((out.log_probs, out.entropy), wanted, strict=True):
                torch.testing.assert_close(a.double(), b[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_trainer_scores_from_hidden_states_with_adapters(kind):
    """No fallback to logits, and a reference that is the model without them."""
    model = _adapted(kind)
    output = Scorer(model).output
    hidden = output.hidden(**{name: x for name, x in _batch().items() if name != "labels"})
    for context in (contextlib.nullcontext(), model.disable_adapter()):
        with context:
            given = output.projection(hidden)
            y = torch.nn.functional.linear(*given)
            torch.testing.assert_close(output.of(y), output.logits(hidden), rtol=1e-9, atol=1e-9)


def _wrapped(rank, world, kind):
    """Every rank its own row; the gradient is the mean over ranks, as DDP and fully_shard reduce it."""
    batch = {name: x[rank : rank + 1] for name, x in _batch().items()}
    models = [get_peft_model(_model("Llama"), LoraConfig(r=2, target_modules=["lm_head"])) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, wrapped = (model.double() for model in models)
    fused(plain, **batch).sum().backward()
    wanted = [p.grad for p in plain.parameters() if p.requires_grad]
    for x in wanted:
        dist.all_reduce(x)
    head = FusedHead(wrapped)
    whole = DistributedDataParallel(head) if kind == "DDP" else fully_shard(head)
    whole(**batch).sum().backward()
    found = [p.grad for p in wrapped.parameters() if p.requires_grad]
    for a, b in zip(found, wanted, strict=True):
        a = a.full_tensor() if hasattr(a, "full_tensor") else a
        torch.testing.assert_close(a, b / world, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["DDP", "fully_shard"])
@pytest.mark.parametrize("ranks", [2], indirect=True, scope="session")
def test_what_wraps_modules_wraps_a_fused_head(ranks, kind):
    ranks.run(_wrapped, kind)
