"""Saliency, gradient x input, integrated and layer integrated gradients: equal to Captum, complete, and the same
for any scalar; captum comes with the `bench` extra."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen2ForSequenceClassification

from react_fast.envs import ground_truth
from react_fast.envs.slot_models import Observer
from react_fast.tracker import CausalityTracker

from .policies import CLOSE, FAMILIES, PROMPT, RESPONSE, FirstToken, Recurrent, family

INNER = {"llama": "model.layers.0", "qwen2": "model.layers.1", "gpt2": "transformer.h.0"}
IDS, STEPS = [*PROMPT, *RESPONSE], 12
# What the issue asks for; both sides are float32 sums of a few hundred products.
CAPTUM = {"rtol": 1e-4, "atol": 1e-5}


pytestmark = pytest.mark.usefixtures("one_thread")


def _model(name, attention="eager", dtype=torch.float32):
    return family(name, attention, dtype, scale=2.0)


def _logps(model, ids):
    """[B, R] log p of the response's tokens."""
    logits = model(input_ids=ids).logits[:, len(PROMPT) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(2, ids[:, len(PROMPT) :, None])[..., 0]


# ---- Captum ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captum():
    return pytest.importorskip(
        "captum.attr", reason="captum is not installed: pip install 'react-fast[bench]'"
    )


class _Forward:
    """Captum's view of the policy: ids or embeddings in, one number a row out; the text's own response counts."""

    def __init__(self, model, token=None):
        self.model, self.token = model, token

    def __call__(self, ids):
        logits = self.model(input_ids=ids).logits[:, len(PROMPT) - 1 : -1]
        response = torch.tensor(RESPONSE).expand(len(ids), -1)
        found = torch.log_softmax(logits, -1).gather(2, response[..., None])[..., 0]
        return found.sum(1) if self.token is None else found[:, self.token]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("baseline", [5, 0])
def test_integrated_gradients_equal_captum(captum, name, baseline):
    model = _model(name)
    tracker = CausalityTracker(model, attribution="integrated_gradients")
    theirs = captum.LayerIntegratedGradients(_Forward(model), model.get_input_embeddings())
    given = {"n_steps": STEPS, "baselines": torch.full((1, len(IDS)), baseline)}
    expected, gap = theirs.attribute(torch.tensor([IDS]), return_convergence_delta=True, **given)
    found = tracker.attribute(PROMPT, RESPONSE, baseline=baseline, steps=STEPS)
    torch.testing.assert_close(found.scores, expected[0].sum(-1), **CAPTUM)
    torch.testing.assert_close(-found.gap, gap[0].float(), rtol=1e-3, atol=1e-4)
    rows = tracker.attribute(PROMPT, RESPONSE, "token", baseline=baseline, steps=STEPS)
    for t in range(len(RESPONSE)):
        theirs = captum.LayerIntegratedGradients(_Forward(model, t), model.get_input_embeddings())
        expected = theirs.attribute(torch.tensor([IDS]), **given)[0].sum(-1)
        torch.testing.assert_close(rows.scores[t], expected, **CAPTUM)


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_integrated_gradients_equal_captum(captum, name):
    model = _model(name)
    theirs = captum.LayerIntegratedGradients(_Forward(model), model.get_submodule(INNER[name]))
    expected = theirs.attribute(torch.tensor([IDS]), torch.full((1, len(IDS)), 5), n_steps=STEPS)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = CausalityTracker(model).attribute(
        PROMPT, RESPONSE, method="integrated_gradients", layer=INNER[name], baseline=5, steps=STEPS
    )
    torch.testing.assert_close(found.scores, expected[0].sum(-1), **CAPTUM)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_x_input_and_saliency_equal_captum(captum, name):
    model = _model(name)
    tracker, ids = CausalityTracker(model), torch.tensor([IDS])
    theirs = captum.LayerGradientXActivation(_Forward(model), model.get_input_embeddings())
    found = tracker.attribute(PROMPT, RESPONSE)
    torch.testing.assert_close(found.scores, theirs.attribute(ids)[0].sum(-1), **CAPTUM)
    assert found.gap is None
    theirs = captum.LayerGradientXActivation(_Forward(model), model.get_submodule(INNER[name]))
    inner = tracker.attribute(PROMPT, RESPONSE, layer=INNER[name]).scores
    torch.testing.assert_close(inner, theirs.attribute(ids)[0].sum(-1), **CAPTUM)

    def embedded(vectors):
        logits = model(inputs_embeds=vectors).logits[:, len(PROMPT) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(2, ids[:, len(PROMPT) :, None]).sum((1, 2))

    vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
    expected = captum.Saliency(embedded).attribute(vectors)[0].norm(dim=-1)
    found = tracker.attribute(PROMPT, RESPONSE, method="saliency").scores
    torch.testing.assert_close(found, expected.detach(), **CAPTUM)


def test_the_matrix_form_equals_captums_for_language_models(captum):
    """LLMGradientAttribution moves the prompt alone and gives each response token a row."""
    from react_fast.trainer.model import fresh_model

    model, tokenizer = fresh_model(["hello world"], vocab_size=259, hidden_size=32, layers=2, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.config._attn_implementation = "eager"
    prompt, response = "hello", "word"
    method = captum.LayerIntegratedGradients(model, model.get_input_embeddings())
    theirs = captum.LLMGradientAttribution(method, tokenizer)
    text = captum.TextTokenInput(prompt, tokenizer)
    answer = torch.tensor(tokenizer(response)["input_ids"])
    expected = theirs.attribute(text, target=answer, n_steps=STEPS).token_attr
    found = CausalityTracker(model).attribute(
        tokenizer(prompt)["input_ids"],
        answer,
        "token",
        method="integrated_gradients",
        baseline=0,
        steps=STEPS,
        inputs="prompt",
    )
    torch.testing.assert_close(found.scores[:, :5], expected, **CAPTUM)
    assert bool((found.scores[:, 5:] == 0).all())


# ---- completeness and forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("target", ["response", "token", lambda logits: logits[4, 11] * logits[2, 12]])
@pytest.mark.parametrize("layer", [None, "model.layers.0"])
def test_the_gap_is_what_is_missing_and_shrinks(attention, target, layer):
    model = _model("llama", attention, torch.float64)
    tracker = CausalityTracker(model, attribution="integrated_gradients")
    options = {"baseline": 7, "layer": layer}
    gaps = []
    for steps in (1, 4, 30):
        found = tracker.attribute(PROMPT, RESPONSE, target, steps=steps, **options)
        gaps.append(float(found.gap.abs().max()))
        assert found.gap.shape == found.outcome.shape
    # An error of Gauss-Legendre quadrature falls geometrically with its points.
    assert gaps[2] < 1e-6 < gaps[1] < gaps[0]


def test_the_gap_is_measured_against_the_baselines_own_outcome():
    model = _model("gpt2", dtype=torch.float64)
    found = CausalityTracker(model).attribute(
        PROMPT, RESPONSE, method="integrated_gradients", baseline=7, inputs="prompt", steps=5
    )
    with torch.no_grad():
        rows = torch.tensor([IDS, [7] * len(PROMPT) + RESPONSE])
        after, before = _logps(model, rows).sum(1)
    torch.testing.assert_close(found.gap, after - before - found.scores.sum(), **CLOSE)


def test_rows_of_the_matrix_form_sum_to_the_sequence_form():
    for model in (Recurrent().double(), _model("qwen2", dtype=torch.float64)):
        tracker = CausalityTracker(model, attribution="integrated_gradients")
        rows, whole = (
            tracker.attribute(PROMPT, RESPONSE, target, steps=6) for target in ("token", "response")
        )
        # Llama's and Qwen's norms compute in float32 whatever the model's dtype.
        torch.testing.assert_close(rows.scores.sum(0), whole.scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows.gap.sum(), whole.gap, rtol=1e-5, atol=1e-6)
        place = torch.arange(7)
        assert bool((rows.scores[place >= torch.arange(3, 7)[:, None]] == 0).all())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "integrated_gradients", "steps": 3, "baseline": 5}, {"layer": "lm_head"}],
    ids=["embedding", "path", "behind it"],
)
def test_one_backward_through_the_output_layer_serves_all_rows(monkeypatch, name, attention, options):
    """The rows of a backward each, as they are where the layer asked for lies behind the output layer's input."""
    model = _model(name, attention)
    found = CausalityTracker(model).attribute(PROMPT, RESPONSE, "token", **options).scores
    passes, backward = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kw: passes.append(args) or backward(*args, **kw)
    )
    CausalityTracker(model).attribute(PROMPT, RESPONSE, "token", **options)
    assert len(passes) == 1 + len(RESPONSE)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    passes.clear()
    expected = CausalityTracker(model).attribute(PROMPT, RESPONSE, "token", **options).scores
    assert len(passes) == len(RESPONSE)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_linear_function_needs_one_step():
    """For the first token's table row, gradient x input and integrated gradients from zero are the same."""
    tracker = CausalityTracker(FirstToken().double())
    for steps in (1, 7):
        found = tracker.attribute(
            [4], [5, 6], lambda logits: logits[2, 9], method="integrated_gradients", steps=steps
        )
        expected = tracker.attribute([4], [5, 6], lambda logits: logits[2, 9])
        torch.testing.assert_close(found.scores, expected.scores, **CLOSE)
        assert abs(float(found.gap)) < 1e-12


