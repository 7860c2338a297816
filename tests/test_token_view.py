"""Text environments seen token by token: for Stable-Baselines3 and other libraries of arrays."""

import runpy
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from react_fast.envs import Record, TextEnv, TokenView

from .test_algorithms import LETTERS, Letters

EXAMPLE = Path(__file__).parent.parent / "examples" / "sb3.py"
WITHOUT = "stable-baselines3 is not installed; pip install 'react-fast[bench]'"


class Ending(Letters):
    """p ends an action, and is nothing in a text."""

    eos_token_id = LETTERS.index("p")

    def decode(self, ids, skip_special_tokens=True):
        return super().decode(ids).replace("p", "")


def reply(state, action, record):
    return f"{state}{action}op"


def length(state, action, record):
    return float(len(action))


def make_view(tokenizer=None, transition=reply, **options):
    env = TextEnv([Record("ab"), Record("cde")], transition=transition, reward=length, max_turns=2)
    return TokenView(
        env, tokenizer or Ending(), **{"vocabulary": 16, "window": 6, "max_tokens": 3, **options}
    )


def ids(text):
    """What an observation of six tokens shows of a text."""
    return [0] * max(0, 6 - len(text)) + [LETTERS.index(letter) + 1 for letter in text][-6:]


def write(view, text):
    return [view.step(view.tokens.index(LETTERS.index(letter))) for letter in text]


def test_an_action_ends_with_the_end_token_or_with_the_most_tokens():
    view = make_view()
    seen, info = view.reset(options={"index": 0})
    assert (seen.tolist(), info["index"]) == (ids("ab"), 0)
    steps = write(view, "cp")
    assert [s[0].tolist() for s in steps] == [ids("abc"), ids("abcpop")]
    assert [s[1:4] for s in steps] == [(0, False, False), (1, False, False)]
    assert [s[4].get("turn") for s in steps] == [None, 1]
    steps = write(view, "fgh")
    assert steps[1][0].tolist() == ids("abcpopfg")
    assert [s[1:4] for s in steps] == [(0, False, False)] * 2 + [(3, True, False)]
    with pytest.raises(gymnasium.error.ResetNeeded):
        write(view, "p")


def test_return_is_the_text_environments():
    view = make_view()
    twin = view.env.clone()
    rng = np.random.default_rng(0)
    for _ in range(20):
        view.reset(options={"index": 1})
        twin.reset(options={"index": 1})
        earned, written, over = 0.0, [""], False
        while not over:
            action = int(rng.integers(16))
            _, reward, terminated, truncated, info = view.step(action)
            earned, over = earned + reward, terminated or truncated
            written[-1] += LETTERS[action]
            written += [""] if info else []
        assert earned == sum(twin.step(text.replace("p", ""))[1] for text in written[:-1])


def test_a_state_that_is_rewritten_is_tokenised_anew():
    view = make_view(transition=lambda state, action, record: action[::-1])
    view.reset(options={"index": 0})
    assert write(view, "cdp")[-1][0].tolist() == ids("dc")


def test_some_tokens_alone():
    view = make_view(tokens=[LETTERS.index(letter) for letter in "kp"])
    assert view.action_space.n == 2
    view.reset(options={"index": 0})
    assert write(view, "kp")[-1][1] == 1


def test_passes_gymnasiums_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = make_view()
        view.spec = gymnasium.envs.registration.EnvSpec("View-v0", entry_point=make_view)
        check_env(view)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "tokenizer must be callable and have decode, got str", {"tokenizer": "gpt2"}),
        (ValueError, "vocabulary must be given for a tokenizer without a length", {"vocabulary": None}),
        (ValueError, "window must be an integer of at least 1, got 0", {"window": 0}),
        (ValueError, "max_tokens must be an integer of at least 1, got 1.5", {"max_tokens": 1.5}),
        (ValueError, r"tokens must hold ids in \[0, 16\), got \[16\]", {"tokens": [16]}),
        (ValueError, r"tokens must hold ids in \[0, 16\), got \[\]", {"tokens": []}),
    ],
)
def test_constructor_refuses(error, match, options):
    with pytest.raises(error, match=match):
        make_view(**options)


def test_other_environments_and_actions_are_refused():
    with pytest.raises(TypeError, match="env must be a TextEnv, got CartPole"):
        TokenView(gymnasium.make("CartPole-v1").unwrapped, Ending(), vocabulary=16)
    view = make_view()
    view.reset(seed=0)
    with pytest.raises(IndexError, match=r"action must be in \[0, 16\), got 16"):
        view.step(16)


@pytest.mark.parametrize("action", [1.5, "a", None])
def test_actions_that_are_no_integers_are_refused(action):
    view = make_view()
    view.reset(seed=0)
    with pytest.raises(TypeError, match="action must be an integer, got "):
        view.step(action)


def test_a_token_needs_an_episode_under_way():
    view = make_view(max_tokens=1)
    with pytest.raises(gymnasium.error.ResetNeeded):
        view.step(0)
    view.reset(seed=0)
    assert [view.step(0)[2] for _ in range(2)] == [False, True]
    with pytest.raises(gymnasium.error.ResetNeeded):
        view.step(0)


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="vocabulary must be above every token id, got 3 for the id 4"):
        make_view(vocabulary=3).reset(options={"index": 1})


def test_stable_baselines_checks_and_learns():
    """Chance earns 1/4; the margin is half of what is left."""
    pytest.importorskip("stable_baselines3", reason=WITHOUT)
    from stable_baselines3.common.env_checker import check_env as check

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(make_view(), warn=True)
    reward = runpy.run_path(str(EXAMPLE))["train"]()
    assert abs(reward["random"] - 0.25) < 0.1
    assert reward["trained"] > 0.625
