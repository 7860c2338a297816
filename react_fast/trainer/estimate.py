"""How much memory a run will need, told from shapes alone: no weights are read, none are made."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import _tiles as tiles
from ..ops.backend import accumulation_dtype
from .config import TrainerConfig
from .output_layer import projection
from .recompute import layers_of, recomputed

_COUNTED = 1 << 52  # elements of an attention mask: their bytes are still a number of 64 bits
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, by what holds them; see `memory`."""

    parameters: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    head: int
    backward: int
    generation: int

    @property
    def lasting(self) -> int:
        """What is there in every phase of a step."""
        return self.parameters + self.gradients + self.optimizer + self.copies

    @property
    def peak(self) -> int:
        """Generation, an update's output layer and the backward of its layers follow one another."""
        return self.lasting + max(self.activations + max(self.head, self.backward), self.generation)


def memory(
    model: Any, config: TrainerConfig, *, length: int, copies: int = 0, supervised: bool = False
) -> Memory:
    """Peak memory of training, P parameters of b bytes, P_t of them trained:

        parameters = P b,  gradients = P_t b,  optimizer = s P_t b,  copies = c P b (+ P_t b for early stopping)
        activations = what one forward of a micro-batch keeps for its backward
        head = logit tiles + 2 [N, D] sums of the fused log-probabilities + [V, D] for the weight's gradient
        backward = N F b of gradients (and, with gradient checkpointing, what one layer keeps, run again)
        generation = 2 L K (rows) (length) b of keys and values + one layer's again + 3 [rows, V] of logits

        peak = parameters + ... + copies + max(activations + max(head, backward), generation)

    N = rows x length tokens, D hidden width, F the widest activation, V vocabulary, L layers, K = key/value heads
    times their width; s = 2 for Adam(W), 0 for SGD. What a forward keeps is counted by running it on fake tensors,
    so it holds for any architecture, attention backend and `gradient_checkpointing`. What torch allocated in real
    steps was 0.85 to 1.05 of it; a process takes more: Python and libraries (about 0.5 GB), the tracker, DDP's
    buckets (P_t b), and up to a third for gaps that the C allocator leaves between blocks below 32 MB.

    Args:
        model: Hugging Face causal LM of fake tensors, or a real one on a CPU.
        config: the trainer's.
        length: longest prompt plus response, in tokens.
        copies: whole policies kept beside it: a reference, a target network.
        supervised: it learns from references, so it generates nothing.
    Raises: ValueError for forwards too large to be counted.
    Source: saved tensors as torch.autograd.graph.saved_tensors_hooks shows them.
    """
    size = next(model.parameters()).element_size()
    whole = sum(p.numel() for p in model.parameters()) * size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * size
    most = config.sequences_per_update
    asked = config.micro_tokens // length if config.micro_tokens else config.micro_batch or most
    rows = min(max(asked, 1), most)
    if rows * length**2 > _COUNTED:
        raise ValueError(
            f"a forward of {rows:,} sequences of {length:,} tokens fits no memory: set trainer.micro_batch, "
            "lower trainer.max_new_tokens"
        )
    with getattr(next(model.parameters()), "fake_mode", nullcontext()):
        kept, backward = update_keeps(model, rows, length, config)
        head = _head(model, rows * length)
    return Memory(
        parameters=whole,
        gradients=trained,
        optimizer={"sgd": 0}.get(config.optimizer, 2) * trained,
        copies=copies * whole + (trained if config.early_stopping else 0),
        activations=kept,
        head=head,
        backward=backward,
        generation=0 if supervised else _generation(model, config.sequences_per_step, length),
    )


def update_keeps(model: Any, rows: int, length: int, config: TrainerConfig) -> tuple[int, int]:
    """Bytes that the layers' forward of [rows, length] tokens keeps for the backward, and those that it adds."""
    whole = _kept(model, rows, length)
    widest = max(whole, default=0)
    if not config.gradient_checkpointing:
        return sum(whole), widest
    with recomputed(model):
        return sum(_kept(model, rows, length)), widest + sum(whole) // len(layers_of(model))


def _kept(model: Any, rows: int, length: int) -> list[int]:
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, or its address would be given away again
        return x

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.zeros(rows, length, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        body = getattr(inner, inner.base_model_prefix)
        out = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    kept[out.untyped_storage()._cdata] = out.untyped_storage()
    return [storage.nbytes() for storage in kept.values()]


def _head(model: Any, tokens: int) -> int:
    linear: Any = model.get_output_embeddings()
    hidden = linear.weight.new_empty(tokens, linear.weight.shape[1])
    given = projection(linear, hidden)
    weight: torch.Tensor = linear.weight if given is None else given.weight
    joined = (
        0 if weight is linear.weight else weight.numel() * weight.element_size()
    )  # with an adapter's matrix
    sums = 2 * tokens * weight.shape[1] * accumulation_dtype(weight.dtype).itemsize
    sizes = tiles.tiling(hidden, len(weight), tiles.Options(1.0, 1.0, 0.0, False), outputs=1)
    tile = 2 * sizes.rows * sizes.columns * sizes.dtype.itemsize
    return sums + tile + joined + (weight.numel() * weight.element_size() if weight.requires_grad else 0)


def _generation(model: Any, rows: int, length: int) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameter = next(model.parameters())
    layer = 2 * heads * width * rows * length * parameter.element_size()
    return layer * (config.num_hidden_layers + 1) + 3 * rows * config.vocab_size * 4


def in_units(size: int) -> str:
    """12.3 kB, 4.5 GB"""
    unit, name = next((unit, name) for unit, name in _UNITS if size >= unit or unit == 1)
    return f"{size / unit:.{0 if unit == 1 else 1}f} {name}"
