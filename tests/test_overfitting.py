"""What keeps a policy from learning its records by heart acts, each in the direction it is meant to.

Early stopping hands back the best weights: `test_trainer.py`.
"""

import json
import math
import random

import pytest
import torch

from react_fast.cli import main
from react_fast.envs import Record, TextEnv
from react_fast.envs.augment import shuffle_facts
from react_fast.envs.tasks import question_answering
from react_fast.trainer.algorithms import GRPO, SFT
from react_fast.trainer.early_stopping import BestStep, EarlyStopping
from react_fast.trainer.model import fresh_model
from react_fast.trainer.trainer import Trainer

from .tiny import train_words
from .training import Log, make_config, make_env, make_policy, weights


def _trained(env, algorithm, *, dropout=0.0, augment=None, **changes):
    texts = [text for record in env.records for text in (record.prompt, record.reference or "")]
    model, tokenizer = fresh_model(
        texts, vocab_size=300, hidden_size=16, layers=2, heads=2, max_length=96, seed=3, dropout=dropout
    )
    log = Log()
    config = make_config(**changes)
    trainer = Trainer(
        model.double(), tokenizer, env, algorithm=algorithm, config=config, reporter=log, augment=augment
    )
    trainer.train()
    return trainer, log


def test_weight_decay_pulls_every_weight_towards_zero():
    moved = []
    for decay in (0.0, 0.5):
        model, tokenizer = make_policy()
        start = weights(model)
        config = make_config(steps=1, group_size=1, weight_decay=decay)
        Trainer(model, tokenizer, make_env(), algorithm=SFT(), config=config).train()
        moved.append(weights(model) - start)
    # Decoupled: beside the gradient's step, which is the same.
    torch.testing.assert_close(moved[1] - moved[0], -1e-2 * 0.5 * start, rtol=1e-10, atol=1e-14)


def test_dropout_fits_the_records_less():
    options = {"steps": 30, "prompts_per_step": 5, "group_size": 1}
    with_it, without = (_trained(make_env(), SFT(), dropout=rate, **options)[0] for rate in (0.4, 0.0))
    losses = [one.evaluate(make_env())["eval/loss"] for one in (with_it, without)]
    assert losses[0] > 1.5 * losses[1]


def test_kl_holds_the_policy_at_its_start():
    loose, tight = (
        _trained(make_env(), GRPO(), kl_coef=coef, steps=8, group_size=4, max_grad_norm=None)[1].metrics[-1][
            "kl"
        ]
        for coef in (1e-6, 10.0)
    )
    assert 0 < tight < 0.5 * loose


# ---- augmentation --------------------------------------------------------------------------------------------

FACTS = TextEnv(
    [
        Record(f"The capital of {a} is {b}. The river of {a} is {c}.\nQ: capital of {a}?\nA:", f" {b}")
        for a, b, c in (
            ("Ada", "Ulm", "Po"),
            ("Bec", "Rom", "Inn"),
            ("Cis", "Bon", "Ems"),
            ("Dor", "Wyk", "Aar"),
        )
    ]
)


def test_shuffled_facts_are_the_same_facts():
    for record in question_answering.load(split="train")[:40]:
        seen = {shuffle_facts(record, random.Random(seed)).prompt for seed in range(30)}
        assert record.prompt in seen
        assert len(seen) == 6, "three facts in any order"
        for prompt in seen:
            assert sorted(prompt.partition("\nQ:")[0]) == sorted(record.prompt.partition("\nQ:")[0])
            assert prompt.partition("\nQ:")[2] == record.prompt.partition("\nQ:")[2]
        assert shuffle_facts(record, random.Random(1)).reference == record.reference
    assert shuffle_facts(Record("no facts", "x"), random.Random(1)) == Record("no facts", "x")


