"""The equations of objectives.py: losses of the counting tokens of a sequence, and selections over a batch."""

from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

import torch

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

_INF = float("inf")
MAX_LOG_RATIO = 20.0


class Tokens(NamedTuple):
    """The counting tokens of one sequence, each [n]."""

    logp: torch.Tensor
    old: torch.Tensor
    log_ratio: torch.Tensor  # clamped, without gradient where it was
    A: torch.Tensor
    importance: torch.Tensor  # ones where there is none
    selected: torch.Tensor  # by KLCov and ClipCov


class Surrogate(NamedTuple):
    """Loss of every token, what a bound holds (low, high, dual as the objective's docstring says), its ratio."""

    loss: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    dual: torch.Tensor
    ratio: torch.Tensor


def _weighted_logp(t: Tokens, weight: torch.Tensor) -> torch.Tensor:
    """-sg(weight) A log p; 0 for a token that the policy forbids."""
    possible = t.logp != -_INF
    return torch.where(possible, -weight.detach() * t.A * torch.where(possible, t.logp, 0.0), 0.0)


def _reinforce(o: Reinforce, t: Tokens) -> Surrogate:
    never = torch.zeros_like(t.A, dtype=torch.bool)
    return Surrogate(_weighted_logp(t, torch.ones_like(t.A)), never, never, never, t.log_ratio.exp())


def _clip(o: Any, r: torch.Tensor, A: torch.Tensor) -> Surrogate:
    cap = _INF if o.ratio_cap is None else o.ratio_cap
    dual = _INF if o.dual_clip is None else o.dual_clip
    capped, clipped = r.clamp(max=cap), r.clamp(o.ratio_min, o.ratio_max)
    gain = torch.minimum(capped * A, clipped * A)
    if o.dual_clip is not None:  # clamp, not maximum: at the bound itself the gradient passes whole
        gain = torch.where(A < 0, torch.clamp(gain, min=dual * A), gain)
    below = (A < 0) & (r < o.ratio_min)
    above = (A > 0) & (r > min(o.ratio_max, cap))
    over = (r > max(o.ratio_max, cap)) | (torch.maximum(capped, clipped) > dual)
    return Surrogate(-gain, below, above, (A < 0) & over & ~below, r)


def _ppo_clip(o: PPOClip, t: Tokens) -> Surrogate:
    return _clip(o, t.log_ratio.exp(), t.A)


def _cispo(o: CISPO, t: Tokens) -> Surrogate:
    r = t.log_ratio.exp()
    above = r > o.ratio_max
    low = (r < o.ratio_min) & (t.A != 0)
    loss = _weighted_logp(t, r.clamp(o.ratio_min, o.ratio_max))
    return Surrogate(loss, low, above & (t.A > 0), above & (t.A < 0), r)


