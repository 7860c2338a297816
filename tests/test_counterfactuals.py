"""Interventions of every kind equal brute force, one forward of a whole sequence at a time, and the reference."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from react_fast import reference
from react_fast.envs import ground_truth
from react_fast.envs.slot_models import Writer
from react_fast.tracker import (
    CausalityTracker,
    Deletion,
    DonorSwap,
    Replacement,
    Resample,
    Return,
    TargetLogprob,
)

from .policies import CLOSE, PROMPT, RESPONSE, Brute, FirstToken, Recurrent, family

# Long enough for the shared beginning to come from the key/value cache.
LONG = [3 + (7 * i) % 50 for i in range(14)]


pytestmark = pytest.mark.usefixtures("one_thread")


def _instead(brute, kind, ids, span, sample):
    if isinstance(kind, Resample):
        return brute.draw(ids[: span[0]], 2**32 + sample, span[1] - span[0])
    if isinstance(kind, DonorSwap):
        return list(kind.donors[sample % len(kind.donors)])
    return kind.replacement(ids[span[0] : span[1]])


KINDS = [Deletion(), Replacement(5), Resample(3), DonorSwap([[9], [10, 11, 12]])]
# Every kind on one family, every family at least once.
CASES = [("llama", kind) for kind in KINDS] + [("qwen2", KINDS[0]), ("gpt2", KINDS[2])]
NAMES = [f"{name}-{type(kind).__name__}" for name, kind in CASES]
SPANS = [(2, 3), (10, 14), (15, 17), (17, 18)]


def _reward(ids):
    return sum(ids) % 7 + 0.5 * len(ids)


@pytest.mark.parametrize(("name", "kind"), CASES, ids=NAMES)
def test_effects_on_a_fixed_response_equal_brute_force(name, kind):
    model = family(name)
    tracker, brute = CausalityTracker(model, seed=4), Brute(model, 4)
    ids, target = LONG + RESPONSE, [8, 13]
    size = len(LONG)
    counts = {Deletion: 1, Replacement: 1, Resample: 3, DonorSwap: 2}
    for outcome in ("logprob", TargetLogprob(target), _reward):
        effects = tracker.intervene(LONG, RESPONSE, SPANS, outcome, counterfactual=kind)
        assert effects.values.shape == (len(SPANS), counts[type(kind)])
        slow = reference.Tracker(model, seed=4).intervene(LONG, RESPONSE, SPANS, outcome, counterfactual=kind)
        np.testing.assert_allclose(effects.values, slow, **CLOSE)
        for i, (start, end) in enumerate(SPANS):
            for s in range(effects.values.shape[1]):
                new = _instead(brute, kind, ids, (start, end), s)
                changed = ids[:start] + new + ids[end:]
                behind = len(ids) - max(end, size)
                if outcome == "logprob":
                    pair = [brute.score(row, len(row) - behind) for row in (ids, changed)]
                elif outcome is _reward:
                    pair = [
                        _reward(RESPONSE),
                        _reward(changed[size if start >= size else len(changed) - 4 :]),
                    ]
                else:
                    pair = [brute.score(row + target, len(row)) for row in (ids, changed)]
                np.testing.assert_allclose(float(effects.values[i, s]), pair[0] - pair[1], **CLOSE)


@pytest.mark.parametrize(("name", "kind"), CASES, ids=NAMES)
def test_effects_on_rerolled_responses_equal_brute_force(name, kind):
    model = family(name)
    tracker, brute = CausalityTracker(model, seed=4), Brute(model, 4)
    ids, target, size = LONG + RESPONSE, [8, 13], len(LONG)
    for outcome in ("logprob", TargetLogprob(target), _reward):
        options = {"counterfactual": kind, "max_new_tokens": 3}
        effects = tracker.intervene(LONG, RESPONSE, SPANS, outcome, 2, **options)
        slow = reference.Tracker(model, seed=4).intervene(LONG, RESPONSE, SPANS, outcome, 2, **options)
        np.testing.assert_allclose(effects.values, slow, **CLOSE)
        for i, (start, end) in enumerate(SPANS):
            for s in range(2):
                before = ids[: max(end, size)]
                new = _instead(brute, kind, ids, (start, end), s)
                after = before[:start] + new + before[end:]
                first = size if start >= size else len(after)
                drawn, other = brute.draw(before, s, 3), brute.draw(after, s, 3)
                if outcome == "logprob":
                    pair = [brute.score(row + drawn, len(row)) for row in (before, after)]
                elif outcome is _reward:
                    pair = [_reward((before + drawn)[size:]), _reward((after + other)[first:])]
                else:
                    rows = before + drawn, after + other
                    pair = [brute.score(row + target, len(row)) for row in rows]
                np.testing.assert_allclose(float(effects.values[i, s]), pair[0] - pair[1], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("samples", [None, 2])
def test_the_cache_changes_no_effect_and_saves_tokens(attention, samples):
    model = family("llama", attention)
    tracker, slow = CausalityTracker(model), reference.Tracker(model)
    found = tracker.intervene(LONG, RESPONSE, samples=samples)
    expected = slow.intervene(LONG, RESPONSE, samples=samples)
    torch.testing.assert_close(found.values, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    without = 18 * (18 + 17) if samples is None else 2 * 18 * 2 * (14 + 4)
    assert 0 < found.tokens < without


def test_an_adapter_is_intervened_on_with_the_cache():
    from peft import LoraConfig, get_peft_model

    options = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(family("llama"), LoraConfig(**options)).double()
    found = CausalityTracker(model).intervene(LONG, RESPONSE)
    expected = reference.Tracker(model).intervene(LONG, RESPONSE)
    torch.testing.assert_close(found.values, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    assert found.tokens < 18 * (18 + 17)


def test_bfloat16_agrees_with_float32_to_its_precision():
    model = family("qwen2").float()
    exact = CausalityTracker(model).intervene(LONG, RESPONSE).mean
    rough = CausalityTracker(model.bfloat16()).intervene(LONG, RESPONSE).mean
    # Log-probabilities of about 5 nats carry 2^-8 of rounding each, four of them in each of two sums.
    assert float((exact - rough).abs().max()) < 0.5
    assert np.corrcoef(exact, rough)[0, 1] > 0.99


def test_resampling_what_the_policy_would_say_has_no_mean_effect():
    """Over redrawn actions the effect of an action averages to its advantage, and that to 0 over the policy."""
    torch.manual_seed(0)
    model = FirstToken().double()
    tracker = CausalityTracker(model)
    brute = Brute(model, 11)
    means = []
    for s in range(40):
        drawn = brute.draw([4], s, 3)
        effects = tracker.intervene(
            [4], drawn, [(1, 2)], lambda ids: float(ids[0]), 6, counterfactual=Resample(), max_new_tokens=1
        )
        means.append(float(effects.mean[0]))
    assert abs(np.mean(means)) < 3 * np.std(means) / np.sqrt(len(means))


# ---- actions ---------------------------------------------------------------------------------------------------

TEXT = "Say it. \nOne, two.\n\nThen three! So 12 and 4."
NAMED = {
    "sentence": ["Say it. \n", "One, two.\n\n", "Then three! ", "So 12 and 4."],
    "line": ["Say it. \n", "One, two.\n\n", "Then three! So 12 and 4."],
    "step": ["Say it. \n", "One, two.\n\n", "Then three! So 12 and 4."],
}


def _letters():
    """One token a character."""
    return SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)), eos_token_id=None)


class Flat(torch.nn.Module):
    """Every token alike."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(128, 1)

    def forward(self, ids):
        return torch.zeros(*ids.shape, 128)


