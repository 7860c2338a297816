"""Credit: how a trajectory's advantage is spread over its actions."""

import torch

from ..ops import _check


def uniform_credit(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every action gets its trajectory's advantage.

    Args:
        advantages: [B] floating.
        mask: [B, T] bool or 0/1 integers, true where an action stands.
    Returns: [B, T], dtype of `advantages`; 0 where the mask is false, whatever the advantage.
    Raises: TypeError for another dtype, ValueError if shapes or devices differ.
    """
    keep = _actions(advantages, mask)
    return torch.where(keep, advantages[:, None], 0.0)


def attribution_credit(
    advantages: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, *, floor: float = 0.5
) -> torch.Tensor:
    """An action gets its trajectory's advantage in proportion to the size of its score, above a floor.

        credit_t = advantage * w_t        w_t = floor + (1 - floor) * n |s_t| / sum_i |s_i|

    with n and the sum over the row's actions. The weights of a row have the mean 1, so a row's credit sums to
    what uniform credit gives it, and no action's sign is turned. A row without any signal (all scores 0) is
    uniform. Weights that hang on what was sampled make the policy gradient biased unless floor is 1.

    Args:
        advantages: [B] floating.
        scores: [B, T] floating. Attribution of every token; only its size counts, only where `mask` is true.
        mask: [B, T] bool or 0/1 integers, true where an action stands.
        floor: share in [0, 1] that stays uniform; 1 is uniform credit.
    Returns: [B, T], dtype of `advantages`; 0 where the mask is false. NaN or inf in a row's counting scores
        or in its advantage gives NaN in that row.
    Raises: TypeError for another dtype, ValueError if shapes or devices differ or floor is outside [0, 1].
    """
    keep = _actions(advantages, mask)
    _scores("scores", scores, mask, advantages, floor)
    return _spread(advantages[:, None], scores.abs(), keep, floor)


def causal_credit(
    advantages: torch.Tensor, effects: torch.Tensor, mask: torch.Tensor, *, floor: float = 0.1
) -> torch.Tensor:
    """An action gets its trajectory's advantage in proportion to its effect, where effect and advantage agree in
    sign: what raised the outcome takes the praise, what lowered it the blame, the rest the floor.

        credit_t = advantage * w_t        w_t = floor + (1 - floor) * n s_t / sum_i s_i
        s_t = max(0, sign(advantage) effect_t)

    with n and the sum over the row's actions. The weights of a row have the mean 1, so a row's credit sums to
    what uniform credit gives it, and no action's sign is turned. A row in which no effect agrees is uniform.

    Bias and variance: uniform credit and Monte-Carlo step advantages keep the policy gradient unbiased. These
    weights hang on the sampled actions, so they do not, unless floor is 1; what they buy is that actions without
    an effect no longer carry the noise of those that have one.

    Args:
        advantages: [B] floating, or [B, T], one an action, whose credit then sums to the same only where a row's
            are equal.
        effects: [B, T] floating. E[outcome] - E[outcome | do(action := another)], only where `mask` is true.
        mask: [B, T] bool or 0/1 integers, true where an action stands.
        floor: share in [0, 1] that stays uniform; 1 is uniform credit.
    Returns: [B, T], dtype of `advantages`; 0 where the mask is false. NaN or inf in a row's counting effects
        or in its advantage gives NaN in that row.
    Raises: TypeError for another dtype, ValueError if shapes or devices differ or floor is outside [0, 1].
    Source: credit by counterfactual actions: Foerster et al. 2018, COMA (arXiv:1705.08926), which subtracts the
        counterfactual as a baseline; by what an action changes: Harutyunyan et al. 2019, HCA (arXiv:1912.02503).
    """
    level = advantages[:, None] if advantages.dim() == 1 else advantages
    keep = _actions(level[:, 0] if level.shape[1:] != (0,) else level.new_zeros(len(level)), mask)
    if level.dim() != 2 or level.shape[1] not in (1, keep.shape[1]):
        raise ValueError(
            f"advantages must be [B] or {list(keep.shape)} like mask, got {list(advantages.shape)}"
        )
    _scores("effects", effects, mask, advantages, floor)
    return _spread(level, (level.sign() * effects).clamp_min(0), keep, floor)


def _spread(level: torch.Tensor, size: torch.Tensor, keep: torch.Tensor, floor: float) -> torch.Tensor:
    """[B, 1] or [B, T] advantages times weights: above the floor in proportion to `size` [B, T], not negative."""
    size = torch.where(keep, size, 0.0).double()
    largest = size.amax(1, keepdim=True) if size.shape[1] else size.new_zeros(len(size), 1)
    # Dividing by the largest first: neither a row of 1e-300 nor one of 1e+300 leaves the number range.
    size = torch.where(largest == 0, 1.0, size / largest)
    size = torch.where(keep, size, 0.0)
    share = size / size.sum(1, keepdim=True)
    weights = floor + (1 - floor) * share * keep.sum(1, keepdim=True)
    return torch.where(keep, level * weights.to(level.dtype), 0.0)


def _scores(
    name: str, scores: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, floor: float
) -> None:
    _check.floating(name, scores)
    _check.shape(name, scores, mask.shape, "mask")
    _check.device(name, scores, advantages.device, "advantages")
    _check.number("floor", floor, low=0.0, high=1.0)


def _actions(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    _check.floating("advantages", advantages)
    if advantages.dim() != 1:
        raise ValueError(f"advantages must be [B], got {list(advantages.shape)}")
    _check.tensor("mask", mask)
    if mask.dim() != 2 or mask.shape[0] != advantages.shape[0]:
        raise ValueError(f"mask must be [{advantages.shape[0]}, T] like advantages, got {list(mask.shape)}")
    return _check.mask("mask", mask, mask.shape, "mask", advantages.device)
