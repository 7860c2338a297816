"""Log-probability of the chosen token from hidden states and the output matrix; [N, V] logits never exist."""

from typing import Any, Literal, NamedTuple, overload

import torch

from .. import reference
from . import _check
from ._dtensor import gathered, is_dtensor, plain
from ._linear_logprob_op import Eager, compiled
from ._logprob import overlaps
from ._support_logprob import check_support, support_token_logprobs
from ._tiles import Options
from .backend import accumulation_dtype, use_reference
from .logprob import HIGH, LOW, check_temperature

Maybe = torch.Tensor | None
Support = tuple[torch.Tensor, torch.Tensor]


@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: Maybe = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float | torch.Tensor = ...,
    mask: Maybe = ...,
    return_entropy: Literal[False] = ...,
    tp_group: Any = ...,
    batch_invariant: bool = ...,
    main_grad: Maybe = ...,
    support: Support | None = ...,
) -> torch.Tensor: ...


@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: Maybe = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float | torch.Tensor = ...,
    mask: Maybe = ...,
    return_entropy: Literal[True],
    tp_group: Any = ...,
    batch_invariant: bool = ...,
    main_grad: Maybe = ...,
    support: Support | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: Maybe = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: Maybe = None,
    return_entropy: bool = False,
    tp_group: Any = None,
    batch_invariant: bool = False,
    main_grad: Maybe = None,
    support: Support | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` of logits = logit_scale * (hidden @ weight.T + bias), a tile of logits at a time.

    Where hidden needs a gradient, the forward also sums the expected embedding sum_j p_j W_j, so that the backward
    needs no GEMM: d logp / d hidden = logit_scale / T (W[id] - sum_j p_j W_j). GEMMs of N x V x D, forward and
    backward together: 1 without gradient, 2 for hidden alone, at most 3 for weight alone, at most 4 for both; with
    an entropy and hidden one more. Rows whose upstream gradient is 0 are left out of the backward's.

    Memory beyond inputs, outputs and gradients: tiles of REACT_FAST_TILE_MIB MiB (64; on a GPU 256), and for
    hidden's gradient [N, D] in float32, twice with an entropy. The memory of weight's gradient is taken in the
    forward and keeps logits for the backward, whose GEMM they save (not with `main_grad` or torch.compile): all of
    them if N is at most D, else D in N, so that both gradients of few rows take 3 GEMMs. REACT_FAST_KEEP_MIB (0)
    may hold more. A second backward through the same graph computes them again. An entropy with hidden's gradient
    copies a tile's rows of W.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D], dtype of `hidden` (under autocast both are cast); with `tp_group` this rank's rows
            [V_rank, D], ranks in order. A DTensor (fully_shard) is gathered, and gets the mean over its mesh of
            the ranks' gradients.
        token_ids: [...] int32 or int64, in [0, V) where the mask is true, anything (-100) elsewhere.
        bias: [V] of that dtype, or None; -inf forbids a token.
        logit_scale: number other than 0.
        softcap, temperature, mask, return_entropy: see `token_logprobs`. Only rows that count reach a GEMM;
            counting them waits for a GPU once, except in the capture of a CUDA graph, which computes all rows.
        tp_group: torch.distributed process group over which the vocabulary is split; rows' statistics are
            exchanged, never logits, and hidden's gradient is summed over the ranks. They hold the same hidden.
        batch_invariant: no bit of a row's result and of its hidden gradient depends on the other rows, on their
            number or on the threads; slower, since every GEMM then has one shape and one thread. Without it the
            GEMM library chooses by size. The weight's gradient is a sum over the batch either way.
        main_grad: [V, D] float32 (or the weight's dtype); the weight's gradient is added to it in the backward
            instead of being returned: Megatron's weight.main_grad, or weight.grad itself.
        support: (kept_ids [M], offsets [N + 1]) int32 or int64, the tokens that a truncated sampler (top-p, top-k,
            min-p) left in, N = token_ids.numel(), offsets rising from 0 to M: row i in flattened order kept
            kept_ids[offsets[i] : offsets[i + 1]]. The sum, H and the gradient run over these and the row's token,
            each once however often it stands there. That is what the importance ratio against such a sampler
            needs: it drew from the kept tokens alone, so ratios of the whole vocabulary's softmax are too small by
            the factor of the kept mass, another one in every row. Costs M D multiply-adds and no GEMM; batch-
            invariant anyway; waits for a GPU. Not with `tp_group` or `main_grad`.
    Returns: logp [...], or (logp, H), float32 (float64 for float64), differentiable once in hidden, weight, bias.
        Matmuls run in the dtype of `hidden`, everything else in float32 or better. On a GPU the logits and sums of
        half precision are the GEMM's float32 ones; on a CPU the GEMM library rounds a tile's product to that dtype
        before it is added in float32, in main_grad too.
    Raises: TypeError, ValueError and IndexError as `token_logprobs`, IndexError also for a kept id outside [0, V)
        in a row that counts.
    Source: expected embeddings: the score function's gradient, Williams 1992; online rescaling: Milakov &
        Gimelshein 2018 (arXiv:1805.02867); logits in tiles: Wijmans et al. 2024 (arXiv:2411.09009); sums straight
        into main_grad: Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053); truncated sampling: Holtzman et al.
        2020 (arXiv:1904.09751).
    """
    token_ids = plain("token_ids", token_ids)
    given = checked(
        hidden, weight, token_ids, bias, logit_scale, softcap, temperature, mask, batch_invariant, tp_group
    )
    if main_grad is not None:
        if is_dtensor(weight):
            raise ValueError(
                "main_grad must be None for a DTensor weight, got a tensor; its .grad is sharded"
            )
        check_main_grad(plain("main_grad", main_grad), given.weight)
    if support is not None:
        support = check_support(support, token_ids, tp_group)
        _only_eager("with a support", None, main_grad)
    if use_reference():
        _only_eager("on the reference backend", tp_group, main_grad)
        return reference.linear_token_logprobs(
            given.hidden, given.weight, token_ids, bias=given.bias, logit_scale=given.options.scale,
            softcap=softcap, temperature=plain("temperature", temperature), mask=given.mask,
            return_entropy=return_entropy, support=support,
        )  # fmt: skip
    tensors = (given.hidden, given.weight, given.bias, token_ids, given.mask, given.per_row)
    recording = torch.is_grad_enabled()
    if support is not None:
        scale, shared, cap, _ = given.options
        logp, entropy = support_token_logprobs(*tensors, support, scale, shared, cap, bool(return_entropy))
    elif is_eager(given.hidden):
        logp, entropy, _ = Eager.apply(
            *tensors, given.options, bool(return_entropy), tp_group, main_grad, recording
        )
    else:
        _only_eager("under torch.compile and for fake tensors", tp_group, main_grad)
        want_hidden = recording and given.hidden.requires_grad
        logp, entropy, *_ = compiled(*tensors, *given.options, bool(return_entropy), want_hidden)
    return (logp, entropy) if return_entropy else logp


class Given(NamedTuple):
    """Checked arguments of an op that reads hidden states and an output matrix, as its engine takes them."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: Maybe
    mask: Maybe
    per_row: Maybe
    options: Options


def is_eager(hidden: torch.Tensor) -> bool:
    """Neither compiled, nor fake, nor inside a function transform (torch.func, torch.vmap)."""
    dense = type(hidden) in (torch.Tensor, torch.nn.Parameter) and not hidden.is_meta
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return dense and not transformed and not torch.compiler.is_compiling()


def _only_eager(where: str, tp_group: Any, main_grad: Maybe) -> None:
    if tp_group is not None:
        raise ValueError(f"tp_group must be None {where}, got a process group")
    if main_grad is not None:
        raise ValueError(f"main_grad must be None {where}, got a tensor")


def checked(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, bias: Maybe, logit_scale: float,
    softcap: float | None, temperature: float | torch.Tensor, mask: Maybe, batch_invariant: bool,
    tp_group: Any = None,
) -> Given:  # fmt: skip
    """The arguments in the form of the engine, or the error that names the wrong one."""
    hidden, mask, temperature = (
        plain("hidden", hidden),
        plain("mask", mask),
        plain("temperature", temperature),
    )
    device = _check.floating("hidden", hidden).device.type
    casts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else None
    weight = gathered("weight", weight, dtype, tp_group)
    bias = None if bias is None else gathered("bias", bias, dtype, tp_group)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_matrices(hidden, weight, bias)
    rows = hidden.shape[:-1]
    _check.integer("token_ids", token_ids)
    _check.shape("token_ids", token_ids, rows, "hidden[..., 0]")
    _check.device("token_ids", token_ids, hidden.device, "hidden")
    if mask is not None:
        mask = _check.mask("mask", mask, rows, "hidden[..., 0]", hidden.device)
    scale = _check.number("logit_scale", logit_scale, low=-HIGH, high=HIGH)
    if abs(scale) < LOW:
        raise ValueError(f"logit_scale must not be 0, got {scale:g}")
    cap = 0.0 if softcap is None else _check.number("softcap", softcap, low=LOW, high=HIGH)
    if isinstance(temperature, torch.Tensor):
        check_temperature(temperature, hidden, "hidden")
        shared, per_row = 1.0, temperature
    else:
        shared, per_row = _check.number("temperature", temperature, low=LOW, high=HIGH), None
    return Given(hidden, weight, bias, mask, per_row, Options(scale, shared, cap, bool(batch_invariant)))


def check_main_grad(main_grad: torch.Tensor, weight: torch.Tensor) -> None:
    _check.floating("main_grad", main_grad)
    if main_grad.dtype not in (weight.dtype, accumulation_dtype(weight.dtype)):
        _check.dtype("main_grad", main_grad, accumulation_dtype(weight.dtype), "the sums")
    _check.shape("main_grad", main_grad, weight.shape, "weight")
    _check.device("main_grad", main_grad, weight.device, "weight")
    if main_grad.requires_grad:
        raise ValueError("main_grad must not require a gradient, got a tensor that does; pass .detach()")
    if not weight.requires_grad:
        raise ValueError("main_grad must be None for a weight that requires no gradient, got a tensor")
    if overlaps(main_grad) or main_grad.data_ptr() == weight.data_ptr():
        raise ValueError(
            "main_grad must be memory of its own, got a tensor that overlaps itself or the weight"
        )


def _check_matrices(hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe) -> None:
    if hidden.dim() == 0:
        raise ValueError("hidden must be [..., D], got a scalar")
    _check.dtype("weight", _check.floating("weight", weight), hidden.dtype, "hidden")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] like hidden, got {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight must have a row for every token, got none")
    _check.device("weight", weight, hidden.device, "hidden")
    if bias is not None:
        _check.dtype("bias", _check.floating("bias", bias), hidden.dtype, "hidden")
        _check.shape("bias", bias, weight.shape[:1], "weight[:, 0]")
        _check.device("bias", bias, hidden.device, "hidden")
