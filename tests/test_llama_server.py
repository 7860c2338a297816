"""A real OpenAI-compatible server: llama-cpp-python's, with a tiny random Qwen2; opt in by the extra `servers`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from react_fast.trainer.model import fresh_model
from react_fast.trainer.rollout import EngineError, PolicyEngine, SamplingParams
from react_fast.trainer.rollout.openai_engine import OpenAIEngine

from . import serving

for _needed in ("llama_cpp", "gguf", "uvicorn"):
    pytest.importorskip(_needed, reason=f"{_needed} is not installed; pip install 'react-fast[servers]'")

PROMPTS = ["the cat", "a dog sat on", "x"]
LAYER = {  # llama.cpp's names of a Qwen2 layer's tensors
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _policy() -> tuple[Any, Any]:
    _, tokenizer = fresh_model(
        ["the cat sat on the mat", "a dog sat on a log"], seed=0, vocab_size=290, hidden_size=8, layers=1,
        heads=1, max_length=32,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    serving.only_text(model, tokenizer)
    return model, tokenizer


def _write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = set(tokenizer.all_special_ids)
    kind = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([kind.CONTROL if i in special else kind.NORMAL for i in range(len(tokenizer))])
    merges = backend["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    for name, tensor in model.state_dict().items():
        stem, _, part = name.rpartition(".")
        if stem in OUTER:
            to = OUTER[stem]
        else:
            _, _, layer, inner = stem.split(".", 3)
            to = f"blk.{layer}.{LAYER[inner]}"
        writer.add_tensor(f"{to}.{part}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(engine, model, tokenizer), the engine's server running."""
    model, tokenizer = _policy()
    folder = tmp_path_factory.mktemp("llama")
    _write_gguf(folder / "tiny.gguf", model, tokenizer)
    words = ["--model", str(folder / "tiny.gguf"), "--model_alias", "tiny", "--n_ctx", "64"]
    words += ["--type_k", "0", "--type_v", "0"]  # float32, GGML_TYPE_F32
    words += ["--logits_all", "True", "--n_threads", "1", "--n_threads_batch", "1"]
    with serving.served("llama_cpp.server", words, folder / "server.log") as client:
        yield (
            OpenAIEngine("", tokenizer=tokenizer, eos_id=tokenizer.eos_token_id, client=client),
            model,
            tokenizer,
        )


def test_the_probe_finds_what_this_server_does(served):
    """It refuses token ids, answers in text, and has log-probabilities."""
    found = served[0].capabilities
    assert (found.token_prompts, found.token_ids, found.logprobs) == (False, False, True)
    assert served[0].model == "tiny"


def test_greedy_tokens_and_logprobs_are_those_of_the_model(served):
    """float32 on both sides, each with kernels of its own."""
    engine, model, tokenizer = served
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    params = SamplingParams(8, greedy=True)
    policy = PolicyEngine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    worst, same = 0.0, 0
    for one, other in zip(engine.generate(prompts, params), policy.generate(prompts, params), strict=True):
        assert not one.exact_tokens
        if one.drifted:  # random tokens need not be what their text is tokenised to
            continue
        same += 1
        assert one.ids == other.ids
        known = [(a, b) for a, b in zip(one.logprobs, other.logprobs, strict=True) if not math.isnan(a)]
        worst = max([worst, *(abs(a - b) for a, b in known)])
    print(f"{same} of {len(PROMPTS)} without drift, largest log-probability difference {worst:.1e}")
    assert same
    assert worst < 1e-4


def test_samples_are_keyed_and_marked(served):
    engine, _, tokenizer = served
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    first, again, other = (
        engine.generate(prompts, SamplingParams(6, seed=1, step=step)) for step in (0, 0, 1)
    )
    assert [s.ids for s in first] == [s.ids for s in again]
    assert [s.ids for s in first] != [s.ids for s in other]
    assert all(not sample.exact_tokens for sample in first)


def test_an_unknown_model_is_told(served):
    engine, _, tokenizer = served
    with pytest.raises(EngineError, match="serves tiny, not 'tinny'; did you mean tiny"):
        OpenAIEngine("", "tinny", tokenizer=tokenizer, eos_id=tokenizer.eos_token_id, client=engine.client)
