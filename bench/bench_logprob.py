"""token_logprobs; the limit is a stream read of the logits, and with the backward another read and a write."""

from collections.abc import Callable

import pytest
import torch

import react_fast

from . import oracle, roofline
from .common import DEVICE, LIMIT, OURS, QUICK, Check, Contestant, built, name_of, on_reference, race, stream
from .peers.contestants import LOGITS, LogitsOp, eager_from_logits, ours_from_logits

SMALL = (64, 512)
# Small; 1k, 32k, 128k and 262k vocabularies, the last with the few rows of a step of generation.
SHAPES = [SMALL] if QUICK else [SMALL, (8192, 1024), (8, 262144), (4096, 32000), (1024, 128256)]
ROUNDS = 15
DTYPES = [torch.float32, torch.bfloat16]
ENTROPY = {"": False, " and entropy": True}


def _inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.empty(shape, dtype=dtype, device=DEVICE).normal_()
    return logits, torch.randint(shape[1], shape[:1], device=DEVICE)


def _check(logits: torch.Tensor, ids: torch.Tensor, upstream: torch.Tensor, entropy: bool) -> Check:
    """The first rows against float64.

    A contestant rounds its result, or log_softmax as a whole, to the dtype: u |logp|, and from that follow p, H
    and the gradient; float32 sums of exponentials add oracle.BLOCK roundings. The entropy sums V such terms.
    """
    rows = slice(0, oracle.ROWS)
    x = logits[rows].detach().double().requires_grad_()
    log_p = torch.log_softmax(x, -1)
    logp = log_p.gather(-1, ids[rows, None])[:, 0]
    h = -(log_p.exp() * log_p).sum(-1)
    value = (logp + h) if entropy else logp
    (d_logits,) = torch.autograd.grad(value, x, upstream[rows].double())
    u = max(oracle.roundoff(logits.dtype), oracle.SINGLE)
    # Everything that is rounded is at most the largest |log p| in size.
    relative = torch.expm1(2 * u * log_p.detach().abs().amax(-1) + oracle.BLOCK * oracle.SINGLE)
    bound = relative * (1 + logp.detach().abs())
    heaviest = log_p.detach().abs().amax(-1) if entropy else torch.ones_like(logp)
    off = (4 * (relative + u) * heaviest * upstream[rows].double().abs())[:, None]

    def check(name: str, result: object) -> None:
        assert isinstance(result, tuple)
        oracle.close("log-prob", name, result[0][rows], logp.detach(), bound)
        if entropy:
            oracle.close("entropy", name, result[1][rows], h.detach(), 2 * relative * (1 + h.detach()))
        if len(result) > 1 + entropy:
            oracle.close("gradient", name, result[-1][rows], d_logits, off)

    return check


def _contestants(step: Callable[[LogitsOp], Contestant], small: bool) -> tuple[dict, dict[str, str]]:
    ops, absent = built(LOGITS)
    contestants = {name: step(op) for name, op in ops.items()}
    if small and DEVICE == "cpu":
        contestants["reference"] = on_reference(step(ours_from_logits))
    return contestants, absent


def _title(shape: tuple[int, int], dtype: torch.dtype, detail: str) -> str:
    return f"token_logprobs{detail} {list(shape)} {name_of(dtype)}"


@pytest.mark.parametrize("entropy", ENTROPY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, shape, dtype, entropy):
    logits, ids = _inputs(shape, dtype)

    def step(op: LogitsOp) -> Contestant:
        return lambda: op(logits, ids, ENTROPY[entropy])

    contestants, absent = _contestants(step, shape == SMALL)
    race(
        benchmark,
        {**contestants, LIMIT: stream([logits])},
        case=_title(shape, dtype, entropy),
        limit="stream read of the logits",
        work=roofline.token_logprobs(shape[0], shape[1], logits.element_size()),
        rounds=ROUNDS,
        check=_check(logits, ids, torch.ones(len(ids), device=DEVICE), ENTROPY[entropy]),
        absent=absent,
    )


@pytest.mark.parametrize("entropy", ENTROPY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(benchmark, shape, dtype, entropy):
    logits, ids = _inputs(shape, dtype)
    logits.requires_grad_()
    upstream = torch.randn(shape[0], device=DEVICE)

    def step(op: LogitsOp) -> Contestant:
        def run() -> tuple[torch.Tensor, ...]:
            out = op(logits, ids, ENTROPY[entropy])
            given = [upstream.to(x.dtype) for x in out]
            return (*out, *torch.autograd.grad(out, logits, given))

        return run

    contestants, absent = _contestants(step, shape == SMALL)
    plain = logits.detach()
    race(
        benchmark,
        {**contestants, LIMIT: stream([plain, plain], [torch.empty_like(plain)], logits.numel())},
        case=_title(shape, dtype, f" forward+backward{entropy}"),
        limit="stream: two reads and a write of the logits",
        work=roofline.token_logprobs_both(shape[0], shape[1], logits.element_size()),
        rounds=ROUNDS,
        check=_check(logits, ids, upstream, ENTROPY[entropy]),
        absent=absent,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_alone(benchmark, dtype):
    """Into fresh memory, whose pages the system fills with zeros first; `clone` pays for them as well."""
    shape = SHAPES[-1]
    logits, ids = _inputs(shape, dtype)
    logits.requires_grad_()
    upstream = torch.randn(shape[0], device=DEVICE)
    ops = {OURS: ours_from_logits, "torch": eager_from_logits}

    def step(op: LogitsOp) -> Contestant:
        (logp,) = op(logits, ids, False)
        return lambda: torch.autograd.grad(logp, logits, upstream.to(logp.dtype), retain_graph=True)

    plain = logits.detach()
    race(
        benchmark,
        {
            **{name: step(op) for name, op in ops.items()},
            "clone": plain.clone,
            LIMIT: stream([plain], [torch.empty_like(plain)]),
        },
        case=_title(shape, dtype, " backward into fresh memory"),
        limit="stream copy of the logits, into memory that is there",
        work=roofline.token_logprobs_backward(shape[0], shape[1], logits.element_size()),
    )


class _Memory(torch.autograd.Function):
    """Memory that is there already, as the result of a function, so that its gradient may be written over it."""

    @staticmethod
    def forward(ctx, leaf, memory):
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx, slope):
        return slope[0, 0].float() * 0, None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(benchmark, dtype):
    """Forward and backward over the logits' own memory: no page is fresh, so the stream is a limit of both.

    From the second round on the logits are the gradient of the round before, which costs the same.
    """
    shape = SHAPES[-1]
    logits, ids = _inputs(shape, dtype)
    upstream = torch.randn(shape[0], device=DEVICE)
    leaf = torch.zeros((), device=DEVICE, requires_grad=True)

    def ours() -> object:
        logp = react_fast.token_logprobs(_Memory.apply(leaf, logits), ids, inplace_backward=True)
        return torch.autograd.grad(logp, leaf, upstream)

    race(
        benchmark,
        {OURS: ours, LIMIT: stream([logits, logits], [torch.empty_like(logits)], logits.numel())},
        case=_title(shape, dtype, " forward+backward in place"),
        limit="stream: two reads and a write of the logits",
        work=roofline.token_logprobs_both(shape[0], shape[1], logits.element_size()),
        rounds=ROUNDS,
    )
