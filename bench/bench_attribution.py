"""Attribution scores and their accumulation; the limit is a stream read of the inputs."""

import pytest
import torch

import react_fast as rf

from . import roofline
from .common import DEVICE, QUICK, on_reference, race, stream

# Below the thread threshold; the shape; a model's hidden states.
SHAPES = [(4, 32)] if QUICK else [(64, 256), (8192, 1024), (4096, 4096)]

# (tokens, segments): a rollout batch into words; millions of tokens into turns.
SCORES = [(64, 16)] if QUICK else [(16384, 4096), (4194304, 65536)]


def _torch(grad: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    return (grad.float() * activation.float()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_forward(benchmark, shape, dtype):
    grad, activation = (
        torch.randn(shape, device=DEVICE).to(dtype),
        torch.randn(shape, device=DEVICE).to(dtype),
    )
    compiled = torch.compile(_torch)
    contestants = {
        "react_fast": lambda: rf.attribution_scores(grad, activation),
        "torch": lambda: _torch(grad, activation),
        "torch.compile": lambda: compiled(grad, activation),
        "limit": stream([grad, activation]),
    }
    if grad.numel() <= 64 * 256:
        contestants["reference"] = on_reference(lambda: rf.attribution_scores(grad, activation))
    race(
        benchmark,
        contestants,
        case=f"attribution_scores {list(shape)} {str(dtype).removeprefix('torch.')}",
        limit="stream read of both inputs",
        work=roofline.attribution_scores(shape, grad.element_size()),
    )


@pytest.mark.parametrize(("tokens", "segments"), SCORES, ids=str)
def test_segment_sum(benchmark, tokens, segments):
    scores, edges = (
        torch.randn(tokens, device=DEVICE),
        torch.arange(0, tokens + 1, tokens // segments, device=DEVICE),
    )
    ids = torch.arange(tokens, device=DEVICE) // (tokens // segments)

    def scatter() -> torch.Tensor:
        return torch.zeros(segments, device=DEVICE).index_add_(0, ids, scores)

    compiled = torch.compile(scatter)
    contestants = {
        "react_fast": lambda: rf.segment_sum(scores, edges),
        "torch": lambda: torch.segment_reduce(scores, "sum", offsets=edges),
        "index_add": scatter,
        "torch.compile": compiled,
        "limit": stream([scores, edges], [torch.empty(segments, device=DEVICE)]),
    }
    if tokens <= 16384:
        contestants["reference"] = on_reference(contestants["react_fast"])
    race(
        benchmark,
        contestants,
        case=f"segment_sum [{tokens}] to [{segments}] float32",
        limit="stream of scores, bounds and sums",
        work=roofline.segment_sum(tokens, segments),
    )


def _moments(
    scores: torch.Tensor, ids: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and M2 of a batch by id, by index_add."""
    values = scores.double()
    count = values.new_zeros(size, dtype=torch.int64).index_add_(0, ids, torch.ones_like(ids))
    mean = values.new_zeros(size).index_add_(0, ids, values) / count.clamp_min(1)
    m2 = values.new_zeros(size).index_add_(0, ids, (values - mean[ids]) ** 2)
    return count, mean, m2


def test_running_moments(benchmark):
    """A rollout batch of 16k tokens into a vocabulary of 152k."""
    tokens, size = (64, 40) if QUICK else (16384, 151936)
    scores = torch.randn(tokens, device=DEVICE)
    ids = (torch.rand(tokens, device=DEVICE) ** 4 * size).long()  # few common tokens, many rare ones
    moments, slow = rf.RunningMoments(size, DEVICE), rf.RunningMoments(size, DEVICE)
    compiled = torch.compile(_moments)
    race(
        benchmark,
        {
            "react_fast": lambda: moments.update(scores, ids),
            "torch": lambda: _moments(scores, ids, size),
            "torch.compile": lambda: compiled(scores, ids, size),
            "reference": on_reference(lambda: slow.update(scores, ids)),
            "limit": stream([scores, ids]),
        },
        case=f"RunningMoments.update [{tokens}] into [{size}]",
        limit="stream read of scores and ids",
        work=roofline.accumulate_by_id(tokens),
    )
