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
def test_causal_credit_sums_to_uniform_credit_and_keeps_signs(floor):
    credit = causal_credit(ADVANTAGES, _scores(), MASK, floor=floor)
    torch.testing.assert_close(credit.sum(1), uniform_credit(ADVANTAGES, MASK).sum(1), rtol=1e-14, atol=1e-14)
    assert bool((credit * ADVANTAGES[:, None] >= 0).all())
    assert bool((credit[~MASK] == 0).all())


@pytest.mark.parametrize("credit", [attribution_credit, causal_credit])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_advantages_of_each_token_keep_their_sums_and_signs(credit, floor):
    """Of mixed signs in one row: the positive part's sum stays, the negative part's too."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(200, 7, generator=generator) < 0.7
    level, scores = torch.randn(2, 200, 7, dtype=torch.float64, generator=generator) * mask
    found = credit(level, scores, mask, floor=floor)
    assert bool((found * level >= 0).all())
    for sign in (1, -1):
        # Sums of 7 terms below 10.
        part = [(sign * x).clamp_min(0).sum(1) for x in (found, level)]
        torch.testing.assert_close(*part, rtol=1e-13, atol=1e-13)
    equal = ADVANTAGES[:, None].expand_as(MASK)
    assert torch.equal(credit(equal, scores[:4, :5], MASK), credit(ADVANTAGES, scores[:4, :5], MASK))
    assert float((found - level).abs().max()) > 0.1


def test_praise_and_blame_go_where_effect_and_advantage_agree():
    effects = torch.tensor(
        [[2.0, -1.0, 0.0, 6.0], [2.0, -1.0, 0.0, 6.0], [1.0, 2.0, 0.0, 3.0]], dtype=torch.float64
    )
    advantages = torch.tensor([1.0, -1.0, -1.0]).double()
    credit = causal_credit(advantages, effects, torch.ones(3, 4).bool(), floor=0.2)
    expected = torch.tensor(
        [[1.0, 0.2, 0.2, 2.6], [-0.2, -3.4, -0.2, -0.2], [-1.0, -1.0, -1.0, -1.0]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(credit, expected, rtol=1e-14, atol=1e-14)
    by_token = causal_credit(advantages[:, None].expand(3, 4), effects, torch.ones(3, 4).bool(), floor=0.2)
    assert torch.equal(by_token, credit)


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
