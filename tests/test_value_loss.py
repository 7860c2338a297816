"""value_loss: equals the float64 reference and the printed equation, and the contract of every op."""

import pytest
import torch

import react_fast as rf
from react_fast import _core

from . import contract
from .policy_cases import DTYPES


def _case(shape=(4, 33), dtype=torch.float32):
    values, old, returns = (torch.randn(shape).to(dtype) for _ in range(3))
    return values, old, returns, torch.rand(shape) < 0.7


def _gradient(values, old, returns, mask, **options):
    leaf = values.detach().clone().requires_grad_()
    loss = rf.value_loss(leaf, old, returns, mask, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 33), (2, 1300), (50,)], ids=str)
def test_equals_the_equation_in_float64(backend, shape, dtype, clip):
    values, old, returns, mask = _case(shape, dtype)
    v, o, target = values.double().requires_grad_(), old.double(), returns.double()
    error = (v - target) ** 2
    if clip is not None:
        error = torch.where(
            (v - o).abs() <= clip, error, torch.maximum(error, (o + clip * (v - o).sign() - target) ** 2)
        )
    expected = 0.5 * error[mask].sum() / max(int(mask.sum()), 1)
    (slope,) = torch.autograd.grad(expected, v)
    loss, gradient = _gradient(values, old, returns, mask, clip=clip)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Each square has a few roundings; at most 256 float additions a lane before the sum turns into float64.
    size = v.detach().abs() + o.abs() + target.abs() + 1
    bound = 128 * contract.EPS[loss.dtype] * (size**2)[mask].sum() / max(int(mask.sum()), 1)
    assert abs(loss.double() - expected) <= bound
    assert gradient.dtype == dtype
    small = contract.EPS[dtype] * slope.abs() + 4 * contract.EPS[loss.dtype] * size / max(int(mask.sum()), 1)
    assert bool(((gradient.double() - slope).abs() <= small + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("clip", [None, 0.3])
def test_gradcheck_and_reference(backend, clip):
    values, old, returns, mask = _case((2, 6), torch.float64)
    contract.assert_gradcheck(lambda v: rf.value_loss(v, old, returns, mask, clip=clip), values)
    actual = _gradient(values, old, returns, mask, clip=clip, denominator=5.0)
    with rf.use_backend("reference"):
        expected = _gradient(values, old, returns, mask, clip=clip, denominator=5.0)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-14)


def test_masked_elements_influence_nothing(backend):
    values, old, returns, mask = _case()
    clean = _gradient(values, old, returns, mask, clip=0.2)
    for poison in (float("nan"), float("inf"), float("-inf")):
        dirty = [torch.where(mask, x, poison) for x in (values, old, returns)]
        for a, e in zip(_gradient(*dirty, mask, clip=0.2), clean, strict=True):
            contract.assert_bitwise(a, e)
    assert bool((clean[1][~mask] == 0).all())


@pytest.mark.parametrize("shape", [(3, 40), (0, 5), (3, 0), (0,)], ids=str)
def test_nothing_counts(backend, shape):
    values, old, returns, mask = _case(shape)
    loss, gradient = _gradient(values * float("nan"), old, returns, mask & False, clip=0.2)
    assert loss.item() == 0
    assert gradient.shape == shape
    assert bool((gradient == 0).all())


def test_denominator_strides_and_integer_mask(backend):
    values, old, returns, mask = _case((6, 40))
    whole = _gradient(values, old, returns, mask)
    count = int(mask.sum())
    halves = [_gradient(*(x[rows] for x in (values, old, returns, mask)), denominator=torch.tensor(count))
              for rows in (slice(0, 2), slice(2, 6))]  # fmt: skip
    contract.assert_bitwise(torch.cat([h[1] for h in halves]), whole[1])
    torch.testing.assert_close(
        halves[0][0] + halves[1][0], whole[0], rtol=1e-6, atol=0
    )  # two sums, rounded once more
    turned = _gradient(values.t(), old.t(), returns.t(), mask.t().int())
    contract.assert_bitwise(turned[1].t(), whole[1])


def test_threads_and_instruction_sets_agree(isa):
    values, old, returns, mask = _case((300, 701))
    with rf.use_backend("cpu"):
        for i in range(2):
            contract.assert_threads_agree(lambda i=i: _gradient(values, old, returns, mask, clip=0.2)[i])
        actual = rf.value_loss(values, old, returns, mask, clip=0.2)
    expected = contract.reference(rf.value_loss, values, old, returns, mask, clip=0.2)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    assert _core.isa() == isa


def test_compiles_opcheck_inference_and_meta(backend):
    values, old, returns, mask = _case((3, 9))
    contract.assert_compiles(
        lambda v: rf.value_loss(v, old, returns, mask, clip=0.2), values.requires_grad_()
    )
    contract.assert_opcheck("value_loss", values, old, returns, mask, None, 0.0, 0.2, True)
    with torch.inference_mode():
        contract.assert_bitwise(
            rf.value_loss(values, old, returns, mask), rf.value_loss(values.detach(), None, returns, mask)
        )
    meta = rf.value_loss(*(x.to("meta") for x in (values, old, returns, mask)))
    assert (meta.shape, meta.dtype) == ((), torch.float32)


ONES, MASK = torch.ones(2, 3), torch.ones(2, 3).bool()


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor, got list"),
        ({"values": ONES.int()}, TypeError, "values must be float32, bfloat16"),
        ({"returns": torch.ones(2, 4)}, ValueError, r"returns must be \[2, 3\] like values, got \[2, 4\]"),
        ({"returns": ONES.double()}, TypeError, "returns must be float32 like values, got float64"),
        ({"old_values": ONES.to("meta")}, ValueError, "old_values must be on cpu like values, got meta"),
        ({"mask": MASK[:1]}, ValueError, r"mask must be \[2, 3\] like values, got \[1, 3\]"),
        ({"mask": ONES}, TypeError, "mask must be bool or an integer 0/1 mask"),
        ({"clip": 0.2}, ValueError, "old_values must be given when clip is, got None"),
        ({"clip": 0.0, "old_values": ONES}, ValueError, r"clip must be in \(0, inf\], got 0"),
        ({"clip": -1.0, "old_values": ONES}, ValueError, "clip must be in"),
        ({"denominator": -1.0}, ValueError, "denominator must be in"),
        ({"denominator": torch.tensor(0.0)}, ValueError, "denominator must be in"),
    ],
)
def test_bad_input_is_refused(chosen, change, error, text):
    given = {"values": ONES, "old_values": None, "returns": ONES, "mask": MASK, **change}
    with rf.use_backend(chosen), pytest.raises(error, match=text):
        rf.value_loss(**given)
