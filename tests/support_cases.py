"""Rows with kept ids for the tests of linear_token_logprobs(support=...)."""

import torch

import react_fast as rf

VOCAB, DIM = 50, 6
# Nothing kept (the token alone), one id, some, nothing again, everything, some with repeats.
SIZES = [0, 1, 5, 0, VOCAB, 12, 3]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "scaled": {"temperature": 0.7, "logit_scale": -1.5},
    "everything": {"softcap": 3.0, "logit_scale": 0.5, "temperature": "row", "bias": True, "mask": True},
}


def make_support(sizes, vocab):
    """Kept ids in any order; a list longer than four holds its first id twice more."""
    lists = [torch.randperm(vocab)[:size] for size in sizes]
    for kept in lists:
        if 4 < len(kept) < vocab:
            kept[[2, -1]] = int(kept[0])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat([torch.empty(0, dtype=torch.int64), *lists]), offsets


def make_case(name="plain", dtype=torch.float64, sizes=SIZES, dim=DIM, vocab=VOCAB):
    rows, options = len(sizes), dict(OPTIONS[name])
    leaves = {"hidden": torch.randn(rows, dim), "weight": torch.randn(vocab, dim)}
    if options.pop("bias", False):
        leaves["bias"] = torch.randn(vocab)
    leaves = {k: x.to(dtype).requires_grad_() for k, x in leaves.items()}
    ids = torch.randint(0, vocab, (rows,))
    options["support"] = make_support(sizes, vocab)
    if options.get("temperature") == "row":
        options["temperature"] = torch.rand(rows) + 0.5
    if options.pop("mask", False):
        options["mask"] = torch.arange(rows) % 3 != 2
        ids[~options["mask"]] = -100
    return leaves, ids, options


def call(leaves, ids, options):
    bias = leaves.get("bias")
    return rf.linear_token_logprobs(
        leaves["hidden"], leaves["weight"], ids, bias=bias, return_entropy=True, **options
    )


def results(leaves, ids, options):
    """logp, entropy and the gradients of a mixture of both."""
    logp, entropy = call(leaves, ids, options)
    mixture = (logp * torch.arange(1, len(ids) + 1)).sum() + (entropy**2).sum()
    return logp, entropy, *torch.autograd.grad(mixture, list(leaves.values()))


def alone(rows, options, support):
    """The options and the support of these rows alone."""
    kept, offsets = support
    lists = [kept[offsets[i] : offsets[i + 1]] for i in rows.tolist()]
    edges = torch.tensor([0, *map(len, lists)]).cumsum(0)
    own = {k: x[rows] if isinstance(x, torch.Tensor) else x for k, x in options.items() if k != "support"}
    return {**own, "support": (torch.cat(lists), edges)}
