"""Attribution as the equations say it; see react_fast.ops.attribution for shapes and errors."""

from itertools import pairwise

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


def segment_sum(scores: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    nothing = scores[:0].to(wide).sum()
    sums = []
    for begin, end in pairwise(cu_segments.tolist()):
        total = nothing
        for i in range(begin, end):
            total = total + scores[i].to(wide)
        sums.append(total)
    return torch.stack(sums) if sums else scores[:0].to(wide)


def accumulate_by_id(
    scores: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    count: torch.Tensor,
    mean: torch.Tensor,
    m2: torch.Tensor,
) -> None:
    """Welford's update of count, mean and m2 [size], in place."""
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    values, places = scores[keep].double().tolist(), ids[keep].tolist()
    for i in places:
        if not 0 <= i < len(count):
            raise IndexError(f"ids must be in [0, {len(count)}) where mask is true, got {i}")
    for x, i in zip(values, places, strict=True):
        count[i] += 1
        d = x - mean[i]
        mean[i] += d / count[i]
        m2[i] += d * (x - mean[i])


class RunningMoments:
    """The loop twin of react_fast.RunningMoments: count, and sums of weights, squared weights and weighted squared
    deviations (West 1979), for every id."""

    def __init__(self, size: int, device: torch.device | str | None = None, *, decay: float = 1.0) -> None:
        self.decay = decay
        self.count = torch.zeros(size, dtype=torch.int64, device=device)
        self.weight, self.squares, self.mean, self.m2 = torch.zeros(
            4, size, dtype=torch.float64, device=device
        )

    def update(self, scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        for x, i in zip(scores.detach()[keep].double(), ids[keep].tolist(), strict=True):
            self.count[i] += 1
            self.weight[i] += 1
            self.squares[i] += 1
            d = x - self.mean[i]
            self.mean[i] += d / self.weight[i]
            self.m2[i] += d * (x - self.mean[i])

    def advance(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.weight *= self.decay
            self.squares *= self.decay**2
            self.m2 *= self.decay

    def merge(self, other: "RunningMoments") -> None:
        for i in range(len(self.count)):
            total = self.weight[i] + other.weight[i]
            if total:
                d = other.mean[i] - self.mean[i]
                self.m2[i] += other.m2[i] + d * d * self.weight[i] * other.weight[i] / total
                self.mean[i] += d * other.weight[i] / total
                self.weight[i] = total
            self.count[i] += other.count[i]
            self.squares[i] += other.squares[i]

    @property
    def effective_count(self) -> torch.Tensor:
        return torch.where(self.count > 0, self.weight**2 / self.squares, 0.0)

    @property
    def variance(self) -> torch.Tensor:
        unbiased = self.m2 / (self.weight - self.squares / self.weight)
        return torch.where(self.count > 1, unbiased, torch.nan)

    @property
    def standard_error(self) -> torch.Tensor:
        return (self.variance / self.effective_count).sqrt()
