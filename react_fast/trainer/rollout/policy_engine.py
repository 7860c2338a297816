"""Rollouts from the policy in training, in this process."""

from collections.abc import Sequence
from typing import Any

import torch

from ...tracker.policy import cache_argument
from .sampling import Sample, SamplingParams, check_prompts, check_tokens
from .streams import uniforms
from .truncation import choose


class PolicyEngine:
    """Rollouts from the policy in training, in this process.

    Hugging Face models decode with a key/value cache, prompts padded on the left; finished rows leave the
    batch once half of it is done. Any other module is called as `model(ids [B, T]) -> logits [B, T, V]` and
    computes every position anew.

    Args:
        model: causal language model. eos_id: token that ends an action, or None. pad_id: any valid token.
    """

    def __init__(self, model: Any, *, eos_id: int | None, pad_id: int) -> None:
        check_tokens(eos_id, pad_id)
        self.model, self.eos_id, self.pad_id = model, eos_id, pad_id
        self._cached = hasattr(model, "generate")

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        check_prompts(prompts, params, self.model)
        if not prompts:
            return []
        was_training = self.model.training
        self.model.eval()
        step = _CachedSteps if self._cached else _PlainSteps
        try:
            return self._decode(step(self.model, prompts, self.pad_id), len(prompts), params)
        finally:
            self.model.train(was_training)

    def _decode(self, steps: Any, count: int, params: SamplingParams) -> list[Sample]:
        draws = uniforms(params, count) if not params.greedy else torch.zeros(count, params.max_new_tokens)
        samples = [
            Sample([], [], "length", logit_floors=[] if params.truncated else None) for _ in range(count)
        ]
        rows = torch.arange(count)  # sample of every row still in the batch
        running = torch.ones(count, dtype=torch.bool)
        tokens: torch.Tensor | None = None
        for position in range(params.max_new_tokens):
            logits = steps.next_logits(tokens)
            tokens, logprobs, floors = choose(logits, draws[rows, position], params)
            known = [None] * len(rows) if floors is None else floors.tolist()
            chosen = zip(tokens.tolist(), logprobs.tolist(), known, strict=True)
            for i, (token, logprob, floor) in enumerate(chosen):
                if not running[i]:
                    continue
                sample = samples[int(rows[i])]
                sample.ids.append(token)
                sample.logprobs.append(logprob)
                if sample.logit_floors is not None:
                    sample.logit_floors.append(floor)
                if token == self.eos_id:
                    sample.finish_reason = "stop"
                    running[i] = False
            alive = int(running.sum())
            if alive == 0:
                break
            if alive <= len(rows) // 2:
                keep = running.nonzero().squeeze(1)
                steps.keep(keep)
                rows, running, tokens = rows[keep], running[keep], tokens[keep.to(tokens.device)]
        return samples


class _CachedSteps:
    """A Hugging Face model, one token a step behind its key/value cache."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        self.model = model
        width = max(map(len, prompts))
        device = next(model.parameters()).device
        padded = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
        self.ids = torch.tensor(padded, device=device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache: Any = None
        self.name = cache_argument(model)

    def next_logits(self, tokens: torch.Tensor | None) -> torch.Tensor:
        if tokens is not None:
            self.ids = tokens[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -self.ids.shape[1] :]
        out = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.name: self.cache},
        )
        self.cache = getattr(out, self.name)
        return out.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.mask.device)
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


class _PlainSteps:
    """Any module from ids to logits; sequences are padded on the right and computed anew."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.sequences = [list(p) for p in prompts]
        self.device = next(model.parameters()).device

    def next_logits(self, tokens: torch.Tensor | None) -> torch.Tensor:
        if tokens is not None:
            for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
                sequence.append(token)
        width = max(map(len, self.sequences))
        padded = [s + [self.pad_id] * (width - len(s)) for s in self.sequences]
        logits = self.model(torch.tensor(padded, device=self.device))
        last = torch.tensor([len(s) - 1 for s in self.sequences], device=self.device)
        return logits[torch.arange(len(last), device=self.device), last]

    def keep(self, rows: torch.Tensor) -> None:
        self.sequences = [self.sequences[i] for i in rows.tolist()]
