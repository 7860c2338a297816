"""What a trainer's checkpoint holds beside the weights, as one tree."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, save_checkpoint
from .state import load_module_state, load_optimizer_state, split


def state_tree(trainer: Any) -> dict[str, Any]:
    """Where a trainer is after its finished steps; every rank has to ask."""
    tracker = trainer.tracker
    if tracker is not None and trainer.ranks.world > 1:
        tracker = tracker.gather()
    return {
        "step": trainer.step,
        "updates": trainer.updater.updates,
        "optimizer": trainer.updater.optimizer.state_dict(),
        "heads": trainer.policy.heads.state_dict(),
        "memory": trainer.memory.state_dict() if trainer.memory is not None else None,
        "replays": trainer.replays.state_dict(),
        "stopping": trainer.stopping.state_dict(),
        "best": trainer.best.state_dict(),
        "watch": trainer.watch.state_dict(),
        "reference": trainer.reference.state_dict() if trainer.reference is not None else None,
        "tracker": tracker.state_dict() if tracker is not None else None,
    }


def write(trainer: Any, tree: dict[str, Any], weights: Any) -> Path:
    """The checkpoint of a whole tree and, where the ranks hold shards, of the whole weights."""
    rest, tensors = split(tree, "trainer")
    return save_checkpoint(
        trainer.config.checkpoint_dir,
        trainer.step,
        model=trainer.model,
        weights=weights,
        tokenizer=trainer.tokenizer if hasattr(trainer.tokenizer, "save_pretrained") else None,
        tensors=tensors,
        state={"trainer": rest, "phase": trainer.phase},
        keep=trainer.config.keep_checkpoints,
        best=trainer.best.step,
    )


def load_state_tree(trainer: Any, tree: dict[str, Any]) -> None:
    """Take a trainer back to where `state_tree` was asked."""
    trainer.step, trainer.updater.updates = tree["step"], tree["updates"]
    trainer.replays.load_state_dict(tree.get("replays") or {})
    trainer.stopping.load_state_dict(tree["stopping"])
    trainer.best.load_state_dict(tree["best"])
    trainer.watch.load_state_dict(tree.get("watch") or {})
    load_optimizer_state(trainer.updater.optimizer, tree["optimizer"])
    load_module_state(trainer.policy.heads, tree["heads"])
    if trainer.memory is not None:
        trainer.memory.load_state_dict(tree["memory"])
    if trainer.reference is not None and tree["reference"] is not None:
        load_module_state(trainer.reference, tree["reference"])
    if trainer.tracker is not None and tree["tracker"] is not None and trainer.ranks.first:
        trainer.tracker.load_state_dict(tree["tracker"])


@contextmanager
def same_setting(path: str | Path) -> Iterator[None]:
    """A checkpoint that does not fit what it is loaded into is told in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} is of another version or setting: {problem}") from error
