"""Log-probs and policy losses from hidden states; the limit is the logits' bare GEMM, so a ratio counts GEMMs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import oracle, roofline
from .common import DEVICE, LIMIT, OURS, Check, Contestant, built, name_of, race, surroundings
from .heads import HEADS, QWEN, Head, Inputs, gemm, gradients, sized
from .memory import CASES as MEMORY_CASES
from .peers.contestants import CLIP, LINEAR, POLICY, LinearOp, PolicyOp, clipped_mean

BF16, FP32 = torch.bfloat16, torch.float32
# float32 at one head only: at the others it would take longer than everything else together.
SIZES = [(QWEN, BF16), (QWEN, FP32), *((head, BF16) for head in HEADS if head is not QWEN)]
# Gradients of (hidden, weight), and the GEMMs that they take, forward and backward together.
MODES = {
    "no gradient": (False, False, 1),
    "frozen head": (True, False, 2),
    "trained head": (True, True, 4),
}
POLICY_GEMMS = 3
FEW = 16
ROUNDS = 5


def _id(size: tuple[Head, torch.dtype]) -> str:
    return f"{size[0]}-{name_of(size[1])}"


@pytest.fixture(scope="module", params=SIZES, ids=_id)
def problem(request: pytest.FixtureRequest) -> tuple[Inputs, oracle.Truth]:
    """One head's inputs and their float64 results, for all cases in turn."""
    torch.manual_seed(0)
    head, dtype = request.param
    inputs = Inputs(sized(head), dtype)
    return inputs, oracle.truth(inputs)


def _sizes(inputs: Inputs) -> tuple[int, int, int, int]:
    return len(inputs.ids), inputs.head.dim, inputs.head.vocab, inputs.weight.element_size()


def title(what: str, inputs: Inputs, detail: str) -> str:
    head = inputs.head
    cap = "" if head.softcap is None else f", softcap {head.softcap:g}"
    size = f"[{len(inputs.ids)}, {head.dim}, {head.vocab}]"
    return f"{what}, {head.name} {size}{cap}, {name_of(inputs.dtype)}, {detail}"


def _step(op: LinearOp, inputs: Inputs, leaves: list[torch.Tensor]) -> Contestant:
    """(logp,) without gradients, (logp, *gradients) with an upstream gradient of its own for every token."""

    def run() -> tuple[torch.Tensor, ...]:
        if not leaves:
            with torch.no_grad():
                return (op(inputs.hidden, inputs.weight, inputs.ids),)
        logp = op(inputs.hidden, inputs.weight, inputs.ids)
        return (logp, *gradients(logp, leaves, inputs.upstream))

    return run


@pytest.mark.parametrize("mode", MODES)
def test_linear(benchmark, problem, mode):
    inputs, truth = problem
    *wanted, gemms = MODES[mode]
    leaves = inputs.require(*wanted)
    ops, absent = built(LINEAR, inputs.head)
    contestants = {name: _step(op, inputs, leaves) for name, op in ops.items()}
    race(
        benchmark,
        {**contestants, LIMIT: gemm(inputs)},
        case=title("linear_token_logprobs", inputs, mode),
        limit=f"one GEMM ({gemms} needed)",
        work=roofline.linear_token_logprobs(*_sizes(inputs), gemms),
        unit="GEMM",
        rounds=ROUNDS,
        check=oracle.linear_check(truth, len(leaves)),
        absent=absent,
    )


def test_few_rows(benchmark):
    """A step of generation: the head is read for a few rows, without gradients."""
    torch.manual_seed(0)
    inputs = Inputs(sized(QWEN), BF16, FEW)
    ops, absent = built(LINEAR, inputs.head)
    race(
        benchmark,
        {**{name: _step(op, inputs, []) for name, op in ops.items()}, LIMIT: gemm(inputs)},
        case=title("linear_token_logprobs", inputs, "no gradient"),
        limit="one GEMM (1 needed)",
        unit="GEMM",
        rounds=ROUNDS,
        work=roofline.linear_token_logprobs_of_few(*_sizes(inputs)),
        check=oracle.linear_check(oracle.truth(inputs), 0),
        absent=absent,
    )


