"""A whole run: random policy, supervised warm start, reinforcement learning, each tested on held-out records.

Every phase is resumable: a finished one is read from the folder, an unfinished one goes on from its newest
complete checkpoint.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..envs import RewardError, TextEnv
from ..envs.record import RecordError
from ..info import environment
from .checkpoint import DISK_FULL, CheckpointError, load_checkpoint, load_weights, newest_complete
from .config import RunConfig
from .curves import draw_curves
from .evaluation import answer
from .explain import make_tracker, open_run, quiet_libraries, restore, write_report
from .folder import CONFIG, ENVIRONMENT, PHASES, REPORT, RESULTS, RunFolder, UserError
from .ranks import Ranks, make_accelerator
from .reporter import CURVES, METRICS, Reporter, Silent, print_table
from .results import MODES, TITLES, Answers, compare, joined, measure, table
from .rollout import EngineError, EpisodeError, OpenAIEngine, RolloutEngine, make_engine
from .section import ConfigError
from .sources import (
    adapt,
    load_augmentation,
    load_environments,
    load_policy,
    make_algorithm,
    metric_names,
    texts,
    user_input,
)
from .trackers import open_trackers


def read_config(path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file and command-line overrides.

    Raises: UserError.
    """
    with user_input():
        return RunConfig.from_yaml(path, overrides)


def run(config: RunConfig, *, resume: str | Path = "none", console: Console | None = None) -> dict[str, Any]:
    """Do what `react-fast train` does.

    Args:
        config: the whole run.
        resume: "none": a new run in an unused folder; "auto": go on with what the folder holds, if anything;
            a path: go on from that checkpoint of this run, forgetting what came after.
        console: where to print; None: standard output.
    Returns: test metrics by policy, by mode ("sampled", "greedy"), by metric: [value, low, high].
    Raises: UserError in one line for what the user can mend; KeyboardInterrupt after Ctrl-C, all saved.
    """
    accelerator = make_accelerator(config.trainer.precision)
    folder = RunFolder(config.run_dir, writes=accelerator.is_main_process)
    folder.open(resume=str(resume) != "none")
    try:
        return _Run(config, folder, console, Ranks(accelerator)).go(str(resume))
    except (CheckpointError, ConfigError, EngineError, EpisodeError, RecordError, RewardError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"run folder {folder.path} could not be written: no space left on the disk; "
            "its complete checkpoints are kept, go on with --resume auto"
        ) from error
    finally:
        folder.close()
        accelerator.end_training()


