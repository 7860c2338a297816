"""The trainer: collect -> score -> credit -> update.

Every random number is keyed by (seed, step, row), so a run that stops between two steps and goes on later ends
with bitwise the same weights, and a checkpoint holds no random state.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..envs import TextEnv, TrainerState
from ..ops.backend import accumulation_dtype
from ..tracker.credit import attribution_credit, causal_credit
from . import mismatch
from .adapters import has_adapters
from .augmentation import Augment, augmented
from .batch import Batch, collate, group_numbers
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_weights,
    newest_complete,
    tied,
)
from .config import TrainerConfig
from .credit import REPLAYS, in_advantages
from .early_stopping import BestStep, EarlyStopping
from .evaluation import held_out_loss, held_out_reward
from .interrupt import StopRequest
from .meters import Clock, describe, logged, samples
from .ranks import Ranks, check_split, gathered, make_accelerator, shard
from .rollout import (
    EngineError,
    Episodes,
    PolicyEngine,
    RolloutEngine,
    SamplingParams,
    Trajectory,
    pad_token,
    retokenised,
    sampling_params,
)
from .schedule import prompts
from .scoring import Scorer, Scores, policy_of, reference_policy
from .state import join, load_module_state, whole
from .symptoms import Watch
from .training_state import load_state_tree, same_setting, state_tree, write
from .updater import Updater, sampling_temperature


class Trainer:
    """Improves a policy on an environment.

    Args:
        model: Hugging Face causal LM, or any module with `model(ids [B, T]) -> logits [B, T, V]`.
        tokenizer: its tokenizer: `tokenizer(text, add_special_tokens=...)["input_ids"]`, `decode`,
            `eos_token_id`, `pad_token_id`.
        env: a TextEnv; its records are the training prompts, messages by the tokenizer's chat template.
        algorithm: `GRPO()`, `PPO()`, `DPO()`, `SFT()`, or any `Algorithm`.
        tracker: CausalityTracker that observes the training backward; needed by credit="attribution". If it has
            groups, every record's metadata names one of them as "group".
        config: TrainerConfig.
        reporter: anything with `.log(step, phase, metrics)`, `.samples(rows)`, perhaps `.warn(name, text)` for
            what seems to go wrong; None: nothing is shown.
        phase: name of this training in logs, such as "warm_start" or "rl".
        eval_env: environment of held-out records for `evaluate` and early stopping; None: no evaluation.
        engine: rollout engine; None: the policy itself generates.
        augment: changes training records, not what is right for them, anew in every step; see `Augment`.
    Raises: ValueError if the config asks for something that is not given.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        env: TextEnv,
        *,
        algorithm: Any,
        tracker: Any = None,
        config: TrainerConfig | None = None,
        reporter: Any = None,
        phase: str = "train",
        eval_env: TextEnv | None = None,
        engine: RolloutEngine | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.config = config or TrainerConfig()
        if self.config.credit == "attribution" and tracker is None:
            raise ValueError("tracker must be given when config.credit is 'attribution', got None")
        for name in ("early_stopping", "best_by"):
            if getattr(self.config, name) and eval_env is None:
                raise ValueError(f"eval_env must be given when config.{name} is, got None")
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.tokenizer, self.env = tokenizer, env.rendered(tokenizer)
        self.eval_env = eval_env and eval_env.rendered(tokenizer)
        self.augment, self._plain_env = augment, env
        self.algorithm, self.tracker, self.phase = algorithm, tracker, phase
        groups = group_numbers(tracker.groups, env) if tracker is not None and tracker.groups else None
        algorithm.check(self.config)
        self.accelerator = make_accelerator(self.config.precision)
        self.reporter = reporter if self.accelerator.is_main_process else None
        self.ranks = Ranks(self.accelerator)
        check_split(self.config, self.ranks.world, adapted=has_adapters(model))
        packed = self.config.padding == "packed"
        policy = policy_of(model, algorithm.heads(model), self._notice, packed=packed)
        self.policy = policy.to(self.accelerator.device)
        self.model = model
        self._tied = tied(model.state_dict()) if self.config.sharded else {}
        self.reference = reference_policy(self.policy) if algorithm.compares(self.config) else None
        if isinstance(self.reference, Scorer) and self.config.sharded:
            shard(self.reference)
        self.updater = Updater(self.policy, algorithm, self.config, self.ranks, tracker, groups, phase)
        self.policy_engine = PolicyEngine(self.model, eos_id=self.eos_id, pad_id=self.pad_id)
        self.engine = engine or algorithm.engine(self) or self.policy_engine
        self.memory = algorithm.memory(self)
        self.watch = Watch(self.config)
        self.step = 0  # finished steps
        self.stopping, self.best = EarlyStopping(self.config.early_stopping), BestStep(self.config.best_by)
        self.replays = REPLAYS["uniform" if algorithm.supervised else self.config.credit](self)

    # ---- the four phases -----------------------------------------------------------------------------------

    def collect(self, step: int | None = None) -> list[Trajectory]:
        """Trajectories of one step (counted from 0): rollouts of the policy, or what is written in the records."""
        step = self.step if step is None else step
        self.env.inform(self.state)
        if self.augment is not None:
            chosen, seed = self.records_of(step), self.config.seed
            options = {"seed": seed, "step": step, "tokenizer": self.tokenizer}
            self.env = augmented(self._plain_env, self.augment, chosen, **options)
        return self.algorithm.collect(self, step)

    def score(self, trajectories: Sequence[Trajectory]) -> Batch:
        """Pad the trajectories and add what the update needs about them: log-probs under the policy as it is
        now (if it will change before the last update on them) and under the reference, and attributions, measured
        effects or step advantages."""
        batch = collate(trajectories, self.pad_id, self.accelerator.device, self._dtype)
        if self.algorithm.remembers(self.config):
            before = self.scores(batch)
            batch.old_logprobs, batch.heads = before.logprobs, before.heads
        if self.reference is not None:
            whole_support = replace(batch, logit_floor=None)
            batch.ref_logprobs = self.scores(whole_support, self.reference).logprobs
        self.algorithm.score(self, batch)
        if not self.algorithm.supervised:
            self.replays.score(trajectories, batch)
        return batch

    def credit(self, batch: Batch) -> Batch:
        """Set the advantages: [B] or [B, T-1] from the algorithm, spread by attribution or effects if the
        config says so; monte_carlo's are the steps' own, in the reward's unit.

        Attribution and causal credit keep the sum of a trajectory's advantages; see `tracker.credit` for how, and
        `trainer.credit` for which credit keeps the policy gradient unbiased.
        """
        if batch.step_advantages is not None:
            batch.advantages = batch.step_advantages
            return batch
        batch.advantages = self.algorithm.advantages(self.config, batch)
        if batch.effects is not None:
            batch.advantages = causal_credit(
                batch.advantages, in_advantages(batch), batch.mask, floor=self.config.credit_floor
            )
        if batch.attribution is not None:
            batch.advantages = attribution_credit(
                batch.advantages, batch.attribution, batch.mask, floor=self.config.credit_floor
            )
        return batch

    def update(self, batch: Batch) -> dict[str, float]:
        """All optimiser updates on one batch: epochs x minibatches, each summed over micro-batches.

        The loss is divided by the whole minibatch's count, so `micro_batch` changes memory and not the result.
        Dropout acts in supervised training only: under reinforcement learning the ratio compares the policy
        with the one that sampled.
        """
        metrics = self.updater.run(batch, self.step)
        if self.memory is not None:
            self.memory.after_update()
        return mismatch.finish(metrics)

    # ---- loops ---------------------------------------------------------------------------------------------

    def train(self, resume: str | Path | None = None) -> dict[str, float]:
        """Run to config.steps.

        Args:
            resume: None: from step 0; "auto": from the newest complete checkpoint in config.checkpoint_dir, if
                there is one; a path: from that checkpoint.
        Returns: metrics of the last step.
        Raises: KeyboardInterrupt after Ctrl-C or SIGTERM, once the step is finished and saved (a second one
            stops at once, without saving); CheckpointError for a damaged checkpoint.
        """
        self._resume(resume)
        metrics: dict[str, float] = {}
        with StopRequest(self._notice) as stop:
            while self.step < self.config.steps and not self.stopping.over:
                metrics = self.train_step()
                finished = self.step >= self.config.steps or self.stopping.over
                asked = self.ranks.any(stop())  # once: a signal from here on waits for the next step's save
                due = self.config.save_every and self.step % self.config.save_every == 0
                if finished or asked or due or self.best.step == self.step:
                    if finished:
                        self.stopping.restore(self.model)
                    self.save()
                if asked:
                    raise KeyboardInterrupt
            if self.ranks.any(stop()):  # while the last step was saved: what would follow must not begin
                raise KeyboardInterrupt
        return metrics

    def train_step(self) -> dict[str, float]:
        """One step: the four phases, evaluation when it is due, logging. Returns the step's metrics."""
        clock = Clock()
        trajectories = self.collect()
        clock.lap("rollout")
        chosen = self.algorithm.select(trajectories)
        batch = self.score(self.memory.replay(chosen) if self.memory is not None else chosen)
        clock.lap("score")
        batch = self.credit(batch)
        clock.lap("credit")
        metrics = self.update(batch)
        clock.lap("update")
        self.step += 1
        self.env.inform(self.state)
        metrics |= describe(trajectories, self.algorithm.supervised) | clock.metrics(trajectories)
        if not self.algorithm.supervised:
            metrics |= self.replays.metrics | retokenised(trajectories)
        if self.config.eval_every and self.eval_env is not None and self.step % self.config.eval_every == 0:
            held_out, value = self.algorithm.held_out(self, self.eval_env)
            metrics |= held_out
            self.best.see(self.step, held_out)
            self.stopping.see(value, self.model)
        metrics |= logged(trajectories, metrics)
        if self.reporter is not None:
            self.reporter.log(self.step, self.phase, metrics)
            warnings = self.watch.see(metrics) if hasattr(self.reporter, "warn") else {}
            for name, text in warnings.items():
                self.reporter.warn(name, text)
            if self.config.sample_every and self.step % self.config.sample_every == 0:
                self.reporter.samples(samples(trajectories, self.env.records, self.tokenizer))
        return metrics

    def evaluate(self, env: TextEnv | None = None, *, greedy: bool = True) -> dict[str, float]:
        """Held-out quality: "eval/reward", the mean return; in supervised training "eval/loss" too.

        Args:
            env: environment of the records to test, each played once; None: eval_env.
            greedy: the most probable token each time, or sampled at temperature 1.
        Raises: ValueError if there is no environment to test on.
        """
        env = self.eval_env if env is None else env.rendered(self.tokenizer)
        if env is None:
            raise ValueError("env must be given when the trainer has no eval_env, got None")
        metrics = {"eval/reward": held_out_reward(self, env, greedy=greedy)}
        return metrics | ({"eval/loss": held_out_loss(self, env)} if self.algorithm.supervised else {})

    @property
    def state(self) -> TrainerState:
        """What reward functions are told about the training."""
        epoch = self.step * self.config.prompts_per_step / len(self.env.records)
        first, local = self.ranks.first, self.accelerator.is_local_main_process
        return TrainerState(self.step, self.config.steps, epoch, first, local)

    # ---- used by the algorithms ----------------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Finished optimiser updates."""
        return self.updater.updates

    def scores(self, batch: Batch, policy: Any = None) -> Scores:
        """Log-probs, entropies and the heads' outputs without gradient, of the policy as it is now or of another
        `Scorer`, in evaluation mode."""
        return self.updater.scores(
            batch, policy or self.updater.policy, sampling_temperature(self.algorithm, self.config)
        )

    def records_of(self, step: int) -> list[int]:
        """Records of a step's prompts."""
        return prompts(step, len(self.env.records), self.config.prompts_per_step, self.config.seed)

    def rollouts(self, step: int) -> list[Trajectory]:
        """group_size episodes for each of the step's prompts; trajectories of a prompt are neighbours."""
        size = self.config.group_size
        records = [record for record in self.records_of(step) for _ in range(size)]
        groups = [row // size for row in range(len(records))]
        self.synchronise()
        params = sampling_params(self.config, seed=self.config.seed, step=step)
        return self.play(self.env, records, groups, params)

    def synchronise(self) -> None:
        """Give an engine that holds a copy of the policy the weights of now. Every rank has to ask.

        Raises: EngineError, on every rank, if it does not take them.
        """
        engine: Any = self.engine
        if hasattr(engine, "sync_weights"):
            weights = self._whole_weights()
            self.ranks.once(lambda: engine.sync_weights(self.model, self.updates, weights), EngineError)
            engine.version = self.ranks.joined([engine.version], self.ranks.world)[0]

    def play(
        self, env: TextEnv, records: Sequence[int], groups: Sequence[int], params: SamplingParams
    ) -> list[Trajectory]:
        """Episodes of the policy, each rank its share of the rows, numbered 0, 1, 2, ... if params has no rows."""
        numbers = list(params.rows) if params.rows is not None else list(range(len(records)))
        mine = self.ranks.share(list(range(len(records))))
        params = replace(params, rows=[numbers[i] for i in mine])
        env.inform(self.state)
        with gathered(self.policy):
            played = Episodes(self.engine, self.tokenizer, env).play(
                [records[i] for i in mine], [groups[i] for i in mine], params
            )
        return self.ranks.joined(played, len(records))

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint of the finished steps into config.checkpoint_dir; None without such a folder."""
        if self.config.checkpoint_dir is None:
            return None
        tree = whole(state_tree(self), keep=self.ranks.first)
        weights = self._whole_weights()
        return self.ranks.once(lambda: write(self, tree, weights), CheckpointError)

    def _whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The model's weights by name on the first rank, where the ranks hold shards; every rank has to ask."""
        if not self.config.sharded:
            return None
        weights = whole(self.model.state_dict(), keep=self.ranks.first)
        return {name: weights[min(self._tied[name])] for name in weights}

    def load(self, path: str | Path) -> None:
        """Go back to a checkpoint of `save`.

        Raises: CheckpointError for a damaged checkpoint, or one of another version or setting.
        """
        checkpoint = load_checkpoint(path)
        load_weights(self.model, path)
        with same_setting(path):
            load_state_tree(self, join(checkpoint.state["trainer"], checkpoint.tensors))

    def load_heads(self, checkpoint: Checkpoint) -> None:
        """Take the heads and the step of a checkpoint of `save`, and nothing else.

        Raises: CheckpointError for one of another version or setting.
        """
        with same_setting(checkpoint.path):
            tree = join(checkpoint.state["trainer"], checkpoint.tensors)
            self.step = tree["step"]
            load_module_state(self.policy.heads, tree["heads"])

    # ---- inside --------------------------------------------------------------------------------------------

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        return pad_token(self.tokenizer)

    @property
    def _dtype(self) -> torch.dtype:
        """Of log-probabilities, and of the rewards and advantages that meet them."""
        return accumulation_dtype(next(self.model.parameters()).dtype)

    def _resume(self, resume: str | Path | None) -> None:
        if resume == "auto":
            resume = newest_complete(self.config.checkpoint_dir) if self.config.checkpoint_dir else None
        if resume is not None:
            self.load(resume)

    def _notice(self, text: str) -> None:
        if self.ranks.first:
            getattr(self.reporter, "line", print)(text)
