"""A warning is given where the history calls for it, once, naming cause and remedy, and not where all is well."""

import json
import math

import pytest

import react_fast.trainer.symptoms
from react_fast.cli import main
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.state import join, split
from react_fast.trainer.symptoms import EVALUATIONS, STEPS, SYMPTOMS, WATCHED, Watch

from .tiny import train_words

CONFIG = TrainerConfig(group_size=4, max_new_tokens=77)
HEALTHY = {
    "loss": 0.1, "entropy": 1.0, "kl": 0.05, "grad_norm": 1.0, "frac_reward_zero_std": 0.3, "reward_std": 0.2,
    "completions/clipped_ratio": 0.1, "episodes/truncated_ratio": 0.0, "clip_ratio/low": 0.02,
    "clip_ratio/high": 0.03, "sampling/clipped_ratio": 0.0,
}  # fmt: skip


def _healthy(step):
    metrics = {**HEALTHY, "reward": 0.3 + 0.01 * step, "loss": 1.0 - 0.01 * step}
    return metrics | ({"eval/reward": 0.3 + 0.008 * step, "eval/loss": 1 - 0.008 * step} if step % 2 else {})


def _seen(history, config=CONFIG):
    """Warnings of each step."""
    watch = Watch(config)
    return [watch.see(metrics) for metrics in history]


def _all(history, config=CONFIG):
    return {name: text for step in _seen(history, config) for name, text in step.items()}


