"""A run's folder: who may use it, how far the run is, where its files lie."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from .adapters import BASE
from .checkpoint import CheckpointError, best_complete, newest_complete
from .config import RunConfig
from .reporter import METRICS

CONFIG, STATE, ENVIRONMENT, RESULTS, REPORT = (
    "config.yaml",
    "state.json",
    "environment.json",
    "results.json",
    "report.html",
)
# In the order in which a run goes through them; the last two leave checkpoints.
PHASES = ("random", "warm_start", "rl")


class UserError(RuntimeError):
    """Something the user can mend, told in one line."""


class RunFolder:
    """The folder of one run, locked against other processes while open.

    state.json holds what is finished: {"results": {phase: metrics of its test}}. It is replaced by one
    rename, so a run killed at any moment knows which phase to go on with.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        """writes: false for a process that reads what another one of the same run writes."""
        self.path, self.writes = Path(path), writes
        self._lock: int | None = None

    def open(self, *, resume: bool) -> None:
        """Claim the folder for a new run, or for going on with the one that is there.

        Raises: UserError if another process uses it, or if it holds a run and `resume` is false.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"run folder {self.path} is in use by another process") from None
        except OSError as error:
            raise UserError(f"run folder {self.path} cannot be used: {error.strerror}") from None
        held = [name for name in (CONFIG, STATE, METRICS) if (self.path / name).exists()]
        if held and not resume:
            self.close()
            raise UserError(
                f"run folder {self.path} is already in use (it holds {held[0]}); "
                "go on with --resume auto or choose another --run_dir"
            )

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def results(self) -> dict[str, Any]:
        """Test metrics of every finished phase."""
        return self._state().get("results", {})

    def finish(self, phase: str, result: dict[str, Any]) -> None:
        """Record that a phase is trained and tested."""
        self.write_json(STATE, {"results": {**self.results, phase: result}})

    def forget_from(self, phase: str) -> None:
        """Take back the results of `phase` and of those after it, since they will be done again."""
        kept = PHASES[: PHASES.index(phase)]
        self.write_json(STATE, {"results": {k: v for k, v in self.results.items() if k in kept}})

    def checkpoints(self, phase: str) -> Path:
        """Folder of a phase's checkpoints."""
        return self.path / "checkpoints" / phase

    def newest_checkpoint(self) -> Path:
        """Newest complete checkpoint of the run.

        Raises: UserError if there is none.
        """
        for phase in reversed(PHASES):
            found = newest_complete(self.checkpoints(phase))
            if found is not None:
                return found
        raise UserError(f"run {self.path} has no complete checkpoint")

    def best_checkpoint(self) -> Path:
        """The checkpoint that `trainer.best_by` chose.

        Raises: UserError if there is none, or if it is damaged.
        """
        try:
            found = best_complete(self.checkpoints(PHASES[-1]))
        except CheckpointError as error:
            raise UserError(str(error)) from error
        if found is None:
            raise UserError(f"run {self.path} has no best checkpoint: trainer.best_by chooses one")
        return found

    def keep_base(self, model: Any, tokenizer: Any) -> Path:
        """Folder of a model that adapters are trained on, written once."""
        base = self.path / BASE
        if not base.is_dir():
            temporary = base.with_name(f".{BASE}.tmp")
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.rename(base)
        return base

    def config(self) -> RunConfig:
        """The resolved configuration of the run that is here.

        Raises: UserError if there is no run here.
        """
        if not (self.path / CONFIG).is_file():
            raise UserError(f"run {self.path} has no {CONFIG}: it is not a run folder")
        return RunConfig.from_yaml(self.path / CONFIG)

    def changes(self, config: RunConfig) -> list[str]:
        """What another configuration changes of that of the run that is here, folder apart: "key old -> new".

        Raises: UserError if there is no run here.
        """
        after = config.model_dump()
        return [
            f"{section}.{key} {old!r} -> {new!r}"
            for section, keys in self.config().model_dump().items()
            if isinstance(keys, dict)
            for key, old in keys.items()
            if (new := after[section][key]) != old
        ]

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file by one rename."""
        if not self.writes:
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(target)

    def files(self) -> list[str]:
        """What the run left, relative to its folder; a checkpoint is one entry."""
        found = [path for path in sorted(self.path.iterdir()) if not path.name.startswith(".")]
        found = [path for path in found if path.name != "checkpoints"]
        found += sorted(self.path.glob("checkpoints/*/step-*"))
        return [f"{path.relative_to(self.path)}{'/' if path.is_dir() else ''}" for path in found]

    def _state(self) -> dict[str, Any]:
        path = self.path / STATE
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is damaged: not JSON") from None
