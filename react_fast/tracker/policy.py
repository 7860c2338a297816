"""The policy as the tracker uses it: embedding output, log-probabilities, samples. Parameters' gradients are
never touched.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..ops.logprob import token_logprobs

# Sequences of one forward: eight to sixteen were best on CPUs; of short ones as many as make up SHORT tokens, of
# long ones no more than LONG tokens, whose keys and values have to fit in memory.
ROWS, SHORT, LONG = 16, 1024, 2**15
# Noise that is kept, in numbers: what the rows of a few hundred tokens of a large vocabulary share.
_KEPT = 2**22
# Shared tokens from which on a forward of their own pays.
_SHARED = 8

Noise = Callable[[int, int, int], torch.Tensor]


class Policy:
    """A causal language model: `model(ids [B, T]) -> logits [B, T, V]`, or a Hugging Face one.

    Args:
        model: its token embedding is `get_input_embeddings()`, or the only nn.Embedding in it. Padding stands
            on the right, so a module without an attention mask must be causal.
    Raises: TypeError if it is no nn.Module, ValueError if the embedding is not found.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.embedding = _embedding(model)
        self.vocab_size = int(self.embedding.weight.shape[0])
        self.hugging_face = hasattr(model, "generate")
        self.tokens = 0  # computed by forwards without gradient

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def logits(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, keep: int = 0
    ) -> torch.Tensor:
        """[B, T] -> [B, T, V]; of the last `keep` positions alone where the model can leave the others out."""
        if not self.hugging_face:
            out = self.model(ids)
            return getattr(out, "logits", out)
        options = {"logits_to_keep": keep} if keep and self._keeps_last else {}
        return self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False, **options).logits

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Without dropout; the mode comes back at the end."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def cut(self, layer: nn.Module, values: torch.Tensor | None = None) -> Iterator[list[torch.Tensor]]:
        """Outputs [B, T, D] of a layer in the forwards inside, as leaves that nothing before them hangs on;
        `values` [B, T, D] stand in their place where given.

        Raises: ValueError if the layer's output is no [B, T, D].
        """
        leaves: list[torch.Tensor] = []

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, torch.Tensor) or first.dim() != 3 or not first.is_floating_point():
                raise ValueError(
                    f"layer must have an output [B, T, D], got {type(first).__name__} of {module}"
                )
            leaves.append((first if values is None else values).detach().requires_grad_())
            return (leaves[-1], *output[1:]) if isinstance(output, tuple) else leaves[-1]

        handle = layer.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                yield leaves
        finally:
            handle.remove()

    @contextmanager
    def head_inputs(self) -> Iterator[list[torch.Tensor]]:
        """Inputs [B, T, D] of the output layer in the forwards inside; none for a model that does not name one."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any) -> None:
            found.extend(x for x in args[:1] if isinstance(x, torch.Tensor) and x.dim() == 3)

        named: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        handle = named.register_forward_pre_hook(keep) if isinstance(named, nn.Module) else None
        try:
            yield found
        finally:
            if handle is not None:
                handle.remove()

    @contextmanager
    def watched(
        self,
        input_ids: torch.Tensor,
        record: Callable[[torch.Tensor, torch.Tensor], None],
        late: bool = False,
    ) -> Iterator[None]:
        """Calls record(gradient, embedding output), [B, T, D] each, when a backward reaches the embedding output
        of a forward on `input_ids` inside. The backward is inside, too, unless it is `late`.

        Raises: ValueError if the forward embeds another shape; RuntimeError if the output was changed in
            place before the backward, or at the end if no gradient arrived and it is not `late`.
        """
        arrived: list[bool] = []

        def receive(grad: torch.Tensor, activation: torch.Tensor, version: int) -> None:
            if activation._version != version:
                raise RuntimeError("the embedding output was changed in place after the forward; use a copy")
            with torch.no_grad():
                record(grad, activation)
            arrived.append(True)

        def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            shape = list(output.shape[:-1])
            if shape != list(input_ids.shape):
                raise ValueError(
                    f"input_ids must be {shape} like what the model embeds, got {list(input_ids.shape)}"
                )
            if not output.requires_grad:  # a frozen embedding
                output.requires_grad_()
            activation = output.detach()
            version = activation._version
            output.register_hook(lambda grad: receive(grad, activation, version))

        handle = self.embedding.register_forward_hook(watch)
        try:
            yield
        finally:
            handle.remove()
        if not (arrived or late):
            raise RuntimeError(
                "observe must enclose the forward and the backward, got no gradient at the embedding"
            )

    @torch.no_grad()
    def response_logprobs(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """Log-probability of every token from `starts[i]` on in row i, at least 1.

        Rows that begin alike run together, and what they share runs once.

        Returns: [N, T] float64, T the longest row; column t belongs to token t; 0 before the start and behind
            the end.
        """
        out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64, device=self.device)
        with self.evaluation():
            for part, ids, mask in self._parts(rows):
                begin = torch.tensor([starts[i] for i in part], device=self.device)
                counted = mask & (torch.arange(ids.shape[1], device=self.device) >= begin[:, None])
                logits, skip = self._tail(ids, mask, int(begin.min()) - 1)
                found = logprobs(logits[:, :-1], ids[:, skip + 1 :], counted[:, skip + 1 :])
                out[part, skip + 1 : ids.shape[1]] = found.double()
        return out

    @torch.no_grad()
    def logprobs_at(
        self,
        rows: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
    ) -> list[np.ndarray]:
        """Log-probability of tokens[i][k] behind the first places[i][k] tokens of row i, at least 1: [K_i] float64
        each. The tokens asked for need not be the row's own."""
        found: dict[int, np.ndarray] = {}
        with self.evaluation():
            for part, ids, mask in self._parts(rows):
                asked = [
                    (k, place, token)
                    for k, i in enumerate(part)
                    for place, token in zip(places[i], tokens[i], strict=True)
                ]
                row, place, token = torch.tensor(asked, device=self.device).T
                logits, skip = self._tail(ids, mask, int(place.min()) - 1)
                values = logprobs(logits[row, place - 1 - skip], token).double().cpu().numpy()
                cuts = np.cumsum([len(places[i]) for i in part])[:-1]
                found |= dict(zip(part, np.split(values, cuts), strict=True))
        return [found[i] for i in range(len(rows))]

    def _parts(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """(numbers of the rows, ids, mask) of those that run at once: rows that begin alike are together."""
        order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
        size = _rows_at_once(max(map(len, rows)))
        for first in range(0, len(order), size):
            part = order[first : first + size]
            yield part, *self.padded([rows[i] for i in part])

    def _tail(self, ids: torch.Tensor, mask: torch.Tensor, skip: int) -> tuple[torch.Tensor, int]:
        """Logits from position `skip` on, or from an earlier one, and which that is; what the rows share before it
        runs once."""
        options = {"logits_to_keep": ids.shape[1] - skip} if self._keeps_last else {}
        logits, _ = self._behind_shared(ids, mask.long(), min(skip, _shared(ids, mask)), **options)
        return logits, ids.shape[1] - logits.shape[1]

    def _behind_shared(
        self, ids: torch.Tensor, mask: torch.Tensor, shared: int, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        """Logits [n, T - s, V] behind the first s tokens, which all rows share, and the key/value cache; s is
        `shared`, or 0 where running those once for all saves nothing or the model has no such cache."""
        if not self.hugging_face:
            return self._forward(ids, None), None
        name, cache = cache_argument(self.model), cast(Any, None)
        if shared >= _SHARED and len(ids) > 1:
            cache = self._forward(ids[:1, :shared], mask[:1, :shared], **{name: None}, **self._keeps_last)[
                name
            ]
        if hasattr(cache, "batch_repeat_interleave"):
            cache.batch_repeat_interleave(len(ids))
        else:
            cache, shared = None, 0
        out = self._forward(ids[:, shared:], mask, **{name: cache}, **options)
        return out["logits"], out[name]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> Any:
        self.tokens += ids.numel()
        if not self.hugging_face:
            return self.model(ids)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=True, **options)

    @cached_property
    def _keeps_last(self) -> dict[str, int]:
        """The option that makes the model compute the last position's logits only, where it has one."""
        return {"logits_to_keep": 1} if "logits_to_keep" in _options(self.model) else {}

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [N, T] padded on the right with id 0, mask [N, T])."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids.to(self.device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)

    @torch.no_grad()
    def continuations(
        self,
        prefixes: Sequence[Sequence[int]],
        *,
        streams: Sequence[int],
        limit: int,
        eos_id: int | None,
        noise: Noise | None,
    ) -> list[list[int]]:
        """One sampled continuation of every prefix, the end token included.

        Args:
            prefixes: not empty, each at least one token.
            streams: number of the random stream of every row; rows with the same stream and prefix are equal.
            limit: most tokens of a continuation.
            eos_id: token that ends one, or None.
            noise: (stream, position, V) -> [V] added to the log-probabilities before the largest is taken:
                with Gumbel noise that is a sample at temperature 1. None: greedy.
        """
        found: list[list[int]] = [[] for _ in prefixes]
        lengths = sorted({len(prefix) for prefix in prefixes})
        with self.evaluation():
            for length in lengths:
                rows = [i for i, prefix in enumerate(prefixes) if len(prefix) == length]
                size = _rows_at_once(length)
                for first in range(0, len(rows), size):
                    part = rows[first : first + size]
                    ids = torch.tensor([list(prefixes[i]) for i in part], device=self.device)
                    chosen = self._continue(ids, [streams[i] for i in part], limit, eos_id, noise)
                    for i, tokens in zip(part, chosen.tolist(), strict=True):
                        found[i] = tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
        return found

    def _continue(
        self, ids: torch.Tensor, streams: list[int], limit: int, eos_id: int | None, noise: Noise | None
    ) -> torch.Tensor:
        """At most `limit` tokens behind prefixes of one length, which therefore need no padding."""
        name = cache_argument(self.model) if self.hugging_face else ""
        start = ids.shape[1]
        # Samples of one prefix differ in their noise alone, so that the prefix runs once.
        distinct, copies = torch.unique(ids, dim=0, return_inverse=True)
        seen = torch.ones_like(distinct)
        shared = min(_shared(distinct, seen.bool()), start - 1)
        logits, cache = self._behind_shared(distinct, seen, shared, **self._keeps_last)
        logits = logits[copies, -1]
        if hasattr(cache, "batch_select_indices"):
            cache.batch_select_indices(copies)
        elif self.hugging_face and len(distinct) < len(ids):
            logits, cache = self._behind_shared(ids, torch.ones_like(ids), 0, **self._keeps_last)
            logits = logits[:, -1]
        for position in range(limit):
            if position and self.hugging_face:
                out = self._forward(ids[:, -1:], None, **{name: cache})
                logits, cache = out.logits[:, -1], out[name]
            elif position:
                logits = self._forward(ids, None)[:, -1]
            scores = torch.log_softmax(logits.double(), -1)
            if noise is not None:
                drawn = {stream: noise(stream, position, scores.shape[1]) for stream in set(streams)}
                scores = scores + torch.stack([drawn[stream] for stream in streams]).to(scores)
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
            if eos_id is not None and bool((ids[:, start:] == eos_id).any(1).all()):
                break
        return ids[:, start:]


