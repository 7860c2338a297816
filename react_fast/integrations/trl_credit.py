"""What credit in TRL's GRPO needs: rows as the tracker takes them, and effects of tokens on the rewards."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..tracker.shapley import next_asked, shared
from ..trainer.credit import advantage_per_reward
from ..trainer.rollout import PolicyEngine, SamplingParams, choose, key, uniforms

Tensor = torch.Tensor

_REDRAWN = 7  # stream of random numbers, as the trainer's own


class Rows(NamedTuple):
    """Prompt and completion with padding on the right alone, [B, P + C], and the completion's columns, [B, C]."""

    ids: Tensor
    seen: Tensor
    actions: Tensor
    places: Tensor


def right_padded(batch: dict[str, Any], actions: Tensor) -> Rows:
    """TRL pads prompts on the left and completions on the right; here a row begins at column 0.

    Args:
        batch: TRL's prompt_ids, prompt_mask [B, P], completion_ids and completion_mask [B, C].
        actions: [B, C] bool, true where a token is the policy's.
    """
    prompt = batch["prompt_mask"].bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    columns, empty = torch.arange(ids.shape[1], device=ids.device), (~prompt).sum(1, keepdim=True)
    source = (columns + empty) % ids.shape[1]
    seen = torch.cat([prompt, batch["completion_mask"].bool()], 1)
    held = torch.cat([torch.zeros_like(prompt), actions], 1)
    ids, seen, held = (x.gather(1, source) for x in (ids, seen, held))
    return Rows(ids, seen, held, columns[prompt.shape[1] :] - empty)


@dataclass
class _Measured:
    """A row under bisection.

    Attributes:
        row: of the batch.
        places: in its completion, the last first, where the redrawing chooses another token.
        known: value(k) for some k, the reward once the first k of the places and all behind them are redrawn.
        asked: k whose value is asked next, None when all is known.
    """

    row: int
    places: list[int]
    known: dict[int, float]
    asked: int | None

    def tell(self, value: float) -> None:
        assert self.asked is not None
        self.known[self.asked] = value
        self.asked = next_asked(self.known) if math.isfinite(value) else None