def _named(actions, prompt=TEXT[:9], response=TEXT[9:]):
    tracker = CausalityTracker(Flat(), _letters())
    effects = tracker.intervene([ord(c) for c in prompt], [ord(c) for c in response], actions)
    return [(prompt + response)[start:end] for start, end in effects.spans]


@pytest.mark.parametrize("actions", ["sentence", "line", "step"])
def test_pieces_of_a_text(actions):
    # The prompt is one piece, whose deletion would leave nothing to continue from.
    assert _named(actions) == NAMED[actions][1:]


def test_words_and_matches():
    # Each blank begins a word of its own, where one character is a token.
    assert _named("word") == _named("span")
    assert _named("word", "a b", "c d e") == ["a", " b", "c", " d", " e"]
    assert _named(re.compile(r"\d+|three")) == ["three", "12", "4"]
    assert _named(re.compile(r"t\. |O")) == ["t. ", "O"]


def test_steps_are_lines_where_no_line_is_blank():
    assert _named("step", "Q:", "a=1\nb=2\nc") == ["a=1\n", "b=2\n", "c"]
    assert _named("step", "Q:", "a=1\nb=2\n\nc") == ["a=1\nb=2\n\n", "c"]


def test_tokens_that_hold_the_end_of_a_piece_and_more_belong_to_it():
    texts = {0: "One", 1: ".\nTwo", 2: " three.", 3: "\n"}
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(texts[i] for i in ids), eos_token_id=None)
    tracker = CausalityTracker(Flat(), tokenizer)
    assert tracker.intervene([3, 3], [0, 1, 2, 3, 0], "line").spans == ((2, 4), (4, 6), (6, 7))
    assert tracker.intervene([3, 3], [0, 1, 2], re.compile("One.|Two")).spans == ((2, 4),)


