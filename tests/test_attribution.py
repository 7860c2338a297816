"""Attribution: equals the float64 reference, exact gradients, and the contract of every op."""

import pytest
import torch

import react_fast as rf
from react_fast import _core

from . import contract

REDUCTIONS = ("dot", "abs", "l2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One element; below, at and above a vector; a ragged multiple; above the Triton block of 2048.
SHAPES = [(1, 1), (3, 7), (5, 16), (33, 100), (2, 3, 64), (3, 2051)]


def _pair(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_reference(backend, shape, dtype, reduction):
    grad, activation = _pair(shape, dtype)
    scores = rf.attribution_scores(grad, activation, reduction=reduction)
    expected = contract.reference(rf.attribution_scores, grad, activation, reduction=reduction)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # A sum of D products carries at most a few roundings of sum |p| when it runs in parallel partial sums.
    bound = (grad.double() * activation.double()).abs().sum(-1) * 8 * contract.EPS[scores.dtype]
    assert bool(((scores.double() - expected).abs() <= bound + 1e-300).all())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_instruction_set_agrees(isa, reduction):
    grad, activation = _pair((37, 131))
    scores = rf.attribution_scores(grad, activation, reduction=reduction)
    expected = contract.reference(rf.attribution_scores, grad, activation, reduction=reduction)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert _core.isa() == isa


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(backend, reduction):
    grad, activation = _pair((2, 3, 5))
    contract.assert_gradcheck(lambda g, a: rf.attribution_scores(g, a, reduction=reduction), grad, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_equals_reference(backend, dtype, reduction):
    grad, activation = (x.requires_grad_() for x in _pair((4, 70), dtype))
    upstream = torch.randn(4).to(torch.float64 if dtype == torch.float64 else torch.float32)
    actual = torch.autograd.grad(
        rf.attribution_scores(grad, activation, reduction=reduction), (grad, activation), upstream
    )
    with rf.use_backend("reference"):
        expected = torch.autograd.grad(
            rf.attribution_scores(grad, activation, reduction=reduction), (grad, activation), upstream
        )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        # Both round one product chain of at most four factors to the input's dtype.
        torch.testing.assert_close(a.double(), e.double(), rtol=4 * contract.EPS[dtype], atol=1e-6)


def test_zero_rows_have_zero_slope(backend):
    grad = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    for reduction in ("abs", "l2"):
        (slope,) = torch.autograd.grad(
            rf.attribution_scores(grad, torch.ones_like(grad), reduction=reduction).sum(), grad
        )
        assert bool((slope == 0).all())


def test_nan_stays_in_its_row(backend):
    grad, activation = _pair((4, 33))
    clean = rf.attribution_scores(grad, activation)
    grad[2, 5] = float("nan")
    dirty = rf.attribution_scores(grad, activation)
    assert dirty.isnan().tolist() == [False, False, True, False]
    contract.assert_bitwise(dirty[[0, 1, 3]], clean[[0, 1, 3]])


def test_row_does_not_depend_on_the_batch(backend):
    grad, activation = _pair((50, 300))
    whole = rf.attribution_scores(grad, activation)
    for i in (0, 17, 49):
        contract.assert_bitwise(
            rf.attribution_scores(grad[i : i + 1], activation[i : i + 1]), whole[i : i + 1]
        )


def test_threads_agree():
    grad, activation = _pair((1000, 129))
    contract.assert_threads_agree(lambda: rf.attribution_scores(grad, activation))


def test_any_strides(backend):
    grad, activation = _pair((6, 10, 40))
    for view in (lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[::2, 3:], lambda x: x.mT):
        g, a = view(grad), view(activation)
        expected = rf.attribution_scores(g.contiguous(), a.contiguous())
        contract.assert_bitwise(rf.attribution_scores(g, a), expected)
    row = torch.randn(1, 40)
    contract.assert_bitwise(
        rf.attribution_scores(row.expand(6, 40), activation[:, 0]),
        rf.attribution_scores(row.repeat(6, 1), activation[:, 0]),
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (7,)], ids=str)
def test_empty_and_single(backend, shape):
    grad, activation = (x.requires_grad_() for x in _pair(shape))
    scores = rf.attribution_scores(grad, activation)
    torch.testing.assert_close(scores, (grad * activation).sum(-1), rtol=1e-5, atol=1e-6)
    scores.sum().backward()
    assert grad.grad.shape == grad.shape


def test_compiles(backend):
    grad, activation = (x.requires_grad_() for x in _pair((4, 9)))
    contract.assert_compiles(lambda g, a: rf.attribution_scores(g, a), grad, activation)


def test_opcheck():
    grad, activation = (x.requires_grad_() for x in _pair((4, 9)))
    contract.assert_opcheck("attribution_scores", grad, activation, 0)
    scores = rf.attribution_scores(grad, activation).detach()
    contract.assert_opcheck(
        "attribution_scores_backward", grad.detach(), activation.detach(), scores, scores, 0, True, True
    )


def test_inference_mode_and_meta(backend):
    grad, activation = _pair((3, 8))
    with torch.inference_mode():
        contract.assert_bitwise(
            rf.attribution_scores(grad, activation), rf.attribution_scores(grad.clone(), activation)
        )
    meta = rf.attribution_scores(grad.to("meta").bfloat16(), activation.to("meta").bfloat16())
    assert (meta.shape, meta.dtype) == ((3,), torch.float32)


@pytest.mark.parametrize(
    ("grad", "activation", "options", "error", "text"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), {}, ValueError, r"activation must be \[2, 3\] like grad"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), {}, TypeError, "activation must be float32 like grad"),
        (torch.ones(2, 3).int(), torch.ones(2, 3).int(), {}, TypeError, "grad must be float32, bfloat16"),
        (torch.ones(()), torch.ones(()), {}, ValueError, r"grad must be \[..., D\], got a scalar"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3, device="meta"),
            {},
            ValueError,
            "activation must be on cpu like grad",
        ),
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            {"reduction": "max"},
            ValueError,
            "reduction must be one of 'dot'",
        ),
        (torch.ones(2, 3), [[1.0]], {}, TypeError, "activation must be a torch.Tensor, got list"),
    ],
)
def test_bad_input_is_refused(grad, activation, options, error, text):
    with pytest.raises(error, match=text):
        rf.attribution_scores(grad, activation, **options)