class Interventions:
    """do(the policy draws anew from here on), under one other noise for all of a completion's tokens; then the
    rewards are asked for again.

        value(t) = R(completion whose first t tokens are kept and the rest redrawn)
        effect_t = value(t + 1) - value(t)

    So effects sum to R(completion) - R(redrawn), and a token that the redrawing would have chosen, too, has none.
    See `react_fast.trainer.credit.CausalReplays`, whose shortcuts hold here: rows whose advantage is farthest from
    0 are measured until the budget is spent, and bisection does not see effects that cancel between equal values.
    Rows are bisected side by side, as many as the budget gives the evaluations of one decision each, so that a
    round is one generation of suffixes and one call of the reward functions.

    Args:
        trainer: TRL's. budget: completions that are scored again a batch and process. score: `_calculate_rewards`.
    """

    def __init__(self, trainer: Any, budget: int, score: Callable[..., Tensor]) -> None:
        self.trainer, self.budget, self._score = trainer, budget, score
        self._last: tuple[Any, ...] = ()

    def remember(self, *given: Any) -> None:
        """Arguments and result of the trainer's last `_calculate_rewards`."""
        self._last = given

    def effects(self, output: dict[str, Any], mask: Tensor) -> Tensor:
        """[B, C] float64 in the unit of the advantages; NaN in rows that were not measured.

        Args:
            output: of `_generate_and_score_completions`. mask: [B, C] bool, true where a token is the policy's.
        """
        found = torch.full(mask.shape, torch.nan, dtype=torch.float64)
        prompts = [
            ids[seen.bool()].tolist()
            for ids, seen in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        for one in self._measured(prompts, _by_surprise(output["advantages"], mask)):
            if all(map(math.isfinite, one.known.values())):
                found[one.row] = 0.0
                for t, effect in zip(one.places, shared(one.known), strict=True):
                    found[one.row, t] = effect
        return found.to(mask.device) * self._per_reward(output["advantages"])[:, None]

    def _measured(self, prompts: Sequence[list[int]], waiting: Iterator[int]) -> Iterator[_Measured]:
        """Rows that are measured, as far as the budget goes; a round asks for one value of every row begun."""
        *_, completions, rewards = self._last
        rewards = self._own(rewards, len(completions))
        width = max(1, self.budget // (1 + max(map(len, completions)).bit_length()))
        begun: list[_Measured] = []
        left = self.budget
        while True:
            while len(begun) < min(width, left) and (row := next(waiting, None)) is not None:
                redrawn = self._redrawn(prompts[row], completions[row], row)
                places = [t for t, token in enumerate(completions[row]) if token != redrawn[t]][::-1]
                begun.append(_Measured(row, places, {0: rewards[row]}, len(places) or None))
                if not places:
                    yield begun.pop()
            asked = begun[:left]
            count = self._most(len(asked))
            if count == 0:
                break
            for one, value in zip(asked, self._values(prompts, asked, count), strict=True):
                one.tell(value)
            left -= len(asked)
            yield from (one for one in begun if one.asked is None)
            begun = [one for one in begun if one.asked is not None]
        yield from begun

    def _most(self, count: int) -> int:
        """The largest of all processes: their reward functions are gathered, so every one calls them as often."""
        accelerator = self.trainer.accelerator
        return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())

    def _values(self, prompts: Sequence[list[int]], asked: Sequence[_Measured], count: int) -> list[float]:
        """What every row asks for; `count` completions are scored, as many on every process."""
        inputs, texts, completions, ids, _ = self._last
        kept = [ids[one.row][: one.places[one.asked - 1]] for one in asked if one.asked is not None]
        rows = [one.row for one in asked] + [0] * (count - len(asked))
        changed = self._continued([prompts[one.row] for one in asked], kept, rows[: len(asked)])
        changed += [list(ids[0])] * (count - len(asked))
        decoded = self.trainer.processing_class.batch_decode(changed, skip_special_tokens=True)
        found = self._quiet(
            [inputs[row] for row in rows],
            [texts[row] for row in rows],
            [_with_text(completions[row], text) for row, text in zip(rows, decoded, strict=True)],
            changed,
        )
        return self._own(found, count)[: len(asked)]

    def _continued(
        self, prompts: Sequence[list[int]], kept: Sequence[list[int]], rows: list[int]
    ) -> list[list[int]]:
        """Completions that begin with the kept tokens; the policy draws what follows."""
        if not rows:
            return []
        skip, longest = [len(ids) for ids in kept], self.trainer.max_completion_length
        params = replace(self._params(longest - min(skip)), rows=rows, skip=skip)
        begun = [prompt + ids for prompt, ids in zip(prompts, kept, strict=True)]
        tokenizer = self.trainer._tokenizer
        engine = PolicyEngine(self._model(), eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
        drawn = [one.ids for one in engine.generate(begun, params)]
        return [ids + self._ended(more[: longest - len(ids)]) for ids, more in zip(kept, drawn, strict=True)]

    def _ended(self, ids: list[int]) -> list[int]:
        """Up to the first of TRL's end tokens."""
        end = next((t for t, token in enumerate(ids) if token in self.trainer.eos_token_ids), len(ids))
        return ids[: end + 1]

    @torch.no_grad()
    def _redrawn(self, prompt: list[int], ids: list[int], row: int) -> list[int]:
        """At every place of a completion what the policy draws there under the other noise."""
        model, params = self._model(), self._params(len(ids))
        inputs = torch.tensor([prompt + ids], device=self.trainer.accelerator.device)
        was_training = model.training
        model.eval()
        try:
            logits = model(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                use_cache=False,
                logits_to_keep=len(ids) + 1,
            ).logits[0, :-1]
        finally:
            model.train(was_training)
        return choose(logits, uniforms(replace(params, rows=[row]), 1)[0], params)[0].tolist()

    def _params(self, max_new_tokens: int) -> SamplingParams:
        trainer = self.trainer
        return SamplingParams(
            max_new_tokens,
            temperature=trainer.temperature,
            top_k=trainer.top_k if (trainer.top_k or 0) > 0 else None,
            top_p=trainer.top_p,
            min_p=trainer.min_p or 0.0,
            seed=key(trainer.args.seed, _REDRAWN, trainer.accelerator.process_index),
            step=trainer.state.global_step,
        )

    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _quiet(self, *given: Any) -> Tensor:
        """Rewards without what their functions log, which is told of the policy's own completions, and without
        a trace in torch's random numbers."""
        trainer, device = self.trainer, self.trainer.accelerator.device
        trainer._log_completion_extra = trainer._log_metric = lambda *told, **more: None
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                return self._score(*given)
        finally:
            del trainer._log_completion_extra, trainer._log_metric

    def _own(self, rewards: Tensor, count: int) -> list[float]:
        """Weighted sums of this process's rows, of what all processes' functions gave."""
        first = self.trainer.accelerator.process_index * count
        return self._totals(rewards)[first : first + count].tolist()

    def _totals(self, rewards: Tensor) -> Tensor:
        """[N] weighted sums of what the functions gave, [N, functions]; NaN where none gave anything."""
        sums = (rewards * self.trainer.reward_weights.to(rewards.device)).nansum(1).double()
        return torch.where(rewards.isnan().all(1), torch.nan, sums)

    def _per_reward(self, advantages: Tensor) -> Tensor:
        """[B] advantage per reward in every row's group; a completion without a reward stands at its mean."""
        whole = self._totals(self._last[-1]).view(-1, self.trainer.num_generations)
        whole = torch.where(whole.isnan(), whole.nanmean(1, keepdim=True), whole)
        groups = torch.arange(len(whole), device=whole.device).repeat_interleave(whole.shape[1])
        squares = self.trainer.accelerator.gather(advantages).double().square()
        ratio = advantage_per_reward(squares, whole.flatten(), groups)
        first = self.trainer.accelerator.process_index * len(advantages)
        return ratio[first : first + len(advantages)]


def _by_surprise(advantages: Tensor, mask: Tensor) -> Iterator[int]:
    """Rows with an advantage to explain, the farthest from 0 first, ties by order."""
    size = torch.where(mask.any(1), advantages.double().abs(), 0.0).cpu()
    order = size.round(decimals=9).argsort(descending=True, stable=True)
    return (row for row in order.tolist() if size[row] > 0)


def _with_text(completion: Any, text: str) -> Any:
    """A completion as TRL hands it to reward functions, a string or messages, with another text."""
    if isinstance(completion, str):
        return text
    messages = copy.deepcopy(completion)
    messages[-1]["content"] = text
    return messages
