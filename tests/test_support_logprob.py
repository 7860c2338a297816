"""linear_token_logprobs(support=...): log-probs over a sampler's kept ids, equal to restricted logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import react_fast as rf
from react_fast.ops import _support_logprob as support_ops

from . import contract

VOCAB, DIM = 50, 6
# Nothing kept (the token alone), one id, some, nothing again, everything, some with repeats.
SIZES = [0, 1, 5, 0, VOCAB, 12, 3]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "scaled": {"temperature": 0.7, "logit_scale": -1.5},
    "everything": {"softcap": 3.0, "logit_scale": 0.5, "temperature": "row", "bias": True, "mask": True},
}


def _support(sizes, vocab):
    """Kept ids in any order; a list longer than four holds its first id twice more."""
    lists = [torch.randperm(vocab)[:size] for size in sizes]
    for kept in lists:
        if 4 < len(kept) < vocab:
            kept[[2, -1]] = int(kept[0])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat([torch.empty(0, dtype=torch.int64), *lists]), offsets


def _case(name="plain", dtype=torch.float64, sizes=SIZES, dim=DIM, vocab=VOCAB):
    rows, options = len(sizes), dict(OPTIONS[name])
    leaves = {"hidden": torch.randn(rows, dim), "weight": torch.randn(vocab, dim)}
    if options.pop("bias", False):
        leaves["bias"] = torch.randn(vocab)
    leaves = {k: x.to(dtype).requires_grad_() for k, x in leaves.items()}
    ids = torch.randint(0, vocab, (rows,))
    options["support"] = _support(sizes, vocab)
    if options.get("temperature") == "row":
        options["temperature"] = torch.rand(rows) + 0.5
    if options.pop("mask", False):
        options["mask"] = torch.arange(rows) % 3 != 2
        ids[~options["mask"]] = -100
    return leaves, ids, options


def _call(leaves, ids, options):
    bias = leaves.get("bias")
    return rf.linear_token_logprobs(
        leaves["hidden"], leaves["weight"], ids, bias=bias, return_entropy=True, **options
    )


def _all(leaves, ids, options):
    """logp, entropy and the gradients of a mixture of both."""
    logp, entropy = _call(leaves, ids, options)
    mixture = (logp * torch.arange(1, len(ids) + 1)).sum() + (entropy**2).sum()
    return logp, entropy, *torch.autograd.grad(mixture, list(leaves.values()))


def _single(rows, options, support):
    """The options and the support of these rows alone."""
    kept, offsets = support
    lists = [kept[offsets[i] : offsets[i + 1]] for i in rows.tolist()]
    edges = torch.tensor([0, *map(len, lists)]).cumsum(0)
    own = {k: x[rows] if isinstance(x, torch.Tensor) else x for k, x in options.items() if k != "support"}
    return {**own, "support": (torch.cat(lists), edges)}


@pytest.fixture(params=["whole", "cut"])
def blocks(request, monkeypatch):
    """As it is, and with every row a group of its own, two rows of W a block and a range of ids for every id."""
    if request.param == "cut":
        monkeypatch.setattr(support_ops, "ENTRY", 1 << 21)
        monkeypatch.setattr(support_ops, "BLOCK", {"cpu": 100})


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_reference_in_float64(backend, blocks, name):
    case = _case(name)
    found = _all(*case)
    with rf.use_backend("reference"):
        expected = _all(*case)
    for f, e in zip(found, expected, strict=True):
        # Sums of up to 50 terms of size 10 at most, weighted by row numbers up to 7.
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_error_is_that_of_float32_dots(backend, blocks, name, dtype):
    leaves, ids, options = case = _case(name, dtype, dim=70)
    found = _all(*case)
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    with rf.use_backend("reference"):
        expected = _all(wide, ids, options)
    # A dot of D terms in float32 is off by at most D 2^-24 sum |w h|. logp and H move with the logits by at most
    # twice and (1 + |H|) times that, and are rounded once.
    sizes = (leaves["hidden"].abs().double() @ leaves["weight"].abs().double().T).amax(1).detach()
    lowest = options.get("temperature", 1.0)
    dots = 70 * 2.0**-24 * sizes * abs(options.get("logit_scale", 1.0)) / lowest
    logp, entropy = (x.detach() for x in expected[:2])
    eps = contract.EPS[torch.float32]
    assert bool(((found[0] - logp).abs() <= 2 * dots + eps * logp.abs()).all())
    assert bool(((found[1] - entropy).abs() <= 2 * (1 + entropy) * dots + eps * entropy).all())
    # Gradients: probabilities off by that relative error, a float32 sum, and one rounding to the dtype.
    relative = contract.EPS[dtype] + 8 * float(dots.max()) + 70 * eps
    for f, e in zip(found[2:], expected[2:], strict=True):
        assert f.dtype == dtype
        assert float((f.double() - e).norm()) <= relative * float(e.norm())


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    leaves, ids, options = _case(name, sizes=[0, 1, 5, 9, 3], dim=2, vocab=9)
    bias = torch.randn(9)
    for pick in (0, 1):
        contract.assert_gradcheck(
            lambda h, w, b, p=pick: _call({"hidden": h, "weight": w, "bias": b}, ids, options)[p],
            leaves["hidden"], leaves["weight"], bias,
        )  # fmt: skip


def test_everything_kept_is_the_whole_softmax():
    leaves, ids, options = _case("scaled", sizes=[VOCAB] * 4)
    found, expected = _all(leaves, ids, options), _all(leaves, ids, {**options, "support": None})
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_token_alone_is_certain(dtype):
    """Nothing kept, the token kept, the token kept twice: logp 0, H 0, no gradient."""
    leaves, _, _ = _case(dtype=dtype)
    ids = torch.tensor([7, 7, 7, 0, 49, 1, 2])
    support = torch.tensor([7, 7, 7]), torch.tensor([0, 0, 1, 3, 3, 3, 3, 3])
    for x in _all(leaves, ids, {"support": support}):
        assert bool((x == 0).all())


def test_repeats_and_order_change_nothing():
    leaves, ids, _ = _case()
    kept = torch.tensor([3, 9, 20, 41])
    edges = torch.arange(8) * 4
    once = _all(leaves, ids, {"support": (kept.repeat(7), edges)})
    shuffled = torch.tensor([41, 9, 9, 3, 20, 3, 41, 41]).repeat(7)
    for f, e in zip(_all(leaves, ids, {"support": (shuffled, edges * 2)}), once, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-13)  # four terms in another order
    own = torch.stack([kept.repeat(7, 1)[:, i] for i in range(4)] + [ids], 1).reshape(-1)
    for f, e in zip(_all(leaves, ids, {"support": (own, torch.arange(8) * 5)}), once, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-13)


def test_masked_rows_are_not_looked_at(backend):
    leaves, ids, options = _case("everything")
    mask, (kept, offsets) = options["mask"], options["support"]
    rows = mask.nonzero()[:, 0]
    expected = _all(leaves, ids, options)
    wild = kept.clone()
    for i in (~mask).nonzero()[:, 0].tolist():
        wild[offsets[i] : offsets[i + 1]] = torch.tensor([-7, 2**40, VOCAB]).repeat(20)[
            : offsets[i + 1] - offsets[i]
        ]
    dirty = leaves["hidden"].detach().masked_fill(~mask[:, None], float("nan")).requires_grad_()
    temperature = options["temperature"].masked_fill(~mask, -1.0)
    found = _all(
        {**leaves, "hidden": dirty}, ids, {**options, "support": (wild, offsets), "temperature": temperature}
    )
    for f, e in zip(found, expected, strict=True):
        contract.assert_bitwise(f, e)
    for x in found[:3]:
        assert bool((x[~mask] == 0).all())
    alone = _call(
        {**leaves, "hidden": leaves["hidden"][rows]}, ids[rows], _single(rows, options, (kept, offsets))
    )
    for f, e in zip(found, alone, strict=False):
        contract.assert_bitwise(f[rows], e)


def test_forbidden_tokens():
    """A bias of -inf takes a kept id out; a row of forbidden ones is -inf, as token_logprobs has it."""
    leaves, _, _ = _case(sizes=[0] * 4)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[40:] = float("-inf")
    ids = torch.tensor([0, 1, 45, 45])
    support = torch.tensor([1, 42, 2, 44, 3, 47]), torch.tensor([0, 2, 4, 5, 6])
    for options in ({}, {"softcap": 2.0, "temperature": 0.5}):
        case = {**leaves, "bias": bias}, ids, {"support": support, **options}
        logp, entropy = _call(*case)
        with rf.use_backend("reference"):
            twin = _call(*case)
        torch.testing.assert_close((logp, entropy), twin, rtol=1e-12, atol=1e-12)
        assert logp[2:].tolist() == [float("-inf")] * 2
        upstream = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        for given, given_twin in ((logp, twin[0]), (entropy, twin[1])):
            slopes, expected = (
                torch.autograd.grad(x, list(leaves.values()), upstream, retain_graph=True)
                for x in (given, given_twin)
            )
            torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_wild_logits(name):
    """Huge, tiny and equal logits stay finite and equal the reference; NaN stays in its row."""
    leaves, ids, options = _case(name)
    for factor in (1e4, 1e-8, 0.0):
        own = {**leaves, "hidden": (leaves["hidden"].detach() * factor).requires_grad_()}
        found = _all(own, ids, options)
        with rf.use_backend("reference"):
            expected = _all(own, ids, options)
        for f, e in zip(found, expected, strict=True):
            # Logits of 1e5 are themselves off by 1e5 2^-52.
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    broken = leaves["hidden"].detach().clone()
    broken[2, 1] = float("nan")
    logp, entropy = _call({**leaves, "hidden": broken}, ids, options)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [i == 2 for i in range(len(SIZES))]


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_confident_rows_do_not_cancel(gap):
    """p = 1 / (1 + exp(-gap)): logp, H and the gradient keep their relative accuracy."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[gap], [0.0]], dtype=torch.float64)
    support = torch.tensor([1]), torch.tensor([0, 1])
    logp, entropy = rf.linear_token_logprobs(
        hidden, weight, torch.tensor([0]), support=support, return_entropy=True
    )
    (slope,) = torch.autograd.grad(logp.sum(), hidden)
    rest = torch.exp(torch.tensor(-gap, dtype=torch.float64))
    exact = torch.log1p(rest)
    # exp of a gap of 60 in float64 is off by some ulp.
    torch.testing.assert_close(logp[0], -exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(entropy[0], exact + gap * rest / (1 + rest), rtol=1e-14, atol=0)
    torch.testing.assert_close(slope[0, 0], gap * rest / (1 + rest), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_batch_invariant(backend, monkeypatch, dtype):
    """A row alone, in any order, in any batch, on any threads and budget: the same bits, hidden's gradient too."""
    monkeypatch.setattr(
        support_ops, "BLOCK", {"cpu": 1 << 11}
    )  # rows of W longer than a block are in the batch
    sizes = [0, 1, 40, 7, 3, 50, 12, 0, 25, 2]
    leaves, ids, options = _case("everything", dtype, sizes=sizes, dim=37)
    del options["mask"]
    ids = ids.clamp_min(0)

    def results(rows):
        part = {**leaves, "hidden": leaves["hidden"].detach()[rows].requires_grad_()}
        logp, entropy = _call(part, ids[rows], _single(rows, options, options["support"]))
        (slope,) = torch.autograd.grad(logp.sum() + 2 * entropy.sum(), part["hidden"])
        return logp.detach(), entropy.detach(), slope

    whole = results(torch.arange(len(sizes)))
    for threads, entry in ((1, 88), (2, 1 << 16), (4, 1 << 21)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(support_ops, "ENTRY", entry)
        for rows in (torch.randperm(len(sizes)), torch.tensor([5]), torch.tensor([2, 9, 8])):
            for found, expected in zip(results(rows), whole, strict=True):
                contract.assert_bitwise(found, expected[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_runs_agree(dtype):
    """All gradients, the weight's with many rows an id among them; large enough for several threads."""
    case = _case("everything", dtype, sizes=[90] * 400, dim=130, vocab=200)
    contract.assert_threads_agree(lambda: torch.cat([x.detach().reshape(-1) for x in _all(*case)]))


def test_weight_gradient_accumulates_in_float32():
    """2048 equal contributions to one id: in bfloat16 the sum would stop growing at 256 of them."""
    rows = 2048
    hidden = torch.ones(rows, 4, dtype=torch.bfloat16)
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    support = torch.ones(rows, dtype=torch.int64), torch.arange(rows + 1)
    logp = rf.linear_token_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64), support=support)
    (slope,) = torch.autograd.grad(logp.sum(), weight)
    assert slope.tolist() == [[rows / 2] * 4, [-rows / 2] * 4, [0.0] * 4]


class _Sizes(TorchDispatchMode):
    """The largest floating tensor that an operation returned, rows gathered, and matrix multiplications."""

    largest = gathered = gemms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.gemms += name in ("mm", "addmm", "bmm", "addmm_", "matmul", "linear")
        if name in ("index_select", "_embedding_bag", "_embedding_bag_forward_only"):
            self.gathered += (args[2] if name == "index_select" else args[1]).numel()
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out


def _operators(leaves, ids, options, upstream):
    """The two implementations themselves: a dispatch mode does not look into a registered operator."""
    inputs = leaves["hidden"].detach(), leaves["weight"].detach(), None, ids, None, None, *options["support"]
    with _Sizes() as forward:
        _, _, stats, dots = support_ops._forward(*inputs, 1.0, 1.0, 0.0, True, True)
    with _Sizes() as backward:
        support_ops._backward(*inputs, stats, dots, upstream, None, 1.0, 1.0, 0.0, True, True, True)
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_within_the_budget_and_no_gemm(monkeypatch, dtype):
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    sizes = [300] * 40 + [5] * 200
    case = _case("plain", dtype, sizes=sizes, dim=512, vocab=400)
    forward, backward = _operators(*case, torch.ones(len(sizes)))
    assert forward.gemms == backward.gemms == 0
    gradients = 400 * 512 * 4
    assert forward.largest <= 1 << 20  # the kept ids' rows of W would take 26 MB in float32
    assert backward.largest <= max(1 << 20, gradients)


def test_rows_without_upstream_gradient_cost_nothing():
    sizes = [20] * 30
    upstream = torch.zeros(30)
    upstream[4] = 1.0
    _, backward = _operators(*_case("plain", torch.float32, sizes=sizes), upstream)
    assert 0 < backward.gathered <= 2 * (20 + 1)  # once for hidden, once for weight
    _, nothing = _operators(*_case("plain", torch.float32, sizes=sizes), torch.zeros(30))
    assert nothing.gathered == 0


def test_shapes_strides_and_integers(backend):
    hidden, weight = torch.randn(2, 5, 6).transpose(0, 1), torch.randn(6, 30).T
    ids, mask = torch.randint(0, 30, (2, 5)).T, torch.rand(2, 5).T > 0.3
    kept, offsets = _support([3, 0, 7, 1, 4, 2, 2, 9, 5, 0], 30)
    dense = rf.linear_token_logprobs(
        hidden.contiguous(), weight.contiguous(), ids.contiguous(), mask=mask, support=(kept, offsets)
    )
    assert dense.shape == (5, 2)
    for k, o in ((kept.int(), offsets.int()), (kept.repeat_interleave(2)[::2], offsets.int())):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found = rf.linear_token_logprobs(h, w, ids.int(), mask=mask.int(), support=[k, o])
        contract.assert_bitwise(found.detach(), dense)
        found.sum().backward()
        assert (h.grad.shape, w.grad.shape) == (h.shape, w.shape)
    one = rf.linear_token_logprobs(hidden[0, 0], weight, ids[0, 0], support=(kept[:3], torch.tensor([0, 3])))
    assert one.shape == ()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_rows(shape):
    hidden, weight = torch.empty(*shape, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    ids, nothing = torch.empty(shape, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    support = nothing, torch.tensor([0])
    logp, entropy = rf.linear_token_logprobs(hidden, weight, ids, support=support, return_entropy=True)
    assert logp.shape == entropy.shape == shape
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape
    assert bool((weight.grad == 0).all())


def test_all_masked():
    leaves, ids, options = _case()
    found = _all(leaves, ids, {**options, "mask": torch.zeros(len(SIZES), dtype=torch.bool)})
    for x in found:
        assert bool((x == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ratio_is_one_when_nothing_changed(dtype):
    leaves, ids, options = _case("everything", dtype)
    with torch.no_grad():
        old, _ = _call(leaves, ids, options)
    assert not old.requires_grad
    new, _ = _call(leaves, ids, options)
    assert bool((torch.exp(new - old) == 1).all())


def test_unused_outputs_and_tied_weights():
    leaves, ids, options = _case("everything")
    for pick in (0, 1):
        slopes = torch.autograd.grad(_call(leaves, ids, options)[pick].sum(), list(leaves.values()))
        with rf.use_backend("reference"):
            twin = torch.autograd.grad(_call(leaves, ids, options)[pick].sum(), list(leaves.values()))
        torch.testing.assert_close(slopes, twin, rtol=1e-12, atol=1e-12)
    weight = leaves["weight"]

    def tied():
        rows = {**leaves, "hidden": weight[: len(ids)] * 1.0}
        return torch.autograd.grad(_call(rows, ids, options)[0].sum(), weight)

    found = tied()
    with rf.use_backend("reference"):
        torch.testing.assert_close(found, tied(), rtol=1e-12, atol=1e-12)


def test_changed_in_place_is_noticed_and_no_second_order():
    leaves, ids, options = _case()
    hidden = leaves["hidden"] * 1.0
    logp, _ = _call({**leaves, "hidden": hidden}, ids, options)
    (slope,) = torch.autograd.grad(logp.sum(), leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        torch.autograd.grad(slope.sum(), leaves["hidden"])
    logp, _ = _call({**leaves, "hidden": hidden}, ids, options)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_batched_gradients():
    leaves, ids, options = _case("everything")
    logp, _ = _call(leaves, ids, options)
    upstream = torch.eye(len(ids), dtype=torch.float64)
    batched = torch.autograd.grad(
        logp, list(leaves.values()), upstream, is_grads_batched=True, retain_graph=True
    )
    for i, row in enumerate(upstream):
        single = torch.autograd.grad(logp, list(leaves.values()), row, retain_graph=True)
        for b, s in zip(batched, single, strict=True):
            contract.assert_bitwise(b[i], s)


def test_autocast():
    leaves, ids, options = _case("everything", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = _call(leaves, ids, options)
    expected, _ = _call({k: x.bfloat16() for k, x in leaves.items()}, ids, options)
    assert logp.dtype == torch.float32
    contract.assert_bitwise(logp.detach(), expected.detach())
    logp.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())


def test_compiles_and_opcheck():
    leaves, ids, options = _case("everything", torch.float32)
    h, w, b = leaves.values()
    contract.assert_compiles(
        lambda h, w, b: torch.stack(_call({"hidden": h, "weight": w, "bias": b}, ids, options)), h, w, b
    )
    rows = options["mask"], options["temperature"], *options["support"]
    contract.assert_opcheck("support_token_logprobs", h, w, b, ids, *rows, 1.5, 1.0, 2.0, True, True)
    meta = [x.to("meta") for x in (h.bfloat16(), w.bfloat16(), ids, *options["support"])]
    logp = rf.linear_token_logprobs(*meta[:3], support=tuple(meta[3:]))
    assert (logp.shape, logp.dtype) == ((len(ids),), torch.float32)


H, W, IDS = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
KEPT, EDGES = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])


@pytest.mark.parametrize("chosen", ["auto", "triton", "reference"])
@pytest.mark.parametrize(
    ("support", "error", "text"),
    [
        (KEPT, TypeError, r"support must be a pair \(kept_ids, offsets\), got Tensor"),
        ((KEPT,), TypeError, r"support must be a pair \(kept_ids, offsets\), got 1 items"),
        ((KEPT.tolist(), EDGES), TypeError, r"support\[0\] \(kept_ids\) must be a torch.Tensor, got list"),
        ((KEPT, EDGES.tolist()), TypeError, r"support\[1\] \(offsets\) must be a torch.Tensor, got list"),
        ((KEPT.float(), EDGES), TypeError, r"support\[0\] \(kept_ids\) must be int64 or int32, got float32"),
        ((KEPT, EDGES.short()), TypeError, r"support\[1\] \(offsets\) must be int64 or int32, got int16"),
        ((KEPT[None], EDGES), ValueError, r"support\[0\] \(kept_ids\) must be \[M\], got \[1, 3\]"),
        ((KEPT, EDGES[:2]), ValueError, r"support\[1\] \(offsets\) must be \[3\] like .*, got \[2\]"),
        ((KEPT, EDGES[None]), ValueError, r"support\[1\] \(offsets\) must be \[3\] like .*, got \[1, 3\]"),
        ((KEPT.to("meta"), EDGES), ValueError, r"support\[0\] \(kept_ids\) must be on cpu like token_ids"),
        ((KEPT, EDGES.to("meta")), ValueError, r"support\[1\] \(offsets\) must be on cpu like token_ids"),
        ((KEPT, torch.tensor([0, 2, 1])), ValueError, r"support\[1\] \(offsets\) must rise from 0 to 3 like"),
        ((KEPT, torch.tensor([0, 4, 3])), ValueError, r"support\[1\] \(offsets\) must rise from 0 to 3 like"),
        ((KEPT, torch.tensor([1, 1, 3])), ValueError, r"support\[1\] \(offsets\) must rise from 0 to 3 like"),
        ((KEPT, torch.tensor([0, 1, 2])), ValueError, r"support\[1\] \(offsets\) must rise from 0 to 3 like"),
        ((KEPT + 2, EDGES), IndexError, r"support\[0\] \(kept_ids\) must be in \[0, 5\) .*, got 5"),
        ((KEPT - 2, EDGES), IndexError, r"support\[0\] \(kept_ids\) must be in \[0, 5\) .*, got -1"),
    ],
)
def test_bad_support_is_refused(chosen, support, error, text):
    with rf.use_backend(chosen), pytest.raises(error, match=text) as caught:
        rf.linear_token_logprobs(H, W, IDS, support=support)
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_refused():
    support = KEPT, EDGES
    with pytest.raises(ValueError, match="support must be None where the vocabulary is split"):
        rf.linear_token_logprobs(H, W, IDS, support=support, tp_group=object())
    with pytest.raises(IndexError, match=r"token_ids must be in \[0, 5\) where mask is true, got 5"):
        rf.linear_token_logprobs(H, W, torch.tensor([0, 5]), support=support)
    with pytest.raises(ValueError, match=r"temperature must be in \[1e-30, 1e\+30\], got 0"):
        rf.linear_token_logprobs(H, W, IDS, support=support, temperature=torch.tensor([1.0, 0.0]))
