"""token_logprobs with several tokens a row, a floor under the logits, and what else comes with a row."""

import pytest
import torch

import react_fast as rf
from react_fast import _core

from . import contract
from .logprob_cases import (
    DTYPES,
    INF,
    assert_gradient,
    assert_within_bound,
    both,
    case,
    floor_keeping,
    per_row,
)

# No token, one, some, and more than the Triton kernels take at a time, with repeats.
TOKENS = (0, 1, 3, 20)
MASK = torch.tensor([True, False, True, True])
# Below and above the Triton block of 4096, and above its chunk and that of C++, 16384.
SHAPES = [(4, 33), (3, 4101), (2, 20000)]


def _gradient(x, ids, **options):
    logp, entropy = both(x, ids, **options)
    return torch.autograd.grad(logp.sum() + 0.5 * entropy.sum(), x)[0]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.7, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_and_floor_equal_reference(backend, shape, tokens, options):
    for dtype in DTYPES if shape == SHAPES[0] else DTYPES[:2]:
        logits, ids = case(shape, dtype, tokens=(tokens,))
        for given in (options, options | {"logit_floor": floor_keeping(logits, 5)}):
            actual = both(logits, ids, **given)
            assert (actual[0].shape, actual[1].shape) == (ids.shape, shape[:-1])
            assert_within_bound(actual, logits, ids, **given)
            if shape[-1] < 5000:
                assert_gradient(logits, ids, **given)


