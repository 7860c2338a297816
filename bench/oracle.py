"""What a contestant must compute, in float64, and how far rounding alone may take it: before a case is timed,
every contestant's first result is held against this.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .heads import TILE, Inputs

# Rows and vocabulary entries whose gradients are looked at; log-probs and entropies are looked at in every row.
ROWS, COLUMNS = 16, 64
SINGLE = 2.0**-24  # unit roundoff of float32
# float32 sums over V elements are made in blocks by every contestant; 64 roundings in a row is what a block takes.
BLOCK = 64


class Truth(NamedTuple):
    """float64: logp, entropy [N]; gradients of sum(upstream * logp) in some rows of hidden and of weight; bounds.

    `error` [N] bounds the rounding of a log-prob, `hidden_error` and `weight_error` that of the gradients. All are
    worst cases: they tell another function from rounding, and say nothing about precision, which bench.errors
    measures.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    d_hidden: torch.Tensor
    d_weight: torch.Tensor
    columns: torch.Tensor
    error: torch.Tensor
    hidden_error: torch.Tensor
    weight_error: torch.Tensor


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _tile(
    inputs: Inputs, hidden: torch.Tensor, begin: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, logits, d logits / d product) of a tile, float64."""
    weight = inputs.weight.detach()[begin : begin + TILE].double()
    x = hidden @ weight.T
    cap = inputs.head.softcap
    if cap is None:
        return weight, x, torch.ones_like(x)
    squashed = torch.tanh(x / cap)
    return weight, cap * squashed, 1 - squashed**2


def truth(inputs: Inputs) -> Truth:
    """One pass over the vocabulary for the sums, one over a few rows and columns for the gradients."""
    hidden, ids, g = inputs.hidden.detach().double(), inputs.ids, inputs.upstream.double()
    peak = hidden.new_full((len(hidden),), -torch.inf)
    total, moment, chosen = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
    largest = 0.0
    for begin in range(0, inputs.head.vocab, TILE):
        _, z, _ = _tile(inputs, hidden, begin)
        largest = max(largest, float(z.abs().max()))
        top = torch.maximum(peak, z.amax(1))
        scale, p = (peak - top).exp(), (z - top[:, None]).exp()
        total, moment, peak = total * scale + p.sum(1), moment * scale + (p * z).sum(1), top
        mine = (ids >= begin) & (ids < begin + TILE)
        chosen[mine] = z[mine, ids[mine] - begin]
    log_sum = peak + total.log()
    logp, entropy = chosen - log_sum, log_sum - moment / total
    columns = torch.cat([ids[: COLUMNS // 2], torch.arange(COLUMNS // 2, device=ids.device)]).unique()
    d_hidden = _hidden_gradient(inputs, hidden[:ROWS], log_sum[:ROWS], g[:ROWS])
    d_weight, mass = _weight_gradient(inputs, hidden, log_sum, g, columns)
    bounds = _bounds(inputs, largest, logp, mass)
    return Truth(logp, entropy, d_hidden, d_weight, columns, *bounds)


def _hidden_gradient(
    inputs: Inputs, hidden: torch.Tensor, log_sum: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """g (s_y W_y - sum_j p_j s_j W_j), s the softcap's slope."""
    out = torch.zeros_like(hidden)
    for begin in range(0, inputs.head.vocab, TILE):
        weight, z, slope = _tile(inputs, hidden, begin)
        d = -(z - log_sum[:, None]).exp()
        own = inputs.ids[: len(hidden)] - begin
        mine = (own >= 0) & (own < len(weight))
        d[mine, own[mine]] += 1.0
        out += (d * slope * g[:, None]) @ weight
    return out


def _weight_gradient(
    inputs: Inputs, hidden: torch.Tensor, log_sum: torch.Tensor, g: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_i g_i ([y_i = v] - p_iv) s_iv h_i of the entries `columns`, and the same with every term positive."""
    x = hidden @ inputs.weight.detach()[columns].double().T
    cap = inputs.head.softcap
    z = x if cap is None else cap * torch.tanh(x / cap)
    slope = 1.0 if cap is None else 1 - torch.tanh(x / cap) ** 2
    own = (inputs.ids[:, None] == columns).double()
    p = (z - log_sum[:, None]).exp()
    d = (own - p) * slope * g[:, None]
    return d.T @ hidden, ((own + p) * g.abs()[:, None]).T @ hidden.abs()


def _bounds(
    inputs: Inputs, largest: float, logp: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Worst-case rounding of float32 arithmetic around matrices of the inputs' dtype, u its unit roundoff.

    logit: rounded to the dtype once after the GEMM and once after a softcap, 2 u |z|; its float32 sum of D
        products, D 2^-24 |h| |W| (Higham 2002, section 3.1, with Cauchy-Schwarz).
    logp: the target's logit and the log-sum-exp each move by at most that much; then one rounding of the result
        in the dtype, u |logp|, and the float32 sum of exponentials.
    gradients: p is off by the factor exp(error of logp), the tile's gradient is rounded to the dtype, and partial
        sums (up to 32 blocks of rows or columns) may be kept in it; terms of absolute sum at most 2 |g| max|W_j|
        in a row of d hidden, `mass` in one of d weight.
    """
    u, dim = roundoff(inputs.dtype), inputs.head.dim
    long_h = float(inputs.hidden.detach().norm(dim=1, dtype=torch.float32).max())
    long_w = float(inputs.weight.detach().norm(dim=1, dtype=torch.float32).max())
    u_low = u if inputs.dtype != torch.float32 else SINGLE
    logit = 2 * u_low * largest + dim * SINGLE * long_h * long_w
    error = 2 * logit + u_low * logp.abs() + BLOCK * SINGLE
    relative = torch.expm1(error) + 34 * u_low + BLOCK * SINGLE
    heaviest = float(inputs.weight.detach().abs().max())
    g = inputs.upstream[:ROWS].double().abs()
    hidden_error = (2 * g * relative[:ROWS] * heaviest)[:, None]
    return error, hidden_error, relative.max() * mass


def close(what: str, name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
    """Raise AssertionError if `got` is not within `bound` of `want`; NaN is not."""
    off = (got.detach().double() - want).abs()
    if not bool((off <= bound).all()):
        worst = float((off / bound).nan_to_num(torch.inf).max())
        raise AssertionError(
            f"{name} computes another {what}: {worst:.3g} times the bound of rounding errors"
        )


def linear_check(t: Truth, leaves: int) -> Callable[[str, object], None]:
    """For results (logp,) or (logp, d_hidden) or (logp, d_hidden, d_weight), with `leaves` gradients."""

    def check(name: str, result: object) -> None:
        assert isinstance(result, tuple)
        close("log-prob", name, result[0], t.logp, t.error)
        if leaves > 0:
            close("gradient of hidden", name, result[1][:ROWS], t.d_hidden, t.hidden_error)
        if leaves > 1:
            close("gradient of weight", name, result[2][t.columns], t.d_weight, t.weight_error)

    return check
