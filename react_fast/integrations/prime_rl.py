"""prime-rl: its fused LM heads, and a loss by import path.

| name in `prime_rl.trainer.models.layers` | what ours changes |
| --- | --- |
| `lm_head._SequenceChunkedLogProbEntropyFn` | the engine of `linear_token_logprobs`, at most 4 GEMMs |
| `lm_head_gemma._GemmaChunkedLogProbEntropyFn` | the same with a softcap |

    [trainer.loss]
    type = "custom"
    import_path = "react_fast.integrations.prime_rl.loss"
    kwargs = { objective = "GSPO", ratio_min = 0.9997, ratio_max = 1.0004 }

replaces no name: every objective of `policy_loss`, value and gradient in one pass.

Numbers and gradients are prime-rl's to rounding, for a label in [0, V) in every row; as there the entropy has no
gradient. The original is called for tensors of other dtypes or devices, sharded weights and torch.compile.

prime-rl has no door for plugins: `patch("prime_rl")` has to run in every trainer process, for example at the
import of a module of yours that the path of the loss names. Read: prime-rl 0.8.0, of August 2026. prime-rl wants a
GPU: tried were its two modules by themselves on a CPU, where those tests of its heads pass that need no GPU. The
tests here have stubs of the same signatures.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..ops._objectives import OBJECTIVES
from ..ops.policy_loss import policy_loss
from .cases import numbers, pulled
from .fused_head import can_run, head_logprobs, one_dtype
from .points import Case, Integration, Point

Tensor = torch.Tensor


def fused_head(original: Any) -> Any:
    """A class whose `apply` is that of prime-rl's functions; the softcap is Gemma's alone."""

    class HeadLogProbs:
        forward = staticmethod(original.forward)

        @staticmethod
        def apply(
            hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int,
            *softcap: float,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            """(logp, entropy), [N] float32.

            Args:
                hidden: [N, H]. weight: [V, H]. labels: [N] int64 in [0, V). inv_temperature: [N] float above 0.
            """
            ours = can_run(hidden, weight) and one_dtype(hidden, weight)
            if not ours or labels.dtype not in (torch.int32, torch.int64):
                return original.apply(hidden, weight, labels, inv_temperature, chunk_size, *softcap)
            logp, entropy, _ = head_logprobs(
                hidden, weight, labels, softcap=softcap[0] if softcap else None,
                temperature=inv_temperature.reciprocal(),
            )  # fmt: skip
            return logp, entropy.detach()

    return HeadLogProbs


def loss(
    inputs: Any, *, objective: str = "PPOClip", kl_coef: float = 0.0, kl_estimator: str = "k2",
    kl_gradient: str = "value", **bounds: Any,
) -> Any:  # fmt: skip
    """One of `policy_loss`'s objectives for one sequence, summed over its tokens as prime-rl's losses are.

    Args:
        inputs: prime-rl's LossInputs: trainer_logprobs, inference_logprobs, advantages [T] float, loss_mask [T]
            bool, loss_weights [T] or None.
        objective: name of a class in react_fast.reference.objectives.  bounds: its fields (ratio_min, ...).
        kl_coef, kl_estimator, kl_gradient: see `policy_loss`; of the policy against the one that sampled.
    Returns: prime-rl's LossOutputs, the metrics those of `policy_loss`.
    Raises: ValueError in one line for another objective, for bounds that it does not have, and for kl_coef with
        loss_weights, which prime-rl takes to weigh both terms.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    made = _objective(objective, bounds)
    weights, sampled = inputs.loss_weights, inputs.inference_logprobs[None]
    if weights is not None and kl_coef:
        raise ValueError(f"kl_coef must be 0 for tokens with weights, got {kl_coef:g}")
    found, metrics = policy_loss(
        inputs.trainer_logprobs[None], sampled, inputs.advantages[None], inputs.loss_mask[None], objective=made,
        aggregation="token_sum_norm", denominator=1.0, ref_logprobs=sampled if kl_coef else None, kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_gradient=kl_gradient, importance=None if weights is None else weights[None],
    )  # fmt: skip
    return LossOutputs(loss=found, metrics=dict(metrics))


def _objective(name: str, bounds: dict[str, Any]) -> Any:
    known = {kind.__name__: kind for kind in OBJECTIVES}
    if name not in known:
        raise ValueError(f"objective must be one of {', '.join(known)}, got {name!r}")
    fields = inspect.signature(known[name]).parameters
    unknown = [x for x in bounds if x not in fields]
    if unknown:
        raise ValueError(f"{name} has {', '.join(fields) or 'no bounds'}, got {', '.join(unknown)}")
    return known[name](**bounds)


def _head_cases(*softcap: float) -> Callable[[torch.device], list[Case]]:
    def cases(device: torch.device) -> list[Case]:
        def of(dtype: torch.dtype) -> Callable[[Any], dict[str, Tensor]]:
            def run(function: Any) -> dict[str, Tensor]:
                hidden, weight = (numbers(device, n, 8, seed=1).to(dtype).requires_grad_() for n in (5, 19))
                labels = torch.arange(5, device=device) * 7 % 19
                inverse = torch.linspace(0.5, 2, 5, device=device)
                logp, entropy = function.apply(hidden, weight, labels, inverse, 2, *softcap)
                # prime-rl's backward refuses a gradient of the entropy.
                return pulled({"logprobs": logp}, hidden=hidden, weight=weight) | {
                    "entropy": entropy.detach()
                }

            return run

        return [
            Case("temperatures", of(torch.float32)),
            # Products of 8 numbers rounded to 8 bits, and probabilities of them.
            Case("bfloat16", of(torch.bfloat16), 0.05),
        ]

    return cases


_LAYERS = "prime_rl.trainer.models.layers"
INTEGRATION = Integration(
    package="prime_rl",
    distribution="prime-rl",
    at_least=(0, 8),
    below=(1, 0),
    points=(
        Point(
            f"{_LAYERS}.lm_head._SequenceChunkedLogProbEntropyFn", "cf3aa104d505", fused_head, _head_cases(),
            "linear_token_logprobs", called="forward",
        ),
        Point(
            f"{_LAYERS}.lm_head_gemma._GemmaChunkedLogProbEntropyFn", "b5b7261f1e8d", fused_head, _head_cases(2.0),
            "linear_token_logprobs", called="forward",
        ),
    ),
)  # fmt: skip
