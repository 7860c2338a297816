"""What the tracker does with one text, against Captum and Inseq: attributions and token ablations.

A 4-layer model of width 256 with 8k tokens, 256 prompt and 32 response tokens; everyone has the same numbers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from react_fast.tracker import CausalityTracker, Replacement
from react_fast.trainer.model import fresh_model

from . import common
from .common import AbsentError, built, now, race

STEPS = 4 if common.QUICK else 50
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}

Scores = Callable[[], torch.Tensor]


@cache
def _text(vocab: int = 8192) -> tuple[Any, Any, str, torch.Tensor]:
    """(model, tokenizer of bytes, prompt, ids of the response)"""
    from transformers import AutoModelForCausalLM, LlamaConfig

    prompt, response = (24, 4) if common.QUICK else (256, 32)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    _, tokenizer = fresh_model(["a"], vocab_size=259, hidden_size=16, layers=1, heads=2, max_length=512)
    text = "".join(chr(33 + i % 90) for i in range(prompt))
    return model, tokenizer, text, torch.randint(3, 8000, (response,))


def _checked(expected: torch.Tensor, **tolerance: float) -> Callable[[str, object], None]:
    """A peer with other numbers is told so instead of timed."""

    def check(name: str, found: Any) -> None:
        if not torch.allclose(found, expected, **{**CLOSE, **tolerance}):
            raise AbsentError(f"other numbers, by up to {float((found - expected).abs().max()):.2g}")

    return check


@cache
def _captum_gradients() -> tuple[float, torch.Tensor]:
    """(seconds, [R, P]) of Captum's one call of minutes, whose sum over the rows is its sequence form."""
    from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

    model, tokenizer, prompt, response = _text()
    method = LLMGradientAttribution(LayerIntegratedGradients(model, model.get_input_embeddings()), tokenizer)
    text = TextTokenInput(prompt, tokenizer)
    begin = now()
    found = method.attribute(text, target=response, n_steps=STEPS).token_attr
    return now() - begin, found


@pytest.mark.parametrize("form", ["matrix", "sequence"])
def test_integrated_gradients(benchmark, form):
    model, tokenizer, prompt, response = _text()
    tracker, ids = CausalityTracker(model), tokenizer(prompt)["input_ids"]
    options: dict[str, Any] = {
        "method": "integrated_gradients",
        "baseline": 0,
        "steps": STEPS,
        "inputs": "prompt",
    }
    target = "token" if form == "matrix" else "response"
    seconds, theirs = _captum_gradients()
    expected = theirs if form == "matrix" else theirs.sum(0)

    def ours() -> torch.Tensor:
        return tracker.attribute(ids, response, target, **options).scores[..., : len(ids)]

    race(
        benchmark,
        {"react_fast": ours},
        case=f"integrated gradients, {STEPS} steps, {form} form [{len(ids)} + {len(response)}]",
        check=lambda name, found: torch.testing.assert_close(found, expected, **CLOSE),
        known={"captum": seconds},
        rounds=3,
    )


def _inseq(model: Any, tokenizer: Any, prompt: str, response: str) -> Scores:
    """Its own cross-entropy fails on a single text, hence our function; models that it loads attend eagerly."""
    import inseq
    from inseq.attr.step_functions import probability_fn

    def logprob(args: Any) -> torch.Tensor:
        return probability_fn(args, logprob=True)

    method = inseq.load_model(model, "input_x_gradient", tokenizer=tokenizer)

    def scores() -> torch.Tensor:
        found = method.attribute(prompt, prompt + response, attributed_fn=logprob, show_progress=False)
        return found.sequence_attributions[0].target_attributions.sum(-1).T.nan_to_num()

    return scores


# That of Captum's cases, and Llama's: Inseq computes the logits of every position.
@pytest.mark.parametrize("vocab", [8192, 32000])
def test_gradient_x_input(benchmark, tmp_path, vocab):
    """Matrix form, against Inseq on the model as it is and as Inseq loads it from a folder."""
    model, tokenizer, prompt, _ = _text(vocab)
    response = prompt[: 4 if common.QUICK else 32]
    tracker = CausalityTracker(model)
    ids, answer = (tokenizer(text)["input_ids"] for text in (prompt, response))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def ours() -> torch.Tensor:
        return tracker.attribute(ids, answer, "token").scores

    peers = {"inseq": model, "inseq, loaded by it": str(tmp_path)}
    built_here, absent = built(
        {name: lambda at=at: _inseq(at, tokenizer, prompt, response) for name, at in peers.items()}
    )
    race(
        benchmark,
        {"react_fast": ours, **built_here},
        case=f"gradient x input, matrix form [{len(ids)} + {len(answer)}], {vocab} tokens",
        check=_checked(ours()),
        absent=absent,
        rounds=3,
    )


def test_token_ablation(benchmark):
    """Every prompt token replaced by token 0: the change of the response's log-probability."""
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    model, tokenizer, prompt, response = _text()
    tracker, ids = CausalityTracker(model), tokenizer(prompt)["input_ids"]
    spans = [(i, i + 1) for i in range(len(ids))]
    text = TextTokenInput(prompt, tokenizer)
    method = LLMAttribution(FeatureAblation(model), tokenizer)

    def ours() -> torch.Tensor:
        found = tracker.intervene(ids, response, spans, counterfactual=Replacement(0))
        return found.mean.float()

    @torch.no_grad()
    def total(rows: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([rows, response.expand(len(rows), -1)], 1)
        logits = model(input_ids=whole, use_cache=False).logits[:, len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(2, whole[:, len(ids) :, None]).sum((1, 2))

    def batched(size: int) -> Scores:
        ablation = FeatureAblation(total)
        return lambda: ablation.attribute(torch.tensor([ids]), perturbations_per_eval=size)[0].float()

    race(
        benchmark,
        {
            "react_fast": ours,
            "captum x8": batched(8),
            "captum x16": batched(16),
            "captum sequence": lambda: method.attribute(
                text, target=response, forward_in_tokens=False
            ).seq_attr.float(),
        },
        # Differences of two float32 log-probabilities of about -300, whose last bit is 3e-5.
        case=f"ablation of {len(ids)} tokens [{len(ids)} + {len(response)}]",
        check=_checked(ours(), atol=1.2e-4),
        absent={"captum default": "other numbers, by up to 0.05: token by token behind its cache"},
        rounds=3,
    )
