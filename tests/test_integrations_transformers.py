"""The causality callback in Hugging Face's Trainer: what it reads is what the tracker's own `observe` reads."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from react_fast.integrations.transformers import CausalityCallback
from react_fast.tracker import CausalityTracker

from .training import make_policy, weights

WIDTH, PROMPT = 8, 3


def _rows():
    ids = torch.randint(5, 250, (8, WIDTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    seen = torch.ones_like(ids)
    seen[1, -2:], labels[1, -2:] = 0, -100
    return [
        {"input_ids": i, "attention_mask": s, "labels": x} for i, s, x in zip(ids, seen, labels, strict=True)
    ]


def _train(folder, callbacks, steps=4, resume=None, **options):
    model, _ = make_policy(torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, save_steps=2, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=_rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _same(a, b):
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-9)


def test_observed_is_what_the_tracker_observes_around_the_step(tmp_path):
    callback = CausalityCallback()
    trainer = _train(tmp_path, [callback], steps=1)
    batch = _first_batch(trainer)
    model, _ = make_policy(torch.float32)
    tracker = CausalityTracker(model)
    with tracker.observe(batch["input_ids"], batch["labels"] != -100, batch["attention_mask"], step=0):
        model.train()(**batch).loss.backward()
    _same(callback.tracker.by_token.state_dict(), tracker.by_token.state_dict())
    _same(callback.tracker.by_position.state_dict(), tracker.by_position.state_dict())


def _first_batch(trainer):
    """Of a fresh sampler with the same seed."""
    from transformers import set_seed

    set_seed(trainer.args.seed)
    return dict(next(iter(trainer.get_train_dataloader())))


def test_training_is_bitwise_the_same_and_evaluation_is_not_observed(tmp_path):
    plain = _train(tmp_path / "plain", [], gradient_accumulation_steps=2)
    callback = CausalityCallback()
    watched = _train(tmp_path / "watched", [callback], gradient_accumulation_steps=2)
    assert torch.equal(weights(plain.model), weights(watched.model))
    assert callback.tracker.calls == 8
    before = int(callback.tracker.by_token.count.sum())
    watched.evaluate(_rows())
    watched.model.train()(
        input_ids=torch.ones(1, 3, dtype=torch.long)
    )  # after the training: no hooks are left
    assert int(callback.tracker.by_token.count.sum()) == before > 0


def test_features_are_logged(tmp_path):
    trainer = _train(tmp_path, [CausalityCallback(features=3)])
    told = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["causality/tokens"] > 0 for log in told] == [True] * 4
    assert any(name.startswith("causality/position ") for log in told for name in log)


def test_a_resumed_run_goes_on_with_the_tracker(tmp_path):
    whole = CausalityCallback()
    _train(tmp_path, [whole])
    again = CausalityCallback()
    _train(tmp_path, [again], resume=str(tmp_path / "checkpoint-2"))
    _same(again.tracker.by_token.state_dict(), whole.tracker.by_token.state_dict())
    assert again.tracker.calls == whole.tracker.calls == 4
    (tmp_path / "checkpoint-2" / "causality.pt").unlink()
    with pytest.warns(UserWarning, match="the causality tracker starts anew"):
        _train(tmp_path, [CausalityCallback()], resume=str(tmp_path / "checkpoint-2"))


def test_a_given_tracker_takes_no_options():
    model, _ = make_policy(torch.float32)
    with pytest.raises(ValueError, match=r"^options must be empty with a tracker, got every$"):
        CausalityCallback(CausalityTracker(model), every=2)
