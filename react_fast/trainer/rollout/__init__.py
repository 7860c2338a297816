"""Rollouts: engines that continue token sequences, and the episodes that are played with them."""

from .episodes import Episodes, answered
from .policy_engine import PolicyEngine
from .sampling import EngineError, RolloutEngine, Sample, SamplingParams
from .streams import key, permutation, uniforms
from .trajectory import Trajectory, demonstration, encode, state_id
from .truncation import choose

__all__ = [
    "EngineError",
    "Episodes",
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
    "permutation",
    "state_id",
    "uniforms",
]
