"""The two models of a ground truth's texts, exact and without training: one writes them, one judges them."""

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from .slots import GroundTruth


class _Reader(nn.Module):
    """Token ids of cue and text as slot values, through an embedding that gradients can stop at."""

    weights: torch.Tensor
    pulls: torch.Tensor
    links: torch.Tensor
    parents: torch.Tensor

    def __init__(self, truth: GroundTruth) -> None:
        super().__init__()
        self.truth = truth
        self.embedding = nn.Embedding(truth.vocab_size, 1)
        on = torch.zeros(truth.vocab_size, 1)
        on[1 : 2 * truth.slots : 2] = 1.0
        self.embedding.weight = nn.Parameter(on)
        for name in ("weights", "pulls", "links"):
            self.register_buffer(name, torch.tensor(getattr(truth, name)))
        self.register_buffer("parents", torch.tensor(truth.parents))

    def _log_odds(self, values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[B, K], [B] -> [B, K]: log-odds of every slot, given U and its parent's value."""
        parent = values[:, self.parents.clamp_min(0)]
        return self.pulls * (2 * hidden[:, None] - 1) + self.links * (2 * parent - 1)


class Writer(_Reader):
    """The policy that writes as the structural causal model says: ids [B, T], cue first -> logits [B, T, V]."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        count = min(ids.shape[1], self.truth.slots)
        values = torch.zeros(len(ids), self.truth.slots, dtype=self.embedding.weight.dtype, device=ids.device)
        known = self.embedding(ids[:, 1:])[..., 0][:, : self.truth.slots]
        values = torch.cat([known, values[:, known.shape[1] :]], 1)
        odds = self._log_odds(values, (ids[:, 0] == 2 * self.truth.slots + 1).to(values))
        logits = odds.new_full((*ids.shape, self.truth.vocab_size), -torch.inf)
        logits[:, count:, self.truth.neutral_id] = 0.0
        slot = torch.arange(count, device=ids.device)
        logits[:, slot, 2 * slot] = 0.0
        logits[:, slot, 2 * slot + 1] = odds[:, :count]
        return logits


class Observer(_Reader):
    """The reward model that endless logged texts would teach: ids [B, 1 + K] -> E[R | text] in logits[:, -1, 0].

    It does not see U. From the text it infers U, so what goes with U raises its estimate:

        E[R | x] = sum_i weight_i x_i + direct P(U = 1 | x)
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = self.embedding(ids)[:, 1:, 0]
        evidence = []
        for hidden in (1.0, 0.0):
            odds = self._log_odds(values, values.new_full((len(ids),), hidden))
            evidence.append((values * logsigmoid(odds) + (1 - values) * logsigmoid(-odds)).sum(1))
        chance = torch.sigmoid(evidence[0] - evidence[1])
        estimate = values @ self.weights + self.truth.direct * chance
        return estimate[:, None, None].expand(-1, ids.shape[1], self.truth.vocab_size)