def test_every_instruction_set_agrees(isa):
    for dtype in DTYPES:
        logits, ids = case((5, 2131), dtype, tokens=(3,))
        for options in ({}, {"softcap": 5.0, "temperature": per_row(logits.shape)}):
            given = options | {"logit_floor": floor_keeping(logits, 40)}
            assert_within_bound(both(logits, ids, **given), logits, ids, **given)
            assert_gradient(logits, ids, **given)
    assert _core.isa() == isa


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 2.0, 1.0])], ids=["shared", "per row"])
@pytest.mark.parametrize("tokens", [(), (3,)], ids=str)
def test_gradcheck(backend, tokens, temperature, softcap):
    logits, ids = case((4, 7), scale=1.0, tokens=tokens)
    # Half a gap below a logit, so that no finite difference crosses the floor.
    floor = logits.sort(-1).values[:, 2:4].mean(-1).double()
    options = {"temperature": temperature, "softcap": softcap, "mask": MASK, "logit_floor": floor}
    contract.assert_gradcheck(lambda x: both(x, ids, **options), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_is_a_row_of_one(backend, dtype):
    logits, ids = case((3, 50), dtype)
    for column, plain in zip(both(logits, ids[:, None]), both(logits, ids), strict=True):
        contract.assert_bitwise(column.reshape(3), plain)


def test_repeated_ids_add_their_gradients(backend):
    logits, ids = case((3, 50))
    g = torch.tensor([0.5, 0.25]).expand(3, 2)  # whose sum is exact
    floor = torch.full((3,), 100.0)  # and counted once where the floor keeps nothing else
    for options in ({}, {"logit_floor": floor}):
        x, y = (logits.clone().requires_grad_() for _ in range(2))
        twice = rf.token_logprobs(x, ids[:, None].expand(3, 2), **options)
        once = rf.token_logprobs(y, ids, **options)
        contract.assert_bitwise(twice, once[:, None].expand(3, 2))
        (a,), (e,) = torch.autograd.grad(twice, x, g), torch.autograd.grad(once, y, g.sum(-1))
        contract.assert_bitwise(a, e)
    assert bool((once == 0).all())


def test_confident_tokens_keep_relative_accuracy(backend):
    """Two tokens share nearly all of p: 1 - p of each cancels, and so does what they take from each other."""
    logits = torch.zeros(1, 10)
    logits[0, 4] = 30.0
    x = logits.clone().requires_grad_()
    rf.token_logprobs(x, torch.tensor([[4, 4]])).sum().backward()
    rest = 9 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    # 2 (1 - p): the sum's exponentials within 2 ulp, its logarithm saved as float32, one rounding of the result.
    torch.testing.assert_close(
        x.grad[0, 4].double(), 2 * rest / (1 + rest), rtol=5 * contract.EPS[torch.float32], atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floor_of_minus_infinity_changes_nothing(backend, shape, dtype):
    logits, ids = case(shape, dtype, tokens=(2,))
    logits[0, ::3] = -INF
    floor = torch.full(shape[:-1], -INF)
    for options in ({}, {"softcap": 5.0}):
        for a, e in zip(
            both(logits, ids, logit_floor=floor, **options), both(logits, ids, **options), strict=True
        ):
            contract.assert_bitwise(a, e)
        x, y = (logits.clone().requires_grad_() for _ in range(2))
        contract.assert_bitwise(_gradient(x, ids, logit_floor=floor, **options), _gradient(y, ids, **options))


def test_floor_drops_exactly(backend):
    logits, ids = case((4, 3000))
    floor = floor_keeping(logits, 7)
    x = logits.clone().requires_grad_()
    slope = _gradient(x, ids, logit_floor=floor)
    kept = (logits >= floor[:, None]).scatter(-1, ids[:, None], True)
    assert bool((slope[~kept] == 0).all())
    assert bool((slope[kept] != 0).all())
    alone = both(logits, ids, logit_floor=torch.full((4,), INF))
    assert bool((torch.stack(alone) == 0).all())


@pytest.mark.parametrize("chosen", ["cpu", "triton", "reference"])
def test_floor_between_two_numbers_of_the_logits(chosen):
    """A float64 floor above a float32 logit drops it, though it rounds to it."""
    logits = torch.tensor([[0.1, 1.0, 0.0]])
    floor = logits[:, 0].double() + 1e-9
    assert floor.float() == logits[0, 0]
    with rf.use_backend(chosen):
        ids = torch.tensor([1])
        assert float(rf.token_logprobs(logits, ids, logit_floor=floor)) == 0.0
        assert float(rf.token_logprobs(logits, ids, logit_floor=floor - 1e-9)) < -0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floor_and_forbidden_tokens(backend, dtype):
    logits, ids = case((4, 40), dtype, tokens=(3,))
    logits[:, ::3] = -INF
    ids[:] = torch.tensor([1, 5, 7])
    floor = floor_keeping(logits, 4)
    assert_gradient(logits, ids, logit_floor=floor)
    ids[2, 1] = 3  # a forbidden token chosen: floor or not, it stays forbidden
    logits[3] = -INF
    x = logits.clone().requires_grad_()
    logp, entropy = both(x, ids, logit_floor=floor)
    expected = contract.reference(both, logits, ids, logit_floor=floor)
    for actual, e in zip((logp, entropy), expected, strict=True):
        torch.testing.assert_close(actual.double(), e, rtol=1e-5, atol=1e-5)
    assert logp[3].tolist() == [-INF] * 3
    assert logp[2].isinf().tolist() == [False, True, False]
    (slope,) = torch.autograd.grad(logp[:2].sum() + entropy.sum(), x)
    assert bool((slope[:, ::3] == 0).all() and (slope[3] == 0).all() and slope.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_below_the_floor_stays_in_its_row(backend, dtype):
    logits, ids = case((4, 5000), dtype)
    floor = floor_keeping(logits, 3)
    clean = both(logits, ids, logit_floor=floor)
    logits[2, 4900] = float("nan")
    for a, e in zip(both(logits, ids, logit_floor=floor), clean, strict=True):
        assert a.isnan().tolist() == [False, False, True, False]
        contract.assert_bitwise(a[[0, 1, 3]], e[[0, 1, 3]])


def test_masked_rows_influence_nothing(backend):
    logits, ids = case((4, 33), tokens=(3,))
    floor = floor_keeping(logits, 9)
    clean = both(logits, ids, logit_floor=floor)
    logits[1], ids[1], floor[1] = float("nan"), -100, float("nan")
    x = logits.clone().requires_grad_()
    found = both(x, ids, logit_floor=floor, mask=MASK)
    (slope,) = torch.autograd.grad(found[0].sum() + found[1].sum(), x)
    for a, e in zip(found, clean, strict=True):
        contract.assert_bitwise(a[MASK], e[MASK])
        assert bool((a[1] == 0).all())
    assert bool((slope[1] == 0).all() and slope.isfinite().all())


def test_floor_of_nan_where_the_kernel_may_not_look(monkeypatch):
    logits, ids = case((3, 9))
    floor = torch.tensor([-INF, float("nan"), 0.0])
    with rf.use_backend("triton"):
        monkeypatch.delenv("REACT_FAST_CHECKED", raising=False)
        found = both(logits, ids, logit_floor=floor)
        assert torch.stack(found).isnan().tolist() == [[False, True, False]] * 2
        monkeypatch.setenv("REACT_FAST_CHECKED", "1")
        with pytest.raises(ValueError, match=r"logit_floor must be no NaN .* got nan at logit_floor\[1\]"):
            both(logits, ids, logit_floor=floor)
        with pytest.raises(IndexError, match=r"got 9 at token_ids\[1, 0\]"):
            both(logits, torch.tensor([[0], [9], [0]]), mask=torch.ones(3).bool())
    with pytest.raises(ValueError, match=r"logit_floor must be no NaN"):
        both(logits, ids, logit_floor=floor)


# Rows that share a program, a chunk each, several chunks.
@pytest.mark.parametrize("shape", [(40, 300), (5, 4200), (4, 40000)], ids=str)
def test_row_does_not_depend_on_the_batch(backend, shape):
    logits, ids = case(shape, torch.bfloat16, tokens=(3,))
    floor = floor_keeping(logits, 50)

    def step(rows):
        x = logits[rows].clone().requires_grad_()
        found = both(x, ids[rows], logit_floor=floor[rows], temperature=0.7)
        return *found, torch.autograd.grad(found[0].sum() + found[1].sum(), x)[0]

    whole = step(slice(None))
    for i in (0, 2, len(ids) - 1):
        for a, e in zip(step(slice(i, i + 1)), whole, strict=True):
            contract.assert_bitwise(a, e[i : i + 1])


@pytest.mark.parametrize("shape", [(1000, 129), (3, 70001)], ids=str)
def test_threads_agree(shape):
    logits, ids = case(shape, tokens=(3,))
    floor = floor_keeping(logits, 60)

    def forward_and_backward():
        x = logits.clone().requires_grad_()
        logp, entropy = both(x, ids, logit_floor=floor)
        (slope,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
        return torch.cat([logp.detach().flatten(), entropy.detach(), slope.flatten()])

    contract.assert_threads_agree(forward_and_backward)


def test_compiles(backend):
    logits, ids = case((4, 9), tokens=(3,))
    floor = floor_keeping(logits, 4)
    logits.requires_grad_()

    def op(x):
        logp, entropy = both(x * 2, ids, logit_floor=floor, mask=MASK, inplace_backward=True)
        return torch.cat([logp.flatten(), entropy])

    contract.assert_compiles(op, logits)


def test_opcheck():
    logits, ids = case((4, 9), tokens=(3,))
    arguments = (MASK, None, floor_keeping(logits, 4), 1.0, 5.0)
    contract.assert_opcheck("token_logprobs", logits.clone().requires_grad_(), ids, *arguments, True, False)
    logp, entropy, stats = torch.ops.react_fast.token_logprobs(logits, ids, *arguments, True, False)
    upstream = (torch.randn(logp.shape), torch.randn(4))
    contract.assert_opcheck("token_logprobs_backward", logits, ids, *arguments, stats, entropy, *upstream)


def test_inference_mode_meta_and_autocast(backend):
    logits, ids = case((4, 9), tokens=(3,))
    options = {"logit_floor": floor_keeping(logits, 4), "inplace_backward": True}
    plain = both(logits, ids, **options)
    with torch.inference_mode():
        for a, e in zip(both(logits.clone(), ids, **options), plain, strict=True):
            contract.assert_bitwise(a, e)
    with torch.autocast("cpu", torch.bfloat16):
        contract.assert_bitwise(both(logits, ids, **options)[0], plain[0])
    meta = logits.to("meta").bfloat16().requires_grad_() * 1
    logp, entropy = both(
        meta, ids.to("meta"), logit_floor=torch.zeros(4, device="meta"), inplace_backward=True
    )
    assert (logp.shape, entropy.shape, logp.dtype) == ((4, 3), (4,), torch.float32)


@pytest.mark.parametrize("inplace", [False, True])
def test_batched_gradients(backend, inplace):
    """is_grads_batched: several gradients cannot share the memory of the logits, which stay as they are."""
    logits, ids = case((4, 9), tokens=(3,))
    x = logits.clone().requires_grad_()
    y = x * 1
    logp = rf.token_logprobs(y, ids, logit_floor=floor_keeping(logits, 4), inplace_backward=inplace)
    upstream = torch.randn(2, 4, 3)
    (batched,) = torch.autograd.grad(logp, x, upstream, is_grads_batched=True, retain_graph=True)
    for a, g in zip(batched, upstream, strict=True):
        other = logits.clone().requires_grad_()
        logp = rf.token_logprobs(other, ids, logit_floor=floor_keeping(logits, 4))
        contract.assert_bitwise(a, torch.autograd.grad(logp, other, g)[0])
    contract.assert_bitwise(y.detach(), logits)


def test_bad_ids_among_good_ones(monkeypatch):
    logits, ids = case((2, 9), tokens=(3,))
    monkeypatch.delenv("REACT_FAST_CHECKED", raising=False)
    with rf.use_backend("triton"):
        clean = rf.token_logprobs(logits, ids)
        ids[1, 2] = 9
        found = rf.token_logprobs(logits, ids)
    assert found.isnan().tolist() == [[False] * 3, [False, False, True]]
    contract.assert_bitwise(found[~found.isnan()], clean[~found.isnan()])
