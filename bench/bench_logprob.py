"""token_logprobs; the limit is a stream read of the logits, and with the backward another read and a write."""

from collections.abc import Callable

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


def _through_logits(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What trainers write: the logits as a whole, log_softmax, gather."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[:, None])[:, 0]


# Gradients of (hidden, weight), and the GEMMs that they take, forward and backward together.
HEADS = {"no gradient": (False, False, 1), "frozen head": (True, False, 2), "trained head": (True, True, 4)}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(benchmark, dtype, head):
    """Qwen2.5-0.5B's head; the limit is one bare GEMM in tiles of 8192 columns, so a ratio counts GEMMs."""
    rows, dim, vocab = 1024, 896, 151936
    hidden_grad, weight_grad, gemms = HEADS[head]
    hidden = torch.randn(rows, dim).to(dtype).requires_grad_(hidden_grad)
    weight = (torch.randn(vocab, dim) * 0.05).to(dtype).requires_grad_(weight_grad)
    ids = torch.randint(0, vocab, (rows,))
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    tile = torch.empty(rows, 8192, dtype=dtype)

    def run(op: Callable[..., torch.Tensor]) -> Callable[[], object]:
        if not leaves:
            return lambda: op(hidden, weight, ids)
        return lambda: torch.autograd.grad(op(hidden, weight, ids).sum(), leaves)

    def gemm() -> None:
        for columns in weight.detach().split(8192):
            torch.mm(hidden.detach(), columns.T, out=tile[:, : len(columns)])

    race(
        benchmark,
        {"react_fast": run(rf.linear_token_logprobs), "torch": run(_through_logits), "limit": gemm},
        case=f"linear_token_logprobs [{rows}, {dim}, {vocab}] {str(dtype).removeprefix('torch.')}, {head}",
        limit=f"one GEMM ({gemms} are needed)",
        rounds=5,
    )
