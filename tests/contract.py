"""The parts of DESIGN's op contract that read the same for every op.

Each function states one property; the tests of a hot path call it with that path's functions and inputs.
"""

import os
from collections.abc import Callable

import torch

import react_fast

# One rounding of the result's dtype, and what a float32 accumulation of n terms may lose on top of it when it
# runs in a few parallel sums.
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# Where tests make their tensors: "cpu", whose kernels the interpreter runs, or "cuda".
DEVICE = os.environ.get("REACT_FAST_TEST_DEVICE", "cpu")

Op = Callable[..., torch.Tensor]


def assert_bitwise(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} elements differ"


def assert_threads_agree(op: Callable[[], torch.Tensor], counts: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    """Bitwise the same result for every thread count, and for a second run."""
    results = []
    for count in (*counts, counts[-1]):
        torch.set_num_threads(count)
        results.append(op())
    for result in results[1:]:
        assert_bitwise(result, results[0])


def assert_gradcheck(op: Op, *inputs: torch.Tensor) -> None:
    """The gradient equals finite differences in float64, for all inputs together and for each alone.

    On the CPU every element is compared; the interpreter of Triton is slow, so there a random projection is.
    """
    projected = react_fast.get_backend() == "triton"
    alone = [[i] for i in range(len(inputs))] if len(inputs) > 1 else []
    for wanted in (range(len(inputs)), *alone):
        given = [x.detach().double().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        assert torch.autograd.gradcheck(op, given, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=projected)


def assert_compiles(op: Op, *inputs: torch.Tensor) -> None:
    """torch.compile(fullgraph=True) gives the eager result and gradients, bitwise."""
    leaves = [x for x in inputs if x.requires_grad]
    eager = op(*inputs)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs)
    assert_bitwise(compiled, eager)
    if leaves:
        weight = torch.randn_like(eager)
        expected = torch.autograd.grad(eager, leaves, weight)
        for a, e in zip(torch.autograd.grad(compiled, leaves, weight), expected, strict=True):
            assert_bitwise(a, e)


def assert_opcheck(name: str, *args: object) -> None:
    """torch.library.opcheck: schema, fake kernel, autograd registration, AOT dispatch."""
    op = getattr(torch.ops.react_fast, name).default
    torch.library.opcheck(op, args)


def reference(op: Op, *inputs: object, **options: object) -> torch.Tensor:
    """The reference in float64 on the same values."""
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    with react_fast.use_backend("reference"):
        return op(*wide, **options)
