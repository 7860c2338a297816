"""Effects accumulated over training, so that a few interventions a step are enough."""

import math

import torch

from ..ops import _check
from ..ops.moments import RunningMoments

# A prime, so that codes of a large vocabulary spread over the buckets; 1.5 MiB of moments.
BUCKETS = 65521
# Token ids are below it, so that a code holds position and token.
_TOKENS = 1_000_003
KEYS = ("token", "token_at_position")


class EffectTable:
    """Moments of measured effects by token, or by token and position in the response, in constant memory: what
    falls into the same of 65,521 buckets shares them.

    Args:
        by: "token" | "token_at_position".
        device: of the state and of what is added.
    Raises: ValueError for another name.
    """

    def __init__(self, by: str, device: torch.device | str | None = None) -> None:
        self.by = _check.choice("by", by, KEYS)
        self.moments = RunningMoments(BUCKETS, device)

    def add(self, effects: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """effects [...] float64 of actions token_ids [...] at positions [...], counted from the response's
        first.
        """
        self.moments.update(effects, self._keys(token_ids, positions))

    def effects(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[...] float64: mean effect, drawn towards 0 by what chance alone would reach.

            e_k = sign(m_k) max(0, |m_k| - sqrt(2 ln K) s / sqrt(n_k))

        with m the mean and n the count of key k, K the keys that were seen and s^2 the variance within keys,
        pooled. Unseen keys get 0, and so does everything before a key was seen twice; so does what is left below
        1e-9 of the largest mean, which is rounding.

        Source: Donoho & Johnstone 1994, the universal soft threshold.
        """
        moments, keys = self.moments.state_dict(), self._keys(token_ids, positions)
        mean, count = self.moments.mean, moments["count"]
        seen = int((count > 0).sum())
        degrees = int(count.sum()) - seen
        if degrees == 0:
            return torch.zeros_like(mean[keys])
        limit = (2 * math.log(seen) * moments["m2"].sum() / degrees).sqrt()
        size = mean[keys].abs() - limit / count[keys].clamp_min(1).double().sqrt()
        return torch.where(size > 1e-9 * mean.abs().max(), mean[keys].sign() * size, 0.0)

    def _keys(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        codes = token_ids if self.by == "token" else positions * _TOKENS + token_ids
        return codes % BUCKETS
