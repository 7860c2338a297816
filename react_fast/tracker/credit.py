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
    _check.floating("advantages", advantages)
    if advantages.dim() != 1:
        raise ValueError(f"advantages must be [B], got {list(advantages.shape)}")
    level, keep = _levels(advantages, mask)
    return torch.where(keep, level, 0.0)


def attribution_credit(
    advantages: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, *, floor: float = 0.5
) -> torch.Tensor:
    """An action gets its trajectory's advantage in proportion to the size of its score, above a floor.

        credit_t = A_t w_t        w_t = floor + (1 - floor) |s_t| sum_i A_i / sum_i A_i |s_i|

    with the sums over the row's actions whose advantage has the sign of A_t. So the positive credit of a row sums
    to what uniform credit gives it, the negative too, and no action's sign is turned. Where no score of a sign
    counts (all are 0) credit is uniform. Weights that hang on what was sampled make the policy gradient biased
    unless floor is 1.

    Args:
        advantages: [B] floating, or [B, T], one an action.
        scores: [B, T] floating. Attribution of every token; only its size counts, only where `mask` is true.
        mask: [B, T] bool or 0/1 integers, true where an action stands.
        floor: share in [0, 1] that stays uniform; 1 is uniform credit.
    Returns: [B, T], dtype of `advantages`; 0 where the mask is false. NaN or inf in a row's counting scores
        or in its advantage gives NaN in that row.
    Raises: TypeError for another dtype, ValueError if shapes or devices differ or floor is outside [0, 1].
    """
    level, keep = _levels(advantages, mask)
    _scores("scores", scores, mask, advantages, floor)
    return _spread(level, scores.abs(), keep, floor)


def causal_credit(
    advantages: torch.Tensor, effects: torch.Tensor, mask: torch.Tensor, *, floor: float = 0.5
) -> torch.Tensor:
    """An action gets its trajectory's advantage, and above the floor its own effect less the row's mean effect.

        credit_t = A_t + (1 - floor) w_i (e_t - mean_i e)        w_i = min(n_i, mean A^2 / mean e^2)

    with the mean over the n_i actions of row i whose effect is known, that of A^2 over all actions of all rows and
    that of e^2 over all whose effect is known. So a row's credit sums to what uniform credit gives it.

    Bias and variance: an effect whose mean, given what came before, is the action's advantage (as that of an
    action against what the policy would have drawn) leaves the policy gradient's direction as it is and is weighed
    against A as two estimates of one number are, by the inverse of their variances: w is large where effects are
    small but for a few actions, and near 0 where they are noisier than A. w_i = n_i gives an action all that its
    effect explains of the row's total. Other effects bias the gradient, unless floor is 1.

    Args:
        advantages: [B] floating, or [B, T], one an action.
        effects: [B, T] floating, in the unit of the advantages. E[outcome] - E[outcome | do(action := another)],
            only where `mask` is true; NaN where it is not known.
        mask: [B, T] bool or 0/1 integers, true where an action stands.
        floor: share in [0, 1] of what effects say that is left out; 1 is uniform credit.
    Returns: [B, T], dtype of `advantages`; 0 where the mask is false. An infinite effect, or NaN or inf in a row's
        advantage, gives NaN in that row.
    Raises: TypeError for another dtype, ValueError if shapes or devices differ or floor is outside [0, 1].
    Source: credit by counterfactual actions: Foerster et al. 2018, COMA (arXiv:1705.08926); a total that is
        divided among the actions which made it: Arjona-Medina et al. 2019, RUDDER (arXiv:1806.07857).
    """
    level, keep = _levels(advantages, mask)
    _scores("effects", effects, mask, advantages, floor)
    known = keep & ~effects.isnan()
    lost = ((keep & ~level.isfinite()) | (known & effects.isinf())).any(1, keepdim=True)
    counts = known & ~lost
    effect = torch.where(counts, effects.double(), 0.0)
    outcome = torch.where(keep & ~lost, level.double(), 0.0)
    if floor < 1 and bool((effect != 0).any()):
        # Relative to the largest, so that squares stay in the number range.
        largest, highest = effect.abs().max(), outcome.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        effect, count = effect / largest, counts.sum(1, keepdim=True)
        ratio = (
            (outcome / highest).square().sum() / effect.square().sum() * counts.sum() / (keep & ~lost).sum()
        )
        weight = torch.minimum(count * largest, ratio * (highest / largest) * highest)
        above = weight * (effect - effect.sum(1, keepdim=True) / count.clamp_min(1))
        level = level + torch.where(counts, (1 - floor) * above, 0.0).to(level.dtype)
    return torch.where(keep, torch.where(lost, torch.nan, level), 0.0)


def _spread(level: torch.Tensor, size: torch.Tensor, keep: torch.Tensor, floor: float) -> torch.Tensor:
    """[B, T] advantages times weights: above the floor in proportion to `size` [B, T], not negative, among the
    actions of one sign."""
    if keep.numel() == 0:
        return level.new_zeros(keep.shape)
    weights = torch.ones(keep.shape, dtype=torch.float64, device=keep.device)
    for part in (keep & (level > 0), keep & (level < 0)):
        share, amount = _relative(size, part), _relative(level, part)
        total = (amount * share).sum(1, keepdim=True)
        share = floor + (1 - floor) * share * (amount.sum(1, keepdim=True) / total)
        weights = torch.where(part & (total > 0), share, weights)
    lost = (keep & ~(size.isfinite() & level.isfinite())).any(1, keepdim=True)
    credit = torch.where(lost, torch.nan, level * weights.to(level.dtype))
    return torch.where(keep, credit, 0.0)


def _relative(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """[B, T] float64 sizes as shares of a row's largest within `part`, 0 outside: neither a row of 1e-300 nor one
    of 1e+300 leaves the number range."""
    size = torch.where(part, x.double().abs(), 0.0)
    largest = size.amax(1, keepdim=True)
    return torch.where(largest > 0, size / largest, 0.0)


def _scores(
    name: str, scores: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, floor: float
) -> None:
    _check.floating(name, scores)
    _check.shape(name, scores, mask.shape, "mask")
    _check.device(name, scores, advantages.device, "advantages")
    _check.number("floor", floor, low=0.0, high=1.0)


def _levels(advantages: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] advantage of every token, and [B, T] bool, whether it is an action."""
    _check.floating("advantages", advantages)
    _check.tensor("mask", mask)
    if advantages.dim() not in (1, 2):
        raise ValueError(f"advantages must be [B] or [B, T], got {list(advantages.shape)}")
    if mask.dim() != 2 or mask.shape[0] != advantages.shape[0]:
        raise ValueError(f"mask must be [{advantages.shape[0]}, T] like advantages, got {list(mask.shape)}")
    if advantages.dim() == 2 and advantages.shape != mask.shape:
        raise ValueError(
            f"advantages must be [B] or {list(mask.shape)} like mask, got {list(advantages.shape)}"
        )
    keep = _check.mask("mask", mask, mask.shape, "mask", advantages.device)
    return (advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages), keep
