"""linear_token_logprobs(support=...): log-probs over a sampler's kept ids, equal to restricted logits."""

import pytest
import torch

import react_fast as rf
from react_fast.ops import _ragged
from react_fast.ops import _support_logprob as support_ops

from . import contract
from .support_cases import OPTIONS, SIZES, VOCAB, alone, call, make_case, results


@pytest.fixture(params=["whole", "cut"])
def blocks(request, monkeypatch):
    """As it is, and with every row a group of its own, two rows of W a block and a range of ids for every id."""
    if request.param == "cut":
        for module in (_ragged, support_ops):
            monkeypatch.setattr(module, "ENTRY", 1 << 21)
        monkeypatch.setattr(_ragged, "BLOCK", dict.fromkeys(("cpu", "cuda"), 100))


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_reference_in_float64(backend, blocks, name):
    case = make_case(name)
    found = results(*case)
    with rf.use_backend("reference"):
        expected = results(*case)
    for f, e in zip(found, expected, strict=True):
        # Sums of up to 50 terms of size 10 at most, weighted by row numbers up to 7.
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_error_is_that_of_float32_dots(backend, blocks, name, dtype):
    leaves, ids, options = case = make_case(name, dtype, dim=70)
    found = results(*case)
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    with rf.use_backend("reference"):
        expected = results(wide, ids, options)
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
    leaves, ids, options = make_case(name, sizes=[0, 1, 5, 9, 3], dim=2, vocab=9)
    bias = torch.randn(9)
    for pick in (0, 1):
        contract.assert_gradcheck(
            lambda h, w, b, p=pick: call({"hidden": h, "weight": w, "bias": b}, ids, options)[p],
            leaves["hidden"], leaves["weight"], bias,
        )  # fmt: skip


def test_everything_kept_is_the_whole_softmax():
    leaves, ids, options = make_case("scaled", sizes=[VOCAB] * 4)
    found, expected = results(leaves, ids, options), results(leaves, ids, {**options, "support": None})
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_token_alone_is_certain(dtype):
    """Nothing kept, the token kept, the token kept twice: logp 0, H 0, no gradient."""
    leaves, _, _ = make_case(dtype=dtype)
    ids = torch.tensor([7, 7, 7, 0, 49, 1, 2])
    support = torch.tensor([7, 7, 7]), torch.tensor([0, 0, 1, 3, 3, 3, 3, 3])
    for x in results(leaves, ids, {"support": support}):
        assert bool((x == 0).all())


def test_repeats_and_order_change_nothing():
    leaves, ids, _ = make_case()
    kept = torch.tensor([3, 9, 20, 41])
    edges = torch.arange(8) * 4
    once = results(leaves, ids, {"support": (kept.repeat(7), edges)})
    shuffled = torch.tensor([41, 9, 9, 3, 20, 3, 41, 41]).repeat(7)
    for f, e in zip(results(leaves, ids, {"support": (shuffled, edges * 2)}), once, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-13)  # four terms in another order
    own = torch.stack([kept.repeat(7, 1)[:, i] for i in range(4)] + [ids], 1).reshape(-1)
    for f, e in zip(results(leaves, ids, {"support": (own, torch.arange(8) * 5)}), once, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-13)


def test_masked_rows_are_not_looked_at(backend):
    leaves, ids, options = make_case("everything")
    mask, (kept, offsets) = options["mask"], options["support"]
    rows = mask.nonzero()[:, 0]
    expected = results(leaves, ids, options)
    wild = kept.clone()
    for i in (~mask).nonzero()[:, 0].tolist():
        wild[offsets[i] : offsets[i + 1]] = torch.tensor([-7, 2**40, VOCAB]).repeat(20)[
            : offsets[i + 1] - offsets[i]
        ]
    dirty = leaves["hidden"].detach().masked_fill(~mask[:, None], float("nan")).requires_grad_()
    temperature = options["temperature"].masked_fill(~mask, -1.0)
    found = results(
        {**leaves, "hidden": dirty}, ids, {**options, "support": (wild, offsets), "temperature": temperature}
    )
    for f, e in zip(found, expected, strict=True):
        contract.assert_bitwise(f, e)
    for x in found[:3]:
        assert bool((x[~mask] == 0).all())
    deleted = call(
        {**leaves, "hidden": leaves["hidden"][rows]}, ids[rows], alone(rows, options, (kept, offsets))
    )
    for f, e in zip(found, deleted, strict=False):
        contract.assert_bitwise(f[rows], e)


def test_forbidden_tokens():
    """A bias of -inf takes a kept id out; a row of forbidden ones is -inf, as token_logprobs has it."""
    leaves, _, _ = make_case(sizes=[0] * 4)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[40:] = float("-inf")
    ids = torch.tensor([0, 1, 45, 45])
    support = torch.tensor([1, 42, 2, 44, 3, 47]), torch.tensor([0, 2, 4, 5, 6])
    for options in ({}, {"softcap": 2.0, "temperature": 0.5}):
        case = {**leaves, "bias": bias}, ids, {"support": support, **options}
        logp, entropy = call(*case)
        with rf.use_backend("reference"):
            twin = call(*case)
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
    leaves, ids, options = make_case(name)
    for factor in (1e4, 1e-8, 0.0):
        own = {**leaves, "hidden": (leaves["hidden"].detach() * factor).requires_grad_()}
        found = results(own, ids, options)
        with rf.use_backend("reference"):
            expected = results(own, ids, options)
        for f, e in zip(found, expected, strict=True):
            # Logits of 1e5 are themselves off by 1e5 2^-52.
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    broken = leaves["hidden"].detach().clone()
    broken[2, 1] = float("nan")
    logp, entropy = call({**leaves, "hidden": broken}, ids, options)
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


def test_weight_gradient_accumulates_in_float32():
    """2048 equal contributions to one id: in bfloat16 the sum would stop growing at 256 of them."""
    rows = 2048
    hidden = torch.ones(rows, 4, dtype=torch.bfloat16)
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    support = torch.ones(rows, dtype=torch.int64), torch.arange(rows + 1)
    logp = rf.linear_token_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64), support=support)
    (slope,) = torch.autograd.grad(logp.sum(), weight)
    assert slope.tolist() == [[rows / 2] * 4, [-rows / 2] * 4, [0.0] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ratio_is_one_when_nothing_changed(dtype):
    leaves, ids, options = make_case("everything", dtype)
    with torch.no_grad():
        old, _ = call(leaves, ids, options)
    assert not old.requires_grad
    new, _ = call(leaves, ids, options)
    assert bool((torch.exp(new - old) == 1).all())


def test_unused_outputs_and_tied_weights():
    leaves, ids, options = make_case("everything")
    for pick in (0, 1):
        slopes = torch.autograd.grad(call(leaves, ids, options)[pick].sum(), list(leaves.values()))
        with rf.use_backend("reference"):
            twin = torch.autograd.grad(call(leaves, ids, options)[pick].sum(), list(leaves.values()))
        torch.testing.assert_close(slopes, twin, rtol=1e-12, atol=1e-12)
    weight = leaves["weight"]

    def tied():
        rows = {**leaves, "hidden": weight[: len(ids)] * 1.0}
        return torch.autograd.grad(call(rows, ids, options)[0].sum(), weight)

    found = tied()
    with rf.use_backend("reference"):
        torch.testing.assert_close(found, tied(), rtol=1e-12, atol=1e-12)
