"""attribution_scores; the limit is a stream read of both inputs."""

import pytest
import torch

import react_fast as rf

from .common import on_reference, race, stream

# Below the thread threshold; the shape; a model's hidden states.
SHAPES = [(64, 256), (8192, 1024), (4096, 4096)]


def _torch(grad: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    return (grad.float() * activation.float()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_forward(benchmark, shape, dtype):
    grad, activation = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
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
        bytes_moved=2 * grad.numel() * grad.element_size(),
    )