_Held = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _faded(
    gate: torch.Tensor, r: torch.Tensor, t: Tokens, positive: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(low, high, dual) of a soft gate: below one half, by the side of the ratio and of the advantage."""
    faded = (gate < 0.5) & (t.A != 0)
    return faded & (r < 1), faded & (r > 1) & positive, faded & (r > 1) & ~positive


def _either(condition: torch.Tensor, yes: float, no: float, like: torch.Tensor) -> torch.Tensor:
    """One of two numbers, in the dtype of `like` (torch.where of two numbers is float32)."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def _sapo(o: SAPO, t: Tokens) -> Surrogate:
    r = t.log_ratio.exp()
    tau = _either(t.A > 0, o.tau_pos, o.tau_neg, r)
    s = torch.sigmoid(tau * (r - 1))
    low, high, dual = _faded(4 * s * (1 - s), r, t, t.A > 0)
    return Surrogate(-t.A * (4 / tau) * s, low, high, dual, r)


def _dppo(o: Any, t: Tokens, kept: torch.Tensor) -> Surrogate:
    r = t.log_ratio.exp()
    loss = _weighted_logp(t, r.clamp(max=o.ratio_cap) * kept)
    return Surrogate(loss, ~kept & (t.A < 0), ~kept & (t.A > 0), kept & (r > o.ratio_cap), r)


def _dppo_tv(o: DPPOBinaryTV, t: Tokens) -> Surrogate:
    move = t.logp.exp() - t.old.exp()
    return _dppo(o, t, torch.where(t.A > 0, move <= o.increase_max, -move <= o.decrease_max))


def _dppo_kl(o: DPPOBinaryKL, t: Tokens) -> Surrogate:
    p, p_old = t.logp.exp(), t.old.exp()
    rest = torch.log((1e-8 - torch.expm1(t.old)) / (1e-8 - torch.expm1(t.logp)))
    kl = -p_old * t.log_ratio + (1 - p_old) * rest
    up, down = (kl <= o.increase_max) | (p <= p_old), (kl <= o.decrease_max) | (p >= p_old)
    return _dppo(o, t, torch.where(t.A > 0, up, down))


def _dro(o: DRO, t: Tokens) -> Surrogate:
    plain = _reinforce(Reinforce(), t)
    return plain._replace(loss=plain.loss + o.beta / 2 * t.log_ratio**2)


def _kl_cov(o: KLCov, t: Tokens) -> Surrogate:
    r = t.log_ratio.exp()
    loss = -t.A * r + torch.where(t.selected, o.kl_coef * t.log_ratio.abs(), 0.0)
    never = torch.zeros_like(t.selected)
    return Surrogate(loss, t.selected & (t.A < 0), t.selected & (t.A > 0), never, r)


def _clip_cov(o: ClipCov, t: Tokens) -> Surrogate:
    s = _ppo_clip(PPOClip(o.ratio_min, o.ratio_max), t)
    return s._replace(loss=torch.where(t.selected, 0.0, s.loss), dual=t.selected)


def _gspo(o: GSPO, t: Tokens) -> Surrogate:
    return _clip(o, (t.log_ratio.sum() / max(t.A.numel(), 1)).exp().expand_as(t.A), t.A)


def _gspo_token(o: GSPOToken, t: Tokens) -> Surrogate:
    mean = (t.log_ratio.sum() / max(t.A.numel(), 1)).detach()
    return _clip(o, (mean + (t.log_ratio - t.log_ratio.detach())).exp(), t.A)


def _luspo(o: LUSPO, t: Tokens) -> Surrogate:
    s = _gspo(o, t)
    return s._replace(loss=t.A.numel() * s.loss)


def _gmpo(o: GMPO, t: Tokens) -> Surrogate:
    x, high, low = t.log_ratio, log(o.ratio_max), log(o.ratio_min)
    held = torch.where(t.A > 0, x.clamp(max=high), torch.where(t.A < 0, x.clamp(min=low), 0.0))
    g = (held.sum() / max(t.A.numel(), 1)).exp()
    never = torch.zeros_like(t.A, dtype=torch.bool)
    return Surrogate(-t.A * g, (t.A < 0) & (x < low), (t.A > 0) & (x > high), never, x.exp())


def _vespo(o: VESPO, t: Tokens) -> Surrogate:
    log_importance = t.importance.log().clamp(log(1e-8), 20.0)
    log_w = (t.log_ratio.detach() + log_importance).sum().clamp(log(1e-8), 20.0)
    positive = t.A >= 0
    k, lam = _either(positive, o.k_pos, o.k_neg, log_w), _either(positive, o.lambda_pos, o.lambda_neg, log_w)
    phi = (k * log_w - lam * torch.expm1(log_w)).exp()
    w = log_w.exp().expand_as(t.A)
    low, high, dual = _faded(phi, w, t, positive)
    return Surrogate(_weighted_logp(t, phi), low, high, dual, w)


class Rule(NamedTuple):
    surrogate: Callable[[Any, Tokens], Surrogate]
    takes_importance: bool = False  # the objective has used it; else it multiplies the loss


RULES: dict[type, Rule] = {
    Reinforce: Rule(_reinforce),
    PPOClip: Rule(_ppo_clip),
    CISPO: Rule(_cispo),
    SAPO: Rule(_sapo),
    DPPOBinaryTV: Rule(_dppo_tv),
    DPPOBinaryKL: Rule(_dppo_kl),
    DRO: Rule(_dro),
    KLCov: Rule(_kl_cov),
    ClipCov: Rule(_clip_cov),
    GSPO: Rule(_gspo),
    GSPOToken: Rule(_gspo_token),
    LUSPO: Rule(_luspo),
    GMPO: Rule(_gmpo),
    VESPO: Rule(_vespo, takes_importance=True),
}


# ---- the selections, over the counting tokens of the batch in order ----------------------------------------


def _hash(rank: torch.Tensor, seed: int) -> torch.Tensor:
    """32 bits of every rank, a bijection for a given seed: the finaliser of MurmurHash3."""
    x = (rank * 0x9E3779B9 + seed) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def selection(objective: Any, logp: torch.Tensor, old: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """bool [n] for all counting tokens of the batch: what KLCov or ClipCov selects; nothing for the others.

    A token with log p = -inf is never selected.
    """
    chosen = torch.zeros_like(A, dtype=torch.bool)
    if not isinstance(objective, KLCov | ClipCov) or not A.numel():
        return chosen
    possible = logp != -_INF
    mean = torch.where(possible, logp, 0.0).sum() / possible.sum().clamp(min=1)
    covariance = torch.where(possible, (A - A.mean()) * (logp - mean), -_INF)
    wanted = max(1, int(objective.fraction * A.numel()))
    if isinstance(objective, KLCov):
        order = torch.argsort(covariance, descending=True, stable=True)[:wanted]
        chosen[order] = possible[order]
        return chosen
    r = (logp - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    held = ((A < 0) & (r < objective.ratio_min)) | ((A > 0) & (r > objective.ratio_max))
    drawn = (covariance > objective.cov_min) & (covariance < objective.cov_max) & ~held
    candidates = drawn.nonzero()[:, 0]
    chosen[candidates[torch.argsort(_hash(candidates, objective.seed))[:wanted]]] = True
    return chosen