def _rows_at_once(length: int) -> int:
    return max(1, min(max(ROWS, SHORT // length), LONG // length))


def _shared(ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Tokens at the beginning that all rows [N, T] share."""
    same = ((ids == ids[:1]) & mask).all(0)
    return int(same.long().cumprod(0).sum())


def cache_argument(model: nn.Module) -> str:
    """What a Hugging Face model calls its key/value cache: transformers 5 renamed past_key_values to cache."""
    return "cache" if "cache" in _options(model) else "past_key_values"


def _options(model: nn.Module) -> Any:
    """Arguments of the forward; of the model inside where an adapter hands on what it does not know."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    return inspect.signature(inner.forward).parameters


def logprobs(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[..., V], [...] -> [...]: token_logprobs alone, without the entropy."""
    found = token_logprobs(logits, ids, mask=mask)
    assert isinstance(found, torch.Tensor)
    return found


def gumbel(seed: int) -> Noise:
    """Standard Gumbel noise keyed (seed, stream, position): the largest of log p + noise is a sample from p.

    Two policies, or two prefixes, under the same noise choose the same token unless their probabilities
    differ, which is what pairs an intervention with its control.

    Source: Oberst & Sontag 2019 (arXiv:1905.05824).
    """

    kept: dict[tuple[int, int, int], torch.Tensor] = {}

    def draw(stream: int, position: int, size: int) -> torch.Tensor:
        place = (stream, position, size)
        if place not in kept:
            if (len(kept) + 1) * size > _KEPT:
                kept.clear()
            key = np.array([seed, stream], dtype=np.uint64)
            counter = np.array([0, 0, 0, position], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
            kept[place] = torch.from_numpy(generator.gumbel(size=size))
        return kept[place]

    return draw


def _embedding(model: nn.Module) -> Any:
    find: Any = getattr(model, "get_input_embeddings", None)
    found = find() if find is not None else None
    if found is None:
        every = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        if len(every) != 1:
            raise ValueError(
                f"model must have get_input_embeddings() or exactly one nn.Embedding, got {len(every)}"
            )
        found = every[0]
    return found
