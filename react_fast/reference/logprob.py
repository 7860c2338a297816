"""Token log-probabilities as the equations say it; see react_fast.ops.logprob for shapes and errors."""

import torch


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    logit_floor: torch.Tensor | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`inplace_backward` changes where the gradient is written, not what it is: nothing to do here."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = logits.shape[:-1]
    rows = shape.numel()
    several = token_ids.dim() == logits.dim()
    ids = token_ids.reshape(rows, token_ids.shape[-1] if several else 1).tolist()
    counts = [True] * rows if mask is None else mask.reshape(-1).tolist()
    if isinstance(temperature, torch.Tensor):
        temperatures = temperature.reshape(-1).tolist()
    else:
        temperatures = [temperature] * rows
    floors = [float("-inf")] * rows if logit_floor is None else logit_floor.reshape(-1).tolist()
    logps, entropies = [], []
    for i, x in enumerate(logits.reshape(rows, logits.shape[-1])):
        if counts[i]:
            logp, entropy = _row(i, x.to(wide), ids[i], temperatures[i], softcap, floors[i])
        else:
            entropy = x[:0].to(wide).sum()
            logp = entropy.expand(len(ids[i]))
        logps.append(logp)
        entropies.append(entropy)
    none = logits.new_empty(0, dtype=wide)
    logp = (torch.stack(logps) if logps else none).view(token_ids.shape)
    entropy = (torch.stack(entropies) if entropies else none).view(shape)
    return (logp, entropy) if return_entropy else logp


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = []
    for h in hidden.reshape(-1, hidden.shape[-1]):
        x = weight.to(wide) @ h.to(wide)
        rows.append(logit_scale * (x if bias is None else x + bias.to(wide)))
    logits = torch.stack(rows) if rows else hidden.new_empty((0, len(weight)), dtype=wide)
    if support is not None:
        outside = ~_on_support(token_ids, mask, len(weight), *support)
        logits = logits.masked_fill(outside, float("-inf"))
    return token_logprobs(
        logits.view(*hidden.shape[:-1], len(weight)), token_ids, temperature=temperature, softcap=softcap,
        mask=mask, return_entropy=return_entropy,
    )  # fmt: skip


def _on_support(
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    vocab: int,
    kept_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """[N, V] bool: the kept ids of every row that counts, and its token."""
    ids, kept, edges = token_ids.reshape(-1).tolist(), kept_ids.tolist(), offsets.tolist()
    if edges[0] != 0 or edges[-1] != len(kept) or edges != sorted(edges):
        raise ValueError(f"support[1] (offsets) must rise from 0 to {len(kept)} like kept_ids, got {edges}")
    counts = [True] * len(ids) if mask is None else mask.reshape(-1).tolist()
    inside = torch.zeros(len(ids), vocab, dtype=torch.bool, device=token_ids.device)
    for i, y in enumerate(ids):
        if not counts[i] or not 0 <= y < vocab:
            continue  # token_logprobs refuses such a y
        inside[i, y] = True
        for j in kept[edges[i] : edges[i + 1]]:
            if not 0 <= j < vocab:
                raise IndexError(
                    f"support[0] (kept_ids) must be in [0, {vocab}) where mask is true, got {j} in row {i}"
                )
            inside[i, j] = True
    return inside


def _row(
    i: int, x: torch.Tensor, ids: list[int], temperature: float, softcap: float | None, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each id, [K], and the entropy, []."""
    for y in ids:
        if not 0 <= y < len(x):
            raise IndexError(f"token_ids must be in [0, {len(x)}) where mask is true, got {y} in row {i}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature:g} in row {i}")
    if floor != floor:
        raise ValueError(f"logit_floor must be no NaN where mask is true, got nan in row {i}")
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    kept = ~(x.double() < floor)
    for y in ids:
        kept[y] = True
    kept = kept & (x != float("-inf"))
    nothing = x[:0].sum()
    if not kept.any():
        return (nothing - float("inf")).expand(len(ids)), nothing
    log_sum = torch.logsumexp(z[kept], 0)
    log_p = z[kept] - log_sum
    logp = [z[y] - log_sum if kept[y] else float("-inf") - log_sum for y in ids]
    return torch.stack(logp) if logp else x[:0], -(log_p.exp() * log_p).sum()
