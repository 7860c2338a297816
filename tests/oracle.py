"""Log-probs and entropies by way of all the logits, in plain torch: shares no line with react_fast."""

import torch


def from_logits(logits, ids, *, mask=None, softcap=None, temperature=1.0):
    """(logp, H) of logits [..., V] and ids [...], differentiable, in the dtype of `logits`; 0 where masked."""
    # A row of zeros in place of a masked one, whose NaN would reach the gradient through a where of results.
    x = logits if mask is None else torch.where(mask.unsqueeze(-1), logits, 0.0)
    allowed = x != float("-inf")
    x = torch.where(allowed, x, 0.0)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    z = x / torch.as_tensor(temperature, dtype=x.dtype).unsqueeze(-1)
    logs = torch.log_softmax(z.masked_fill(~allowed, float("-inf")), -1)
    chosen = ids if mask is None else ids.where(mask, 0)
    logp = logs.gather(-1, chosen.long().unsqueeze(-1)).squeeze(-1)
    entropy = -(logs.exp() * logs.masked_fill(~allowed, 0.0)).sum(-1)
    if mask is None:
        return logp, entropy
    return torch.where(mask, logp, 0.0), torch.where(mask, entropy, 0.0)


def from_hidden(hidden, weight, ids, *, bias=None, logit_scale=1.0, **options):
    """(logp, H) of logits = logit_scale * (hidden @ weight.T + bias)."""
    x = hidden @ weight.T
    return from_logits(logit_scale * (x if bias is None else x + bias), ids, **options)
