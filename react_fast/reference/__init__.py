"""The specification: every op, the trainer and the tracker in plain loops over plain torch.

Written for reading and for checking the fast paths; same names and signatures, no speed.
"""

from .advantage import (
    discounted_returns,
    gae,
    merge_moments,
    moments,
    reverse_linear_scan,
    td_lambda_returns,
    whiten,
)
from .attribution import RunningMoments, accumulate_by_id, attribution_scores, segment_sum
from .faithfulness import faithfulness
from .group_advantages import group_advantages
from .importance_weights import high_entropy_mask, importance_weights, off_policy_mask
from .kl_rewards import kl_rewards
from .logprob import linear_token_logprobs, token_logprobs
from .objectives import (
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
from .off_policy import retrace, vtrace
from .policy_loss import PolicyLoss, linear_policy_loss, policy_loss, value_loss
from .q_learning import (
    double_q_values,
    expected_q_values,
    guided_logits,
    max_q_values,
    n_step_returns,
    path_consistency,
    polyak_update,
    q_targets,
    soft_values,
)
from .q_loss import QLoss, cql_loss, expectile_loss, ilql_loss, q_loss
from .q_loss import regression as q_regression
from .sum_tree import SumTree
from .tracker import Tracker
from .trainer import Trainer

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
    "Tracker",
    "Trainer",
    "accumulate_by_id",
    "attribution_scores",
    "cql_loss",
    "discounted_returns",
    "double_q_values",
    "expected_q_values",
    "expectile_loss",
    "faithfulness",
    "gae",
    "group_advantages",
    "guided_logits",
    "high_entropy_mask",
    "ilql_loss",
    "importance_weights",
    "kl_rewards",
    "linear_policy_loss",
    "linear_token_logprobs",
    "max_q_values",
    "merge_moments",
    "moments",
    "n_step_returns",
    "off_policy_mask",
    "path_consistency",
    "policy_loss",
    "polyak_update",
    "q_loss",
    "q_regression",
    "q_targets",
    "retrace",
    "reverse_linear_scan",
    "segment_sum",
    "soft_values",
    "td_lambda_returns",
    "token_logprobs",
    "value_loss",
    "vtrace",
    "whiten",
]
