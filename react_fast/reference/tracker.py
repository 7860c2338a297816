"""The tracker as loops over tokens: one sequence at a time, one backward an outcome, one forward a text."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

# Streams of the noise that an action is drawn anew with; what follows it has the streams below.
_ANEW = 2**32


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
        return _grad_x_input(
            *self._gradient(sequence, lambda logits: _logprobs(logits, sequence)[chosen].sum())
        )

    # ---- one text ------------------------------------------------------------------------------------------

    def attribute(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        target: Any = "response",
        *,
        method: str = "grad_x_input",
        baseline: int | None = None,
        steps: int = 50,
        inputs: str = "all",
    ) -> torch.Tensor:
        """Scores [P + R], or [R, P + R] for target "token"; no `baseline`: the zero vector."""
        ids, start = [*prompt_ids, *response_ids], len(prompt_ids)
        if target == "token":
            targets = [_logprob_of(ids, t) for t in range(start, len(ids))]
        elif target == "response":
            targets = [lambda logits: _logprobs(logits, ids)[start:].sum()]
        else:
            targets = [target]
        rows = []
        for outcome in targets:
            if method == "integrated_gradients":
                moved = range(start if inputs == "prompt" else len(ids))
                rows.append(self._integrated(ids, outcome, baseline, steps, moved))
            else:
                grad, embedded = self._gradient(ids, outcome)
                rows.append(_norms(grad) if method == "saliency" else _grad_x_input(grad, embedded))
        return torch.stack(rows) if target == "token" else rows[0]

    def intervene(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        actions: Any = "token",
        outcome: Any = "logprob",
        samples: int | None = None,
        *,
        counterfactual: Any = None,
        max_new_tokens: int | None = None,
    ) -> list[list[float]]:
        """Effects of do(action := counterfactual): one number for each replacement, or for each of `samples`
        continuations; no `counterfactual`: deletion."""
        ids, start = [*prompt_ids, *response_ids], len(prompt_ids)
        if actions == "token":
            actions = [(i, i + 1) for i in range(len(ids)) if start > 1 or i > 0]
        limit = max_new_tokens or len(response_ids)
        count = samples or 1
        if samples is None and hasattr(counterfactual, "draws"):
            count = counterfactual.draws
        elif samples is None and hasattr(counterfactual, "donors"):
            count = len(counterfactual.donors)
        effects = []
        for begin, end in actions:
            found = []
            for s in range(count):
                new = self._instead(counterfactual, ids, begin, end, s, stops=samples is not None)
                if samples is None:
                    found.append(self._fixed_effect(ids, start, begin, end, new, outcome))
                else:
                    found.append(self._sampled_effect(ids, start, begin, end, new, outcome, s, limit))
            effects.append(found)
            if outcome == "logprob" and samples is None and end - begin == 1:
                self.effects_by_token.setdefault(ids[begin], Moments()).add(sum(found) / len(found))
        return effects

    def outcome(self, prompt: list[int], response: list[int], outcome: Any) -> float:
        """Of a text: log-probability of a target's `token_ids` behind it, or a function of the response."""
        if hasattr(outcome, "token_ids"):
            return self.logprob(prompt + response, list(outcome.token_ids))
        return float(outcome(response))

    def logprob(self, prefix: list[int], tokens: list[int]) -> float:
        """Log-probability of tokens behind a prefix."""
        return float(self._logprobs(prefix + tokens)[len(prefix) :].sum())

    @torch.no_grad()
    def draw(self, prefix: list[int], stream: int, limit: int, *, stops: bool = True) -> list[int]:
        """The largest of log p + Gumbel noise, token by token; the noise is keyed (seed, stream, position)."""
        drawn: list[int] = []
        with self._evaluation():
            for position in range(limit):
                logp = torch.log_softmax(self._logits(prefix + drawn)[-1].double(), 0).cpu().numpy()
                key = np.array([self.seed, stream], dtype=np.uint64)
                counter = np.array([0, 0, 0, position], dtype=np.uint64)
                noise = np.random.Generator(np.random.Philox(key=key, counter=counter)).gumbel(size=len(logp))
                drawn.append(int(np.argmax(logp + noise)))
                if stops and drawn[-1] == self.eos_id:
                    break
        return drawn

    # ---- inside --------------------------------------------------------------------------------------------

    def _instead(
        self, counterfactual: Any, ids: list[int], begin: int, end: int, sample: int, *, stops: bool
    ) -> list[int]:
        """The tokens that stand in an action's place."""
        if counterfactual is None:
            return []
        if hasattr(counterfactual, "draws"):
            return self.draw(ids[:begin], _ANEW + sample, end - begin, stops=stops)
        if hasattr(counterfactual, "donors"):
            return list(counterfactual.donors[sample % len(counterfactual.donors)])
        return list(counterfactual.replacement(ids[begin:end]))

    def _fixed_effect(
        self, ids: list[int], start: int, begin: int, end: int, new: list[int], outcome: Any
    ) -> float:
        changed = ids[:begin] + new + ids[end:]
        if outcome != "logprob":
            place = _begins(start, begin, end, new)
            before = self.outcome(ids[:start], ids[start:], outcome)
            return before - self.outcome(changed[:place], changed[place:], outcome)
        effect = 0.0
        logp, after = self._logprobs(ids), self._logprobs(changed)
        for t in range(start, len(ids)):
            if not begin <= t < end:
                moved = t if t < begin else t - (end - begin) + len(new)
                effect += float(logp[t]) - float(after[moved])
        return effect

    def _sampled_effect(
        self,
        ids: list[int],
        start: int,
        begin: int,
        end: int,
        new: list[int],
        outcome: Any,
        sample: int,
        limit: int,
    ) -> float:
        prefix = ids[: max(end, start)]
        changed = prefix[:begin] + new + prefix[end:]
        place = _begins(start, begin, end, new)
        drawn = self._behind(prefix, start, sample, limit)
        if outcome == "logprob":
            return self.logprob(prefix, drawn) - self.logprob(changed, drawn)
        before = self.outcome(prefix[:start], prefix[start:] + drawn, outcome)
        other = self._behind(changed, place, sample, limit)
        return before - self.outcome(changed[:place], changed[place:] + other, outcome)

    def _behind(self, prefix: list[int], start: int, sample: int, limit: int) -> list[int]:
        """The policy's continuation; none where the response has ended."""
        return [] if prefix[start:][-1:] == [self.eos_id] else self.draw(prefix, sample, limit)

    def _integrated(
        self, ids: list[int], outcome: Callable[[torch.Tensor], torch.Tensor],
        baseline: int | None, steps: int, moved: range,
    ) -> torch.Tensor:  # fmt: skip
        """(x - x') * mean gradient at the Gauss-Legendre points of the way from x' to x."""
        _, x = self._gradient(ids, outcome)
        other = torch.zeros_like(x)
        if baseline is not None:
            _, other = self._gradient([baseline] * len(ids), outcome)
        start = torch.stack([other[t] if t in moved else x[t] for t in range(len(ids))])
        mean = torch.zeros_like(x)
        for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
            grad, _ = self._gradient(ids, outcome, start + (1 + float(node)) / 2 * (x - start))
            mean += float(weight) / 2 * grad
        return _grad_x_input(mean, x - start)

    def _gradient(
        self,
        ids: list[int],
        outcome: Callable[[torch.Tensor], torch.Tensor],
        embedded: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient of a function of the sequence's logits [L, V], embedding output), [L, D] each; `embedded`
        stands in the output's place."""
        outputs: list[torch.Tensor] = []

        def leaf(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            outputs.append((output if embedded is None else embedded[None]).detach().requires_grad_())
            return outputs[-1]

        handle = self.embedding.register_forward_hook(leaf)
        try:
            with self._evaluation(), torch.enable_grad():
                (grad,) = torch.autograd.grad(outcome(self._logits(ids)), outputs)
        finally:
            handle.remove()
        return grad[0], outputs[0].detach()[0]

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


def _norms(grad: torch.Tensor) -> torch.Tensor:
    """[L, D] -> [L]"""
    return torch.stack(
        [g.to(torch.float64 if g.dtype == torch.float64 else torch.float32).norm() for g in grad]
    )


def _begins(start: int, begin: int, end: int, new: list[int]) -> int:
    """Where the response begins in a changed text: an action that began in the prompt belongs to it."""
    return start if begin >= start else begin + len(new) + max(0, start - end)


def _embedding(model: Any) -> Any:
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()
    (found,) = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return found
