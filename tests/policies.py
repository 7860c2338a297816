"""Small policies with known causes, for the tests of the tracker."""

from typing import Any

import numpy as np
import torch
from torch import nn

from react_fast.trainer.model import fresh_model

TEXTS = ["hello world, this is a test of text", "guten Tag, das ist ein Test", "one two three four five"]
# Sums of a few dozen float64 products computed in another order, and padding in the attention's softmax.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
PROMPT, RESPONSE = [40, 7, 41], [9, 40, 12, 3]


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
