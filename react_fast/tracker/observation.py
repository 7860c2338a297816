"""What a tracker reads from the training's own backward, at no pass of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..ops import _check
from ..ops.attribution import attribution_scores
from .accumulation import Accumulation
from .attribution import batch_scores
from .features import Labels, action_kind
from .policy import Policy
from .text import before_last, check_count, check_rectangle


class Observation(Accumulation):
    """The part of a CausalityTracker that observes training.

    Attributes:
        every: of the training steps one in `every` is observed.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        *,
        every: int = 1,
        groups: Sequence[str] = (),
        decay: float = 1.0,
    ) -> None:
        super().__init__(policy, tokenizer, groups=groups, decay=decay)
        self.every = check_count("every", every, 1)

    @contextmanager
    def observe(
        self,
        input_ids: torch.Tensor,
        action_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        step: int | None = None,
        group_index: torch.Tensor | None = None,
        late: bool = False,
    ) -> Iterator[None]:
        """Around forward and backward of one training micro-batch: reads the gradient that the backward
        computes anyway and accumulates gradient x input by token, pair of neighbouring tokens, position, kind
        (prompt, response, special token) and group, and over training.

        The outcome is -loss, so a token with a positive score raises the objective. Counted are the tokens
        before a row's last action; those behind it influence nothing. Scores that are not finite are left
        out.

        Args:
            input_ids: [B, T] integer, as the model gets them, inside.
            action_mask: [B, T] bool or 0/1 integers, true where the token is an action.
            attention_mask: [B, T] bool or 0/1 integers, for padding on the left; positions count from a row's
                first true. None: sequences begin at column 0.
            step: of the training, for `every`, decay and drift; None: the number of this call.
            group_index: [B] integer in [0, groups), of every row; None: of none.
            late: the backward comes after this context, if at all.
        Raises: TypeError or ValueError for bad input; RuntimeError at the end if no gradient reached the
            embedding and it is not late, or if its output was changed in place.
        """
        _check.integer("input_ids", input_ids)
        check_rectangle("input_ids", input_ids)
        counted = before_last(
            _check.mask("action_mask", action_mask, input_ids.shape, "input_ids", input_ids.device)
        )
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is not None:
            seen = _check.mask(
                "attention_mask", attention_mask, input_ids.shape, "input_ids", input_ids.device
            )
            counted = counted & seen
            positions = (seen.cumsum(1) - 1).clamp_min(0)
        groups = None if group_index is None else self._group_index(group_index, input_ids)
        number = self.calls if step is None else check_count("step", step, 0)
        self.calls += 1
        self._at(number)
        if number % self.every:
            yield
            return
        self.observed.reach(input_ids.shape[1])

        def record(grad: torch.Tensor, activation: torch.Tensor) -> None:
            scores = -attribution_scores(grad, activation)
            finite = counted & scores.isfinite()
            self._observe(number, scores, input_ids.long(), finite, positions, action_mask.bool(), groups)

        with self.policy.watched(input_ids, record, late):
            yield

    def score_batch(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, action_mask: torch.Tensor
    ) -> torch.Tensor:
        """Attribution of a row's log-probability of all its actions to each of its tokens; for credit.

        One forward and one backward in evaluation mode; the parameters' gradients stay as they are.

        Args:
            input_ids: [B, T] integer. attention_mask: [B, T], padding on the right, or None for none.
            action_mask: [B, T] bool or 0/1 integers; never true in column 0, which nothing precedes.
        Returns: [B, T] float32 (float64 for a float64 policy).
        """
        _check.integer("input_ids", input_ids)
        check_rectangle("input_ids", input_ids)
        actions = _check.mask("action_mask", action_mask, input_ids.shape, "input_ids", input_ids.device)
        if attention_mask is not None:
            _check.mask("attention_mask", attention_mask, input_ids.shape, "input_ids", input_ids.device)
        return batch_scores(self.policy, input_ids, attention_mask, actions)

    # ---- inside --------------------------------------------------------------------------------------------

    def _observe(
        self,
        step: int,
        scores: torch.Tensor,
        ids: torch.Tensor,
        counted: torch.Tensor,
        positions: torch.Tensor,
        response: torch.Tensor,
        groups: torch.Tensor | None,
    ) -> None:
        """Accumulate scores [B, T]."""
        kinds = action_kind("token", self._sides(ids, response))
        position, kind, token = (x.reshape(-1) for x in (positions, kinds, ids))
        told = Labels(position, kind, token, None if groups is None else groups.reshape(-1))
        self.observed.update(step, scores.reshape(-1), counted.reshape(-1), told)
        pairs = scores[:, 1:] + scores[:, :-1], self.observed.pair_keys(ids), counted[:, 1:] & counted[:, :-1]
        self.observed.update_spans(step, *(part.reshape(-1) for part in pairs))

    def _group_index(self, group_index: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] group of every token."""
        _check.integer("group_index", group_index)
        _check.shape("group_index", group_index, input_ids.shape[:1], "input_ids[:, 0]")
        _check.device("group_index", group_index, input_ids.device, "input_ids")
        if group_index.device.type == "cpu" and len(group_index):
            wrong = group_index[(group_index < 0) | (group_index >= len(self.groups))]
            if len(wrong):
                raise IndexError(f"group_index must be in [0, {len(self.groups)}), got {int(wrong[0])}")
        return group_index.long()[:, None].expand_as(input_ids)
