"""n-step returns, Q targets, path consistency: gradients and the op contract."""

import numpy as np
import pytest
import torch

import react_fast as rf
from react_fast.kernels import n_step as kernels

from . import contract
from . import q_cases as cases
from .q_cases import DTYPES, GAMMA

# ---- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 20])
def test_gradcheck(n):
    batch = cases.batch((2, 9), torch.float64)
    steps = [k for k in batch if k in ("rewards", "values", "last_values", "bootstrap_values")]
    contract.assert_gradcheck(
        lambda *x: cases.returns({**batch, **dict(zip(steps, x, strict=True))}, n), *[batch[k] for k in steps]
    )
    steps += ["logprobs", "ref_logprobs"]
    contract.assert_gradcheck(
        lambda *x: cases.residual({**batch, **dict(zip(steps, x, strict=True))}, n),
        *[batch[k] for k in steps],
    )


@pytest.mark.parametrize(
    ("dtype", "n"), [*((dtype, 4) for dtype in DTYPES), (torch.float64, 1), (torch.float64, 30)]
)
def test_gradients_equal_the_reference(backend, dtype, n):
    """In the dtype of the inputs, NaN where masked."""
    batch, upstream = cases.batch((3, 21), dtype), torch.randn(3, 21)
    names = [k for k, x in batch.items() if x.is_floating_point()]
    for k in ("rewards", "values"):
        batch[k] = batch[k].masked_fill(~batch["mask"], float("nan"))

    def gradients(function, given):
        leaves = {k: given[k].clone().requires_grad_() for k in names}
        found = function(given | leaves, n)
        return torch.autograd.grad(found, list(leaves.values()), upstream.to(found.dtype), allow_unused=True)

    for function in (cases.returns, cases.residual):
        found = gradients(function, batch)
        with rf.use_backend("reference"):
            expected = gradients(function, cases.wide(batch))
        for a, e in zip(found, expected, strict=True):
            if e is None:  # in no window, or no input of this function
                assert a is None or not bool(a.any())
                continue
            assert a.dtype == dtype
            # At most 30 terms of size below 4 that mostly cancel, and one rounding to the inputs' dtype.
            assert float((a.double() - e.nan_to_num()).abs().max()) <= 60 * contract.EPS[dtype]
        assert bool((found[0][~batch["mask"]] == 0).all())


def test_targets_are_constants(backend):
    batch = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in cases.batch((2, 9)).items()}
    for chosen in (backend, "reference"):
        with rf.use_backend(chosen):
            assert not cases.targets(batch, 3).requires_grad


# ---- the rest of the contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)], ids=str)
def test_empty_and_single(backend, shape):
    for n in (1, 4):
        for x in cases.every(cases.batch(shape), n):
            assert x.shape == shape
    nothing = torch.empty(0, requires_grad=True)
    for edges in ([0], [0, 0, 0]):
        found = rf.n_step_returns(nothing, nothing, gamma=GAMMA, n=3, cu_seqlens=torch.tensor(edges))
        assert found.shape == (0,)
        found.sum().backward()
        assert rf.q_targets(nothing, nothing, gamma=GAMMA, cu_seqlens=torch.tensor(edges)).shape == (0,)


@pytest.mark.parametrize("n", [1, 7])
def test_any_strides_and_threads(backend, n):
    batch = cases.batch((7, 30))
    views = {k: x.T.contiguous().T if x.dim() == 2 else x for k, x in batch.items()}
    for s, d in zip(cases.every(views, n), cases.every(batch, n), strict=True):
        contract.assert_bitwise(s, d)
    if backend == "cpu":
        large = cases.batch((300, 515))
        contract.assert_threads_agree(lambda: torch.stack(cases.every(large, n)))


def test_long_rows_keep_their_precision():
    """gamma 1 over windows of 1,000 and of all 131,072 steps: float64 sums, one rounding."""
    r, v = torch.randn(2, 131072) + 1, torch.randn(2, 131072)
    for n in (1000, 200000):
        found = rf.n_step_returns(r, v, gamma=1.0, n=n).double()
        sums = r.double().flip(1).cumsum(1).flip(1)
        tail = torch.nn.functional.pad(sums, (0, n))[:, n : n + 131072]
        expected = sums - tail + torch.nn.functional.pad(v.double(), (0, n))[:, n : n + 131072]
        assert float(((found - expected) / expected.abs().clamp_min(1)).abs().max()) <= 2e-7


