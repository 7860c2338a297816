"""Policy-gradient loss straight from hidden states and the output matrix."""

from typing import Any

import torch

from .. import reference
from ..reference.objectives import Objective, PPOClip
from ..reference.policy_loss import PolicyLoss
from . import _check
from ._dtensor import plain
from ._linear_policy_loss import Tokens
from ._linear_policy_loss_op import Eager, compiled
from ._policy_loss import denominator_value, named_metrics
from .backend import accumulation_dtype, use_reference
from .linear_logprob import Maybe, checked, is_eager
from .policy_loss import check_advantages, check_cu_seqlens, check_like, checked_terms, refuse_without_rows


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    old_logprobs: Maybe,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    objective: Objective = PPOClip(),  # noqa: B008, a frozen value
    aggregation: str = "token_mean",
    ref_logprobs: Maybe = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str = "ratio",
    entropy_coef: float = 0.0,
    importance: Maybe = None,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: Maybe = None,
    bias: Maybe = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    tp_group: Any = None,
    batch_invariant: bool = False,
) -> PolicyLoss:
    """`policy_loss` of `linear_token_logprobs`, in one GEMM less and without a graph of the logits.

        logp, H = linear_token_logprobs(hidden, weight, token_ids, ..., return_entropy=True)
        loss, metrics = policy_loss(logp, old_logprobs, advantages, mask, entropy=H, ...)

    The loss of a token is known once its log-prob is, so the forward turns the logits into their gradient as soon
    as it has them. GEMMs of N x V x D, forward and backward together: 3 for everything, 2 where hidden or weight
    alone needs a gradient, 1 without. Every aggregation is had this way, seq_mean_* too, since its weights follow
    from the mask; entropy bonus, KL and metrics cost none.
    Where a token's loss depends on other tokens' log-probs (GSPO, GSPOToken, LUSPO, GMPO, VESPO: its sequence;
    KLCov, ClipCov: the batch), the log-probs of all rows come first and the logits are computed again: 4 for
    everything, 3 for weight alone, 2 for hidden alone (with an entropy bonus 3; batch_invariant with a bonus and
    all gradients 5). Rows without a gradient, a clipped sequence's, are left out of all but the first.
    The gradients are computed in the forward; the backward scales them.

    Memory beyond inputs and gradients: REACT_FAST_TILE_MIB MiB (64; on a GPU 256) for logits, a tile that fits the
    cache, and hidden's gradient in float32. With three GEMMs a block of rows keeps its logits, of the first D rows
    in the memory of the weight's gradient until that is written; bfloat16 with more rows than both hold takes
    [V, D] float32 more, for logits or, with several blocks, for the sum over them, and float16 that sum until the
    backward. A block reads and writes the sum once: a larger budget makes fewer blocks. A backward whose upstream
    gradient is not 1 (on a GPU always) writes scaled copies: scale the loss by `denominator` instead where memory
    is short.

    Args:
        hidden: [B, T, D], or packed [N, D]; float32, bfloat16, float16 or float64.
        weight, bias, logit_scale, softcap, temperature, tp_group, batch_invariant: see `linear_token_logprobs`.
        token_ids: [B, T] or [N] int32 or int64, in [0, V) where the mask is true, anything (-100) elsewhere.
        old_logprobs, ref_logprobs, importance: [B, T] or [N] float32 (float64 for float64), or None.
        advantages: like those, or one per sequence [B].
        mask: [B, T] or [N], bool or 0/1. Only rows that count reach a GEMM; nothing in the others is looked at.
        objective, aggregation, kl_coef, kl_estimator, kl_gradient, entropy_coef, denominator, cu_seqlens: see
            `policy_loss`. H is the policy's own entropy.
    Returns: PolicyLoss(loss, metrics) as `policy_loss`, with metrics["entropy"] always; differentiable once in
        hidden, weight and bias. Equal to the two lines above to rounding.
    Raises: as `linear_token_logprobs` and `policy_loss`.
    Source: gradient in the forward: Hsu et al. 2024 (Liger Kernel, arXiv:2410.10989); losses: see `policy_loss`.
    """
    token_ids = plain("token_ids", token_ids)
    given = checked(
        hidden, weight, token_ids, bias, logit_scale, softcap, temperature, mask, batch_invariant, tp_group
    )
    if token_ids.dim() not in (1, 2):
        raise ValueError(f"hidden must be [B, T, D] or packed [N, D], got {list(hidden.shape)}")
    if given.mask is None:
        raise TypeError("mask must be a torch.Tensor, got NoneType")
    like = given.hidden.new_empty(token_ids.shape, dtype=accumulation_dtype(given.hidden.dtype))
    if cu_seqlens is not None:
        check_cu_seqlens("token_ids", token_ids, cu_seqlens)
    named = (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("importance", importance))
    for name, value in named:
        if value is not None:
            check_like(name, value, like, "the log-probs")
    check_advantages(advantages, like, cu_seqlens)
    terms, tensor = checked_terms(
        objective,
        aggregation,
        kl_coef,
        kl_estimator,
        kl_gradient,
        entropy_coef,
        denominator,
        ref_logprobs,
        like,
    )
    if token_ids.dim() == 1 and cu_seqlens is None:
        refuse_without_rows(objective, aggregation)
    if use_reference():
        if tp_group is not None:
            raise ValueError("tp_group must be None on the reference backend, got a process group")
        if cu_seqlens is not None:
            _check.rising("cu_seqlens", cu_seqlens, len(token_ids), "the packed tokens")
        return reference.linear_policy_loss(
            given.hidden, given.weight, token_ids, old_logprobs, advantages, mask, objective=objective,
            aggregation=aggregation, ref_logprobs=ref_logprobs, kl_coef=terms.kl_coef, kl_estimator=kl_estimator,
            kl_gradient=kl_gradient, entropy_coef=terms.entropy_coef, importance=importance,
            denominator=denominator_value(terms.denominator, tensor) or None, cu_seqlens=cu_seqlens,
            bias=given.bias, logit_scale=given.options.scale, softcap=softcap, temperature=temperature,
        )  # fmt: skip
    tokens = Tokens(
        _constant(old_logprobs), advantages.detach(), given.mask, _constant(ref_logprobs), _constant(importance),
        cu_seqlens, tensor,
    )  # fmt: skip
    head = (given.hidden, given.weight, given.bias, token_ids, given.per_row)
    grad = torch.is_grad_enabled()
    if is_eager(given.hidden):
        loss, stats = Eager.apply(*head, given.options, tokens, terms, tp_group, grad)
    else:
        if tp_group is not None:
            raise ValueError(
                "tp_group must be None under torch.compile and for fake tensors, got a process group"
            )
        wanted = (grad and x is not None and x.requires_grad for x in head[:3])
        loss, stats, *_ = compiled(*head, *tokens, *given.options, *terms, *wanted)
    return PolicyLoss(loss, named_metrics(stats, ref_logprobs, stats, importance))


def _constant(x: Maybe) -> Maybe:
    return None if x is None else x.detach()
