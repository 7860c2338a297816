"""The environment with known causes: closed forms equal simulation; the tracker finds the causes, attribution does
not; intervals and discoveries keep their promises. bench/ground_truth.py does the same with 1,000 repeats."""

import pickle

import numpy as np
import pytest
import torch

from bench import ground_truth as experiment
from react_fast.envs import GroundTruth, ground_truth
from react_fast.envs.slot_models import Observer, Writer
from react_fast.tracker.policy import Policy, gumbel
from react_fast.tracker.statistics import CORRECTIONS, auroc

# Small enough to enumerate: 2^7 texts for each U; with a mediator, confounded causes and a confounded mediator.
SMALL = GroundTruth(
    weights=(0.0, 1.0, 0.5, 0.0, -2.0, 0.0, 0.0),
    pulls=(0.7, 0.0, 0.3, 0.9, 0.0, 0.4, 0.0),
    links=(0.0, 1.5, 0.0, 0.0, -0.8, 0.6, 0.0),
    parents=(-1, 0, -1, -1, 0, 2, -1),
    direct=3.0,
)


def _enumerated(truth, do=None):
    """Every (U, slots): chance and expected reward by the definition, one factor at a time."""
    rows = []
    for number in range(2 ** (truth.slots + 1)):
        u, *x = [number >> i & 1 for i in range(truth.slots + 1)]
        chance = 0.5
        for i, parent in enumerate(truth.parents):
            if do is not None and i == do[0]:
                chance *= x[i] == do[1]
                continue
            odds = truth.pulls[i] * (2 * u - 1)
            odds += truth.links[i] * (2 * x[parent] - 1) if parent >= 0 else 0.0
            on = 1 / (1 + np.exp(-odds))
            chance *= on if x[i] else 1 - on
        reward = sum(w * v for w, v in zip(truth.weights, x, strict=True)) + truth.direct * u
        rows.append((chance, reward, u, *x))
    return np.array(rows)


def _mean(rows, keep=slice(None)):
    rows = rows[keep]
    return float((rows[:, 0] * rows[:, 1]).sum() / rows[:, 0].sum())


def test_closed_forms_equal_enumeration():
    rows = _enumerated(SMALL)
    for i in range(SMALL.slots):
        done = [_enumerated(SMALL, do=(i, v)) for v in (0, 1)]
        np.testing.assert_allclose(SMALL.effects()[i], _mean(done[1]) - _mean(done[0]), atol=1e-12)
        seen = [_mean(rows, rows[:, 3 + i] == v) for v in (0, 1)]
        np.testing.assert_allclose(SMALL.associations()[i], seen[1] - seen[0], atol=1e-12)
        for u in (0, 1):
            found = [_mean(d, d[:, 2] == u) for d in done]
            np.testing.assert_allclose(SMALL.effects(u)[i], found[1] - found[0], atol=1e-12)
    for u, text in ((0, ""), (1, "b"), (1, "acf"), (0, "bcfgjl")):
        values = SMALL.values(text)[: len(text)]
        keep = (rows[:, 2] == u) & (rows[:, 3 : 3 + len(text)] == values).all(1)
        np.testing.assert_allclose(SMALL.value(text, u), _mean(rows, keep), atol=1e-12)


def test_kinds_are_what_the_equations_say():
    assert SMALL.kinds == ("cause", "cause", "cause", "confounded", "cause", "confounded", "noise")
    truth = ground_truth(20, causes=4, mediated=2, confounded=5, weight=0.7)
    assert [truth.kinds.count(kind) for kind in ("cause", "confounded", "noise")] == [6, 5, 9]
    assert (truth.associations()[np.array(truth.kinds) == "confounded"] > 1).all()
    assert ground_truth(weight=0.0).kinds.count("cause") == 0


