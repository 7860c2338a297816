"""Rollouts: engines that continue token sequences, and the episodes that are played with them."""

from typing import TYPE_CHECKING, Any

from .engines import make_engine
from .episodes import EpisodeError, Episodes, answered
from .openai_engine import OpenAIEngine
from .policy_engine import PolicyEngine
from .sampling import EngineError, RolloutEngine, Sample, SamplingParams, sampling_params
from .streams import key, permutation, uniforms
from .trajectory import Trajectory, demonstration, encode, opening, pad_token, retokenised, state_id
from .truncation import choose

if TYPE_CHECKING:
    from .generate_engine import ContinuousBatchingEngine, GenerateEngine

__all__ = [
    "ContinuousBatchingEngine",
    "EngineError",
    "EpisodeError",
    "Episodes",
    "GenerateEngine",
    "OpenAIEngine",
    "PolicyEngine",
    "RolloutEngine",
    "Sample",
    "SamplingParams",
    "Trajectory",
    "answered",
    "choose",
    "demonstration",
    "encode",
    "key",
    "make_engine",
    "opening",
    "pad_token",
    "permutation",
    "retokenised",
    "sampling_params",
    "state_id",
    "uniforms",
]


def __getattr__(name: str) -> Any:
    """transformers' engines, when they are asked for: transformers takes seconds to import."""
    if name in ("ContinuousBatchingEngine", "GenerateEngine"):
        from . import generate_engine

        return getattr(generate_engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
