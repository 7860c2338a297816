"""Attribution and interventions: equal the reference, and find the causes of known models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from react_fast import reference, token_logprobs
from react_fast.tracker import CausalityTracker, Replacement

from .policies import CLOSE, PROMPT, RESPONSE, FirstToken, Recurrent, assert_moments, both, transformer

# Norms compute in float32 whatever the model's dtype, and from the zero vector they amplify it.
LOOSE = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["recurrent", "transformer"])
def policy(request):
    return both(request.param)


# ---- attribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["response", "token", lambda logits: logits[4, 11] - logits[2, 12]])
def test_attribution_equals_the_reference(policy, target):
    model, _ = policy
    found = CausalityTracker(model).attribute(PROMPT, RESPONSE, target)
    expected = reference.Tracker(model).attribute(PROMPT, RESPONSE, target)
    torch.testing.assert_close(found.scores, expected, **CLOSE)
    assert found.token_ids == (*PROMPT, *RESPONSE)
    assert found.prompt_length == 3


@pytest.mark.parametrize("target", ["response", "token"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "saliency"},
        {"method": "integrated_gradients", "steps": 5},
        {"method": "integrated_gradients", "steps": 3, "baseline": 8, "inputs": "prompt"},
    ],
    ids=["saliency", "zero baseline", "token baseline"],
)
def test_every_method_equals_the_reference(policy, target, options):
    model, _ = policy
    found = CausalityTracker(model).attribute(PROMPT, RESPONSE, target, **options).scores
    expected = reference.Tracker(model).attribute(PROMPT, RESPONSE, target, **options)
    torch.testing.assert_close(found, expected, **LOOSE)


def test_a_heat_map_sums_to_the_response_and_looks_back_only(policy):
    model, _ = policy
    tracker = CausalityTracker(model)
    whole = tracker.attribute(torch.tensor(PROMPT), RESPONSE)
    rows = tracker.attribute(PROMPT, RESPONSE, "token")
    torch.testing.assert_close(rows.scores.sum(0), whole.scores, **CLOSE)
    torch.testing.assert_close(rows.outcome.sum(), whole.outcome, **CLOSE)
    place = torch.arange(7)
    assert bool((rows.scores[place >= torch.arange(3, 7)[:, None]] == 0).all())
    assert bool((rows.scores[:, 0] != 0).all())
    ids = torch.tensor([PROMPT + RESPONSE])
    actions = torch.arange(7)[None] >= 3
    torch.testing.assert_close(tracker.score_batch(ids, None, actions)[0], whole.scores, **CLOSE)


def test_a_long_heat_map_is_computed_in_parts():
    model = Recurrent().double()
    response = torch.randint(0, 50, (70,)).tolist()
    found = CausalityTracker(model).attribute(PROMPT, response, "token")
    assert found.scores.shape == (70, 73)
    expected = CausalityTracker(model).attribute(PROMPT, response)
    torch.testing.assert_close(found.scores.sum(0), expected.scores, **CLOSE)


# ---- interventions ---------------------------------------------------------------------------------------------


def _reward(ids):
    return sum(ids) % 7 + 0.5 * len(ids)


@pytest.mark.parametrize(
    "actions", ["token", [(0, 2), (1, 4), (3, 5), (3, 7), (6, 7)]], ids=["token", "spans"]
)
@pytest.mark.parametrize("outcome", ["logprob", _reward])
@pytest.mark.parametrize("samples", [None, 3])
def test_effects_equal_the_reference(policy, actions, outcome, samples):
    model, tokenizer = policy
    tracker = CausalityTracker(model, tokenizer, seed=5)
    slow = reference.Tracker(model, tokenizer, seed=5)
    found = tracker.intervene(PROMPT, RESPONSE, actions, outcome, samples, max_new_tokens=4)
    expected = slow.intervene(PROMPT, RESPONSE, actions, outcome, samples, max_new_tokens=4)
    torch.testing.assert_close(found.values, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(found.mean, found.values.mean(1), **CLOSE)
    assert_moments(tracker.effects_by_token, slow.effects_by_token)


def test_deleting_what_no_choice_hangs_on_has_exactly_no_effect():
    """Under the same noise a continuation changes only if its cause does."""
    torch.manual_seed(0)
    tracker = CausalityTracker(FirstToken().double())
    prompt, response = [4, 8, 9], [10, 11, 12]
    for outcome in ("logprob", lambda ids: float(sum(ids))):
        effects = tracker.intervene(prompt, response, outcome=outcome, samples=40)
        assert effects.spans == tuple((i, i + 1) for i in range(6))
        in_prompt = effects.values[1:3]
        assert bool((in_prompt == 0).all())
        assert float(effects.values[0].std()) > 0
    # log p(response | first token) is a divergence in expectation: positive, and seen as such.
    effects = tracker.intervene(prompt, response, samples=40)
    assert float(effects.low[0]) > 0
    assert effects.significant.tolist() == [True, False, False, False, False, False]


def test_a_reward_of_one_token_is_the_effect_of_that_token():
    tracker = CausalityTracker(FirstToken())
    effects = tracker.intervene([4, 8], [10, 11, 12], outcome=lambda ids: float(11 in ids))
    assert effects.mean.tolist() == [0, 0, 0, 1, 0]
    assert torch.equal(effects.low, effects.mean)
    assert bool(effects.p_value.isnan().all())


def test_a_response_that_has_ended_is_not_continued(policy):
    model, tokenizer = policy
    if tokenizer is None:
        return
    seen = []
    tracker = CausalityTracker(model, tokenizer)
    response = [9, 40, tokenizer.eos_token_id]
    tracker.intervene(PROMPT, response, [(5, 6)], lambda ids: seen.append(ids) or 0.0, samples=2)
    assert seen[:2] == [response, response]  # as it is
    assert all(ids[:2] == [9, 40] and len(ids) > 2 for ids in seen[2:])  # without its end it goes on


def test_a_continuation_ends_with_its_first_end_token():
    torch.manual_seed(0)
    model = FirstToken().double()
    with torch.no_grad():
        model.table.weight[:, 3] = 5.0  # likely enough to end some early, not all at once
    tracker = CausalityTracker(model, SimpleNamespace(eos_token_id=3, decode=str))
    slow = reference.Tracker(model, SimpleNamespace(eos_token_id=3))
    seen = []
    effects = tracker.intervene(
        [4, 5],
        [6, 7],
        [(0, 1), (1, 2)],
        lambda ids: seen.append(ids) or len(ids),
        samples=20,
        max_new_tokens=9,
    )
    assert {ids[-1] for ids in seen if len(ids) < 9} == {3}
    assert max(ids.count(3) for ids in seen) == 1
    assert len({len(ids) for ids in seen}) > 2
    expected = slow.intervene([4, 5], [6, 7], [(0, 1), (1, 2)], len, samples=20, max_new_tokens=9)
    assert effects.values.tolist() == expected


def test_samples_are_keyed():
    model = Recurrent()
    effects = [CausalityTracker(model, seed=seed).intervene(PROMPT, RESPONSE, samples=n).values
               for seed, n in ((0, 5), (0, 3), (1, 3))]  # fmt: skip
    # Fewer rows may sum in another order inside float32 products, hence not bitwise.
    torch.testing.assert_close(effects[0][:, :3], effects[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(effects[1], effects[2])


def test_intervals_hold_the_mean_and_bootstrap_is_another():
    tracker = CausalityTracker(Recurrent())
    student = tracker.intervene(PROMPT, RESPONSE, samples=6)
    bootstrap = tracker.intervene(PROMPT, RESPONSE, samples=6, interval="bootstrap")
    assert torch.equal(student.values, bootstrap.values)
    for i, row in enumerate(student.values.numpy()[:3]):  # behind the response's last token all is 0
        expected = stats.ttest_1samp(row, 0).confidence_interval(0.95)
        np.testing.assert_allclose([student.low[i], student.high[i]], expected, rtol=1e-12)
    for effects in (student, bootstrap):
        assert bool((effects.low <= effects.mean).all())
        assert bool((effects.mean <= effects.high).all())
    assert not torch.equal(student.low, bootstrap.low)


def test_replacement_keeps_the_places():
    model = Recurrent().double()
    spans = [(i, i + size) for i in range(6) for size in (1, 2)]
    effects = CausalityTracker(model, interventions=Replacement(2)).intervene(PROMPT, RESPONSE, spans)
    ids = torch.tensor([PROMPT + RESPONSE])
    for i, (start, end) in enumerate(spans):
        changed = ids.clone()
        changed[0, start:end] = 2
        logp = [token_logprobs(model(x)[:, :-1], x[:, 1:])[0].detach() for x in (ids, changed)]
        outside = [t - 1 for t in range(3, 7) if not start <= t < end]
        torch.testing.assert_close(effects.mean[i], (logp[0] - logp[1])[outside].sum(), **CLOSE)


def test_words_are_spans_and_the_last_prompt_token_stays():
    model, tokenizer = transformer()
    tracker = CausalityTracker(model, tokenizer)
    prompt, response = tokenizer("hello world")["input_ids"], tokenizer(" guten Tag")["input_ids"]
    effects = tracker.intervene(prompt, response, "span")
    words = ["".join(tracker.texts(effects.token_ids[s:e])) for s, e in effects.spans]
    assert words == ["hello", " world", " guten", " Tag"]
    assert tracker.intervene([5], RESPONSE).spans[0] == (1, 2)
    assert tracker.intervene([5], [6]).spans == ((1, 2),)


# ---- bad input -------------------------------------------------------------------------------------------------

IDS = torch.ones(2, 4, dtype=torch.int64)
REFUSED = [
    (lambda t: t.attribute([], [1]), ValueError, "prompt_ids must hold at least one token, got none"),
    (lambda t: t.attribute([1], []), ValueError, "response_ids must hold at least one token, got none"),
    (lambda t: t.attribute([1], [50]), IndexError, r"response_ids\[0\] must be in \[0, 50\), got 50"),
    (lambda t: t.attribute([1, -1], [5]), IndexError, r"prompt_ids\[1\] must be in \[0, 50\), got -1"),
    (lambda t: t.attribute(["a"], [5]), TypeError, r"prompt_ids\[0\] must be an integer, got 'a'"),
    (
        lambda t: t.attribute(IDS, [5]),
        ValueError,
        r"prompt_ids must be one sequence of token ids, got \[2, 4\]",
    ),
    (lambda t: t.attribute(torch.ones(2), [5]), TypeError, "prompt_ids must be int64 or int32, got float32"),
    (
        lambda t: t.attribute([1], [2], "reward"),
        ValueError,
        "target must be one of 'response', 'token', got 'reward'",
    ),
    (lambda t: t.attribute([1], [2], lambda x: x), ValueError, "target must return a scalar tensor"),
    (lambda t: t.attribute([1], [2], lambda x: 1.0), ValueError, "depends on the logits, got float"),
    (
        lambda t: t.intervene([1], [2], "words"),
        TypeError,
        "actions must be 'token', 'span', 'word', .* or a list",
    ),
    (
        lambda t: t.intervene([1], [2], "span"),
        ValueError,
        "tokenizer must be given to the tracker for actions 'span'",
    ),
    (lambda t: t.intervene([1], [2], [(1, 3)]), IndexError, r"actions\[0\] must be 0 <= start < end <= 2"),
    (lambda t: t.intervene([1], [2], [(1, 2), 3]), TypeError, r"actions\[1\] must be a pair of integers"),
    (lambda t: t.intervene([1], [2], [(0, 1)]), ValueError, r"actions\[0\] must leave a prompt token"),
    (
        lambda t: t.intervene([1], [2], outcome="reward"),
        ValueError,
        "outcome must be 'logprob' or a function",
    ),
    (lambda t: t.intervene([1], [2], samples=1), ValueError, "samples must be at least 2, got 1"),
    (lambda t: t.intervene([1], [2], samples=2.0), TypeError, "samples must be an integer, got float"),
    (lambda t: t.intervene([1], [2], interval="z"), ValueError, "interval must be one of 'student_t'"),
    (
        lambda t: t.intervene([1], [2], max_new_tokens=0),
        ValueError,
        "max_new_tokens must be at least 1, got 0",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call(CausalityTracker(FirstToken()))
    assert "\n" not in str(caught.value)
