"""The objectives of `policy_loss` as the papers print them; surrogates.py computes them.

l = log p - log p_old clamped to +-20, r = exp(l), A the advantage; sg(x) is x without gradient. Outside of
+-20 what follows l has no gradient; a weight sg(..) in front of log p is bounded by the clamp, and log p keeps
its gradient. A token's loss may depend on its whole sequence (GSPO, GSPOToken, LUSPO, GMPO, VESPO) or on a
selection made over the whole batch (KLCov, ClipCov).
"""

from dataclasses import dataclass
from math import exp
from typing import Any

# ---- checks ------------------------------------------------------------------------------------------------


def _range(o: Any, low: str = "ratio_min", high: str = "ratio_max") -> None:
    a, b = getattr(o, low), getattr(o, high)
    if not 0 <= a <= b:
        raise ValueError(f"{low} and {high} must satisfy 0 <= {low} <= {high}, got {a} and {b}")


def _above(o: Any, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(o, name)
        if value is not None and not value > bound:
            raise ValueError(f"{name} must be above {bound:g}, got {value}")


def _fraction(o: Any) -> None:
    if not 0 < o.fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {o.fraction}")


# ---- a token by itself -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reinforce:
    """L = -A log p: the score-function estimator, without a ratio; also GPG's loss.

    A counting token with log p = -inf contributes 0: its probability cannot be moved.
    Source: Williams 1992, REINFORCE; GPG: Chu et al. 2025 (arXiv:2504.02546).
    """


@dataclass(frozen=True)
class PPOClip:
    """L = -min(min(r, ratio_cap) A, clip(r, ratio_min, ratio_max) A); where A < 0 at most -dual_clip A.

    Bounds are absolute ratios: PPO's epsilon 0.2 is (0.8, 1.2); clip-higher (DAPO) raises ratio_max alone;
    (0, inf) is the plain importance-weighted policy gradient. At a bound the gradient is the one inside it.

    Attributes:
        ratio_min, ratio_max: clip range, 0 <= ratio_min <= ratio_max.
        dual_clip: bound of the ratio where A < 0, above 1. None: no bound.
        ratio_cap: bound of the unclipped ratio, above 0 (TRL's and Liger's delta). None: no bound.
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv:1912.09729), eq.
        5; clip-higher: Yu et al. 2025 (arXiv:2503.14476); ratio_cap: INTELLECT-2 (arXiv:2505.07291), eq. 2.
    """

    ratio_min: float = 0.8
    ratio_max: float = 1.2
    dual_clip: float | None = None
    ratio_cap: float | None = None

    def __post_init__(self) -> None:
        _range(self)
        _above(self, 1, "dual_clip")
        _above(self, 0, "ratio_cap")


@dataclass(frozen=True)
class CISPO:
    """L = -sg(clip(r, ratio_min, ratio_max)) A log p: the weight is bounded, every token keeps a gradient.

    TRL's and Liger's epsilon_high is ratio_max itself, without a lower bound (the defaults); verl, slime and
    NeMo-RL clip to (1 - eps_low, 1 + eps_high): pass those. AIPO is the same loss with its rho as ratio_max.
    clip_ratio/low: the weight was raised to ratio_min; high, dual: lowered to ratio_max with A > 0, A < 0.

    Source: MiniMax-M1 2025 (arXiv:2506.13585), eq. 4; AIPO: LlamaRL 2025 (arXiv:2505.24034).
    """

    ratio_min: float = 0.0
    ratio_max: float = 5.0

    def __post_init__(self) -> None:
        _range(self)


@dataclass(frozen=True)
class SAPO:
    """L = -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg: a soft clip.

    Its slope is -A r times the gate 4 s (1 - s), s the sigmoid, which is 1 on policy.
    clip_ratio/{low,high,dual}: gate below one half with r < 1; with r > 1 and A > 0; with r > 1 and A < 0.

    Source: Gao et al. 2025 (arXiv:2511.20347), eq. 5.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        _above(self, 0, "tau_pos", "tau_neg")


@dataclass(frozen=True)
class DPPOBinaryTV:
    """L = -sg(min(r, ratio_cap) keep) A log p; keep: the token's probability moved by at most a bound.

    keep = p - p_old <= increase_max where A > 0, p_old - p <= decrease_max elsewhere: the total variation of
    the distribution over {this token, any other}. clip_ratio/{low,high}: not kept with A < 0, A > 0; dual:
    kept, capped.

    Source: DPPO 2026 (arXiv:2602.04879), as in verl's dppo_tv (clip_ratio_low, clip_ratio_high,
    clip_ratio_c).
    """

    decrease_max: float = 0.2
    increase_max: float = 0.2
    ratio_cap: float = 20.0

    def __post_init__(self) -> None:
        _above(self, 0, "decrease_max", "increase_max", "ratio_cap")


@dataclass(frozen=True)
class DPPOBinaryKL:
    """As `DPPOBinaryTV`, bounding KL(old || new) over {this token, any other} on the side that A pushes to.

    D = p_old (log p_old - log p) + (1 - p_old) log((1 - p_old + 1e-8) / (1 - p + 1e-8));
    keep = D <= increase_max or p <= p_old where A > 0, D <= decrease_max or p >= p_old elsewhere.

    Source: DPPO 2026 (arXiv:2602.04879), as in verl's dppo_kl.
    """

    decrease_max: float = 0.05
    increase_max: float = 0.05
    ratio_cap: float = 20.0

    def __post_init__(self) -> None:
        _above(self, 0, "decrease_max", "increase_max", "ratio_cap")


@dataclass(frozen=True)
class DRO:
    """L = -(A log p - beta l^2 / 2): squared distance to the old policy, no ratio. No clip fractions.

    Source: Richemond et al. 2024 (arXiv:2405.19107), with the advantage for reward minus value, as verl's
    dro.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        _above(self, 0, "beta")


