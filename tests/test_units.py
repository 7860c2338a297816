"""Units that credit is shared among: words, sentences, lines, steps and turns, cut as the reference cuts them."""

import numpy as np
import pytest
import torch

from react_fast.reference.credit import units_of as reference_units
from react_fast.trainer.replays import turns_of, units_of
from react_fast.trainer.rollout import Trajectory

from .byte_tokenizers import byte_level
from .dialogues import ALPHABET, Characters


@pytest.mark.parametrize("actions", ["token", "word", "sentence", "line", "step", "turn"])
def test_units_are_the_references(actions):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = torch.from_numpy(rng.integers(len(ALPHABET), size=24))
        one = Trajectory(
            token_ids=ids,
            action_mask=torch.from_numpy(rng.random(24) < 0.8),
            turn_index=torch.arange(24) // 12,
            sampler_logprobs=torch.zeros(24),
            rewards=[0.0, 1.0],
        )
        tokenizer = Characters(ALPHABET)
        assert units_of(one, actions, tokenizer) == reference_units(one, actions, tokenizer)


@pytest.mark.parametrize("actions", ["word", "sentence", "line", "step"])
def test_units_end_behind_characters_of_several_tokens(actions):
    """Sentences of CJK text end behind their full stop, whose bytes are three tokens."""
    text = "日本。 é a。日\n本 b\n\nc"
    tokenizer = byte_level()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    one = Trajectory(
        token_ids=ids,
        action_mask=torch.ones(len(ids), dtype=torch.bool),
        turn_index=torch.zeros(len(ids), dtype=torch.long),
        sampler_logprobs=torch.zeros(len(ids)),
        rewards=[0.0],
    )
    found = units_of(one, actions, tokenizer)
    assert found == reference_units(one, actions, tokenizer)
    expected = {
        "word": ["日本。", " é", " a。日", "\n本", " b", "\n", "\nc"],
        "sentence": ["日本。", " é a。", "日\n", "本 b\n\n", "c"],
        "line": ["日本。 é a。日\n", "本 b\n\n", "c"],
        "step": ["日本。 é a。日\n本 b\n\n", "c"],
    }
    assert [tokenizer.decode(ids[unit]) for unit in found] == expected[actions]


def test_units_cut_each_turns_action():
    ids = torch.tensor([5, 0, 2, 1, 5, 3, 0, 3, 1])
    one = Trajectory(
        token_ids=ids,
        action_mask=torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1]).bool(),
        turn_index=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]),
        sampler_logprobs=torch.zeros(9),
        rewards=[0.0, 1.0],
    )
    tokenizer = Characters(ALPHABET)
    assert units_of(one, "turn", tokenizer) == [[1, 2, 3], [5, 6, 7, 8]]
    assert units_of(one, "word", tokenizer) == [[1], [2, 3], [5, 6], [7, 8]]
    assert units_of(one, "line", tokenizer) == [[1, 2, 3], [5], [6, 7], [8]]
    assert units_of(one, "token", tokenizer) == [[1], [2], [3], [5], [6], [7], [8]]
    assert turns_of(one, ids) == [[0, 2, 1], [3, 0, 3, 1]]
    assert turns_of(one, ids, end=2) == [[0]]
    assert turns_of(one, ids, end=5) == [[0, 2, 1], []]
