"""Rollouts: engines that continue token sequences, and the episodes that are played with them."""

from .engines import make_engine, synchronise
from .episodes import Episodes, answered
from .policy_engine import PolicyEngine
from .sampling import EngineError, RolloutEngine, Sample, SamplingParams, sampling_params
from .streams import key, permutation, uniforms
from .trajectory import Trajectory, demonstration, encode, retokenised, state_id
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
    "make_engine",
    "permutation",
    "retokenised",
    "sampling_params",
    "state_id",
    "synchronise",
    "uniforms",
]
