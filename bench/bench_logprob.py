"""token_logprobs; the limit is a stream read of the logits, and with the backward another read and a write."""

import pytest
import torch

import react_fast as rf

from .common import on_reference, race, stream

# Small; 32k and 128k vocabularies with the rows of one micro-batch.
SHAPES = [(64, 512), (4096, 32000), (1024, 128256)]
DTYPES = [torch.float32, torch.bfloat16]


def _torch(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]


def _inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, shape, dtype):
    logits, ids = _inputs(shape, dtype)
    compiled = torch.compile(_torch)
    contestants = {
        "react_fast": lambda: rf.token_logprobs(logits, ids),
        "torch": lambda: _torch(logits, ids),
        "torch.compile": lambda: compiled(logits, ids),
        "limit": stream([logits]),
    }
    if shape == SHAPES[0]:
        contestants["reference"] = on_reference(lambda: rf.token_logprobs(logits, ids))
    race(
        benchmark,
        contestants,
        case=f"token_logprobs {list(shape)} {str(dtype).removeprefix('torch.')}",
        limit="stream read of the logits",
        bytes_moved=logits.numel() * logits.element_size(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(benchmark, shape, dtype):
    logits, ids = _inputs(shape, dtype)
    logits.requires_grad_()
    compiled = torch.compile(_torch)
    upstream = torch.randn(shape[0])

    def step(op):
        logp = op(logits, ids)
        return torch.autograd.grad(logp, logits, upstream.to(logp.dtype))

    contestants = {
        "react_fast": lambda: step(rf.token_logprobs),
        "torch": lambda: step(_torch),
        "torch.compile": lambda: step(compiled),
        "limit": stream([logits.detach(), logits.detach()], [torch.empty_like(logits)], logits.numel()),
    }
    if shape == SHAPES[0]:
        contestants["reference"] = on_reference(lambda: step(rf.token_logprobs))
    race(
        benchmark,
        contestants,
        case=f"token_logprobs forward+backward {list(shape)} {str(dtype).removeprefix('torch.')}",
        limit="stream: two reads and a write of the logits",
        bytes_moved=3 * logits.numel() * logits.element_size(),
    )
