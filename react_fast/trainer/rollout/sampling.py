"""What is asked of a rollout engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

_WHOLE = ("max_new_tokens", "seed", "step", "turn", "top_k")
_REAL = ("temperature", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingParams:
    """How actions are sampled. Row r of a call draws from the stream (seed, step, turn, rows[r]), so a sample
    of `PolicyEngine` does not depend on how the rows are split into calls.

    top_k, top_p and min_p keep, one after the other and each among what is left, the k most probable tokens, the
    fewest most probable ones whose mass reaches top_p, and those at least min_p times as probable as the most
    probable one; tokens that tie with the last one stay, and what is kept is renormalised.

    Args:
        max_new_tokens: longest action, at least 1.
        temperature: in [1e-30, 1e30]; the limit 0 is `greedy`. It acts before the truncation.
        greedy: the most probable token each time.
        seed, step, turn: in [0, 2^63). rows: one such number for each prompt; None: 0, 1, 2, ...
        skip: draws at the start of each row's stream that are left out, as those of tokens which stand in the
            prompt already; None: none. Engines whose draws cannot be named (`PolicyEngine`'s can) ignore it.
        top_k: at least 1; None: all. top_p: in (0, 1]; 1: all. min_p: in [0, 1]; 0: all.
    Raises: ValueError for a number out of range, TypeError for what is none, or no whole one.
    """

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0
    step: int = 0
    turn: int = 0
    rows: Sequence[int] | None = None
    skip: Sequence[int] | None = None
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for names, kind, wanted in ((_WHOLE, Integral, "an integer"), (_REAL, Real, "a number")):
            for name in names:
                value = getattr(self, name)
                known = isinstance(value, kind) and not isinstance(value, bool)
                if not known and (name, value) != ("top_k", None):
                    raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        if not isinstance(self.greedy, bool):
            raise TypeError(f"greedy must be True or False, got {type(self.greedy).__name__}")
        for name in ("seed", "step", "turn"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"{name} must be in [0, 2^63), got {getattr(self, name)}")
        for name in ("rows", "skip"):
            for value in getattr(self, name) or ():
                if not isinstance(value, Integral) or isinstance(value, bool):
                    raise TypeError(f"{name} must hold integers, got {type(value).__name__}")
                if not 0 <= int(value) < 1 << 63:
                    raise ValueError(f"{name} must be in [0, 2^63), got {value}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 1e-30 <= self.temperature <= 1e30:
            raise ValueError(
                f"temperature must be in [1e-30, 1e+30] (greedy=True is the limit 0), got {self.temperature:g}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p:g}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p:g}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens may be left out."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


def sampling_params(config: Any, **changes: Any) -> SamplingParams:
    """How a trainer's configuration samples its rollouts; `changes` are further fields."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    return SamplingParams(**{name: getattr(config, name) for name in names} | changes)


@dataclass
class Sample:
    """One generated action.

    Attributes:
        ids: generated token ids, the end token included.
        logprobs: log-probability of each under the sampler (its temperature and truncation included), in nats;
            NaN where the engine does not know it.
        finish_reason: "stop" (end token) or "length".
        exact_tokens: false if the engine returned text that had to be tokenised again.
        logit_floors: for each token the `logit_floor` of `token_logprobs` that keeps what the sampler kept; None
            if it kept everything.
        scored: the log-probabilities come from a pass over the finished sequence, not from the sampler.
        drifted: the text that came back, or that of the prompt, does not give the same tokens again.
        weights_version: number of the weights that the engine sampled with; None: those of the policy.
    Raises: ValueError for log-probabilities of another number than ids, and for another finish_reason.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    exact_tokens: bool = True
    logit_floors: list[float] | None = None
    scored: bool = False
    drifted: bool = False
    weights_version: int | None = None

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.ids):
            raise ValueError(f"logprobs must be {len(self.ids)} like ids, got {len(self.logprobs)}")
        if self.finish_reason not in ("stop", "length"):
            raise ValueError(f"finish_reason must be 'stop' or 'length', got {self.finish_reason!r}")


class RolloutEngine(Protocol):
    """Anything that continues token sequences: the policy itself, or a server that holds a copy of it.

    An engine that holds a copy has `version`, the number of the weights it samples with, and
    `sync_weights(model, version, weights)`, which gives it those of now: the model's, or `weights` by name where
    the model holds shards of them. One process calls it; the engines of the others are told the version.
    """

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]: ...


class EngineError(RuntimeError):
    """A rollout engine could not do what it was asked, in one line."""


def check_tokens(eos_id: Any, pad_id: Any) -> None:
    """Raises: TypeError for an `eos_id` that is neither an integer nor None, such as a checkpoint's list, and for
    a `pad_id` that is no integer."""
    for name, value, none in (("eos_id", eos_id, " or None"), ("pad_id", pad_id, "")):
        known = isinstance(value, Integral) and not isinstance(value, bool)
        if not known and not (none and value is None):
            raise TypeError(f"{name} must be one token{none}, got {value!r:.40}")


def check_prompts(prompts: Sequence[Sequence[int]], params: SamplingParams, model: Any = None) -> None:
    """Raises: ValueError for a prompt without tokens and for `params.rows` of another number; EngineError for what
    may grow longer than the table of positions of a Hugging Face `model`, if it has one."""
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts must hold at least one token each, got an empty one")
    if params.rows is not None and len(params.rows) != len(prompts):
        raise ValueError(f"rows must be {len(prompts)} like prompts, got {len(params.rows)}")
    if params.skip is not None and len(params.skip) != len(prompts):
        raise ValueError(f"skip must be {len(prompts)} like prompts, got {len(params.skip)}")
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if isinstance(positions, int) and longest + params.max_new_tokens > positions and not _rotates(model):
        raise EngineError(
            f"max_new_tokens must be at most {positions - longest} behind a prompt of {longest} tokens in a model "
            f"with {positions} positions, got {params.max_new_tokens}"
        )


def _rotates(model: Any) -> bool:
    """Whether positions are rotations without a table, which have no end."""
    return any("rope" in name for name in vars(model.config))
