"""Two steps of TRL's trainers with and without `patch("trl")`: the same losses, gradient norms and weights."""

import contextlib
from dataclasses import replace

import pytest
import torch

import react_fast as rf
from react_fast.integrations import trl_logprobs
from react_fast.integrations.transformers import CausalityCallback
from react_fast.trainer.rollout import PolicyEngine, SamplingParams, key

from .peers import peer
from .training import make_policy, weights

PROMPTS = ["es>pt:Alemania=", "es>pt:Francia=", "es>it:España=", "es>it:Suiza="]
COMMON = {
    "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "log_level": "error",
    "per_device_train_batch_size": 4,
}  # fmt: skip
SAMPLED = {"num_generations": 2, "max_completion_length": 5, "temperature": 0.8}
LOGGED = ("loss", "grad_norm", "entropy", "reward", "logits/chosen", "mean_token_accuracy")


@pytest.fixture(scope="module")
def trl():
    return peer("trl")


def _vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / 8 for text in completions]


def _grpo(trl, folder, **options):
    config = trl.GRPOConfig(output_dir=str(folder), **{**COMMON, **SAMPLED, **options})
    return _online(trl.GRPOTrainer, config)


def _rloo(trl, folder):
    return _online(trl.RLOOTrainer, trl.RLOOConfig(output_dir=str(folder), **COMMON, **SAMPLED, beta=0.0))


def _online(kind, config):
    from datasets import Dataset

    model, tokenizer = make_policy(torch.float32)
    data = Dataset.from_list([{"prompt": text} for text in PROMPTS])
    return kind(
        model=model, reward_funcs=_vowels, args=config, train_dataset=data, processing_class=tokenizer
    )


def _dpo(trl, folder):
    from datasets import Dataset

    model, tokenizer = make_policy(torch.float32)
    config = trl.DPOConfig(output_dir=str(folder), **COMMON)
    data = Dataset.from_list(
        [{"prompt": text, "chosen": " Alemanha", "rejected": " Germany"} for text in PROMPTS]
    )
    return trl.DPOTrainer(
        model=model, ref_model=make_policy(torch.float32)[0], args=config, train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


RUNS = {
    "GRPO": _grpo,
    "GRPO with entropy bonus": lambda trl, folder: _grpo(trl, folder, entropy_coef=0.05),
    "RLOO": _rloo,
    "DPO": _dpo,
}


def _calls(monkeypatch):
    """A list that grows with every call of our head."""
    calls, head = [], trl_logprobs.head_logprobs
    monkeypatch.setattr(trl_logprobs, "head_logprobs", lambda *x, **y: calls.append(1) or head(*x, **y))
    return calls


@pytest.mark.parametrize("run", RUNS)
def test_two_steps_are_the_same(trl, tmp_path, run, monkeypatch):
    found, calls = [], _calls(monkeypatch)
    for number, context in enumerate((contextlib.nullcontext, lambda: rf.patch("trl"))):
        with context():
            trainer = RUNS[run](trl, tmp_path / str(number))
            trainer.train()
        assert bool(calls) == bool(number)  # the patch is live
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 2
        found.append((logs, weights(trainer.model)))
    (theirs, before), (ours, after) = found
    for wanted, got in zip(theirs, ours, strict=True):
        assert wanted.keys() == got.keys()
        for name in LOGGED:
            if name in wanted:
                assert got[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
    assert float(theirs[0]["grad_norm"]) > 0.01
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # of steps of 1e-2


def _with_credit(trl, folder, credit, reward=_vowels, max_steps=2, config=None, **options):
    from datasets import Dataset

    from react_fast.integrations.trl import GRPOTrainer

    model, tokenizer = make_policy(torch.float32)
    sizes = {**COMMON, **SAMPLED, "max_steps": max_steps, **(config or {})}
    config = trl.GRPOConfig(output_dir=str(folder), **sizes)
    return GRPOTrainer(
        model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]), credit=credit, **options,
    )  # fmt: skip


