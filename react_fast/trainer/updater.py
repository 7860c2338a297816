"""Optimiser updates on a scored batch: epochs x minibatches, each summed over micro-batches."""

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import mismatch
from .batch import Batch
from .meters import Averages
from .packing import buckets, split_into
from .ranks import Ranks, clip_gradients, spread
from .recompute import recomputed
from .rollout import key, permutation
from .schedule import learning_rate, make_optimizer
from .scoring import Scorer, Scores, scores

# Streams of random numbers that must not meet: prompts, rollouts and dropout each have their own.
_ORDER, _DROPOUT = 1, 2


class Updater:
    """Changes the policy.

    Args:
        policy: what is trained.
        algorithm, config, ranks, tracker: the trainer's.
        groups: [records] number of every record's group in the tracker, or None.
        phase: name of the training in warnings.
    Attributes:
        updates: finished optimiser updates.
    """

    def __init__(
        self,
        policy: Scorer,
        algorithm: Any,
        config: Any,
        ranks: Ranks,
        tracker: Any = None,
        groups: torch.Tensor | None = None,
        phase: str = "train",
    ) -> None:
        self.algorithm, self.config, self.ranks = algorithm, config, ranks
        self.tracker, self.groups, self.phase = tracker, groups, phase
        self.policy, self.optimizer = spread(
            policy, lambda trained: make_optimizer(trained, config), ranks.accelerator, sharded=config.sharded
        )
        self.updates = 0

    def run(self, batch: Batch, step: int) -> dict[str, float]:
        """All updates on one batch; `step` keys their order. Returns their mean metrics."""
        self.policy.train(self.algorithm.supervised)
        totals = Averages()
        with recomputed(self.policy) if self.config.gradient_checkpointing else nullcontext():
            for rows in self._minibatches(len(batch), step):
                self._update(batch.select(rows), totals, step)
        return totals.joined(self.ranks).result()

    def parts(self, batch: Batch) -> list[torch.Tensor]:
        """Micro-batches of this rank's even share of a batch, places in the share; every rank has as many."""
        together, budget = self.algorithm.together, self.config.micro_tokens
        count = len(self.ranks.even_share(len(batch)))
        if budget is None:
            size = self.config.micro_batch or count
            return list(torch.arange(count).split(max(size // together, 1) * together))
        lengths, padded = batch.lengths.cpu(), self.config.padding == "padded"
        shares = [lengths[self.ranks.even_share(len(batch), rank)] for rank in range(self.ranks.world)]
        all_parts = [buckets(share, budget, together=together, padded=padded) for share in shares]
        return split_into(all_parts[self.ranks.rank], max(map(len, all_parts)), together)

    @torch.no_grad()
    def scores(self, batch: Batch, policy: Any, temperature: float) -> Scores:
        """Scores under a policy in evaluation mode: each rank those of its share, micro-batch by micro-batch."""
        was_training = policy.training
        policy.eval()
        mine = self.ranks.even_share(len(batch))
        found: dict[str, torch.Tensor] = {}
        for places in self.parts(batch):
            with self.ranks.accelerator.autocast():
                outputs = policy(batch.select(mine[places]), temperature)
            for name, x in outputs.items():
                if name not in found:
                    found[name] = x.new_zeros(len(mine), batch.mask.shape[1], *x.shape[2:])
                found[name][places, : x.shape[1]] = x
        policy.train(was_training)
        return scores({name: self.ranks.rows(x, len(batch)) for name, x in found.items()})

    def _update(self, batch: Batch, totals: Averages, step: int) -> None:
        denominator = self.algorithm.denominator(self.config, batch)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            stream = (self.ranks.rank,) if self.ranks.rank else ()
            torch.manual_seed(key(self.config.seed, _DROPOUT, self.updates, *stream))
            mine = self.ranks.even_share(len(batch))
            parts = self.parts(batch)
            for i, places in enumerate(parts):
                part = batch.select(mine[places])
                part.mask = part.mask & self.ranks.own(len(batch))[places, None].to(part.mask.device)
                with self._synchronised(i == len(parts) - 1):
                    self._backward(part, denominator, totals, step)
        norm = clip_gradients(self.policy.parameters(), self.config.max_grad_norm)
        rate = learning_rate(self.updates, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            warnings.warn(
                f"{self.phase} step {step + 1}: gradient norm is {norm}, update skipped", stacklevel=3
            )
            totals.add({"skipped_updates": float(self.ranks.first)}, 1.0)
        self.updates += 1
        totals.add({"grad_norm": norm, "learning_rate": rate}, 1.0)

    def _backward(self, part: Batch, denominator: torch.Tensor, totals: Averages, step: int) -> None:
        temperature = sampling_temperature(self.algorithm, self.config)
        with self._observed(part, step):
            found = scores(self.policy(part, temperature))
            if not self.algorithm.supervised:
                totals.add(*mismatch.correct(self.config, part, found.logprobs))
            loss, metrics = self.algorithm.loss(self.config, part, found, denominator)
            # Gradients are averaged over the ranks, and the loss is divided by what all of them hold.
            self.ranks.accelerator.backward(loss * self.ranks.world)
        totals.add(metrics, float(self.algorithm.weight(part)))
        totals.sum("loss", float(loss.detach()))

    def _observed(self, part: Batch, step: int) -> AbstractContextManager[None]:
        if self.tracker is None:
            return nullcontext()
        actions = torch.nn.functional.pad(part.mask, (1, 0))
        groups = None if self.groups is None else self.groups.to(part.records.device)[part.records]
        return self.tracker.observe(part.input_ids, actions, step=step, group_index=groups)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Copies exchange their gradients once an update, with the last micro-batch; shards with every one."""
        if last or self.config.sharded:
            return nullcontext()
        return self.ranks.accelerator.no_sync(self.policy)

    def _minibatches(self, count: int, step: int) -> Iterator[torch.Tensor]:
        """Rows of every update: in order for one update, else a keyed permutation in each epoch, of trajectories
        or of the neighbours that stay together."""
        config, together = self.config, self.algorithm.together
        for epoch in range(config.epochs):
            if config.updates_per_step == 1:
                yield torch.arange(count)
                continue
            order = torch.from_numpy(permutation(count // together, config.seed, _ORDER, step, epoch))
            for part in order.chunk(config.minibatches):
                yield (part[:, None] * together + torch.arange(together)).flatten()


def sampling_temperature(algorithm: Any, config: Any) -> float:
    """Policies are scored as they sample; references are scored at temperature 1."""
    return 1.0 if algorithm.supervised else config.temperature
