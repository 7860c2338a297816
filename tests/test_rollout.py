"""Rollout engines: log-probabilities are those of a teacher-forced pass, truncation is exact."""

import math
from typing import Any

import pytest
import torch
import transformers

from react_fast.ops.logprob import token_logprobs
from react_fast.reference.rollout import kept_tokens
from react_fast.trainer.rollout import (
    ContinuousBatchingEngine,
    EngineError,
    GenerateEngine,
    PolicyEngine,
    Sample,
    SamplingParams,
)
from react_fast.trainer.rollout.truncation import choose, kept_floors

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
EOS = 0
SIZES = {"vocab_size": 40, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None}
ROTARY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
}
# Absolute positions, and rotary ones with and without biases: left padding must shift none of them.
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=48, n_embd=16, n_layer=2, n_head=2, **SIZES)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **ROTARY)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, **ROTARY)),
}
ENGINES = {"policy": PolicyEngine, "generate": GenerateEngine}
SAMPLERS = {
    "all tokens": {"temperature": 0.7},
    "top-k": {"top_k": 5, "temperature": 1.3},
    "top-p and min-p": {"top_p": 0.8, "min_p": 0.05},
}


def _model(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name]().eval()


@torch.no_grad()
def _teacher_forced(model: Any, prompt: list[int], sample: Any, params: SamplingParams) -> torch.Tensor:
    """Log-probabilities of an action from one forward over its own sequence, without padding or cache."""
    logits = model(torch.tensor([prompt + sample.ids])).logits[0, len(prompt) - 1 : -1]
    floors = None if sample.logit_floors is None else torch.tensor(sample.logit_floors)
    ids = torch.tensor(sample.ids)
    return token_logprobs(logits, ids, temperature=params.temperature, logit_floor=floors)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("policy", "gpt2"),
        ("policy", "llama"),
        ("policy", "qwen2"),
        ("generate", "gpt2"),
        ("generate", "qwen2"),
    ],
)
def test_logprobs_are_those_of_a_teacher_forced_pass(name, engine, sampler):
    """Left padding, cache and truncation change nothing but rounding: float32, a dozen sums of 16 terms."""
    model, params = _model(name), SamplingParams(8, seed=5, **SAMPLERS[sampler])
    samples = ENGINES[engine](model, eos_id=EOS, pad_id=0).generate(PROMPTS, params)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        assert sample.exact_tokens
        assert not sample.scored
        assert (sample.logit_floors is None) is (sampler == "all tokens")
        assert sample.finish_reason == ("stop" if sample.ids[-1] == EOS else "length")
        assert EOS not in sample.ids[:-1]
        expected = _teacher_forced(model, prompt, sample, params)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.7}]
)
def test_the_kept_set_is_the_one_of_the_plain_loop(options):
    """Random rows and one with ties at the boundary, which all stay."""
    torch.manual_seed(0)
    logits = torch.randn(40, 12) * 2
    logits[0] = torch.tensor([3.0] + [1.0] * 8 + [0.0] * 3)
    params = SamplingParams(1, temperature=0.8, **options)
    floors = kept_floors(logits, params)
    for row, floor in zip(logits, floors, strict=True):
        kept = kept_tokens(row, params)
        assert {i for i in range(12) if row[i] >= floor} == kept
        dropped = [float(row[i]) for i in range(12) if i not in kept]
        # Rounding of the trainer's forward must not reach it: it lies half-way.
        assert not dropped or max(dropped) < float(floor) < min(float(row[i]) for i in kept)


@pytest.mark.parametrize("draw", [0.0, math.nextafter(1.0, 0.0)])
def test_extreme_draws_stay_among_the_kept_tokens(draw):
    logits = torch.tensor([[-1.0, 2.0, 1.0, -3.0, -2.0]])
    tokens, logprobs, _ = choose(logits, torch.tensor([draw]).double(), SamplingParams(1, top_k=2))
    assert int(tokens) == (1 if draw == 0 else 2)
    expected = torch.log_softmax(torch.tensor([2.0, 1.0]), 0)[int(tokens) - 1]
    torch.testing.assert_close(logprobs[0], expected)


