"""The tracker's findings, its state and their merge; what it refuses."""

import json
import pickle

import pytest
import torch
from torch import nn

from react_fast.tracker import CausalityTracker
from react_fast.trainer.state import join, split

from .policies import CLOSE, FirstToken, Recurrent, observe, transformer

# ---- findings and state ----------------------------------------------------------------------------------------


def _used_tracker(model, tokenizer, seed=0):
    tracker = CausalityTracker(model, tokenizer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for width in (6, 9):
        ids = torch.randint(3, 30, (8, width), generator=generator)
        observe(tracker, ids, torch.ones_like(ids))
    tracker.explain([f"hello world {seed}"], ["guten Tag"])
    return tracker


def test_key_features_are_those_farthest_from_zero():
    tracker = CausalityTracker(Recurrent())
    ids = torch.tensor([7, 8, 9, 10]).repeat(50)
    noise = torch.randn(200, dtype=torch.float64)
    means = torch.tensor([0.0, 2.0, -5.0, 0.1], dtype=torch.float64).repeat(50)
    tracker.by_token.update(noise + means, ids)
    tracker.by_token.update(torch.tensor([99.0, 98.0], dtype=torch.float64), torch.tensor([11, 11]))
    found = tracker.key_features(3)
    assert [one.ids for one in found[:2]] == [(9,), (8,)]
    assert [one.direction for one in found[:2]] == ["lowers", "raises"]
    assert [one.significant for one in found[:2]] == [True, True]
    assert all(
        one.low < one.mean < one.high and one.count == 50 and one.kind == "attribution" for one in found
    )
    assert tracker.key_features(1, min_count=2)[0].ids == (11,)
    assert tracker.key_features(5, kind="effect") == []


def test_state_survives_json_and_tensors():
    model, tokenizer = transformer()
    tracker = _used_tracker(model, tokenizer)
    rest, tensors = split(tracker.state_dict(), "tracker")
    other = CausalityTracker(model, tokenizer)
    other.load_state_dict(join(json.loads(json.dumps(rest, allow_nan=False)), tensors))
    assert repr(other.findings()) == repr(tracker.findings())  # a drift that is not known is NaN
    for one in (tracker, other):
        ids = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(9))
        observe(one, ids, torch.ones_like(ids))
    assert repr(other.findings()) == repr(tracker.findings())  # a drift that is not known is NaN


def test_merged_trackers_equal_one_that_saw_both():
    model, tokenizer = transformer()
    model = model.double()
    parts = [_used_tracker(model, tokenizer, seed) for seed in (0, 1)]
    whole = CausalityTracker(model, tokenizer)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        for width in (6, 9):
            ids = torch.randint(3, 30, (8, width), generator=generator)
            observe(whole, ids, torch.ones_like(ids))
        whole.explain([f"hello world {seed}"], ["guten Tag"])
    parts[0].merge(parts[1])
    for name in ("by_token", "by_position", "effects_by_token"):
        merged, expected = getattr(parts[0], name), getattr(whole, name)
        size = min(len(merged.count), len(expected.count))
        assert torch.equal(merged.count[:size], expected.count[:size])
        torch.testing.assert_close(merged.mean[:size], expected.mean[:size], equal_nan=True, **CLOSE)
        torch.testing.assert_close(merged.variance[:size], expected.variance[:size], equal_nan=True, **CLOSE)
    assert [row.example for row in parts[0].effects] == [row.example for row in whole.effects]
    assert parts[0].heat_maps == whole.heat_maps
    assert parts[0].calls == whole.calls


@pytest.mark.parametrize("widths", [(6, 9), (9, 6)])
def test_trackers_of_other_lengths_merge(widths):
    model = Recurrent()
    left, right = CausalityTracker(model), CausalityTracker(model)
    for tracker, width in zip((left, right), widths, strict=True):
        ids = torch.ones(2, width, dtype=torch.int64)
        observe(tracker, ids, ids)
    left.merge(right)
    assert left.by_position.count[:9].tolist() == [4] * 5 + [2] * 3 + [0]
    assert right.by_position.count.sum() == 2 * (widths[1] - 1)


