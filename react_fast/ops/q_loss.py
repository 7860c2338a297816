"""Losses of the Q-learning family: TD error, expectile value, conservative term, ILQL. A regression's value,
gradient and metrics come out of one pass."""

from typing import Any

import torch

from .. import reference
from ..reference.q_loss import QLoss
from . import _check
from ._logprob import HIGH, LOW
from ._policy_loss import AGGREGATIONS, denominator_value
from ._q_loss import METRICS, REGRESSIONS
from ._q_loss import q_loss as _q_loss
from .backend import accumulation_dtype, use_reference
from .logprob import token_logprobs
from .policy_loss import policy_loss
from .q_learning import Maybe, Pair, n_step_returns

__all__ = ["QLoss", "cql_loss", "expectile_loss", "ilql_loss", "q_loss"]

_TOKENS = "token_mean"


def q_loss(
    q_values: Pair,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    huber: float | None = None,
    weights: Maybe = None,
    aggregation: str = _TOKENS,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: Maybe = None,
) -> QLoss:
    """TD error of the taken tokens' Q, of one or two heads, to be minimised. Targets never receive a gradient.

        loss = sum_t w_t weight_t sum_heads L(e),  e = q_values - targets
        L(e) = e^2 / 2, or with `huber` = k:  e^2 / 2 where |e| <= k, else k (|e| - k / 2)

    Args:
        q_values: [B, T] or packed [N]; float32, bfloat16, float16 or float64; or a pair, whose losses add up.
            Differentiable once.
        targets: like `q_values`, or float32 beside narrower ones, as `q_targets` returns them.
        mask: like `q_values`, bool or 0/1. What stands where it is false is never read.
        huber: k, above 0, or None.
        weights: like `targets`, a factor for every token (prioritised replay); a constant.
        aggregation, denominator: what w_t is, see `policy_loss`.
        cu_seqlens: [B + 1] int32 or int64 for packed input; needed for the seq_mean_* kinds.
    Returns: QLoss(loss, metrics): a 0-d float32 (float64 for float64), 0 if nothing counts, and 0-d tensors
        without gradient: tokens; means over the counting tokens and heads of e, |e|, prediction, target and e > 0
        (td_error/mean, td_error/abs, prediction/mean, target/mean, above); td_error/max, the largest |e|.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value.
    Source: Mnih et al. 2015 (DQN); Huber 1964.
    """
    kind = "squared" if huber is None else "huber"
    parameter = 0.0 if huber is None else _check.number("huber", huber, low=0.0, low_open=True)
    names = ("q_values", "targets")
    return _regression(
        names, q_values, targets, mask, kind, parameter, weights, aggregation, denominator, cu_seqlens
    )


def expectile_loss(
    values: torch.Tensor,
    q_targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    tau: float,
    weights: Maybe = None,
    aggregation: str = _TOKENS,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: Maybe = None,
) -> QLoss:
    """Asymmetric regression of V on Q: the tau-expectile, near the best action in the data as tau -> 1.

        loss = sum_t w_t |tau - [u < 0]| u^2,  u = q_targets - values

    tau = 1/2 is half the mean squared error.

    Args:
        values: [B, T] or packed [N]; float32, bfloat16, float16 or float64. Differentiable once.
        q_targets: like `values`, or float32 beside narrower ones: the target network's Q of the taken tokens, with
            two heads the lower. A constant.
        tau: in [0, 1].
        mask, weights, aggregation, denominator, cu_seqlens: see `q_loss`.
    Returns: QLoss, see `q_loss`; `above` is the fraction of tokens with V above Q.
    Raises: see `q_loss`.
    Source: Kostrikov et al. 2021 (arXiv:2110.06169), eq. 5.
    """
    tau = _check.number("tau", tau, low=0.0, high=1.0)
    names = ("values", "q_targets")
    return _regression(
        names, values, q_targets, mask, "expectile", tau, weights, aggregation, denominator, cu_seqlens
    )


