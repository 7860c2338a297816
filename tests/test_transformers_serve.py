"""A real text-only server: `transformers serve`; opt in by transformers' extra `serving`."""

import math

import pytest
from transformers.utils.import_utils import is_serve_available

from react_fast.trainer.model import fresh_model
from react_fast.trainer.rollout import PolicyEngine, SamplingParams
from react_fast.trainer.rollout.openai_engine import OpenAIEngine

from . import serving

if not is_serve_available():
    pytest.skip("pip install 'transformers[serving]' for a server", allow_module_level=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(engine, model, tokenizer), the engine's server running offline."""
    folder = tmp_path_factory.mktemp("serve")
    model, tokenizer = fresh_model(
        ["the cat sat on the mat"], seed=0, vocab_size=270, hidden_size=16, layers=1, heads=2
    )
    serving.only_text(model, tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["serve", str(folder / "model"), "--device", "cpu"]
    with serving.served("transformers.cli.transformers", words, folder / "server.log") as client:
        name, eos_id = str(folder / "model"), tokenizer.eos_token_id
        engine = OpenAIEngine("", name, tokenizer=tokenizer, eos_id=eos_id, client=client)
        with pytest.warns(match="no log-probabilities"):
            engine.generate([[70]], SamplingParams(1))
        yield engine, model, tokenizer


def test_texts_in_and_out(served):
    engine, model, tokenizer = served
    found = engine.capabilities
    assert (found.token_prompts, found.token_ids, found.logprobs) == (False, False, False)
    assert "generation_config" in found.dialect
    prompts = [tokenizer(prompt)["input_ids"] for prompt in ("the cat", "on a", "mat", "x")]
    params = SamplingParams(6, greedy=True)
    policy = PolicyEngine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    same = 0
    for one, other in zip(engine.generate(prompts, params), policy.generate(prompts, params), strict=True):
        assert not one.exact_tokens
        assert all(map(math.isnan, one.logprobs))
        same += not one.drifted
        assert one.drifted or one.ids == other.ids
    assert same


def test_it_samples_at_all(served):
    """Left to itself this server searches greedily, whatever the temperature."""
    engine, _, tokenizer = served
    prompt = tokenizer("the cat")["input_ids"]
    samples = [engine.generate([prompt], SamplingParams(6, seed=seed))[0].ids for seed in range(3)]
    assert samples[0] != samples[1] or samples[1] != samples[2]