def test_explain_generates_greedily_where_no_response_is_given():
    model, tokenizer = transformer()
    tracker = CausalityTracker(model, tokenizer)
    tracker.explain(["hello", "one two"], max_new_tokens=5)
    for heat_map, prompt in zip(tracker.heat_maps, ("hello", "one two"), strict=True):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        expected = model.generate(**ids, do_sample=False, max_new_tokens=5, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ]
        assert list(heat_map.response_tokens) == tracker.texts(expected.tolist())
        assert "".join(heat_map.prompt_tokens) == prompt == heat_map.title
        assert len(heat_map.scores) == len(heat_map.response_tokens)
        assert {len(row) for row in heat_map.scores} == {
            len(heat_map.prompt_tokens) + len(heat_map.response_tokens)
        }
    assert {row.example for row in tracker.effects} == {0, 1}
    assert json.loads(json.dumps(tracker.state_dict()["effects"], allow_nan=False))


def test_findings_are_plain_values():
    model, tokenizer = transformer()
    found = _used_tracker(model, tokenizer).findings()
    assert set(found) == {"features", "by_position", "heat_maps", "effects", "meta"}
    assert {one.kind for one in found["features"]} >= {"attribution"}
    assert [one.position for one in found["by_position"]] == list(
        range(8)
    )  # the last of 9 influences nothing
    json.dumps(found["meta"])


