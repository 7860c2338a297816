"""The same rewards through verl's group estimators, and whitening: what is equal, what reproduces the rest.

Float64 on both sides; 1e-12 is some thousand roundings. verl spreads a response's advantage over its tokens.
"""

import pytest
import torch

import react_fast as rf
from react_fast import recipes

from .peers import peer

N, T = 12, 7
IDS = torch.tensor([3, 9, 3, 9, 3, 7, 7, 9, 3, 7, 7, 3])
# verl divides its means by n + 1e-8.
VERL = 1e-8


def _batch():
    rewards = torch.randn(N, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1))
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return rewards, mask, rewards[:, None] * last


def _verl(name, placed, mask, ids=IDS, **options):
    algorithms = peer("verl.trainer.ppo.core_algos")
    return getattr(algorithms, f"compute_{name}_outcome_advantage")(
        placed, mask.double(), ids.numpy(), **options
    )[0]


def _close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("by_std", [True, False])
def test_verl_grpo(by_std):
    rewards, mask, placed = _batch()
    theirs = _verl("grpo", placed, mask, norm_adv_by_std_in_grpo=by_std)
    scale = "std" if by_std else "none"
    _close(rf.group_advantages(rewards, IDS, scale=scale, eps=1e-6)[:, None] * mask, theirs)
    alone = torch.arange(N)
    theirs = _verl("grpo", placed, mask, ids=alone, norm_adv_by_std_in_grpo=by_std)
    raw = rf.group_advantages(rewards, alone, scale=scale, eps=1e-6, singleton="raw")
    _close(raw[:, None] * mask, theirs, 1e-5 if by_std else 1e-12)  # r / (1 + 1e-6) there


def test_verl_grpo_turns_rounding_into_advantage():
    """Eight equal float32 rewards: exactly 0 here."""
    rewards, ids = torch.full((8,), 1000.1), torch.zeros(8, dtype=torch.int64)
    assert bool((recipes.grpo(rewards, ids) == 0).all())
    theirs = _verl("grpo", rewards[:, None], torch.ones(8, 1), ids=ids)
    assert float(theirs.abs().max()) > 0.1


def test_verl_rloo():
    rewards, mask, placed = _batch()
    found = recipes.rloo(rewards, IDS)[:, None] * mask
    _close(found, _verl("rloo", placed, mask))
    _close(found, _verl("rloo_vectorized", placed, mask))


def test_verl_opo():
    rewards, mask, placed = _batch()
    _close(recipes.opo(rewards, IDS, mask.sum(1))[:, None] * mask, _verl("opo", placed, mask))


def test_verl_reinforce_plus_plus_baseline():
    rewards, mask, placed = _batch()
    _close(
        recipes.reinforce_pp_baseline(rewards, IDS, mask),
        _verl("reinforce_plus_plus_baseline", placed, mask),
        VERL,
    )


def test_verl_pass_at_k():
    """verl's grpo_passk is best_of_n; it divides by the group's std + 1e-6 unless told not to."""
    rewards, mask, placed = _batch()
    theirs = _verl("grpo_passk", placed, mask, config={"norm_adv_by_std_in_grpo": False})
    _close(recipes.best_of_n(rewards, IDS)[:, None] * mask, theirs)
    std = torch.stack([rewards[i == IDS].std() for i in IDS])
    theirs = _verl("grpo_passk", placed, mask, config={"norm_adv_by_std_in_grpo": True})
    _close((recipes.best_of_n(rewards, IDS) / (std + 1e-6))[:, None] * mask, theirs)


def test_verl_gdpo():
    """verl whitens over tokens, so long answers weigh more; over responses here. With one token they agree."""
    rewards, mask = torch.randn(N, 2, dtype=torch.float64), torch.ones(N, 1, dtype=torch.bool)
    config = {"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": [1.0, 0.5]}
    batch = {"prompts": torch.zeros(N, 3), "attention_mask": torch.ones(N, 4, dtype=torch.int64)}
    named = {"a": rewards[:, 0].numpy(), "b": rewards[:, 1].numpy()}
    theirs = _verl("gdpo", rewards[:, :1], mask, config=config, non_tensor_batch=named, batch=batch)
    found = recipes.gdpo(rewards, IDS, weights=[1.0, 0.5], eps=1e-6)
    torch.testing.assert_close(found[:, None], theirs.double(), rtol=1e-5, atol=1e-6)  # float32 there


@pytest.mark.parametrize("shift_mean", [True, False])
def test_verl_masked_whiten(shift_mean):
    """The same where the mask is set; -mean / std is left elsewhere, 0 here."""
    whiten = peer("verl.utils.torch_functional").masked_whiten
    x, mask = torch.randn(5, 9, dtype=torch.float64) * 3 + 5, torch.rand(5, 9) > 0.3
    found, theirs = rf.whiten(x, mask=mask, shift_mean=shift_mean), whiten(x, mask.double(), shift_mean)
    _close(found[mask], theirs[mask], VERL)
    assert bool((found[~mask] == 0).all())
