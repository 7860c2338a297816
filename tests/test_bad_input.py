"""What every op refuses, on every backend: one wrong argument at a time, named in one line, nothing read.

Values that only one op knows (an unknown objective, bounds that cross) are in that op's own tests.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import react_fast as rf

BACKENDS = ("cpu", "reference", "triton")
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
# Floats whose dtype is their own business: a number for each row, not an element of the computation.
OWN_DTYPE = ("temperature", "logit_floor", "lam")
WRONG: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception]]] = {
    "one row more": (lambda x: torch.cat([x, x[:1]]), ValueError),
    "one axis more": (lambda x: x[None], ValueError),
    "another device": (lambda x: x.to("meta"), ValueError),
    "another kind of number": (lambda x: x.int() if x.is_floating_point() else x.float(), TypeError),
    "complex": (lambda x: x.to(torch.complex64), TypeError),
    "no tensor": (lambda x: x.tolist(), TypeError),
}


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", OPS)
def test_wrong_shape_dtype_and_device(op, wrong, chosen):
    function, tensors, options = OPS[op]
    damage, error = WRONG[wrong]
    with rf.use_backend(chosen):
        function(**tensors, **options)  # what is damaged below was right
        for name in tensors:
            _refused(
                function, {**tensors, name: damage(tensors[name]), **options}, error, _blamed(name, tensors)
            )


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_wrong_precision(op, chosen):
    """Floats that meet in one computation have one dtype: nothing is cast silently."""
    function, tensors, options = OPS[op]
    floats = [n for n, x in tensors.items() if x.is_floating_point() and n not in OWN_DTYPE]
    if len(floats) < 2:
        pytest.skip("one float argument: every float dtype is right")
    with rf.use_backend(chosen):
        for name in floats:
            given = {**tensors, name: tensors[name].double(), **options}
            _refused(function, given, TypeError, _blamed(name, tensors))


# Arguments with one element for each packed sequence.
PER_ROW = ("last_values", "lam", "init")


def _blamed(name: str, tensors: Arguments) -> str:
    """Arguments that the error may name: the wrong one; where others are held against it, one of those."""
    if name == next(iter(tensors)):
        return "|".join(tensors)
    if name == "weight":
        return "weight|bias"
    return "|".join((name, *PER_ROW)) if name == "cu_seqlens" else name


def _refused(function: Callable[..., Any], given: Arguments, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=rf"^({names}) must ") as caught:
        function(**given)
    assert "\n" not in str(caught.value)


NAN, INF = float("nan"), float("inf")
NUMBERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "token_logprobs": {"temperature": (0, 0.0, -1.0, NAN, INF), "softcap": (0, -1.0, NAN, INF)},
    "discounted_returns": {"gamma": (1.5, -0.1, NAN, INF)},
    "gae": {"gamma": (1.5, -0.1, NAN, INF), "lam": (1.5, -0.1, NAN, INF)},
    "td_lambda_returns": {"gamma": (1.5, -0.1, NAN, INF), "lam": (1.5, -0.1, NAN, INF)},
    "vtrace": {
        "gamma": (1.5, -0.1, NAN, INF),
        "lam": (1.5, -0.1, NAN),
        "rho_clip": (-1.0, NAN),
        "c_clip": (-1.0, NAN),
        "advantage_rho_clip": (-1.0, NAN),
    },
    "retrace": {"gamma": (1.5, -0.1, NAN, INF), "lam": (1.5, -0.1, NAN, INF)},
    "n_step_returns": {"gamma": (1.5, -0.1, NAN, INF), "n": (0, -1)},
    "q_targets": {"gamma": (1.5, -0.1, NAN, INF), "n": (0, -1)},
    "path_consistency": {"gamma": (1.5, -0.1, NAN, INF), "alpha": (-1.0, NAN, INF), "span": (0, -1)},
    "expected_q_values": {"temperature": (0, -1.0, NAN, INF)},
    "soft_values": {"alpha": (0, -1.0, NAN, INF)},
    "guided_logits": {"beta": (-1.0, NAN, INF)},
    "q_loss": {"huber": (0, -1.0, NAN, INF), "denominator": (0, -1.0, NAN, INF)},
    "expectile_loss": {"tau": (1.5, -0.1, NAN, INF), "denominator": (0, -1.0, NAN, INF)},
    "cql_loss": {"alpha": (0, -1.0, NAN, INF), "denominator": (0, -1.0, NAN, INF)},
    "ilql_loss": {
        "gamma": (1.5, -0.1, NAN, INF),
        "tau": (1.5, -0.1, NAN, INF),
        "n": (0, -1),
        **dict.fromkeys(("q_coef", "value_coef", "cql_coef", "awac_coef", "awac_beta"), (-1.0, NAN, INF)),
        "awac_max": (-1.0, NAN),
    },
    "group_advantages": {"eps": (-1.0, NAN), "min_std": (-1.0, NAN), "ddof": (2, -1)},
    "whiten": {"eps": (-1.0, NAN), "ddof": (2, -1)},
    "policy_loss": {"kl_coef": (NAN, INF), "entropy_coef": (NAN, INF), "denominator": (0, -1.0, NAN, INF)},
    "value_loss": {"clip": (0, -1.0, NAN), "denominator": (0, -1.0, NAN, INF)},
    "importance_weights": {"low": (-0.1, NAN, INF, 3.0), "high": (-1.0, NAN, 0.4), "veto": (-1.0, NAN, INF)},
    "off_policy_mask": {"threshold": (-1.0, NAN, INF)},
    "high_entropy_mask": {"fraction": (0, -0.1, 1.5, NAN)},
    "kl_rewards": {"kl_coef": (NAN, INF), "clip": (0, -1.0, NAN, INF)},
}


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("op", NUMBERS)
def test_number_out_of_range(op, chosen):
    function, tensors, options = OPS[op]
    with rf.use_backend(chosen):
        for name, values in NUMBERS[op].items():
            blamed = "low|high" if name in ("low", "high") else name
            for value in values:
                _refused(function, {**tensors, **options, name: value}, ValueError, blamed)
            if name != "ddof":
                _refused(function, {**tensors, **options, name: "1"}, TypeError, name)
                _refused(function, {**tensors, **options, name: True}, TypeError, name)


def test_every_public_op_is_here():
    """A new op joins the table, or is named here with the reason why it has nothing to refuse."""
    checked = {op.split(" ")[0].split(".")[0] for op in OPS}
    merges = {"merge_moments"}  # takes results of `moments`
    ops = {name for name in rf.__all__ if name[0].islower() or name == "RunningMoments"}
    others = {
        "__version__",
        "get_backend",
        "set_backend",
        "use_backend",
        "polyak_update",  # of modules: tests/test_target_network.py
        "presets",  # tests/test_presets.py
        "recipes",  # compositions: tests/test_recipes.py
        "reference",
        "load_model",
        "fresh_model",
    }
    assert ops - others == checked | merges
