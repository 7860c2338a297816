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
    uniform.

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
    _check.floating("scores", scores)
    _check.shape("scores", scores, mask.shape, "mask")
    _check.device("scores", scores, advantages.device, "advantages")
    floor = _check.number("floor", floor, low=0.0, high=1.0)
    size = torch.where(keep, scores.abs(), 0.0).double()
    largest = size.amax(1, keepdim=True) if size.shape[1] else size.new_zeros(len(size), 1)
    # Dividing by the largest first: neither a row of 1e-300 nor one of 1e+300 leaves the number range.
    size = torch.where(largest == 0, 1.0, size / largest)
    size = torch.where(keep, size, 0.0)
    share = size / size.sum(1, keepdim=True)
    weights = floor + (1 - floor) * share * keep.sum(1, keepdim=True)
    return torch.where(keep, advantages[:, None] * weights.to(advantages.dtype), 0.0)


def _actions(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    _check.floating("advantages", advantages)
    if advantages.dim() != 1:
        raise ValueError(f"advantages must be [B], got {list(advantages.shape)}")
    _check.tensor("mask", mask)
    if mask.dim() != 2 or mask.shape[0] != advantages.shape[0]:
        raise ValueError(f"mask must be [{advantages.shape[0]}, T] like advantages, got {list(mask.shape)}")
    return _check.mask("mask", mask, mask.shape, "mask", advantages.device)
