"""Every public op with every tensor argument that it has, right as it is."""

from collections.abc import Callable
from typing import Any

import torch

import react_fast as rf

Arguments = dict[str, Any]


def _floats(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def _ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _flags(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _edges() -> torch.Tensor:
    return torch.tensor([0, 2, 5])


def _episodes(*shape: int) -> Arguments:
    """What all returns share, two rows of it."""
    flags = {name: _flags(*shape) for name in ("mask", "terminated", "truncated")}
    return {
        "rewards": _floats(*shape),
        **flags,
        "last_values": _floats(2),
        "bootstrap_values": _floats(*shape),
    }


def _policy(*shape: int) -> Arguments:
    names = ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy", "importance")
    return {**{name: _floats(*shape) for name in names}, "mask": _flags(*shape)}


def _update_moments(**given: Any) -> None:
    rf.RunningMoments(4).update(**given)


# Every tensor argument that an op has; the first one sets shape, dtype and device for the others.
OPS: dict[str, tuple[Callable[..., Any], Arguments, Arguments]] = {
    "token_logprobs": (
        rf.token_logprobs,
        {
            "logits": _floats(2, 3, 4),
            "token_ids": _ids(2, 3),
            "temperature": _floats(2, 3) + 2,
            "mask": _flags(2, 3),
            "logit_floor": _floats(2, 3),
        },
        {},
    ),
    "token_logprobs of several": (
        rf.token_logprobs,
        {"logits": _floats(2, 3, 4), "token_ids": _ids(2, 3, 5), "logit_floor": _floats(2, 3)},
        {},
    ),
    "linear_token_logprobs": (
        rf.linear_token_logprobs,
        {
            "hidden": _floats(2, 3, 4),
            "weight": _floats(5, 4),
            "token_ids": _ids(2, 3),
            "bias": _floats(5),
            "temperature": _floats(2, 3) + 2,
            "mask": _flags(2, 3),
        },
        {},
    ),
    "linear_policy_loss": (
        rf.linear_policy_loss,
        {
            "hidden": _floats(2, 3, 4),
            "weight": _floats(5, 4),
            "token_ids": _ids(2, 3),
            **{k: x for k, x in _policy(2, 3).items() if k not in ("logprobs", "entropy")},
            "bias": _floats(5),
            "temperature": _floats(2, 3) + 2,
        },
        {"kl_coef": 0.1},
    ),
    "discounted_returns": (rf.discounted_returns, _episodes(2, 3), {"gamma": 0.9}),
    "discounted_returns packed": (
        rf.discounted_returns,
        {**_episodes(5), "cu_seqlens": _edges()},
        {"gamma": 0.9},
    ),
    "gae": (
        rf.gae,
        {**_episodes(2, 3), "values": _floats(2, 3), "lam": _floats(2) / 4 + 0.5},
        {"gamma": 0.9},
    ),
    "gae packed": (
        rf.gae,
        {**_episodes(5), "values": _floats(5), "lam": _floats(2) / 4 + 0.5, "cu_seqlens": _edges()},
        {"gamma": 0.9},
    ),
    "td_lambda_returns": (
        rf.td_lambda_returns,
        {**_episodes(2, 3), "values": _floats(2, 3), "lam": _floats(2) / 4 + 0.5},
        {"gamma": 0.9},
    ),
    "vtrace": (
        rf.vtrace,
        {
            **_episodes(2, 3),
            "values": _floats(2, 3),
            "log_rhos": _floats(2, 3),
            "lam": _floats(2) / 4 + 0.5,
        },
        {"gamma": 0.9},
    ),
    "vtrace packed": (
        rf.vtrace,
        {**_episodes(5), "values": _floats(5), "log_rhos": _floats(5), "cu_seqlens": _edges()},
        {"gamma": 0.9},
    ),
    "retrace": (
        rf.retrace,
        {
            "rewards": _floats(2, 3),
            "q_values": _floats(2, 3),
            "next_values": _floats(2, 3),
            "log_rhos": _floats(2, 3),
            "terminated": _flags(2, 3),
            "truncated": _flags(2, 3),
            "mask": _flags(2, 3),
            "lam": _floats(2) / 4 + 0.5,
        },
        {"gamma": 0.9},
    ),
    "n_step_returns": (
        rf.n_step_returns,
        {**_episodes(2, 3), "values": _floats(2, 3)},
        {"gamma": 0.9, "n": 2},
    ),
    "n_step_returns packed": (
        rf.n_step_returns,
        {**_episodes(5), "values": _floats(5), "cu_seqlens": _edges()},
        {"gamma": 0.9, "n": 2},
    ),
    "q_targets": (rf.q_targets, {**_episodes(2, 3), "next_values": _floats(2, 3)}, {"gamma": 0.9}),
    "path_consistency": (
        rf.path_consistency,
        {
            **_episodes(2, 3),
            "values": _floats(2, 3),
            "logprobs": _floats(2, 3),
            "ref_logprobs": _floats(2, 3),
        },
        {"gamma": 0.9, "alpha": 0.1},
    ),
    "max_q_values": (rf.max_q_values, {"q": _floats(2, 3, 4), "mask": _flags(2, 3)}, {}),
    "double_q_values": (
        rf.double_q_values,
        {"q_online": _floats(2, 3, 4), "q_target": _floats(2, 3, 4), "mask": _flags(2, 3)},
        {},
    ),
    "expected_q_values": (
        rf.expected_q_values,
        {"q": _floats(2, 3, 4), "logits": _floats(2, 3, 4), "mask": _flags(2, 3)},
        {},
    ),
    "soft_values": (
        rf.soft_values,
        {"q": _floats(2, 3, 4), "prior_logprobs": _floats(2, 3, 4), "mask": _flags(2, 3)},
        {"alpha": 0.5},
    ),
    "guided_logits": (
        rf.guided_logits,
        {"logits": _floats(2, 3, 4), "q": _floats(2, 3, 4), "values": _floats(2, 3)},
        {"beta": 0.5},
    ),
    "q_loss": (
        rf.q_loss,
        {
            "q_values": _floats(2, 3),
            "targets": _floats(2, 3),
            "mask": _flags(2, 3),
            "weights": _floats(2, 3),
        },
        {"huber": 1.0},
    ),
    "q_loss packed": (
        rf.q_loss,
        {"q_values": _floats(5), "targets": _floats(5), "mask": _flags(5), "cu_seqlens": _edges()},
        {"aggregation": "seq_mean_token_mean"},
    ),
    "expectile_loss": (
        rf.expectile_loss,
        {"values": _floats(2, 3), "q_targets": _floats(2, 3), "mask": _flags(2, 3)},
        {"tau": 0.7},
    ),
    "cql_loss": (
        rf.cql_loss,
        {"q": _floats(2, 3, 4), "token_ids": _ids(2, 3), "mask": _flags(2, 3)},
        {},
    ),
    "ilql_loss": (
        rf.ilql_loss,
        {
            "values": _floats(2, 3),
            **{k: _floats(2, 3) for k in ("q_values", "target_q_values", "q_logprobs", "logprobs")},
            **_episodes(2, 3),
        },
        {"gamma": 0.9, "cql_coef": 0.1, "awac_coef": 0.1},
    ),
    "reverse_linear_scan": (
        rf.reverse_linear_scan,
        {"a": _floats(2, 3), "b": _floats(2, 3), "init": _floats(2)},
        {},
    ),
    "reverse_linear_scan packed": (
        rf.reverse_linear_scan,
        {"a": _floats(5), "b": _floats(5), "init": _floats(2), "cu_seqlens": _edges()},
        {},
    ),
    "group_advantages": (
        rf.group_advantages,
        {"rewards": _floats(4), "group_ids": _ids(4), "valid": _flags(4)},
        {},
    ),
    "group_advantages length-weighted": (
        rf.group_advantages,
        {"rewards": _floats(4), "group_ids": _ids(4), "lengths": _ids(4)},
        {"baseline": "length_weighted"},
    ),
    "group_advantages given": (
        rf.group_advantages,
        {"rewards": _floats(4), "group_ids": _ids(4), "baselines": _floats(4)},
        {"baseline": "given"},
    ),
    "moments": (rf.moments, {"x": _floats(2, 3), "mask": _flags(2, 3)}, {}),
    "whiten": (rf.whiten, {"x": _floats(2, 3), "mask": _flags(2, 3)}, {}),
    "policy_loss": (rf.policy_loss, _policy(2, 3), {"kl_coef": 0.1, "entropy_coef": 0.1}),
    "policy_loss packed": (rf.policy_loss, {**_policy(5), "cu_seqlens": _edges()}, {"kl_coef": 0.1}),
    "value_loss": (
        rf.value_loss,
        {
            "values": _floats(2, 3),
            "old_values": _floats(2, 3),
            "returns": _floats(2, 3),
            "mask": _flags(2, 3),
        },
        {"clip": 0.2},
    ),
    "importance_weights": (
        rf.importance_weights,
        {"logprobs": _floats(2, 3), "behavior_logprobs": _floats(2, 3), "mask": _flags(2, 3)},
        {"low": 0.5, "high": 2.0},
    ),
    "importance_weights packed": (
        rf.importance_weights,
        {"logprobs": _floats(5), "behavior_logprobs": _floats(5), "mask": _flags(5), "cu_seqlens": _edges()},
        {"low": 0.5, "high": 2.0, "level": "sequence"},
    ),
    "off_policy_mask": (
        rf.off_policy_mask,
        {
            "logprobs": _floats(2, 3),
            "behavior_logprobs": _floats(2, 3),
            "advantages": _floats(2, 3),
            "mask": _flags(2, 3),
        },
        {"threshold": 0.1},
    ),
    "high_entropy_mask": (
        rf.high_entropy_mask,
        {"entropy": _floats(2, 3), "mask": _flags(2, 3)},
        {"fraction": 0.5},
    ),
    "kl_rewards": (
        rf.kl_rewards,
        {
            "logprobs": _floats(2, 3),
            "rewards": _floats(2, 3),
            "ref_logprobs": _floats(2, 3),
            "mask": _flags(2, 3),
        },
        {"kl_coef": 0.1},
    ),
    "kl_rewards packed": (
        rf.kl_rewards,
        {
            "logprobs": _floats(5),
            "rewards": _floats(5),
            "ref_logprobs": _floats(5),
            "mask": _flags(5),
            "cu_seqlens": _edges(),
        },
        {"kl_coef": 0.1},
    ),
    "attribution_scores": (
        rf.attribution_scores,
        {"grad": _floats(2, 3), "activation": _floats(2, 3)},
        {},
    ),
    "segment_sum": (rf.segment_sum, {"scores": _floats(5), "cu_segments": _edges()}, {}),
    "RunningMoments.update": (
        _update_moments,
        {"scores": _floats(2, 3), "ids": _ids(2, 3), "mask": _flags(2, 3)},
        {},
    ),
}
