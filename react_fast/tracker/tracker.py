"""The causality tracker: what the policy's choices hang on, observed while it trains and tested by
interventions."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..ops import _check
from .actions import Actions, find_actions, unit_of
from .attribution import METHODS, Attribution, Method, Target, attribute
from .counterfactuals import Deletion, check_counterfactual
from .intervention import Effects, Experiment, check_spans, intervene
from .observation import Observation
from .outcomes import Outcome, check_outcome
from .policy import Policy
from .records import EffectRow, HeatMap
from .shapley import Shapley, shapley
from .step_values import StepValues, step_values
from .text import Ids, Span, Text, check_count, check_ids

# Numbers of a heat map's matrix, above which an example has one row for the whole response.
_MATRIX = 2**20


class CausalityTracker(Observation):
    """Accumulates attribution over training and measures effects of interventions.

    Args:
        model: Hugging Face causal LM, or a causal nn.Module with `model(ids [B, T]) -> logits [B, T, V]`
            whose token embedding is its only nn.Embedding.
        tokenizer: gives texts to tokens in records and reports; None: their numbers.
        attribution: what `attribute` computes unless told otherwise: "grad_x_input" | "saliency" |
            "integrated_gradients". What a training backward holds, and so `observe` reads, is gradient x input.
        interventions: the counterfactual that stands in an action's place; None: Deletion().
        every: of the training steps (or the calls of `observe`, if it is not told the step), one in `every`
            is observed.
        seed: of sampled responses and bootstraps.
        groups: names of what the caller tells apart, such as tasks, by `group_index` of `observe` and `group` of
            `intervene`.
        decay: in (0, 1]: what was seen k training steps ago weighs decay**k in means, intervals and key features.
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
        groups: Sequence[str] = (),
        decay: float = 1.0,
    ) -> None:
        super().__init__(Policy(model), tokenizer, every=every, groups=groups, decay=decay)
        self.attribution = _check.choice("attribution", attribution, METHODS)
        self.interventions = check_counterfactual(
            "interventions", Deletion() if interventions is None else interventions
        )
        self.seed = check_count("seed", seed, 0)

    # ---- one text ------------------------------------------------------------------------------------------

    def attribute(
        self,
        prompt_ids: Ids,
        response_ids: Ids,
        target: Target = "response",
        *,
        method: str | None = None,
        scorer: Any = None,
        layer: Any = None,
        baseline: int | None = None,
        steps: int = 50,
        inputs: str = "all",
    ) -> Attribution:
        """Attribution of an outcome to every token of prompt and response: sequence form, one forward and one
        backward (times `steps`), or matrix form, every response token against every token before it.

            grad_x_input: sum_d g_d x_d        saliency: sqrt(sum_d g_d^2)
            integrated_gradients: sum_d (x_d - x'_d) * mean of g_d on the straight way from the baseline x' to x

        with x the embedding output (or the layer's) and g the outcome's gradient there.

        Args:
            prompt_ids, response_ids: [P] and [R] token ids, at least one each.
            target: "response": log-probability of the response, scores [P + R]; "token": of each of its
                tokens, scores [R, P + R], row i exactly 0 from response token i on; or a function of the
                logits [P + R, V] with a scalar result, scores [P + R].
            method: one of the above; None: the tracker's `attribution`.
            scorer: another module on the same token ids, such as a differentiable reward or value model, in
                place of the policy: `scorer(ids [B, T])`, or its `logits`; `target` is then a function of one
                row of it.
            layer: module, or its name, with an output [B, T, D]; None: the token embedding.
            baseline: token id that x' embeds; None: the tokenizer's padding token, or the zero vector where there
                is none (models that begin with a norm then need many steps). For a layer, its output on that.
            steps: points of the Gauss-Legendre quadrature, at least 1.
            inputs: "all": every token starts at the baseline; "prompt": those of the prompt, and the response's
                own tokens get 0.
        Returns: Attribution; its `gap` says how far integrated gradients are from complete.
        Raises: TypeError, ValueError or IndexError in one line.
        Source: Simonyan et al. 2013 (arXiv:1312.6034), saliency; Shrikumar et al. 2016 (arXiv:1605.01713),
            gradient x input; Sundararajan et al. 2017 (arXiv:1703.01365), integrated gradients.
        """
        if baseline is None:
            baseline = getattr(self.tokenizer, "pad_token_id", None) if scorer is None else None
        else:
            check_ids("baseline", [baseline], self.policy.vocab_size)
        chosen = Method(self.attribution if method is None else method, layer, baseline, steps, inputs)
        policy = self.policy if scorer is None else Policy(scorer)
        if scorer is not None and not callable(target):
            raise ValueError(f"target must be a function of the scorer's output, got {target!r}")
        return attribute(policy, self._text(prompt_ids, response_ids), target, chosen)

    def intervene(
        self,
        prompt_ids: Ids,
        response_ids: Ids,
        actions: Actions = "token",
        outcome: Outcome = "logprob",
        samples: int | None = None,
        *,
        counterfactual: Any = None,
        interval: str = "student_t",
        correction: str = "benjamini_hochberg",
        max_new_tokens: int | None = None,
        max_tokens: int | None = None,
        turn_index: Sequence[int] | None = None,
        skip_special: bool = False,
        group: int | None = None,
        accumulate: bool | None = None,
    ) -> Effects:
        """Effect of every action: outcome as it is - outcome with the counterfactual in the action's place.

        Without `samples` the response is fixed. "logprob" is then the log-probability of the response tokens
        outside the action, and a function gets the response ids with and without the action.

        With `samples`, the policy continues n times behind the action (the whole prompt at least), where it
        is and where it is changed, under the same noise. "logprob" is then the log-probability of the
        continuation drawn with the action, before and after the change; a function gets the response so far
        and each side's own continuation. The effect is the mean of the n paired differences.

        Actions that would leave nothing to continue from are left out, or refused where their places were given.
        The effects may be accumulated too (see `accumulate`): by token, span of up to 16 tokens, position of
        the first token, kind, such as "prompt word", and group, at the last training step that `observe` was
        told.

        Args:
            prompt_ids, response_ids: [P] and [R] token ids, at least one each.
            actions: "token": each token of both; "word" ("span"), "sentence", "line", "step" (a reasoning step:
                paragraph, or line where there is only one): they need a tokenizer; "turn"; a compiled regular
                expression: each of its matches; or places (start, end) in prompt + response.
            outcome: "logprob" (nats); a function from response ids to a number, such as a reward or a `Return`;
                or a `TargetLogprob`.
            samples: None, or at least 2.
            counterfactual: Deletion(), Replacement(id), Resample(), DonorSwap(donors), or an object with a method
                replacement(tokens) -> tokens; None: the tracker's `interventions`.
            interval: "student_t" | "bootstrap" (expanded percentile, paired), both 95%.
            correction: "benjamini_hochberg" | "benjamini_yekutieli" (for any dependence), both at 5%.
            max_new_tokens: longest continuation; None: R.
            max_tokens: budget: most tokens that the policy may compute, counted as if there were no cache; fewer
                samples are taken where it is short.
            turn_index: [P + R] turn of every token, for actions "turn".
            skip_special: leave out the named actions that hold a special token of the tokenizer, such as a chat
                template's marks.
            group: number of the text's group, to accumulate by.
            accumulate: whether to; None: if they are effects on "logprob" of the fixed response, under the
                tracker's own counterfactual, as means over different quantities say nothing.
        Raises: TypeError, ValueError or IndexError in one line.
        """
        self._check_group(group)
        text = self._experiment(
            self._text(prompt_ids, response_ids),
            counterfactual,
            outcome,
            samples=samples,
            limit=max_new_tokens,
            interval=interval,
            correction=correction,
            max_tokens=max_tokens,
        )
        spans = self._spans(actions, text, turn_index, skip_special)
        effects = intervene(self.policy, text, spans)
        usual = isinstance(outcome, str) and samples is None and counterfactual is None
        if usual if accumulate is None else accumulate:
            self._accumulate(effects, unit_of(actions), group)
        return effects

    def step_values(
        self,
        prompt_ids: Ids,
        response_ids: Ids,
        outcome: Outcome,
        samples: int,
        *,
        actions: Actions = "step",
        interval: str = "student_t",
        correction: str = "benjamini_hochberg",
        max_response_tokens: int | None = None,
        turn_index: Sequence[int] | None = None,
    ) -> StepValues:
        """Monte-Carlo values: the policy continues n times from before and behind every step of the response.

        A step's effect, value behind - value before, is what it brings beyond what the policy would have done in
        its place: `intervene` with Resample, where the response may also end otherwise. It is an unbiased estimate
        of the step's advantage. S steps cost S + 1 states of n continuations each.

        Args:
            prompt_ids, response_ids: [P] and [R] token ids, at least one each.
            outcome: a function from response ids to a number, or a `TargetLogprob`.
            samples: at least 2.
            actions: as of `intervene`; those in the response must follow each other without a gap.
            interval, correction: as of `intervene`.
            max_response_tokens: longest response, at least R; None: R. A response that ended is not continued.
            turn_index: [P + R] turn of every token, for actions "turn".
        Raises: TypeError, ValueError or IndexError in one line.
        Source: Kazemnejad et al. 2024, VinePPO (arXiv:2410.01679).
        """
        text = self._text(prompt_ids, response_ids)
        size = len(text.ids) - text.prompt_length
        _refuse_logprob(outcome)
        limit = size if max_response_tokens is None else max_response_tokens
        experiment = self._experiment(
            text,
            None,
            outcome,
            samples=samples,
            limit=check_count("max_response_tokens", limit, size),
            interval=interval,
            correction=correction,
        )
        spans = [
            span for span in self._spans(actions, experiment, turn_index) if span[0] >= text.prompt_length
        ]
        if not spans or any(a[1] != b[0] for a, b in pairwise(spans)):
            raise ValueError(f"actions must be steps of the response without a gap, got {spans}")
        return step_values(self.policy, experiment, spans, check_count("samples", samples, 2))

    def shapley(
        self,
        prompt_ids: Ids,
        response_ids: Ids,
        outcome: Outcome,
        *,
        actions: Actions = "word",
        counterfactual: Any = None,
        samples: int = 64,
        turn_index: Sequence[int] | None = None,
    ) -> Shapley:
        """The outcome divided among the actions: the value of some of them is the outcome of the text in which the
        others are replaced. See `shapley_values`: exact up to 10 actions, sampled above.

        Args:
            prompt_ids, response_ids: [P] and [R] token ids, at least one each.
            outcome: a function from response ids to a number, or a `TargetLogprob`.
            actions: as of `intervene`; they must not overlap.
            counterfactual: as of `intervene`; of a random one, one draw for each action.
            samples: pairs of orders above 10 actions, at least 2.
            turn_index: [P + R] turn of every token, for actions "turn".
        Raises: TypeError, ValueError or IndexError in one line.
        """
        _refuse_logprob(outcome)
        text = self._experiment(
            self._text(prompt_ids, response_ids), counterfactual, outcome, samples=None, limit=None
        )
        return shapley(self.policy, text, self._spans(actions, text, turn_index), samples)

    # ---- findings ------------------------------------------------------------------------------------------

    def add_example(
        self,
        prompt_ids: Ids,
        response_ids: Ids,
        *,
        samples: int | None = None,
        title: str = "",
        actions: Actions = "token",
        method: str | None = None,
    ) -> tuple[HeatMap, list[EffectRow]]:
        """Keep a text's heat map (`attribute`) and the effects of its actions (`intervene`) for the report, which
        holds the newest 32.

        The heat map says what each response token hangs on (target "token"), or, for texts whose matrix would have
        more than a million numbers, what the whole response does.
        """
        size = len(prompt_ids) + len(response_ids)
        whole = len(response_ids) * size > _MATRIX
        found = self.attribute(prompt_ids, response_ids, "response" if whole else "token", method=method)
        effects = self.intervene(prompt_ids, response_ids, actions, samples=samples)
        texts = self.texts(found.token_ids)
        rows = () if whole else tuple(tuple(row) for row in found.scores.tolist())
        totals = tuple(found.scores.tolist()) if whole else ()
        cut = found.prompt_length
        heat_map = HeatMap(tuple(texts[:cut]), tuple(texts[cut:]), rows, title, totals)
        kept = effects.rows(texts, example=len(self.heat_maps))
        self.heat_maps.append(heat_map)
        self.effects += kept
        self._keep_newest()
        return heat_map, kept

    def explain(
        self,
        prompts: Sequence[str],
        responses: Sequence[str] | None = None,
        *,
        samples: int | None = None,
        max_new_tokens: int = 32,
        actions: Actions = "token",
        method: str | None = None,
        special_tokens: bool = True,
    ) -> None:
        """`add_example` for texts; responses that are not given are generated greedily. `special_tokens`: the
        tokenizer begins prompts with its own, which a chat template has written already."""
        if self.tokenizer is None:
            raise ValueError("tokenizer must be given to the tracker to explain texts, got None")
        if responses is not None and len(responses) != len(prompts):
            raise ValueError(f"responses must be {len(prompts)} like prompts, got {len(responses)}")
        for i, prompt in enumerate(prompts):
            ids = list(self.tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
            if responses is not None:
                response = list(self.tokenizer(responses[i], add_special_tokens=False)["input_ids"])
            else:
                response = self.policy.continuations(
                    [ids], streams=[0], limit=max_new_tokens, eos_id=self._eos_id, noise=None
                )[0]
            self.add_example(ids, response, samples=samples, title=prompt, actions=actions, method=method)

    def settings(self) -> dict[str, Any]:
        """What a report says about how it came about."""
        return {
            "model": type(self.policy.model).__name__,
            "attribution": self.attribution,
            "intervention": repr(self.interventions),
            "every": self.every,
            "decay": self.decay,
            "seed": self.seed,
        }

    # ---- inside --------------------------------------------------------------------------------------------

    @property
    def _eos_id(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None)

    def _experiment(
        self, text: Text, counterfactual: Any, outcome: Any, *, samples: Any, limit: Any, **options: Any
    ) -> Experiment:
        """The checked plan of an intervention on a text."""
        limit = len(text.ids) - text.prompt_length if limit is None else limit
        if options.get("max_tokens") is not None:
            check_count("max_tokens", options["max_tokens"], 1)
        chosen = self.interventions if counterfactual is None else counterfactual
        return Experiment(
            text.ids,
            text.prompt_length,
            check_counterfactual("counterfactual", chosen),
            check_outcome(outcome, self.policy.vocab_size),
            samples=None if samples is None else check_count("samples", samples, 2),
            seed=self.seed,
            limit=check_count("max_new_tokens", limit, 1),
            eos_id=self._eos_id,
            special_ids=frozenset(getattr(self.tokenizer, "all_special_ids", ())),
            **options,
        )

    def _spans(
        self, actions: Any, text: Experiment, turn_index: Sequence[int] | None, skip_special: bool = False
    ) -> list[Span]:
        texts = None if self.tokenizer is None else self.texts(text.ids)
        named = isinstance(actions, (str, re.Pattern))
        spans = find_actions(actions, text, texts, turn_index)
        if skip_special and named:
            spans = [span for span in spans if not text.is_special(span)]
        return check_spans(text, spans, drop=named)

    def _text(self, prompt_ids: Ids, response_ids: Ids) -> Text:
        prompt = check_ids("prompt_ids", prompt_ids, self.policy.vocab_size)
        response = check_ids("response_ids", response_ids, self.policy.vocab_size)
        return Text((*prompt, *response), len(prompt))


def _refuse_logprob(outcome: Outcome) -> None:
    if outcome == "logprob":
        raise ValueError("outcome must be a function of response ids or a TargetLogprob, got 'logprob'")