class _Run:
    def __init__(self, config: RunConfig, folder: RunFolder, console: Console | None, ranks: Ranks) -> None:
        quiet_libraries()
        self.config, self.folder, self.ranks = config, folder, ranks
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)
        self.envs = load_environments(config.env, ranks.accelerator.device)
        self.augment = load_augmentation(config.env)
        self._build()
        self.engine: Any = None  # that of the newest training; None: the model itself
        self.algorithm = make_algorithm(config)
        self.steps = {"warm_start": config.warm_start.steps, "rl": config.trainer.steps}
        self.reporter: Any = self._reporter(console) if ranks.first else Silent()

    def _reporter(self, console: Console | None) -> Reporter:
        names = self.config.logging.trackers
        return Reporter(
            self.folder.path,
            self.steps,
            console=console,
            tensorboard="tensorboard" in names,
            trackers=open_trackers(self.config),
        )

    def _build(self) -> None:
        train = self.envs["train"].records
        seed = self.config.trainer.seed
        model, self.tokenizer = load_policy(self.config.model, texts(train), seed)
        with self.ranks.accelerator.main_process_first():  # it writes what the others read
            self.model = adapt(model, self.tokenizer, self.config.model, self.folder, seed)
        with user_input():
            self.envs = {split: env.rendered(self.tokenizer) for split, env in self.envs.items()}
        self.tracker = make_tracker(self.config.tracker, self.model, self.tokenizer)

    def go(self, resume: str) -> dict[str, Any]:
        config = self.folder.path / CONFIG
        before = config.read_bytes() if config.exists() else None
        self._begin(resume)
        try:
            for phase in PHASES:
                self.ranks.wait()
                self._phase(phase, resume)
            self.ranks.wait()
            return self._finish()
        except CheckpointError:
            if before is not None and self.ranks.first:  # the run's checkpoints do not fit the new one
                config.write_bytes(before)
            raise
        finally:
            self.reporter.close()

    def _begin(self, resume: str) -> None:
        line = self.reporter.line
        if resume not in ("none", "auto"):
            self._take_back(Path(resume))
        if (self.folder.path / CONFIG).exists():
            for change in self.folder.changes(self.config):
                line(f"changed since the run began: {change}")
        if self.ranks.first:
            self.config.to_yaml(self.folder.path / CONFIG)
        facts = environment()
        self.folder.write_json(ENVIRONMENT, facts)
        sizes = ", ".join(f"{len(env.records)} {split}" for split, env in self.envs.items())
        parameters = sum(p.numel() for p in self.model.parameters())
        line(f"run folder {self.folder.path}; {facts['isa']} core, {facts['threads']} threads")
        line(f"records: {sizes}; model: {parameters:,} parameters, {len(self.tokenizer)} tokens")
        line(self.config.trainer.batch_line())
        if isinstance(engine := self._engine(), OpenAIEngine):
            line(f"{engine.client.base_url} serves {engine.model}: {engine.capabilities.line()}")

    def _take_back(self, checkpoint: Path) -> None:
        """Go back to one checkpoint: what came after it will be done again."""
        load_checkpoint(checkpoint)
        phase = checkpoint.resolve().parent.name
        if checkpoint.resolve().parent != self.folder.checkpoints(phase).resolve():
            raise UserError(f"checkpoint {checkpoint} is not one of run {self.folder.path}")
        self.folder.forget_from(phase)

    def _phase(self, phase: str, resume: str) -> None:
        if phase in self.folder.results and self._finished(phase):
            return
        if phase == "random" or self.steps[phase]:
            if phase != "random":
                self._train(phase, resume)
            self._test(phase)

    def _finished(self, phase: str) -> bool:
        """Whether a phase with results needs no doing again: loads what it ended with, unless a later phase
        goes on from a checkpoint of its own."""
        if phase == "random":
            return True
        finished = newest_complete(self.folder.checkpoints(phase))
        if finished is not None:
            self._load(phase)
            return True
        later = PHASES[PHASES.index(phase) + 1 :]
        if any(newest_complete(self.folder.checkpoints(name)) for name in later):
            return True
        self.reporter.line(f"{TITLES[phase]}: no complete checkpoint is left, so it is done again")
        self.folder.forget_from(phase)
        return False

    def _load(self, phase: str) -> None:
        """What a phase ended with."""
        finished = newest_complete(self.folder.checkpoints(phase))
        assert finished is not None
        load_weights(self.model, finished)
        if self.tracker is not None and phase == "rl":
            restore(self.tracker, finished)

    def _train(self, phase: str, resume: str) -> None:
        from .trainer import Trainer

        checkpoints = self.folder.checkpoints(phase)
        given = Path(resume) if resume not in ("none", "auto") else None
        start = (
            given
            if given and given.resolve().parent == checkpoints.resolve()
            else newest_complete(checkpoints)
        )
        step = load_checkpoint(start).step if start else 0
        self.reporter.rewind(phase, step)
        if start:
            self.reporter.line(f"{TITLES[phase]}: going on after step {step} from {start}")
        trainer = Trainer(
            self.model,
            self.tokenizer,
            self.envs["train"],
            algorithm=self.algorithm if phase == "rl" else self._warm_start(),
            tracker=self.tracker if phase == "rl" else None,
            config=self.config.training(phase, self.folder.checkpoints(phase)),
            reporter=self.reporter,
            phase=phase,
            eval_env=self.envs["validation"],
            engine=self._engine() if phase == "rl" else None,
            augment=self.augment,
        )
        trainer.train(resume=start)
        trainer.synchronise()
        self.engine = trainer.engine
        if self.ranks.world > 1:  # training wrapped the model, and the tests want it as it was
            self._build()
            self._load(phase)
            self.engine = None

    def _engine(self) -> RolloutEngine | None:
        """What generates the rollouts; None: the policy."""
        return make_engine(self.config.rollout, self.model, self.tokenizer, self.folder.path / "weights")

    def _warm_start(self) -> Any:
        from .algorithms import SFT

        return SFT(learns=self.config.warm_start.learns)

    def _test(self, phase: str) -> None:
        """Test the policy, keep its answers for the paired comparison, print a few."""
        result: dict[str, Any] = {}
        for mode in MODES:
            mine = _test_answers(
                self.config,
                self.model,
                self.tokenizer,
                self.envs["test"],
                mode,
                self.ranks.share,
                self.engine,
            )
            answers = joined(self.ranks.joined([mine], self.ranks.world))
            self.folder.write_json(_answers_file(phase, mode), asdict(answers))
            result[mode] = measure(answers, metric_names(self.config.env))
            values = ", ".join(f"{name} {value[0]:.1f}" for name, value in result[mode].items())
            self.reporter.line(f"{TITLES[phase]}, {MODES[mode]}: {values}")
        self.folder.finish(phase, result)

    def _finish(self) -> dict[str, Any]:
        results = dict(self.folder.results)
        if "warm_start" in results and "rl" in results:
            results["gain"] = {
                mode: compare(
                    self._answers("warm_start", mode),
                    self._answers("rl", mode),
                    metric_names(self.config.env),
                )
                for mode in MODES
            }
        if not self.ranks.first:
            return results
        self.folder.write_json(RESULTS, results)
        if self.tracker is not None:
            write_report(self.tracker, self.envs["test"], self.config, self.folder.path / REPORT)
        self.reporter.close()
        title = f"{len(self.envs['test'].records)} held-out test prompts, 95% bootstrap intervals"
        print_table(title, *table(results), console=self.reporter.console)
        for name in self.folder.files():
            self.reporter.line(f"  {self.folder.path / name}")
        return results

    def _answers(self, phase: str, mode: str) -> Answers:
        return Answers(
            **json.loads((self.folder.path / _answers_file(phase, mode)).read_text(encoding="utf-8"))
        )


