"""What every op refuses, on every backend: one wrong argument at a time, named in one line, nothing read.

Values that only one op knows (an unknown objective, bounds that cross) are in that op's own tests.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import react_fast as rf

from .op_cases import OPS, Arguments

BACKENDS = ("cpu", "reference", "triton")
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


def _meeting(op: str) -> list[str]:
    """Float arguments that meet in one computation; of a single one every float dtype is right."""
    floats = [n for n, x in OPS[op][1].items() if x.is_floating_point() and n not in OWN_DTYPE]
    return floats if len(floats) > 1 else []


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("op", [*filter(_meeting, OPS)])
def test_wrong_precision(op, chosen):
    """Floats that meet in one computation have one dtype: nothing is cast silently."""
    function, tensors, options = OPS[op]
    with rf.use_backend(chosen):
        for name in _meeting(op):
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
        "patch",  # tests/test_integrations_patching.py
        "unpatch",
    }
    assert ops - others == checked | merges
