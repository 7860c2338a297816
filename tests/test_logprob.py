"""token_logprobs: equals the float64 reference, exact gradients, and the contract of every op."""

import pytest
import torch

import react_fast as rf
from react_fast import _core

from . import contract
from .logprob_cases import DTYPES, INF, assert_gradient, assert_within_bound, both, case, per_row

# One token; below, at and above a vector; a ragged multiple; two leading axes; above the Triton block of 4096;
# above the C++ chunk of 16384.
SHAPES = [(1, 1), (3, 7), (5, 16), (9, 100), (2, 3, 33), (2, 4101), (2, 16500)]
# Plain; sharp and flat; capped; temperature that no float32 holds exactly.
OPTIONS = [{}, {"temperature": 0.3}, {"softcap": 5.0}, {"temperature": 1.7, "softcap": 30.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_reference(backend, shape, dtype, options):
    logits, ids = case(shape, dtype)
    actual = both(logits, ids, **options)
    assert {x.dtype for x in actual} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_within_bound(actual, logits, ids, **options)
    contract.assert_bitwise(rf.token_logprobs(logits, ids, **options), actual[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatureper_row(backend, dtype):
    logits, ids = case((3, 4, 70), dtype)
    temperature = per_row(logits.shape)
    actual = both(logits, ids, temperature=temperature)
    assert_within_bound(actual, logits, ids, temperature=temperature)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_instruction_set_agrees(isa, options):
    for dtype in DTYPES:
        logits, ids = case((5, 2131), dtype)
        assert_within_bound(both(logits, ids, **options), logits, ids, **options)
        assert_gradient(logits, ids, **options)
    assert _core.isa() == isa


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_float32_error_is_no_larger_than_torch(backend, scale):
    logits, ids = case((64, 5000), scale=scale)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, None])[:, 0]
    theirs = torch.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]
    assert (rf.token_logprobs(logits, ids) - exact).abs().max() <= (theirs - exact).abs().max()


def test_confident_row_keeps_relative_accuracy(backend):
    logits = torch.zeros(1, 10)
    logits[0, 4] = 30.0
    logp = rf.token_logprobs(logits, torch.tensor([4]))
    expected = -torch.log1p(9 * torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    # Nine equal exponentials, each within 2 ulp, and one rounding of the result.
    torch.testing.assert_close(logp[0].double(), expected, rtol=4 * contract.EPS[torch.float32], atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_equals_reference(backend, dtype, options):
    assert_gradient(*case((3, 70), dtype), **options)
    assert_gradient(*case((1, 4101), dtype), **options)


@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": torch.tensor([0.5, 1.0, 2.0])}], ids=str)
def test_gradcheck(backend, options):
    logits, ids = case((3, 5), scale=1.0)
    contract.assert_gradcheck(lambda x: both(x, ids, **options), logits)
    contract.assert_gradcheck(lambda x: rf.token_logprobs(x, ids, **options), logits)
    contract.assert_gradcheck(lambda x: both(x, ids, **options)[1], logits)


def test_masked_rows_influence_nothing(backend):
    logits, ids = case((4, 33))
    mask = torch.tensor([True, False, True, False])
    clean = both(logits, ids)
    logits[1], logits[3], ids[~mask] = float("nan"), INF, -100
    for given in (mask, mask.long()):
        x = logits.clone().requires_grad_()
        logp, entropy = both(x, ids, mask=given)
        (slope,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
        for actual, expected in zip((logp, entropy), clean, strict=True):
            contract.assert_bitwise(actual[mask], expected[mask])
            assert bool((actual[~mask] == 0).all())
        assert bool((slope[~mask] == 0).all())
        assert bool(slope[mask].isfinite().all())
    nothing = both(logits, ids, mask=torch.zeros(4, dtype=torch.bool))
    assert bool((torch.stack(nothing) == 0).all())


def test_masked_row_ignores_its_temperature(backend):
    logits, ids = case((2, 9))
    temperature = torch.tensor([1.0, 0.0])
    logp = rf.token_logprobs(logits, ids, temperature=temperature, mask=torch.tensor([True, False]))
    contract.assert_bitwise(logp, torch.stack([rf.token_logprobs(logits[0], ids[0]), torch.zeros(())]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forbidden_tokens(backend, dtype, options):
    logits, ids = case((4, 40), dtype)
    logits[:, ::3] = -INF
    ids[:] = 1
    assert_gradient(logits, ids, **options)
    logits[3] = -INF  # everything
    ids[2] = 3  # the chosen token
    x = logits.clone().requires_grad_()
    logp, entropy = both(x, ids, **options)
    expected = contract.reference(both, logits, ids, **options)
    for actual, e in zip((logp, entropy), expected, strict=True):
        torch.testing.assert_close(actual.double(), e, rtol=1e-5, atol=1e-5)
    assert logp.tolist()[2:] == [-INF, -INF]
    assert float(entropy[3]) == 0.0
    (slope,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
    assert bool((slope[:, ::3] == 0).all())
    assert bool((slope[3] == 0).all())
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(backend, dtype, value):
    logits, ids = case((4, 33), dtype)
    clean = both(logits, ids)
    logits[2, 5] = value
    x = logits.clone().requires_grad_()
    dirty = both(x, ids)
    keep = [0, 1, 3]
    for d, c in zip(dirty, clean, strict=True):
        assert d.isnan().tolist() == [False, False, True, False]
        contract.assert_bitwise(d[keep], c[keep])
    (slope,) = torch.autograd.grad(dirty[0].sum(), x)
    assert bool(slope[keep].isfinite().all())
    assert bool(slope[2].isnan().any())


def test_nan_among_forbidden_tokens(backend):
    logits = torch.full((1, 20), -INF)
    logits[0, 7] = float("nan")
    assert torch.stack(both(logits, torch.tensor([3]))).isnan().all()


def test_row_does_not_depend_on_the_batch(backend):
    for logits, ids in (case((50, 300)), case((3, 4200))):
        x = logits.clone().requires_grad_()
        whole = both(x, ids)
        (slope,) = torch.autograd.grad(sum(y.sum() for y in whole), x)
        for i in (0, len(ids) - 1):
            row = logits[i : i + 1].clone().requires_grad_()
            one = both(row, ids[i : i + 1])
            for a, e in zip(one, whole, strict=True):
                contract.assert_bitwise(a, e[i : i + 1])
            contract.assert_bitwise(torch.autograd.grad(sum(y.sum() for y in one), row)[0], slope[i : i + 1])


# Many rows in units; few long rows, whose chunks run in parallel below twice as many threads.
@pytest.mark.parametrize("shape", [(1000, 129), (3, 70001)], ids=str)
def test_threads_agree(shape):
    logits, ids = case(shape)

    def forward_and_backward():
        x = logits.clone().requires_grad_()
        logp, entropy = both(x, ids, temperature=0.7)
        (slope,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
        return torch.cat([logp.detach(), entropy.detach(), slope.flatten()])

    contract.assert_threads_agree(forward_and_backward)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "shifted": lambda x: x[:, :-1],
    "sliced": lambda x: x[::2, 3:, 5:],
    "strided vocabulary": lambda x: x[..., ::2],
    "column": lambda x: x.mT,
    "expanded": lambda x: x[:1].expand(6, *x.shape[1:]),
    "expanded vocabulary": lambda x: x[..., :1].expand(x.shape),
    "four axes": lambda x: x.reshape(2, 3, 10, 40).transpose(0, 2),
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_any_strides(backend, view):
    base = torch.randn(6, 10, 40)
    logits = view(base)
    ids = torch.randint(logits.shape[-1], logits.shape[:-1])
    expected = both(logits.contiguous(), ids)
    for a, e in zip(both(logits, ids), expected, strict=True):
        contract.assert_bitwise(a, e)
    leaf, copy = base.clone().requires_grad_(), logits.contiguous().requires_grad_()
    (slope,) = torch.autograd.grad(rf.token_logprobs(view(leaf), ids).sum(), leaf)
    (whole,) = torch.autograd.grad(rf.token_logprobs(copy, ids).sum(), copy)
    torch.testing.assert_close(slope.sum(), whole.sum(), rtol=0, atol=1e-3)  # both near 0 by construction
    pulled = torch.autograd.grad(view(leaf), leaf, whole)[0]
    contract.assert_bitwise(slope, pulled)
    other = ids.to(torch.int32).mT.contiguous().mT if ids.dim() > 1 else ids
    contract.assert_bitwise(rf.token_logprobs(logits, other), expected[0])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 4), (0, 0), (7,), (2, 1)], ids=str)
def test_empty_and_single(backend, shape):
    logits = torch.randn(shape).requires_grad_()
    ids = torch.zeros(shape[:-1], dtype=torch.long)
    logp, entropy = both(logits, ids)
    assert logp.shape == entropy.shape == shape[:-1]
    if shape[-1] == 1:
        assert bool((logp == 0).all() and (entropy == 0).all())
    (logp.sum() + entropy.sum()).backward()
    assert logits.grad.shape == shape


def test_compiles(backend):
    logits, ids = case((4, 9))
    mask = torch.tensor([True, True, False, True])
    contract.assert_compiles(lambda x: rf.token_logprobs(x, ids, mask=mask), logits.requires_grad_())
    contract.assert_compiles(lambda x: torch.cat(both(x, ids, softcap=3.0)), logits)


def test_opcheck():
    logits, ids = case((4, 9))
    mask, rows = torch.tensor([True, True, False, True]), per_row((4, 9))
    for arguments in ((None, None, None, 0.7, 0.0, False), (mask, rows, rows - 1, 1.0, 5.0, True)):
        contract.assert_opcheck("token_logprobs", logits.clone().requires_grad_(), ids, *arguments, False)
        _, entropy, stats = torch.ops.react_fast.token_logprobs(logits, ids, *arguments, False)
        upstream = torch.randn(4)
        d_entropy = upstream if arguments[-1] else None
        contract.assert_opcheck(
            "token_logprobs_backward", logits, ids, *arguments[:-1], stats, entropy, upstream, d_entropy
        )


def test_inference_mode_meta_and_autocast(backend):
    logits, ids = case((3, 8))
    plain = rf.token_logprobs(logits, ids)
    with torch.inference_mode():
        contract.assert_bitwise(rf.token_logprobs(logits.clone(), ids), plain)
    with torch.autocast("cpu", torch.bfloat16):
        contract.assert_bitwise(rf.token_logprobs(logits, ids), plain)
    logp, entropy = both(logits.to("meta").bfloat16(), ids.to("meta"))
    assert (logp.shape, logp.dtype, logp.device.type) == ((3,), torch.float32, "meta")
    assert entropy.shape == (3,)


X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
BAD = [
    (torch.zeros(()), Y, {}, ValueError, r"logits must be \[..., V\]"),
    (X.int(), Y, {}, TypeError, "logits must be float32, bfloat16"),
    ([[1.0]], Y, {}, TypeError, "logits must be a torch.Tensor, got list"),
    (X, Y[:1], {}, ValueError, r"token_ids must be \[2\] like logits\[..., 0\], got \[1\]"),
    (X, Y[None], {}, ValueError, r"token_ids must be \[2, K\] like logits\[..., 0\], got \[1, 2\]"),
    (X, torch.tensor([[0, 1], [2, 3]]), {}, IndexError, r"got 3 at token_ids\[1, 1\]"),
    (X, Y.float(), {}, TypeError, "token_ids must be int64 or int32, got float32"),
    (X, Y.to("meta"), {}, ValueError, "token_ids must be on cpu like logits, got meta"),
    (X, Y + 3, {}, IndexError, r"token_ids must be in \[0, 3\) where mask is true, got 3"),
    (X, torch.tensor([0, -100]), {}, IndexError, r"got -100 at token_ids\[1\]"),
    (torch.zeros(2, 0), Y, {}, IndexError, r"token_ids must be in \[0, 0\)"),
    (X, Y, {"mask": torch.ones(2, 3).bool()}, ValueError, r"mask must be \[2\] like logits"),
    (X, Y, {"mask": torch.ones(2)}, TypeError, "mask must be bool or an integer 0/1 mask"),
    (X, Y, {"mask": Y.to("meta")}, ValueError, r"mask must be on cpu like logits\[..., 0\], got meta"),
    (X, Y, {"temperature": 0}, ValueError, r"temperature must be in \[1e-30, 1e\+30\], got 0"),
    (X, Y, {"temperature": float("nan")}, ValueError, "temperature must be in"),
    (X, Y, {"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    (X, Y, {"temperature": torch.ones(3)}, ValueError, r"temperature must be \[2\] like logits"),
    (X, Y, {"temperature": torch.tensor([1.0, 0.0])}, ValueError, r"got 0 at temperature\[1\]"),
    (X, Y, {"temperature": torch.ones(2, dtype=torch.long)}, TypeError, "temperature must be float32"),
    (X, Y, {"temperature": torch.ones(2, requires_grad=True)}, ValueError, "must not require a gradient"),
    (X, Y, {"logit_floor": 1.0}, TypeError, "logit_floor must be a torch.Tensor, got float"),
    (X, Y, {"logit_floor": Y}, TypeError, "logit_floor must be float32"),
    (X, Y, {"logit_floor": X}, ValueError, r"logit_floor must be \[2\] like logits\[..., 0\], got \[2, 3\]"),
    (X, Y, {"logit_floor": torch.zeros(2, device="meta")}, ValueError, "logit_floor must be on cpu"),
    (X, Y, {"logit_floor": torch.tensor([0.0, float("nan")])}, ValueError, r"no NaN .* at logit_floor\[1\]"),
    (X, Y, {"logit_floor": torch.ones(2, requires_grad=True)}, ValueError, "logit_floor must not require"),
    (X, Y, {"softcap": 0}, ValueError, r"softcap must be in \[1e-30, 1e\+30\], got 0"),
    (X, Y, {"softcap": -1.0}, ValueError, "softcap must be in"),
]


@pytest.mark.parametrize(("logits", "ids", "options", "error", "text"), BAD, ids=[b[4] for b in BAD])
def test_bad_input_is_refused(logits, ids, options, error, text):
    with pytest.raises(error, match=text):
        rf.token_logprobs(logits, ids, **options)


def test_kernel_gives_nan_where_it_may_not_look(monkeypatch):
    """Checking values would wait for a GPU: that row alone is NaN, unless REACT_FAST_CHECKED asks to look."""
    logits, ids = case((4, 9))
    clean = rf.token_logprobs(logits, ids)
    keep, mask = [0, 2, 3], torch.tensor([True, False, True, True])
    with rf.use_backend("triton"):
        kept = rf.token_logprobs(logits, ids)[keep]
        for wrong in (9, -1, -100, 2**40):
            ids[1] = wrong
            monkeypatch.delenv("REACT_FAST_CHECKED", raising=False)
            found = rf.token_logprobs(logits, ids)
            assert found.isnan().tolist() == [False, True, False, False]
            contract.assert_bitwise(found[keep], kept)
            monkeypatch.setenv("REACT_FAST_CHECKED", "1")
            with pytest.raises(IndexError, match=rf"token_ids must be in \[0, 9\) .* got {wrong} at"):
                rf.token_logprobs(logits, ids)
            contract.assert_bitwise(rf.token_logprobs(logits, ids, mask=mask)[keep], kept)
        ids[1] = 0
        temperature = torch.tensor([1.0, 0.0, 1.0, 1.0])
        with pytest.raises(ValueError, match=r"got 0 at temperature\[1\]"):
            rf.token_logprobs(logits, ids, temperature=temperature)
        monkeypatch.delenv("REACT_FAST_CHECKED")
        found = rf.token_logprobs(logits, ids, temperature=temperature)
        assert found.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(kept, clean[keep], rtol=1e-6, atol=1e-6)  # both within a few ulp of the row


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize("wrong", [9, -1, -100, 2**40])
def test_id_out_of_range_is_refused_where_looking_costs_nothing(chosen, wrong):
    logits, ids = case((2, 2, 9))
    ids[1, 0] = wrong
    with rf.use_backend(chosen):
        with pytest.raises(
            IndexError, match=rf"token_ids must be in \[0, 9\) where mask is true, got {wrong}"
        ):
            rf.token_logprobs(logits, ids)
        mask = torch.ones(2, 2, dtype=torch.bool)
        mask[1, 0] = False
        assert bool(rf.token_logprobs(logits, ids, mask=mask).isfinite().all())
