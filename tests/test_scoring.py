"""Scores of a batch without its logits equal those from the logits, for what transformers builds."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
)

from react_fast.reference import token_logprobs
from react_fast.trainer.batch import Batch
from react_fast.trainer.output_layer import output_layer
from react_fast.trainer.scoring import Scorer, reference_policy, scores

from .policies import Recurrent

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 61,
}
MODELS = {
    "llama": LlamaConfig(**SMALL),
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "absolute positions": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61),
    "softcap": Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0),
    "scale": Cohere2Config(**SMALL, logit_scale=0.25),
    "divisor": GraniteConfig(**SMALL, logits_scaling=4.0),
}


def _model(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name]))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initial 0.02, so that contexts differ
            parameter.mul_(3)
    return model.to(dtype).eval()


def _batch(vocab=61, rows=3, width=7):
    """Rows of different lengths, a prompt of two tokens and one of four, a masked token among the actions."""
    ids = torch.arange(rows * width).view(rows, width) * 7 % vocab
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    mask = attention[:, 1:].bool().clone()
    mask[:, :1] = False
    mask[2, :3] = False
    mask[0, 3] = False
    zeros = torch.zeros(rows, width - 1)
    return Batch(
        ids, attention, mask, zeros, torch.zeros(rows), zeros, torch.arange(rows), torch.arange(rows)
    )


def _expected(model, batch, temperature):
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return token_logprobs(
        logits, batch.targets, mask=batch.mask, temperature=temperature, return_entropy=True
    )


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_the_logits(name):
    model, batch = _model(name), _batch()
    policy = Scorer(model)
    assert policy.output is not None
    found = scores(policy(batch, 0.7))
    (found.logprobs.sum() + found.entropy.sum()).backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logp, entropy = _expected(model, batch, 0.7)
    (logp.sum() + entropy.sum()).backward()
    # Sums in another order, in float64 but for the norms and rotations that transformers does in float32.
    torch.testing.assert_close(found.logprobs, logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-6, atol=1e-6)
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_other_output_layers_are_told_from_linear_ones():
    model = _model("llama")
    model.config.logit_scale = 2.0  # which this architecture does not look at
    assert output_layer(model).logit_scale == 1.0
    model.lm_head.register_forward_hook(lambda module, args, y: 30 * torch.tanh(y / 30))
    assert output_layer(model) is None
    assert output_layer(Recurrent()) is None
    policy, batch = Scorer(model), _batch()
    torch.testing.assert_close(scores(policy(batch, 1.0)).logprobs, _expected(model, batch, 1.0)[0])


def test_heads_see_the_hidden_states_of_every_position():
    model, batch = _model("tied"), _batch()
    policy = Scorer(model, {"value": torch.nn.Linear(32, 1, dtype=torch.float64)})
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    expected = policy.heads["value"](hidden.hidden_states[-1][:, :-1])
    torch.testing.assert_close(scores(policy(batch, 1.0)).heads["value"], expected)
    with pytest.raises(
        ValueError, match=r"model must be a Hugging Face causal LM .* \(value\), got Recurrent"
    ):
        Scorer(Recurrent(), {"value": torch.nn.Linear(16, 1)})


def test_the_reference_stays_when_the_policy_moves():
    from peft import LoraConfig, get_peft_model

    batch, options = _batch(), {"r": 2, "target_modules": ["q_proj"]}
    plain, fresh = _model("llama"), get_peft_model(_model("llama"), LoraConfig(**options))
    adapted = get_peft_model(_model("llama"), LoraConfig(**options, init_lora_weights=False))
    options["target_modules"] = ["q_proj", "lm_head"]
    headed = get_peft_model(_model("llama"), LoraConfig(**options, init_lora_weights=False)).double()
    for model in (plain, adapted, headed, fresh):
        before = _expected(model, batch, 1.0)[0].detach()
        policy = Scorer(model)
        assert policy.output is not None
        reference = reference_policy(policy)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name or model is plain:
                    parameter.add_(0.1)
        assert not torch.allclose(scores(policy(batch, 1.0)).logprobs, before, atol=1e-3)
        torch.testing.assert_close(scores(reference(batch, 1.0)).logprobs, before)
        moved = scores(policy(batch, 1.0)).logprobs
        torch.testing.assert_close(moved, _expected(model, batch, 1.0)[0])
        again = reference_policy(policy)
        again.load_state_dict(reference.state_dict())
        torch.testing.assert_close(scores(again(batch, 1.0)).logprobs, before)
    assert reference.state_dict() == {}  # that of a fresh adapter costs no weights