# ---- selected over the batch -------------------------------------------------------------------------------


@dataclass(frozen=True)
class KLCov:
    """L = -r A, plus kl_coef |l| for the tokens of largest covariance: those that would take the entropy
    away.

    c_t = (A_t - mean A)(log p_t - mean log p), means over the counting tokens of the call; selected are the
    max(1, floor(fraction n)) largest, the earlier token first among equals. A statistic of the call:
    micro-batches select within themselves. clip_ratio/{low,high,dual}: selected with A < 0; with A > 0; 0.

    Source: Cui et al. 2025 (arXiv:2505.22617), as in verl's kl_cov.
    """

    fraction: float = 0.0002
    kl_coef: float = 1.0

    def __post_init__(self) -> None:
        _fraction(self)


@dataclass(frozen=True)
class ClipCov:
    """`PPOClip`, with L = 0 for a few tokens drawn from those of large covariance.

    Drawn from the tokens with cov_min < c_t < cov_max (c as in `KLCov`) that the clip does not hold:
    max(1, floor(fraction n)) of them, or all if they are fewer; those with the smallest hash of (their rank
    among the counting tokens, seed), so the draw repeats, and `dataclasses.replace(objective, seed=step)`
    varies it. verl draws with torch.randperm. clip_ratio/{low,high}: held by the clip as in `PPOClip`; dual:
    drawn.

    Source: Cui et al. 2025 (arXiv:2505.22617), as in verl's clip_cov.
    """

    ratio_min: float = 0.8
    ratio_max: float = 1.2
    fraction: float = 0.0002
    cov_min: float = 1.0
    cov_max: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        _range(self)
        _fraction(self)
        if not self.cov_min <= self.cov_max:
            raise ValueError(f"cov_min must not exceed cov_max, got {self.cov_min} and {self.cov_max}")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise ValueError(f"seed must be an integer in [0, 2**32), got {self.seed!r}")


# ---- a token with its sequence -----------------------------------------------------------------------------


