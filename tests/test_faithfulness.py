"""Faithfulness: equals the loops of the reference, has its closed forms in an additive outcome, and tells effects
from noise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from react_fast import reference
from react_fast.tracker import (
    CausalityTracker,
    DonorSwap,
    Replacement,
    Return,
    TargetLogprob,
    faithfulness,
)
from react_fast.tracker.faithfulness import spearman

from .policies import CLOSE, PROMPT, RESPONSE, FirstToken, Recurrent, family

LONG = [3 + (7 * i) % 47 for i in range(12)]
MEASURES = ("comprehensiveness", "sufficiency", "deletion_auc", "insertion_auc", "infidelity",
            "datamodelling_score", "deletion", "insertion", "features")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def _noise(*shape):
    return np.random.default_rng(5).normal(size=shape)


def _assert_equal(found, expected):
    """Fields of a Faithfulness equal the reference's dictionaries, one a row."""
    rows = found.deletion.dim() == 2
    for name in MEASURES:
        wanted = np.array([row[name] for row in expected], dtype=float)
        np.testing.assert_allclose(getattr(found, name), wanted if rows else wanted[0], **CLOSE)


# ---- the reference ---------------------------------------------------------------------------------------------

OUTCOMES = {
    "logprob": "logprob",
    "target": TargetLogprob([8, 13]),
    "function": lambda ids: float(sum(ids) % 7) + 0.5 * len(ids),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("counterfactual", [None, Replacement(5)], ids=["deletion", "replacement"])
def test_every_measure_equals_the_reference(outcome, samples, counterfactual):
    model = family("llama")
    scores = _noise(len(LONG) + 4)
    options = {"counterfactual": counterfactual, "subsets": 5, "points": 4, "max_new_tokens": 3}
    given = (OUTCOMES[outcome], samples)
    found = faithfulness(
        CausalityTracker(model, seed=4), LONG, RESPONSE, {"noise": scores}, *given, **options
    )
    expected = reference.faithfulness(
        reference.Tracker(model, seed=4), LONG, RESPONSE, scores, *given, **options
    )
    _assert_equal(found["noise"], expected)
    assert len(set(found["noise"].deletion.tolist())) > 1


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "recurrent"])
@pytest.mark.parametrize("inputs", ["all", "prompt"])
def test_rows_of_the_matrix_form_equal_the_reference(name, inputs):
    torch.manual_seed(1)
    model = Recurrent().double() if name == "recurrent" else family(name)
    scores = _noise(4, len(LONG) + 4)
    options = {"subsets": 6, "points": 3, "fractions": [0.3], "inputs": inputs}
    tracker = CausalityTracker(model, seed=2)
    found = faithfulness(tracker, LONG, RESPONSE, {"noise": scores}, **options)["noise"]
    expected = reference.faithfulness(reference.Tracker(model, seed=2), LONG, RESPONSE, scores, **options)
    _assert_equal(found, expected)
    counted = [len(LONG) - 1 + (r if inputs == "all" else 0) for r in range(4)]
    assert found.features.tolist() == counted


def test_the_cache_saves_tokens_and_every_score_has_the_same_subsets():
    tracker = CausalityTracker(family("llama"))
    scores = {"a": _noise(16), "b": -_noise(16), "again": _noise(16)}
    found = faithfulness(tracker, LONG, RESPONSE, scores, counterfactual=Replacement(5))
    texts = 1 + 64 + 3 * 2 * (5 + 11)
    assert found["a"].tokens < 0.9 * texts * 16
    alone = faithfulness(tracker, LONG, RESPONSE, {"a": scores["a"]}, counterfactual=Replacement(5))["a"]
    for name in MEASURES:
        torch.testing.assert_close(getattr(found["a"], name), getattr(alone, name), **CLOSE)
        torch.testing.assert_close(getattr(found["a"], name), getattr(found["again"], name))
    torch.testing.assert_close(found["a"].datamodelling_score, -found["b"].datamodelling_score)


# ---- closed forms ----------------------------------------------------------------------------------------------

WEIGHTS = [4.0, -1.0, 2.5, 0.5, 3.0]


def _additive(scores, **options):
    """The outcome is the sum of the weights of the response tokens that are left."""
    tracker = CausalityTracker(FirstToken())
    response = list(range(10, 15))
    values = dict(zip(response, WEIGHTS, strict=True))
    scores = {name: [0.0, *row] for name, row in scores.items()}
    return faithfulness(
        tracker, [4], response, scores, lambda ids: sum(values[i] for i in ids), points=5, **options
    )


