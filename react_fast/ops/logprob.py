"""Log-probabilities of the chosen tokens of every row, and the entropy of the row, from logits."""

from typing import Literal, overload

import torch

from .. import reference
from . import _check, _logprob
from ._logprob import HIGH as HIGH
from ._logprob import LOW as LOW
from .backend import use_reference


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    logit_floor: torch.Tensor | None = ...,
    inplace_backward: bool = ...,
) -> torch.Tensor: ...


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    return_entropy: Literal[True],
    logit_floor: torch.Tensor | None = ...,
    inplace_backward: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    logit_floor: torch.Tensor | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the chosen tokens of every row, and the row's entropy, in nats.

        z = softcap * tanh(logits / softcap) / temperature
        logp = z[id] - log sum_j exp(z_j)        H = -sum_j p_j log p_j,  p_j = exp(z_j) / sum
        j runs over the kept tokens: all, or with a floor those with logits_j >= logit_floor and the chosen ones

    One read of the logits forward, one read and one write backward; nothing of their size is kept but the
    logits themselves.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any strides. -inf forbids a token, with a softcap
            too: it adds nothing to the sum or the entropy, its gradient is 0, and choosing it gives -inf.
        token_ids: [...] int32 or int64, or [..., K] for K tokens a row (K may be 0, and ids may repeat), told
            apart by the number of axes; in [0, V) where the mask is true, anything (-100) elsewhere.
        temperature: a number, or a floating tensor [...] with one for each row; in [1e-30, 1e30]. No gradient.
        softcap: a number in [1e-30, 1e30]; None for none.
        mask: [...] bool or 0/1 integers, true where the row counts. The other rows give 0 and gradient 0, and
            nothing in them is looked at.
        return_entropy: also return H.
        logit_floor: [...] float, in the units of `logits` as given, before softcap and temperature: the smallest
            logit that a sampler under top-p or top-k kept, so that logp is what the sampler drew with. The chosen
            tokens are always kept, so that rounding between sampler and trainer never gives a ratio of 0. What is
            dropped has gradient exactly 0. -inf keeps everything and gives bitwise the result of None; one floor
            is for all K tokens of a row, which then share one kept set. No gradient.
        inplace_backward: write the gradient over the memory of `logits` and hand that on, which halves the memory
            of the step. The numbers are bitwise the same. The logits then count as changed: a second backward, or
            the backward of anything else that saved them and runs later, raises torch's RuntimeError about an
            in-place operation. Where torch traces or batches the backward (torch.compile, is_grads_batched, a
            dispatch mode) the gradient gets memory of its own, as without this option.
    Returns: logp, shaped like token_ids, or (logp, H) with H [...]; float32 (float64 for float64), both
        differentiable in `logits`. logp is never above 0. A row with NaN gives NaN, below a floor too. A row whose
        tokens are all forbidden gives logp -inf, H 0 and gradient 0.
    Raises: TypeError for another dtype; ValueError for another shape or device, a temperature or softcap out of
        range, a floor of NaN in a row that counts, a temperature or floor that requires a gradient, and with
        inplace_backward and a gradient for logits that are a leaf or a view of one, overlap themselves, or are not
        rows of unit stride at two row strides at most; IndexError for an id outside [0, V) in a row that counts.
        On CUDA, where looking at values would wait for the device, such an id, such a floor or a temperature that
        is not above 0 gives NaN (an id: its logp, the others: the row) instead; REACT_FAST_CHECKED=1 in the
        environment raises there too.
    Source: Williams 1992 (REINFORCE) for the score function; Milakov & Gimelshein 2018 (arXiv:1805.02867),
        one-pass softmax; Gemma 2 (arXiv:2408.00118), softcap; Holtzman et al. 2020 (arXiv:1904.09751), sampling
        from a truncated distribution (top-p).
    """
    _check.floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must be [..., V], got a scalar")
    rows = logits.shape[:-1]
    _check_ids(token_ids, logits)
    if mask is not None:
        mask = _check.mask("mask", mask, rows, "logits[..., 0]", logits.device)
    if isinstance(temperature, torch.Tensor):
        check_temperature(temperature, logits)
        shared, per_row = 1.0, temperature
    else:
        shared, per_row = _check.number("temperature", temperature, low=LOW, high=HIGH), None
    cap = 0.0 if softcap is None else _check.number("softcap", softcap, low=LOW, high=HIGH)
    if logit_floor is not None:
        _check_rows("logit_floor", logit_floor, logits)
    if inplace_backward:
        _check_in_place(logits)
    if use_reference():
        return reference.token_logprobs(
            logits,
            token_ids,
            temperature=temperature,
            softcap=softcap,
            mask=mask,
            return_entropy=return_entropy,
            logit_floor=logit_floor,
        )
    logp, entropy, _ = _logprob.token_logprobs(
        logits,
        token_ids,
        mask,
        per_row,
        logit_floor,
        shared,
        cap,
        bool(return_entropy),
        bool(inplace_backward),
    )
    return (logp, entropy) if return_entropy else logp


def check_temperature(temperature: torch.Tensor, rows: torch.Tensor, like: str = "logits") -> None:
    """One temperature for each row of `rows` [..., X], which the caller knows as `like`."""
    _check_rows("temperature", temperature, rows, like)


def _check_rows(name: str, value: torch.Tensor, rows: torch.Tensor, like: str = "logits") -> None:
    _check.floating(name, value)
    _check.shape(name, value, rows.shape[:-1], f"{like}[..., 0]")
    _check.device(name, value, rows.device, like)
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient, got a tensor that does; pass .detach()")


def _check_ids(token_ids: torch.Tensor, logits: torch.Tensor) -> None:
    rows = logits.shape[:-1]
    _check.integer("token_ids", token_ids)
    if token_ids.dim() != logits.dim():
        _check.shape("token_ids", token_ids, rows, "logits[..., 0]")
    elif token_ids.shape[:-1] != rows:
        wanted = ", ".join([*map(str, rows), "K"])
        raise ValueError(f"token_ids must be [{wanted}] like logits[..., 0], got {list(token_ids.shape)}")
    _check.device("token_ids", token_ids, logits.device, "logits")


def _check_in_place(logits: torch.Tensor) -> None:
    """A gradient may be written over logits that autograd owns, that are no two elements in one place, and whose
    rows the kernels reach without a copy. A compiled backward writes elsewhere and needs none of this."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return
    base = logits if logits._base is None else logits._base
    if logits.is_leaf or (base.is_leaf and base.requires_grad):
        raise ValueError("logits must not be a leaf or a view of one with inplace_backward, got one")
    if _logprob.overlaps(logits):
        raise ValueError(
            f"logits must not overlap itself with inplace_backward, got strides {list(logits.stride())}"
        )
    if not logits.is_meta and _logprob.layout(logits)[0] is not logits:
        raise ValueError(
            "logits must be rows of unit stride at two row strides at most with inplace_backward, got strides "
            f"{list(logits.stride())}; pass .contiguous()"
        )
