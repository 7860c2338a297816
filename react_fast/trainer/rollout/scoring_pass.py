"""Log-probabilities of finished samples, for engines that return token ids alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .sampling import Sample, SamplingParams
from .truncation import kept_floors


@torch.no_grad()
def score_samples(
    model: Any,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    params: SamplingParams,
    pad_id: int,
    batch_size: int = 16,
) -> None:
    """Fill in, in place, what the samples lack: log-probabilities where they are NaN, and logit floors if `params`
    truncates. One forward without a cache over prompt and action, padded on the right.

    Args:
        model: Hugging Face causal LM, in evaluation mode here and left as it was. batch_size: rows of a forward.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for first in range(0, len(samples), batch_size):
        part = range(first, min(first + batch_size, len(samples)))
        rows = [[*prompts[i], *samples[i].ids] for i in part]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
        seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        for row, i in zip(logits, part, strict=True):
            start = len(prompts[i]) - 1
            _score(row[start : start + len(samples[i].ids)].float(), samples[i], params)
    model.train(was_training)


def _score(logits: torch.Tensor, sample: Sample, params: SamplingParams) -> None:
    tokens = torch.tensor(sample.ids, device=logits.device)[:, None]
    if params.truncated:
        # A token that rounding puts just below the floor was kept by the sampler all the same.
        floors = torch.minimum(kept_floors(logits, params), logits.gather(1, tokens).squeeze(1))
        logits = logits.masked_fill(logits < floors[:, None], -math.inf)
        sample.logit_floors = floors.tolist()
    found = torch.log_softmax(logits / params.temperature, -1).gather(1, tokens).squeeze(1).tolist()
    sample.logprobs = [
        new if math.isnan(old) else old for old, new in zip(sample.logprobs, found, strict=True)
    ]