def test_training_prompts_change_and_a_resumed_run_sees_the_same(tmp_path):
    options = {"steps": 4, "prompts_per_step": 4, "save_every": 2, "max_new_tokens": 3, "sample_every": 1}
    whole, log = _trained(FACTS, GRPO(), augment=shuffle_facts, checkpoint_dir=str(tmp_path), **options)
    plain = {record.prompt for record in FACTS.records}
    assert any(row["prompt"] not in plain for row in log.rows), "samples show what was asked"
    texts = [[whole.tokenizer.decode(t.token_ids) for t in whole.collect(step)] for step in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    for trajectory in whole.collect(0):
        asked = whole.tokenizer.decode(trajectory.token_ids[~trajectory.action_mask])
        assert asked.startswith(whole.env.records[trajectory.record].prompt)
    again = Trainer(
        fresh_model([r.prompt + (r.reference or "") for r in FACTS.records], vocab_size=300, hidden_size=16,
                    layers=2, heads=2, max_length=96, seed=3)[0].double(),
        whole.tokenizer, FACTS, algorithm=GRPO(), config=whole.config, augment=shuffle_facts,
    )  # fmt: skip
    again.load(tmp_path / "step-00000002")
    again.train()
    assert torch.equal(weights(again.model), weights(whole.model))
    assert plain == {record.prompt for record in FACTS.records}


def test_augmentation_teaches_what_the_records_alone_do_not():
    """The other order of the facts, which no record has."""
    turned = [Record(". ".join(r.prompt.partition("\nQ:")[0].rstrip(".").split(". ")[::-1]) + ".\nQ:"
                     + r.prompt.partition("\nQ:")[2], r.reference) for r in FACTS.records]  # fmt: skip
    losses = []
    for augment in (shuffle_facts, None):
        options = {"steps": 90, "prompts_per_step": 4, "group_size": 1, "learning_rate": 6e-3}
        trainer, _ = _trained(FACTS, SFT(), augment=augment, **options)
        losses.append([trainer.evaluate(env)["eval/loss"] for env in (FACTS, TextEnv(turned))])
    assert losses[0][1] < 0.5 * losses[1][1]
    assert losses[0][0] > losses[1][0], "the records themselves it fits less"


def louder(record, draw):
    return Record(f"{record.prompt} ({draw.randrange(100)})", record.reference, record.metadata)


def wrong(record, draw):
    return record.prompt


def test_a_run_takes_it_from_its_configuration(tmp_path, capsys):
    words = train_words(tmp_path, trainer={"sample_every": 1, "steps": 1})
    assert main([*words, "--env.augment", f"{__name__}:louder"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row["prompt"].endswith(")") for row in rows)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("louder", "env.augment must be module:function, got 'louder'"),
        (f"{__name__}:gone", f"env.augment names no function of {__name__}"),
        ("no_such_module:f", "env.augment names a module that cannot be imported: "),
    ],
)
def test_what_is_no_function_is_refused(tmp_path, capsys, name, message):
    assert main([*train_words(tmp_path), "--env.augment", name]) == 2
    assert message in capsys.readouterr().err


def test_an_augmentation_that_returns_no_record_is_refused():
    with pytest.raises(TypeError, match=r"^env\.augment must return a Record, got str$"):
        _trained(FACTS, SFT(), augment=wrong, steps=1, group_size=1)


def test_a_run_that_no_longer_stops_early_keeps_its_last_weights():
    model = torch.nn.Linear(1, 1)
    before = EarlyStopping(2)
    before.see(0.0, model)
    after = EarlyStopping(0)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        model.weight += 1
    trained = model.weight.detach().clone()
    after.restore(model)
    assert torch.equal(model.weight, trained)


def test_the_best_step_is_one_of_its_own_metric_and_never_nan():
    best = BestStep("eval/reward")
    best.see(1, {"eval/reward": math.nan})
    assert best.step is None
    best.see(2, {"eval/reward": 0.5})
    best.see(3, {"eval/reward": math.nan})
    best.see(4, {"eval/reward": 0.25})
    assert best.step == 2
    again, other = BestStep("eval/reward"), BestStep("-eval/loss")
    for one in (again, other):
        one.load_state_dict(best.state_dict())
    assert (again.step, other.step) == (2, None)
    other.see(5, {"eval/loss": 3.0})
    assert other.step == 5
