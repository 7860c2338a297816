"""Rollouts by transformers itself: `generate`, and its continuous batching."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from ...envs.calls import cause
from ..section import nearest
from .sampling import EngineError, Sample, SamplingParams, check_prompts, check_tokens
from .scoring_pass import score_samples
from .streams import key
from .truncation import floors_between, kept_floors

# Stream of the seeds that torch's own generator is given.
_GENERATE = 5
_WANTED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
# What sampling parameters and engines say themselves.
_OURS = {"max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams"}
_OURS |= {"num_return_sequences", "eos_token_id", "pad_token_id", *_WANTED}
_PAGE = 256  # tokens of a page of the cache, transformers' own default


class GenerateEngine:
    """Rollouts by `model.generate`, prompts padded on the left.

    The log-probabilities are those of the processed scores it sampled from. Its random numbers are keyed by seed,
    step, turn and the rows of a call together: unlike `PolicyEngine`'s, they depend on how rows are split into
    calls. It holds the scores [tokens, B, V] of a whole call.

    Args:
        model: Hugging Face causal LM. eos_id: token that ends an action, or None. pad_id: any valid token.
        options: more fields of `GenerationConfig`, such as {"repetition_penalty": 1.1}. With those that change
            logits otherwise than by temperature and truncation, the log-probabilities are still the sampler's, but
            not those that a trainer finds by scoring the sequence.
    Raises: EngineError in one line for an option that is no such field, that the sampling parameters or the engine
        say themselves, or that `generate` refuses.
    """

    def __init__(
        self, model: Any, *, eos_id: int | None, pad_id: int, options: Mapping[str, Any] | None = None
    ) -> None:
        check_tokens(eos_id, pad_id)
        self.model, self.eos_id, self.pad_id = model, eos_id, pad_id
        self.options = _checked(options)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        check_prompts(prompts, params, self.model)
        if not prompts:
            return []
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        padded = [[self.pad_id] * (width - len(p)) + list(p) for p in prompts]
        seen = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        keyed = seeded(params, len(prompts))
        with evaluating(self.model), without_defaults(self.model), keyed, _accepted(self.options):
            out = self.model.generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(seen, device=device),
                generation_config=generation_config(params, self.eos_id, self.pad_id, _WANTED | self.options),
            )
        tokens = out.sequences[:, width:].cpu()
        logprobs = torch.empty(tokens.shape)
        floors = torch.empty(tokens.shape)
        for t, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
            scores = scores.float()
            if params.greedy:  # it neither truncates nor divides by the temperature
                if params.truncated:
                    scores = scores.masked_fill(scores < kept_floors(scores, params)[:, None], -math.inf)
                scores = scores / params.temperature
            chosen = torch.log_softmax(scores, -1).gather(1, tokens[:, t : t + 1].to(device))
            logprobs[:, t] = chosen.squeeze(1)
            floors[:, t] = floors_between(logits, scores > -math.inf)
        truncated = bool((floors > -math.inf).any()) or params.truncated
        return [
            self._sample(*row, truncated)
            for row in zip(tokens.tolist(), logprobs.tolist(), floors.tolist(), strict=True)
        ]

    def _sample(self, ids: list[int], logprobs: list[float], floors: list[float], truncated: bool) -> Sample:
        ended = self.eos_id is not None and self.eos_id in ids
        length = ids.index(self.eos_id) + 1 if self.eos_id is not None and ended else len(ids)
        kept = floors[:length] if truncated else None
        return Sample(ids[:length], logprobs[:length], "stop" if ended else "length", logit_floors=kept)


class ContinuousBatchingEngine:
    """Rollouts by transformers' own continuous batching: no padding, and a finished row makes room for another.

    Token ids come back, with log-probabilities where this version of transformers returns them; else, and for the
    logit floors of a truncated sampler, a scoring pass over the finished sequences finds them (`Sample.scored`).
    Its random numbers depend on how requests happen to be scheduled.

    Args:
        model: Hugging Face causal LM. eos_id: token that ends an action, or None. pad_id: any valid token.
        options: more fields of `GenerationConfig`. batching: fields of `ContinuousBatchingConfig`.
    Raises: EngineError if this version of transformers has no continuous batching, and for options as above.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_id: int | None,
        pad_id: int,
        options: Mapping[str, Any] | None = None,
        batching: Mapping[str, Any] | None = None,
    ) -> None:
        if not hasattr(model, "generate_batch"):
            raise EngineError(
                f"{type(model).__name__} has no generate_batch: continuous batching needs a newer transformers"
            )
        check_tokens(eos_id, pad_id)
        self.model, self.eos_id, self.pad_id = model, eos_id, pad_id
        self.options, self.batching = _checked(options), dict(batching or {})

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        check_prompts(prompts, params, self.model)
        if not prompts:
            return []
        if params.min_p > 0:
            raise ValueError(f"min_p must be 0, continuous batching does not know it, got {params.min_p:g}")
        with evaluating(self.model), seeded(params, len(prompts)), _accepted(self.options):
            found = self.model.generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=generation_config(
                    params, self.eos_id, self.pad_id, {"min_p": None} | self.options
                ),
                warmup=False,
                **self._batching(prompts, params),
            )
        outputs = list(found.values())
        failed = [out.error for out in outputs if out.error is not None]
        if failed or len(outputs) != len(prompts):
            reason = failed[0] if failed else "its thread ended early"
            missing = len(prompts) - len(outputs) + len(failed)
            raise EngineError(f"continuous batching lost {missing} of {len(prompts)} prompts: {reason}")
        samples = [self._sample(out, params) for out in outputs]
        if params.truncated or any(sample.scored for sample in samples):
            score_samples(self.model, prompts, samples, params, self.pad_id)
        return samples

    def _batching(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> dict[str, Any]:
        """Arguments of `generate_batch` beside the generation's own."""
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError:
            return {}
        ours = {
            "return_logprobs": True,
            "seed": _seed(params, len(prompts)),
            "auto_switch_to_flash": False,
        }
        if next(self.model.parameters()).device.type == "cpu":
            # Left alone it fills most of the machine's memory with its cache, which takes a minute.
            pages = [-(-(len(prompt) + params.max_new_tokens) // _PAGE) + 1 for prompt in prompts]
            ours |= {"page_size": _PAGE, "num_blocks": sum(pages), "max_batch_tokens": _PAGE * len(prompts)}
        fields = inspect.signature(ContinuousBatchingConfig).parameters
        known = {name: value for name, value in ours.items() if name in fields}
        return {"continuous_batching_config": ContinuousBatchingConfig(**{**known, **self.batching})}

    def _sample(self, out: Any, params: SamplingParams) -> Sample:
        ids = list(out.generated_tokens)[: params.max_new_tokens]
        logprobs = list(getattr(out, "logprobs", []))[: len(ids)]
        # A greedy search neither truncates nor divides by the temperature.
        known = len(logprobs) == len(ids)
        known = known and not (params.greedy and (params.truncated or params.temperature != 1))
        reason = "stop" if ids[-1:] == [self.eos_id] else "length"
        return Sample(ids, logprobs if known else [math.nan] * len(ids), reason, scored=not known)


def generation_config(
    params: SamplingParams, eos_id: int | None, pad_id: int, options: Mapping[str, Any]
) -> GenerationConfig:
    """What `params` and `options` say."""
    fields: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "do_sample": not params.greedy,
        "num_beams": 1,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "repetition_penalty": 1.0,
    }
    if not params.greedy:
        fields |= {
            "temperature": params.temperature,
            "top_k": params.top_k or 0,
            "top_p": params.top_p,
            "min_p": params.min_p,
        }
    return GenerationConfig(**{**fields, **options})


def _checked(options: Mapping[str, Any] | None) -> dict[str, Any]:
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in options or {}:
        if name in _OURS:
            raise EngineError(
                f"generation_options must leave {name} to the sampling parameters and the engine"
            )
        if name not in known:
            near = nearest(str(name), known)
            hint = f"; did you mean {near}?" if near else ""
            raise EngineError(f"generation_options must hold fields of GenerationConfig, got {name!r}{hint}")
    return dict(options or {})


@contextmanager
def _accepted(options: Mapping[str, Any]) -> Iterator[None]:
    """What transformers says against options, in one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not options:
            raise
        raise EngineError(f"generation_options {dict(options)} are refused: {cause(error)}") from error


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout, then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def without_defaults(model: Any) -> Iterator[None]:
    """The model without what its checkpoint's generation_config.json says, then with it again."""
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    kept = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config


@contextmanager
def seeded(params: SamplingParams, count: int) -> Iterator[None]:
    """torch's generators keyed by what is sampled, then as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(_seed(params, count))
        yield


def _seed(params: SamplingParams, count: int) -> int:
    rows = params.rows if params.rows is not None else range(count)
    return key(params.seed, _GENERATE, params.step, params.turn, *rows)
