"""What credit in TRL's GRPO needs: rows as the tracker takes them, and effects of tokens on the rewards."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..tracker.effect_table import EffectTable

Tensor = torch.Tensor


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


class Interventions:
    """do(token := another draw of the policy): the rest of the completion stays, the rewards are asked for again.

    effect = R(completion) - R(completion with the other token); it counts for the token, and turned around for the
    one in its place. `table` keeps them by token and position over training, so that few a batch are enough.

    Args:
        trainer: TRL's. budget: completions a batch that are scored again. score: `_calculate_rewards`.
    """

    def __init__(self, trainer: Any, table: EffectTable, budget: int, score: Callable[..., Tensor]) -> None:
        self.trainer, self.table, self.budget, self._score = trainer, table, budget, score
        self._last: tuple[Any, ...] = ()

    def remember(self, *given: Any) -> None:
        """Arguments and result of the trainer's last `_calculate_rewards`."""
        self._last = given

    def effects(self, output: dict[str, Any], mask: Tensor, *, temperature: float) -> Tensor:
        """[B, C] float64 of a batch's tokens as the table knows them, after measuring some of this batch."""
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        ids = output["completion_ids"]
        places = (mask & (ids != self._eos())).nonzero()
        if len(places):
            self._measure(output, places, temperature)
        return self.table.effects(ids, positions)

    def _measure(self, output: dict[str, Any], places: Tensor, temperature: float) -> None:
        """As many of the places [N, 2] (row, position) as the budget allows; torch's own generators stay."""
        trainer, device = self.trainer, places.device
        rank = trainer.accelerator.process_index
        generator = torch.Generator().manual_seed(
            trainer.args.seed * 1_000_003 + trainer.state.global_step * 1009 + rank
        )
        chosen = torch.randint(len(places), (self.budget,), generator=generator).to(device)
        rows, at = places[chosen].unbind(1)
        taken = output["completion_ids"][rows, at]
        instead = self._drawn(output, rows, at, temperature, generator)
        inputs, prompts, completions, ids, rewards = self._last
        changed_ids = [list(ids[row]) for row in rows.tolist()]
        for changed, t, token in zip(changed_ids, at.tolist(), instead.tolist(), strict=True):
            changed[t] = token
        texts = trainer.processing_class.batch_decode(changed_ids, skip_special_tokens=True)
        again = self._quiet(
            [inputs[row] for row in rows.tolist()],
            [prompts[row] for row in rows.tolist()],
            [_with_text(completions[row], text) for row, text in zip(rows.tolist(), texts, strict=True)],
            changed_ids,
        )
        before = self._total(rewards, len(ids))[rows]
        found = (before - self._total(again, self.budget)).double()
        kept = found.isfinite() & (instead != taken)
        found, at = found[kept], at[kept]
        self.table.add(found, taken[kept], at)
        self.table.add(-found, instead[kept], at)

    def _quiet(self, *given: Any) -> Tensor:
        """Rewards without what their functions log, which is told of the policy's own completions."""
        trainer = self.trainer
        trainer._log_completion_extra = trainer._log_metric = lambda *told, **more: None
        try:
            return self._score(*given)
        finally:
            del trainer._log_completion_extra, trainer._log_metric

    def _eos(self) -> int:
        """Never replaced and never drawn: rewards would see what stands behind it."""
        found = self.trainer.processing_class.eos_token_id
        return -1 if found is None else int(found)

    def _total(self, rewards: Tensor, own: int) -> Tensor:
        """[own] weighted sums of this process's rows of what all processes' functions gave."""
        first = self.trainer.accelerator.process_index * own
        weights = self.trainer.reward_weights.to(rewards.device)
        return (rewards[first : first + own] * weights).nansum(1)

    @torch.no_grad()
    def _drawn(
        self, output: dict[str, Any], rows: Tensor, at: Tensor, temperature: float, generator: Any
    ) -> Tensor:
        """[N] tokens other than those taken and the end; the same where there is none."""
        taken = output["completion_ids"][rows, at]
        logits = self._logits(output, rows, at)
        p = torch.softmax(logits.double() / temperature, -1).scatter(1, taken[:, None], 0.0)
        if self._eos() >= 0:
            p[:, self._eos()] = 0.0
        cumulative = p.cumsum(1)
        draws = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator).to(p.device)
        drawn = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)[:, 0]
        return torch.where(cumulative[:, -1] > 0, drawn.clamp_max(p.shape[1] - 1), taken)

    def _logits(self, output: dict[str, Any], rows: Tensor, at: Tensor) -> Tensor:
        """[N, V] of the policy before every place; a row at a time, since logits of all do not fit."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        seen = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        kept = output["completion_ids"].shape[1] + 1  # one before the first token, and one behind the last
        found: list[Tensor] = [ids.new_empty(0)] * len(rows)
        was_training = model.training
        model.eval()
        try:
            for row in rows.unique().tolist():
                one = {"input_ids": ids[row : row + 1], "attention_mask": seen[row : row + 1]}
                logits = model(**one, use_cache=False, logits_to_keep=kept).logits[0]
                for i in (rows == row).nonzero()[:, 0].tolist():
                    found[i] = logits[at[i]]
        finally:
            model.train(was_training)
        return torch.stack(found)


def _with_text(completion: Any, text: str) -> Any:
    """A completion as TRL hands it to reward functions, a string or messages, with another text."""
    if isinstance(completion, str):
        return text
    messages = copy.deepcopy(completion)
    messages[-1]["content"] = text
    return messages
