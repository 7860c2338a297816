"""token_logprobs of logits whose columns lie on several ranks: one exchange of four numbers a row, no logits."""

from typing import Any

import torch
import torch.distributed as dist

from ._logprob import token_logprobs, token_logprobs_backward
from .backend import once_differentiable
from .logprob import token_logprobs as whole_logprobs

Tensor = torch.Tensor
_PLAIN = (None, None, None, 1.0, 0.0)  # no mask, temperatures, floor; temperature 1, no softcap


def shard_logprobs(
    logits: Tensor, token_ids: Tensor, *, first: int, group: Any, return_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """(logp, H) of every row over the columns of all ranks, the same on each of them.

    Args:
        logits: [..., V_rank] this rank's columns, those from `first` on of the whole vocabulary.
        token_ids: [...] int64 in [0, V); the same on every rank, like all that comes from upstream.
        group: process group over which the columns are split; None: they are all here.
    Returns: [...] float32 (float64 for float64), differentiable in this rank's logits; H is empty if not asked
        for.
    Source: online rescaling of sums, Milakov & Gimelshein 2018 (arXiv:1805.02867); split vocabulary: Shoeybi et
        al. 2019 (arXiv:1909.08053).
    """
    if group is not None and dist.get_world_size(group) > 1:
        return _Shard.apply(logits, token_ids, first, group, return_entropy)
    if return_entropy:
        return whole_logprobs(logits, token_ids, return_entropy=True)
    return whole_logprobs(logits, token_ids), logits.new_empty(0)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, first: int, group: Any, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        local = token_ids - first
        owned = (local >= 0) & (local < logits.shape[-1])
        local = local.where(owned, 0)
        _, entropy, (largest, log_sum) = token_logprobs(logits, local, *_PLAIN, want_entropy, False)
        chosen = _at(logits, local).to(largest.dtype).where(owned, 0)
        mean = largest + log_sum - entropy if want_entropy else chosen  # the expected logit
        own = torch.stack([largest, log_sum, chosen, mean])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        largests, log_sums, chosens, means = torch.stack(parts, 1).double()
        largest = largests.amax(0)
        allowed = largests > float("-inf")  # of ranks that forbid all their tokens there is no sum
        log_sums = (log_sums + largests - largest).where(allowed, float("-inf"))
        log_sum = log_sums.logsumexp(0)
        logp = chosens.sum(0) - largest - log_sum
        if want_entropy:
            entropy = largest + log_sum - ((log_sums - log_sum).exp() * means.where(allowed, 0)).sum(0)
        ctx.want_entropy = want_entropy
        ctx.set_materialize_grads(False)
        stats, logp, entropy = (x.to(own.dtype) for x in (torch.stack([largest, log_sum]), logp, entropy))
        ctx.save_for_backward(logits, local, owned, stats, entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        logits, local, owned, stats, entropy = ctx.saved_tensors
        d_logp, d_entropy = upstream[0], upstream[1] if ctx.want_entropy else None
        if d_logp is None and d_entropy is None:
            return (None,) * 5
        found = token_logprobs_backward(logits, local, *_PLAIN, stats, entropy, d_logp, d_entropy)
        # Where the token is another rank's, the kernel took the first column for it.
        p = (_at(logits, local).to(stats.dtype) - stats[0] - stats[1]).exp()
        first = torch.zeros_like(p) if d_logp is None else -d_logp * p
        if d_entropy is not None:
            first = first - d_entropy * (torch.xlogy(p, p) + p * entropy)
        there = _at(found, local)
        found.scatter_(-1, local[..., None], there.where(owned, first.to(there.dtype))[..., None])
        return found, None, None, None, None


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-1, index[..., None])[..., 0]
