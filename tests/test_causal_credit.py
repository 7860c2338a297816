"""Credit that plays episodes again: equal to the loops, resumable, exact where the causes are known."""

import re

import numpy as np
import pytest
import torch

from react_fast.envs import Record, TextEnv
from react_fast.envs.slot_models import Writer
from react_fast.envs.slots import GroundTruth, ground_truth
from react_fast.reference.credit import units_of as reference_units
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.tracker import CausalityTracker
from react_fast.tracker.effect_table import EffectTable
from react_fast.trainer.algorithms import GRPO, REINFORCE
from react_fast.trainer.checkpoint import CheckpointError
from react_fast.trainer.replay import Count, Replay
from react_fast.trainer.replays import REDRAWN, play_again, turns_of, units_of
from react_fast.trainer.rollout import Trajectory
from react_fast.trainer.trainer import Trainer

from .byte_tokenizers import byte_level
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


def test_the_table_learns_the_known_causes():
    """Every slot's effect has its sign, and none where there is none, out of 20 steps of 16 interventions
    under a reward's noise as large as it.
    """
    truth = ground_truth(6, causes=2, mediated=0, confounded=2, noise=1.0, seed=1)
    tokenizer = Characters(truth.characters)
    policy = Writer(truth).double()
    config = settings(
        steps=20, max_new_tokens=6, group_size=8, credit="causal", credit_by="token", optimizer="sgd",
        learning_rate=1e-9,
    )  # fmt: skip
    trainer = Trainer(policy, tokenizer, truth.env(noisy=True), algorithm=GRPO(), config=config)
    trainer.train()
    for on in (0, 1):
        tokens = 2 * torch.arange(6) + on
        found = trainer.replays.table.effects(tokens, torch.arange(6))
        expected = torch.tensor(truth.weights).double() * (2 * on - 1)
        assert torch.equal(found.sign(), expected.sign())


def test_a_half_life_weighs_effects_by_their_age():
    """Two effects 3 steps apart under a half-life of 3 weigh 1/2 and 1; the table equals the weighted sums."""
    table = EffectTable("token", half_life=3.0)
    rng = np.random.default_rng(0)
    seen: dict[int, list[tuple[int, float]]] = {}
    for step in range(0, 12, 3):
        effects, tokens = rng.normal(size=40) + 9.0, rng.integers(7, size=40)
        table.advance(step)
        table.add(torch.tensor(effects), torch.tensor(tokens), torch.zeros(40).long())
        for effect, token in zip(effects, tokens, strict=True):
            seen.setdefault(int(token), []).append((step, effect))
    mean, weight, free, squares = np.zeros((4, 7))
    for token, measured in seen.items():
        w, x = np.array([0.5 ** ((9 - step) / 3) for step, _ in measured]), np.array([x for _, x in measured])
        weight[token], mean[token] = w.sum(), (w * x).sum() / w.sum()
        free[token] = w.sum() - (w * w).sum() / w.sum()
        squares[token] = (w * (x - mean[token]) ** 2).sum()
    expected = mean - np.sqrt(2 * np.log(7) * squares.sum() / free.sum() / weight)
    found = table.effects(torch.arange(7), torch.zeros(7).long()).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_an_effect_that_is_no_longer_measured_fades():
    """To 0, while one that is measured on stays; without a half-life both stay. Long after, everything is 0."""
    first, second, nowhere = torch.tensor([3]), torch.tensor([4]), torch.tensor([0])
    for half_life, stays in ((4.0, False), (None, True)):
        table = EffectTable("token", half_life=half_life)
        for step in range(40):
            table.advance(step)
            noise = (-1.0) ** step
            table.add(torch.tensor([5.0 + noise]).double(), second, nowhere)
            if step < 10:
                table.add(torch.tensor([5.0 + noise]).double(), first, nowhere)
        old, new = (float(table.effects(token, nowhere)) for token in (first, second))
        assert new > 3
        assert (old > 3) == stays
        assert stays or old == 0
        table.advance(10**6)
        assert (float(table.effects(second, nowhere)) == new) == stays


