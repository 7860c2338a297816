"""TRL's GRPOTrainer with react_fast's head, without replacing any global, and with credit for every token."""

import types
from typing import Any

import torch
import trl

from ..tracker import CausalityTracker
from ..tracker.credit import attribution_credit, causal_credit
from .trl import compacting
from .trl_credit import Interventions, right_padded
from .trl_logprobs import fused_head

CREDITS = ("uniform", "attribution", "causal")


def use_fused_head(model: Any) -> None:
    """Let a model that TRL's `add_fused_lm_head` has prepared compute log-probabilities with react_fast.

    Its forward stays TRL's code, with two of the names that it looks up exchanged for this model alone.
    """
    forward = model.forward.__func__
    names = forward.__globals__
    if "_ChunkedLogProbFunction" not in forward.__code__.co_names:
        return
    ours = {
        "_ChunkedLogProbFunction": fused_head(names["_ChunkedLogProbFunction"]),
        "_use_triton": compacting(names["_use_triton"]),
    }
    changed = types.FunctionType(
        forward.__code__, {**names, **ours}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    changed.__kwdefaults__, changed.__wrapped__ = forward.__kwdefaults__, forward.__wrapped__  # type: ignore[attr-defined]
    model.forward = types.MethodType(changed, model)


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's trainer with all its arguments, and react_fast's fused head in policy and reference.

    A reference that accelerate wraps for mixed precision keeps TRL's head.

    Args:
        credit: how a completion's advantage is spread over its tokens, see `react_fast.tracker.credit`: "uniform",
            TRL's own; "attribution", by gradient x input of the completion's log-probability, one forward and
            backward; "causal", by what the reward functions give when the policy draws anew from a token on, see
            `trl_credit.Interventions`. Rows that were not measured keep uniform credit.
        credit_floor: share in [0, 1] that stays uniform.
        credit_interventions: completions of a batch, on every process, that are redrawn and scored again, at least
            1. Each costs the generation of a suffix, by temperature, top_k, top_p and min_p alone, and a call of
            the reward functions. A row takes about log2 of its length of them for each token that counts, one
            after the other, and one forward; rows go side by side as far as the number allows.
        tracker: a CausalityTracker; None: a new one.
    Raises: ValueError for another credit, for credit with images, for causal credit with tools, environments or a
        rollout_func, whose rewards hang on more than the text, or with sharded weights (FSDP, DeepSpeed), and for
        credit_interventions below 1.
    """

    def __init__(
        self,
        *args: Any,
        credit: str = "uniform",
        credit_floor: float = 0.5,
        credit_interventions: int = 16,
        tracker: CausalityTracker | None = None,
        **options: Any,
    ) -> None:
        if credit not in CREDITS:
            raise ValueError(f"credit must be one of {', '.join(CREDITS)}, got {credit!r}")
        super().__init__(*args, **options)
        for model in filter(None, (self.model, self.ref_model)):
            use_fused_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
        if credit == "causal":
            self._check_causal(credit_interventions)
        self.credit, self.credit_floor = credit, credit_floor
        self.tracker = tracker or CausalityTracker(self.model, self.processing_class)
        self.interventions = Interventions(self, credit_interventions, super()._calculate_rewards)

    def _check_causal(self, interventions: int) -> None:
        for refused, what in (
            (self.tools or self.environments is not None, "tools or environments"),
            (self.rollout_func is not None, "a rollout_func"),
            (self.is_fsdp_enabled or self.is_deepspeed_enabled, "FSDP or DeepSpeed"),
        ):
            if refused:
                raise ValueError(f"credit must be uniform or attribution with {what}, got causal")
        if interventions < 1:
            raise ValueError(f"credit_interventions must be at least 1, got {interventions}")

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.credit == "causal" and self.model.training:
            self.interventions.remember(inputs, prompts, completions, completion_ids_list, found)
        return found

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.credit == "uniform" or not self.model.training:
            return output
        if "pixel_values" in output:
            raise ValueError(f"credit must be uniform with images, got {self.credit}")
        mask = output["completion_mask"].bool()
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        spread = self._attributed if self.credit == "attribution" else self._caused
        output["advantages"] = spread(output, mask)
        return output

    def _attributed(self, output: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        rows = right_padded(output, mask)
        scores = self.tracker.score_batch(rows.ids, rows.seen, rows.actions).gather(1, rows.places)
        return attribution_credit(output["advantages"], scores, mask, floor=self.credit_floor)

    def _caused(self, output: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        effects = self.interventions.effects(output, mask)
        return causal_credit(output["advantages"], effects, mask, floor=self.credit_floor)