@dataclass(frozen=True)
class GSPO:
    """`PPOClip` with one ratio for the whole sequence, s = exp(mean l): every token moves every token's
    ratio.

    L_t = -min(min(s, ratio_cap) A_t, clip(s, ratio_min, ratio_max) A_t), A_t < 0: at most -dual_clip A_t. The
    l are clamped one by one, so s stays in e^(+-20), and a clamped token alone loses its gradient. The
    paper's aggregation is "seq_mean_token_mean". TRL's importance_sampling_level="sequence" and OpenRLHF's
    gspo are this; verl's gspo is `GSPOToken`: the same values, and with one advantage and weight a sequence
    the same gradient. ratio/{mean,max} are those of s; clip fractions count the tokens of held sequences.

    Source: Zheng et al. 2025 (arXiv:2507.18071), eq. 5 to 7 and its bounds 3e-4, 4e-4.
    """

    ratio_min: float = 1 - 3e-4
    ratio_max: float = 1 + 4e-4
    dual_clip: float | None = None
    ratio_cap: float | None = None

    def __post_init__(self) -> None:
        _range(self)
        _above(self, 1, "dual_clip")
        _above(self, 0, "ratio_cap")


@dataclass(frozen=True)
class GSPOToken(GSPO):
    """`GSPO` with s_t = sg(s) p_t / sg(p_t): the value of s, the gradient of the token alone.

    Differs from `GSPO` where advantages, or importance weights, vary within a sequence.

    Source: Zheng et al. 2025 (arXiv:2507.18071), eq. 13, 14; verl's gspo.
    """


@dataclass(frozen=True)
class LUSPO(GSPO):
    """`GSPO` times the number of counting tokens of the sequence, L_t = n_s L_t^GSPO: long answers keep their
    weight.

    With "seq_mean_token_mean" that is the paper's, TRL's and Liger's sequence-level luspo, and the same as
    `GSPO` with "seq_mean_token_sum". With token-level ratios TRL's luspo is `PPOClip` with "seq_mean_token_sum",
    Liger's that times n_s over the padded length.

    Source: "Length-Unbiased Sequence Policy Optimization" 2026 (arXiv:2602.05261).
    """


@dataclass(frozen=True)
class GMPO:
    """L_t = -A_t g, g = exp(mean l'), l' the log-ratio clipped on the side that A pushes to: a geometric
    mean.

    l'_t = min(l_t, log ratio_max) where A_t > 0, max(l_t, log ratio_min) where A_t < 0, 0 where A_t = 0. The
    paper's aggregation is "seq_mean_token_mean". verl's geo_mean has the bounds as log-ratios,
    (-clip_ratio_low, clip_ratio_high), and takes importance weights to their geometric mean first: pass
    weights of that level. ratio/{mean,max} are those of the tokens; clip_ratio/{low,high}: a held l' with A <
    0, A > 0.

    Source: Zhao et al. 2025 (arXiv:2507.20673), eq. 5 and its bounds e^-0.4, e^0.4.
    """

    ratio_min: float = exp(-0.4)
    ratio_max: float = exp(0.4)

    def __post_init__(self) -> None:
        _range(self)
        _above(self, 0, "ratio_min")


@dataclass(frozen=True)
class VESPO:
    """L_t = -sg(phi(W)) A_t log p_t with W = p / p_old of the whole sequence and phi(W) = W^k exp(lambda (1 -
    W)).

    log W = sum over the sequence of l_t + log importance_t, the latter in [log 1e-8, 20]; the sum too.
    importance enters W only and does not multiply L, as in TRL and Liger. (k_pos, lambda_pos) where A_t >= 0,
    else the others. ratio/{mean,max} are those of W; clip_ratio/{low,high,dual}: phi below one half with W <
    1; with W > 1 and A >= 0; with W > 1 and A < 0.

    Source: VESPO 2026 (arXiv:2602.10693); constants of TRL.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        _above(self, 0, "k_pos", "lambda_pos", "k_neg", "lambda_neg")


Objective = (
    Reinforce | PPOClip | CISPO | SAPO | DPPOBinaryTV | DPPOBinaryKL | DRO | KLCov | ClipCov | GSPO |
    GSPOToken | LUSPO | GMPO | VESPO
)  # fmt: skip