def test_the_writer_writes_as_the_model_says():
    policy, u = Policy(Writer(SMALL).double()), 1
    rows = _enumerated(SMALL)
    rows = rows[rows[:, 2] == u]
    texts = [[2 * i + int(x) for i, x in enumerate(row[3:])] for row in rows]
    prompt = SMALL.encode(SMALL.prompt(u))
    found = policy.response_logprobs([prompt + text for text in texts], [1] * len(texts)).sum(1)
    # The log-odds were rounded to float32.
    np.testing.assert_allclose(found.exp(), rows[:, 0] / 0.5, rtol=1e-6)
    drawn = policy.continuations(
        [prompt] * 8, streams=range(8), limit=SMALL.slots, eos_id=None, noise=gumbel(0)
    )
    assert all(len(SMALL.values(SMALL.decode(ids))) == 7 for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 1


def test_the_observer_knows_the_reward_but_not_its_cause():
    rows = _enumerated(SMALL)
    observer = Observer(SMALL).double()
    for text in ("bdfhjln", "acegikm", "bcfgjkn"):
        keep = (rows[:, 3:] == SMALL.values(text)).all(1)
        ids = torch.tensor([SMALL.encode(SMALL.prompt(0) + text)])
        np.testing.assert_allclose(observer(ids)[0, -1, 0].item(), _mean(rows, keep), rtol=1e-6)


def test_the_environment_pays_the_reward():
    env = pickle.loads(pickle.dumps(SMALL.env()))
    prompt, _ = env.reset(options={"index": 1})
    assert prompt == "!"
    _, reward, terminated, _, _ = env.step("bdfhjln")
    assert (reward, terminated) == (sum(SMALL.weights) + 3.0, True)
    noisy = [SMALL.reward("", 0, np.random.default_rng(i)) for i in range(200)]
    assert 0.8 < np.std(noisy) < 1.2


@pytest.fixture(scope="module")
def found():
    """60 texts of 8 slots: (structural causal model, trials)."""
    torch.set_num_threads(1)  # the tensors have a few hundred elements
    truth = ground_truth(8, causes=2, mediated=1, confounded=3)
    return truth, list(experiment.trials(truth, 60))


def test_interventions_find_the_causes_and_attribution_is_fooled(found):
    measured, observed = experiment.recovery(*found)
    assert measured.mean() >= 0.95
    assert observed.mean() < 0.75


def test_intervals_hold_the_true_effect(found):
    """Two standard errors of the share of 8 x 60 intervals are 2%; the benchmark has 1,000 repeats."""
    for name, share in experiment.coverage(found[1]).items():
        assert 0.92 < share < 0.98, name


def test_where_nothing_has_an_effect_little_is_discovered():
    torch.set_num_threads(1)
    truth = ground_truth(8, causes=2, mediated=1, confounded=3, weight=0.0)
    found = experiment.discoveries(list(experiment.trials(truth, 60, seed=3)))
    assert found["none"][0] > 0.025
    for name in CORRECTIONS:
        assert found[name][0] <= 0.05
        assert found[name][1] <= 0.1  # of 60 texts; 5% are expected


def test_auroc_counts_pairs():
    scores, labels = np.array([3.0, 1.0, 2.0, 2.0]), np.array([1, 0, 1, 0])
    assert auroc(scores, labels) == (1 + 1 + 1 + 0.5) / 4
    assert np.isnan(auroc(scores, np.ones(4)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GroundTruth((1.0,), (), (0.0,), (-1,)), r"pulls must be \[1\] like weights, got 0"),
        (lambda: GroundTruth((), (), (), ()), "weights must hold 1 to 32 slots, got 0"),
        (
            lambda: GroundTruth((1.0,), (0.0,), (0.0,), (0,)),
            r"parents\[0\] must be -1 or an earlier slot without parent, got 0",
        ),
        (lambda: SMALL.encode("bd~"), r"text must hold characters of .*, got '~'"),
        (lambda: ground_truth(4, causes=3, confounded=2), r"must fit in 4 slots.*, got 3 \+ 1 \+ 2"),
        (lambda: ground_truth(4, causes=1, mediated=2), "mediated at most causes"),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
