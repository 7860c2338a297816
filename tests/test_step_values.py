"""Monte-Carlo values of steps and turns: those of the structural model, and of episodes played one by one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from react_fast.envs import Record, TextEnv, ground_truth
from react_fast.envs.slot_models import Writer
from react_fast.tracker import CausalityTracker, turn_values

from .policies import Brute, FirstToken, Recurrent

pytestmark = pytest.mark.usefixtures("one_thread")


def test_step_values_are_those_of_the_structuralfamily():
    truth = ground_truth(8, causes=3, mediated=1, confounded=2, noise=0.5)
    rng = np.random.default_rng(0)
    held, errors = [], []
    for repeat in range(24):
        hidden = repeat % 2
        text = truth.write(rng, hidden)
        found = CausalityTracker(Writer(truth), seed=repeat).step_values(
            truth.encode(truth.prompt(hidden)),
            truth.encode(text),
            lambda ids, hidden=hidden: truth.reward(truth.decode(ids), hidden, rng),
            16,
            actions=[(1, 3), (3, 6), (6, 9)],
        )
        states = np.array([truth.value(text[:place], hidden) for place in (0, 2, 5, 8)])
        held += ((found.low.numpy() <= states) & (states <= found.high.numpy())).tolist()
        errors.append(found.effects.mean.numpy() - np.diff(states))
        np.testing.assert_allclose(found.effects.mean, np.diff(found.values.numpy()), rtol=1e-12)
    assert np.mean(held) > 0.88  # 96 intervals of 95%: three standard errors below
    assert (np.abs(np.mean(errors, 0)) < 4 * np.std(errors, 0) / np.sqrt(len(errors))).all()


def test_a_response_that_ended_has_its_own_value():
    torch.manual_seed(0)
    tracker = CausalityTracker(
        FirstToken().double(), SimpleNamespace(eos_token_id=7, decode=lambda ids: " a")
    )
    seen = []
    found = tracker.step_values(
        [4, 5],
        [6, 9, 7],
        lambda ids: seen.append(ids) or float(len(ids)),
        3,
        actions="word",
        max_response_tokens=9,
    )
    assert seen[-3:] == [[6, 9, 7]] * 3
    assert all(len(ids) <= 9 for ids in seen)
    assert (float(found.values[-1]), float(found.standard_error[-1])) == (3.0, 0.0)


class Spoken:
    """One token a character, whose number it is."""

    eos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def _answer(state, action, record):
    """What the environment adds is one token of the small vocabulary."""
    return f"{state}{action}\x03"


def _pay(state, action, record):
    return float(sum(map(ord, action)) % 5 + (len(state) if "!" in action else 0))


def _speaker():
    torch.manual_seed(5)
    model = Recurrent().double()
    with torch.no_grad():
        model.head.weight.mul_(3)
    return model


def test_turn_values_equal_episodes_played_one_by_one():
    model, env = _speaker(), TextEnv([Record("\x05\x06")], transition=_answer, reward=_pay, max_turns=3)
    brute = Brute(model, 6)
    tracker = CausalityTracker(model, Spoken(), seed=6)
    turns, gamma, limit = [[7, 8], [33, 9]], 0.5, 2
    found = turn_values(tracker, env, 0, turns, 4, max_new_tokens=limit, gamma=gamma)
    for k in range(3):
        played = []
        for s in range(4):
            state, earned = "\x05\x06", 0.0
            for turn in range(3):
                given = turn < k
                tokens = turns[turn] if given else brute.draw([ord(c) for c in state], s, limit, turn * limit)
                action = "".join(map(chr, tokens))
                earned += gamma**turn * _pay(state, action, None)
                state = _answer(state, action, None)
            played.append(earned)
        np.testing.assert_allclose(float(found.values[k]), np.mean(played), rtol=1e-12)
        np.testing.assert_allclose(
            float(found.standard_error[k]), np.std(played, ddof=1) / 2, rtol=1e-9, atol=1e-12
        )
    assert found.effects.spans == ((2, 4), (5, 7))
    assert float(found.standard_error[0]) > 0
    np.testing.assert_allclose(found.effects.mean, np.diff(found.values.numpy()), atol=1e-12)


# ---- bad input ------------------------------------------------------------------------------------------------

ENV = TextEnv([Record("\x05")], transition=_answer, reward=_pay, max_turns=1)
REFUSED = [
    (
        lambda t: t.step_values([1], [2], "logprob", 2),
        ValueError,
        "outcome must be a function of response ids",
    ),
    (lambda t: t.step_values([1], [2], len, 1), ValueError, "samples must be at least 2, got 1"),
    (
        lambda t: t.step_values([1], [2, 3], len, 2, actions="token", max_response_tokens=1),
        ValueError,
        "max_response_tokens must be at least 2, got 1",
    ),
    (
        lambda t: t.step_values([1], [2, 3, 4], len, 2, actions=[(1, 2), (3, 4)]),
        ValueError,
        "actions must be steps of the response without a gap",
    ),
    (
        lambda t: turn_values(t, ENV, 0, [[1]], 2, max_new_tokens=1),
        ValueError,
        "tokenizer must be given to the tracker for turn_values",
    ),
    (
        lambda t: turn_values(_spoken(t), ENV, 0, [[1], [2]], 2, max_new_tokens=1),
        ValueError,
        "turns must end with the episode, got 2 where it has 1",
    ),
    (
        lambda t: turn_values(_spoken(t), ENV, 0, [], 2, max_new_tokens=1),
        ValueError,
        "turns must hold at least one turn, got none",
    ),
    (
        lambda t: turn_values(_spoken(t), ENV, 0, [[50]], 2, max_new_tokens=1),
        IndexError,
        r"turns\[0\]\[0\] must be in \[0, 50\), got 50",
    ),
]


def _spoken(tracker):
    return CausalityTracker(tracker.policy.model, Spoken())


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call(CausalityTracker(FirstToken()))
    assert "\n" not in str(caught.value)