@pytest.mark.parametrize("kind", ["page", "json", "pickle", "torch", "empty"])
def test_a_file_of_another_kind_is_refused(kind, tmp_path):
    path = tmp_path / "other"
    wrote = {"page": b"<!doctype html>", "json": b'{"version": 2}', "pickle": pickle.dumps({"calls": 1}, 2)}
    path.write_bytes(wrote.get(kind, b""))
    if kind == "torch":
        torch.save([1], path)
    with pytest.raises(ValueError, match="other must be a file that CausalityTracker") as caught:
        CausalityTracker(FirstToken()).merge(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _without(state, *path):
    for name in path[:-1]:
        state = state[name]
    del state[path[-1]]


BROKEN = {
    "key": (lambda s: _without(s, "tested", "spans", "votes"), "got one without 'votes'"),
    "record": (lambda s: s["effects"][0].update(more=1), "got another: .*more"),
    "dtype": (
        lambda s: s["tested"]["spans"].update(keys=torch.zeros(512)),
        "got another: keys must be int64",
    ),
    "size": (lambda s: s["tested"]["tokens"].update(keys=torch.zeros(9).long()), r"keys must be \[1024\]"),
    "kind": (lambda s: s.update(observed=3), "got another: "),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_state_is_refused_and_changes_nothing(broken):
    torch.manual_seed(0)
    tracker, other = CausalityTracker(Recurrent()), CausalityTracker(Recurrent())
    tracker.add_example([1, 2], [3, 4])
    other.add_example([5, 6, 7], [8])
    state, before = other.state_dict(), repr(tracker.state_dict())
    change, text = BROKEN[broken]
    change(state)
    with pytest.raises(ValueError, match=text) as caught:
        tracker.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert repr(tracker.state_dict()) == before


# ---- bad input -------------------------------------------------------------------------------------------------

IDS = torch.ones(2, 4, dtype=torch.int64)
REFUSED = [
    (
        lambda t: t.key_features(kind="cause"),
        ValueError,
        "kind must be one of 'attribution', 'effect', 'return_effect', got 'cause'",
    ),
    (lambda t: t.key_features(min_count=1), ValueError, "min_count must be at least 2, got 1"),
    (
        lambda t: t.explain(["a"]),
        ValueError,
        "tokenizer must be given to the tracker to explain texts, got None",
    ),
    (lambda t: t.score_batch(IDS[0], None, IDS[0]), ValueError, r"input_ids must be \[B, T\], got \[4\]"),
    (
        lambda t: t.score_batch(IDS.float(), None, IDS),
        TypeError,
        "input_ids must be int64 or int32, got float32",
    ),
    (
        lambda t: t.score_batch(IDS, None, IDS[:, 1:]),
        ValueError,
        r"action_mask must be \[2, 4\] like input_ids",
    ),
    (
        lambda t: t.score_batch(IDS, IDS[:1], IDS),
        ValueError,
        r"attention_mask must be \[2, 4\] like input_ids",
    ),
    (lambda t: t.observe(IDS[0], IDS[0]).__enter__(), ValueError, r"input_ids must be \[B, T\], got \[4\]"),
    (
        lambda t: t.observe(IDS, IDS.float()).__enter__(),
        TypeError,
        "action_mask must be bool or an integer 0/1",
    ),
    (
        lambda t: t.observe(IDS, IDS[:, 1:]).__enter__(),
        ValueError,
        r"action_mask must be \[2, 4\] like input_ids",
    ),
    (
        lambda t: t.observe(IDS, IDS.to("meta")).__enter__(),
        ValueError,
        "action_mask must be on cpu like input_ids",
    ),
    (lambda t: t.observe(IDS, IDS, step=-1).__enter__(), ValueError, "step must be at least 0, got -1"),
    (
        lambda t: t.observe(IDS, IDS, group_index=torch.tensor([0, 2])).__enter__(),
        IndexError,
        r"group_index must be in \[0, 0\), got 0",
    ),
    (
        lambda t: t.observe(IDS, IDS, group_index=IDS).__enter__(),
        ValueError,
        r"group_index must be \[2\] like input_ids",
    ),
    (
        lambda t: t.add_return_effects([], [], [], [], unit="letter", step=0),
        ValueError,
        "unit must be one of 'token', .*, got 'letter'",
    ),
    (
        lambda t: t.add_return_effects([], [], [], [], unit="word", step=0, group=0),
        IndexError,
        r"group must be in \[0, 0\), got 0",
    ),
    (lambda t: t.intervene([1], [2], group=1), IndexError, r"group must be in \[0, 0\), got 1"),
    (
        lambda t: t.key_features(families=("word",)),
        ValueError,
        "families must be one of 'token', .*, got 'word'",
    ),
    (
        lambda t: t.merge(CausalityTracker(FirstToken(), decay=0.5)),
        ValueError,
        "other must have decay 1.0 like this tracker, got 0.5",
    ),
    (
        lambda t: t.merge(CausalityTracker(FirstToken(), groups=["a"])),
        ValueError,
        r"other must have groups \[\] like this tracker, got \['a'\]",
    ),
    (
        lambda t: t.key_features(families=("token", "token")),
        ValueError,
        "families must differ from each other",
    ),
    (
        lambda t: t.merge(__file__),
        ValueError,
        r"other must be a file that CausalityTracker.save wrote, got .*py",
    ),
    (lambda t: t.merge(3), TypeError, "other must be a CausalityTracker, got int"),
    (
        lambda t: t.merge(CausalityTracker(nn.Embedding(9, 2))),
        ValueError,
        "other must have 50 tokens like this tracker, got 9",
    ),
    (
        lambda t: t.load_state_dict({}),
        ValueError,
        "state must be a tracker's state_dict, got one without 'calls'",
    ),
    (
        lambda t: t.load_state_dict(CausalityTracker(nn.Embedding(9, 2)).state_dict()),
        ValueError,
        "state must have 50 tokens like this tracker, got 9",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call(CausalityTracker(FirstToken()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"model": "gpt"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, r"exactly one nn.Embedding, got 0"),
        ({"attribution": "lime"}, ValueError, "attribution must be one of 'grad_x_input', .*, got 'lime'"),
        ({"interventions": "delete"}, TypeError, r"interventions must have a method replacement\(tokens\)"),
        ({"groups": "task"}, TypeError, "groups must be a list of names, got 'task'"),
        ({"groups": 3}, TypeError, "groups must be a list of names, got 3"),
        ({"groups": ["a", "a"]}, ValueError, r"groups must differ from each other, got \['a', 'a'\]"),
        ({"decay": 0}, ValueError, r"decay must be a number in \(0, 1\], got 0"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got float"),
    ],
)
def test_bad_construction_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        CausalityTracker(**({"model": Recurrent()} | options))
