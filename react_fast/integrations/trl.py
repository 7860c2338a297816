"""TRL: the fused LM head of GRPO, RLOO, DPO, KTO and SFT, and log-probabilities from logits.

| name | what ours changes |
| --- | --- |
| `trl.trainer.utils._ChunkedLogProbFunction` | `linear_token_logprobs`; on a CPU also fewer GEMMs |
| `trl.trainer.utils._use_triton` | on a CPU, too, only positions with a label are projected |
| `selective_log_softmax`, `..._and_entropy`, `entropy_from_logits` | `token_logprobs` |

Numbers and gradients are TRL's to the rounding of the dtype. The original is called for what ours does not give:
`log_sum_sq_probs` (DPO with use_weighting), `mean_logits` under a softcap (KTO and DPO on Gemma 2), logits of half
precision where TRL has no kernel, weights that DeepSpeed ZeRO-3 has partitioned, devices other than CPU and CUDA,
torch.compile and the reference backend.
"""

import types
from collections.abc import Callable
from typing import Any

import torch

from .cases import numbers
from .points import Case, Integration, Point
from .trl_logprobs import entropy_from_logits, fused_head, selective_log_softmax, selective_with_entropy

Tensor = torch.Tensor
ROWS, WIDTH, VOCAB = 5, 8, 19
_EVERYTHING = ("log_probs", "entropy", "mean_logits", "is_top1")


def compacting(original: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Says to TRL's fused head whether to project the positions with a label alone."""

    def compact(device: torch.device) -> bool:
        return device.type == "cpu" or original(device)

    return compact


def _gradients(found: dict[str, Tensor], **inputs: Tensor) -> dict[str, Tensor]:
    """The results and what they pull on the inputs with, one after the other."""
    results = {name: x.detach() for name, x in found.items()}
    for name in ("log_probs", "entropy"):
        if name in found:
            upstream = torch.linspace(-1, 2, found[name].numel(), device=found[name].device)
            upstream = upstream.view_as(found[name]).to(found[name].dtype)
            pulled = torch.autograd.grad(found[name], list(inputs.values()), upstream, retain_graph=True)
            results |= {f"d {name} / d {of}": x for of, x in zip(inputs, pulled, strict=True)}
    return results


def _head_cases(device: torch.device) -> list[Case]:
    def with_options(
        temperature: float, biased: bool, softcap: float | None, scale: float, dtype: Any, outputs: Any
    ) -> Any:
        def run(function: Any) -> dict[str, Tensor]:
            hidden, weight = (
                numbers(device, n, WIDTH, seed=1).to(dtype).requires_grad_() for n in (ROWS, VOCAB)
            )
            inputs = {"hidden": hidden, "weight": weight}
            if biased:
                inputs["bias"] = numbers(device, VOCAB).to(dtype).requires_grad_()
            ids = torch.tensor([0, VOCAB - 1, 3, 7, 7], device=device)
            parts = function.apply(
                hidden, weight, inputs.get("bias"), ids, temperature, 8, softcap, scale, outputs
            )
            names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
            found = {name: x for name, x in zip(names, parts, strict=True) if x is not None}
            return _gradients(found, **inputs)

        return run

    plain, half = torch.float32, torch.bfloat16
    return [
        Case("log-probabilities alone", with_options(1.0, False, None, 1.0, plain, ("log_probs",))),
        Case("temperature, bias and scale", with_options(0.7, True, None, 0.5, plain, _EVERYTHING)),
        Case("a softcap", with_options(1.3, False, 2.0, 1.0, plain, ("log_probs", "entropy"))),
        # Products of WIDTH numbers rounded to 8 bits, and probabilities of them.
        Case("bfloat16", with_options(0.7, True, None, 1.0, half, ("log_probs", "entropy")), 0.05),
    ]


class _TinyModel(torch.nn.Module):
    """As much of a causal language model as TRL's fused head looks at; its hidden states are its input."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.head = types.SimpleNamespace(weight=weight, bias=None)
        self.config = types.SimpleNamespace(model_type="tiny")
        self.config.get_text_config = lambda: self.config

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head.weight.T

    def base_model(self, hidden: Tensor, **_: Any) -> Any:
        return types.SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> Any:
        return self.head


def _compaction_cases(device: torch.device) -> list[Case]:
    """TRL's own head around a tiny model, with the function in the place of the global."""

    def run(function: Any) -> dict[str, Tensor]:
        from trl.trainer.utils import add_fused_lm_head as add

        names = {**add.__globals__, "_use_triton": function}
        model = _TinyModel(numbers(device, VOCAB, WIDTH).requires_grad_())
        types.FunctionType(add.__code__, names, add.__name__, add.__defaults__)(
            model, 0.7, False, _EVERYTHING
        )
        hidden = numbers(device, 2, ROWS, WIDTH).requires_grad_()
        labels = torch.tensor([[-100, -100, 3, 18, -100], [-100] * ROWS], device=device)
        found = model(hidden, labels=labels, fused_lm_head=True)
        results = {name: getattr(found, name) for name in (*_EVERYTHING, "label_mask")}
        results |= {"loss": found.loss, "padded head": found.log_probs[1].sum()}
        return _gradients(results, hidden=hidden, weight=model.head.weight)

    return [Case("labels of -100", run)]


def _logits_case(call: Callable[..., Any], dtype: torch.dtype = torch.float32, *, chosen: int = 0) -> Any:
    def make(device: torch.device) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any) -> dict[str, Tensor]:
            logits = numbers(device, 1, ROWS, VOCAB).to(dtype).requires_grad_()
            ids = torch.tensor([[0, VOCAB - 1, 3, 7, 7]], device=device)
            ids = ids[..., None].expand(1, ROWS, chosen) if chosen else ids
            mask = torch.tensor([[1, 0, 1, 1, 0]], device=device)
            found = call(function, logits, ids, mask)
            named = found if isinstance(found, tuple) else (found,)
            return _gradients(dict(zip(("log_probs", "entropy"), named, strict=False)), logits=logits)

        return run

    return make


