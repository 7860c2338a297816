"""Per-token attribution: row-wise products of a gradient and an activation, and their accumulation."""

from typing import Any

import torch

from .. import _core, reference
from . import _check
from .backend import DTYPE, accumulation_dtype, address, register, use_reference

REDUCTIONS = ("dot", "abs", "l2")


def attribution_scores(
    grad: torch.Tensor, activation: torch.Tensor, *, reduction: str = "dot"
) -> torch.Tensor:
    """Score of every row from its gradient and its activation, p_d = grad_d * activation_d.

        dot: sum_d p_d        abs: sum_d |p_d|        l2: sqrt(sum_d p_d^2)

    `dot` at an embedding output is gradient x input: the first-order change of the outcome when the row's
    activation goes to zero. One pass; nothing of the inputs' size is written.

    Args:
        grad: [..., D] float32, bfloat16, float16 or float64. Gradient of the outcome at the activation.
        activation: [..., D], dtype and device of `grad`.
        reduction: "dot" | "abs" | "l2".
    Returns: [...] float32 (float64 for float64). Differentiable in both inputs; the slope of `abs` is 0 where
        p_d = 0 and that of `l2` is 0 where the score is 0.
    Raises: TypeError for another dtype, ValueError if shapes or devices differ or the reduction is unknown.
    Source: Shrikumar et al. 2016 (arXiv:1605.01713), gradient x input.
    """
    _check.floating("grad", grad)
    _check.tensor("activation", activation)
    _check.dtype("activation", activation, grad.dtype, "grad")
    if grad.dim() == 0:
        raise ValueError("grad must be [..., D], got a scalar")
    _check.shape("activation", activation, grad.shape, "grad")
    _check.device("activation", activation, grad.device, "grad")
    _check.choice("reduction", reduction, REDUCTIONS)
    if use_reference():
        return reference.attribution_scores(grad, activation, reduction=reduction)
    return _scores(grad, activation, REDUCTIONS.index(reduction))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] with unit stride inside a row; a view whenever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _scores_cpu(grad: torch.Tensor, activation: torch.Tensor, reduction: int) -> torch.Tensor:
    g, a = _rows(grad), _rows(activation)
    out = torch.empty(grad.shape[:-1], dtype=accumulation_dtype(grad.dtype))
    _core.attribution_scores(
        g.data_ptr(), a.data_ptr(), DTYPE[grad.dtype], reduction, g.shape[0], g.shape[1],
        g.stride(0), a.stride(0), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _scores_triton(grad: torch.Tensor, activation: torch.Tensor, reduction: int) -> torch.Tensor:
    from ..kernels import attribution as kernels

    return kernels.scores(_rows(grad), _rows(activation), reduction).view(grad.shape[:-1])


def _scores_fake(grad: torch.Tensor, activation: torch.Tensor, reduction: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[:-1], dtype=accumulation_dtype(grad.dtype))


def _scores_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    grad, activation, ctx.reduction = inputs
    ctx.save_for_backward(grad, activation, output)


def _scores_grad(ctx: Any, upstream: torch.Tensor) -> tuple:
    wanted = ctx.needs_input_grad[:2]
    d_grad, d_activation = _scores_backward(
        *ctx.saved_tensors[:2], upstream, ctx.saved_tensors[2], ctx.reduction, *wanted
    )
    return d_grad if wanted[0] else None, d_activation if wanted[1] else None, None


def _empty_like_rows(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    """A contiguous result of x's shape; an unwanted one is empty, since an operator returns no None."""
    return x.new_empty(x.shape if wanted else (0,))


def _scores_backward_cpu(
    grad: torch.Tensor, activation: torch.Tensor, upstream: torch.Tensor, scores: torch.Tensor,
    reduction: int, want_grad: bool, want_activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    g, a = _rows(grad), _rows(activation)
    d_grad, d_activation = _empty_like_rows(grad, want_grad), _empty_like_rows(activation, want_activation)
    upstream = upstream.contiguous()
    _core.attribution_scores_backward(
        g.data_ptr(), a.data_ptr(), upstream.data_ptr(), scores.data_ptr(), DTYPE[grad.dtype], reduction,
        g.shape[0], g.shape[1], g.stride(0), a.stride(0), address(d_grad if want_grad else None),
        address(d_activation if want_activation else None), torch.get_num_threads(),
    )  # fmt: skip
    return d_grad, d_activation


def _scores_backward_triton(
    grad: torch.Tensor, activation: torch.Tensor, upstream: torch.Tensor, scores: torch.Tensor,
    reduction: int, want_grad: bool, want_activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from ..kernels import attribution as kernels

    d_grad, d_activation = _empty_like_rows(grad, want_grad), _empty_like_rows(activation, want_activation)
    kernels.scores_backward(
        _rows(grad), _rows(activation), upstream.reshape(-1).contiguous(), scores.reshape(-1), reduction,
        d_grad if want_grad else None, d_activation if want_activation else None,
    )  # fmt: skip
    return d_grad, d_activation


def _scores_backward_fake(
    grad: torch.Tensor, activation: torch.Tensor, upstream: torch.Tensor, scores: torch.Tensor,
    reduction: int, want_grad: bool, want_activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _empty_like_rows(grad, want_grad), _empty_like_rows(activation, want_activation)


_scores = register(
    "attribution_scores",
    "(Tensor grad, Tensor activation, int reduction) -> Tensor",
    cpu=_scores_cpu,
    triton=_scores_triton,
    fake=_scores_fake,
    setup_context=_scores_setup,
    backward=_scores_grad,
)
_scores_backward = register(
    "attribution_scores_backward",
    "(Tensor grad, Tensor activation, Tensor upstream, Tensor scores, int reduction, bool want_grad, "
    "bool want_activation) -> (Tensor, Tensor)",
    cpu=_scores_backward_cpu,
    triton=_scores_backward_triton,
    fake=_scores_backward_fake,
)


class RunningMoments:
    """Count, mean and M2 (sum of squared deviations) of a stream of scores, for every id.

    A batch's moments are merged into those before it, so the result does not depend, to rounding, on how the
    stream is cut, and two states merge as if one had seen both. Plain torch; sums are float64.

    Args:
        size: ids are in [0, size).
        device: of the state and of what `update` gets.
    Source: Welford 1962; Chan, Golub & LeVeque 1979 for merging.
    """

    def __init__(self, size: int, device: torch.device | str | None = None) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"size must be a whole number of ids, got {size!r}")
        self.count = torch.zeros(size, dtype=torch.int64, device=device)
        self._mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._m2 = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add scores [...] under their ids [...]; those with `mask` false do not exist.

        Raises: TypeError for another dtype, ValueError if shapes or devices differ, IndexError for a counting id
            outside [0, size).
        """
        _check.floating("scores", scores)
        _check.integer("ids", ids)
        _check.shape("ids", ids, scores.shape, "scores")
        _check.device("scores", scores, self.count.device, "the moments")
        _check.device("ids", ids, scores.device, "scores")
        values, places = scores.detach().reshape(-1).double(), ids.reshape(-1).long()
        if mask is not None:
            keep = _check.mask("mask", mask, scores.shape, "scores", scores.device).reshape(-1)
            values, places = values[keep], places[keep]
        size = len(self.count)
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
            raise IndexError(f"ids must be in [0, {size}), got {int(places.min())} to {int(places.max())}")
        batch = RunningMoments(size, self.count.device)
        batch.count.index_add_(0, places, torch.ones_like(places))
        batch._mean.index_add_(0, places, values)
        batch._mean /= batch.count.clamp_min(1)
        batch._m2.index_add_(0, places, (values - batch._mean[places]) ** 2)
        self.merge(batch)

    def merge(self, other: "RunningMoments") -> None:
        """Add what `other`, of the same size, has seen."""
        _check.shape("other", other.count, self.count.shape, "these moments")
        share = other.count.double() / (self.count + other.count).clamp_min(1)
        delta = other._mean - self._mean
        self._mean = self._mean + delta * share
        self._m2 = self._m2 + other._m2 + delta * delta * self.count * share
        self.count = self.count + other.count

    @property
    def mean(self) -> torch.Tensor:
        """[size] float64; 0 without observations."""
        return self._mean

    @property
    def variance(self) -> torch.Tensor:
        """[size] float64, M2 / (count - 1); NaN for fewer than two observations."""
        return torch.where(self.count > 1, self._m2 / (self.count - 1), torch.nan)

    @property
    def standard_error(self) -> torch.Tensor:
        """[size] float64, of the mean; NaN for fewer than two observations."""
        return (self.variance / self.count).sqrt()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of "count", "mean" and "m2"."""
        return {"count": self.count.clone(), "mean": self._mean.clone(), "m2": self._m2.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to a state of the same size."""
        for name in ("count", "mean", "m2"):
            _check.shape(name, state[name], self.count.shape, "these moments")
        device = self.count.device
        self.count, self._mean, self._m2 = (
            state[name].to(device).clone() for name in ("count", "mean", "m2")
        )
