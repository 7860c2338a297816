"""Advantages; the limit is a stream of the same reads and writes."""

from functools import partial

import pytest
import torch

import react_fast as rf

from . import roofline
from .common import DEVICE, QUICK, on_reference, race, stream

GAMMA, LAM = 0.99, 0.95
# In L2, in L3, in memory.
SHAPES = [(4, 48)] if QUICK else [(64, 1024), (256, 4096), (1024, 8192)]


def _loop(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE the way trainers write it: over time in reverse, masked steps carry the next value and advantage on."""
    next_value = carry = rewards.new_zeros(len(rewards))
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        found = delta + GAMMA * LAM * carry
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        carry = torch.where(mask[:, t], found, carry)
        columns.append(carry)
    advantages = torch.where(mask, torch.stack(columns[::-1], 1), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def _whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = (((x - mean) ** 2) * mask).sum() / (count - 1)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def _mask(shape: tuple[int, int]) -> torch.Tensor:
    """A prompt, an answer of its own length, and a tool's reply in its middle, in every row."""
    rows, length = shape
    t = torch.arange(length, device=DEVICE)
    prompt = torch.randint(1, length // 8, (rows, 1), device=DEVICE)
    end = length - torch.randint(1, length // 8, (rows, 1), device=DEVICE)
    tool = torch.randint(length // 4, length // 2, (rows, 1), device=DEVICE)
    return (t >= prompt) & (t < end) & ~((t >= tool) & (t < tool + length // 16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae(benchmark, shape):
    rewards, values, mask = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE), _mask(shape)
    contestants = {
        "react_fast": lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask),
        "torch": lambda: _loop(rewards, values, mask),
        "limit": stream(
            [rewards, values, mask], [torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)]
        ),
    }
    if shape == SHAPES[0]:
        contestants["reference"] = on_reference(contestants["react_fast"])
    case, traffic = f"gae with mask {list(shape)} float32", "stream of reward, value, mask, advantage, return"
    race(benchmark, contestants, case=case, limit=traffic, work=roofline.gae(rewards.numel(), mask=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae_out(benchmark, shape):
    """Into memory that is there: what a trainer with buffers of its own pays."""
    rewards, values, mask = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE), _mask(shape)
    out = torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)
    contestants = {
        "react_fast": lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, out=out),
        "fresh results": lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask),
        "limit": stream([rewards, values, mask], list(out)),
    }
    case, traffic = (
        f"gae with mask, out= {list(shape)} float32",
        "stream of reward, value, mask, advantage, return",
    )
    race(benchmark, contestants, case=case, limit=traffic, work=roofline.gae(rewards.numel(), mask=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae_whiten(benchmark, shape):
    rewards, values, mask = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE), _mask(shape)
    out = torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)
    whitened = lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, out=out, whiten=True)  # noqa: E731
    contestants = {
        "react_fast": whitened,
        "gae alone": lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, out=out),
        "torch": lambda: _whiten(_loop(rewards, values, mask)[0], mask),
        "limit": stream([rewards, values, mask, out[0], mask], [*out, out[0]]),
    }
    case, traffic = (
        f"gae with mask, whiten, out= {list(shape)} float32",
        "stream: gae's, and the advantages once more",
    )
    race(benchmark, contestants, case=case, limit=traffic, work=roofline.gae_whitened(rewards.numel()))


