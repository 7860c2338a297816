"""Micro-batches by length and sequences that share a row change memory and time, and nothing else."""

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from react_fast.tracker import CausalityTracker
from react_fast.trainer.algorithms import DPO, GMPO, GRPO, GSPO, ILQL, PPO, RLOO, SFT, DrGRPO, OnlineDPO
from react_fast.trainer.config import ConfigError, TrainerConfig
from react_fast.trainer.packing import buckets, can_pack, packed_hidden, row_layout, split_into
from react_fast.trainer.trainer import Trainer

from .training import Log, make_config, make_env, make_policy

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=97, num_key_value_heads=2, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "sliding": lambda: MistralForCausalLM(
        MistralConfig(vocab_size=97, num_key_value_heads=2, sliding_window=3, **SIZES)
    ),
}

# A padded row gives NaN in eager attention with a sliding window: all that its last tokens see is masked.
KINDS = [
    (family, kind)
    for kind in ("sdpa", "eager")
    for family in FAMILIES
    if (family, kind) != ("sliding", "eager")
]


# ---- micro-batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_buckets_hold_every_row_once_within_the_budget(budget, together, padded):
    lengths = torch.randint(2, 30, (24,), generator=torch.Generator().manual_seed(0))
    parts = buckets(lengths, budget, together=together, padded=padded)
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    for part in parts:
        size = int(lengths[part].max()) * len(part) if padded else int(lengths[part].sum())
        assert size <= budget or len(part) == together
        pairs = part.view(-1, together)
        assert bool((pairs == pairs[:, :1] // together * together + torch.arange(together)).all())
    assert len(parts) == {1: 24 // together, 10**6: 1}.get(budget, len(parts))


def test_buckets_pad_less_than_neighbours_do():
    lengths = torch.tensor([3, 30] * 8)
    parts = buckets(lengths, 120)
    assert sum(int(lengths[part].max()) * len(part) for part in parts) == int(lengths.sum())


def test_parts_are_halved_for_a_process_that_has_fewer():
    parts = split_into([torch.arange(6), torch.arange(6, 8)], 4, together=2)
    assert len(parts) == 4
    assert torch.cat(parts).tolist() == list(range(8))
    assert all(len(part) % 2 == 0 and len(part) for part in parts)


def test_rows_hold_sequences_side_by_side():
    lengths = [7, 2, 3, 5, 4, 1, 6]
    rows, columns, count = row_layout(lengths)
    held = [
        (row, column + i) for row, column, n in zip(rows, columns, lengths, strict=True) for i in range(n)
    ]
    assert len(set(held)) == sum(lengths)
    assert max(column for _, column in held) < 7
    assert count == 4 == -(-sum(lengths) // 7)


# ---- one forward ---------------------------------------------------------------------------------------------


def _padded(lengths=(9, 3, 5, 2, 6)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (len(lengths), max(lengths)), generator=generator)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_packed_states_and_gradients_are_the_padded_ones(family, attention, one_row):
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    model.set_attn_implementation(attention)
    body, embedding = getattr(model, model.base_model_prefix), model.get_input_embeddings()
    assert can_pack(model, body, embedding, one_row=one_row)
    ids, mask = _padded()
    weight = torch.randn(*ids.shape, 32, dtype=torch.float64) * mask[..., None]
    results = []
    for packed in (False, True):
        model.zero_grad()
        if packed:
            hidden = packed_hidden(body, embedding, ids, mask, one_row=one_row)
        else:
            hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        (hidden * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in body.parameters()])
        results.append((hidden * mask[..., None], gradient))
    # Llama's and Qwen2's eager attention takes its softmax in float32.
    tolerance = 1e-10 if attention == "sdpa" or family == "gpt2" else 1e-5
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_model_that_cannot_is_told_from_one_that_can():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(vocab_size=97, max_position_embeddings=32, word_embed_proj_dim=32, **sizes)
    )
    assert not can_pack(model, model.model, model.get_input_embeddings())


# ---- updates -------------------------------------------------------------------------------------------------

ALGORITHMS = [GRPO(), DrGRPO(), GSPO(), GMPO(), RLOO(), PPO(), DPO(), OnlineDPO(), ILQL(), SFT()]
LESS = {
    "buckets": {"micro_tokens": 60},
    "buckets of one": {"micro_tokens": 1},
    "packed": {"padding": "packed"},
    "packed in micro-batches": {"padding": "packed", "micro_tokens": 70},
}


def _stepped(algorithm, **changes):
    model, tokenizer = make_policy()
    kl = 0.0 if algorithm.supervised or isinstance(algorithm, ILQL) else 0.1
    config = make_config(kl_coef=kl, minibatches=1, epochs=2, optimizer="sgd", max_grad_norm=None, **changes)
    trainer = Trainer(model, tokenizer, make_env(), algorithm=algorithm, config=config, reporter=Log())
    metrics = trainer.train_step()
    ours = {name: value for name, value in metrics.items() if "time" not in name and "second" not in name}
    return ours, torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]), trainer


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def test_updates_and_metrics_are_the_same(algorithm):
    expected, weights, _ = _stepped(algorithm)
    for name, changes in LESS.items():
        metrics, found, trainer = _stepped(algorithm, **changes)
        assert trainer.policy.packed == ("packed" in name)
        torch.testing.assert_close(found, weights, rtol=1e-10, atol=1e-10, msg=name)
        assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-10), name


def test_forwards_stay_within_the_budget():
    seen = []
    model, tokenizer = make_policy()
    model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    config = make_config(micro_tokens=40, prompts_per_step=5, max_new_tokens=4)
    trainer = Trainer(model, tokenizer, make_env(), algorithm=GRPO(), config=config)
    batch = trainer.credit(trainer.score(trainer.collect()))
    seen.clear()
    trainer.update(batch)
    assert len(seen) > 1
    assert max(seen) <= 40
    assert sum(seen) < batch.input_ids.numel()


def test_the_tracker_sees_the_same_gradients():
    seen = []
    for changes in ({}, {"padding": "packed", "micro_tokens": 70}):
        model, tokenizer = make_policy()
        tracker = CausalityTracker(model, tokenizer)
        config = make_config(prompts_per_step=4, **changes)
        env, log = make_env(), Log()
        Trainer(
            model, tokenizer, env, algorithm=GRPO(), tracker=tracker, config=config, reporter=log
        ).train_step()
        seen.append(tracker.observed.by_position)
    assert torch.equal(torch.as_tensor(seen[0].count), torch.as_tensor(seen[1].count))
    torch.testing.assert_close(
        torch.as_tensor(seen[0].mean), torch.as_tensor(seen[1].mean), rtol=1e-9, atol=1e-12
    )


def test_what_cannot_pack_is_padded_with_a_line():
    lines: list[str] = []
    log: Any = Log()
    log.line = lines.append
    _, tokenizer = make_policy()
    plain = torch.nn.Sequential(torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300)).double()
    config = make_config(padding="packed")
    Trainer(plain, tokenizer, make_env(), algorithm=GRPO(), config=config, reporter=log).train_step()
    assert lines == [
        "trainer.padding packed is not possible with Sequential and its attention: padded instead"
    ]


def test_two_sizes_of_a_forward_are_refused():
    with pytest.raises(ConfigError, match=r"^micro_tokens must be none beside micro_batch, got 7$"):
        TrainerConfig(micro_batch=2, micro_tokens=7)
