"""Training on several processes: the numbers of one process with the same global batch."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from react_fast.envs import Record, TextEnv
from react_fast.tracker import CausalityTracker
from react_fast.trainer.algorithms import GRPO, REINFORCE, SFT
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.model import fresh_model
from react_fast.trainer.rollout.weights import WeightFolder
from react_fast.trainer.state import whole
from react_fast.trainer.trainer import Trainer

RECORDS = [Record(f"say {i}:", f"word {i}") for i in range(7)]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (SFT(), {"group_size": 2}),
    "grpo": (GRPO(), {"micro_batch": 1, "kl_coef": 0.1, "entropy_coef": 0.01}),
    "reinforce": (REINFORCE(whiten=True), {"minibatches": 2, "epochs": 2, "optimizer": "sgd"}),
    "monte_carlo": (GRPO(), {"credit": "monte_carlo", "credit_samples": 2, "credit_actions": "word"}),
    "attribution": (GRPO(), {"credit": "attribution"}),
    "causal": (
        GRPO(),
        {
            "credit": "causal",
            "credit_by": "token_at_position",
            "credit_half_life": 1.5,
            "credit_interventions": 5,
        },
    ),
    "packed": (GRPO(), {"padding": "packed", "micro_tokens": 40, "kl_coef": 0.1}),
}


def _vowels(state: str, action: str, record: Record) -> float:
    return sum(letter in "aeiou" for letter in action) / 8


def _trainer(case: str, sharded: bool = False, **changes: Any) -> Trainer:
    algorithm, options = CASES[case]
    model, tokenizer = fresh_model(
        [r.prompt for r in RECORDS], vocab_size=270, hidden_size=16, layers=2, heads=2, max_length=64, seed=3
    )
    model = model.double()
    few = {"seed": 11, "steps": 3, "prompts_per_step": 4, "group_size": 2, "max_new_tokens": 5}
    config = TrainerConfig(**{**few, "learning_rate": 1e-2, "sharded": sharded, **options, **changes})
    env = TextEnv(RECORDS, reward=_vowels)
    tracker = CausalityTracker(model, tokenizer)
    return Trainer(model, tokenizer, env, algorithm=algorithm, tracker=tracker, config=config, eval_env=env)


def _outcome(trainer: Trainer) -> dict[str, Any]:
    """Metrics that do not hang on time, weights, the tracker's counts."""
    metrics = trainer.train()
    weights = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p
        for name, p in trainer.model.state_dict().items()
    }
    tracker = trainer.tracker.gather() if trainer.ranks.world > 1 else trainer.tracker
    return {
        "metrics": {
            name: value for name, value in metrics.items() if "time" not in name and "second" not in name
        },
        "weights": {name: x.detach().clone() for name, x in weights.items()},
        "observed": float(tracker.observed.by_position.count.sum()),
        "credited": int(tracker.credited.by_kind.count.sum()),
        "effects": trainer.replays.state_dict().get("effects", {}).get("moments"),
    }


def _forget() -> None:
    """accelerate keeps the number of processes for good."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _as_torchrun_does(rank: int, world: int) -> None:
    _forget()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, world, world)), strict=True))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # asked for, not used: the group is there


def _equals(rank: int, world: int, case: str, sharded: bool, expected: dict[str, Any]) -> None:
    _as_torchrun_does(rank, world)
    found = _outcome(_trainer(case, sharded))
    assert (found["observed"], found["credited"]) == (expected["observed"], expected["credited"])
    # float64 sums in another order, through three updates.
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-7, atol=1e-9)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-7, abs=1e-9)
    # Measured effects are differences of rewards: the same bits, unless a weight's last one turns a draw.
    tables: list[Any] = [None] * world
    torch.distributed.all_gather_object(tables, found["effects"])
    assert case != "causal" or int(found["effects"]["count"].sum()) > 0
    for table in (*tables, expected["effects"]):
        torch.testing.assert_close(table, found["effects"], rtol=0, atol=0)


# Two processes do everything; with four, whose shares may be uneven, each kind of split is seen once.
SPLITS = [(2, case, sharded) for case in CASES for sharded in (False, True)]
SPLITS += [(4, "monte_carlo", False), (4, "reinforce", True)]


@pytest.mark.parametrize(("ranks", "case", "sharded"), SPLITS, indirect=["ranks"], scope="session")
def test_equals_one_process(ranks, case, sharded):
    ranks.run(_equals, case, sharded, _outcome(_trainer(case)))


def _saves_and_resumes(rank: int, world: int, folder: Path, sharded: bool, expected: dict[str, Any]) -> None:
    _as_torchrun_does(rank, world)
    common = {"checkpoint_dir": str(folder), "kl_coef": 0.1, "save_every": 1}
    first = _trainer("grpo", sharded, **{**common, "steps": 2})
    first.train()
    torch.distributed.barrier()
    second = _trainer("grpo", sharded, **common)
    second.load(sorted(folder.glob("step-*"))[-1])
    assert second.step == 2
    found = _outcome(second)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-7, atol=1e-9)
    assert found["observed"] == expected["observed"]


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_a_checkpoint_of_many_is_one_of_one_process(ranks, tmp_path, sharded):
    expected = _outcome(_trainer("grpo"))
    ranks.run(_saves_and_resumes, tmp_path, sharded, expected)
    alone = _trainer("grpo", kl_coef=0.1)
    alone.load(tmp_path / "step-00000002")
    torch.testing.assert_close(_outcome(alone)["weights"], expected["weights"], rtol=1e-7, atol=1e-9)


class _Server:
    """An engine that holds a copy of the policy, in a folder."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.generate = trainer.policy_engine.generate
        self.weights, self.version, self.given = WeightFolder(folder, None), 0, 0

    def sync_weights(self, model: Any, version: int, weights: Any = None) -> None:
        self.weights.write(model, version, weights)
        self.version, self.given = version, self.given + 1


def _gives_weights_once(rank: int, world: int, folder: Path, sharded: bool) -> None:
    _as_torchrun_does(rank, world)
    trainer = _trainer("grpo", sharded)
    trainer.engine = engine = _Server(trainer, folder)
    trainer.train_step()
    trainer.synchronise()
    assert engine.version == trainer.updates == 1
    assert engine.given == (2 if rank == 0 else 0)
    own = whole(dict(trainer.model.named_parameters()), keep=True)
    for name, value in load_file(folder / "version-00000001" / "model.safetensors").items():
        assert torch.equal(value, own[name]), name


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
@pytest.mark.parametrize("ranks", [2], indirect=True, scope="session")
def test_one_process_gives_a_server_the_weights(ranks, tmp_path, sharded):
    ranks.run(_gives_weights_once, tmp_path, sharded)


def _refuses(rank: int, world: int) -> None:
    _as_torchrun_does(rank, world)
    with pytest.raises(ValueError, match=rf"the 3 sequences of an update .* divisible by {world} processes"):
        _trainer("grpo", prompts_per_step=3, group_size=1)


def test_a_batch_that_the_processes_cannot_share_is_refused(ranks):
    ranks.run(_refuses)