def cql_loss(
    q: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    alpha: float = 1.0,
    aggregation: str = _TOKENS,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: Maybe = None,
) -> torch.Tensor:
    """Conservative term: pushes Q of all tokens down and of the taken one up.

        loss = sum_t w_t (alpha log sum_a exp(q_ta / alpha) - q_t[token_t])
             = -alpha sum_t w_t log softmax(q_t / alpha)[token_t]

    The log-probability of the taken token under the softmax of Q, so its kernel is `token_logprobs`; where Q comes
    from a linear head, `linear_token_logprobs` gives the same without [..., V].

    Args:
        q: [B, T, V] or packed [N, V]. Differentiable once. -inf forbids a token; a forbidden taken token adds 0.
        token_ids: like `mask`, int32 or int64.  mask: [B, T] or [N].
        alpha: a number in [1e-30, 1e30].
        aggregation, denominator, cu_seqlens: see `policy_loss`.
    Returns: 0-d float32 (float64 for float64).
    Raises: see `token_logprobs` and `policy_loss`.
    Source: Kumar et al. 2020 (arXiv:2006.04779), eq. 4 (CQL(H)).
    """
    if _check.floating("q", q).dim() not in (2, 3):
        raise ValueError(f"q must be [B, T, V] or packed [N, V], got {list(q.shape)}")
    _check.shape("token_ids", _check.integer("token_ids", token_ids), q.shape[:-1], "q[..., 0]")
    _check.device("token_ids", token_ids, q.device, "q")
    alpha = _check.number("alpha", alpha, low=LOW, high=HIGH)
    logprobs = token_logprobs(q, token_ids, temperature=alpha, mask=mask)
    return alpha * _log_loss(logprobs, None, mask, aggregation, denominator, cu_seqlens)


