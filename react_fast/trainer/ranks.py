"""One process or many: which rows are whose, and what all of them know.

Rollouts, replays, scoring and updates are split over the ranks; every rank holds all trajectories and scores, so
that advantages, whitening and the order of updates are those of one process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .batch import Batch
from .scoring import Scorer

T = TypeVar("T")

# Of the configuration, as accelerate calls them.
_PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's front end, of "float32" or "bfloat16" products. It keeps one precision for the process and
    refuses another, so that what it keeps is let go before: trainers made until then should be done.
    """
    wanted = _PRECISIONS[precision]
    if AcceleratorState._shared_state.get("_mixed_precision", wanted) != wanted:
        AcceleratorState._reset_state()
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=wanted)


class Ranks:
    """Args: accelerator: of `accelerate`; its processes share the work."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.world: int = accelerator.num_processes
        self.rank: int = accelerator.process_index

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> list[T]:
        """This rank's part of rows, neighbours."""
        size = -(-len(rows) // self.world)
        return list(rows[self.rank * size : (self.rank + 1) * size])

    def even_share(self, count: int, rank: int | None = None) -> torch.Tensor:
        """Numbers of this or another rank's part of `count` rows, as many as on every other rank: where the ranks
        do not divide them the last row stands in for those that lack."""
        size, rank = -(-count // self.world), self.rank if rank is None else rank
        return torch.arange(rank * size, (rank + 1) * size).clamp_max(count - 1)

    def own(self, count: int) -> torch.Tensor:
        """Which rows of the even share of `count` do not stand in for others, [share] bool."""
        size = -(-count // self.world)
        return torch.arange(self.rank * size, (self.rank + 1) * size) < count

    def joined(self, mine: Sequence[T], count: int) -> list[T]:
        """The results of all ranks' shares of `count` rows, in the rows' order."""
        if self.world == 1:
            return list(mine)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, list(mine))
        return [one for part in found for one in part][:count]

    def rows(self, mine: torch.Tensor, count: int) -> torch.Tensor:
        """[count, ...] of all ranks' results of their even shares, the same on every rank."""
        if self.world == 1:
            return mine
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine.contiguous())
        return torch.cat(found)[:count]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.accelerator.wait_for_everyone()

    def any(self, asked: bool) -> bool:
        """Whether any rank says so."""
        return asked if self.world == 1 else any(self.joined([asked], self.world))

    def once(self, task: Callable[[], T], error: type[Exception]) -> T:
        """What a task returned that the first rank alone does; its `error` is everyone's."""
        found: tuple[Any, str | None] = (None, None)
        if self.first:
            try:
                found = (task(), None)
            except error as problem:
                found = (None, str(problem))
        result, told = self.joined([found], self.world)[0]
        if told is not None:
            raise error(told)
        return result


def check_split(config: Any, world: int, *, adapted: bool) -> None:
    """Raises: ValueError if so many processes cannot share the updates of a TrainerConfig."""
    size = config.sequences_per_update
    if size % world:
        raise ValueError(
            f"the {size} sequences of an update (prompts_per_step x group_size / minibatches) must be"
            f" divisible by {world} processes"
        )
    if config.sharded and adapted:
        raise ValueError("trainer.sharded must be false for a model with adapters: copies of them are small")


def spread(
    policy: Scorer, optimizer_of: Callable[[Any], torch.optim.Optimizer], accelerator: Any, *, sharded: bool
) -> tuple[Any, Any]:
    """(the policy over all ranks, its optimizer): copies (DDP), or the shards of `shard`."""
    if not sharded:
        return accelerator.prepare(policy, optimizer_of(policy.parameters()))
    shard(policy)
    return policy, optimizer_of(policy.parameters())


def shard(policy: Scorer) -> None:
    """Split parameters, gradients and optimizer state over the ranks (FSDP2, `fully_shard`): every layer, and what
    is beside the layers.

    Raises: ValueError for a model that names no layers.
    """
    names = set(getattr(policy.model, "_no_split_modules", None) or ())
    layers = [module for module in policy.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"trainer.sharded needs a Hugging Face model that names its layers, got {type(policy.model).__name__}"
        )
    for layer in layers:
        fully_shard(layer)
    fully_shard(policy)
    # The first forward makes the policy the root of its layers, which generation calls without it.
    device = next(policy.parameters()).device
    with torch.no_grad():
        policy(Batch.of_ids(torch.zeros(1, 2, dtype=torch.int64, device=device)), 1.0)
    cast(FSDPModule, policy).reshard()


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """Inside, every rank holds the whole parameters, so that each may call the model as often as it likes."""
    shards = [one for one in policy.modules() if isinstance(one, FSDPModule)]
    for one in shards:
        one.set_reshard_after_forward(False, recurse=False)
        one.unshard()
    try:
        yield
    finally:
        for one in shards:
            one.reshard()
            one.set_reshard_after_forward(one is not policy, recurse=False)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float | None) -> float:
    """Norm of all gradients, whole or shards, before they are scaled down to `limit`."""
    kinds: dict[bool, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    norms = []
    for some in kinds.values():
        norm = get_total_norm([p.grad for p in some if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    if limit is not None and torch.isfinite(total):
        for some in kinds.values():
            clip_grads_with_norm_(some, limit, total)
    return float(total)
