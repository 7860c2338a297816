"""The tracker on three families of models, both attentions and precisions, padding on either side, adapters, chat
templates and long contexts."""

import numpy as np
import pytest
import torch
from torch import nn

from react_fast import token_logprobs
from react_fast.tracker import CausalityTracker, Replacement, faithfulness

from .policies import CLOSE, FAMILIES, PROMPT, RESPONSE, family, transformer

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION = ("sdpa", "eager")
# float32 sums over a few dozen tokens; Hugging Face's eager attention and norms compute in it whatever the dtype.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
ROWS = [[5, 17, 23, 9, 31, 8, 40], [12, 44, 7], [3, 50, 28, 19, 6]]


def _observed(model, rows, side):
    """A tracker that has seen one padded training batch of rows whose first token is the prompt."""
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids, mask = (
        torch.stack([nn.functional.pad(torch.tensor(x), pad) for x, pad in zip(values, pads, strict=True)])
        for values in (rows, [[1] * len(row) for row in rows])
    )
    places = (mask.cumsum(1) - 1).clamp_min(0)
    actions = mask.bool() & (places > 0)
    tracker = CausalityTracker(model)
    with tracker.observe(ids, actions, mask):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        (-token_logprobs(logits[:, :-1], ids[:, 1:], mask=actions[:, 1:]).sum()).backward()
    return tracker


def _assert_same(found, expected, **close):
    assert torch.equal(found.count, expected.count)
    seen = expected.count > 0
    torch.testing.assert_close(found.mean[seen], expected.mean[seen], **close)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_observed_like_its_rows_one_by_one(name, attention, side):
    model = family(name, attention, torch.float32, scale=2.0)
    together = _observed(model, ROWS, side)
    alone = [_observed(model, [row], side) for row in ROWS]
    for one in alone[1:]:
        alone[0].by_token.merge(one.by_token)
    _assert_same(together.by_token, alone[0].by_token, **FLOAT32)
    assert int(together.by_token.count.sum()) == sum(len(row) - 1 for row in ROWS)
    assert together.by_position.count[:7].tolist() == [3, 3, 2, 2, 1, 1, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_attentions_agree_and_bfloat16_to_its_precision(name):
    """Observation, attribution and intervention."""
    found = {}
    for attention, dtype in (("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)):
        tracker = _observed(family(name, attention, dtype, scale=2.0), ROWS, "right")
        seen = tracker.by_token.count > 0
        found[attention, dtype] = (
            tracker.by_token.mean[seen],
            tracker.attribute(PROMPT, RESPONSE).scores,
            tracker.attribute(PROMPT, RESPONSE, method="integrated_gradients", steps=4, baseline=7).scores,
            tracker.intervene(PROMPT, RESPONSE, counterfactual=Replacement(5)).mean,
        )
    exact, eager, rough = found.values()
    for values in zip(exact, eager, rough, strict=True):
        torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-4)
        assert np.corrcoef(values[0], values[2].double())[0, 1] > 0.98


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_is_tracked_like_the_model_with_its_weights_merged(name):
    from peft import LoraConfig, get_peft_model

    modules = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        task_type="CAUSAL_LM",
        target_modules=modules,
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )
    adapted = get_peft_model(family(name), config).double().eval()
    scores = np.random.default_rng(0).normal(size=7)

    def all_of(tracker):
        options = {"method": "integrated_gradients", "steps": 3, "baseline": 7}
        measured = faithfulness(tracker, PROMPT, RESPONSE, {"noise": scores}, subsets=4)["noise"]
        return (
            tracker.by_token.mean[tracker.by_token.count > 0].double(),
            tracker.attribute(PROMPT, RESPONSE, "token").scores,
            tracker.attribute(PROMPT, RESPONSE, **options).scores,
            tracker.intervene(PROMPT, RESPONSE).mean,
            measured.insertion,
        )

    found = all_of(_observed(adapted, ROWS, "right"))
    assert all(p.grad is None for key, p in adapted.named_parameters() if "lora" not in key)
    merged = adapted.merge_and_unload()
    for a, b in zip(found, all_of(_observed(merged, ROWS, "right")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
)


def test_marks_of_a_chat_template_are_marked_and_left_out_on_request():
    model, tokenizer = transformer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "one two"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=True, return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    response = ids[len(prompt) :]
    tracker = CausalityTracker(model, tokenizer)
    whole = tracker.intervene(prompt, response)
    marks = [i in (tokenizer.bos_token_id, tokenizer.eos_token_id) for i in ids]
    assert sum(marks) == 4
    assert whole.special.tolist() == marks
    words = tracker.intervene(prompt, response, skip_special=True)
    assert not bool(words.special.any())
    kept = [i for i, mark in enumerate(marks) if not mark]
    assert [start for start, _ in words.spans] == kept
    torch.testing.assert_close(words.mean, whole.mean[kept], **FLOAT32)


def test_the_completeness_gap_shrinks_with_steps_in_every_family():
    for name in FAMILIES:
        tracker = CausalityTracker(family(name, scale=2.0), attribution="integrated_gradients")
        gaps = [
            float(tracker.attribute(PROMPT, RESPONSE, "token", baseline=7, steps=steps).gap.abs().max())
            for steps in (1, 5, 25)
        ]
        assert gaps[2] < 0.1 * gaps[1] < 0.1 * gaps[0]


def test_a_long_context_is_held_once():
    """Of many texts with one beginning the keys and values are there once, and logits at the end alone."""
    model = family("llama")
    model.config.max_position_embeddings = 4096
    prompt = [3 + (7 * i) % 47 for i in range(2000)]
    tracker = CausalityTracker(model)
    held = []
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: held.append(hidden.shape[:2].numel()) or forward(hidden)
    effects = tracker.intervene(prompt, RESPONSE, [(i, i + 1) for i in range(1990, 2004)])
    assert max(held) <= 16 * 5
    assert effects.tokens < 2000 + 15 * 16 + 2004 + 14
    brute = tracker.policy.response_logprobs([prompt[:1990] + prompt[1991:] + RESPONSE], [1999])[0].sum()
    given = tracker.policy.response_logprobs([prompt + RESPONSE], [2000])[0].sum()
    torch.testing.assert_close(effects.mean[0], given - brute, **CLOSE)
