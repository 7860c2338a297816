"""The tracker observes training as the reference does and disturbs nothing; scores for credit."""

import numpy as np
import pytest
import torch
from torch import nn

from react_fast import reference
from react_fast.tracker import CausalityTracker

from .policies import CLOSE, Recurrent, assert_moments, both, loss, observe


@pytest.fixture(params=["recurrent", "transformer"])
def policy(request):
    return both(request.param)


def _batch(rows=4, width=9):
    """Ids padded on the right, actions with a gap, one row without any."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 50, (rows, width), generator=generator)
    lengths = torch.tensor([9, 6, 7, 4])[:rows]
    place = torch.arange(width)
    attention = place < lengths[:, None]
    actions = attention & (place >= 2) & (place != 4)
    actions[3:] = False
    return torch.where(attention, ids, 0), attention, actions


# ---- observation of the training backward ----------------------------------------------------------------------


def test_observation_of_a_batch_equals_the_reference_one_sequence_at_a_time(policy):
    model, _ = policy
    tracker, slow = CausalityTracker(model), reference.Tracker(model)
    ids, attention, actions = _batch()
    for _ in range(2):
        observe(tracker, ids, actions, attention.long())
        for row in range(len(ids)):
            length = int(attention[row].sum())
            one, acted = ids[row, :length], actions[row, :length]
            with slow.observe(one, acted):
                loss(model, one[None], acted[None]).backward()
    assert_moments(tracker.by_token, slow.by_token)
    assert_moments(tracker.by_position, slow.by_position)
    # Rows of 9, 6 and 7 tokens without the last action and what follows it, twice.
    assert int(tracker.by_token.count.sum()) == 2 * (8 + 5 + 6)


def test_observing_changes_no_gradient_and_leaves_no_hook(policy):
    model, _ = policy
    ids, attention, actions = _batch()
    loss(model, ids, actions, attention.long()).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tracker = CausalityTracker(model)
    observe(tracker, ids, actions, attention.long())
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)
    assert not tracker.policy.embedding._forward_hooks


def test_a_positive_score_raises_the_objective(policy):
    """The sum of a row's scores is the change of -loss when its embeddings grow by a factor, to first order."""
    model, _ = policy
    ids, _, actions = _batch(rows=1)
    tracker = CausalityTracker(model)
    observe(tracker, ids, actions)
    found = float((tracker.by_position.mean * tracker.by_position.count).sum())
    step, values = 1e-5, []
    for factor in (1 - step, 1 + step):
        handle = tracker.policy.embedding.register_forward_hook(lambda m, a, out, f=factor: out * f)
        values.append(-float(loss(model, ids, actions).detach()))
        handle.remove()
    # A central difference in float64 at step 1e-5 is good to about 1e-9 of the value.
    np.testing.assert_allclose(found, (values[1] - values[0]) / (2 * step), rtol=1e-6, atol=1e-9)


def test_a_frozen_embedding_is_observed_too():
    torch.manual_seed(1)
    model, ids, actions = Recurrent(), *_batch()[::2]
    free = CausalityTracker(model)
    observe(free, ids, actions)
    model.embed.weight.requires_grad_(False)
    frozen = CausalityTracker(model)
    observe(frozen, ids, actions)
    assert torch.equal(frozen.by_token.mean, free.by_token.mean)


def test_padding_on_the_left_counts_positions_from_the_first_token():
    model, ids, actions = Recurrent().double(), torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    plain, padded = CausalityTracker(model), CausalityTracker(model)
    observe(plain, ids, actions)
    attention = torch.tensor([[0, 0, 1, 1, 1, 1]])
    wide = nn.functional.pad(ids, (2, 0)), nn.functional.pad(actions, (2, 0))
    observe(padded, *wide, attention_mask=attention)
    assert torch.equal(padded.by_position.count[:4], plain.by_position.count[:4])
    assert int(padded.by_token.count[0]) == 0


def test_one_in_every_is_observed():
    model, ids, actions = Recurrent(), *_batch()[::2]
    tracker = CausalityTracker(model, every=3)
    for _ in range(7):
        observe(tracker, ids, actions)
    assert int(tracker.by_position.count[0]) == 3 * 3  # calls 0, 3, 6; three rows with actions
    by_step = CausalityTracker(model, every=3)
    for step in (0, 0, 1, 2, 3):
        observe(by_step, ids, actions, step=step)
    assert int(by_step.by_position.count[0]) == 3 * 3  # both micro-batches of step 0, one of step 3


def test_scores_that_are_not_finite_are_left_out():
    model, ids, actions = Recurrent(), *_batch()[::2]
    tracker = CausalityTracker(model)
    with tracker.observe(ids, actions):
        logits = model(ids)
        (logits[0].sum() * torch.nan + logits[1, 3].sum()).backward()
    assert bool(tracker.by_token.mean[tracker.by_token.count > 0].isfinite().all())
    assert int(tracker.by_position.count[0]) == 2  # rows 1 and 2; row 0 is NaN, row 3 has no action


def test_all_masked_and_no_rows():
    model = Recurrent()
    tracker = CausalityTracker(model)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with tracker.observe(ids, torch.zeros_like(ids)):
        model(ids).sum().backward()
    assert int(tracker.by_token.count.sum()) == 0


def test_misuse_of_observe_is_refused():
    model, ids, actions = Recurrent(), *_batch()[::2]
    tracker = CausalityTracker(model)
    outside = pytest.raises(RuntimeError, match="observe must enclose the forward and the backward")
    with outside, tracker.observe(ids, actions):
        later = loss(model, ids, actions)
    later.backward()
    text = r"input_ids must be \[4, 5\] like what the model embeds, got \[4, 9\]"
    with pytest.raises(ValueError, match=text), tracker.observe(ids, actions):
        model(ids[:, :5])
    with pytest.raises(ZeroDivisionError), tracker.observe(ids, actions):
        raise ZeroDivisionError
    assert not model.embed._forward_hooks


# ---- scores for credit -----------------------------------------------------------------------------------------


def test_score_batch_equals_the_reference_and_ignores_padding(policy):
    model, _ = policy
    tracker, slow = CausalityTracker(model), reference.Tracker(model)
    ids, attention, actions = _batch()
    scores = tracker.score_batch(ids, attention.long(), actions)
    assert (scores.shape, scores.dtype) == (ids.shape, torch.float64)
    assert bool((scores[~attention] == 0).all())
    for row in range(len(ids)):
        length = int(attention[row].sum())
        expected = slow.score(ids[row, :length], actions[row, :length])
        torch.testing.assert_close(scores[row, :length], expected, **CLOSE)


def test_score_batch_leaves_the_model_as_it_was(policy):
    model, _ = policy
    ids, attention, actions = _batch()
    tracker = CausalityTracker(model)
    expected = tracker.score_batch(ids, attention.long(), actions)
    model.train()
    with torch.no_grad():
        scores = tracker.score_batch(ids, attention.long(), actions)
    assert torch.equal(scores, expected)  # in training mode dropout would show
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not tracker.policy.embedding._forward_hooks


def test_score_batch_of_nothing():
    tracker = CausalityTracker(Recurrent())
    empty = torch.zeros(0, 4, dtype=torch.int64)
    assert tracker.score_batch(empty, None, empty.bool()).shape == (0, 4)
    ids = torch.ones(2, 4, dtype=torch.int64)
    assert bool((tracker.score_batch(ids, None, torch.zeros_like(ids)) == 0).all())
