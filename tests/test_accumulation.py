"""What a tracker accumulates: by every feature, over training, with decay, across ranks and runs, in one size."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.overrides import TorchFunctionMode

from react_fast.tracker import CausalityTracker, Replacement
from react_fast.tracker.drift import CommonKeys
from react_fast.tracker.features import FAMILIES, Features, Labels
from react_fast.trainer.state import split

from .policies import FirstToken, Recurrent, observe, transformer


def _bytes(tracker):
    """Of all tensors in the state, which are all that grows with what is observed."""
    return sum(tensor.nbytes for tensor in split(tracker.state_dict(), "")[1].values())


def _fed(updates, **options):
    """A tracker that saw this many training steps of 8 random tokens, and one example in 25 steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # thousands of small updates
    tracker = CausalityTracker(FirstToken(), groups=("a", "b"), **options)
    generator = torch.Generator().manual_seed(3)
    for step in range(updates):
        ids = torch.randint(0, 50, (2, 4), generator=generator)
        scores, places = torch.randn(2, 4, generator=generator), torch.arange(4).expand(2, 4)
        tracker._at(step)
        tracker.observed.reach(4)
        groups = torch.tensor([[0] * 4, [1] * 4])
        tracker._observe(step, scores, ids, ids >= 0, places, places >= 2, groups)
        if step % 25 == 0:
            tracker.add_example(ids[0, :2], ids[0, 2:])
    return tracker


def test_memory_does_not_grow_with_the_steps():
    short, long = _fed(10), _fed(1000)
    assert _bytes(short) == _bytes(long)
    assert (len(short.heat_maps), len(long.heat_maps)) == (1, 32)  # of 40 examples the newest
    assert {row.example for row in long.effects} == set(range(32))