def test_the_subclass_replaces_no_global_and_trains_the_same(trl, tmp_path, monkeypatch):
    utils = peer("trl.trainer.utils")
    before = utils._ChunkedLogProbFunction, utils._use_triton
    theirs = _grpo(trl, tmp_path / "theirs", max_steps=1)
    theirs.train()
    calls = _calls(monkeypatch)
    ours = _with_credit(trl, tmp_path / "ours", "uniform", max_steps=1)
    ours.train()
    assert len(calls) == 1
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=1e-4)


def test_attribution_spreads_the_advantage_as_the_tracker_scores(trl, tmp_path):
    trainer = _with_credit(trl, tmp_path, "attribution", max_steps=1)
    trainer.train()
    inputs = [trainer.train_dataset[i // 2] for i in (0, 1, 2, 3)]
    trainer.model.train()
    output = trainer._generate_and_score_completions(inputs)
    mask, credit = output["completion_mask"].bool(), output["advantages"]
    assert credit.shape == mask.shape
    assert not credit[~mask].any()
    row = int(credit.abs().sum(1).argmax())
    prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
    response = output["completion_ids"][row][mask[row]]
    told = trainer.tracker.attribute(prompt.tolist(), response.tolist()).scores[len(prompt) :].abs()
    level = credit[row][mask[row]].sum() / mask[row].sum()  # what uniform credit gives
    wanted = level * (0.5 + 0.5 * told * len(told) / told.sum())
    torch.testing.assert_close(credit[row][mask[row]], wanted.to(credit), rtol=1e-4, atol=1e-6)


GROUPS = {"per_device_train_batch_size": 8, "num_generations": 4, "top_k": 40, "top_p": 0.95}


def _scored(trainer):
    """A batch of the trainer's with credit, the effects behind it, and TRL's own advantages."""
    measure, told = trainer.interventions.effects, {}

    def effects(output, mask):
        before = torch.get_rng_state()
        told["uniform"], told["effects"] = output["advantages"], measure(output, mask)
        assert torch.equal(torch.get_rng_state(), before)
        assert trainer.model.training
        return told["effects"]

    trainer.interventions.effects = effects
    trainer.model.train()
    size, group = trainer.args.per_device_train_batch_size, trainer.num_generations
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // group] for i in range(size)])
    return output, told["effects"], told["uniform"]


def test_causal_credit_concentrates_on_the_token_that_earns_the_reward(trl, tmp_path):
    """The reward looks at the second token alone: whether it is among the last half, which the first token hardly
    changes under one noise. Torch's random numbers do not hang on the reward's."""

    def second(completion_ids, **_):
        torch.rand(1)
        return [float(len(ids) > 1 and ids[1] >= half) for ids in completion_ids]

    many = {**SAMPLED, "per_device_train_batch_size": 32, "num_generations": 8}
    trainer = _with_credit(trl, tmp_path, "causal", second, config=many, credit_interventions=1000)
    half = len(trainer.processing_class) // 2
    output, effects, uniform = _scored(trainer)
    mask, measured = output["completion_mask"].bool(), ~effects.isnan().all(1)
    assert torch.equal(measured, uniform != 0)
    assert not effects[measured][:, 2:].any()
    assert float(effects[measured][:, 1].abs().sum()) > 2 * float(effects[measured][:, 0].abs().sum())
    above = output["advantages"] - torch.where(mask, uniform[:, None], 0.0)
    assert float((above.abs().argmax(1) == 1)[effects[:, 1].abs() > 0].float().mean()) > 0.9
    torch.testing.assert_close(above.sum(1), torch.zeros(32), rtol=0, atol=1e-5)  # float32, summed over 5


def test_effects_are_those_of_one_replay_for_every_place(trl, tmp_path):
    """With a budget for all, in the unit of the advantages; the sampler is another call for every replay."""
    trainer = _with_credit(trl, tmp_path, "causal", config=GROUPS, credit_interventions=1000)
    output, effects, uniform = _scored(trainer)
    tokenizer, compared = trainer.processing_class, 0
    engine = PolicyEngine(trainer.model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    params = SamplingParams(5, temperature=0.8, top_k=40, top_p=0.95, seed=key(trainer.args.seed, 7, 0))
    rows = [
        ids[seen.bool()].tolist()
        for ids, seen in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    rewards = torch.tensor(_vowels(tokenizer.batch_decode(rows, skip_special_tokens=True)))
    for row, ids in enumerate(rows):
        if not uniform[row]:
            assert effects[row].isnan().all()
            continue
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
        values = []
        for kept in range(len(ids)):
            alone = replace(params, max_new_tokens=5 - kept, rows=[row], skip=[kept])
            drawn = engine.generate([prompt + ids[:kept]], alone)[0].ids
            values += _vowels([tokenizer.decode(ids[:kept] + drawn, skip_special_tokens=True)])
        values = torch.tensor([*values, float(rewards[row])]).double()
        group = slice(row // 4 * 4, row // 4 * 4 + 4)
        unit = uniform[group].norm() / (rewards[group] - rewards[group].mean()).norm()
        found = effects[row] / unit
        torch.testing.assert_close(found.sum(), values[-1] - values[0], rtol=0, atol=1e-6)  # float32 rewards
        if len(values.unique()) == 1 + int((values.diff() != 0).sum()):  # no two values tie
            torch.testing.assert_close(found[: len(ids)], values.diff(), rtol=0, atol=1e-6)
            compared += bool(values.diff().any())
    assert compared > 1


@pytest.mark.parametrize("budget", [1, 7])
def test_interventions_stay_within_their_budget_and_log_nothing(trl, tmp_path, budget):
    seen = []

    def scored(completions, completion_ids, log_metric, **_):
        seen.append(len(completion_ids))
        log_metric("scored", float(len(completion_ids)))
        return _vowels(completions)

    trainer = _with_credit(trl, tmp_path, "causal", scored, config=GROUPS, credit_interventions=budget)
    trainer.train()
    starts = [i for i, count in enumerate(seen) if count == 8]
    assert len(starts) == 2
    for part in (seen[starts[0] + 1 : starts[1]], seen[starts[1] + 1 :]):
        assert 0 < sum(part) <= budget
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["scored"] == 8.0 for log in logs)


def test_another_process_that_asks_for_more_changes_no_effect(trl, tmp_path):
    """All processes score as many completions in as many rounds, since TRL gathers rewards."""
    found, seen = [], []

    def counted(completions, **_):
        seen.append(len(completions))
        return _vowels(completions)

    options = {"reward": counted, "config": GROUPS, "credit_interventions": 12}
    for most in (None, iter([4] * 6 + [0])):
        seen.clear()
        trainer = _with_credit(trl, tmp_path / str(len(found)), "causal", **options)
        if most:
            trainer.interventions._most = lambda count, most=most: next(most)
        found.append(_scored(trainer)[1])
    assert seen == [8] + [4] * 6
    assert torch.equal(found[0].nan_to_num(nan=7.0), found[1].nan_to_num(nan=7.0))
    assert found[0].nan_to_num().any()


def test_a_floor_of_one_trains_as_uniform_credit(trl, tmp_path):
    found = []
    for number, options in enumerate(
        ({"credit": "uniform"}, {"credit": "causal", "credit_floor": 1.0}, {"credit": "causal"})
    ):
        trainer = _with_credit(trl, tmp_path / str(number), config=GROUPS, **options)
        trainer.train()
        found.append(weights(trainer.model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_wrong_credit_is_refused(trl, tmp_path):
    with pytest.raises(ValueError, match=r"^credit must be one of uniform, attribution, causal, got 'all'$"):
        _with_credit(trl, tmp_path, "all")
    with pytest.raises(ValueError, match=r"^credit_interventions must be at least 1, got 0$"):
        _with_credit(trl, tmp_path, "causal", credit_interventions=0)
    with pytest.raises(ValueError, match=r"^credit must be uniform or attribution with a rollout_func, got"):
        _with_credit(trl, tmp_path, "causal", rollout_func=lambda *_: {})


def test_the_causality_callback_watches_completions(trl, tmp_path):
    callback = CausalityCallback()
    trainer = _grpo(trl, tmp_path, max_steps=1)
    trainer.add_callback(callback)
    trainer.train()
    report = callback.tracker.findings()["meta"]
    assert report["observed_calls"] == 1
    assert report["observed_tokens"] > 0
    assert any("causality/tokens" in log for log in trainer.state.log_history)
