"""TRL's GRPO losses: `loss_type` is the function's name, the options are those of GRPOConfig.

Shared options:
    beta: weight of the KL estimate k3, times the live ratio, or as written with use_bias_correction_kl=False.
    scale_rewards: "group" | "batch" | "none": the std, with n - 1 and eps 1e-4, that advantages are divided by.

TRL divides by the tokens of the whole generation batch (dapo, cispo, vespo) or averages over all rows, those
without a counting token too (grpo, gspo, sapo, luspo): pass that number as `denominator` where a call sees a part
of the batch or such rows. Its entropy bonus is a mean over the tokens for every loss.
Source: TRL 1.16.0, trl/trainer/grpo_trainer.py (_compute_loss) and grpo_config.py.
"""

from typing import TypedDict

from typing_extensions import Unpack

from ..ops import _check
from ..reference.objectives import CISPO, GSPO, LUSPO, SAPO, VESPO, Objective, PPOClip
from ._preset import Preset, kl_term, ratio_bounds

_SCALES = {"group": "std", "batch": "batch_std", "none": "none"}


class Shared(TypedDict, total=False):
    beta: float
    use_bias_correction_kl: bool
    scale_rewards: str


class Clip(Shared, total=False):
    """PPO's bounds as distances to 1, `epsilon_high` None: as `epsilon`; `delta`: bound of the unclipped ratio."""

    epsilon: float
    epsilon_high: float | None
    delta: float | None


def _preset(
    objective: Objective, aggregation: str, *, beta: float = 0.0, use_bias_correction_kl: bool = True,
    scale_rewards: str = "group",
) -> Preset:  # fmt: skip
    scale = _SCALES[_check.choice("scale_rewards", scale_rewards, tuple(_SCALES))]
    return Preset(
        {"baseline": "mean", "scale": scale, "eps": 1e-4, "ddof": 1},
        objective=objective,
        aggregation=aggregation,
        **kl_term(beta, gradient="ratio" if use_bias_correction_kl else "value"),
    )


def _clipped(
    kind: type[PPOClip] | type[GSPO], aggregation: str, *, epsilon: float = 0.2, epsilon_high: float | None = None,
    delta: float | None = None, **shared: Unpack[Shared],
) -> Preset:  # fmt: skip
    objective = kind(**ratio_bounds(epsilon, epsilon_high), ratio_cap=delta)
    return _preset(objective, aggregation, **shared)


def grpo(**options: Unpack[Clip]) -> Preset:
    """Mean over the sequences of the mean over the tokens of PPO's clipped ratio, epsilon 0.2."""
    return _clipped(PPOClip, "seq_mean_token_mean", **options)


def bnpo(**options: Unpack[Clip]) -> Preset:
    """Mean over the tokens of the call."""
    return _clipped(PPOClip, "token_mean", **options)


def dapo(**options: Unpack[Clip]) -> Preset:
    """GRPOConfig's default: mean over the tokens of the whole batch. The paper has epsilon_high=0.28."""
    return _clipped(PPOClip, "token_mean", **options)


def dr_grpo(*, rows: int, max_completion_length: int, **options: Unpack[Clip]) -> Preset:
    """Sum over the tokens divided by rows x max_completion_length, `rows` those of the call.

    The paper goes with scale_rewards="none"; GRPOConfig leaves it at "group".
    """
    for name, value in (("rows", rows), ("max_completion_length", max_completion_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    preset = _clipped(PPOClip, "token_sum_norm", **options)
    preset["denominator"] = rows * max_completion_length
    return preset


def gspo(
    *, epsilon: float = 3e-4, epsilon_high: float | None = 4e-4, delta: float | None = None, beta: float = 0.0,
    scale_rewards: str = "group",
) -> Preset:  # fmt: skip
    """loss_type "grpo" with importance_sampling_level="sequence"; the bounds are the paper's (GRPOConfig: 0.2).

    The KL is that of use_bias_correction_kl=False; with it TRL multiplies a token's KL by its sequence's ratio.
    """
    return _clipped(
        GSPO, "seq_mean_token_mean", epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, beta=beta,
        use_bias_correction_kl=False, scale_rewards=scale_rewards,
    )  # fmt: skip


def cispo(*, epsilon_high: float = 5.0, **shared: Unpack[Shared]) -> Preset:
    """Bounded weight; epsilon_high is the bound itself, not a distance to 1 (GRPOConfig recommends 5.0)."""
    return _preset(CISPO(ratio_max=epsilon_high), "token_mean", **shared)


def sapo(
    *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, **shared: Unpack[Shared]
) -> Preset:
    """Soft clip; mean over the sequences of the mean over the tokens."""
    return _preset(SAPO(sapo_temperature_pos, sapo_temperature_neg), "seq_mean_token_mean", **shared)


def luspo(
    *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None,
    scale_rewards: str = "group",
) -> Preset:  # fmt: skip
    """importance_sampling_level="sequence", a sequence's loss times its length. TRL's KL is unscaled: no beta."""
    return _clipped(
        LUSPO, "seq_mean_token_mean", epsilon=epsilon, epsilon_high=epsilon_high, delta=delta,
        scale_rewards=scale_rewards,
    )  # fmt: skip


def vespo(
    *, vespo_k_pos: float = 2.0, vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0, **shared: Unpack[Shared],
) -> Preset:  # fmt: skip
    """Tokens weighted by phi of their sequence's ratio; mean over the tokens of the whole batch."""
    return _preset(
        VESPO(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg), "token_mean", **shared
    )