@pytest.mark.parametrize("case", ["causal", "shapley"])
def test_the_report_shows_the_measured_effects(tmp_path, case):
    """By token they are what the table holds; the tokens that a reward counts are found; all survives a checkpoint
    and stands in the page, escaped, as an intervention beside attribution."""
    tokenizer, model = Characters(ALPHABET.replace("?", "<").replace(" ", ">")), policy()
    env = TextEnv([Record("<"), Record("<<")], reward=counts)
    config = settings(
        steps=12, credit=case, credit_by="token", credit_actions={"causal": "token", "shapley": "step"}[case],
        credit_interventions=40, max_new_tokens=6, checkpoint_dir=str(tmp_path), credit_samples=2,
    )  # fmt: skip
    tracker = CausalityTracker(model, tokenizer)
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), tracker=tracker, config=config)
    trainer.train()
    found = {
        one.name: one
        for one in tracker.key_features(99, kind="return_effect", families=("token",), min_count=2)
    }
    assert found["a"].direction == "raises"
    assert found["a"].low > 0
    assert len(found["a"].windows) > 4
    if case == "causal":
        moments = trainer.replays.table.moments
        for name, one in found.items():
            i = tokenizer.alphabet.index(name)
            assert one.count == int(moments.count[i])
            np.testing.assert_allclose(one.mean, float(moments.mean[i]), rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(one.standard_error, float(moments.standard_error[i]), rtol=1e-12)
    places = tracker.key_features(99, kind="return_effect", families=("token_at_position",), min_count=2)
    by_token = {name: sum(one.count for one in places if one.name == name) for name in found}
    assert all(one.count - by_token[name] <= 6 for name, one in found.items()), "but for those seen once"
    again = CausalityTracker(policy(), tokenizer)
    fresh = Trainer(again.policy.model, tokenizer, env, algorithm=GRPO(), tracker=again, config=config)
    fresh.train(resume="auto")
    assert repr(again.report().features) == repr(tracker.report().features)
    page = tracker.report().to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("<h3>Causal effect on the return</h3>") < page.index("<h3>Attribution</h3>")
    assert re.search(r'<span class="chip" dir="auto" title="&lt;">&lt;</span>', page)
    assert re.search(r"&lt; at \d", page)
    assert "<h3>Causal effect on the return</h3>" not in CausalityTracker(model).report().to_html(
        tmp_path / "none.html"
    ).read_text(encoding="utf-8")


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stays_out_of_the_table(bad):
    """One of an episode, and one that only replays meet: the rest is measured on."""
    seen = [0]

    def reward(state: str, action: str, record: Record) -> float:
        seen[0] += 1
        return bad if seen[0] in (2, 11) else counts(state, action, record)

    env = TextEnv([Record("?")], reward=reward)
    config = settings(prompts_per_step=2, credit="causal", steps=1)
    for make in (Trainer, ReferenceTrainer):
        seen[0] = 0
        trainer = make(policy(), Characters(ALPHABET), env, algorithm=GRPO(), config=config)
        batch = trainer.score(trainer.collect())
        effects = batch.effects if make is Trainer else torch.cat([one.effects for one in batch])
        assert seen[0] > 11
        assert not bool(effects.isinf().any())
        assert bool((effects.nan_to_num() != 0).any())


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


@pytest.mark.parametrize(
    "before",
    [
        {"credit": "uniform"},
        {"credit": "causal", "credit_by": "token_at_position"},
        {"credit": "causal", "credit_by": "token", "credit_half_life": 5.0},
    ],
)
def test_effects_of_another_setting_start_anew(tmp_path, before):
    shared = {"checkpoint_dir": str(tmp_path), "steps": 1}
    Trainer(
        policy(),
        Characters(ALPHABET),
        dialogues(),
        algorithm=GRPO(),
        config=settings(**shared, **before),
    ).train()
    config = settings(**shared, credit="causal", credit_by="token")
    resumed = Trainer(policy(), Characters(ALPHABET), dialogues(), algorithm=GRPO(), config=config)
    with pytest.warns(UserWarning, match="they start anew"):
        resumed.train(resume="auto")
    assert resumed.step == 1
    assert resumed.replays.environment_steps > 0
    assert int(resumed.replays.table.moments.count.sum()) == 0


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


def test_a_table_by_another_name_is_refused():
    with pytest.raises(ValueError, match="by must be"):
        EffectTable("position")
    with pytest.raises(ValueError, match=r"half_life must be in \[0.01, inf\], got 0"):
        EffectTable("token", half_life=0)


@pytest.mark.parametrize("actions", ["token", "word", "sentence", "line", "step", "turn"])
def test_units_are_the_references(actions):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = torch.from_numpy(rng.integers(len(ALPHABET), size=24))
        one = Trajectory(
            token_ids=ids,
            action_mask=torch.from_numpy(rng.random(24) < 0.8),
            turn_index=torch.arange(24) // 12,
            sampler_logprobs=torch.zeros(24),
            rewards=[0.0, 1.0],
        )
        tokenizer = Characters(ALPHABET)
        assert units_of(one, actions, tokenizer) == reference_units(one, actions, tokenizer)


@pytest.mark.parametrize("actions", ["word", "sentence", "line", "step"])
def test_units_end_behind_characters_of_several_tokens(actions):
    """Sentences of CJK text end behind their full stop, whose bytes are three tokens."""
    text = "日本。 é a。日\n本 b\n\nc"
    tokenizer = byte_level()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    one = Trajectory(
        token_ids=ids,
        action_mask=torch.ones(len(ids), dtype=torch.bool),
        turn_index=torch.zeros(len(ids), dtype=torch.long),
        sampler_logprobs=torch.zeros(len(ids)),
        rewards=[0.0],
    )
    found = units_of(one, actions, tokenizer)
    assert found == reference_units(one, actions, tokenizer)
    expected = {
        "word": ["日本。", " é", " a。日", "\n本", " b", "\n", "\nc"],
        "sentence": ["日本。", " é a。", "日\n", "本 b\n\n", "c"],
        "line": ["日本。 é a。日\n", "本 b\n\n", "c"],
        "step": ["日本。 é a。日\n本 b\n\n", "c"],
    }
    assert [tokenizer.decode(ids[unit]) for unit in found] == expected[actions]


def test_units_cut_each_turns_action():
    ids = torch.tensor([5, 0, 2, 1, 5, 3, 0, 3, 1])
    one = Trajectory(
        token_ids=ids,
        action_mask=torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1]).bool(),
        turn_index=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]),
        sampler_logprobs=torch.zeros(9),
        rewards=[0.0, 1.0],
    )
    tokenizer = Characters(ALPHABET)
    assert units_of(one, "turn", tokenizer) == [[1, 2, 3], [5, 6, 7, 8]]
    assert units_of(one, "word", tokenizer) == [[1], [2, 3], [5, 6], [7, 8]]
    assert units_of(one, "line", tokenizer) == [[1, 2, 3], [5], [6, 7], [8]]
    assert units_of(one, "token", tokenizer) == [[1], [2], [3], [5], [6], [7], [8]]
    assert turns_of(one, ids) == [[0, 2, 1], [3, 0, 3, 1]]
    assert turns_of(one, ids, end=2) == [[0]]
    assert turns_of(one, ids, end=5) == [[0, 2, 1], []]