_SELECTED = {
    "a temperature": (_logits_case(lambda f, logits, ids, mask: f(logits, ids, temperature=0.7)), 1e-5),
    "a mask": (_logits_case(lambda f, logits, ids, mask: f(logits, ids, row_mask=mask)), 1e-5),
    "three tokens a row": (_logits_case(lambda f, logits, ids, mask: f(logits, ids), chosen=3), 1e-5),
    "bfloat16": (_logits_case(lambda f, logits, ids, mask: f(logits, ids), torch.bfloat16), 0.02),
}
_BOTH = {
    "temperature and mask": (
        _logits_case(lambda f, logits, ids, mask: f(logits, ids, temperature=0.7, row_mask=mask)),
        1e-5,
    ),
    "bfloat16": (_logits_case(lambda f, logits, ids, mask: f(logits, ids), torch.bfloat16), 0.02),
}
_ENTROPY = {
    "float32": (_logits_case(lambda f, logits, ids, mask: f(logits)), 1e-5),
}


def _cases(table: dict[str, Any]) -> Callable[[torch.device], list[Case]]:
    return lambda device: [Case(name, make(device), tolerance) for name, (make, tolerance) in table.items()]


_UTILS = "trl.trainer.utils"
INTEGRATION = Integration(
    package="trl",
    distribution="trl",
    at_least=(1, 16),
    below=(2, 0),
    points=(
        Point(
            f"{_UTILS}._ChunkedLogProbFunction", "e32869bc214d", fused_head, _head_cases,
            "linear_token_logprobs", called="forward", aliases=False,
        ),
        # The kernels' own name decides what runs on a GPU, and stays.
        Point(
            f"{_UTILS}._use_triton", "75a980b6fddc", compacting, _compaction_cases, "positions with a label alone",
            aliases=False,
        ),
        Point(
            f"{_UTILS}.selective_log_softmax", "8421767e9ea2", selective_log_softmax, _cases(_SELECTED),
            "token_logprobs",
        ),
        Point(
            f"{_UTILS}.selective_log_softmax_and_entropy", "80ed6f945bf1", selective_with_entropy, _cases(_BOTH),
            "token_logprobs",
        ),
        Point(
            f"{_UTILS}.entropy_from_logits", "540b66ad5a6b", entropy_from_logits, _cases(_ENTROPY),
            "token_logprobs",
        ),
    ),
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """GRPOTrainer, once TRL is there to derive it from."""
    if name != "GRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trl_trainer import GRPOTrainer

    return GRPOTrainer
