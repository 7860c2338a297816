"""Output layers of real models, inputs of their sizes, and the limit: the bare GEMM that makes their logits."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .common import DEVICE, QUICK

# Columns of a tile of the limit's GEMM: wide enough for the library's full speed, and the tile stays in cache.
TILE = 8192
# Standard deviation of the logits. A trained head's are of this order; at 1 a softmax over 150k is nearly flat.
SPREAD = 2.0


@dataclass(frozen=True)
class Head:
    """An output layer [V, D]; `rows` of hidden states on CPU (a CUDA run takes CUDA_ROWS)."""

    name: str
    dim: int
    vocab: int
    softcap: float | None = None
    rows: int = 256

    def __str__(self) -> str:
        return self.name


# Shapes from the models' config.json on the Hugging Face hub (hidden_size, vocab_size, final_logit_softcapping).
QWEN = Head("Qwen2.5-0.5B", 896, 151936, rows=1024)
HEADS = [
    QWEN,
    Head("Llama-3.2-1B", 2048, 128256),
    Head("Llama-3-8B", 4096, 128256),
    Head("Gemma-2-2B", 2304, 256000, softcap=30.0),
]
CUDA_ROWS = 8192
QUICK_DIM, QUICK_VOCAB, QUICK_ROWS = 16, 300, 24


def sized(head: Head) -> Head:
    """The head with the rows of this device, or REACT_FAST_BENCH_ROWS of them, or a tiny one in a smoke test."""
    if QUICK:
        return replace(head, dim=QUICK_DIM, vocab=QUICK_VOCAB, rows=QUICK_ROWS)
    return replace(head, rows=int(os.environ.get("REACT_FAST_BENCH_ROWS", 0)) or _rows(head))


def _rows(head: Head) -> int:
    return head.rows if DEVICE == "cpu" else CUDA_ROWS


class Inputs:
    """hidden [N, D], weight [V, D], ids and upstream gradients [N]; the tokens as a GRPO batch [B, T], B T = N."""

    def __init__(self, head: Head, dtype: torch.dtype, rows: int | None = None) -> None:
        self.head, self.dtype = head, dtype
        count = rows or head.rows
        self.hidden = torch.empty(count, head.dim, dtype=dtype, device=DEVICE).normal_()
        # Filled in its own dtype, so that making it takes no memory beyond it.
        self.weight = torch.empty(head.vocab, head.dim, dtype=dtype, device=DEVICE)
        self.weight.normal_(0.0, SPREAD / head.dim**0.5)
        self.ids = torch.randint(0, head.vocab, (count,), device=DEVICE)
        self.upstream = torch.randn(count, device=DEVICE)
        self.sequences = 8 if count % 8 == 0 else 1
        self.advantages = torch.randn(self.sequences, device=DEVICE)
        self.noise = 0.1 * torch.randn(count, device=DEVICE)

    def require(self, hidden: bool, weight: bool) -> list[torch.Tensor]:
        """Switch gradients on or off; returns the leaves that need one."""
        self.hidden.requires_grad_(hidden)
        self.weight.requires_grad_(weight)
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    @cached_property
    def grid(self) -> tuple[int, int]:
        return self.sequences, len(self.ids) // self.sequences

    @cached_property
    def mask(self) -> torch.Tensor:
        """Every step counts, so that a ratio to the GEMM over all rows counts GEMMs."""
        return torch.ones(self.grid, dtype=torch.bool, device=DEVICE)


def gemm(inputs: Inputs) -> Callable[[], None]:
    """One bare GEMM over the same shapes in tiles of columns: what making the logits costs at least."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    tile = torch.empty(len(hidden), TILE, dtype=inputs.dtype, device=DEVICE)

    def run() -> None:
        for columns in weight.split(TILE):
            torch.mm(hidden, columns.T, out=tile[:, : len(columns)])

    return run


def gradients(
    output: torch.Tensor, leaves: Sequence[torch.Tensor], upstream: torch.Tensor | None = None
) -> tuple:
    """What the backward gives for the leaves; nothing is accumulated anywhere."""
    return torch.autograd.grad(output, leaves, None if upstream is None else upstream.to(output.dtype))
