"""torchrl's TransformersWrapper: log-probabilities of tokens from logits, without the log-softmax in memory.

Its conventions stay: the first token of a row has 0, and so have tokens that the attention mask leaves out and
those that are -100; padding that counts is scored as any token. The originals are called for logits other than
floats on CPU or CUDA, tokens other than int64, and under torch.compile.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..ops._check import FLOATS
from ..ops.logprob import token_logprobs
from .points import Case, Point

Tensor = torch.Tensor
_IGNORED = -100


def _covered(logits: Any, tokens: Any) -> bool:
    return (
        not torch.compiler.is_compiling()
        and isinstance(logits, Tensor)
        and isinstance(tokens, Tensor)
        and (logits.dim(), tokens.dim()) == (3, 2)
        and logits.shape[:2] == tokens.shape
        and logits.dtype in FLOATS
        and tokens.dtype == torch.int64
        and logits.device == tokens.device
        and logits.device.type in ("cpu", "cuda")
    )


def _scored(logits: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """[B, T] of the logits' dtype; 0 without gradient where a token does not count."""
    return token_logprobs(logits, tokens, mask=counts & (tokens != _IGNORED)).to(logits.dtype)


def of_model_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """log pi(token t | tokens before t) from a forward pass, and the logits moved to the token they predict."""

    @functools.wraps(original)
    def replacement(
        self: Any, model_output: Any, input_ids: Tensor, attention_mask: Tensor, pad_val: Any,
        logits_only: bool = False,
    ) -> Any:  # fmt: skip
        logits = model_output["logits"]
        if logits_only or not _covered(logits, input_ids) or attention_mask.shape != input_ids.shape:
            return original(self, model_output, input_ids, attention_mask, pad_val, logits_only)
        shifted = torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], 1)
        tokens = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, 1:]], 1)
        counts = attention_mask.bool()
        first = torch.zeros_like(counts)
        first[:, 1:] = counts[:, 1:] & ~counts[:, :-1]
        first[:, 0] = ~first.any(1)
        return _scored(shifted, tokens, counts & ~first), shifted

    return replacement


def of_generation(original: Any) -> Any:
    """log pi of tokens that were generated, from the logits they were drawn from; rows padded on the left."""
    theirs = original.__func__

    @functools.wraps(theirs)
    def replacement(cls: Any, tokens: Any, logits: Any, pad_val: int = _IGNORED, pad: bool = True) -> Any:
        if pad:
            tokens = pad_sequence(tokens, padding_value=pad_val, batch_first=True, padding_side="left")
            logits = pad_sequence(logits, padding_value=0.0, batch_first=True, padding_side="left")
        if not _covered(logits, tokens):
            return theirs(cls, tokens, logits, pad_val, False)
        counts = torch.ones_like(tokens, dtype=torch.bool)
        counts[:, 0] = False
        return _scored(logits, tokens, counts), logits

    return classmethod(replacement)


ROWS, STEPS, VOCAB = 3, 5, 17


def _given(device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [3, 5, 17] and tokens [3, 5]."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(
        ROWS, STEPS, VOCAB, generator=generator, device="cpu", dtype=torch.float32, requires_grad=True
    )
    tokens = torch.randint(VOCAB, (ROWS, STEPS), generator=generator, device="cpu")
    return logits.to(device), tokens.to(device)


def _found(scored: tuple[Tensor, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    logp, logits = scored
    upstream = torch.linspace(-1, 2, logp.numel(), device=logp.device).view_as(logp)
    pulled = torch.autograd.grad(logp, inputs, upstream)
    return {"log_probs": logp.detach(), "logits": logits.detach()} | {
        f"d logits {i}": x for i, x in enumerate(pulled)
    }


def _output_cases(device: torch.device) -> list[Case]:
    def run(*masked: tuple[int, int]) -> Any:
        def of(function: Any) -> dict[str, Tensor]:
            logits, tokens = _given(device)
            attention = torch.ones_like(tokens)
            for row, step in masked:
                attention[row, step], tokens[row, step] = 0, 0
            return _found(function(None, {"logits": logits}, tokens, attention, 0), logits)

        return of

    return [
        Case("full rows", run()),
        Case("padding on the left", run((0, 0), (0, 1), (2, 0))),
        Case("padding on the right and a hole", run((1, 4), (2, 2))),
    ]


def _generation_cases(device: torch.device) -> list[Case]:
    def padded(function: Any) -> dict[str, Tensor]:
        logits, tokens = _given(device)
        return _found(function.__func__(None, tokens, logits, pad=False), logits)

    def lists(pad_val: int) -> Any:
        def run(function: Any) -> dict[str, Tensor]:
            logits, tokens = _given(device)
            lengths = (5, 2, 3)
            rows = [x[:n] for x, n in zip(logits, lengths, strict=True)]
            ids = [x[:n] for x, n in zip(tokens, lengths, strict=True)]
            return _found(function.__func__(None, ids, rows, pad_val), logits)

        return run

    return [
        Case("one length", padded),
        Case("rows of several lengths", lists(_IGNORED)),
        Case("padding with a token", lists(3)),
    ]


_PLACE = "torchrl.modules.llm.policies.transformers_wrapper.TransformersWrapper"
POINTS = (
    Point(
        f"{_PLACE}._compute_log_probs_from_model_output", "026a9233548b", of_model_output, _output_cases,
        "token_logprobs", aliases=False,
    ),
    Point(
        f"{_PLACE}._log_probs_generate", "d7f421853b4c", of_generation, _generation_cases, "token_logprobs",
        called="__func__", aliases=False,
    ),
)  # fmt: skip
