"""Inputs of the log-prob tests and what they are held against, with the bounds derived."""

import torch

import react_fast as rf

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = float("inf")


def case(shape, dtype=torch.float32, scale=3.0, tokens=()):
    """Logits and ids of every row; tokens=(K,) for K a row."""
    return (torch.randn(shape) * scale).to(dtype), torch.randint(shape[-1], (*shape[:-1], *tokens))


def both(logits, ids, **options):
    return rf.token_logprobs(logits, ids, return_entropy=True, **options)


def per_row(shape):
    return torch.rand(shape[:-1]) + 0.5


def floor_keeping(logits, count):
    """The floor of every row that keeps its `count` largest logits: itself one of them."""
    return logits.topk(count, -1).values[..., -1].float()


def _kept(logits, ids, floor):
    several = ids if ids.dim() == logits.dim() else ids.unsqueeze(-1)
    if floor is None:
        return torch.ones_like(logits, dtype=torch.bool)
    return (logits >= floor.unsqueeze(-1)).scatter(-1, several, True)


def assert_within_bound(actual, logits, ids, **options):
    """Worst-case rounding of the float32 (float64) evaluation, u = half an ulp.

    sum_j exp(d_j): each exponential is off by 2u + 2u |d_j| relative, and a block adds up at most 2048 / 8 values
    in a lane before double (float64: all V). Divided by the sum that is E_p of the same, which log keeps as an
    absolute error. The entropy's moment has one more factor d. A cap is off by 8u of itself, in both d's terms.
    """
    wide = logits.double()
    logp, entropy = contract.reference(both, wide, ids, **options)
    temperature = torch.as_tensor(options.get("temperature", 1.0)).double()
    cap = options.get("softcap")
    z = (wide if cap is None else cap * torch.tanh(wide / cap)) / temperature.unsqueeze(-1)
    z = z.masked_fill(~_kept(wide, ids, options.get("logit_floor")), -INF)
    d = (z - z.amax(-1, keepdim=True)).abs()
    p = torch.softmax(z, -1)
    d = d.masked_fill(p == 0, 0)
    first, second = (p * d).sum(-1), (p * d * d).sum(-1)
    u = contract.EPS[actual[0].dtype] / 2
    adds = logits.shape[-1] if logits.dtype == torch.float64 else min(logits.shape[-1], 264)
    capped = 0.0 if cap is None else 16 * cap / temperature
    loss = adds + 8 + capped
    row = 2 * first + loss
    bound_logp = u * (2 * logp.abs() + (row.unsqueeze(-1) if logp.dim() > entropy.dim() else row))
    bound_entropy = u * (2 * entropy.abs() + loss * (1 + 2 * first) + 2 * second + 2 * first)
    assert bool(((actual[0].double() - logp).abs() <= bound_logp).all())
    assert bool(((actual[1].double() - entropy).abs() <= bound_entropy).all())


def assert_gradient(logits, ids, **options):
    """The gradient of a weighted sum equals float64 autograd of the reference."""
    g, h = torch.randn(ids.shape), torch.randn(logits.shape[:-1])
    x = logits.detach().clone().requires_grad_()
    logp, entropy = both(x, ids, **options)
    (actual,) = torch.autograd.grad((logp * g).sum() + (entropy * h).sum(), x)
    wide = logits.detach().double().requires_grad_()
    logp, entropy = contract.reference(both, wide, ids, **options)
    (expected,) = torch.autograd.grad((logp * g).sum() + (entropy * h).sum(), wide)
    assert actual.dtype == logits.dtype
    eps, inner = (
        contract.EPS[logits.dtype],
        contract.EPS[logp.dtype if logits.dtype == torch.float64 else torch.float32],
    )
    # Relative: the input's own rounding; p_j carries that of d_j, |d| <= 90 where p is not 0, in two terms.
    # Absolute: h p (log p + H) is a difference of terms below 16 |h|, and 1 - p of the chosen token cancels; the
    # upstream gradients of K tokens add up to less than 3 K.
    tokens = ids.shape[-1] if ids.dim() == logits.dim() else 1
    atol = (50 + 3 * tokens) * inner
    torch.testing.assert_close(actual.double(), expected, rtol=eps + 200 * inner, atol=atol)