def ilql_loss(
    q_values: Pair,
    target_q_values: Pair,
    values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    tau: float = 0.7,
    q_coef: float = 1.0,
    value_coef: float = 1.0,
    q_logprobs: Pair | None = None,
    cql_coef: float = 0.0,
    logprobs: Maybe = None,
    awac_coef: float = 0.0,
    awac_beta: float = 1.0,
    awac_max: float = 100.0,
    n: int = 1,
    last_values: Maybe = None,
    terminated: Maybe = None,
    truncated: Maybe = None,
    bootstrap_values: Maybe = None,
    aggregation: str = _TOKENS,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: Maybe = None,
) -> QLoss:
    """Implicit language Q-learning: offline, in the data's tokens only.

        loss = q_coef L_Q + value_coef L_V + cql_coef L_CQL + awac_coef L_AWAC
        L_Q    = sum_t w_t sum_heads (Q - y)^2             y = r_t + gamma V_{t+1} (n = 1), a constant
        L_V    = sum_t w_t |tau - [u < 0]| u^2             u = min of the target heads' Q - V
        L_CQL  = -sum_t w_t sum_heads log softmax(Q)[a]    from `q_logprobs`
        L_AWAC = -sum_t w_t min(exp(awac_beta u), awac_max) log pi(a)   from `logprobs`; the weight is a constant

    Args:
        q_values: [B, T] or packed [N]: Q of the taken tokens, one head or a pair.
        target_q_values: likewise, of the target network.
        values: V of the states in which the tokens were taken.
        rewards, mask, n, last_values, terminated, truncated, bootstrap_values, cu_seqlens: see `n_step_returns`.
            `dones` of trlx' ILQL is inverted: its 1 is a step that is not terminal.
        q_logprobs: `token_logprobs(q, token_ids)` of each head (or of `linear_token_logprobs`); None: no L_CQL.
        logprobs: of the taken tokens under the policy; None: no L_AWAC.
        gamma, tau: in [0, 1]. awac_beta, awac_max and the coefficients: not negative.
        aggregation, denominator: see `policy_loss`.
    Returns: QLoss(loss, metrics); metrics of L_Q and L_V as in `q_loss` under q/ and value/, and
        loss/{q,value,cql,awac} before their coefficients.
    Raises: see `q_loss`.
    Source: Snell et al. 2022 (arXiv:2206.11871); L_V: Kostrikov et al. 2021 (arXiv:2110.06169); L_CQL: Kumar et
        al. 2020 (arXiv:2006.04779); L_AWAC: Nair et al. 2020 (arXiv:2006.09359).
        Elsewhere: trlx does not bound the weight of L_AWAC (awac_max=inf); the authors' code averages it over the
        tokens of states as well, and takes L_CQL at a temperature: `q_logprobs` of that temperature.
    """
    coefs = {"q_coef": q_coef, "value_coef": value_coef, "cql_coef": cql_coef, "awac_coef": awac_coef}
    for name, number in {**coefs, "awac_beta": awac_beta, "awac_max": awac_max}.items():
        _check.number(name, number, low=0.0, infinite=name == "awac_max")
    for name, given, coef in (("q_logprobs", q_logprobs, "cql_coef"), ("logprobs", logprobs, "awac_coef")):
        if coefs[coef] and given is None:
            raise ValueError(
                f"{name} must be given when {coef} is not 0, got None and {coef} {coefs[coef]:g}"
            )
    _check_ilql(
        q_values, target_q_values, values, rewards, q_logprobs, logprobs, last_values, bootstrap_values
    )
    shared: dict[str, Any] = {
        "aggregation": aggregation,
        "denominator": denominator,
        "cu_seqlens": cu_seqlens,
    }
    wide = accumulation_dtype(values.dtype)
    constants = [None if x is None else x.detach().to(wide) for x in (values, last_values, bootstrap_values)]
    targets = n_step_returns(
        rewards.detach().to(wide), constants[0], gamma=gamma, n=n, last_values=constants[1], terminated=terminated,
        truncated=truncated, bootstrap_values=constants[2], mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    heads = target_q_values if isinstance(target_q_values, tuple) else (target_q_values,)
    target_q = (heads[0] if len(heads) == 1 else torch.minimum(*heads)).detach().to(wide)
    td = q_loss(q_values, targets, mask, **shared)
    value = expectile_loss(values, target_q, mask, tau=tau, **shared)
    loss = 2 * q_coef * td.loss + value_coef * value.loss
    metrics = {f"q/{k}": x for k, x in td.metrics.items()}
    metrics |= {f"value/{k}": x for k, x in value.metrics.items()}
    metrics |= {"loss/q": 2 * td.loss.detach(), "loss/value": value.loss.detach()}
    if q_logprobs is not None:
        found = q_logprobs if isinstance(q_logprobs, tuple) else (q_logprobs,)
        cql = torch.stack([_log_loss(x, None, mask, **shared) for x in found]).sum()
        loss = loss + cql_coef * cql
        metrics["loss/cql"] = cql.detach()
    if logprobs is not None:
        advantage = target_q - values.detach().to(wide)
        gain = (awac_beta * advantage).exp().clamp(max=awac_max).to(logprobs.dtype)
        awac = _log_loss(logprobs, gain, mask, **shared)
        loss = loss + awac_coef * awac
        metrics["loss/awac"] = awac.detach()
    return QLoss(loss, metrics)


def _check_ilql(
    q_values: Pair,
    target_q_values: Pair,
    values: torch.Tensor,
    rewards: torch.Tensor,
    q_logprobs: Pair | None,
    logprobs: Maybe,
    last_values: Maybe,
    bootstrap_values: Maybe,
) -> None:
    """What later checks would name otherwise: every tensor is like `values`, or float32 beside narrower ones."""
    _check.floating("values", values)
    alike = {
        "q_values": q_values,
        "target_q_values": target_q_values,
        "rewards": rewards,
        "q_logprobs": q_logprobs,
        "logprobs": logprobs,
        "bootstrap_values": bootstrap_values,
    }
    for name, given in alike.items():
        for x in given if isinstance(given, tuple) else () if given is None else (given,):
            _constant(name, x, values, "values")
    for name, pair in (
        ("q_values", q_values),
        ("target_q_values", target_q_values),
        ("q_logprobs", q_logprobs),
    ):
        if isinstance(pair, tuple) and len(pair) != 2:
            raise ValueError(f"{name} must be a tensor or a pair of two, got {len(pair)}")
    if last_values is not None:
        _precision("last_values", last_values, values, "values")


def _log_loss(
    logprobs: torch.Tensor,
    gain: Maybe,
    mask: torch.Tensor,
    aggregation: str,
    denominator: float | torch.Tensor | None,
    cu_seqlens: Maybe,
) -> torch.Tensor:
    """-sum_t w_t gain_t log p_t."""
    gain = (
        torch.ones((), dtype=logprobs.dtype, device=logprobs.device).expand_as(logprobs)
        if gain is None
        else gain
    )
    found = policy_loss(
        logprobs, None, gain, mask, objective=reference.Reinforce(), aggregation=aggregation,
        denominator=denominator, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return found.loss


def _regression(
    names: tuple[str, str],
    predictions: Pair,
    targets: torch.Tensor,
    mask: torch.Tensor,
    kind: str,
    parameter: float,
    weights: Maybe,
    aggregation: str,
    denominator: float | torch.Tensor | None,
    cu_seqlens: Maybe,
) -> QLoss:
    first, second = _heads(names[0], predictions)
    mask = _check.mask("mask", mask, first.shape, names[0], first.device)
    _constant(names[1], targets, first, names[0])
    if weights is not None:
        _constant("weights", weights, first, names[0])
    _check.choice("aggregation", aggregation, AGGREGATIONS)
    _check_rows(names[0], first, aggregation, cu_seqlens)
    number, tensor = _denominator(denominator, aggregation, first, names[0])
    if use_reference():
        if cu_seqlens is not None:
            _check.rising("cu_seqlens", cu_seqlens, len(first), "the packed tokens")
        return reference.q_regression(
            predictions, targets, mask, kind, parameter, weights=weights, aggregation=aggregation,
            denominator=denominator_value(number, tensor) or None, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    grad = torch.is_grad_enabled()
    constants = (targets.detach(), mask, None if weights is None else weights.detach(), cu_seqlens, tensor)
    loss, stats, _, _ = _q_loss(
        first, second, *constants, number, REGRESSIONS.index(kind), parameter, AGGREGATIONS.index(aggregation),
        grad and first.requires_grad, grad and second is not None and second.requires_grad,
    )  # fmt: skip
    return QLoss(loss, dict(zip(METRICS, stats.unbind(), strict=True)))


def _heads(name: str, predictions: Pair) -> tuple[torch.Tensor, Maybe]:
    if not isinstance(predictions, tuple):
        first, second = predictions, None
    elif len(predictions) == 2:
        first, second = predictions
    else:
        raise ValueError(f"{name} must be a tensor or a pair of two, got {len(predictions)}")
    _check.floating(name, first)
    if first.dim() not in (1, 2):
        raise ValueError(f"{name} must be [B, T] or packed [N], got {list(first.shape)}")
    if second is not None:
        _check.dtype(f"{name}[1]", _check.tensor(f"{name}[1]", second), first.dtype, f"{name}[0]")
        _check.shape(f"{name}[1]", second, first.shape, f"{name}[0]")
        _check.device(f"{name}[1]", second, first.device, f"{name}[0]")
    return first, second


def _precision(name: str, x: torch.Tensor, like: torch.Tensor, other: str) -> None:
    """Of the dtype of `like`, or of the one that ops return for it."""
    if _check.floating(name, x).dtype != accumulation_dtype(like.dtype):
        _check.dtype(name, x, like.dtype, other)


def _constant(name: str, x: torch.Tensor, like: torch.Tensor, other: str) -> None:
    _precision(name, x, like, other)
    _check.shape(name, x, like.shape, other)
    _check.device(name, x, like.device, other)


def _check_rows(name: str, x: torch.Tensor, aggregation: str, cu_seqlens: Maybe) -> None:
    if cu_seqlens is not None:
        if x.dim() != 1:
            raise ValueError(f"{name} must be packed [N] when cu_seqlens is given, got {list(x.shape)}")
        _check.bounds("cu_seqlens", cu_seqlens, x, name, "B + 1")
    elif x.dim() == 1 and aggregation.startswith("seq_"):
        raise ValueError(
            f"cu_seqlens must be given for packed {name} and aggregation {aggregation!r}, got None"
        )


def _denominator(
    denominator: float | torch.Tensor | None, aggregation: str, like: torch.Tensor, name: str
) -> tuple[float, Maybe]:
    """(number or 0, tensor or None)."""
    if denominator is None:
        if aggregation == "token_sum_norm":
            raise ValueError("denominator must be given for aggregation 'token_sum_norm', got None")
        return 0.0, None
    if not isinstance(denominator, torch.Tensor):
        return _check.number("denominator", denominator, low=0.0, low_open=True), None
    if denominator.numel() != 1 or denominator.is_complex() or denominator.dtype == torch.bool:
        raise ValueError(f"denominator must be a number or one element, got {list(denominator.shape)}")
    _check.device("denominator", denominator, like.device, name)
    return 0.0, denominator.detach()
