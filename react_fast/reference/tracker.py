"""The tracker as loops over tokens: one sequence at a time, one backward an outcome, one forward a deletion."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


class Moments:
    """Count, mean and M2 of a stream of numbers (Welford 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def add(self, x: float) -> None:
        self.count += 1
        delta = x - self.mean
        self.mean += delta / self.count
        self.m2 += delta * (x - self.mean)

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN for fewer than two numbers."""
        return math.sqrt(self.m2 / (self.count - 1) / self.count) if self.count > 1 else math.nan


class Tracker:
    """See `react_fast.tracker.CausalityTracker`, whose numbers these are; no state, no report.

    Args:
        model: maps ids [1, T] to logits [1, T, V], as a tensor or as the attribute `logits`.
        tokenizer: only its `eos_token_id` is read.
        every, seed: as CausalityTracker's.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, every: int = 1, seed: int = 0) -> None:
        self.model, self.every, self.seed = model, every, seed
        self.eos_id = getattr(tokenizer, "eos_token_id", None)
        self.embedding = _embedding(model)
        self.calls = 0
        self.by_token: dict[int, Moments] = {}
        self.by_position: dict[int, Moments] = {}
        self.effects_by_token: dict[int, Moments] = {}

    # ---- training ------------------------------------------------------------------------------------------

    @contextmanager
    def observe(self, ids: torch.Tensor, actions: torch.Tensor, *, step: int | None = None) -> Iterator[None]:
        """Around forward and backward on one sequence: ids [L], actions [L]; one in `every` steps counts."""
        due = (self.calls if step is None else step) % self.every == 0
        self.calls += 1
        outputs: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                output.retain_grad()
                outputs.append(output)

        handle = self.embedding.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
        if not due:
            return
        embedded = outputs[-1]
        assert embedded.grad is not None
        scores = _grad_x_input(-embedded.grad[0], embedded.detach()[0])
        chosen = [t for t in range(len(ids)) if bool(actions[t])]
        for t in range(chosen[-1] if chosen else 0):
            if math.isfinite(scores[t]):
                self.by_token.setdefault(int(ids[t]), Moments()).add(float(scores[t]))
                self.by_position.setdefault(t, Moments()).add(float(scores[t]))

    def score(self, ids: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """[L]: attribution of the log-probability of all actions of a sequence to each of its tokens."""
        sequence = [int(i) for i in ids]
        chosen = [t for t in range(1, len(sequence)) if bool(actions[t])]
        return self._attribute(sequence, lambda logits: _logprobs(logits, sequence)[chosen].sum())

    # ---- one text ------------------------------------------------------------------------------------------

    def attribute(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], target: Any = "response"
    ) -> torch.Tensor:
        """Scores [P + R], or [R, P + R] for target "token"."""
        ids, start = [*prompt_ids, *response_ids], len(prompt_ids)
        if callable(target):
            return self._attribute(ids, target)
        if target == "response":
            return self._attribute(ids, lambda logits: _logprobs(logits, ids)[start:].sum())
        return torch.stack([self._attribute(ids, _logprob_of(ids, t)) for t in range(start, len(ids))])

    def intervene(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        actions: Any = "token",
        outcome: Any = "logprob",
        samples: int | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> list[list[float]]:
        """Effects of the deletion of every action: one number, or one for each of `samples` continuations."""
        ids, start = [*prompt_ids, *response_ids], len(prompt_ids)
        if actions == "token":
            actions = [(i, i + 1) for i in range(len(ids)) if start > 1 or i > 0]
        limit = max_new_tokens or len(response_ids)
        effects = []
        for begin, end in actions:
            if samples is None:
                found = [self._fixed_effect(ids, start, begin, end, outcome)]
            else:
                found = [
                    self._sampled_effect(ids, start, begin, end, outcome, s, limit) for s in range(samples)
                ]
            effects.append(found)
            if outcome == "logprob" and end - begin == 1:
                self.effects_by_token.setdefault(ids[begin], Moments()).add(sum(found) / len(found))
        return effects

    # ---- inside --------------------------------------------------------------------------------------------

    def _fixed_effect(self, ids: list[int], start: int, begin: int, end: int, outcome: Any) -> float:
        without = ids[:begin] + ids[end:]
        outside = [t for t in range(start, len(ids)) if not begin <= t < end]
        if outcome != "logprob":
            return float(outcome(ids[start:])) - float(outcome([ids[t] for t in outside]))
        effect = 0.0
        before, after = self._logprobs(ids), self._logprobs(without)
        for t in outside:
            moved = t if t < begin else t - (end - begin)
            effect += float(before[t]) - float(after[moved])
        return effect

    def _sampled_effect(
        self, ids: list[int], start: int, begin: int, end: int, outcome: Any, sample: int, limit: int
    ) -> float:
        prefix = ids[: max(end, start)]
        changed = prefix[:begin] + prefix[end:]
        opening = prefix[start:]
        changed_opening = changed[start:] if begin >= start else []
        drawn = self._continue(prefix, opening, sample, limit)
        if outcome == "logprob":
            before = self._logprobs(prefix + drawn)[len(prefix) :].sum()
            return float(before - self._logprobs(changed + drawn)[len(changed) :].sum())
        other = self._continue(changed, changed_opening, sample, limit)
        return float(outcome(opening + drawn)) - float(outcome(changed_opening + other))

    @torch.no_grad()
    def _continue(self, prefix: list[int], opening: list[int], sample: int, limit: int) -> list[int]:
        """The largest of log p + Gumbel noise, token by token; the noise is keyed (seed, sample, position)."""
        drawn: list[int] = []
        if opening[-1:] == [self.eos_id]:
            return drawn
        with self._evaluation():
            for position in range(limit):
                logp = torch.log_softmax(self._logits(prefix + drawn)[-1].double(), 0).cpu().numpy()
                key = np.array([self.seed, sample], dtype=np.uint64)
                counter = np.array([0, 0, 0, position], dtype=np.uint64)
                noise = np.random.Generator(np.random.Philox(key=key, counter=counter)).gumbel(size=len(logp))
                drawn.append(int(np.argmax(logp + noise)))
                if drawn[-1] == self.eos_id:
                    break
        return drawn

    def _attribute(self, ids: list[int], outcome: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Gradient x input of a function of the sequence's logits [L, V]."""
        outputs: list[torch.Tensor] = []

        def leaf(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            outputs.append(output.detach().requires_grad_())
            return outputs[-1]

        handle = self.embedding.register_forward_hook(leaf)
        try:
            with self._evaluation(), torch.enable_grad():
                (grad,) = torch.autograd.grad(outcome(self._logits(ids)), outputs)
        finally:
            handle.remove()
        return _grad_x_input(grad[0], outputs[0].detach()[0])

    @torch.no_grad()
    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        with self._evaluation():
            return _logprobs(self._logits(ids), ids).double()

    def _logits(self, ids: list[int]) -> torch.Tensor:
        out = self.model(torch.tensor([ids], device=self.embedding.weight.device))
        return getattr(out, "logits", out)[0]

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)


def _logprobs(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """[L]: log p of every token behind those before it; 0 for the first."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = [torch.log_softmax(wide[t - 1], 0)[ids[t]] for t in range(1, len(ids))]
    return torch.stack([wide.sum() * 0, *logp])


def _logprob_of(ids: list[int], t: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: _logprobs(logits, ids)[t]


def _grad_x_input(grad: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """[L, D] x 2 -> [L]: sum_d grad_d * activation_d, row by row."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return torch.stack([(g.to(wide) * a.to(wide)).sum() for g, a in zip(grad, activation, strict=True)])


def _embedding(model: Any) -> Any:
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()
    (found,) = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return found
