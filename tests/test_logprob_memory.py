"""token_logprobs and memory: a gradient in place, rows that lie far apart, launches that compile nothing new."""

import pytest
import torch

import react_fast as rf

from . import contract
from .logprob_cases import DTYPES, both, case, floor_keeping

MODIFIED = "modified by an inplace operation"


def _backward(logits, ids, view=lambda x: x, **options):
    """The gradient of the logits' producer, and the logits."""
    x = logits.clone().requires_grad_()
    y = view(x * 1)
    logp, entropy = both(y, ids, **options)
    (slope,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
    return slope, y


VIEWS = {
    "contiguous": lambda x: x,
    "shifted": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[::2, 1:, 3:],
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_equals_ordinary_bitwise(backend, dtype, view):
    """The numbers are the same, and the memory of the logits holds them."""
    logits, _ = case((4, 6, 70), dtype)
    rows = view(logits)
    ids = torch.randint(rows.shape[-1], (*rows.shape[:-1], 3))
    floor = floor_keeping(rows, 40)
    for options in ({}, {"logit_floor": floor, "softcap": 5.0}):
        expected, _ = _backward(logits, ids, view, **options)
        slope, y = _backward(logits, ids, view, **options, inplace_backward=True)
        contract.assert_bitwise(slope, expected)
        contract.assert_bitwise(y.detach(), view(expected))


# Several chunks of a row: each must read its chosen tokens before another writes.
@pytest.mark.parametrize("shape", [(3, 40000), (300, 257)], ids=str)
def test_in_place_in_chunks(backend, shape):
    rows = shape[0] if backend == "cpu" else min(shape[0], 30)
    logits, ids = case((rows, shape[1]), torch.bfloat16, tokens=(20,))
    expected, _ = _backward(logits, ids)
    slope, y = _backward(logits, ids, inplace_backward=True)
    contract.assert_bitwise(slope, expected)
    contract.assert_bitwise(y.detach(), expected)


def test_in_place_hands_on_the_memory_of_the_logits(backend):
    logits, ids = case((4, 9))
    y = logits.clone().requires_grad_() * 1
    seen = []
    y.register_hook(lambda slope: seen.append((slope.data_ptr(), slope.requires_grad)))
    rf.token_logprobs(y, ids, inplace_backward=True).sum().backward()
    assert seen == [(y.data_ptr(), False)]


def test_later_use_of_overwritten_logits_raises(backend):
    logits, ids = case((4, 9))
    x = logits.clone().requires_grad_()

    def lost(y):
        return rf.token_logprobs(y, ids, inplace_backward=True).sum()

    y = x * 1
    twice = lost(y)
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        twice.backward()
    y = x * 1
    other = torch.logsumexp(y, -1).sum()
    lost(y).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()
    y = torch.tanh(x)  # whose own backward reads its result
    with pytest.raises(RuntimeError, match=MODIFIED):
        lost(y).backward()
    y = x * 1
    with pytest.raises(RuntimeError, match=MODIFIED):
        (lost(y) + lost(y)).backward()


def test_earlier_use_of_the_logits_is_safe(backend):
    """What runs its backward first has read the logits; both gradients reach the producer."""
    logits, ids = case((4, 9))
    slopes = []
    for in_place in (False, True):
        x = logits.clone().requires_grad_()
        y = x * 1
        logp = rf.token_logprobs(y, ids, inplace_backward=in_place)
        z = torch.logsumexp(y, -1)  # made later, so its backward runs earlier
        (slope,) = torch.autograd.grad(logp.sum() + z.square().sum(), x)
        slopes.append(slope)
    contract.assert_bitwise(*slopes)


LEAF, OVERLAP = "logits must not be a leaf or a view of one", "logits must not overlap itself"
ROWS = "logits must be rows of unit stride at two row strides at most"
REFUSED = {
    "leaf": (lambda x: x, LEAF),
    "view of a leaf": (lambda x: x.view(16, 4, 9), LEAF),
    "expanded": (lambda x: (x * 1)[:1].expand(4, 4, 4, 9), OVERLAP),
    "overlapping windows": (lambda x: (x * 1).as_strided((4, 9), (4, 1)), OVERLAP),
    "strided vocabulary": (lambda x: (x * 1)[..., ::2], ROWS),
    "three row strides": (lambda x: (x * 1)[::2, ::2, ::2], ROWS),
}


@pytest.mark.parametrize("chosen", ["cpu", "triton", "reference"])
@pytest.mark.parametrize(("view", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_written_over_is_refused(chosen, view, text):
    logits = view(torch.randn(4, 4, 4, 9).requires_grad_())
    ids = torch.zeros(logits.shape[:-1], dtype=torch.long)
    with rf.use_backend(chosen):
        with pytest.raises(ValueError, match=text) as caught:
            rf.token_logprobs(logits, ids, inplace_backward=True)
        assert "\n" not in str(caught.value)
        with torch.no_grad():  # no gradient is wanted: nothing will be written
            plain = rf.token_logprobs(logits, ids)
            contract.assert_bitwise(rf.token_logprobs(logits, ids, inplace_backward=True), plain)
        rf.token_logprobs(logits.detach(), ids, inplace_backward=True)


def _far_apart(rows, vocab, stride):
    """Rows whose offsets leave 32 bits, in memory of which only the rows are ever touched."""
    memory = torch.empty((rows - 1) * stride + vocab, dtype=torch.bfloat16)
    view = memory.as_strided((rows, vocab), (stride, 1))
    return view.copy_(torch.randn(rows, vocab) * 3)


def test_offsets_beyond_32_bits(backend):
    """Forward and backward in place: 4 GiB between the first row and the last, a few KiB of it used."""
    far = _far_apart(3, 5000, 2**30)
    near, ids = far.clone(memory_format=torch.contiguous_format), torch.randint(5000, (3, 2))
    floor = floor_keeping(near, 100)
    for a, e in zip(both(far, ids, logit_floor=floor), both(near, ids, logit_floor=floor), strict=True):
        contract.assert_bitwise(a, e)
    expected, _ = _backward(near, ids, logit_floor=floor)
    logits = _Taken.apply(torch.zeros((), requires_grad=True), far)
    logp, entropy = both(logits, ids, logit_floor=floor, inplace_backward=True)
    (logp.sum() + entropy.sum()).backward()
    contract.assert_bitwise(far.contiguous(), expected)


class _Taken(torch.autograd.Function):
    """Memory that is there already as the result of a function, so that its gradient can be written over it."""

    @staticmethod
    def forward(ctx, leaf, memory):
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx, slope):
        return slope[0, 0].float() * 0, None


def test_more_than_two_to_the_31_elements():
    """2.2e9 logits of 67,000 rows that share one row's memory; the result is that row's."""
    row, rows = torch.randn(1, 33000).bfloat16(), 67_000
    ids = torch.full((rows,), 7)
    logp = rf.token_logprobs(row.expand(rows, -1), ids)
    contract.assert_bitwise(logp, rf.token_logprobs(row, ids[:1]).expand(rows))


def test_more_rows_than_a_grid_axis_holds():
    """65536 rows and more, all on the one grid axis that takes them."""
    logits, ids = case((70_000, 5))
    with rf.use_backend("triton"):
        logp = rf.token_logprobs(logits, ids)
    # Both are within a few ulp of a sum of five terms.
    torch.testing.assert_close(logp, rf.token_logprobs(logits, ids), rtol=1e-6, atol=1e-6)


def _specialisations(monkeypatch, run):
    """What Triton would compile for sm_90: argument types, specialised values, constants, and launch options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    from react_fast.kernels import logprob, logprob_backward

    target, seen = make_backend(GPUTarget("cuda", 90, 32)), set()

    def watch(module, name):
        kernel = getattr(module, name)
        plain = jit.JITFunction(
            kernel.fn, **{k: v for k, v in kernel.kwargs.items() if k.startswith("do_not")}
        )
        bind = jit.create_function_from_signature(plain.signature, plain.params, target)

        class Watched:
            def __getitem__(self, grid):
                def launch(*args, **options):
                    bound, kinds, rest = bind(*args, **options)
                    constants = [str(bound[p.name]) for p in plain.params if p.is_constexpr]
                    seen.add((name, str(kinds), str(constants), str(rest)))
                    return kernel[grid](*args, **options)

                return launch

        monkeypatch.setattr(module, name, Watched())

    for name in ("fold_kernel", "finish_kernel"):
        watch(logprob, name)
    for name in ("chosen_kernel", "backward_kernel"):
        watch(logprob_backward, name)
    run()
    return seen


@pytest.mark.parametrize("vocab", [48, 50, 20000], ids=str)
def test_no_number_of_rows_or_length_compiles_anything(monkeypatch, vocab):
    """Twenty batches of 1 to 33 sequences and lengths, odd, even and multiples of 16, for one set of kernels."""
    lengths = [1, 2, 3, 5, 8, 15, 16, 17, 32, 33] if vocab < 1000 else [1, 2, 3, 5]

    def run():
        for length in lengths:
            for batch in (1, 2):
                logits, ids = case((batch, length + 1, vocab), torch.bfloat16)
                _backward(logits, ids[:, 1:], lambda x: x[:, :-1])

    with rf.use_backend("triton"):
        seen = _specialisations(monkeypatch, run)
    kernels = [name for name, *_ in seen]
    assert sorted(kernels) == sorted(set(kernels))
    assert len(kernels) == (4 if vocab > 16384 else 3)