def test_bfloat16_agrees_with_float32_to_its_precision():
    exact, rough = (
        CausalityTracker(_model("llama", dtype=dtype))
        .attribute(PROMPT, RESPONSE, method="integrated_gradients", steps=4)
        .scores
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rough.dtype == torch.float32
    assert np.corrcoef(exact, rough)[0, 1] > 0.99


def test_the_baseline_is_the_padding_token_where_there_is_one():
    tokenizer = SimpleNamespace(decode=str, eos_token_id=2, pad_token_id=5)
    model, options = _model("llama"), {"method": "integrated_gradients", "steps": 3}
    found = CausalityTracker(model, tokenizer).attribute(PROMPT, RESPONSE, **options)
    expected = CausalityTracker(model).attribute(PROMPT, RESPONSE, baseline=5, **options)
    assert torch.equal(found.scores, expected.scores)


# ---- other scalars ---------------------------------------------------------------------------------------------


def test_a_reward_model_is_attributed():
    truth = ground_truth(8)
    observer = Observer(truth).double()
    text = truth.encode("!bdehjlnp")
    found = CausalityTracker(FirstToken()).attribute(
        text[:1],
        text[1:],
        lambda logits: logits[-1, 0],
        scorer=observer,
        method="integrated_gradients",
        steps=20,
    )
    with torch.no_grad():
        off = observer(torch.tensor([truth.encode("!acegikmo")]))[0, -1, 0]
        on = observer(torch.tensor([text]))[0, -1, 0]
    torch.testing.assert_close(found.outcome, on)
    torch.testing.assert_close(found.scores.sum(), on - off, rtol=1e-6, atol=1e-9)
    assert float(found.scores[3]) == 0.0  # an off slot moves nowhere


def test_a_classifier_and_a_value_head_are_attributed():
    torch.manual_seed(0)
    rewarder = Qwen2ForSequenceClassification(FAMILIES["qwen2"]).double().eval()
    tracker = CausalityTracker(Recurrent())
    found = tracker.attribute([9, 7], [11, 12], lambda scores: scores[0], scorer=rewarder)
    torch.testing.assert_close(found.outcome, rewarder(torch.tensor([[9, 7, 11, 12]])).logits[0, 0].detach())

    class Value(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = _model("llama", dtype=torch.float64).model
            self.head = nn.Linear(16, 1).double()

        def get_input_embeddings(self):
            return self.body.get_input_embeddings()

        def forward(self, ids):
            return self.head(self.body(input_ids=ids).last_hidden_state)[..., 0]

    value = Value()
    found = tracker.attribute([9, 7], [11, 12], lambda values: values[2], scorer=value, method="saliency")
    assert float(found.scores[3]) == 0.0  # later than the value
    assert bool((found.scores[:3] > 0).all())


# ---- bad input -------------------------------------------------------------------------------------------------

REFUSED = [
    (
        {"method": "lime"},
        ValueError,
        "method must be one of 'grad_x_input', 'saliency', 'integrated_gradients'",
    ),
    ({"inputs": "response"}, ValueError, "inputs must be one of 'all', 'prompt', got 'response'"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 2.5}, TypeError, "steps must be an integer, got float"),
    ({"baseline": 50}, IndexError, r"baseline\[0\] must be in \[0, 50\), got 50"),
    ({"layer": "head.1"}, ValueError, "layer must be a module of the model, such as 'recur', got 'head.1'"),
    ({"layer": 3}, TypeError, "layer must be a module or its name, got int"),
    ({"layer": "recur", "method": "saliency"}, None, ""),
    ({"scorer": nn.Linear(2, 2), "target": len}, ValueError, "exactly one nn.Embedding, got 0"),
    ({"scorer": Recurrent()}, ValueError, "target must be a function of the scorer's output, got 'response'"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(options, error, text):
    tracker = CausalityTracker(Recurrent())
    if error is None:
        assert tracker.attribute(PROMPT, RESPONSE, **options).scores.shape == (7,)
        return
    with pytest.raises(error, match=text) as caught:
        tracker.attribute(PROMPT, RESPONSE, **options)
    assert "\n" not in str(caught.value)