def test_turns():
    tracker = CausalityTracker(FirstToken())
    effects = tracker.intervene([4, 5], [6, 7, 8, 9], "turn", turn_index=[0, 0, 0, 1, 1, 2])
    assert effects.spans == ((2, 3), (3, 5), (5, 6))


def test_special_tokens_are_left_out_on_request():
    tokenizer = SimpleNamespace(decode=lambda ids: " x", eos_token_id=3, all_special_ids=[1, 3])
    tracker = CausalityTracker(FirstToken(), tokenizer)
    for actions in ("token", "word"):
        effects = tracker.intervene([1, 5], [6, 3], actions, skip_special=True)
        assert effects.spans == ((1, 2), (2, 3))
    assert tracker.intervene([1, 5], [6, 3], [(0, 1)], skip_special=True).spans == ((0, 1),)


# ---- outcomes, budget, correction ------------------------------------------------------------------------------


def test_a_return_is_discounted():
    effects = CausalityTracker(FirstToken()).intervene(
        [4], [2, 3, 5], outcome=Return(lambda ids: [float(i) for i in ids], gamma=0.5)
    )
    whole = 2 + 1.5 + 1.25
    assert effects.mean.tolist() == [whole - (3 + 2.5), whole - (2 + 2.5), whole - (2 + 1.5)]


def test_the_budget_bounds_what_the_policy_computes():
    tracker = CausalityTracker(Recurrent())
    free = tracker.intervene(PROMPT, RESPONSE, outcome=_reward, samples=8)
    # 3 prompt and 4 response tokens; 2 sides, each up to the action and 4 new tokens.
    each = 2 * (3 * (3 + 4) + sum(place + 4 for place in (4, 5, 6, 7)))
    bound = tracker.intervene(PROMPT, RESPONSE, outcome=_reward, samples=8, max_tokens=5 * each + 1)
    assert bound.values.shape == (7, 5)
    assert torch.equal(bound.values, free.values[:, :5])
    text = rf"max_tokens must be at least {2 * each} for 7 actions, got 10"
    with pytest.raises(ValueError, match=text):
        tracker.intervene(PROMPT, RESPONSE, outcome=_reward, samples=8, max_tokens=10)


def test_the_correction_for_any_dependence_discovers_less():
    truth = ground_truth(12, causes=4, mediated=0, confounded=2, noise=0.6)
    found = []
    for correction in ("benjamini_hochberg", "benjamini_yekutieli"):
        rng = np.random.default_rng(1)
        effects = CausalityTracker(Writer(truth)).intervene(
            truth.encode("!"),
            truth.encode("bdfhjlnprtvx"),
            [(i, i + 1) for i in range(1, 13)],
            lambda ids, rng=rng: truth.reward(truth.decode(ids), 1, rng),
            8,
            counterfactual=Replacement(truth.neutral_id),
            correction=correction,
        )
        found.append(int(effects.significant.sum()))
    assert 0 < found[1] < found[0]


REFUSED = [
    (lambda t: t.intervene([1], [2], "sentence"), ValueError, "tokenizer must be given to the tracker"),
    (lambda t: t.intervene([1], [2], "turn"), ValueError, "turn_index must be given for actions 'turn'"),
    (
        lambda t: t.intervene([1], [2], "turn", turn_index=[0]),
        ValueError,
        r"turn_index must be \[2\] like prompt and response, got \[1\]",
    ),
    (
        lambda t: t.intervene([1], [2], counterfactual="delete"),
        TypeError,
        r"counterfactual must have a method replacement\(tokens\), got 'delete'",
    ),
    (
        lambda t: t.intervene([1], [2], counterfactual=Replacement(50)),
        IndexError,
        r"counterfactual must hold ids in \[0, 50\), got 50",
    ),
    (
        lambda t: t.intervene([1], [2], [(0, 1)], counterfactual=Resample()),
        ValueError,
        r"actions\[0\] must leave a prompt token to continue from, got \(0, 1\)",
    ),
    (
        lambda t: t.intervene([1], [2], outcome=TargetLogprob([50])),
        IndexError,
        r"outcome must have token_ids in \[0, 50\), got 50",
    ),
    (lambda t: t.intervene([1], [2], correction="holm"), ValueError, "correction must be one of 'benjamini"),
    (lambda t: t.intervene([1], [2], max_tokens=0), ValueError, "max_tokens must be at least 1, got 0"),
    (lambda t: TargetLogprob([]), ValueError, "token_ids must hold at least one token, got none"),
    (lambda t: DonorSwap([[1], []]), ValueError, r"donors must hold .* got \[\[1\], \[\]\]"),
    (lambda t: Resample(0), ValueError, "draws must be at least 1, got 0"),
    (lambda t: Return(sum, gamma=2.0), ValueError, r"gamma must be in \[0, 1\], got 2"),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call(CausalityTracker(FirstToken()))
    assert "\n" not in str(caught.value)