def _policy_check(inputs: Inputs, truth: oracle.Truth, old: torch.Tensor) -> Check:
    """The loss and the gradients of the first rows against float64.

    r = exp(logp - old) is off by the factor exp(error of logp), and the loss is a mean of r A; at the kink of the
    clip, rounding may choose the other side, where the loss is the same and the gradient is not: such rows are
    left out of the gradient's check.
    """
    logp = truth.logp.view(inputs.grid).clone().requires_grad_()
    advantages = inputs.advantages.double()
    loss = clipped_mean(logp, old.double(), advantages, inputs.mask)
    (g,) = torch.autograd.grad(loss, logp)
    ratio = (logp.detach() - old).exp()
    slack = torch.expm1(truth.error).view(inputs.grid)
    bound = (ratio * advantages.abs()[:, None] * slack).mean()
    kink = ((ratio - 1 - CLIP).abs() < 2 * slack) | ((ratio - 1 + CLIP).abs() < 2 * slack)
    rows = slice(0, oracle.ROWS)
    g, clear = g.reshape(-1)[rows], ~kink.reshape(-1)[rows]
    given = inputs.upstream[rows].double()
    # d loss / d hidden is the log-prob's gradient under another upstream gradient; r adds its own error once more.
    scale = (g / given)[:, None]
    want = truth.d_hidden * scale
    off = truth.hidden_error * scale.abs() * 2 + 1e-12

    def check(name: str, result: object) -> None:
        assert isinstance(result, tuple)
        oracle.close("loss", name, result[0], loss.detach(), bound)
        oracle.close("gradient of hidden", name, result[1][rows][clear], want[clear], off[clear])

    return check


@pytest.mark.parametrize("problem", SIZES[:2], ids=_id, indirect=True)
def test_policy_loss(benchmark, problem):
    """All gradients of a PPO loss, from the hidden states; at the head that has both dtypes."""
    inputs, truth = problem
    leaves = inputs.require(True, True)
    old = (truth.logp + inputs.noise).float().view(inputs.grid)
    ops, absent = built(POLICY, inputs, old)

    def step(op: PolicyOp) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run() -> tuple[torch.Tensor, ...]:
            loss = op()
            return (loss, *gradients(loss, leaves))

        return run

    race(
        benchmark,
        {**{name: step(op) for name, op in ops.items()}, LIMIT: gemm(inputs)},
        case=title("linear_policy_loss", inputs, "all gradients"),
        limit=f"one GEMM ({POLICY_GEMMS} needed)",
        work=roofline.linear_policy_loss(*_sizes(inputs)),
        unit="GEMM",
        rounds=ROUNDS,
        check=_policy_check(inputs, truth, old),
        absent=absent,
    )


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory(benchmark, case):
    """Peak memory of one forward and backward, each contestant in a process of its own."""
    peak: dict[str, int] = {}
    absent: dict[str, str] = {}

    def measure() -> None:
        for name in MEMORY_CASES[case].contestants:
            command = [sys.executable, "-m", "bench.memory", name, case]
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
            if "bytes" in found:
                peak[name] = found["bytes"]
            elif "absent" in found:
                absent[name] = found["absent"]
            else:
                told = done.stderr.strip().splitlines()
                absent[name] = told[-1][:160] if told else f"ended by signal {-done.returncode}"
            assert name != OURS or name in peak, absent[name]

    benchmark.pedantic(measure, rounds=1, iterations=1)
    subtracted = "inputs and gradients are subtracted"
    how = "max_memory_allocated" if DEVICE == "cuda" else "peak RSS of a fresh process"
    benchmark.extra_info.update(
        case=MEMORY_CASES[case].title, limit=f"{how}; {subtracted}", peak_bytes=peak, absent=absent,
        **surroundings(),
    )  # fmt: skip