def _evaluations(name, values, **training):
    """Steps with `values` of a held-out metric at every second, and training metrics that go up or down."""
    for step in range(2 * len(values)):
        moved = {key: start + step * by for key, (start, by) in training.items()}
        yield {**HEALTHY, **moved, **({name: values[step // 2]} if step % 2 else {})}


# What is added to a healthy step: (the symptom's metrics, words of the cause, words of the remedy).
ILL = {
    "constant_reward": ({"reward": 0.0, "reward_std": 0.0}, "does not tell the answers apart", "env.reward"),
    "equal_rewards": ({"frac_reward_zero_std": 0.9}, "too easy or too hard", "trainer.group_size"),
    "kl_blow_up": ({"kl": 3.0}, "left it behind", "trainer.kl_coef"),
    "clipped_completions": ({"completions/clipped_ratio": 0.9}, "trainer.max_new_tokens = 77", "Raise it"),
    "truncated_episodes": (
        {"episodes/truncated_ratio": 0.9},
        "truncated by the environment",
        "env.max_turns",
    ),
    "gradient_not_finite": (
        {"grad_norm": math.inf, "skipped_updates": 1.0},
        "not finite",
        "trainer.learning_rate",
    ),
    "clipped_ratios": (
        {"clip_ratio/low": 0.2, "clip_ratio/high": 0.2},
        "the policy that sampled it",
        "trainer.epochs",
    ),
    "sampler_mismatch": ({"sampling/clipped_ratio": 0.3}, "another distribution", "rollout.sync_dir"),
}


@pytest.mark.parametrize("name", ILL)
def test_a_level_is_told_once_and_again_after_it_was_gone(name):
    metrics, cause, remedy = ILL[name]
    ill, well = [{**_healthy(s), **metrics} for s in range(8)], [_healthy(s) for s in range(8)]
    told = _seen([*well, *ill, *ill, *well, *ill])
    at = [step for step, found in enumerate(told) if name in found]
    assert len(at) == 2
    assert 8 <= at[0] <= 8 + STEPS
    assert at[1] >= 32
    text = told[at[0]][name]
    assert cause in text
    assert remedy in text
    assert "{" not in text
    assert set(_all([*well, *ill])) == {name}


def test_entropy_collapse():
    falling = [{**_healthy(step), "entropy": 2.0 * 0.5**step} for step in range(16)]
    text = _all(falling)["entropy_collapse"]
    assert "hardly explores" in text
    assert "trainer.entropy_coef" in text
    slowly = [{**_healthy(step), "entropy": 2.0 * 0.9**step} for step in range(16)]
    assert _all(slowly) == {}
    supervised = [{"entropy": 2.0 * 0.5**step, "loss": 1.0} for step in range(16)]
    assert _all(supervised) == {}, "a warm start is meant to lower it"


@pytest.mark.parametrize(
    ("name", "held_out", "values", "training"),
    [
        ("overfitting", "eval/reward", [0.5, 0.6, 0.5, 0.4, 0.3], {"reward": (0.5, 0.02)}),
        ("overfitting_loss", "eval/loss", [1.2, 1.0, 1.1, 1.2, 1.3], {"loss": (1.0, -0.02)}),
    ],
)
def test_overfitting(name, held_out, values, training):
    (text,) = _all(_evaluations(held_out, values, **training)).values()
    assert "while the training" in text
    assert "trainer.early_stopping" in text
    assert set(_all(_evaluations(held_out, values, **training))) == {name}
    noisy = [values[i] for i in (2, 3, 1, 4, 2, 3)]
    assert _all(_evaluations(held_out, noisy, **training)) == {}
    ((key, (start, by)),) = training.items()
    both = {key: (start, -by)}  # training gets worse, too: something else is wrong
    assert name not in _all(_evaluations(held_out, values, **both))
    assert len(values) > EVALUATIONS


def test_a_healthy_run_gets_none():
    assert _all([_healthy(step) for step in range(60)]) == {}
    assert set(ILL) | {"entropy_collapse", "overfitting", "overfitting_loss"} == {s.name for s in SYMPTOMS}


def test_groups_of_one_have_no_spread():
    alone = [{**_healthy(step), "frac_reward_zero_std": 1.0, "reward_std": 0.0} for step in range(10)]
    assert _all(alone, CONFIG.replace(group_size=1)) == {}


def _ill_for_a_while():
    """Steps that give warnings before, at and after every place where a run may stop; one is given twice."""
    ill = [{**_healthy(s), **metrics} for metrics, _, _ in ILL.values() for s in range(6)]
    falling = [{**_healthy(step), "entropy": 2.0 * 0.5**step} for step in range(16)]
    worse = list(_evaluations("eval/reward", [0.5, 0.6, 0.5, 0.4, 0.3], reward=(0.5, 0.02)))
    return [*ill, *[_healthy(step) for step in range(8)], *ill[:12], *falling, *worse]


@pytest.mark.parametrize("remembered", [8, 1000])
def test_a_watch_goes_on_from_its_state_at_any_step(remembered, monkeypatch):
    monkeypatch.setattr(react_fast.trainer.symptoms, "REMEMBERED", remembered)
    history = _ill_for_a_while()
    expected = _seen(history)
    assert sum(len(found) for found in expected) >= 8
    for stop in range(len(history)):
        first, second = Watch(CONFIG), Watch(CONFIG)
        assert [first.see(metrics) for metrics in history[:stop]] == expected[:stop]
        second.load_state_dict(join(*split(first.state_dict(), "watch")))
        assert [second.see(metrics) for metrics in history[stop : stop + 12]] == expected[stop : stop + 12]


def test_no_symptom_needs_what_is_not_remembered():
    """A history whose every value is out of range tells which names are read."""
    read = set()

    class Step(dict):
        def __contains__(self, name):
            read.add(name)
            return True

        def __getitem__(self, name):
            return 1.0

        def get(self, name, default=None):
            read.add(name)
            return 1.0

    for symptom in SYMPTOMS:
        symptom.level([Step() for _ in range(40)], CONFIG)
    assert read == set(WATCHED)


def test_a_resumed_run_warns_as_the_one_that_nobody_stopped(tmp_path):
    """Stopped at step 3, it would have to wait until step 8 to see five steps of its own."""
    written = []
    for name, stops in (("whole", [6]), ("halves", [3, 6])):
        (tmp_path / name).mkdir()
        words = train_words(tmp_path / name, warm_start={"steps": 0}, tracker={"enabled": False})
        words += ["--env.reward", f"{__name__}:always", "--resume", "auto"]
        for steps in stops:
            assert main([*words, "--trainer.steps", str(steps)]) == 0
            (tmp_path / name / "run" / "state.json").unlink()  # the training is not over yet
        written.append((tmp_path / name / "run" / "warnings.jsonl").read_text())
    assert written[0] == written[1]
    assert '"step": 5, "warning": "constant_reward"' in written[0]


def always(state, action, record):
    return 0.25


def test_a_run_with_a_constant_reward_says_so(tmp_path, capsys):
    words = train_words(tmp_path, trainer={"steps": STEPS + 1}, warm_start={"steps": 0})
    assert main([*words, "--env.reward", f"{__name__}:always"]) == 0
    shown = capsys.readouterr().out
    assert "warning after rl step 5: every reward of the last 5 steps was the same" in shown
    kept = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    (one,) = [record for record in kept if record["warning"] == "constant_reward"]
    assert (one["phase"], one["step"]) == ("rl", STEPS)
    assert "tokens/s" in shown
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["tokens_per_second"] > 0 for record in metrics)