def _answers_file(phase: str, mode: str) -> str:
    return f"answers/{phase}.{mode}.json"


def evaluate(path: str | Path, overrides: Sequence[str] = (), *, best: bool = False) -> dict[str, Any]:
    """Test the newest checkpoint of a run again, or the best one, and print the result table.

    Args:
        path: run folder.
        overrides: changes of its configuration, such as ["--env.test_prompts", "100"].
        best: the checkpoint that `trainer.best_by` chose.
    Returns: test metrics by mode, by metric: [value, low, high].
    Raises: UserError if there is no run or no such checkpoint.
    """
    config, checkpoint, model, tokenizer = open_run(path, overrides, best=best)
    env = load_environments(config.env)["test"]
    engine = _own_engine(config, checkpoint, model, tokenizer, env)
    result = {
        mode: measure(
            _test_answers(config, model, tokenizer, env, mode, engine=engine), metric_names(config.env)
        )
        for mode in MODES
    }
    title = f"{checkpoint}: {len(env.records)} test prompts, 95% bootstrap intervals"
    print_table(title, *table({checkpoint.parent.name: result}))
    return result


def _own_engine(config: RunConfig, checkpoint: Path, model: Any, tokenizer: Any, env: TextEnv) -> Any:
    """What plays the episodes of an algorithm that does not leave it to the policy, such as ILQL, whose values
    guide; None: the policy."""
    from .algorithms import Algorithm
    from .trainer import Trainer

    algorithm: Any = make_algorithm(config)
    stored = load_checkpoint(checkpoint)
    if type(algorithm).engine is Algorithm.engine or stored.state["phase"] != PHASES[-1]:
        return None
    bare = config.training("rl").replace(credit="uniform", early_stopping=0, best_by=None, sharded=False)
    trainer = Trainer(model, tokenizer, env, algorithm=algorithm, config=bare)
    trainer.load_heads(stored)
    return trainer.engine


def _test_answers(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    env: TextEnv,
    mode: str,
    share: Any = list,
    engine: Any = None,
) -> Answers:
    return answer(
        model,
        tokenizer,
        env,
        greedy=mode == "greedy",
        max_new_tokens=config.trainer.max_new_tokens,
        batch_size=config.trainer.eval_batch,
        seed=config.trainer.seed,
        share=share,
        engine=engine,
    )


def report(path: str | Path) -> None:
    """Draw the curves and the HTML report of a run again and list its files.

    Raises: UserError if there is no run or no complete checkpoint.
    """
    config, checkpoint, model, tokenizer = open_run(path)
    folder = RunFolder(path)
    if not (folder.path / METRICS).is_file():
        raise UserError(f"run {folder.path} has no {METRICS}: nothing was recorded")
    draw_curves(folder.path / METRICS, folder.path / CURVES)
    tracker = make_tracker(config.tracker, model, tokenizer)
    if tracker is not None:
        restore(tracker, checkpoint)
        write_report(tracker, load_environments(config.env, "meta")["test"], config, folder.path / REPORT)
    for name in folder.files():
        print(f"  {folder.path / name}", file=sys.stdout)
