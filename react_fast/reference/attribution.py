"""Attribution as the equations say it; see react_fast.ops.attribution for shapes and errors."""

import torch


def attribution_scores(
    grad: torch.Tensor, activation: torch.Tensor, *, reduction: str = "dot"
) -> torch.Tensor:
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    scores = []
    rows = zip(grad.reshape(-1, grad.shape[-1]), activation.reshape(-1, grad.shape[-1]), strict=True)
    for g, a in rows:
        p = g.to(wide) * a.to(wide)
        if reduction == "dot":
            scores.append(p.sum())
        elif reduction == "abs":
            scores.append(p.abs().sum())
        else:
            norm = p.detach().norm()
            scores.append((p * p / norm).sum() * 0.5 + norm * 0.5 if norm > 0 else p.sum() * 0)
    flat = torch.stack(scores) if scores else grad.new_empty(0, dtype=wide)
    return flat.view(grad.shape[:-1])
