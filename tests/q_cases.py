"""Inputs of n_step_returns, q_targets and path_consistency, and how far results may lie from the reference."""

import torch

import react_fast as rf

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GAMMA = 0.97


def batch(shape, dtype=torch.float32, *, cuts=True, mask=True):
    """Everything that the three functions take."""
    names = ("rewards", "values", "bootstrap_values", "logprobs", "ref_logprobs")
    batch = {name: torch.randn(shape).to(dtype) for name in names}
    batch["last_values"] = torch.randn(shape[0]).to(dtype)
    if cuts:  # both at once: terminated
        batch |= {name: torch.rand(shape) > 0.85 for name in ("terminated", "truncated")}
    if mask:
        batch["mask"] = torch.rand(shape) > 0.3
    return batch


def without(batch, *names):
    return {k: x for k, x in batch.items() if k not in names}


def returns(batch, n, gamma=GAMMA, **options):
    return rf.n_step_returns(**without(batch, "logprobs", "ref_logprobs"), gamma=gamma, n=n, **options)


def targets(batch, n, gamma=GAMMA, **options):
    """The values stand behind their steps."""
    rest = without(batch, "logprobs", "ref_logprobs", "values")
    return rf.q_targets(next_values=batch["values"], **rest, gamma=gamma, n=n, **options)


def residual(batch, n, **options):
    return rf.path_consistency(**batch, gamma=GAMMA, alpha=0.3, span=n, **options)


def every(batch, n, **options):
    alone = without(batch, "bootstrap_values", "last_values")
    return (
        returns(batch, n, **options),
        targets(batch, n, **options),
        targets(alone, n, **options),
        residual(batch, n, **options),
    )


def wide(batch):
    return {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}


def expected(batch, n, **options):
    with rf.use_backend("reference"):
        return every(wide(batch), n, **options)


def assert_close(found, expected, dtype, n, T):
    # At most min(n, T) + 2 terms of size below 10, each rounded on its way in and added once.
    bound = 10 * (min(n, T) + 2) * contract.EPS[dtype]
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert a.shape == e.shape
        assert float((a.double() - e).abs().max()) <= bound
