"""The contract of every op for linear_token_logprobs(support=...): bits, memory, shapes, compiling, bad input."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import react_fast as rf
from react_fast.ops import _ragged
from react_fast.ops import _support_logprob as support_ops

from . import contract
from .support_cases import SIZES, alone, call, make_case, make_support, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_batch_invariant(backend, monkeypatch, dtype):
    """A row alone, in any order, in any batch, on any threads and budget: the same bits, hidden's gradient too."""
    # Rows of W longer than a block are in the batch.
    monkeypatch.setattr(_ragged, "BLOCK", dict.fromkeys(("cpu", "cuda"), 1 << 11))
    sizes = [0, 1, 40, 7, 3, 50, 12, 0, 25, 2]
    leaves, ids, options = make_case("everything", dtype, sizes=sizes, dim=37)
    del options["mask"]
    ids = ids.clamp_min(0)

    def of(rows):
        part = {**leaves, "hidden": leaves["hidden"].detach()[rows].requires_grad_()}
        logp, entropy = call(part, ids[rows], alone(rows, options, options["support"]))
        (slope,) = torch.autograd.grad(logp.sum() + 2 * entropy.sum(), part["hidden"])
        return logp.detach(), entropy.detach(), slope

    whole = of(torch.arange(len(sizes)))
    for threads, entry in ((1, 88), (2, 1 << 16), (4, 1 << 21)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(_ragged, "ENTRY", entry)
        for rows in (torch.randperm(len(sizes)), torch.tensor([5]), torch.tensor([2, 9, 8])):
            for found, expected in zip(of(rows), whole, strict=True):
                contract.assert_bitwise(found, expected[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_runs_agree(dtype):
    """All gradients, the weight's with many rows an id among them; large enough for several threads."""
    case = make_case("everything", dtype, sizes=[90] * 400, dim=130, vocab=200)
    contract.assert_threads_agree(lambda: torch.cat([x.detach().reshape(-1) for x in results(*case)]))


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
        _, _, stats, products = support_ops._forward(*inputs, 1.0, 1.0, 0.0, True, True)
    with _Sizes() as backward:
        support_ops._backward(*inputs, stats, products, upstream, None, 1.0, 1.0, 0.0, True, True, True)
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_within_the_budget_and_no_gemm(monkeypatch, dtype):
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    sizes = [300] * 40 + [5] * 200
    case = make_case("plain", dtype, sizes=sizes, dim=512, vocab=400)
    forward, backward = _operators(*case, torch.ones(len(sizes)))
    assert forward.gemms == backward.gemms == 0
    gradients = 400 * 512 * 4
    assert forward.largest <= 1 << 20  # the kept ids' rows of W would take 26 MB in float32
    assert backward.largest <= max(1 << 20, gradients)


def test_rows_without_upstream_gradient_cost_nothing():
    sizes = [20] * 30
    upstream = torch.zeros(30)
    upstream[4] = 1.0
    _, backward = _operators(*make_case("plain", torch.float32, sizes=sizes), upstream)
    assert 0 < backward.gathered <= 2 * (20 + 1)  # once for hidden, once for weight
    _, nothing = _operators(*make_case("plain", torch.float32, sizes=sizes), torch.zeros(30))
    assert nothing.gathered == 0


def test_shapes_strides_and_integers(backend):
    hidden, weight = torch.randn(2, 5, 6).transpose(0, 1), torch.randn(6, 30).T
    ids, mask = torch.randint(0, 30, (2, 5)).T, torch.rand(2, 5).T > 0.3
    kept, offsets = make_support([3, 0, 7, 1, 4, 2, 2, 9, 5, 0], 30)
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
    leaves, ids, options = make_case()
    found = results(leaves, ids, {**options, "mask": torch.zeros(len(SIZES), dtype=torch.bool)})
    for x in found:
        assert bool((x == 0).all())


def test_changed_in_place_is_noticed_and_no_second_order():
    leaves, ids, options = make_case()
    hidden = leaves["hidden"] * 1.0
    logp, _ = call({**leaves, "hidden": hidden}, ids, options)
    (slope,) = torch.autograd.grad(logp.sum(), leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; for second"):
        torch.autograd.grad(slope.sum(), leaves["hidden"])
    logp, _ = call({**leaves, "hidden": hidden}, ids, options)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_batched_gradients():
    leaves, ids, options = make_case("everything")
    logp, _ = call(leaves, ids, options)
    upstream = torch.eye(len(ids), dtype=torch.float64)
    batched = torch.autograd.grad(
        logp, list(leaves.values()), upstream, is_grads_batched=True, retain_graph=True
    )
    for i, row in enumerate(upstream):
        single = torch.autograd.grad(logp, list(leaves.values()), row, retain_graph=True)
        for b, s in zip(batched, single, strict=True):
            contract.assert_bitwise(b[i], s)


def test_autocast():
    leaves, ids, options = make_case("everything", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = call(leaves, ids, options)
    expected, _ = call({k: x.bfloat16() for k, x in leaves.items()}, ids, options)
    assert logp.dtype == torch.float32
    contract.assert_bitwise(logp.detach(), expected.detach())
    logp.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())


def test_compiles_and_opcheck():
    leaves, ids, options = make_case("everything", torch.float32)
    h, w, b = leaves.values()
    contract.assert_compiles(
        lambda h, w, b: torch.stack(call({"hidden": h, "weight": w, "bias": b}, ids, options)), h, w, b
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