def test_draws_follow_the_truncated_distribution():
    """4000 even draws: shares equal the renormalised probabilities to a draw's width, 1 / 4000, at both ends."""
    logits = torch.tensor([0.5, 2.0, 1.0, -3.0, 1.5])
    draws = (torch.arange(4000).double() + 0.5) / 4000
    tokens, _, floors = choose(logits.expand(4000, 5), draws, SamplingParams(1, top_p=0.8))
    kept = logits >= floors[0]
    expected = torch.softmax(logits.masked_fill(~kept, -torch.inf), 0)
    shares = torch.bincount(tokens, minlength=5) / 4000
    assert 1 < int(kept.sum()) < 5
    torch.testing.assert_close(shares, expected, rtol=0, atol=2 / 4000)


def test_generate_undoes_what_a_checkpoint_says_about_sampling():
    """Defaults of a generation_config.json would change the distribution behind the trainer's back."""
    model, params = _model("qwen2"), SamplingParams(8, seed=5)
    plain = GenerateEngine(model, eos_id=EOS, pad_id=0).generate(PROMPTS, params)
    own = model.generation_config
    own.update(top_k=2, temperature=0.3, repetition_penalty=1.5, do_sample=True, typical_p=0.1, max_time=1e-9)
    own.update(suppress_tokens=plain[0].ids[1:2], eos_token_id=[plain[1].ids[1], 1])
    again = GenerateEngine(model, eos_id=EOS, pad_id=0).generate(PROMPTS, params)
    assert [sample.ids for sample in again] == [sample.ids for sample in plain]
    assert model.generation_config is own
    endless = GenerateEngine(model, eos_id=None, pad_id=0).generate(PROMPTS, params)
    assert [sample.finish_reason for sample in endless] == ["length"] * 3
    assert min(min(sample.logprobs) for sample in endless) > -20


@pytest.mark.parametrize("engine", [PolicyEngine, GenerateEngine, ContinuousBatchingEngine])
def test_a_greedy_search_among_some_tokens_has_their_logprobs(engine):
    model, params = _model("llama"), SamplingParams(4, greedy=True, top_k=3, temperature=2.0)
    samples = engine(model, eos_id=EOS, pad_id=0).generate(PROMPTS, params)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + sample.ids])).logits[0, len(prompt) - 1 : -1]
        three = torch.log_softmax(logits.topk(3).values / 2, -1)[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logprobs), three, rtol=0, atol=2e-5)


@pytest.mark.parametrize("engine", [PolicyEngine, GenerateEngine, ContinuousBatchingEngine])
def test_a_table_of_positions_has_an_end(engine):
    message = (
        "max_new_tokens must be at most 41 behind a prompt of 7 tokens in a model with 48 positions, got 42"
    )
    with pytest.raises(EngineError, match=message):
        engine(_model("gpt2"), eos_id=EOS, pad_id=0).generate(PROMPTS, SamplingParams(42))
    sample = PolicyEngine(_model("llama"), eos_id=None, pad_id=0).generate([[1]], SamplingParams(50))[0]
    assert len(sample.ids) == 50


@pytest.mark.parametrize("engine", [GenerateEngine, ContinuousBatchingEngine])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalti": 1.1}, "got 'repetition_penalti'; did you mean repetition_penalty?"),
        ({"temperature": 0.5}, "generation_options must leave temperature to the sampling parameters"),
        ({"num_return_sequences": 2}, "generation_options must leave num_return_sequences to"),
        ({"return_dict_in_generate": False}, "generation_options must leave return_dict_in_generate to"),
    ],
)
def test_generation_options_are_refused(engine, options, message):
    with pytest.raises(EngineError) as error:
        engine(_model("llama"), eos_id=EOS, pad_id=0, options=options)
    assert message in str(error.value)


def test_a_generation_option_with_a_value_that_generate_refuses_is_one_line():
    engine = GenerateEngine(_model("llama"), eos_id=EOS, pad_id=0, options={"repetition_penalty": "x"})
    with pytest.raises(EngineError, match=r"generation_options \{'repetition_penalty': 'x'\} are refused: "):
        engine.generate(PROMPTS, SamplingParams(2))


