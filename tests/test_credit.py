"""Credit: the weights keep a row's sum and every action's sign, and follow the scores above the floor."""

import numpy as np
import pytest
import torch

from react_fast.tracker import attribution_credit, causal_credit, uniform_credit

MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
ADVANTAGES = torch.tensor([1.5, -2.0, 3.0, 0.5], dtype=torch.float64)


def _scores():
    return torch.randn(MASK.shape, dtype=torch.float64)


def test_uniform_gives_every_action_the_advantage():
    credit = uniform_credit(ADVANTAGES, MASK)
    assert torch.equal(credit, ADVANTAGES[:, None].expand_as(MASK) * MASK)
    assert torch.equal(uniform_credit(ADVANTAGES, MASK.int()), credit)


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_a_row_sums_to_uniform_credit_and_keeps_its_sign(floor):
    credit = attribution_credit(ADVANTAGES, _scores(), MASK, floor=floor)
    # Sums of at most 5 terms of size up to 10 in float64.
    torch.testing.assert_close(credit.sum(1), uniform_credit(ADVANTAGES, MASK).sum(1), rtol=1e-14, atol=1e-14)
    assert bool((credit * ADVANTAGES[:, None] >= 0).all())
    assert bool((credit[~MASK] == 0).all())


def test_above_the_floor_credit_is_proportional_to_the_size_of_the_score():
    scores = torch.tensor([[9.0, 1.0, -3.0, 0.0, 9.0]], dtype=torch.float64)
    credit = attribution_credit(torch.ones(1, dtype=torch.float64), scores, MASK[:1], floor=0.4)
    expected = torch.tensor([[0.0, 0.4 + 0.6 * 3 / 4, 0.4 + 0.6 * 9 / 4, 0.4, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(credit, expected, rtol=1e-15, atol=0)


def test_floor_one_and_rows_without_signal_are_uniform():
    expected = uniform_credit(ADVANTAGES, MASK)
    torch.testing.assert_close(attribution_credit(ADVANTAGES, _scores(), MASK, floor=1.0), expected)
    silent = attribution_credit(ADVANTAGES, torch.zeros(MASK.shape), MASK, floor=0.2)
    torch.testing.assert_close(silent, expected, rtol=1e-15, atol=0)


def test_masked_scores_touch_nothing_and_nan_stays_in_its_row():
    scores = _scores()
    expected = attribution_credit(ADVANTAGES, scores, MASK)
    garbage = torch.where(MASK, scores, torch.nan)
    assert torch.equal(attribution_credit(ADVANTAGES, garbage, MASK), expected)
    garbage[1, 0] = torch.nan
    credit = attribution_credit(ADVANTAGES, garbage, MASK)
    assert bool(credit[1][MASK[1]].isnan().all())
    assert torch.equal(credit[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_the_scale_of_the_scores_does_not_matter(scale):
    scores = _scores().clamp(-3, 3)
    expected = attribution_credit(ADVANTAGES, scores, MASK)
    torch.testing.assert_close(
        attribution_credit(ADVANTAGES, scores * scale, MASK), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty(shape):
    advantages, mask = torch.zeros(shape[0]), torch.zeros(shape, dtype=torch.bool)
    assert attribution_credit(advantages, torch.zeros(shape), mask).shape == shape
    assert uniform_credit(advantages, mask).shape == shape


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"advantages": torch.ones(3)}, ValueError, r"mask must be \[3, T\] like advantages, got \[4, 5\]"),
        ({"advantages": torch.ones(4, 4)}, ValueError, r"advantages must be \[B\] or \[4, 5\] like mask"),
        ({"advantages": torch.ones(())}, ValueError, r"advantages must be \[B\] or \[B, T\], got \[\]"),
        ({"advantages": np.ones(4)}, TypeError, "advantages must be a torch"),
        ({"advantages": torch.ones(4).int()}, TypeError, "advantages must be float32"),
        ({"scores": torch.ones(4, 4)}, ValueError, r"scores must be \[4, 5\] like mask, got \[4, 4\]"),
        ({"scores": torch.ones(4, 5).long()}, TypeError, "scores must be float32"),
        ({"scores": torch.ones(4, 5, device="meta")}, ValueError, "scores must be on cpu like advantages"),
        ({"mask": MASK.float()}, TypeError, "mask must be bool or an integer 0/1 mask"),
        ({"mask": MASK[:, 0]}, ValueError, r"mask must be \[4, T\] like advantages"),
        ({"floor": 1.5}, ValueError, r"floor must be in \[0, 1\], got 1.5"),
        ({"floor": True}, TypeError, "floor must be a number, got bool"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    given = {"advantages": ADVANTAGES, "scores": _scores(), "mask": MASK, "floor": 0.5} | change
    with pytest.raises(error, match=text):
        attribution_credit(given["advantages"], given["scores"], given["mask"], floor=given["floor"])


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_causal_credit_sums_to_uniform_credit(floor):
    effects = torch.where(torch.rand(MASK.shape) < 0.3, torch.nan, _scores())
    credit = causal_credit(ADVANTAGES, effects, MASK, floor=floor)
    torch.testing.assert_close(credit.sum(1), uniform_credit(ADVANTAGES, MASK).sum(1), rtol=1e-13, atol=1e-13)
    assert bool((credit[~MASK] == 0).all())
    assert torch.equal(credit == uniform_credit(ADVANTAGES, MASK), torch.ones_like(MASK)) == (floor == 1.0)


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_advantages_of_each_token_keep_their_sums_and_signs(floor):
    """Of mixed signs in one row: the positive part's sum stays, the negative part's too."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(200, 7, generator=generator) < 0.7
    level, scores = torch.randn(2, 200, 7, dtype=torch.float64, generator=generator) * mask
    found = attribution_credit(level, scores, mask, floor=floor)
    assert bool((found * level >= 0).all())
    for sign in (1, -1):
        # Sums of 7 terms below 10.
        part = [(sign * x).clamp_min(0).sum(1) for x in (found, level)]
        torch.testing.assert_close(*part, rtol=1e-13, atol=1e-13)
    assert float((found - level).abs().max()) > 0.1


@pytest.mark.parametrize("credit", [attribution_credit, causal_credit])
def test_one_advantage_a_row_is_one_for_each_of_its_tokens(credit):
    scores = _scores()
    equal = ADVANTAGES[:, None].expand_as(MASK)
    assert torch.equal(credit(equal, scores, MASK), credit(ADVANTAGES, scores, MASK))


def test_effects_are_weighed_by_the_inverse_of_their_variance():
    """Two rows of four actions, of which three are known; mean A^2 = 20 / 8, mean e^2 = 30 / 6, so w = 1/2."""
    effects = torch.tensor([[4.0, 0.0, 0.0, torch.nan], [1.0, -2.0, 3.0, torch.nan]]).double()
    advantages, mask = torch.tensor([1.0, -2.0]).double(), torch.ones(2, 4).bool()
    credit = causal_credit(advantages, effects, mask, floor=0.2)
    thirds = torch.tensor([[8, -4, -4, 0], [1, -8, 7, 0]]).double() / 3
    torch.testing.assert_close(credit, advantages[:, None] + 0.8 * 0.5 * thirds, rtol=1e-14, atol=1e-14)


def test_a_small_effect_gets_at_most_the_rows_total():
    """w would be 4e12 by variances; n = 4 makes the one effect carry what it explains of the row's total."""
    effects = torch.tensor([[1e-6, 0.0, 0.0, 0.0]]).double()
    credit = causal_credit(torch.ones(1).double(), effects, torch.ones(1, 4).bool(), floor=0.0)
    torch.testing.assert_close(credit, 1 + torch.tensor([[3e-6, -1e-6, -1e-6, -1e-6]]).double())


def test_the_mean_of_causal_credit_is_the_policy_gradient():
    """One state, one action of 3 with its exact advantage as effect, beside an action that only adds noise: the
    gradient of a million draws has the direction of the true one, each with the variance of credit far below
    that of uniform credit."""
    generator = torch.Generator().manual_seed(0)
    p, value = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 0.0, 2.0]).double()
    drawn = torch.multinomial(p, 1_000_000, replacement=True, generator=generator)
    advantage = (value - p @ value)[drawn]
    noise = 3 * torch.randn(len(drawn), dtype=torch.float64, generator=generator)
    rewards, mask = advantage + noise, torch.ones(len(drawn), 2).bool()
    effects = torch.stack([advantage, torch.zeros_like(noise)], 1)
    score = torch.nn.functional.one_hot(drawn, 3) - p  # gradient of the log-probability by the logits
    exact = p * (value - p @ value)
    found = causal_credit(rewards, effects, mask, floor=0.0)[:, :1] * score
    cosine = torch.nn.functional.cosine_similarity(found.mean(0), exact, dim=0)
    assert float(cosine) > 0.999
    uniform = rewards[:, None] * score
    relative = [(x.std(0) / x.mean(0)).square().mean() for x in (found, uniform)]
    assert float(relative[0]) < 0.5 * float(relative[1])


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_the_number_range_is_no_limit(scale):
    scores = _scores().clamp(-3, 3)
    advantages = ADVANTAGES * scale
    credit = causal_credit(advantages, scores * scale, MASK) / scale
    torch.testing.assert_close(credit, causal_credit(ADVANTAGES, scores, MASK), rtol=1e-12, atol=1e-12)


def test_what_is_not_finite_stays_in_its_row():
    effects, others = _scores(), [0, 2, 3]
    effects[1, 0] = torch.inf
    credit = causal_credit(ADVANTAGES, effects, MASK)
    assert bool(credit[1][MASK[1]].isnan().all())
    assert torch.equal(credit[others], causal_credit(ADVANTAGES[others], effects[others], MASK[others]))


def test_bad_input_of_causal_credit_is_refused():
    effects = torch.zeros(MASK.shape).double()
    for advantages, error in ((np.ones(2), TypeError), (torch.tensor(1.0), ValueError)):
        with pytest.raises(error, match="advantages must be"):
            causal_credit(advantages, effects, MASK)
    with pytest.raises(ValueError, match=r"advantages must be \[B\], got \[4, 5\]"):
        uniform_credit(effects, MASK)
    with pytest.raises(ValueError, match="effects must be"):
        causal_credit(ADVANTAGES, effects[:, 1:], MASK)
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], got 2"):
        causal_credit(ADVANTAGES, effects, MASK, floor=2.0)
    with pytest.raises(ValueError, match=r"advantages must be \[B\] or"):
        causal_credit(effects[:, :2], effects, MASK)