def test_features_equal_numpy_over_the_stream():
    model = Recurrent().double()
    tracker = CausalityTracker(model, groups=("first", "second"))
    seen = []
    update = tracker._observe

    def keep(step, scores, ids, counted, *rest):
        seen.append((step, scores.clone(), ids, counted))
        update(step, scores, ids, counted, *rest)

    tracker._observe = keep
    generator = torch.Generator().manual_seed(5)
    for step in range(70):  # more than twice the 32 windows: four steps each
        ids = torch.randint(0, 6, (4, 6), generator=generator)
        actions = torch.zeros_like(ids)
        actions[:, 3:] = 1
        observe(tracker, ids, actions, step=step, group_index=torch.tensor([0, 1, 1, 0]))
    when = np.concatenate([np.full((4, 5), step) for step, *_ in seen])
    scores, ids = (torch.cat([row[i][:, :5] for row in seen]).numpy() for i in (1, 2))
    expected = {
        "response token": scores[:, 3:],
        "prompt token": scores[:, :3],
        "second": scores.reshape(70, 4, 5)[:, 1:3],
        "4": scores[ids == 4],
        "2 3": (scores[:, :-1] + scores[:, 1:])[(ids[:, :-1] == 2) & (ids[:, 1:] == 3)],
    }
    families = ("token", "span", "kind", "group")
    found = {one.name: one for one in tracker.key_features(999, families=families, min_count=2)}
    for name, values in expected.items():
        assert found[name].count == values.size
        np.testing.assert_allclose(found[name].mean, values.mean(), rtol=1e-11)
        np.testing.assert_allclose(
            found[name].standard_error, values.std(ddof=1) / values.size**0.5, rtol=1e-9
        )
    # Windows of four steps, 18 of them, and the drift between the first nine and the last.
    token = found["4"]
    assert [(one.first, one.last) for one in token.windows] == [(4 * i, 4 * i + 3) for i in range(18)]
    inside = scores[(ids == 4) & (when // 4 == 2)]
    np.testing.assert_allclose(token.windows[2].mean, inside.mean(), rtol=1e-11)
    early, late = scores[(ids == 4) & (when < 36)], scores[(ids == 4) & (when >= 36)]
    test = stats.ttest_ind(late, early, equal_var=False)
    np.testing.assert_allclose(token.drift, late.mean() - early.mean(), rtol=1e-9)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose([token.drift_low, token.drift_high], [interval.low, interval.high], rtol=1e-9)


def test_effects_by_every_feature():
    model, tokenizer = transformer()
    tracker = CausalityTracker(model.double(), tokenizer, groups=("a", "b"))
    prompt, response = tokenizer("hello world, this")["input_ids"], tokenizer(" is a test")["input_ids"]
    for group in (0, 1):
        words = tracker.intervene(prompt, response, "word", group=group)
    tokens = tracker.intervene(prompt, response, counterfactual=Replacement(5), accumulate=True)
    tracker.intervene(prompt, response, counterfactual=Replacement(5))  # not accumulated by itself
    found = {
        (one.family, one.name): one
        for one in tracker.key_features(
            999, kind="effect", families=("token", "span", "position", "kind", "group"), min_count=2
        )
    }
    means, cut = words.mean.tolist(), len(prompt)
    sides = {
        side: [
            m
            for m, (start, _) in zip(means, words.spans, strict=True)
            if (start >= cut) == (side == "response")
        ]
        for side in ("prompt", "response")
    }
    for side, values in sides.items():
        assert found["kind", f"{side} word"].count == 2 * len(values)
        np.testing.assert_allclose(found["kind", f"{side} word"].mean, np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(found["group", "b"].mean, np.mean(means), rtol=1e-12)
    long = next(i for i, (start, end) in enumerate(words.spans) if end - start > 1)
    text = tokenizer.decode(words.token_ids[slice(*words.spans[long])])
    assert found["span", text].count == 2
    np.testing.assert_allclose(found["span", text].mean, means[long], rtol=1e-12)
    assert int(tracker.effects_by_token.count.sum()) >= len(tokens.spans)


class _OnADevice(TorchFunctionMode):
    """Refuses a new tensor that does not say where it is: it would be on the CPU, whatever the policy is on."""

    made = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.arange, torch.zeros, torch.ones, torch.full, torch.empty):
            assert kwargs.get("device") is not None, func
            self.made += 1
        return func(*args, **kwargs)


def test_what_is_accumulated_is_made_on_the_policys_device():
    tracker = CausalityTracker(FirstToken(), groups=("a",))
    effects = tracker.intervene([1, 2, 5], [3, 4], [(1, 3), (3, 4)], accumulate=False)
    ids = torch.tensor([[1, 2, 3]])
    with _OnADevice() as mode:
        tracker._accumulate(effects, "span", 0)
        with tracker.observe(ids, ids > 0):
            tracker.policy.model(ids).sum().backward()
        tracker.key_features(kind="effect", families=FAMILIES, min_count=2)
        CausalityTracker(tracker.policy.model, groups=("a",)).merge(tracker)
    assert mode.made > 50


def test_the_same_measurement_counts_once_and_proves_nothing():
    torch.manual_seed(0)
    tracker = CausalityTracker(Recurrent().double(), groups=("a", "b"))
    for _ in range(3):
        tracker.intervene([1, 2], [3, 4])
        other = CausalityTracker(tracker.policy.model, groups=("a", "b"))
        other.load_state_dict(tracker.state_dict())
        tracker = other
    assert tracker.effects_by_token.count[:5].tolist() == [0, 1, 1, 1, 1]
    tracker.intervene([1, 2], [3, 4], samples=4)  # another quantity, not accumulated by itself
    assert int(tracker.effects_by_token.count.sum()) == 4
    tracker.intervene([1, 2], [3, 4], group=1)  # the same numbers, but told to be of another group
    found = tracker.key_features(kind="effect", min_count=2)
    assert {one.count for one in found} == {2}
    assert not any(one.significant or one.drift_significant for one in found)
    assert all(np.isnan([one.p_value, one.low, one.high]).all() for one in found)
    for k in range(1200):
        tracker._measured[k] = None
    tracker.intervene([1, 2], [5, 4])
    assert len(tracker.state_dict()["measured"]) == 1024


@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_shards_merge_to_one_pass(decay, tmp_path):
    """Half of each step's rows to each of two trackers, and through a file."""
    generator = torch.Generator().manual_seed(4)
    whole, left, right = (CausalityTracker(FirstToken(), decay=decay) for _ in range(3))
    for step in range(40):
        ids = torch.randint(0, 9, (4, 5), generator=generator)
        scores, places = torch.randn(4, 5, generator=generator).double(), torch.arange(5).expand(4, 5)
        for tracker, rows in ((whole, slice(0, 4)), (left, slice(0, 2)), (right, slice(2, 4))):
            tracker._at(step)
            tracker.observed.reach(5)
            part = [x[rows] for x in (scores, ids, ids >= 0, places, places > 2)]
            tracker._observe(step, *part, None)
    right.save(tmp_path / "right.pt")
    left.merge(tmp_path / "right.pt")
    pairs = list(zip(whole.key_features(99), left.key_features(99), strict=True))
    assert len(pairs) > 20
    for one, other in pairs:
        assert (one.family, one.ids, one.count) == (other.family, other.ids, other.count)
        names = ("mean", "standard_error", "effective_count", "drift", "drift_low")
        expected, found = ([getattr(row, name) for name in names] for row in (one, other))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
        assert [(w.first, w.count) for w in one.windows] == [(w.first, w.count) for w in other.windows]


def test_decay_follows_the_steps_of_training():
    """Two updates at step 0, one at step 3: weights 0.8^3, 0.8^3, 1."""
    tracker = CausalityTracker(FirstToken(), decay=0.8)
    for step, value in ((0, 1.0), (0, 2.0), (3, 5.0)):
        tracker._at(step)
        one = torch.ones(1, 1, dtype=torch.int64)
        tracker._observe(step, torch.full((1, 1), value), one, one > 0, one - 1, one > 0, None)
    weights = np.array([0.8**3, 0.8**3, 1.0])
    np.testing.assert_allclose(
        float(tracker.by_token.mean[1]), weights @ [1, 2, 5] / weights.sum(), rtol=1e-14
    )
    effective = weights.sum() ** 2 / (weights**2).sum()
    np.testing.assert_allclose(float(tracker.by_token.effective_count[1]), effective, rtol=1e-13)


def test_a_commoner_key_takes_the_slot():
    keys, yes = CommonKeys(4, torch.device("cpu")), torch.ones(1, dtype=torch.bool)
    assert keys.slot(torch.tensor([1, 41])).tolist() == [1, int(keys.slot(torch.tensor([41])))]
    rival = next(k for k in range(5, 99) if int(keys.slot(torch.tensor([k]))) == 1)
    stream = [1, rival, rival, rival, 2]
    found = [tuple(bool(x.any()) for x in keys.vote(torch.tensor([k]), yes)[1:]) for k in stream]
    # 1 holds the slot; the first rival's vote leaves it at 0, the second frees it, the third takes it.
    assert found == [(True, False), (False, False), (False, True), (True, False), (True, False)]
    assert keys.keys.tolist()[1:3] == [rival, 2]


def test_what_loses_its_slot_is_forgotten():
    features = Features(2000, 0, torch.device("cpu"))
    features.reach(1)
    zero, yes = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    slot = int(features.tokens.slot(torch.tensor([3])))
    rival = next(k for k in range(1024, 2000) if int(features.tokens.slot(torch.tensor([k]))) == slot)
    for token in (3, rival, rival, rival):
        features.update(0, torch.ones(1), yes, Labels(zero, zero, torch.tensor([token])))
    column = features.first["token"] + slot
    assert int(features.drift.moments.count[column]) == 1  # the rival's last one alone
    assert features.by_token.count[[3, rival]].tolist() == [1, 3]  # the vocabulary's own moments lose nothing


def _gathered(rank, world):
    tracker = _fed(6 + rank, decay=0.9)
    found = tracker.gather()
    one_by_one = _fed(6, decay=0.9)
    for other in range(1, world):
        one_by_one.merge(_fed(6 + other, decay=0.9))
    assert repr(found.findings()) == repr(one_by_one.findings())
    rest, tensors = split(found.state_dict(), "")
    other_rest, other_tensors = split(one_by_one.state_dict(), "")
    assert rest == other_rest
    assert all(torch.equal(tensors[name], value) for name, value in other_tensors.items())
    assert repr(tracker.findings()) == repr(
        _fed(6 + rank, decay=0.9).findings()
    )  # it may go on and gather again


def test_ranks_gather_what_all_found(ranks):
    ranks.run(_gathered)


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_effects_on_the_return_merge_as_if_one_had_seen_all(decay):
    """Two trackers that each got every other response; the numbers of one that got all, and of the formulas."""
    model = Recurrent()
    whole, *parts = (CausalityTracker(model, groups=("a", "b"), decay=decay) for _ in range(3))
    rng, seen = np.random.default_rng(0), []
    for step in range(12):
        effects, tokens = rng.normal(size=4).tolist(), rng.integers(6, size=8).tolist()
        spans, places = [tokens[i : i + 2] for i in range(0, 8, 2)], list(range(0, 8, 2))
        by_token = [
            (effect, token, place + i)
            for effect, span, place in zip(effects, spans, places, strict=True)
            for i, token in enumerate(span)
        ]
        seen += [(step, *row) for row in by_token]
        for one in (whole, parts[step % 2]):
            one.add_return_effects(
                effects, spans, places, by_token, unit="word", step=step, group=step % 3 % 2
            )
    for one in parts:
        one.add_return_effects([], [], [], [], unit="word", step=11)
    parts[0].merge(parts[1])
    expected, found = (
        {
            (row.family, row.ids): row
            for row in one.key_features(999, kind="return_effect", families=FAMILIES, min_count=2)
        }
        for one in (whole, parts[0])
    )
    assert found.keys() == expected.keys()
    assert {family for family, _ in found} == set(FAMILIES)
    for key, row in expected.items():
        other = found[key]
        assert (other.name, other.count) == (row.name, row.count)
        numbers = [(one.mean, one.standard_error, one.low, one.high, one.drift) for one in (other, row)]
        np.testing.assert_allclose(*numbers, rtol=1e-12, atol=1e-12)
    for (family, ids), row in found.items():
        if family in ("token", "token_at_position"):
            chosen = [x for x in seen if x[2:] == ids or (family == "token" and x[2] == ids[0])]
            weights = [decay ** (11 - step) for step, *_ in chosen]
            mean = sum(w * x[1] for w, x in zip(weights, chosen, strict=True)) / sum(weights)
            assert row.count == len(chosen)
            np.testing.assert_allclose(row.mean, mean, rtol=1e-11)
