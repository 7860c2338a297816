"""Environments of texts. They import nothing else of this package."""

from . import registry
from .conll import load_conll
from .gym_adapter import GymTextEnv
from .jsonl import load_jsonl
from .notes import TrainerState
from .record import Record
from .reward_functions import RewardError, RewardFunction, WeightedRewards, reward
from .reward_model import RewardModel
from .rules import Rules, rules_of, terminal, transition
from .slots import GroundTruth, ground_truth
from .spaces import UnicodeText
from .squad import load_squad
from .text_env import TextEnv
from .token_view import TokenView
from .tools import ToolCall, ToolEnv, tool_calls, tools_preface

__all__ = [
    "GroundTruth",
    "GymTextEnv",
    "Record",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "Rules",
    "TextEnv",
    "TokenView",
    "ToolCall",
    "ToolEnv",
    "TrainerState",
    "UnicodeText",
    "WeightedRewards",
    "ground_truth",
    "load_conll",
    "load_jsonl",
    "load_squad",
    "reward",
    "rules_of",
    "terminal",
    "tool_calls",
    "tools_preface",
    "transition",
]

registry.register()
