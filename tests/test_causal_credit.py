"""Credit that plays episodes again: equal to the loops, resumable, exact where the causes are known."""

import numpy as np
import pytest
import torch

from react_fast.envs import Record, TextEnv
from react_fast.envs.slot_models import Writer
from react_fast.envs.slots import GroundTruth, ground_truth
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.trainer.algorithms import GRPO, REINFORCE
from react_fast.trainer.checkpoint import CheckpointError
from react_fast.trainer.replay import Count, Replay
from react_fast.trainer.replays import REDRAWN, play_again, turns_of, units_of
from react_fast.trainer.trainer import Trainer

from .dialogues import ALPHABET, Characters, Ending, counts, dialogues, policy, settings, weights


class _Log:
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)


CASES = {
    "causal, tokens": (GRPO(), {"credit": "causal"}),
    "causal, words at positions": (
        GRPO(),
        {
            "credit": "causal",
            "credit_actions": "word",
            "credit_by": "token_at_position",
            "credit_interventions": 7,
        },
    ),
    "causal, turns, every other step": (
        REINFORCE(),
        {"credit": "causal", "credit_actions": "turn", "credit_by": "token", "credit_every": 2, "steps": 5},
    ),
    "causal, tokens that fade": (
        GRPO(),
        {"credit": "causal", "credit_by": "token", "credit_half_life": 1.5, "credit_interventions": 6},
    ),
    "causal, words at positions that fade, every other step": (
        GRPO(),
        {
            "credit": "causal",
            "credit_actions": "word",
            "credit_by": "token_at_position",
            "credit_half_life": 0.5,
            "credit_every": 2,
            "credit_interventions": 7,
            "steps": 4,
        },
    ),
    "causal, lines, a truncated sampler": (
        GRPO(),
        {"credit": "causal", "credit_actions": "line", "top_k": 4, "temperature": 0.9},
    ),
    "monte carlo, tokens": (GRPO(), {"credit": "monte_carlo", "credit_samples": 2}),
    "monte carlo, lines": (
        REINFORCE(),
        {"credit": "monte_carlo", "credit_actions": "line", "credit_samples": 3, "temperature": 0.8},
    ),
    "shapley, steps, exact": (
        GRPO(),
        {"credit": "shapley", "credit_actions": "step", "credit_interventions": 60, "max_new_tokens": 6},
    ),
    "shapley, words, sampled": (
        GRPO(),
        {
            "credit": "shapley",
            "credit_actions": "word",
            "credit_interventions": 100,
            "credit_samples": 2,
            "max_new_tokens": 18,
            "steps": 2,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_reference(case):
    """Parameters equal to 1e-9 after a few steps in float64, on episodes of two turns that each plays itself."""
    algorithm, changes = CASES[case]
    config = settings(**changes)
    fast, slow, plain = policy(), policy(), policy()
    tokenizer, log = Characters(ALPHABET), _Log()
    trainer = Trainer(fast, tokenizer, dialogues(), algorithm=algorithm, config=config, reporter=log)
    reference = ReferenceTrainer(slow, tokenizer, dialogues(), algorithm=algorithm, config=config)
    for _ in range(config.steps):
        trainer.train_step()
        expected = reference.train_step(reference.collect())
        assert log.metrics[-1]["environment_steps"] == expected["environment_steps"]
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-9)
    uniform = config.replace(credit="uniform")
    Trainer(plain, tokenizer, dialogues(), algorithm=algorithm, config=uniform).train()
    assert float((weights(plain) - weights(fast)).abs().max()) > 1e-3, "credit must change the update"


RESUMED = {
    "causal": {},
    "causal, fading": {"credit_by": "token", "credit_half_life": 2.5, "credit_every": 2},
    "monte_carlo": {},
    "shapley": {},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_gives_bitwise_the_same_weights(tmp_path, case):
    """What was accumulated goes into the checkpoint, the count of environment steps too."""
    changes = {
        "credit": case.split(",")[0],
        "credit_actions": "word",
        "credit_samples": 2,
        "credit_interventions": 64,
        "steps": 4,
        **RESUMED[case],
    }
    whole, first, second = policy(), policy(), policy(seed=9)
    logs = [_Log(), _Log()]
    tokenizer = Characters(ALPHABET)
    Trainer(
        whole, tokenizer, dialogues(), algorithm=GRPO(), config=settings(**changes), reporter=logs[0]
    ).train()
    saved = settings(**changes, checkpoint_dir=str(tmp_path))
    Trainer(first, tokenizer, dialogues(), algorithm=GRPO(), config=saved.replace(steps=2)).train()
    resumed = Trainer(second, tokenizer, dialogues(), algorithm=GRPO(), config=saved, reporter=logs[1])
    resumed.train(resume="auto")
    assert torch.equal(weights(whole), weights(second))
    assert logs[0].metrics[-1]["environment_steps"] == logs[1].metrics[-1]["environment_steps"]


def test_monte_carlo_advantages_telescope_and_are_unbiased():
    """A row's unit advantages sum to its return less the first state's value, and their mean is the exact
    advantage of a slot, weight (x - p)."""
    truth = ground_truth(3, causes=1, mediated=0, confounded=0, noise=1.0)
    config = settings(max_new_tokens=3, group_size=64, credit="monte_carlo", credit_samples=2)
    trainer = Trainer(
        Writer(truth).double(),
        Characters(truth.characters),
        truth.env(noisy=True),
        algorithm=GRPO(),
        config=config,
    )
    batch = trainer.credit(trainer.score(trainer.collect()))
    on = (batch.targets % 2).double()
    expected = torch.tensor(truth.weights) * (on - 0.5)
    error = (batch.advantages - expected).mean(0)
    assert bool((error.abs() < 4 * 0.5 / np.sqrt(64)).all()), (
        error
    )  # a value of 2 samples: at most sqrt(2 / 4 / 2)
    silent = torch.tensor(truth.weights) == 0
    assert float(batch.advantages[:, ~silent].abs().max()) > 0


@pytest.mark.parametrize("actions", ["token", "turn"])
def test_the_end_token_is_an_action_like_others(actions):
    tokenizer, fast, slow = Ending(), policy(len(ALPHABET) + 1), policy(len(ALPHABET) + 1)
    config = settings(credit="causal", credit_actions=actions, credit_by="token_at_position", steps=2)
    trainer = Trainer(fast, tokenizer, dialogues(), algorithm=GRPO(), config=config)
    reference = ReferenceTrainer(slow, tokenizer, dialogues(), algorithm=GRPO(), config=config)
    trainer.train()
    reference.train()
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-9)
    trainer.config = config.replace(credit_interventions=1000)
    batch = trainer.score(trainer.collect())
    ends = (batch.targets == tokenizer.eos_token_id) & batch.mask
    before = torch.nn.functional.pad(batch.effects, (1, 0))[:, :-1]
    inside = ends & torch.nn.functional.pad(batch.mask, (1, 0))[:, :-1]
    assert bool(inside.any())
    if actions == "turn":
        assert torch.equal(batch.effects[inside], before[inside])
    else:
        assert bool((batch.effects[ends] != 0).any())


def test_redrawing_gives_way_to_the_episode_action_by_action():
    """With a budget for all, the effects of a measured episode sum to what it got above the redrawn one, are those
    of one replay for every place, and are 0 where the redrawing chooses the same."""
    config = settings(credit="causal", credit_interventions=1000, steps=1, group_size=8)
    trainer = Trainer(policy(), Characters(ALPHABET), dialogues(), algorithm=GRPO(), config=config)
    trajectories = trainer.collect()
    batch = trainer.score(trajectories)
    measured = (~batch.effects.isnan() & batch.mask).any(1).nonzero()[:, 0].tolist()
    assert len(measured) > 4
    for row in measured:
        one = trajectories[row]
        places = [unit[0] for unit in units_of(one, "token", trainer.tokenizer)]
        again = [
            Replay(one.record, one.seed, turns_of(one, one.token_ids, end=t), open=True, number=row)
            for t in places
        ]
        values = [*play_again(trainer, trainer.engine, again, REDRAWN, Count()), float(sum(one.rewards))]
        found = batch.effects[row, torch.tensor(places) - 1]
        torch.testing.assert_close(found.sum(), torch.tensor(values[-1] - values[0]).double())
        expected = torch.tensor(np.diff(values))
        # A stretch between equal values is not looked into.
        assert float((found - expected).abs().max()) < 1e-12 or len(set(values)) < len(values)
        redrawn = trainer.replays._redrawn(batch, trajectories, row)
        same = [redrawn[t] == int(one.token_ids[t]) for t in places]
        assert bool((expected[torch.tensor(same)] == 0).all())
        assert any(same)


def test_the_mean_effect_is_the_advantage():
    """Of slots that do not hang on each other, and of which no two cancel: weight (x - p), out of 512 episodes
    that are all measured."""
    truth = GroundTruth((1.0, 0.0, -2.0), (0.0,) * 3, (0.0,) * 3, (-1,) * 3, noise=1.0)
    config = settings(
        max_new_tokens=3, prompts_per_step=8, group_size=64, credit="causal", credit_interventions=10**6
    )
    tokenizer = Characters(truth.characters)
    trainer = Trainer(
        Writer(truth).double(), tokenizer, truth.env(noisy=True), algorithm=GRPO(), config=config
    )
    batch = trainer.score(trainer.collect())
    weights, on = torch.tensor(truth.weights).double(), (batch.targets % 2).double()
    assert not bool(batch.effects.isnan().any())
    for value in (0, 1):
        error = batch.effects - weights * (on - 0.5)
        chosen = on == value
        count = chosen.sum(0)
        mean = torch.where(chosen, error, 0.0).sum(0) / count
        # One redrawn slot has a standard deviation of half its weight.
        assert bool((mean.abs() <= 4 * 0.5 * weights.abs() / count.sqrt() + 1e-12).all()), mean


def test_replays_in_slices_are_the_same_draws():
    found = []
    for size in (1, 3, 1000):
        config = settings(credit="monte_carlo", credit_samples=2, eval_batch=size)
        trainer = Trainer(policy(), Characters(ALPHABET), dialogues(), algorithm=GRPO(), config=config)
        batch = trainer.score(trainer.collect())
        found.append((batch.step_advantages, trainer.replays.metrics))
    for advantages, metrics in found[1:]:
        assert torch.equal(advantages, found[0][0])
        assert metrics == found[0][1]


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path):
    config = settings(checkpoint_dir=str(tmp_path), steps=1)
    trainer = Trainer(policy(), Characters(ALPHABET), dialogues(), algorithm=GRPO(), config=config)
    whole = trainer.stopping.state_dict
    trainer.stopping.state_dict = dict
    trainer.train()
    trainer.stopping.state_dict = whole
    with pytest.raises(CheckpointError, match="is of another version or setting") as caught:
        trainer.train(resume="auto")
    assert "\n" not in str(caught.value)


def test_a_replay_that_rewrites_the_text_is_refused():
    """As rollouts are: here the transition does so from the ninth call on, in the replays."""
    calls = [0]

    def forgetful(state: str, action: str, record: Record) -> str:
        calls[0] += 1
        return state + action + "?" if calls[0] <= 8 else "?"

    env = TextEnv([Record("?")], transition=forgetful, reward=counts, max_turns=2)
    config = settings(credit="causal")
    trainer = Trainer(policy(), Characters(ALPHABET), env, algorithm=GRPO(), config=config)
    trajectories = trainer.collect()
    with pytest.raises(ValueError, match="must continue the text so far") as caught:
        trainer.score(trajectories)
    assert "\n" not in str(caught.value)