# Of 1,048,576 packed tokens; lengths are geometric, 10,000 segments have 1 to about 1,000 tokens.
SEGMENTS = (4,) if QUICK else (1, 32, 256, 1000, 10_000)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_gae_packed(benchmark, segments):
    """As many tokens in equal rows, and for one segment in one row."""
    tokens = 1 << (7 if QUICK else 20)
    cuts = torch.randint(1, tokens, (segments - 1,), device=DEVICE).sort().values
    cu_seqlens = torch.cat([torch.tensor([0], device=DEVICE), cuts, torch.tensor([tokens], device=DEVICE)])
    rewards, values, mask = (
        torch.randn(tokens, device=DEVICE),
        torch.randn(tokens, device=DEVICE),
        torch.rand(tokens, device=DEVICE) < 0.9,
    )
    rows = 1 << (segments.bit_length() - 1)
    padded = [x.view(rows, -1) for x in (rewards, values, mask)]
    contestants = {
        "react_fast": lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, cu_seqlens=cu_seqlens),
        "react_fast, padded": lambda: rf.gae(padded[0], padded[1], gamma=GAMMA, lam=LAM, mask=padded[2]),
        "limit": stream(
            [rewards, values, mask], [torch.empty(tokens, device=DEVICE), torch.empty(tokens, device=DEVICE)]
        ),
    }
    work = roofline.gae_of_one_row if segments == 1 else partial(roofline.gae, mask=True)
    case = f"gae with mask, packed, {segments} segments [{tokens}] float32"
    traffic = "stream of reward, value, mask, advantage, return"
    race(benchmark, contestants, case=case, limit=traffic, work=work(tokens))


def test_gae_compiled(benchmark):
    """torch.compile unrolls the loop over time, so a short row is what it can build in seconds."""
    shape = (64, 128)
    rewards, values, mask = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE), _mask(shape)
    compiled = torch.compile(_loop)
    contestants = {
        "react_fast": lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask),
        "torch": lambda: _loop(rewards, values, mask),
        "torch.compile": lambda: compiled(rewards, values, mask),
        "reference": on_reference(lambda: rf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask)),
        "limit": stream(
            [rewards, values, mask], [torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)]
        ),
    }
    case, traffic = f"gae with mask {list(shape)} float32", "stream of reward, value, mask, advantage, return"
    race(benchmark, contestants, case=case, limit=traffic, work=roofline.gae(rewards.numel(), mask=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whiten(benchmark, shape):
    x, mask = torch.randn(shape, device=DEVICE), _mask(shape)
    compiled = torch.compile(_whiten)
    contestants = {
        "react_fast": lambda: rf.whiten(x, mask=mask),
        "torch": lambda: _whiten(x, mask),
        "torch.compile": lambda: compiled(x, mask),
        "limit": stream([x, mask, x, mask], [torch.empty(shape, device=DEVICE)]),
    }
    if shape == SHAPES[0]:
        contestants["reference"] = on_reference(contestants["react_fast"])
    case, traffic = f"whiten with mask {list(shape)} float32", "stream: two reads of x and mask, one write"
    race(benchmark, contestants, case=case, limit=traffic, work=roofline.whiten(x.numel()))


def _groups(rewards: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    ones = torch.ones_like(rewards)
    size = torch.zeros(count, device=DEVICE).index_add_(0, ids, ones)
    mean = torch.zeros(count, device=DEVICE).index_add_(0, ids, rewards) / size
    square = torch.zeros(count, device=DEVICE).index_add_(0, ids, (rewards - mean[ids]) ** 2)
    return (rewards - mean[ids]) / ((square / (size - 1)).sqrt()[ids] + 1e-4)


def test_group_advantages(benchmark):
    """A rollout batch of 1024 prompts x 16 responses."""
    n = 64 if QUICK else 16384
    rewards, ids = torch.rand(n, device=DEVICE), torch.arange(n, device=DEVICE) // 16
    compiled = torch.compile(_groups)
    contestants = {
        "react_fast": lambda: rf.group_advantages(rewards, ids),
        "torch": lambda: _groups(rewards, ids, n // 16),
        "torch.compile": lambda: compiled(rewards, ids, n // 16),
        "reference": on_reference(lambda: rf.group_advantages(rewards, ids)),
        "limit": stream([rewards, ids], [torch.empty(n, device=DEVICE)]),
    }
    race(
        benchmark,
        contestants,
        case=f"group_advantages [{n}]",
        limit="stream",
        work=roofline.group_advantages(n),
    )
