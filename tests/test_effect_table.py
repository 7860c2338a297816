"""Effects that causal credit keeps over training: what the table learns, how they fade, and the report of them."""

import re

import numpy as np
import pytest
import torch

from react_fast.envs import Record, TextEnv
from react_fast.envs.slot_models import Writer
from react_fast.envs.slots import ground_truth
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.tracker import CausalityTracker
from react_fast.tracker.effect_table import EffectTable
from react_fast.trainer.algorithms import GRPO
from react_fast.trainer.trainer import Trainer

from .dialogues import ALPHABET, Characters, counts, dialogues, policy, settings


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


def test_a_table_by_another_name_is_refused():
    with pytest.raises(ValueError, match="by must be"):
        EffectTable("position")
    with pytest.raises(ValueError, match=r"half_life must be in \[0.01, inf\], got 0"):
        EffectTable("token", half_life=0)
