"""Trainer: equal to the reference loop with trackers on, independent of micro-batches."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch

import react_fast
from react_fast.envs import Record, TextEnv
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.tracker.policy import cache_argument
from react_fast.trainer.algorithms import GRPO, REINFORCE, SFT
from react_fast.trainer.config import TrackerConfig
from react_fast.trainer.explain import make_tracker
from react_fast.trainer.rollout import Episodes, SamplingParams
from react_fast.trainer.section import ConfigError
from react_fast.trainer.trainer import Trainer

from . import policies
from .training import RECORDS
from .training import Log as _Log
from .training import make_config as _config
from .training import make_env as _env
from .training import make_policy as _policy
from .training import vowels as _vowels
from .training import weights as _weights


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("credit", ["uniform", "attribution"])
def test_parity_with_trackers_on(credit, every):
    """Both loops, each with its tracker, on the same rollouts: the same parameters and the same moments."""
    config = _config(credit=credit, credit_floor=0.3, minibatches=2, kl_coef=0.05)
    (fast, tokenizer), (slow, _) = _policy(), _policy()
    watched = react_fast.CausalityTracker(fast, tokenizer, every=every)
    loops = react_fast.reference.Tracker(slow, tokenizer, every=every)
    trainer = Trainer(fast, tokenizer, _env(), algorithm=GRPO(), tracker=watched, config=config)
    reference = ReferenceTrainer(slow, tokenizer, _env(), algorithm=GRPO(), tracker=loops, config=config)
    for _ in range(config.steps):
        trajectories = trainer.collect()
        trainer.train_step()
        reference.train_step(trajectories)
    torch.testing.assert_close(_weights(fast), _weights(slow), rtol=0, atol=1e-9)
    assert int(watched.by_token.count.sum()) > 0
    policies.assert_moments(watched.by_token, loops.by_token)
    policies.assert_moments(watched.by_position, loops.by_position)
    if credit == "attribution":
        plain, _ = _policy()
        uniform = _config(credit="uniform", minibatches=2, kl_coef=0.05)
        Trainer(plain, tokenizer, _env(), algorithm=GRPO(), config=uniform).train()
        assert float((_weights(plain) - _weights(fast)).abs().max()) > 1e-4, "credit must change the update"


@pytest.mark.parametrize("algorithm", [SFT(), GRPO()], ids=["sft", "grpo"])
def test_micro_batches_change_memory_and_not_the_result(algorithm):
    results = []
    for micro_batch in (None, 1, 4):
        model, tokenizer = _policy()
        config = _config(
            micro_batch=micro_batch, prompts_per_step=5, group_size=2 if algorithm == GRPO() else 1
        )
        Trainer(model, tokenizer, _env(), algorithm=algorithm, config=config).train()
        results.append(_weights(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-10)


def test_rollouts_do_not_depend_on_how_they_are_batched():
    model, tokenizer = _policy()
    trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=_config(prompts_per_step=5))
    together = trainer.collect()
    records = [record for record in trainer.records_of(0) for _ in range(3)]
    alone = []
    for row, record in enumerate(records):
        params = SamplingParams(6, seed=11, step=0, rows=[row])
        alone += Episodes(trainer.engine, tokenizer, _env()).play([record], [row // 3], params)
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        torch.testing.assert_close(one.sampler_logprobs, other.sampler_logprobs, rtol=1e-6, atol=1e-6)


def test_sampler_logprobs_are_those_of_the_update():
    """Token in, token out: the log-probs of the sampler and of the training forward are the same numbers."""
    model, tokenizer = _policy()
    config = _config(temperature=0.8, epochs=2)
    trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config)
    batch = trainer.score(trainer.collect())
    assert batch.old_logprobs is not None
    torch.testing.assert_close(batch.old_logprobs.float(), batch.sampler_logprobs, rtol=0, atol=1e-5)


def test_sft_learns_its_references_and_grpo_its_reward():
    model, tokenizer = _policy(torch.float32)
    log = _Log()
    config = _config(steps=150, prompts_per_step=5, group_size=1, learning_rate=1e-2)
    trainer = Trainer(model, tokenizer, _env(), algorithm=SFT(), config=config, reporter=log)
    trainer.train()
    assert log.metrics[0]["loss"] > 5
    assert log.metrics[-1]["loss"] < 0.1

    model, tokenizer = _policy(torch.float32)
    log = _Log()
    config = _config(steps=40, prompts_per_step=4, group_size=8, learning_rate=1e-2)
    Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config, reporter=log).train()
    early = sum(m["reward"] for m in log.metrics[:5]) / 5
    late = sum(m["reward"] for m in log.metrics[-5:]) / 5
    assert late > early + 0.3


def test_multi_turn_episodes_mask_what_the_environment_says():
    def converse(state: str, action: str, record: Record) -> str:
        return f"{state}{action};again:"

    env = TextEnv(RECORDS, transition=converse, reward=_vowels, max_turns=2)
    model, tokenizer = _policy()
    trainer = Trainer(model, tokenizer, env, algorithm=REINFORCE(gamma=0.5), config=_config())
    for trajectory in trainer.collect():
        assert len(trajectory.rewards) == 2
        answer = trajectory.token_ids[(trajectory.turn_index == 1) & ~trajectory.action_mask]
        assert tokenizer.decode(answer.tolist()) == ";again:"
    slow, _ = _policy()
    reference = ReferenceTrainer(slow, tokenizer, env, algorithm=REINFORCE(gamma=0.5), config=_config())
    for _ in range(3):
        trainer.train_step()
        reference.train_step(reference.collect())
    torch.testing.assert_close(_weights(model), _weights(slow), rtol=0, atol=1e-9)


def test_prompts_are_learnt_too_and_evaluations_count_the_references():
    found = {}
    for learns in ("reference", "all"):
        trainer = Trainer(*_policy(), _env(), algorithm=SFT(learns=learns), config=_config(), eval_env=_env())
        found[learns] = sum(int(t.action_mask.sum()) for t in trainer.collect()), trainer.evaluate()
        lengths = sum(len(t.token_ids) - 1 for t in trainer.collect())
    assert found["all"][0] == lengths > found["reference"][0]
    assert found["all"][1] == found["reference"][1]
    with pytest.raises(ValueError, match="learns must be 'reference' or 'all', got 'prompt'"):
        SFT(learns="prompt")


def test_early_stopping_hands_back_the_best_weights():
    model, tokenizer = _policy(torch.float32)
    log = _Log()
    config = _config(
        steps=200, prompts_per_step=3, group_size=1, learning_rate=2e-2, eval_every=5, early_stopping=2
    )
    held_out = TextEnv([Record("es>pt:Italia=", "Itália")], reward=_vowels)
    trainer = Trainer(
        model, tokenizer, _env(), algorithm=SFT(), config=config, reporter=log, eval_env=held_out
    )
    trainer.train()
    losses = [m["eval/loss"] for m in log.metrics if "eval/loss" in m]
    assert trainer.step < 200, "must stop early"
    assert trainer.evaluate()["eval/loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "credit"),
    [
        (SFT(), "uniform"),
        *itertools.product(
            (GRPO(), GRPO(aggregation="seq_mean_token_mean"), REINFORCE(whiten=True)),
            ("uniform", "attribution"),
        ),
    ],
)
def test_all_masked_batch_changes_nothing(algorithm, credit):
    model, tokenizer = _policy()
    config = _config(optimizer="sgd", credit=credit, kl_coef=0.1, entropy_coef=0.01, minibatches=2)
    tracker = react_fast.CausalityTracker(model, tokenizer)
    trainer = Trainer(model, tokenizer, _env(), algorithm=algorithm, tracker=tracker, config=config)
    trajectories = trainer.collect()
    for trajectory in trajectories:
        trajectory.action_mask[:] = False
    before = _weights(model)
    metrics = trainer.update(trainer.credit(trainer.score(trajectories)))
    assert metrics["loss"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert torch.equal(_weights(model), before)
    assert int(tracker.by_token.count.sum()) == 0


@pytest.mark.parametrize(
    "algorithm",
    [GRPO(), GRPO(baseline="leave_one_out"), REINFORCE(baseline="group"), REINFORCE(whiten=True)],
    ids=["grpo", "grpo leave-one-out", "reinforce group", "reinforce whitened"],
)
def test_group_of_one_gives_no_nan(algorithm):
    """A response without others to compare it with teaches nothing relative; it must not teach noise either."""
    model, tokenizer = _policy()
    config = _config(optimizer="sgd", prompts_per_step=1, group_size=1)
    trainer = Trainer(model, tokenizer, _env(), algorithm=algorithm, config=config)
    before = _weights(model)
    batch = trainer.credit(trainer.score(trainer.collect()))
    assert bool(batch.advantages.isfinite().all())
    if isinstance(algorithm, GRPO):
        assert bool((batch.advantages == 0).all())
    metrics = trainer.update(batch)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert bool(_weights(model).isfinite().all())
    if isinstance(algorithm, GRPO):
        assert torch.equal(_weights(model), before)


def test_an_update_that_is_not_finite_is_skipped_and_told():
    model, tokenizer = _policy()
    trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=_config())
    batch = trainer.credit(trainer.score(trainer.collect()))
    batch.advantages[0] = torch.nan
    before = _weights(model)
    with pytest.warns(UserWarning, match="train step 1: gradient norm is nan, update skipped"):
        metrics = trainer.update(batch)
    assert metrics["skipped_updates"] == 1
    assert torch.equal(_weights(model), before)


def test_rollouts_ask_for_the_cache_by_its_own_name():
    """transformers renamed the argument; the old name warns, then goes away."""
    model, tokenizer = _policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=_config()).collect()
        react_fast.CausalityTracker(model, tokenizer).explain(["es>pt:Alemania="])

    class Old(torch.nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    assert cache_argument(Old()) == "past_key_values"


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_every_backend_trains_alike(backend):
    model, tokenizer = _policy()
    with react_fast.use_backend(backend):
        Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=_config(steps=2)).train()
    expected, _ = _policy()
    Trainer(expected, tokenizer, _env(), algorithm=GRPO(), config=_config(steps=2)).train()
    torch.testing.assert_close(_weights(model), _weights(expected), rtol=0, atol=1e-9)


def test_bad_input_is_refused_in_one_line():
    model, tokenizer = _policy()
    with pytest.raises(
        ValueError, match=r"tracker must be given when config\.credit is 'attribution', got None"
    ):
        Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=_config(credit="attribution"))
    with pytest.raises(ConfigError, match="eval_every must be at least 1 when early_stopping is given"):
        _config(early_stopping=1)
    watched = _config(early_stopping=1, eval_every=1)
    with pytest.raises(ValueError, match=r"eval_env must be given when config\.early_stopping is, got None"):
        Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=watched)
    untitled = TextEnv([Record("a=")], reward=_vowels)
    with pytest.raises(ValueError, match=r"records\[0\].reference must be a text"):
        Trainer(model, tokenizer, untitled, algorithm=SFT(), config=_config()).collect()
    trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=_config())
    with pytest.raises(ValueError, match="trajectories must hold at least one trajectory, got none"):
        trainer.score([])


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (REINFORCE, {"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        (REINFORCE, {"gamma": "1"}, TypeError, "gamma must be a number, got str"),
        (REINFORCE, {"baseline": "value"}, ValueError, "baseline must be one of 'batch', .* got 'value'"),
        (REINFORCE, {"whiten": 1}, TypeError, "whiten must be true or false, got 1"),
        (REINFORCE, {"kl_gradient": "k1"}, ValueError, "kl_gradient must be one of"),
        (GRPO, {"ratio_min": -0.1}, ValueError, r"ratio_min must be in \[0, inf\], got -0.1"),
        (GRPO, {"ratio_max": "wide"}, TypeError, "ratio_max must be a number, got str"),
        (GRPO, {"ratio_max": 0.5}, ValueError, "ratio_min and ratio_max must satisfy"),
        (GRPO, {"baseline": "batch"}, ValueError, "baseline must be one of 'mean', .* got 'batch'"),
        (GRPO, {"scale": "iqr"}, ValueError, "scale must be one of 'std', .* got 'iqr'"),
        (GRPO, {"eps": 0.0}, ValueError, r"eps must be in \(0, inf\], got 0"),
        (GRPO, {"aggregation": "mean"}, ValueError, "aggregation must be one of"),
        (GRPO, {"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of"),
        (SamplingParams, {"max_new_tokens": 4, "temperature": 0}, ValueError, r"temperature must be in \[1e-30"),
        (SamplingParams, {"max_new_tokens": 4, "temperature": math.nan}, ValueError, "temperature must be in"),
        (SamplingParams, {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_trained(make, options, error, text):
    with pytest.raises(error, match=text):
        make(**options)
    assert GRPO(scale="none", eps=0.0).eps == 0


def test_the_tracker_tells_the_records_groups_apart():
    """Tokens before a row's last action, by the language that its record asks for."""
    records = [Record(r.prompt, r.reference, {"group": r.prompt[3:5]}) for r in RECORDS]
    model, tokenizer = _policy()
    config = TrackerConfig(groups=["pt", "it"], decay=1.0)
    tracker = make_tracker(config, model, tokenizer)
    trainer = Trainer(
        model,
        tokenizer,
        TextEnv(records, reward=_vowels),
        algorithm=GRPO(),
        tracker=tracker,
        config=_config(micro_batch=2, prompts_per_step=4, seed=1),
    )
    expected = {"pt": 0, "it": 0}
    for one in trainer.collect():
        expected[records[one.record].metadata["group"]] += int(one.action_mask.nonzero()[-1])
    trainer.train_step()
    found = tracker.key_features(9, families=("group",), min_count=2)
    assert {one.name: one.count for one in found} == expected
    assert min(expected.values()) > 0
    with pytest.raises(
        ValueError, match=r"records\[0\] must have one of \['pt', 'it'\] as metadata 'group', got None"
    ):
        Trainer(model, tokenizer, _env(), algorithm=GRPO(), tracker=tracker, config=_config())
