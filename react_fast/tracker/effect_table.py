"""Effects accumulated over training, so that a few interventions a step are enough."""

import math
from typing import Any

import torch

from ..ops import _check
from ..ops.moments import RunningMoments

# A prime, so that codes of a large vocabulary spread over the buckets; 1.5 MiB of moments.
BUCKETS = 65521
# Token ids are below it, so that a code holds position and token.
_TOKENS = 1_000_003
# Half-life in steps: below it a weight is 0 within a few of them.
SHORTEST = 0.01
# Of sums of weights.
_ROUNDING = 1e-12
KEYS = ("token", "token_at_position")


class EffectTable:
    """Moments of measured effects by token, or by token and position in the response, in constant memory: what
    falls into the same of 65,521 buckets shares them.

    Args:
        by: "token" | "token_at_position".
        device: of the state and of what is added.
        half_life: steps after which an effect counts half of what a new one does; None: all count alike.
    Raises: ValueError for another name, or a half-life below 0.01, TypeError for one that is no number.
    """

    def __init__(
        self, by: str, device: torch.device | str | None = None, *, half_life: float | None = None
    ) -> None:
        self.by = _check.choice("by", by, KEYS)
        if half_life is not None:
            _check.number("half_life", half_life, low=SHORTEST)
        self.step = 0
        self.moments = RunningMoments(
            BUCKETS, device, decay=1.0 if half_life is None else 0.5 ** (1 / half_life)
        )

    def advance(self, step: int) -> None:
        """Training is at this step."""
        self.moments.advance(max(0, step - self.step))
        self.step = max(self.step, step)

    def add(self, effects: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """effects [...] float64 of actions token_ids [...] at positions [...], counted from the response's
        first.
        """
        self.moments.update(effects, self._keys(token_ids, positions))

    def effects(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[...] float64: mean effect, drawn towards 0 by what chance alone would reach.

            e_k = sign(m_k) max(0, |m_k| - sqrt(2 ln K) s / sqrt(W_k))
            s^2 = sum_k sum_i w_i (x_i - m_k)^2 / sum_k (W_k - sum_i w_i^2 / W_k)

        with w the weights of the effects x of key k, 1 without decay, W their sum, m their mean, K the keys that
        were seen and s^2 the variance within keys, pooled. As weights decay what is known of a key does, too: the
        effect of one that is no longer measured fades. Unseen keys get 0, and so does everything before a key was
        seen twice; so does what is left below 1e-9 of the largest mean, which is rounding.

        Source: Donoho & Johnstone 1994, the universal soft threshold; West & Harrison 1997, section 2.4, for
            information that is discounted step by step.
        """
        moments, keys = self.moments, self._keys(token_ids, positions)
        mean, weight = moments.mean, moments.weight
        seen = int((moments.count > 0).sum())
        share = torch.where(weight > 0, weight / moments.effective_count, 0.0)
        degrees = float((weight - share).sum())
        if degrees <= _ROUNDING * float(weight.sum()):
            return torch.zeros_like(mean[keys])
        limit = (2 * math.log(seen) * (moments.state_dict()["m2"] * share).sum() / degrees).sqrt()
        known = weight[keys] > 0
        size = mean[keys].abs() - limit / torch.where(known, weight[keys], 1.0).sqrt()
        return torch.where(known & (size > 1e-9 * mean.abs().max()), mean[keys].sign() * size, 0.0)

    @property
    def setting(self) -> str:
        """What the effects that are kept hang on, in words."""
        return f"{self.by} {'without' if self.moments.decay == 1 else 'with'} a half-life"

    def state_dict(self) -> dict[str, Any]:
        return {"setting": self.setting, "step": self.step, "moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a `state_dict` of the same `setting`; half-lives may differ, and act from here on."""
        self.moments.load_state_dict(state["moments"])
        self.step = int(state["step"])

    def _keys(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        codes = token_ids if self.by == "token" else positions * _TOKENS + token_ids
        return codes % BUCKETS
