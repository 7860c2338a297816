"""Policy-gradient losses: objective, KL, entropy, importance weights and aggregation in one pass."""

import torch

from .. import reference
from ..reference.objectives import Objective, PPOClip
from ..reference.policy_loss import PolicyLoss
from . import _check
from ._objectives import BY_ROW, OBJECTIVES
from ._policy_loss import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    Terms,
    denominator_value,
    named_metrics,
    per_row,
    policy_loss_op,
    value_loss_op,
)
from .backend import use_reference

__all__ = ["PolicyLoss", "policy_loss", "value_loss"]


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    objective: Objective = PPOClip(),  # noqa: B008, a frozen value
    aggregation: str = "token_mean",
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str = "ratio",
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    importance: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> PolicyLoss:
    """Policy-gradient loss of a batch of token sequences, to be minimised.

        loss = sum_t w_t (importance_t L_t + kl_coef K_t - entropy_coef H_t)

    L is the objective's (`PPOClip`, `GSPO`, ...), with r = exp(logprobs - old_logprobs). Log-ratios are
    clamped to +-20 with zero gradient outside, one by one before any mean or sum over a sequence; a counting
    token with logprobs = -inf counts as clamped to -20 and gets no gradient. Loss, gradient and metrics come
    out of one pass; the backward is one multiplication. Differentiable once, in `logprobs` and `entropy`;
    everything else is a constant.

    Weights w_t of the counting tokens, with n counting tokens, n_s of them in sequence s, and S sequences
    that have any (a row without counting tokens is no sequence):
        token_mean            1 / n
        seq_mean_token_mean   1 / (S n_s)
        seq_mean_token_sum    1 / S
        token_sum_norm        1 / denominator
    `denominator` replaces n or S: with the number over the whole batch, losses and gradients of micro-batches
    or ranks sum to the batch's. Nothing counts: loss 0, gradients 0.

    KL, x = logprobs - ref_logprobs: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x, abs = |x|. `kl_gradient`
    chooses what the gradient of K is, since the estimators as loss terms do not have the gradient of the KL
    on policy:
        value   differentiates the estimator: exact for k2, zero on average for k1, biased for k3
        k2      the value is the estimator's, the gradient is k2's: exact on policy (verl's straight-through "k3+")
        ratio   K = r k, r live: exact for k1 and k3, off policy too (importance sampling); not for k2

    Args:
        logprobs: [B, T], or packed [N]; float32, bfloat16, float16 or float64. Under the policy in training.
        old_logprobs: like `logprobs`, at sampling time. None: r is 1 with a live gradient (on policy).
        advantages: like `logprobs`, or one per sequence [B] (never broadcast in memory).
        mask: like `logprobs`, bool or 0/1. What stands where it is false is never read.
        objective: a value of react_fast.reference.objectives; bounds are absolute ratios.
        aggregation: "token_mean" | "seq_mean_token_mean" | "seq_mean_token_sum" | "token_sum_norm".
        ref_logprobs, entropy, importance: like `logprobs`, or None.
        kl_coef, entropy_coef: numbers.
        kl_estimator: "k1" | "k2" | "k3" | "abs".  kl_gradient: "value" | "k2" | "ratio".
        denominator: number above 0, or a tensor of one element; required by "token_sum_norm".
        cu_seqlens: [B + 1] int32 or int64 for packed input, from 0 to N; needed for the seq_mean_* kinds and
            for advantages [B]. Packed `advantages` [N] are per token, even if B = N.
    Returns: PolicyLoss(loss, metrics). `loss` is a 0-d float32 (float64 for float64); metrics are 0-d tensors
        on the same device, without gradient: means over the counting tokens of this call, whatever the
        aggregation. tokens: number of counting tokens. clip_ratio/{low,high,dual}: fraction of tokens whose
        gradient a bound stopped, below with A < 0, above with A > 0, above with A < 0 (dual_clip, ratio_cap);
        other objectives say in their docstrings what these and ratio/{mean,max} are. approx_kl/{k1,k3}:
        KL(old || policy). ratio/{mean,max}. clamped: number of clamped log-ratios. With their inputs also kl,
        entropy, and importance/{mean,ess,max}, ess the effective sample size over the number of tokens.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value. cu_seqlens
        values are checked on the CPU only, where that needs no synchronisation.
    Source: Schulman et al. 2017 (arXiv:1707.06347); aggregations: Shao et al. 2024 (arXiv:2402.03300), Yu et
        al. 2025 (arXiv:2503.14476), Liu et al. 2025 (arXiv:2503.20783); estimators: Schulman 2020,
        "Approximating KL divergence"; their gradients: Tang & Munos 2025 (arXiv:2506.09477).
    """
    mask = check_tokens("logprobs", logprobs, mask, cu_seqlens)
    for name, value in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("entropy", entropy),
        ("importance", importance),
    ):
        if value is not None:
            check_like(name, value, logprobs, "logprobs")
    check_advantages(advantages, logprobs, cu_seqlens)
    terms, tensor = checked_terms(
        objective,
        aggregation,
        kl_coef,
        kl_estimator,
        kl_gradient,
        entropy_coef,
        denominator,
        ref_logprobs,
        logprobs,
    )
    if terms.entropy_coef and entropy is None:
        raise ValueError(
            f"entropy must be given when entropy_coef is not 0, got None and {terms.entropy_coef:g}"
        )
    if logprobs.dim() == 1 and cu_seqlens is None:
        refuse_without_rows(objective, aggregation)
    if use_reference():
        if cu_seqlens is not None:
            _check.rising("cu_seqlens", cu_seqlens, len(logprobs), "the packed tokens")
        return reference.policy_loss(
            logprobs, old_logprobs, advantages, mask, objective=objective, aggregation=aggregation,
            ref_logprobs=ref_logprobs, kl_coef=terms.kl_coef, kl_estimator=kl_estimator,
            kl_gradient=kl_gradient, entropy=entropy, entropy_coef=terms.entropy_coef, importance=importance,
            denominator=denominator_value(terms.denominator, tensor) or None, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    grad = torch.is_grad_enabled()
    loss, stats, _, _ = policy_loss_op(
        logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance, cu_seqlens, tensor,
        *terms, grad and logprobs.requires_grad, grad and entropy is not None and entropy.requires_grad,
    )  # fmt: skip
    return PolicyLoss(loss, named_metrics(stats, ref_logprobs, entropy, importance))


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor | None,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float | None = None,
    denominator: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the value function, optionally clipped around the old values.

        loss = 1/2 mean_t max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)

    The gradient is v - R where the unclipped error is not the smaller one, else 0.

    Args:
        values: [B, T] or packed [N]; float32, bfloat16, float16 or float64. Differentiable once.
        old_values: like `values`, at sampling time; may be None without `clip`.
        returns: like `values`.
        mask: like `values`, bool or 0/1. What stands where it is false is never read.
        clip: number above 0, or None for the plain squared error.
        denominator: replaces the number of counting tokens, as in `policy_loss`.
    Returns: 0-d float32 (float64 for float64); 0 if nothing counts.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value.
    Source: Schulman et al. 2016 (arXiv:1506.02438); clipping: OpenAI Baselines' PPO2.
    Elsewhere: no 1/2 in Stable-Baselines3, which clips without the maximum; verl and OpenRLHF are as here.
    """
    mask = check_tokens("values", values, mask, None)
    check_like("returns", returns, values, "values")
    if old_values is not None:
        check_like("old_values", old_values, values, "values")
    if clip is not None:
        clip = _check.number("clip", clip, low=0.0, low_open=True)
        if old_values is None:
            raise ValueError(f"old_values must be given when clip is, got None and clip {clip:g}")
    number, tensor = _check_denominator(denominator, "token_mean", values)
    if use_reference():
        wanted = denominator_value(number, tensor) or None
        return reference.value_loss(values, old_values, returns, mask, clip=clip, denominator=wanted)
    wanted = torch.is_grad_enabled() and values.requires_grad
    old = None if clip is None else old_values
    return value_loss_op(values, old, returns, mask, tensor, number, 0.0 if clip is None else clip, wanted)[0]


# ---- checks ------------------------------------------------------------------------------------------------


def checked_terms(
    objective: Objective, aggregation: str, kl_coef: float, kl_estimator: str, kl_gradient: str,
    entropy_coef: float, denominator: float | torch.Tensor | None, ref_logprobs: torch.Tensor | None,
    like: torch.Tensor,
) -> tuple[Terms, torch.Tensor | None]:  # fmt: skip
    """What the loss is made of as the operator takes it, and the denominator if it is a tensor."""
    if type(objective) not in OBJECTIVES:
        names = ", ".join(f"{o.__name__}()" for o in OBJECTIVES)
        raise TypeError(f"objective must be one of {names}, got {objective!r}")
    for name, choice, choices in (
        ("aggregation", aggregation, AGGREGATIONS),
        ("kl_estimator", kl_estimator, KL_ESTIMATORS),
        ("kl_gradient", kl_gradient, KL_GRADIENTS),
    ):
        if choice not in choices:
            _check.choice(name, choice, choices)
    kl_coef, entropy_coef = _check.number("kl_coef", kl_coef), _check.number("entropy_coef", entropy_coef)
    if kl_coef and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs must be given when kl_coef is not 0, got None and kl_coef {kl_coef:g}"
        )
    number, tensor = _check_denominator(denominator, aggregation, like)
    entry = OBJECTIVES[type(objective)]
    terms = Terms(
        number, entry.tag, entry.parameters(objective), AGGREGATIONS.index(aggregation), kl_coef,
        KL_ESTIMATORS.index(kl_estimator), KL_GRADIENTS.index(kl_gradient), entropy_coef,
    )  # fmt: skip
    return terms, tensor


def refuse_without_rows(objective: Objective, aggregation: str) -> None:
    """Packed tokens without cu_seqlens have no rows."""
    if aggregation.startswith("seq_"):
        raise ValueError(
            f"cu_seqlens must be given for packed tokens and aggregation {aggregation!r}, got None"
        )
    if OBJECTIVES[type(objective)].tag in BY_ROW:
        raise ValueError(f"cu_seqlens must be given for packed tokens and {objective!r}, got None")


def check_tokens(
    name: str, value: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The mask as bool, once `value` is [B, T] or [N] and cu_seqlens fits it."""
    _check.floating(name, value)
    if value.dim() not in (1, 2):
        raise ValueError(f"{name} must be [B, T] or packed [N], got {list(value.shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(name, value, cu_seqlens)
    return _check.mask("mask", mask, value.shape, name, value.device)


def check_cu_seqlens(name: str, value: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    if value.dim() != 1:
        raise ValueError(f"{name} must be packed [N] when cu_seqlens is given, got {list(value.shape)}")
    _check.bounds("cu_seqlens", cu_seqlens, value, name, "B + 1")


def check_like(name: str, value: torch.Tensor, other: torch.Tensor, like: str) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != other.dtype:
        _check.floating(name, value)
        _check.dtype(name, value, other.dtype, like)
    if value.shape != other.shape:
        _check.shape(name, value, other.shape, like)
    if value.device != other.device:
        _check.device(name, value, other.device, like)


def check_advantages(
    advantages: torch.Tensor,
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    name: str = "advantages",
) -> None:
    if per_row(_check.tensor(name, advantages), logprobs):
        rows = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else logprobs.shape[0]
        if advantages.shape != (rows,):
            wanted = f"{list(logprobs.shape)} like logprobs or one per sequence [{rows}]"
            if logprobs.dim() == 1 and cu_seqlens is None:
                wanted = f"{list(logprobs.shape)} like logprobs (one per sequence needs cu_seqlens)"
            raise ValueError(f"{name} must be {wanted}, got {list(advantages.shape)}")
        _check.floating(name, advantages)
        _check.dtype(name, advantages, logprobs.dtype, "logprobs")
        _check.device(name, advantages, logprobs.device, "logprobs")
    else:
        check_like(name, advantages, logprobs, "logprobs")


def _check_denominator(
    denominator: float | torch.Tensor | None, aggregation: str, like: torch.Tensor
) -> tuple[float, torch.Tensor | None]:
    """(number or 0, tensor or None)."""
    if denominator is None:
        if aggregation == "token_sum_norm":
            raise ValueError("denominator must be given for aggregation 'token_sum_norm', got None")
        return 0.0, None
    if not isinstance(denominator, torch.Tensor):
        return _check.number("denominator", denominator, low=0.0, low_open=True), None
    if denominator.numel() != 1 or denominator.is_complex() or denominator.dtype == torch.bool:
        raise ValueError(f"denominator must be a number or one element, got {list(denominator.shape)}")
    _check.device("denominator", denominator, like.device, "logprobs")
    return 0.0, denominator.detach()
