"""transformers: log-probabilities without logits from its causal language models, and a callback that lets
react_fast's causality tracker watch any Hugging Face Trainer, TRL's among them."""

import contextlib
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..ops.linear_logprob import linear_token_logprobs
from ..tracker import CausalityTracker
from ..trainer.output_layer import OutputLayer, output_layer, passes_through

STATE = "causality.pt"
IGNORED = -100
_layers: "weakref.WeakKeyDictionary[Any, OutputLayer]" = weakref.WeakKeyDictionary()


def fused(
    model: Any,
    input_ids: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
    **inputs: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What `model(input_ids, labels=labels)` knows of the labels, without its logits [B, T, V].

    `logp = fused(model, **batch)`; the model's own loss is -logp.sum() / (labels[:, 1:] != -100).sum(). The head
    is as it is in that moment: biased, scaled, soft-capped, tied, in PEFT's modules_to_save, with LoRA and its
    dropout, merged or off. It is tried on a few tokens when a model first comes, by two forwards more.

    Args:
        model: causal language model of transformers, whose logits follow from its last hidden states by one linear
            layer, or a PeftModel of one. DDP and FSDP wrap a `FusedHead`, since the model's own `forward`, for
            which they wait, is not called.
        input_ids: [B, T]; or inputs_embeds among `inputs`.
        labels: [B, T] int64 as transformers takes them: labels[:, t] is scored by what stands before t, and where
            it is -100 it is not.
        shift_labels: [B, T], instead: shift_labels[:, t] follows column t.
        temperature: number or [B, T] like the labels, above 0.
        return_entropy: also return the entropy of the distribution that each label is scored by.
        inputs: what the model below the head takes (attention_mask, position_ids, pixel_values, ...).
    Returns: logp or (logp, entropy), [B, T] like the labels, float32, of float64 models float64; 0 where these are
        -100, and for `labels` in column 0; differentiable.
    Raises: ValueError in one line for another head, for both or none of the labels, for labels of another shape
        than the inputs or a temperature of another than theirs, and for PEFT's adapter_names.
    """
    if "adapter_names" in inputs:  # which the model below the head would take and not look at
        raise ValueError("adapter_names must be left out: all rows have the active adapters")
    if labels is not None and shift_labels is None:
        name, whole, first = "labels", labels, 1
    elif shift_labels is not None and labels is None:
        name, whole, first = "shift_labels", shift_labels, 0
    else:
        raise ValueError(f"labels or shift_labels must be given, got {'none' if labels is None else 'both'}")
    layer = _layer_of(model)
    if isinstance(temperature, torch.Tensor):
        _check_shape("temperature", temperature, name, whole)
        temperature = temperature[:, first:]
    hidden = layer.hidden(input_ids=input_ids, **inputs)
    _check_shape(name, whole, "the inputs", hidden[..., 0])
    targets = whole[:, first:]
    given = layer.projection(hidden[:, : hidden.shape[1] - first])
    options: dict[str, Any] = {
        "bias": given.bias, "logit_scale": layer.logit_scale, "softcap": layer.softcap, "temperature": temperature,
        "mask": targets != IGNORED, "return_entropy": return_entropy,
    }  # fmt: skip
    found: Any = linear_token_logprobs(given.hidden, given.weight, targets, **options)
    pad = torch.nn.functional.pad
    if not return_entropy:
        return pad(found, (first, 0))
    logp, entropy = (pad(x, (first, 0)) for x in found)
    return logp, entropy


def _check_shape(name: str, x: Any, other: str, like: Any) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name} must be {list(like.shape)} like {other}, got {list(x.shape)}")


class FusedHead(torch.nn.Module):
    """A model whose forward is `fused`, for what wraps modules (DDP, fully_shard).

    `DistributedDataParallel(FusedHead(model))(**batch)`; `.model` is the model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        _layer_of(model)

    def forward(self, *args: Any, **options: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return fused(self.model, *args, **options)


def _layer_of(model: Any) -> OutputLayer:
    known = _layers.get(model) if isinstance(model, torch.nn.Module) else None
    if known is None or known.linear is not model.get_output_embeddings() or not passes_through(model):
        known = output_layer(model)
        if known is None:
            raise ValueError(
                "model must be a causal language model of transformers with one linear output layer, got "
                f"{type(model).__name__}"
            )
        _layers[model] = known
    return known


class CausalityCallback(TrainerCallback):
    """Attribution of the training loss to tokens, read from the training's own backward, at no pass of its own.

    `Trainer(..., callbacks=[CausalityCallback()])`. Watched is every forward of the model in training mode, with
    gradient and `input_ids`; actions are the tokens with a label, without labels those that are attended to. The
    outcome is -loss, as the trainer scales it for accumulation. Checkpoints get a file causality.pt, with what all
    processes saw, and a run that resumes from its own folder goes on with it.

    Args:
        tracker: a CausalityTracker of the trainer's model; None: one is made when training begins.
        features: how many key features are logged.
        **options: of the CausalityTracker that is made (every, decay, groups, ...).
    Attributes:
        tracker: `.report()`, `.key_features()`; None before the training began.
    Raises: ValueError for both a tracker and options.
    Logged, into the log history and for callbacks after this one: causality/tokens, observed so far on this
        process, and causality/<text>, mean attribution of the most reliable features.
    """

    def __init__(self, tracker: CausalityTracker | None = None, *, features: int = 5, **options: Any) -> None:
        if tracker is not None and options:
            raise ValueError(f"options must be empty with a tracker, got {', '.join(options)}")
        self.tracker, self.features, self._options = tracker, features, options
        self._stack = contextlib.ExitStack()
        self._step = 0

    # ---- the trainer's events ------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        if self.tracker is None:
            self.tracker = CausalityTracker(model, given.get("processing_class"), **self._options)
        self._step = state.global_step
        if state.global_step and state.is_world_process_zero:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE)
        self._stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._stack.callback(model.register_forward_hook(self._after, always_call=True).remove)
        self._inside = contextlib.ExitStack()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        if self.tracker is None or logs is None:
            return
        found = {"causality/tokens": float(self.tracker.by_token.count.sum())}
        for feature in self.tracker.key_features(self.features):
            found[f"causality/{feature.family} {feature.name}"] = feature.mean
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.tracker is None:
            return
        several = dist.is_initialized() and dist.get_world_size() > 1
        whole = self.tracker.gather() if several else self.tracker
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            whole.save(folder / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._stack.close()

    # ---- inside --------------------------------------------------------------------------------------------

    def _resume(self, path: Path) -> None:
        assert self.tracker is not None
        if path.exists():
            self.tracker.load_state_dict(torch.load(path, weights_only=True))
        else:
            warnings.warn(f"there is no {path}: the causality tracker starts anew", stacklevel=2)

    def _before(self, model: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids = given.get("input_ids")
        if not (
            model.training and torch.is_grad_enabled() and isinstance(ids, torch.Tensor) and ids.dim() == 2
        ):
            return
        assert self.tracker is not None
        seen, labels = given.get("attention_mask"), given.get("labels")
        seen = seen if isinstance(seen, torch.Tensor) and seen.shape == ids.shape else None
        if isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
            actions = labels != -100
        else:
            actions = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen.bool()
        self._inside.enter_context(self.tracker.observe(ids, actions, seen, step=self._step, late=True))

    def _after(self, model: Any, arguments: tuple[Any, ...], output: Any) -> None:
        self._inside.close()
