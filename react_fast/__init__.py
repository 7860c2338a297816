"""react_fast: reinforcement learning for action and causality tracking, on a compiled core."""

import importlib as _importlib
from typing import Any as _Any

from . import presets, reference
from .ops import recipes
from .ops.advantage import discounted_returns, gae, reverse_linear_scan, td_lambda_returns
from .ops.attribution import attribution_scores, segment_sum
from .ops.backend import get_backend, set_backend, use_backend
from .ops.group_advantages import group_advantages
from .ops.importance_weights import high_entropy_mask, importance_weights, off_policy_mask
from .ops.kl_rewards import kl_rewards
from .ops.linear_logprob import linear_token_logprobs
from .ops.linear_policy_loss import linear_policy_loss
from .ops.logprob import token_logprobs
from .ops.moments import RunningMoments
from .ops.off_policy import retrace, vtrace
from .ops.policy_loss import PolicyLoss, policy_loss, value_loss
from .ops.q_learning import (
    double_q_values,
    expected_q_values,
    guided_logits,
    max_q_values,
    n_step_returns,
    path_consistency,
    q_targets,
    soft_values,
)
from .ops.q_loss import QLoss, cql_loss, expectile_loss, ilql_loss, q_loss
from .ops.sum_tree import SumTree
from .ops.target_network import TargetUpdate, polyak_update
from .ops.whiten import merge_moments, moments, whiten
from .reference.objectives import (
    CISPO,
    DRO,
    GMPO,
    GSPO,
    LUSPO,
    SAPO,
    VESPO,
    ClipCov,
    DPPOBinaryKL,
    DPPOBinaryTV,
    GSPOToken,
    KLCov,
    PPOClip,
    Reinforce,
)

__version__ = "0.1.0"

# Names that need the `train` extra, and what few use, are imported when first used, so that `import react_fast`
# needs torch and numpy only.
_LAZY: dict[str, str] = {
    "CausalityTracker": ".tracker",
    "A2C": ".trainer.algorithms",
    "DAPO": ".trainer.algorithms",
    "DPO": ".trainer.algorithms",
    "GRPO": ".trainer.algorithms",
    "PPO": ".trainer.algorithms",
    "REINFORCE": ".trainer.algorithms",
    "RLOO": ".trainer.algorithms",
    "RunConfig": ".trainer.config",
    "SFT": ".trainer.algorithms",
    "Trainer": ".trainer.trainer",
    "TrainerConfig": ".trainer.config",
    "fresh_model": ".trainer.model",
    "load_model": ".trainer.model",
    "patch": ".integrations",
    "unpatch": ".integrations",
}

__all__ = [
    "CISPO",
    "DRO",
    "GMPO",
    "GSPO",
    "LUSPO",
    "SAPO",
    "VESPO",
    "ClipCov",
    "DPPOBinaryKL",
    "DPPOBinaryTV",
    "GSPOToken",
    "KLCov",
    "PPOClip",
    "PolicyLoss",
    "QLoss",
    "Reinforce",
    "RunningMoments",
    "SumTree",
    "TargetUpdate",
    "__version__",
    "attribution_scores",
    "cql_loss",
    "discounted_returns",
    "double_q_values",
    "expected_q_values",
    "expectile_loss",
    "gae",
    "get_backend",
    "group_advantages",
    "high_entropy_mask",
    "guided_logits",
    "ilql_loss",
    "importance_weights",
    "kl_rewards",
    "linear_policy_loss",
    "linear_token_logprobs",
    "max_q_values",
    "merge_moments",
    "moments",
    "off_policy_mask",
    "n_step_returns",
    "path_consistency",
    "policy_loss",
    "presets",
    "recipes",
    "reference",
    "retrace",
    "reverse_linear_scan",
    "segment_sum",
    "set_backend",
    "td_lambda_returns",
    "polyak_update",
    "q_loss",
    "q_targets",
    "soft_values",
    "token_logprobs",
    "use_backend",
    "value_loss",
    "vtrace",
    "whiten",
    *_LAZY,
]


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'react_fast' has no attribute {name!r}")
    return getattr(_importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
