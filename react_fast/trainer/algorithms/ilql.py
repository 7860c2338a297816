"""Implicit language Q-learning: values from written answers and their rewards, and decoding that follows them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...envs import Record
from ...envs.record import RecordError
from ...ops.backend import accumulation_dtype
from ...ops.logprob import token_logprobs
from ...ops.q_learning import guided_logits
from ...ops.q_loss import ilql_loss
from ...ops.target_network import TargetUpdate
from ..batch import Batch
from ..rollout import Trajectory, demonstration
from ..scoring import Scores
from .base import Algorithm, Loss
from .loss_options import check_count, check_numbers
from .ppo import ValueHead
from .q_policies import SteeredEngine

QS, TARGETS = ("q1", "q2"), ("target_q1", "target_q2")


class QHead(nn.Module):
    """Hidden states [B, T, D] to Q of every token [B, T, V]; 0 before it is trained."""

    def __init__(self, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype))


class Targets:
    """The target heads, which follow the trained ones after every step's update."""

    def __init__(self, heads: nn.ModuleDict, every: int, tau: float) -> None:
        self._moves = [
            TargetUpdate(heads[target], heads[q], every=every, tau=tau)
            for q, target in zip(QS, TARGETS, strict=True)
        ]

    def replay(self, fresh: Sequence[Trajectory]) -> list[Trajectory]:
        return list(fresh)

    def after_update(self) -> None:
        for move in self._moves:
            move.step()

    def state_dict(self) -> dict[str, Any]:
        return {"moves": [move.state_dict() for move in self._moves]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for move, one in zip(self._moves, state["moves"], strict=True):
            move.load_state_dict(one)


@dataclass(frozen=True, kw_only=True)
class ILQL(Algorithm):
    """Offline Q-learning on the records' answers: each record's reference, its metadata "rejected" (a text) and
    "answers" (texts), with the rewards that the environment gives them. No rollouts.

        loss = ilql_loss (two Q heads, a V head, expectile tau, conservative term) - sft_coef mean log p(reference)

    Episodes are decoded from softmax(logits + beta (min(Q1, Q2) - V)). Q of all tokens is held for both heads and
    their targets, [B, T, V]: for small vocabularies.

    Args:
        gamma: discount per token.  tau: expectile of V, above 0.5 for the better answers.
        cql_coef: weight of the conservative term.  sft_coef: weight of the cross-entropy of all answers.
        beta: how far decoding follows the values.
        target_every, target_tau: training steps between updates of the target heads, and how far each goes.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Snell et al. 2022 (arXiv:2206.11871).
    """

    gamma: float = 1.0
    tau: float = 0.7
    cql_coef: float = 0.1
    sft_coef: float = 1.0
    beta: float = 4.0
    target_every: int = 1
    target_tau: float = 0.1

    supervised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, "gamma", "tau", "target_tau", low=0.0, high=1.0)
        check_numbers(self, "cql_coef", "sft_coef", "beta", low=0.0)
        check_count(self, "target_every")

    def check(self, config: Any) -> None:
        super().check(config)
        if config.sharded:
            raise ValueError(
                "trainer.sharded must be false for ILQL, whose target heads follow the trained ones"
            )

    def heads(self, model: Any) -> dict[str, nn.Module]:
        weight = model.get_output_embeddings().weight if hasattr(model, "get_output_embeddings") else None
        if weight is None:
            return {"q1": nn.Identity()}  # the scorer says what such a model lacks
        (vocabulary, width), dtype = weight.shape, accumulation_dtype(weight.dtype)
        heads = {name: QHead(width, vocabulary, dtype) for name in QS}
        targets = {
            name: copy.deepcopy(heads[q]).requires_grad_(False) for name, q in zip(TARGETS, QS, strict=True)
        }
        return {**heads, **targets, "value": ValueHead(width, dtype)}

    def memory(self, trainer: Any) -> Targets:
        return Targets(trainer.policy.heads, self.target_every, self.target_tau)

    def engine(self, trainer: Any) -> SteeredEngine:
        heads = trainer.policy.heads

        def guide(hidden: torch.Tensor, logits: torch.Tensor, params: Any) -> torch.Tensor:
            q = tuple(heads[name](hidden).to(logits.dtype) for name in QS)
            return guided_logits(logits, q, heads["value"](hidden), beta=self.beta)

        return SteeredEngine(trainer.policy_engine, trainer.policy.output, guide)

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        env = trainer.env
        found = self.demonstrate(trainer.tokenizer, env.records, trainer.records_of(step))
        for one in found:
            text = trainer.tokenizer.decode(one.token_ids[one.action_mask].tolist(), skip_special_tokens=True)
            record = env.records[one.record]
            one.rewards = [float(env.reward(record.prompt, text, record))]
        return found

    def demonstrate(
        self, tokenizer: Any, records: Sequence[Record], chosen: Sequence[int]
    ) -> list[Trajectory]:
        found = []
        for i in chosen:
            answers = records[i].metadata.get("answers", ())
            texts = [records[i].reference, records[i].metadata.get("rejected"), *answers]
            known = dict.fromkeys(text for text in texts if text is not None)
            found += [demonstration(tokenizer, records[i], text, i) for text in known]
        if not found:
            raise RecordError(
                "records must have a reference, metadata 'rejected' or 'answers' for ILQL, got none"
            )
        return found

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return torch.zeros_like(batch.rewards)

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        def taken(name: str) -> torch.Tensor:
            return scores.heads[name].gather(2, part.targets[..., None]).squeeze(2)

        def logprobs(name: str) -> torch.Tensor:
            return token_logprobs(scores.heads[name], part.targets, mask=part.mask)

        values = scores.heads["value"]
        count = denominator.clamp_min(1).to(values.dtype)
        found = ilql_loss(
            (taken("q1"), taken("q2")),
            (taken("target_q1"), taken("target_q2")),
            values,
            part.step_rewards.to(values.dtype),
            part.mask,
            gamma=self.gamma,
            tau=self.tau,
            q_logprobs=(logprobs("q1"), logprobs("q2")),
            cql_coef=self.cql_coef,
            denominator=count,
        )
        return found.loss - self.sft_coef * scores.logprobs.sum() / count, found.metrics

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        return ("eval/reward",)
