"""Q-learning on tokens beside the libraries of the field; the limit is a stream of the same bytes.

[steps] ops: n-step returns, the TD error. [tokens, vocabulary] ops: values of a state and the conservative term.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import react_fast as rf

from . import roofline
from .bench_field import _equal
from .common import DEVICE, LIMIT, OURS, QUICK, AbsentError, built, name_of, race, stream
from .frameworks import GAMMA

STEPS = [(4, 16)] if QUICK else [(64, 1024), (256, 4096)]
ROWS, VOCAB = (4, 50) if QUICK else (1024, 32768)
N = 5
# Quantile of the expectile; bound of Huber's loss.
TAU, HUBER = 0.7, 1.0
Op = Callable[[], Any]


def _rlax(name: str, *tensors: torch.Tensor, **constants: Any) -> Op:
    """A function of one row, mapped over the rows, compiled by XLA."""
    import jax
    import rlax

    if DEVICE == "cuda":
        raise AbsentError("rlax would get its arrays through the host")

    arrays = [jax.numpy.asarray(x.numpy()) for x in tensors]
    op = jax.jit(jax.vmap(lambda *rows: getattr(rlax, name)(*rows, **constants)))
    return lambda: op(*arrays).block_until_ready()


def _compiled(op: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(op, dynamic=False)


@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_n_step_returns(benchmark, shape):
    rewards, values = torch.randn(2, *shape, device=DEVICE)
    last = torch.randn(shape[0], device=DEVICE)

    def rlax() -> Op:
        after = torch.cat([values[:, 1:], last[:, None]], 1)
        discounts = torch.full(shape, GAMMA)
        return _rlax("n_step_bootstrapped_returns", rewards, discounts, after, n=N)

    def eager() -> torch.Tensor:
        """N shifted multiply-adds over the batch."""
        ends = torch.cat([values[:, 1:], last[:, None].expand(-1, N)], 1)
        padded = F.pad(rewards, (0, N - 1))
        found = ends[:, N - 1 : N - 1 + shape[1]]
        for k in reversed(range(N)):
            live = torch.arange(shape[1], device=DEVICE) + k < shape[1]
            found = torch.where(live, padded[:, k : k + shape[1]] + GAMMA * found, found)
        return found

    ours = lambda: rf.n_step_returns(rewards, values, gamma=GAMMA, n=N, last_values=last)  # noqa: E731
    peers, absent = built({"rlax": rlax})
    peers |= {"eager": eager, "torch.compile": _compiled(eager)}
    race(
        benchmark, {OURS: ours, LIMIT: stream([rewards, values], [torch.empty_like(rewards)]), **peers},
        case=f"n_step_returns, n {N} {list(shape)} float32", limit="stream of reward, value, return",
        absent=absent, work=roofline.n_step_returns(rewards.numel()), check=_equal(ours()), rounds=9,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["huber", "expectile"])
@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_regression(benchmark, shape, kind):
    """Loss, gradient and seven metrics here, loss and gradient there."""
    values, targets = torch.randn(2, *shape, device=DEVICE)
    mask = torch.rand(shape, device=DEVICE) < 0.8
    values.requires_grad_()

    def plain() -> torch.Tensor:
        if kind == "huber":
            terms = F.huber_loss(values, targets, delta=HUBER, reduction="none")
        else:
            u = targets - values
            terms = torch.where(u > 0, TAU, 1 - TAU) * u**2
        return (terms * mask).sum() / mask.sum()

    def op() -> torch.Tensor:
        if kind == "huber":
            return rf.q_loss(values, targets, mask, huber=HUBER).loss
        return rf.expectile_loss(values, targets, mask, tau=TAU).loss

    fast = _compiled(plain)
    name = "q_loss, Huber" if kind == "huber" else "expectile_loss"
    grad = lambda loss: torch.autograd.grad(loss, values)[0]  # noqa: E731
    race(
        benchmark,
        {
            OURS: lambda: grad(op()), "eager": lambda: grad(plain()), "torch.compile": lambda: grad(fast()),
            LIMIT: stream([values.detach(), targets, mask], [torch.empty_like(targets)]),
        },
        case=f"{name} {list(shape)} float32 forward + backward",
        limit="stream read of values, targets and mask, write of the gradient",
        work=roofline.q_loss(values.numel()),
        check=_equal(grad(op())), rounds=9,
    )  # fmt: skip


def _values(kind: str, q: torch.Tensor, other: torch.Tensor) -> tuple[Op, dict[str, Op], list[torch.Tensor]]:
    """(ours, the others, what is read of [rows, vocabulary])."""
    n = len(q)
    zeros, tokens = torch.zeros(n), torch.zeros(n, dtype=torch.long)

    def rlax(name: str, *further: torch.Tensor) -> Op:
        """The TD error with Q(s, a) = r = 0 and discount 1, hence the value of s'."""
        return _rlax(name, torch.zeros(n, 1), tokens, zeros, zeros + 1, *further)

    if kind == "max":
        return (
            lambda: rf.max_q_values(q),
            {"eager": lambda: q.amax(-1).float(), "rlax": lambda: rlax("q_learning", q)},
            [q],
        )
    if kind == "double":
        eager = lambda: other.gather(1, q.argmax(-1, keepdim=True))[:, 0].float()  # noqa: E731
        return (
            lambda: rf.double_q_values(q, other),
            {"eager": eager, "rlax": lambda: rlax("double_q_learning", other, q)},
            [q],
        )
    if kind == "expected":
        eager = lambda: (other.float().softmax(-1) * q).sum(-1)  # noqa: E731
        return lambda: rf.expected_q_values(q, other), {"eager": eager}, [q, other]
    return lambda: rf.soft_values(q, alpha=0.5), {"eager": lambda: 0.5 * (q.float() / 0.5).logsumexp(-1)}, [q]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("kind", ["max", "double", "expected", "soft"])
