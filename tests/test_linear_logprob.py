"""linear_token_logprobs: equals log-probs of materialised logits, forward and backward, in few GEMMs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import react_fast as rf

from . import contract

# One token; below a vector; below and above the fold's unit of 2048 columns; more rows than a MiB of tiles holds.
SHAPES = [(1, 3, 1), (4, 5, 11), (7, 16, 300), (5, 8, 2049), (66, 12, 2100)]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "scaled": {"temperature": 0.7, "logit_scale": 1.5},
    "everything": {"softcap": 3.0, "logit_scale": 0.5, "temperature": "row", "bias": True, "mask": True},
}


def _case(shape, name, dtype=torch.float64):
    rows, dim, vocab = shape
    options = dict(OPTIONS[name])
    leaves = {"hidden": torch.randn(rows, dim), "weight": torch.randn(vocab, dim)}
    if options.pop("bias", False):
        leaves["bias"] = torch.randn(vocab)
    leaves = {k: x.to(dtype).requires_grad_() for k, x in leaves.items()}
    ids = torch.randint(0, vocab, (rows,))
    if options.get("temperature") == "row":
        options["temperature"] = torch.rand(rows) + 0.5
    if options.pop("mask", False):
        options["mask"] = torch.rand(rows) > 0.3
        ids[~options["mask"]] = -100
    return leaves, ids, options


def _call(leaves, ids, options, entropy=True):
    bias = leaves.get("bias")
    return rf.linear_token_logprobs(
        leaves["hidden"], leaves["weight"], ids, bias=bias, return_entropy=entropy, **options
    )


def _all(leaves, ids, options):
    """logp, entropy and the gradients of a mixture of both."""
    logp, entropy = _call(leaves, ids, options)
    mixture = (logp * torch.arange(1, len(ids) + 1)).sum() + (entropy**2).sum()
    return logp, entropy, *torch.autograd.grad(mixture, list(leaves.values()))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_in_float64(backend, monkeypatch, shape, name):
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")  # several tiles and, for the largest shape, blocks of rows
    rows = shape[0] if backend == "cpu" else min(shape[0], 10)
    case = _case((rows, *shape[1:]), name)
    found = _all(*case)
    with rf.use_backend("reference"):
        expected = _all(*case)
    for f, e in zip(found, expected, strict=True):
        # Sums of up to 2100 terms; gradients weighted by row numbers up to 66.
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_error_is_that_of_the_matmuls(name, dtype):
    """At most twice as far from float64 as the same numbers by way of a logits matrix of this dtype."""
    leaves, ids, options = _case((60, 32, 3000), name, dtype)
    found = _all(leaves, ids, options)
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    with rf.use_backend("reference"):
        expected = _all(wide, ids, options)
    x = leaves["hidden"] @ leaves["weight"].T
    x = options.get("logit_scale", 1.0) * (x + leaves["bias"] if "bias" in leaves else x)
    rest = {k: v for k, v in options.items() if k != "logit_scale"}
    logp, entropy = rf.token_logprobs(x, ids, return_entropy=True, **rest)
    mixture = (logp * torch.arange(1, len(ids) + 1)).sum() + (entropy**2).sum()
    plain = logp, entropy, *torch.autograd.grad(mixture, list(leaves.values()))
    for f, p, e in zip(found, plain, expected, strict=True):
        ours, theirs = (float((v.detach().double() - e.detach()).norm() / e.detach().norm()) for v in (f, p))
        assert ours <= 2 * theirs + 2 * contract.EPS[torch.float32]


def test_gradcheck():
    ids, mask, weight = torch.tensor([0, 4, 2]), torch.tensor([True, True, False]), torch.randn(6, 3)
    for options in ({}, {"softcap": 1.5, "logit_scale": 2.0, "temperature": 0.6}, {"mask": mask}):
        for pick in (0, 1):
            contract.assert_gradcheck(
                lambda h, w, b, o=options, p=pick: rf.linear_token_logprobs(
                    h, w, ids, bias=b, return_entropy=True, **o
                )[p],
                torch.randn(3, 3), weight, torch.randn(6),
            )  # fmt: skip


class Gemms(TorchDispatchMode):
    """Counts multiplications of the size rows x vocabulary x dim."""

    def __init__(self, size):
        super().__init__()
        self.size, self.work = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.work += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))

    @property
    def count(self):
        return self.work / self.size


@pytest.mark.parametrize(
    ("hidden", "weight", "entropy", "gemms"),
    [
        (False, False, False, 1),
        (False, False, True, 1),
        (True, False, False, 2),
        (False, True, False, 3),
        (True, True, False, 4),
        (True, True, True, 5),
    ],
)
def test_number_of_gemms(hidden, weight, entropy, gemms):
    rows, dim, vocab = 64, 32, 10000
    h = torch.randn(rows, dim, requires_grad=hidden)
    w = torch.randn(vocab, dim, requires_grad=weight)
    with Gemms(rows * dim * vocab) as counted:
        out = rf.linear_token_logprobs(h, w, torch.zeros(rows, dtype=torch.int64), return_entropy=entropy)
        loss = out[0].sum() + out[1].sum() if entropy else out.sum()
        if hidden or weight:
            loss.backward()
    assert counted.count == gemms


def test_only_rows_that_count_reach_a_gemm():
    rows, dim, vocab = 40, 8, 3000
    h, w = torch.randn(rows, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    mask = torch.arange(rows) % 4 == 0
    with Gemms(rows // 4 * dim * vocab) as counted:
        logp = rf.linear_token_logprobs(h, w, torch.zeros(rows, dtype=torch.int64), mask=mask)
        (logp * (torch.arange(rows) % 8 == 0)).sum().backward()  # half of them have an upstream gradient
    assert counted.count == 3  # two forward, and half of two backward
    assert bool((h.grad[torch.arange(rows) % 8 != 0] == 0).all())


def test_tiles_and_threads_change_roundings_of_the_gemm_alone(monkeypatch):
    """The GEMM library may cut its sums by size and threads; a second run of the same gives the same bits."""
    leaves, ids, options = _case((70, 12, 9000), "plain", torch.float32)
    results = []
    for mib, threads in (("1", 1), ("1", 2), ("64", 1), ("64", 4), ("64", 4)):
        monkeypatch.setenv("REACT_FAST_TILE_MIB", mib)
        torch.set_num_threads(threads)
        results.append(torch.stack([x.detach() for x in _call(leaves, ids, options)]))
    contract.assert_bitwise(results[4], results[3])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_batch_invariant(monkeypatch, dtype):
    """Alone, in any order, in any batch, on any number of threads and in any tile: the same bits."""
    leaves, ids, options = _case((150, 40, 5000), "everything", dtype)
    options["mask"] = torch.ones(150, dtype=torch.bool)
    ids = ids.clamp_min(0)
    temperature = options.pop("temperature")

    def results(rows):
        part = {**leaves, "hidden": leaves["hidden"].detach()[rows].requires_grad_()}
        own = {"mask": options["mask"][rows], "temperature": temperature[rows], "batch_invariant": True}
        logp, entropy = _call(part, ids[rows], {**options, **own})
        (slope,) = torch.autograd.grad(logp.sum() + 2 * entropy.sum(), part["hidden"])
        return logp.detach(), entropy.detach(), slope

    whole = results(torch.arange(150))
    for threads, mib in ((1, "1"), (2, "64"), (4, "1")):
        torch.set_num_threads(threads)
        monkeypatch.setenv("REACT_FAST_TILE_MIB", mib)
        for rows in (
            torch.randperm(150),
            torch.randperm(150)[:70],
            torch.tensor([149]),
            torch.tensor([3, 77]),
        ):
            for found, expected in zip(results(rows), whole, strict=True):
                contract.assert_bitwise(found, expected[rows])


def test_ratio_is_one_when_nothing_changed():
    leaves, ids, options = _case((30, 24, 4000), "plain", torch.bfloat16)
    with torch.no_grad():
        old = _call(leaves, ids, options, entropy=False)
    new = _call(leaves, ids, options, entropy=False)
    assert bool((torch.exp(new - old) == 1).all())


def test_masked_rows_influence_nothing(backend):
    leaves, ids, _ = _case((6, 5, 50), "plain")
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    dirty = dict(leaves)
    dirty["hidden"] = leaves["hidden"].detach().clone()
    dirty["hidden"][~mask] = float("nan")
    dirty["hidden"].requires_grad_()
    clean = {**leaves, "hidden": leaves["hidden"].detach()[mask].requires_grad_()}
    found, expected = (
        _call(dirty, ids.where(mask, -100), {"mask": mask}),
        _call(clean, ids[mask], {}),
    )
    for f, e in zip(found, expected, strict=True):
        assert bool((f[~mask] == 0).all())
        contract.assert_bitwise(f[mask].detach(), e.detach())
    slopes = torch.autograd.grad(found[0].sum(), (dirty["hidden"], dirty["weight"]))
    assert bool((slopes[0][~mask] == 0).all())
    assert bool(torch.isfinite(slopes[1]).all())


def test_forbidden_and_wild_tokens(backend):
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    bias = torch.zeros(9, dtype=torch.float64)
    bias[5:] = float("-inf")
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias}
    ids = torch.tensor([0, 4, 7])
    logp, entropy = _call(leaves, ids, {})
    expected = _call({**leaves, "weight": weight[:5], "bias": bias[:5]}, ids.clamp_max(4), {})
    assert logp[2] == float("-inf")
    torch.testing.assert_close(logp[:2], expected[0][:2])
    torch.testing.assert_close(entropy, expected[1])
    slopes = torch.autograd.grad(logp[:2].sum() + entropy.sum(), (hidden, weight))
    for slope in slopes:
        assert bool(torch.isfinite(slope).all())
    assert bool((slopes[1][5:] == 0).all())
    for scale in (1e4, 1e-8, 0.0):  # one-hot, nearly equal and equal logits
        found = _all({"hidden": (hidden * scale).detach().requires_grad_(), "weight": weight}, ids, {})
        for x in found:
            assert bool(torch.isfinite(x).all())
    broken = hidden.detach().clone()
    broken[1, 2] = float("nan")
    assert _call({"hidden": broken, "weight": weight}, ids, {})[0].isnan().tolist() == [False, True, False]


def test_shapes_strides_and_empty(backend):
    hidden, weight = torch.randn(2, 5, 6).transpose(0, 1), torch.randn(6, 30).T
    ids = torch.randint(0, 30, (2, 5)).T
    found = rf.linear_token_logprobs(hidden, weight, ids)
    assert found.shape == (5, 2)
    dense = rf.linear_token_logprobs(hidden.contiguous(), weight.contiguous(), ids.contiguous())
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-6)
    one = rf.linear_token_logprobs(hidden[0, 0], weight, ids[0, 0])
    torch.testing.assert_close(one, dense[0, 0], rtol=1e-6, atol=1e-6)
    for shape in ((0,), (0, 3), (3, 0)):
        nothing = torch.empty(*shape, 6, requires_grad=True)
        logp, entropy = rf.linear_token_logprobs(
            nothing, weight, torch.empty(shape, dtype=torch.int64), return_entropy=True
        )
        assert logp.shape == entropy.shape == shape
        (logp.sum() + entropy.sum()).backward()
    none = rf.linear_token_logprobs(hidden, weight, ids, mask=torch.zeros(5, 2, dtype=torch.bool))
    assert bool((none == 0).all())


def test_unused_outputs_and_tied_weights(backend):
    leaves, ids, options = _case((5, 4, 20), "plain")
    logp, entropy = _call(leaves, ids, options)
    for out in (logp, entropy):
        alone = torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True)
        with rf.use_backend("reference"):
            twin = _call(leaves, ids, options)[0 if out is logp else 1]
        for a, e in zip(alone, torch.autograd.grad(twin.sum(), list(leaves.values())), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    weight = leaves["weight"]
    tied = rf.linear_token_logprobs(weight[:5] * 1.0, weight, ids).sum()
    with rf.use_backend("reference"):
        expected = rf.linear_token_logprobs(weight[:5] * 1.0, weight, ids).sum()
    for a, e in zip(torch.autograd.grad(tied, weight), torch.autograd.grad(expected, weight), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_changed_in_place_is_noticed():
    """What the backward needs is kept by autograd: no wrong gradient after a change, and none of second order."""
    leaves, ids, options = _case((5, 4, 20), "plain")
    hidden = leaves["hidden"] * 1.0
    logp = _call({**leaves, "hidden": hidden}, ids, options, entropy=False)
    (slope,) = torch.autograd.grad(logp.sum(), leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; for second"):
        torch.autograd.grad(slope.sum(), leaves["hidden"])
    logp = _call({**leaves, "hidden": hidden}, ids, options, entropy=False)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.parametrize("of", ["hidden", "weight"])
def test_a_penalty_on_the_gradient_is_refused_and_not_forgotten(of):
    """Its upstream is a constant: torch's once_differentiable would hand over a gradient without history."""
    leaves, ids, options = _case((5, 4, 20), "plain")
    slopes = []
    for backend in ("auto", "reference"):
        with rf.use_backend(backend):
            logp = _call(leaves, ids, options, entropy=False)
            slopes += torch.autograd.grad(logp.sum(), leaves[of], create_graph=True)
    torch.testing.assert_close(*slopes)
    with pytest.raises(RuntimeError, match="can be differentiated once; for second"):
        slopes[0].square().sum().backward()
    slopes[1].square().sum().backward()
    assert leaves["hidden"].grad.abs().sum() > 0


