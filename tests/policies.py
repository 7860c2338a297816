"""Small policies with known causes, for the tests of the tracker."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from react_fast import token_logprobs
from react_fast.trainer.model import fresh_model

TEXTS = ["hello world, this is a test of text", "guten Tag, das ist ein Test", "one two three four five"]
# Sums of a few dozen float64 products computed in another order, and padding in the attention's softmax.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
PROMPT, RESPONSE = [40, 7, 41], [9, 40, 12, 3]

SIZES = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **NARROW, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SIZES, **NARROW, num_key_value_heads=2),
    "gpt2": GPT2Config(**SIZES, n_positions=64, n_embd=16, n_layer=2, n_head=2),
}


def family(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Any:
    """A random model of one of FAMILIES in evaluation mode; weights `scale` times the usual, so that contexts
    differ."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[name], attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.to(dtype).eval()


class Recurrent(nn.Module):
    """A causal module that is no Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.recur = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, ids):
        return self.head(self.recur(self.embed(ids))[0])


class FirstToken(nn.Module):
    """Every next token hangs on the sequence's first token and on nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 50)
        nn.init.normal_(self.table.weight, std=3.0)

    def forward(self, ids):
        return self.table(ids)[:, :1].expand(-1, ids.shape[1], -1)


def transformer():
    return fresh_model(TEXTS, vocab_size=300, hidden_size=32, layers=2, heads=2, max_length=64, dropout=0.1)


def both(name: str) -> tuple[Any, Any]:
    """(float64 policy "recurrent" or "transformer", with dropout where it has any, tokenizer or None)"""
    torch.manual_seed(1)
    if name == "recurrent":
        return Recurrent().double(), None
    model, tokenizer = transformer()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initial 0.02, so that contexts differ
            parameter.mul_(3)
    return model.double(), tokenizer


def assert_moments(moments, expected):
    """RunningMoments equal the reference's dictionary of Welford moments."""
    seen = {i for i, count in enumerate(moments.count.tolist()) if count}
    assert seen == set(expected)
    for i, one in expected.items():
        assert int(moments.count[i]) == one.count
        np.testing.assert_allclose(float(moments.mean[i]), one.mean, rtol=1e-9, atol=1e-12)
        if one.count > 1:
            np.testing.assert_allclose(
                float(moments.standard_error[i]), one.standard_error, rtol=1e-7, atol=1e-12
            )


class Brute:
    """do(action := tokens) by definition: no cache, no batch, no padding."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.seed = model, seed

    @torch.no_grad()
    def logp(self, ids):
        logits = self.model(torch.tensor([ids]))
        return torch.log_softmax(getattr(logits, "logits", logits)[0], -1).numpy()

    def score(self, ids, start):
        """log p of ids from `start` on."""
        table = self.logp(ids)
        return sum(float(table[t - 1, ids[t]]) for t in range(start, len(ids)))

    def draw(self, prefix, stream, count, first=0):
        """The largest of log p + Gumbel noise, whose number counts from `first`."""
        drawn = []
        for position in range(first, first + count):
            key = np.array([self.seed, stream], dtype=np.uint64)
            counter = np.array([0, 0, 0, position], dtype=np.uint64)
            logp = self.logp(prefix + drawn)[-1]
            noise = np.random.Generator(np.random.Philox(key=key, counter=counter)).gumbel(size=len(logp))
            drawn.append(int(np.argmax(logp + noise)))
        return drawn


def logits(model, ids, attention=None):
    if hasattr(model, "generate"):
        return model(input_ids=ids, attention_mask=attention).logits
    return model(ids)


def loss(model, ids, actions, attention=None):
    found = logits(model, ids, attention)
    return -token_logprobs(found[:, :-1], ids[:, 1:], mask=actions[:, 1:]).sum() / 10


def observe(tracker, ids, actions, attention=None, **options):
    model = tracker.policy.model
    with tracker.observe(ids, actions, **options):
        loss(model, ids, actions, attention).backward()
