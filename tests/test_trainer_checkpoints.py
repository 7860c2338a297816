"""Checkpoints of a trainer: resumed to the bit, written at Ctrl-C, and the best one kept."""

import os
import signal
from typing import Any

import pytest
import torch

from react_fast.envs import TextEnv
from react_fast.trainer.algorithms import GRPO, SFT
from react_fast.trainer.checkpoint import CheckpointError, best_complete, newest_complete
from react_fast.trainer.section import ConfigError
from react_fast.trainer.trainer import Trainer

from .training import Log as _Log
from .training import make_config as _config
from .training import make_env as _env
from .training import make_policy as _policy
from .training import weights as _weights


@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_resume_gives_bitwise_the_same_weights(tmp_path, phase):
    algorithm = {"sft": SFT(), "grpo": GRPO()}[phase]
    changes = {"kl_coef": 0.1, "minibatches": 2} if phase == "grpo" else {}

    def train(folder: str, steps: int, resume: str | None = None) -> Any:
        model, tokenizer = _policy(torch.float32, dropout=0.1)
        config = _config(checkpoint_dir=str(tmp_path / folder), steps=6, save_every=2, **changes)
        trainer = Trainer(model, tokenizer, _env(), algorithm=algorithm, config=config)
        if steps < 6:
            for _ in range(steps):
                trainer.train_step()
            trainer.save()
        else:
            trainer.train(resume=resume)
        return model

    whole = _weights(train("whole", 6))
    train("cut", 3)
    resumed = _weights(train("cut", 6, resume="auto"))
    assert torch.equal(whole, resumed)


class _Interrupt(_Log):
    """Presses Ctrl-C when a step is logged, or twice."""

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times = at, times

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        for _ in range(self.times if step == self.at else 0):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", [2, 5], ids=["in the middle", "in the last step"])
def test_ctrl_c_saves_the_step_and_resumes_to_the_same_weights(tmp_path, at, capsys):
    def trainer(folder: str, **options: Any) -> Trainer:
        model, tokenizer = _policy(torch.float32)
        config = _config(checkpoint_dir=str(tmp_path / folder))
        return Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config, **options)

    whole = trainer("whole")
    whole.train()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", reporter=_Interrupt(at)).train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopping after this step" in capsys.readouterr().out
    saved = newest_complete(tmp_path / "cut")
    assert saved is not None
    assert saved.name == f"step-{at:08d}"
    resumed = trainer("cut")
    resumed.train(resume="auto")
    assert torch.equal(_weights(resumed.model), _weights(whole.model))


def test_a_second_ctrl_c_stops_at_once_and_the_saved_steps_stay(tmp_path):
    model, tokenizer = _policy(torch.float32)
    config = _config(checkpoint_dir=str(tmp_path), save_every=1)
    trainer = Trainer(
        model, tokenizer, _env(), algorithm=GRPO(), config=config, reporter=_Interrupt(3, times=2)
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saved = newest_complete(tmp_path)
    assert saved is not None
    assert saved.name == "step-00000002"


def test_ctrl_c_while_the_last_step_is_saved_is_not_lost(tmp_path):
    """What follows the training, such as the next phase of a run, must not begin."""
    model, tokenizer = _policy(torch.float32)
    config = _config(checkpoint_dir=str(tmp_path), steps=2)
    trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config)
    save = trainer.save

    def interrupted() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return save()

    trainer.save = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert newest_complete(tmp_path) == tmp_path / "step-00000002"


def _evaluated(folder: Any, values: dict[int, float], **changes: Any) -> Trainer:
    """A trainer whose evaluation behind a step gives what stands there."""

    class Scripted(GRPO):
        def held_out(self, trainer: Trainer, env: TextEnv) -> tuple[dict[str, float], float]:
            return {"eval/reward": values[trainer.step]}, -values[trainer.step]

    few = {"checkpoint_dir": str(folder), "keep_checkpoints": 1, "eval_every": 1, "save_every": 2}
    config = _config(**{**few, "best_by": "eval/reward", "steps": len(values), **changes})
    return Trainer(*_policy(), _env(), algorithm=Scripted(), config=config, eval_env=_env())


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    values = {1: 0.1, 2: 0.3, 3: 0.9, 4: 0.2, 5: 0.9}
    _evaluated(tmp_path, dict(list(values.items())[:4])).train()
    assert best_complete(tmp_path) == tmp_path / "step-00000003"
    going_on = _evaluated(tmp_path, values)
    going_on.train(resume="auto")
    assert going_on.best.step == 3
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000005"]
    assert best_complete(tmp_path) == tmp_path / "step-00000003"
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: 0 bytes"):
        best_complete(tmp_path)
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"best.json is damaged: it must name a step"):
        best_complete(tmp_path)


def test_best_by_may_ask_for_the_lowest_and_must_be_a_metric(tmp_path):
    values = {1: 0.3, 2: 0.1, 3: 0.2}
    _evaluated(tmp_path, values, best_by="-eval/reward").train()
    assert best_complete(tmp_path) == tmp_path / "step-00000002"
    with pytest.raises(
        ValueError, match=r"best_by must be a metric of evaluations \(eval/reward\), got 'chrf'"
    ):
        _evaluated(tmp_path / "other", values, best_by="chrf")
    with pytest.raises(ConfigError, match="eval_every must be at least 1 when best_by is given, got 0"):
        _evaluated(tmp_path / "other", values, eval_every=0)