def test_autocast():
    leaves, ids, options = _case((5, 8, 40), "everything", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = _call(leaves, ids, options)
    expected, _ = _call({k: x.bfloat16() for k, x in leaves.items()}, ids, options)
    assert logp.dtype == torch.float32
    contract.assert_bitwise(logp.detach(), expected.detach())
    logp.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())


def test_compiles_and_opcheck():
    leaves, ids, _ = _case((6, 4, 30), "plain", torch.float32)
    mask = torch.rand(6) > 0.3
    h, w = leaves.values()
    contract.assert_compiles(
        lambda h, w: torch.stack(rf.linear_token_logprobs(h, w, ids, mask=mask, return_entropy=True)), h, w
    )
    options = (None, ids, mask, None, 1.5, 0.7, 2.0, False, True, True)
    contract.assert_opcheck("linear_token_logprobs", h, w, *options)
    meta = rf.linear_token_logprobs(h.to("meta").bfloat16(), w.to("meta").bfloat16(), ids.to("meta"))
    assert (meta.shape, meta.dtype) == ((6,), torch.float32)


H, W = torch.ones(2, 3), torch.ones(5, 3)
IDS = torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("hidden", "weight", "ids", "options", "error", "text"),
    [
        (H, torch.ones(5, 4), IDS, {}, ValueError, r"weight must be \[V, 3\] like hidden, got \[5, 4\]"),
        (H, torch.ones(0, 3), IDS, {}, ValueError, "weight must have a row for every token"),
        (H, W.double(), IDS, {}, TypeError, "weight must be float32 like hidden, got float64"),
        (H, W.to("meta"), IDS, {}, ValueError, "weight must be on cpu like hidden"),
        (H.int(), W, IDS, {}, TypeError, "hidden must be float32"),
        (torch.tensor(1.0), W, IDS, {}, ValueError, r"hidden must be \[..., D\]"),
        (H, W, torch.tensor([0]), {}, ValueError, r"token_ids must be \[2\] like hidden"),
        (
            H,
            W,
            torch.tensor([0, 5]),
            {},
            IndexError,
            r"token_ids must be in \[0, 5\) where mask is true, got 5",
        ),
        (H, W, IDS.float(), {}, TypeError, "token_ids must be int64 or int32"),
        (H, W, IDS, {"bias": torch.ones(4)}, ValueError, r"bias must be \[5\] like weight"),
        (H, W, IDS, {"bias": torch.ones(5).double()}, TypeError, "bias must be float32 like hidden"),
        (H, W, IDS, {"temperature": 0.0}, ValueError, "temperature must be in"),
        (H, W, IDS, {"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature must be in"),
        (H, W, IDS, {"softcap": -1.0}, ValueError, "softcap must be in"),
        (H, W, IDS, {"logit_scale": 0.0}, ValueError, "logit_scale must not be 0"),
        (H, W, IDS, {"logit_scale": float("nan")}, ValueError, "logit_scale must be in"),
        (H, W, IDS, {"mask": torch.ones(3).bool()}, ValueError, r"mask must be \[2\] like hidden"),
    ],
)
def test_bad_input_is_refused(hidden, weight, ids, options, error, text):
    with pytest.raises(error, match=text):
        rf.linear_token_logprobs(hidden, weight, ids, **options)


def test_process_group_needs_plain_tensors():
    with pytest.raises(ValueError, match=r"tp_group must be None under torch\.compile and for fake tensors"):
        rf.linear_token_logprobs(H.to("meta"), W.to("meta"), IDS.to("meta"), tp_group=object())


def test_bad_budget_is_refused(monkeypatch):
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "lots")
    with pytest.raises(
        ValueError, match="REACT_FAST_TILE_MIB must be a whole number of MiB above 0, got 'lots'"
    ):
        rf.linear_token_logprobs(H, W, IDS)