def test_the_true_weights_of_an_additive_outcome_are_perfect():
    found = _additive({"true": WEIGHTS, "half": [w / 2 for w in WEIGHTS]}, fractions=[0.2, 0.4])
    for one, missing in zip(found.values(), (0.0, 0.5), strict=True):
        assert float(one.datamodelling_score) == pytest.approx(1.0, abs=1e-12)
        # In the order 4, 3, 2.5, 0.5, -1.
        assert one.insertion.tolist() == [0, 4, 7, 9.5, 10, 9]
        assert one.deletion.tolist() == [9, 5, 2, -0.5, -1, 0]
        assert float(one.deletion_auc) == pytest.approx((4.5 + 5 + 2 - 0.5 - 1) / 5)
        assert float(one.insertion_auc) == pytest.approx((4 + 7 + 9.5 + 10 + 4.5) / 5)
        assert float(one.comprehensiveness) == pytest.approx((4 + 7) / 2)
        assert float(one.sufficiency) == pytest.approx(((9 - 4) + (9 - 7)) / 2)
        assert (float(one.infidelity) == pytest.approx(0.0, abs=1e-24)) == (missing == 0.0)


def test_infidelity_of_no_scores_is_the_mean_square_of_the_falls():
    """Each token is out with chance 1 - q, so E[fall^2] = q (1 - q) sum w^2 + ((1 - q) sum w)^2."""
    found = _additive({"zero": [0.0] * 5}, subsets=40_000, keep=0.7)["zero"]
    squares, total = sum(w * w for w in WEIGHTS), sum(WEIGHTS)
    assert float(found.infidelity) == pytest.approx(0.21 * squares + (0.3 * total) ** 2, rel=0.03)
    assert bool(found.datamodelling_score.isnan())


def test_spearman_equals_scipy():
    a, b = np.random.default_rng(0).integers(0, 6, size=(2, 40)).astype(float)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-12)


def test_spans_are_features_with_the_sum_of_their_scores():
    tracker = CausalityTracker(Recurrent().double())
    spans = [(1, 3), (3, 5)]
    effects = tracker.intervene(PROMPT, RESPONSE, spans, outcome=sum)
    flat = np.zeros(7)
    flat[3:5] = effects.mean[1] / 2
    whole = faithfulness(
        tracker, PROMPT, RESPONSE, {"effects": effects, "array": flat}, sum, actions=[(3, 5)], points=2
    )
    assert whole["effects"].features == 1
    assert float(whole["effects"].infidelity) == pytest.approx(0.0, abs=1e-20)
    assert torch.equal(whole["effects"].insertion, whole["array"].insertion)
    assert whole["effects"].insertion.tolist() == [RESPONSE[2] + RESPONSE[3]] * 2 + [sum(RESPONSE)]


# ---- what it is for --------------------------------------------------------------------------------------------


def test_effects_are_more_faithful_than_attribution_and_that_than_noise():
    """In a model whose choices hang on single tokens, in the mean over texts."""
    tracker = CausalityTracker(family("llama"), interventions=Replacement(5))
    rng = np.random.default_rng(0)
    rows = {"effects": [], "attribution": [], "noise": []}
    for _ in range(6):
        prompt, response = rng.integers(3, 60, 10).tolist(), rng.integers(3, 60, 4).tolist()
        scores = {
            "effects": tracker.intervene(prompt, response),
            "attribution": tracker.attribute(
                prompt, response, method="integrated_gradients", baseline=5, steps=8
            ),
            "noise": rng.normal(size=14),
        }
        found = faithfulness(tracker, prompt, response, scores, inputs="prompt")
        for name, one in found.items():
            rows[name].append(
                [
                    float(getattr(one, key))
                    for key in ("comprehensiveness", "insertion_auc", "datamodelling_score")
                ]
                + [-float(getattr(one, key)) for key in ("sufficiency", "deletion_auc", "infidelity")]
            )
    effects, attribution, noise = (np.mean(rows[name], 0) for name in rows)
    assert (effects > noise).all()
    assert (attribution > noise).all()


def test_a_row_without_features_falls_by_nothing():
    """Deletion leaves the only prompt token, so nothing can be taken from before the first response token."""
    tracker = CausalityTracker(Recurrent().double())
    found = faithfulness(tracker, [5], [7, 8, 9], {"a": tracker.attribute([5], [7, 8, 9], "token")})["a"]
    assert found.features.tolist() == [0, 1, 2]
    for name in ("comprehensiveness", "sufficiency", "infidelity"):
        values = getattr(found, name)
        assert float(values[0]) == 0
        assert bool(values.isfinite().all())
    assert bool(found.comprehensiveness[1:].all())
    own = tracker.policy.model(torch.tensor([[5]])).log_softmax(-1)[0, 0, 7].item()
    np.testing.assert_allclose([float(found.deletion_auc[0]), float(found.insertion_auc[0])], own, **CLOSE)
    assert found.datamodelling_score.isnan().tolist() == [True, False, False]


