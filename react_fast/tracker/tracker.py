"""The causality tracker: what the policy's choices hang on, observed while it trains and tested by
interventions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from ..ops import _check
from ..ops.attribution import attribution_scores
from ..ops.moments import RunningMoments
from .attribution import Attribution, Target, attribute, batch_scores
from .findings import key_tokens, position_means
from .intervention import Deletion, Effects, Experiment, Outcome, intervene
from .policy import Policy
from .records import EffectRow, HeatMap, KeyToken, PositionMean
from .text import Ids, Span, Text, check_count, check_ids

METHODS = ("grad_x_input",)
KINDS = ("attribution", "effect")
_MOMENTS = ("by_token", "by_position", "effects_by_token")


class CausalityTracker:
    """Accumulates attribution over training and measures effects of interventions.

    Args:
        model: Hugging Face causal LM, or a causal nn.Module with `model(ids [B, T]) -> logits [B, T, V]`
            whose token embedding is its only nn.Embedding.
        tokenizer: gives texts to tokens in records and reports; None: their numbers.
        attribution: "grad_x_input": gradient of the outcome at the embedding output times the embedding.
        interventions: what an intervention does to an action; None: Deletion().
        every: of the training steps (or the calls of `observe`, if it is not told the step), one in `every`
            is observed.
        seed: of sampled responses and bootstraps.
    Raises: TypeError or ValueError in one line.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        attribution: str = "grad_x_input",
        interventions: Any = None,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        self.policy = Policy(model)
        self.tokenizer = tokenizer
        self.attribution = _check.choice("attribution", attribution, METHODS)
        self.interventions = Deletion() if interventions is None else interventions
        if not hasattr(self.interventions, "replacement"):
            raise TypeError(f"interventions must have a method replacement(tokens), got {interventions!r}")
        self.every = check_count("every", every, 1)
        self.seed = check_count("seed", seed, 0)
        self.calls = 0
        self.by_token = RunningMoments(self.policy.vocab_size, self.policy.device)
        self.by_position = RunningMoments(1, self.policy.device)
        self.effects_by_token = RunningMoments(self.policy.vocab_size, self.policy.device)
        self.heat_maps: list[HeatMap] = []
        self.effects: list[EffectRow] = []

    # ---- training ------------------------------------------------------------------------------------------

    @contextmanager
    def observe(
        self,
        input_ids: torch.Tensor,
        action_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        step: int | None = None,
    ) -> Iterator[None]:
        """Around forward and backward of one training micro-batch: reads the gradient that the backward
        computes anyway and accumulates gradient x input by token and by position.

        The outcome is -loss, so a token with a positive score raises the objective. Counted are the tokens
        before a row's last action; those behind it influence nothing. Scores that are not finite are left
        out.

        Args:
            input_ids: [B, T] integer, as the model gets them, inside.
            action_mask: [B, T] bool or 0/1 integers, true where the token is an action.
            attention_mask: [B, T] bool or 0/1 integers, for padding on the left; positions count from a row's
                first true. None: sequences begin at column 0.
            step: of the training, to choose by `every`; None: the number of this call.
        Raises: TypeError or ValueError for bad input; RuntimeError at the end if no gradient reached the
            embedding, or if its output was changed in place.
        """
        _check.integer("input_ids", input_ids)
        _rectangle("input_ids", input_ids)
        counted = _before_last(
            _check.mask("action_mask", action_mask, input_ids.shape, "input_ids", input_ids.device)
        )
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is not None:
            seen = _check.mask(
                "attention_mask", attention_mask, input_ids.shape, "input_ids", input_ids.device
            )
            counted = counted & seen
            positions = (seen.cumsum(1) - 1).clamp_min(0)
        number = self.calls if step is None else check_count("step", step, 0)
        self.calls += 1
        if number % self.every:
            yield
            return
        self._reach(input_ids.shape[1])

        def record(grad: torch.Tensor, activation: torch.Tensor) -> None:
            scores = -attribution_scores(grad, activation)
            finite = counted & scores.isfinite()
            self.by_token.update(scores, input_ids, mask=finite)
            self.by_position.update(scores, positions, mask=finite)

        with self.policy.watched(input_ids, record):
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
        _rectangle("input_ids", input_ids)
        actions = _check.mask("action_mask", action_mask, input_ids.shape, "input_ids", input_ids.device)
        if attention_mask is not None:
            _check.mask("attention_mask", attention_mask, input_ids.shape, "input_ids", input_ids.device)
        return batch_scores(self.policy, input_ids, attention_mask, actions)

    # ---- one text ------------------------------------------------------------------------------------------

    def attribute(self, prompt_ids: Ids, response_ids: Ids, target: Target = "response") -> Attribution:
        """Gradient x input of an outcome at every token of prompt and response.

        Args:
            prompt_ids, response_ids: [P] and [R] token ids, at least one each.
            target: "response": log-probability of the response, scores [P + R]; "token": of each of its
                tokens, scores [R, P + R], row i exactly 0 from response token i on; or a function of the
                logits [P + R, V] with a scalar result, scores [P + R].
        Raises: TypeError, ValueError or IndexError in one line.
        """
        return attribute(self.policy, self._text(prompt_ids, response_ids), target)

    def intervene(
        self,
        prompt_ids: Ids,
        response_ids: Ids,
        actions: str | Sequence[Span] = "token",
        outcome: Outcome = "logprob",
        samples: int | None = None,
        *,
        interval: str = "student_t",
        max_new_tokens: int | None = None,
    ) -> Effects:
        """Effect of every action: outcome as it is - outcome with the action deleted.

        Without `samples` the response is fixed. "logprob" is then the log-probability of the response tokens
        outside the action, and a function gets the response ids with and without the action.

        With `samples`, the policy continues n times behind the action (the whole prompt at least), where it
        is and where it is deleted, under the same noise. "logprob" is then the log-probability of the
        continuation drawn with the action, before and after its deletion; a function gets the response so far
        and each side's own continuation. The effect is the mean of the n paired differences.

        Effects of single tokens on "logprob" are also accumulated into `effects_by_token`.

        Args:
            prompt_ids, response_ids: [P] and [R] token ids, at least one each.
            actions: "token": each token of both; "span": each word (needs a tokenizer); or places (start,
                end) in prompt + response.
            outcome: "logprob" (nats), or a function from response ids to a number, such as a reward.
            samples: None, or at least 2.
            interval: "student_t" | "bootstrap" (percentile), both 95%.
            max_new_tokens: longest continuation; None: R.
        Raises: TypeError, ValueError or IndexError in one line.
        """
        text = self._text(prompt_ids, response_ids)
        limit = len(text.ids) - text.prompt_length if max_new_tokens is None else max_new_tokens
        effects = intervene(
            self.policy,
            Experiment(text.ids, text.prompt_length, self.interventions),
            actions,
            outcome,
            texts=None if self.tokenizer is None else self.texts(text.ids),
            samples=None if samples is None else check_count("samples", samples, 2),
            interval=interval,
            seed=self.seed,
            limit=check_count("max_new_tokens", limit, 1),
            eos_id=self._eos_id,
        )
        if outcome == "logprob":
            self._accumulate(effects)
        return effects

    # ---- findings ------------------------------------------------------------------------------------------

    def key_tokens(self, k: int = 20, *, kind: str = "attribution", min_count: int = 5) -> list[KeyToken]:
        """The k tokens whose 95% interval of the mean is farthest from 0, the most telling first.

        Args:
            k: most rows.
            kind: "attribution" (of `observe`) or "effect" (of `intervene`).
            min_count: observations a token needs, at least 2.
        """
        _check.choice("kind", kind, KINDS)
        moments = self.by_token if kind == "attribution" else self.effects_by_token
        limits = check_count("k", k, 0), check_count("min_count", min_count, 2)
        return key_tokens(moments, kind, *limits, text=lambda token_id: self.texts([token_id])[0])

    def positions(self, *, min_count: int = 2) -> list[PositionMean]:
        """Mean attribution at every position of the sequence with at least `min_count` observations."""
        return position_means(self.by_position, check_count("min_count", min_count, 2))

    def add_example(
        self, prompt_ids: Ids, response_ids: Ids, *, samples: int | None = None, title: str = ""
    ) -> tuple[HeatMap, list[EffectRow]]:
        """Keep a text's heat map (`attribute`, target "token") and its tokens' effects (`intervene`) for the
        report."""
        found = self.attribute(prompt_ids, response_ids, "token")
        effects = self.intervene(prompt_ids, response_ids, samples=samples)
        texts = self.texts(found.token_ids)
        size = found.prompt_length
        scores = tuple(tuple(row) for row in found.scores.tolist())
        heat_map = HeatMap(tuple(texts[:size]), tuple(texts[size:]), scores, title)
        rows = effects.rows(texts, example=len(self.heat_maps))
        self.heat_maps.append(heat_map)
        self.effects += rows
        return heat_map, rows

    def explain(
        self,
        prompts: Sequence[str],
        responses: Sequence[str] | None = None,
        *,
        samples: int | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        """`add_example` for texts; responses that are not given are generated greedily."""
        if self.tokenizer is None:
            raise ValueError("tokenizer must be given to the tracker to explain texts, got None")
        if responses is not None and len(responses) != len(prompts):
            raise ValueError(f"responses must be {len(prompts)} like prompts, got {len(responses)}")
        for i, prompt in enumerate(prompts):
            ids = list(self.tokenizer(prompt)["input_ids"])
            if responses is not None:
                response = list(self.tokenizer(responses[i], add_special_tokens=False)["input_ids"])
            else:
                response = self.policy.continuations(
                    [ids], streams=[0], limit=max_new_tokens, eos_id=self._eos_id, noise=None
                )[0]
            self.add_example(ids, response, samples=samples, title=prompt)

    def findings(self, k: int = 50) -> dict[str, Any]:
        """What the report shows: the arguments of `CausalityReport`."""
        observed, tested = self.key_tokens(k), self.key_tokens(k, kind="effect", min_count=2)
        return {
            "key_tokens": observed + tested,
            "by_position": self.positions(),
            "heat_maps": list(self.heat_maps),
            "effects": list(self.effects),
            "meta": {
                "model": type(self.policy.model).__name__,
                "attribution": self.attribution,
                "intervention": repr(self.interventions),
                "every": self.every,
                "seed": self.seed,
                "observed_calls": self.calls,
                "observed_tokens": int(self.by_token.count.sum()),
                "interventions": int(self.effects_by_token.count.sum()),
            },
        }

    def report(self) -> Any:
        """The findings as a CausalityReport: .to_html(path), .to_json(path), ..."""
        from .report import CausalityReport

        return CausalityReport(**self.findings())

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything found so far: tensors and plain JSON values."""
        return {
            "calls": self.calls,
            **{name: getattr(self, name).state_dict() for name in _MOMENTS},
            "heat_maps": [asdict(heat_map) for heat_map in self.heat_maps],
            "effects": [asdict(row) for row in self.effects],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a `state_dict`.

        Raises: ValueError if it is of a policy with another vocabulary, or something else.
        """
        missing = [name for name in ("calls", *_MOMENTS, "heat_maps", "effects") if name not in state]
        if missing:
            raise ValueError(f"state must be a tracker's state_dict, got one without {missing[0]!r}")
        size = _size(state["by_token"])
        if size != self.policy.vocab_size:
            raise ValueError(f"state must be of {self.policy.vocab_size} tokens like the policy, got {size}")
        self.by_position = RunningMoments(_size(state["by_position"]), self.policy.device)
        for name in _MOMENTS:
            getattr(self, name).load_state_dict(state[name])
        self.calls = int(state["calls"])
        self.heat_maps = [HeatMap.from_dict(values) for values in state["heat_maps"]]
        self.effects = [EffectRow.from_dict(values) for values in state["effects"]]

    def merge(self, other: "CausalityTracker") -> None:
        """Add what another tracker of the same vocabulary found, as if this one had seen both.

        Raises: TypeError for something else, ValueError for another vocabulary.
        """
        if not isinstance(other, CausalityTracker):
            raise TypeError(f"other must be a CausalityTracker, got {type(other).__name__}")
        if other.policy.vocab_size != self.policy.vocab_size:
            raise ValueError(
                f"other must have {self.policy.vocab_size} tokens, got {other.policy.vocab_size}"
            )
        self._reach(other._length)
        self.by_token.merge(other.by_token)
        self.effects_by_token.merge(other.effects_by_token)
        self.by_position.merge(_resized(other.by_position, self._length, self.policy.device))
        shift = len(self.heat_maps)
        self.calls += other.calls
        self.heat_maps += other.heat_maps
        self.effects += [replace(row, example=row.example + shift) for row in other.effects]

    # ---- inside --------------------------------------------------------------------------------------------

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Text of every token on its own; its number without a tokenizer."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        return [self.tokenizer.decode([i]) for i in ids]

    @property
    def _eos_id(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None)

    @property
    def _length(self) -> int:
        return _size(self.by_position.state_dict())

    def _reach(self, length: int) -> None:
        """Room for sequences of this length, doubled so that it is seldom needed."""
        if length > self._length:
            self.by_position = _resized(self.by_position, max(length, 2 * self._length), self.policy.device)

    def _accumulate(self, effects: Effects) -> None:
        single = [i for i, (start, end) in enumerate(effects.spans) if end - start == 1]
        ids = torch.tensor([effects.token_ids[effects.spans[i][0]] for i in single], dtype=torch.int64)
        self.effects_by_token.update(effects.mean[single].to(self.policy.device), ids.to(self.policy.device))

    def _text(self, prompt_ids: Ids, response_ids: Ids) -> Text:
        prompt = check_ids("prompt_ids", prompt_ids, self.policy.vocab_size)
        response = check_ids("response_ids", response_ids, self.policy.vocab_size)
        return Text((*prompt, *response), len(prompt))


def _before_last(actions: torch.Tensor) -> torch.Tensor:
    """[B, T] true where an action comes later in the row."""
    count = actions.cumsum(1)
    return count < count[:, -1:]


def _resized(moments: RunningMoments, size: int, device: torch.device) -> RunningMoments:
    """The same moments with room for `size` ids."""
    state = moments.state_dict()
    longer = RunningMoments(size, device)
    room = longer.state_dict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            room[name] = torch.cat([value.to(device), value.new_zeros(size - len(value), device=device)])
    longer.load_state_dict(room)
    return longer


def _size(state: dict[str, Any]) -> int:
    return len(state["count"])


def _rectangle(name: str, value: torch.Tensor) -> None:
    if value.dim() != 2:
        raise ValueError(f"{name} must be [B, T], got {list(value.shape)}")