def test_values(benchmark, kind, dtype):
    q, other = torch.randn(2, ROWS, VOCAB, device=DEVICE).to(dtype)
    ours, others, read = _values(kind, q, other)
    peers: dict[str, Op] = {"eager": others["eager"], "torch.compile": _compiled(others["eager"])}
    absent: dict[str, str] = {}
    if "rlax" in others and dtype == torch.float32:
        made, absent = built({"rlax": others["rlax"]})
        peers |= made
    race(
        benchmark, {OURS: ours, LIMIT: stream(read, elements=q.numel()), **peers}, absent=absent, rounds=9,
        case=f"{kind}_values [{ROWS}, {VOCAB}] {name_of(dtype)}", limit="stream read of what is scanned",
        work=roofline.values(ROWS, VOCAB, q.element_size(), len(read)), check=_equal(ours()),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_cql_loss(benchmark, dtype):
    q = torch.randn(ROWS, VOCAB, device=DEVICE).to(dtype).requires_grad_()
    tokens = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    mask = torch.ones(ROWS, dtype=torch.bool, device=DEVICE)

    def plain() -> torch.Tensor:
        return (q.float().logsumexp(-1) - q.gather(1, tokens[:, None])[:, 0].float()).mean()

    fast = _compiled(plain)
    grad = lambda loss: torch.autograd.grad(loss, q)[0].float()  # noqa: E731
    ours = lambda: torch.autograd.grad(rf.cql_loss(q, tokens, mask), q)[0]  # noqa: E731
    race(
        benchmark,
        {
            OURS: ours, "eager": lambda: torch.autograd.grad(plain(), q)[0],
            "torch.compile": lambda: torch.autograd.grad(fast(), q)[0],
            LIMIT: stream([q.detach(), q.detach()], [torch.empty_like(q)], elements=q.numel()),
        },
        case=f"cql_loss [{ROWS}, {VOCAB}] {name_of(dtype)} forward + backward",
        limit="stream read of q twice, write of the gradient",
        work=roofline.token_logprobs_both(ROWS, VOCAB, q.element_size()),
        check=_equal(grad(rf.cql_loss(q, tokens, mask)), most=8e-3), rounds=9,
    )  # fmt: skip


def test_polyak_update(benchmark):
    """A target network of 50 tensors, 12.5M numbers."""
    shape = (5, 5) if QUICK else (500, 500)
    online = [torch.randn(shape, device=DEVICE) for _ in range(50)]
    targets = {name: [torch.zeros(shape, device=DEVICE) for _ in range(50)] for name in (OURS, "sb3", LIMIT)}

    def sb3() -> Op:
        from stable_baselines3.common.utils import polyak_update

        return lambda: polyak_update(online, targets["sb3"], 0.005)

    peers, absent = built({"stable-baselines3": sb3})
    race(
        benchmark,
        {
            OURS: lambda: rf.polyak_update(targets[OURS], online, tau=0.005),
            LIMIT: stream(online, targets[LIMIT]),
            **peers,
        },
        case=f"polyak_update 50 x {list(shape)} float32", limit="stream read of one, write of the other",
        absent=absent, work=roofline.polyak_update(50 * online[0].numel()), rounds=9,
    )  # fmt: skip