def test_step_values_are_scores_and_ties_go_in_the_order_of_the_text():
    torch.manual_seed(1)
    tracker = CausalityTracker(Recurrent().double())
    steps = [(3, 5), (5, 7)]
    found = tracker.step_values([1, 2, 3], [4, 5, 6, 7], sum, 4, actions=steps)
    scores = {"values": found, "effects": found.effects, "equal": [1.0] * 7, "fall": list(range(7, 0, -1))}
    options = {"outcome": lambda ids: float(sum(i * 2.0**-k for k, i in enumerate(ids))), "subsets": 4}
    measured = faithfulness(tracker, [1, 2, 3], [4, 5, 6, 7], scores, **options)
    for pair in (("values", "effects"), ("equal", "fall")):
        assert torch.equal(*(measured[name].deletion for name in pair))


# ---- budget and bad input --------------------------------------------------------------------------------------


def test_the_budget_takes_fewer_subsets():
    tracker = CausalityTracker(Recurrent())
    options = {"points": 2, "fractions": [0.5], "counterfactual": Replacement(5)}
    free = faithfulness(tracker, PROMPT, RESPONSE, {"a": _noise(7)}, subsets=4, **options)["a"]
    fixed = 1 + 2 * (1 + 3)
    bound = faithfulness(
        tracker, PROMPT, RESPONSE, {"a": _noise(7)}, max_tokens=7 * (fixed + 4) + 6, **options
    )["a"]
    torch.testing.assert_close(free.infidelity, bound.infidelity)
    assert bound.tokens <= 7 * (fixed + 4)
    with pytest.raises(
        ValueError, match=f"max_tokens must be at least {7 * (fixed + 2)} for 1 scores, got 70"
    ):
        faithfulness(tracker, PROMPT, RESPONSE, {"a": _noise(7)}, max_tokens=70, **options)


FLAT = {"a": [0.0] * 3}
REFUSED = [
    ({"scores": [0.0] * 3}, TypeError, "scores must be a mapping of names to scores, got list"),
    ({"scores": {}}, ValueError, "scores must hold at least one name, got none"),
    ({"fractions": 0.5}, TypeError, "fractions must be a sequence of shares, got 0.5"),
    ({"tracker": FirstToken()}, TypeError, "tracker must be a CausalityTracker, got FirstToken"),
    ({"scores": {"a": [0.0]}}, ValueError, r"scores\['a'\] must be \[3\] or \[1, 3\], got \[1\]"),
    ({"scores": {"a": [[0.0] * 3]}, "outcome": sum}, ValueError, r"scores\['a'\] must be \[3\], got \[1, 3\]"),
    ({"scores": {"a": [0.0, np.nan, 1.0]}}, ValueError, r"scores\['a'\] must be finite, got nan"),
    ({"inputs": "response"}, ValueError, "inputs must be one of 'all', 'prompt', got 'response'"),
    ({"fractions": []}, ValueError, "fractions must hold at least one share, got none"),
    ({"fractions": [1.5]}, ValueError, r"fractions\[0\] must be in \[0, 1\], got 1.5"),
    ({"points": 0}, ValueError, "points must be at least 1, got 0"),
    ({"subsets": 1}, ValueError, "subsets must be at least 2, got 1"),
    ({"keep": -0.1}, ValueError, r"keep must be in \[0, 1\], got -0.1"),
    ({"samples": 1}, ValueError, "samples must be at least 2, got 1"),
    ({"actions": [(1, 2), (1, 2)]}, IndexError, r"actions\[1\] must be 2 <= start < end <= 2, got \(1, 2\)"),
    ({"actions": [(0, 1)]}, IndexError, r"actions\[0\] must be 1 <= start < end <= 2, got \(0, 1\)"),
    ({"actions": [3]}, TypeError, r"actions\[0\] must be a pair of integers \(start, end\), got 3"),
    ({"inputs": "prompt", "outcome": sum}, ValueError, "text must have a token that can be taken out"),
    ({"counterfactual": DonorSwap([[1]])}, TypeError, r"must have a method replacement\(tokens\), got DonorSwap"),
    ({"counterfactual": Replacement(50)}, IndexError, r"counterfactual must hold ids in \[0, 50\), got 50"),
    ({"outcome": "reward"}, ValueError, "outcome must be 'logprob' or a function"),
    ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(options, error, text):
    given = {"tracker": CausalityTracker(FirstToken()), "prompt_ids": [1, 2], "response_ids": [3]}
    given |= {"scores": FLAT, **options}
    with pytest.raises(error, match=text) as caught:
        faithfulness(**given)
    assert "\n" not in str(caught.value)


def test_scores_of_another_text_are_refused():
    tracker = CausalityTracker(FirstToken(), SimpleNamespace(decode=str, eos_token_id=None))
    other = tracker.attribute([1, 2], [4])
    with pytest.raises(ValueError, match=r"scores\['a'\] must be of this prompt and response"):
        faithfulness(tracker, [1, 2], [3], {"a": other}, outcome=Return(lambda ids: [1.0]))