def test_numpy_in_numpy_out():
    batch = cases.without(cases.batch((3, 10)), "logprobs", "ref_logprobs")
    arrays = {k: x.numpy() for k, x in batch.items()}
    found = rf.n_step_returns(arrays.pop("rewards"), **arrays, gamma=GAMMA, n=3)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, cases.returns(batch, 3).numpy())


def test_compiles_opcheck_meta_autocast_and_inference(backend):
    batch = cases.batch((2, 9))
    flags = [batch[k] for k in ("terminated", "truncated", "mask")]
    floats = [batch[k] for k in ("rewards", "values", "last_values", "bootstrap_values")]
    leaves = [x.clone().requires_grad_() for x in floats]

    def op(r, v, last, boot):
        ends = {"terminated": flags[0], "truncated": flags[1], "bootstrap_values": boot, "mask": flags[2]}
        return rf.n_step_returns(r, v, last_values=last, **ends, gamma=GAMMA, n=3)

    contract.assert_compiles(op, *leaves)
    contract.assert_compiles(lambda r, v: rf.q_targets(r, v, gamma=GAMMA, mask=flags[2]), *floats[:2])
    contract.assert_compiles(
        lambda v, r, p: rf.path_consistency(v, r, p, gamma=GAMMA, alpha=0.1, mask=flags[2]),
        *[torch.randn(2, 9, requires_grad=True) for _ in range(3)],
    )
    contract.assert_opcheck("n_step_returns", *leaves, *flags, None, GAMMA, 3, False)
    packed = [x.flatten() for x in flags], torch.tensor([0, 4, 18])
    contract.assert_opcheck(
        "n_step_returns",
        *[x.flatten() for x in leaves[:2]],
        leaves[2],
        None,
        *packed[0],
        packed[1],
        1.0,
        1,
        True,
    )
    meta = [x.to("meta").bfloat16() for x in floats]
    assert rf.n_step_returns(*meta[:2], gamma=GAMMA, n=2, last_values=meta[2]).shape == (2, 9)
    expected = op(*floats)
    with torch.autocast("cpu", torch.bfloat16):
        contract.assert_bitwise(op(*floats), expected)
    with torch.inference_mode():
        contract.assert_bitwise(op(*floats), expected)


def test_steps_in_no_row_lead_nowhere():
    """Bounds on a GPU are not looked at; the kernel must stay inside its memory, and the row is right."""
    rewards, values = torch.randn(2, 5).unbind()
    args = (None, None, None, None, None)
    alone = kernels.n_step(rewards[:3], values[:3], *args, torch.tensor([0, 3]), GAMMA, 2, False)
    for _ in range(3):
        rubbish = torch.full((5,), 1 << 40)  # what fresh memory may hold
        del rubbish
        found = kernels.n_step(rewards, values, *args, torch.tensor([0, 3]), GAMMA, 2, False)
        contract.assert_bitwise(found[:3], alone)


def test_bad_packing_is_refused(backend):
    x = torch.zeros(5)
    # A GPU would have to be waited for.
    for edges in ([0, 3], [0, 4, 3, 5]) if contract.DEVICE == "cpu" else ():
        with pytest.raises(ValueError, match=r"^cu_seqlens must rise from 0 to 5"):
            rf.n_step_returns(x, x, gamma=1.0, n=2, cu_seqlens=torch.tensor(edges))
    with pytest.raises(ValueError, match=r"^bootstrap_values must be given with truncated, got None"):
        rf.n_step_returns(*[torch.zeros(1, 3)] * 2, gamma=1.0, n=2, truncated=torch.ones(1, 3).bool())
    with pytest.raises(TypeError, match=r"^n must be an int, got float"):
        rf.n_step_returns(*[torch.zeros(1, 3)] * 2, gamma=1.0, n=2.0)
    with pytest.raises(ValueError, match=r"^span must be at least 1, got 0"):
        rf.path_consistency(*[torch.zeros(1, 3)] * 3, gamma=1.0, alpha=0.1, span=0)