def test_generate_is_keyed_and_leaves_the_generator_alone():
    model = _model("llama")
    engine = GenerateEngine(model, eos_id=EOS, pad_id=0)
    state = torch.random.get_rng_state()
    first, other = (engine.generate(PROMPTS, SamplingParams(8, seed=5, step=step)) for step in (0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert engine.generate(PROMPTS, SamplingParams(8, seed=5)) == first
    assert first != other


def test_generate_takes_any_generation_option():
    """Here one that forbids every token to come twice."""
    model = _model("llama")
    engine = GenerateEngine(model, eos_id=EOS, pad_id=0, options={"no_repeat_ngram_size": 1})
    for prompt, sample in zip(PROMPTS, engine.generate(PROMPTS, SamplingParams(8)), strict=True):
        assert len(set(prompt + sample.ids)) == len(prompt + sample.ids)


@pytest.mark.skipif(
    not hasattr(transformers.GenerationMixin, "generate_batch"),
    reason="transformers has no continuous batching",
)
def test_continuous_batching_returns_the_policys_tokens_and_logprobs():
    model, params = _model("qwen2"), SamplingParams(5, greedy=True)
    engine = ContinuousBatchingEngine(model, eos_id=EOS, pad_id=0)
    expected = PolicyEngine(model, eos_id=EOS, pad_id=0).generate(PROMPTS, params)
    found = engine.generate(PROMPTS, params)
    assert [sample.ids for sample in found] == [sample.ids for sample in expected]
    sampled = SamplingParams(5, top_k=6, temperature=0.8)
    for prompt, sample in zip(PROMPTS, engine.generate(PROMPTS, sampled), strict=True):
        expected_logprobs = _teacher_forced(model, prompt, sample, sampled)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected_logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ids_alone_are_scored_afterwards(sampler):
    """What an older transformers' continuous batching lacks is found by a pass over the finished sequences."""
    from react_fast.trainer.rollout.scoring_pass import score_samples

    model, params = _model("gpt2"), SamplingParams(8, seed=5, **SAMPLERS[sampler])
    expected = PolicyEngine(model, eos_id=EOS, pad_id=0).generate(PROMPTS, params)
    bare = PolicyEngine(model, eos_id=EOS, pad_id=0).generate(PROMPTS, params)
    for sample in bare:
        sample.logprobs, sample.logit_floors = [math.nan] * len(sample.ids), None
    score_samples(model, PROMPTS, bare, params, pad_id=0, batch_size=2)
    for one, other in zip(bare, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("engine", [PolicyEngine, GenerateEngine])
def test_bad_prompts_are_refused(engine):
    made = engine(_model("llama"), eos_id=EOS, pad_id=0)
    assert made.generate([], SamplingParams(2)) == []
    with pytest.raises(ValueError, match="prompts must hold at least one token each"):
        made.generate([[1], []], SamplingParams(2))
    with pytest.raises(ValueError, match="rows must be 2 like prompts, got 1"):
        made.generate([[1], [2]], SamplingParams(2, rows=[0]))


@pytest.mark.parametrize("engine", [PolicyEngine, GenerateEngine, ContinuousBatchingEngine])
def test_tokens_that_are_none_are_refused(engine):
    """A checkpoint's list of end tokens would never equal a token."""
    with pytest.raises(TypeError, match=r"eos_id must be one token or None, got \[0\]"):
        engine(_model("llama"), eos_id=[EOS], pad_id=0)
    with pytest.raises(TypeError, match="pad_id must be one token, got None"):
        engine(_model("llama"), eos_id=EOS, pad_id=None)


def test_a_sample_has_a_logprob_for_every_token():
    with pytest.raises(ValueError, match="logprobs must be 2 like ids, got 1"):
        Sample([1, 2], [-1.0], "stop")
    with pytest.raises(ValueError, match="finish_reason must be 'stop' or 'length', got 'eos'"):
        Sample([1], [-1.0], "eos")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 1 << 64}, r"seed must be in \[0, 2\^63\), got 18446744073709551616"),
        ({"seed": 1.5}, "seed must be an integer, got float"),
        ({"top_k": True}, "top_k must be an integer, got bool"),
        ({"max_new_tokens": "4"}, "max_new_tokens must be an integer, got str"),
        ({"temperature": 1e-320}, r"temperature must be in \[1e-30, 1e\+30\]"),
        ({"temperature": "1"}, "temperature must be a number, got str"),
        ({"greedy": "no"}, "greedy must be True or False, got str"),
        ({"skip": [-1]}, r"skip must be in \[0, 2\^63\), got -1"),
        ({"skip": [0.5]}, "skip must hold integers, got float"),
        ({"rows": [-1]}, r"rows must be in \[0, 2\^63\), got -1"),
        ({"rows": ["0"]}, "rows must hold integers, got str"),
    ],
)
def test_bad_sampling_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SamplingParams(**{"max_new_tokens": 4, **options})
