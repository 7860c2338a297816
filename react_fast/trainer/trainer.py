"""The trainer: collect -> score -> credit -> update.

Every random number is keyed by (seed, step, row), so a run that stops between two steps and goes on later ends
with bitwise the same weights, and a checkpoint holds no random state.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..envs import TextEnv
from ..ops.backend import accumulation_dtype
from ..ops.logprob import token_logprobs
from ..tracker.credit import attribution_credit, causal_credit
from . import mismatch
from .batch import Batch, collate, group_numbers
from .checkpoint import CheckpointError, load_checkpoint, load_weights, newest_complete, save_checkpoint
from .config import TrainerConfig
from .credit import REPLAYS
from .early_stopping import EarlyStopping
from .evaluation import held_out_loss, held_out_reward
from .interrupt import StopRequest
from .meters import Averages, Clock, describe, samples
from .rollout import (
    Episodes,
    PolicyEngine,
    RolloutEngine,
    Trajectory,
    key,
    permutation,
    retokenised,
    sampling_params,
    synchronise,
)
from .schedule import learning_rate, make_optimizer, prompts
from .state import join, split

# Streams of random numbers that must not meet: prompts, rollouts and dropout each have their own.
_ORDER, _DROPOUT = 1, 2


class Trainer:
    """Improves a policy on an environment.

    Args:
        model: Hugging Face causal LM, or any module with `model(ids [B, T]) -> logits [B, T, V]`.
        tokenizer: its tokenizer: `tokenizer(text, add_special_tokens=...)["input_ids"]`, `decode`,
            `eos_token_id`, `pad_token_id`.
        env: a TextEnv; its records are the training prompts.
        algorithm: `GRPO()`, `REINFORCE()`, `SFT()`, or any object with their four methods.
        tracker: CausalityTracker that observes the training backward; needed by credit="attribution". If it has
            groups, every record's metadata names one of them as "group".
        config: TrainerConfig.
        reporter: anything with `.log(step, phase, metrics)` and `.samples(rows)`; None: nothing is shown.
        phase: name of this training in logs, such as "warm_start" or "rl".
        eval_env: environment of held-out records for `evaluate` and early stopping; None: no evaluation.
        engine: rollout engine; None: the policy itself generates.
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
    ) -> None:
        self.config = config or TrainerConfig()
        if self.config.credit == "attribution" and tracker is None:
            raise ValueError("tracker must be given when config.credit is 'attribution', got None")
        if self.config.early_stopping and (eval_env is None or not self.config.eval_every):
            raise ValueError(
                "eval_env and config.eval_every must be given when config.early_stopping is not 0"
            )
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.tokenizer, self.env, self.eval_env = tokenizer, env, eval_env
        self.algorithm, self.tracker, self.reporter, self.phase = algorithm, tracker, reporter, phase
        self._groups = group_numbers(tracker.groups, env) if tracker is not None and tracker.groups else None
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        optimizer = make_optimizer(model.parameters(), self.config)
        self._prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model = self.accelerator.unwrap_model(self._prepared)
        self.engine = engine or PolicyEngine(self.model, eos_id=self.eos_id, pad_id=self.pad_id)
        frozen = self.config.kl_coef and not algorithm.supervised
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False) if frozen else None
        self.step = 0  # finished steps
        self.updates = 0  # finished optimiser updates
        self.stopping = EarlyStopping(self.config.early_stopping)
        self.replays = REPLAYS["uniform" if algorithm.supervised else self.config.credit](self)

    # ---- the four phases -----------------------------------------------------------------------------------

    def collect(self, step: int | None = None) -> list[Trajectory]:
        """Trajectories of one step (counted from 0): rollouts of the policy, or the references for SFT."""
        return self.algorithm.collect(self, self.step if step is None else step)

    def score(self, trajectories: Sequence[Trajectory]) -> Batch:
        """Pad the trajectories and add what the update needs about them: log-probs under the policy as it is
        now (if it will change before the last update on them) and under the reference, and attributions, measured
        effects or step advantages."""
        batch = collate(trajectories, self.pad_id, self.accelerator.device, self._dtype)
        if self.algorithm.supervised:
            return batch
        if self.config.updates_per_step > 1:
            batch.old_logprobs = self.logprobs(self.model, batch)
        if self.reference is not None:
            batch.ref_logprobs = self.logprobs(self.reference, batch)
        self.replays.score(trajectories, batch)
        return batch

    def credit(self, batch: Batch) -> Batch:
        """Set the advantages: [B] or [B, T-1] from the algorithm, spread by attribution or effects if the
        config says so; monte_carlo's are the steps' own, in the reward's unit.

        Attribution and causal credit multiply a trajectory's advantages with weights that keep the sum of the
        positive and of the negative ones. Uniform and monte_carlo credit keep the policy gradient unbiased; see
        `trainer.credit`.
        """
        if batch.step_advantages is not None:
            batch.advantages = batch.step_advantages
            return batch
        batch.advantages = self.algorithm.advantages(batch)
        if batch.effects is not None:
            batch.advantages = causal_credit(
                batch.advantages, batch.effects, batch.mask, floor=self.config.credit_floor
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
        self._prepared.train(self.algorithm.supervised)
        totals = Averages()
        for rows in self._minibatches(len(batch)):
            self._update_once(batch.select(rows), totals)
        return mismatch.finish(totals.result())

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
                asked = stop()  # looked at once: a signal from here on waits for the next step's save
                if finished or asked or (self.config.save_every and self.step % self.config.save_every == 0):
                    if finished:
                        self.stopping.restore(self.model)
                    self.save()
                if asked:
                    raise KeyboardInterrupt
            if stop():  # while the last step was saved: what would follow the training must not begin
                raise KeyboardInterrupt
        return metrics

    def train_step(self) -> dict[str, float]:
        """One step: the four phases, evaluation when it is due, logging. Returns the step's metrics."""
        clock = Clock()
        trajectories = self.collect()
        clock.lap("rollout")
        batch = self.score(trajectories)
        clock.lap("score")
        batch = self.credit(batch)
        clock.lap("credit")
        metrics = self.update(batch)
        clock.lap("update")
        self.step += 1
        metrics |= describe(trajectories, batch, self.algorithm.supervised) | clock.metrics()
        if not self.algorithm.supervised:
            metrics |= self.replays.metrics | retokenised(trajectories)
        if self.config.eval_every and self.eval_env is not None and self.step % self.config.eval_every == 0:
            held_out, value = self._held_out()
            metrics |= held_out
            self.stopping.see(value, self.model)
        if self.reporter is not None:
            self.reporter.log(self.step, self.phase, metrics)
            if self.config.sample_every and self.step % self.config.sample_every == 0:
                self.reporter.samples(samples(trajectories, self.env.records, self.tokenizer))
        return metrics

    def evaluate(self, env: TextEnv | None = None, *, greedy: bool = True) -> dict[str, float]:
        """Held-out quality: "eval/reward", the mean return; in supervised training "eval/loss" too, the
        cross-entropy per reference token.

        Args:
            env: environment of the records to test, each played once; None: eval_env.
            greedy: the most probable token each time, or sampled at temperature 1.
        Raises: ValueError if there is no environment to test on.
        """
        env = env or self.eval_env
        if env is None:
            raise ValueError("env must be given when the trainer has no eval_env, got None")
        metrics = {"eval/reward": held_out_reward(self, env, greedy=greedy)}
        return metrics | ({"eval/loss": held_out_loss(self, env)} if self.algorithm.supervised else {})

    # ---- used by the algorithms ----------------------------------------------------------------------------

    def records_of(self, step: int) -> list[int]:
        """Records of a step's prompts."""
        return prompts(step, len(self.env.records), self.config.prompts_per_step, self.config.seed)

    def rollouts(self, step: int) -> list[Trajectory]:
        """group_size episodes for each of the step's prompts; trajectories of a prompt are neighbours."""
        size = self.config.group_size
        records = [record for record in self.records_of(step) for _ in range(size)]
        groups = [row // size for row in range(len(records))]
        synchronise(self.engine, self.model, self.updates)
        params = sampling_params(self.config, seed=self.config.seed, step=step)
        return Episodes(self.engine, self.tokenizer, self.env).play(records, groups, params)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint of the finished steps into config.checkpoint_dir; None without such a folder."""
        if self.config.checkpoint_dir is None:
            return None
        tree = {
            "step": self.step,
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "replays": self.replays.state_dict(),
            "stopping": self.stopping.state_dict(),
            "reference": self.reference.state_dict() if self.reference is not None else None,
            "tracker": self.tracker.state_dict() if self.tracker is not None else None,
        }
        rest, tensors = split(tree, "trainer")
        return save_checkpoint(
            self.config.checkpoint_dir,
            self.step,
            model=self.model,
            tokenizer=self.tokenizer if hasattr(self.tokenizer, "save_pretrained") else None,
            tensors=tensors,
            state={"trainer": rest, "phase": self.phase},
            keep=self.config.keep_checkpoints,
        )

    def load(self, path: str | Path) -> None:
        """Go back to a checkpoint of `save`.

        Raises: CheckpointError for a damaged checkpoint, or one of another version or setting.
        """
        checkpoint = load_checkpoint(path)
        load_weights(self.model, path)
        try:
            self._load_state(join(checkpoint.state["trainer"], checkpoint.tensors))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"checkpoint {path} is of another version or setting: {error}") from error

    # ---- inside --------------------------------------------------------------------------------------------

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.eos_id or 0)

    def _load_state(self, tree: dict[str, Any]) -> None:
        self.step, self.updates = tree["step"], tree["updates"]
        self.replays.load_state_dict(tree.get("replays") or {})
        self.stopping.load_state_dict(tree["stopping"])
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.reference is not None and tree["reference"] is not None:
            self.reference.load_state_dict(tree["reference"])
        if self.tracker is not None and tree["tracker"] is not None:
            self.tracker.load_state_dict(tree["tracker"])

    def _update_once(self, batch: Batch, totals: Averages) -> None:
        denominator = self.algorithm.denominator(batch)
        size = self.config.micro_batch or len(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.config.seed, _DROPOUT, self.updates))
            for rows in torch.arange(len(batch)).split(size):
                self._backward(batch.select(rows), denominator, totals)
        norm = self._clip()
        rate = learning_rate(self.updates, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            warnings.warn(
                f"{self.phase} step {self.step + 1}: gradient norm is {norm}, update skipped", stacklevel=3
            )
            totals.add({"skipped_updates": 1.0}, 1.0)
        self.updates += 1
        totals.add({"grad_norm": norm, "learning_rate": rate}, 1.0)

    def _backward(self, part: Batch, denominator: torch.Tensor, totals: Averages) -> None:
        actions = torch.nn.functional.pad(part.mask, (1, 0))
        with self._observed(part, actions):
            logits = self.forward(self._prepared, part)
            logprobs, entropy = token_logprobs(
                logits[:, :-1],
                part.targets,
                mask=part.mask,
                temperature=self._temperature,
                return_entropy=True,
                logit_floor=part.logit_floor,
            )
            if not self.algorithm.supervised:
                totals.add(*mismatch.correct(self.config, part, logprobs))
            loss, metrics = self.algorithm.loss(self.config, part, logprobs, entropy, denominator)
            self.accelerator.backward(loss)
        totals.add(metrics, float(part.mask.sum()))
        totals.sum("loss", float(loss.detach()))

    def _observed(self, part: Batch, actions: torch.Tensor) -> AbstractContextManager[None]:
        if self.tracker is None:
            return nullcontext()
        groups = None if self._groups is None else self._groups.to(part.records.device)[part.records]
        return self.tracker.observe(part.input_ids, actions, step=self.step, group_index=groups)

    def _clip(self) -> float:
        limit = self.config.max_grad_norm
        parameters = self._prepared.parameters()
        return float(self.accelerator.clip_grad_norm_(parameters, limit if limit is not None else math.inf))

    @property
    def _temperature(self) -> float:
        """Policies are scored as they sample; references are scored at temperature 1."""
        return 1.0 if self.algorithm.supervised else self.config.temperature

    @property
    def _dtype(self) -> torch.dtype:
        """Of log-probabilities, and of the rewards and advantages that meet them."""
        return accumulation_dtype(next(self.model.parameters()).dtype)

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """[B, T, V] logits of a model."""
        if hasattr(self.model, "generate"):
            mask = batch.attention_mask
            return model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        return model(batch.input_ids)

    @torch.no_grad()
    def logprobs(self, model: Any, batch: Batch) -> torch.Tensor:
        """[B, T-1] log-probs of the actions under a model, in evaluation mode."""
        was_training = model.training
        model.eval()
        out = torch.zeros(batch.mask.shape, dtype=self._dtype, device=batch.mask.device)
        for rows in torch.arange(len(batch)).split(self.config.micro_batch or len(batch)):
            part = batch.select(rows)
            logits = self.forward(model, part)
            found = token_logprobs(
                logits[:, :-1],
                part.targets,
                mask=part.mask,
                temperature=self._temperature,
                # The policy is scored over what the sampler kept of it, the reference over all tokens.
                logit_floor=part.logit_floor if model is self.model else None,
            )
            out[rows, : found.shape[1]] = found
        model.train(was_training)
        return out

    def _held_out(self) -> tuple[dict[str, float], float]:
        """What a training step looks at, and the number that should get smaller."""
        assert self.eval_env is not None
        if self.algorithm.supervised:
            loss = held_out_loss(self, self.eval_env)
            return {"eval/loss": loss}, loss
        reward = held_out_reward(self, self.eval_env, greedy=True)
        return {"eval/reward": reward}, -reward

    def _minibatches(self, count: int) -> Iterator[torch.Tensor]:
        """Rows of every update: in order for one update, else a keyed permutation in each epoch."""
        for epoch in range(self.config.epochs):
            if self.config.updates_per_step == 1:
                yield torch.arange(count)
                continue
            order = permutation(count, self.config.seed, _ORDER, self.step, epoch)
            yield from torch.from_numpy(order).chunk(self.config.minibatches)

    def _resume(self, resume: str | Path | None) -> None:
        if resume == "auto":
            resume = newest_complete(self.config.checkpoint_dir) if self.config.checkpoint_dir else None
        if resume is not None:
            self.load(resume)

    def _notice(self, text: str) -> None:
        (self.reporter.line if hasattr(self.reporter, "line") else print)(text)
