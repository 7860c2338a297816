"""segment_sum: equals the float64 reference, exact gradient, and the contract of every op."""

import numpy as np
import pytest
import torch

import react_fast as rf

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Empty at both ends and inside; single; below, at and above eight sums; above the Triton block of 256.
LENGTHS = (0, 1, 7, 0, 0, 8, 9, 40, 300, 2, 0)


def _edges(lengths=LENGTHS, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64_reference(backend, dtype, integer):
    scores, edges = torch.randn(sum(LENGTHS)).to(dtype), _edges(dtype=integer)
    sums = rf.segment_sum(scores, edges)
    expected = contract.reference(rf.segment_sum, scores, edges)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    sizes = contract.reference(rf.segment_sum, scores.abs(), edges)
    # float64 sums, in another order for float64 scores; one rounding of the result.
    assert bool(
        ((sums.double() - expected).abs() <= sizes * (contract.EPS[sums.dtype] + 300 * 2.0**-52)).all()
    )


def test_every_instruction_set_agrees(isa):
    scores, edges = torch.randn(sum(LENGTHS)), _edges()
    expected = contract.reference(rf.segment_sum, scores, edges)
    torch.testing.assert_close(rf.segment_sum(scores, edges).double(), expected, rtol=1e-6, atol=1e-6)


def test_gradcheck(backend):
    edges = _edges((2, 0, 3))
    contract.assert_gradcheck(lambda x: rf.segment_sum(x, edges), torch.randn(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_segments_own(backend, dtype):
    scores = torch.randn(sum(LENGTHS)).to(dtype).requires_grad_()
    upstream = torch.randn(len(LENGTHS)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    (slope,) = torch.autograd.grad(rf.segment_sum(scores, _edges()), scores, upstream)
    contract.assert_bitwise(slope, upstream.repeat_interleave(torch.tensor(LENGTHS)).to(dtype))


def test_parts_sum_to_the_whole(backend):
    scores = torch.randint(-50, 50, (sum(LENGTHS),)).float()  # integers: every order gives the same sum
    sums = rf.segment_sum(scores, _edges())
    whole = rf.segment_sum(scores, torch.tensor([0, len(scores)]))
    assert float(sums.sum()) == float(whole[0]) == float(scores.sum())


def test_segment_does_not_depend_on_the_others(backend):
    scores, edges = torch.randn(sum(LENGTHS)), _edges()
    whole = rf.segment_sum(scores, edges)
    for s in (2, 7, 8):
        own = scores[edges[s] : edges[s + 1]]
        contract.assert_bitwise(rf.segment_sum(own, torch.tensor([0, len(own)])), whole[s : s + 1])
    scores[edges[5]] = float("nan")
    dirty = rf.segment_sum(scores, edges)
    assert dirty.isnan().nonzero().flatten().tolist() == [5]


def test_cancellation_keeps_its_digits(backend):
    scores = torch.tensor([1e8, 1.0, -1e8, 0.5])
    assert rf.segment_sum(scores, torch.tensor([0, 4])).tolist() == [1.5]


def test_threads_agree():
    scores, edges = torch.randn(200_000), torch.arange(0, 200_001, 25)
    contract.assert_threads_agree(lambda: rf.segment_sum(scores, edges))


def test_any_strides(backend):
    scores, edges = torch.randn(60, 3), _edges((20, 40))
    contract.assert_bitwise(rf.segment_sum(scores[:, 1], edges), rf.segment_sum(scores[:, 1].clone(), edges))
    wide = torch.stack([edges, edges], 1)[:, 0]
    contract.assert_bitwise(rf.segment_sum(scores[:, 0], wide), rf.segment_sum(scores[:, 0], edges))
    upstream = torch.randn(1).expand(2)
    leaf = scores[:, 2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(rf.segment_sum(leaf, edges), leaf, upstream)
    assert bool((slope == upstream[0]).all())


def test_empty(backend):
    nothing = torch.empty(0, requires_grad=True)
    for edges in ([0], [0, 0], [0, 0, 0]):
        sums = rf.segment_sum(nothing, torch.tensor(edges))
        assert sums.tolist() == [0.0] * (len(edges) - 1)
        sums.sum().backward()


def test_compiles_and_opcheck(backend):
    scores, edges = torch.randn(9, requires_grad=True), _edges((4, 5))
    contract.assert_compiles(lambda x: rf.segment_sum(x, edges), scores)
    contract.assert_opcheck("segment_sum", scores, edges)
    contract.assert_opcheck("segment_spread", torch.randn(2), edges, 9)
    meta = rf.segment_sum(scores.detach().to("meta").bfloat16(), edges.to("meta"))
    assert (meta.shape, meta.dtype) == ((2,), torch.float32)


def test_numpy_in_numpy_out():
    scores, edges = np.random.default_rng(0).normal(size=9), np.array([0, 4, 9])
    sums = rf.segment_sum(scores, edges)
    assert isinstance(sums, np.ndarray)
    np.testing.assert_allclose(sums, np.add.reduceat(scores, edges[:-1]), rtol=1e-14)
    grad, activation = np.ones((2, 3), np.float32), np.full((2, 3), 2.0, np.float32)
    np.testing.assert_array_equal(rf.attribution_scores(grad, activation), np.full(2, 6.0, np.float32))


@pytest.mark.parametrize(
    ("scores", "edges", "error", "text"),
    [
        (torch.ones(3), torch.tensor([0, 2]), ValueError, r"cu_segments must rise from 0 to 3 like scores"),
        (torch.ones(3), torch.tensor([1, 3]), ValueError, "cu_segments must rise from 0 to 3"),
        (torch.ones(3), torch.tensor([0, 2, 1, 3]), ValueError, "cu_segments must rise from 0 to 3"),
        (torch.ones(3), torch.tensor([0, 9, 3]), ValueError, "cu_segments must rise from 0 to 3"),
        (torch.ones(3), torch.tensor([[0, 3]]), ValueError, r"cu_segments must be \[S \+ 1\], got \[1, 2\]"),
        (torch.ones(3), torch.empty(0).long(), ValueError, r"cu_segments must be \[S \+ 1\], got \[0\]"),
        (torch.ones(3), torch.tensor([0.0, 3.0]), TypeError, "cu_segments must be int64 or int32"),
        (torch.ones(3), [0, 3], TypeError, "cu_segments must be a torch.Tensor, got list"),
        (torch.ones(3), torch.tensor([0, 3], device="meta"), ValueError, "cu_segments must be on cpu"),
        (torch.ones(3, 1), torch.tensor([0, 3]), ValueError, r"scores must be \[N\], got \[3, 1\]"),
        (torch.ones(3).int(), torch.tensor([0, 3]), TypeError, "scores must be float32"),
    ],
)
def test_bad_input_is_refused(scores, edges, error, text):
    with pytest.raises(error, match=text):
        rf.segment_sum(scores, edges)
