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
    "Reinforce",
    "RunningMoments",
    "Tracker",
    "Trainer",
    "accumulate_by_id",
    "attribution_scores",
    "discounted_returns",
    "gae",
    "group_advantages",
    "high_entropy_mask",
    "importance_weights",
    "kl_rewards",
    "linear_policy_loss",
    "linear_token_logprobs",
    "merge_moments",
    "moments",
    "off_policy_mask",
    "policy_loss",
    "retrace",
    "reverse_linear_scan",
    "segment_sum",
    "td_lambda_returns",
    "token_logprobs",
    "value_loss",
    "vtrace",
    "whiten",
]
