"""policy_loss: masks, layouts, dtypes, threads, compilers and bad input."""

from dataclasses import replace

import pytest
import torch

import react_fast as rf
from react_fast import PPOClip, Reinforce, _core
from react_fast.ops._policy_loss import AGGREGATIONS

from . import contract
from .policy_cases import DTYPES, OBJECTIVES, batch

FULL = {"kl_coef": 0.1, "entropy_coef": 0.01, "objective": PPOClip(dual_clip=1.5)}
NAMES = ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy", "importance")


def _options(aggregation):
    return {
        "aggregation": aggregation,
        "denominator": 37.0 if aggregation == "token_sum_norm" else None,
        **FULL,
    }


def _everything(b, **options):
    """Loss, metrics and gradients in one tensor each."""
    loss, metrics = b.loss(**options)
    return [loss.detach(), torch.stack(list(metrics.values())), *b.gradients(**options)[1:]]


def _assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        contract.assert_bitwise(a, e)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_denominator_makes_micro_batches_sum_to_the_batch(backend, aggregation):
    b = batch((7, 40))
    count = int(b.mask.sum()) if aggregation.startswith("token") else int(b.mask.any(1).sum())
    options = {**FULL, "aggregation": aggregation}
    whole = b.gradients(**options, denominator=float(count))
    if aggregation != "token_sum_norm":
        _assert_same(b.gradients(**options), whole)  # the count is what it replaces
    _assert_same(b.gradients(**options, denominator=torch.tensor(count)), whole)
    for cuts in ([3, 4], [1, 1, 5], [1] * 7):
        parts, start = [], 0
        for rows in cuts:
            part = b.each(lambda x, start=start, rows=rows: x[start : start + rows])
            parts.append(part.gradients(**options, denominator=float(count)))
            start += rows
        _assert_same([torch.cat(side) for side in zip(*(p[1:] for p in parts), strict=True)], whole[1:])
        # Loss: up to 7 more float32 roundings of a sum whose parts are below 10 in all.
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=0, atol=8 * 10 * 2.0**-24)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_advantage_a_sequence_equals_repeated_ones(backend, aggregation, dtype):
    b = batch((5, 50), dtype)
    rows = torch.randn(5).to(dtype)
    short, repeated = (replace(b, advantages=A) for A in (rows, rows[:, None].expand(5, 50)))
    _assert_rows_same(
        _everything(short, **_options(aggregation)), _everything(repeated, **_options(aggregation))
    )


def _assert_rows_same(actual, expected):
    """Gradients bitwise; sums over tokens may be grouped another way."""
    eps = contract.EPS[actual[0].dtype]
    _assert_same(actual[2:], expected[2:])
    for a, e in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(
            a, e, rtol=64 * eps, atol=64 * eps
        )  # mean magnitudes below 1, a few partial sums


def _packed(b):
    """The rows of `b` without their tails, and cu_seqlens; row 2 is empty."""
    lengths = [50, 1, 0, 17, 33]
    kept = torch.arange(b.mask.shape[1]) < torch.tensor(lengths)[:, None]
    return replace(b, mask=b.mask & kept), kept, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_equals_padded(backend, aggregation, index):
    padded, kept, bounds = _packed(batch((5, 50)))
    for rows in (False, True):
        if rows:
            padded = replace(padded, advantages=torch.randn(5))
        packed = replace(padded.each(lambda x: x[kept] if x.dim() == 2 else x))
        actual = _everything(packed, **_options(aggregation), cu_seqlens=bounds.to(index))
        expected = _everything(padded, **_options(aggregation))
        _assert_rows_same(actual, [*expected[:2], *(g[kept] for g in expected[2:])])
    reference = packed.each(lambda x: x.double() if x.is_floating_point() else x)
    with rf.use_backend("reference"):
        wide = _everything(reference, **_options(aggregation), cu_seqlens=bounds)
    torch.testing.assert_close(actual[2].double(), wide[2], rtol=1e-5, atol=1e-6)


def test_packed_advantages_of_token_count_are_per_token(backend):
    b = batch((6,), torch.float64)
    bounds = torch.arange(7)
    _assert_same(_everything(b, cu_seqlens=bounds, **FULL), _everything(b, **FULL))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masked_elements_influence_nothing(backend, objective, dtype):
    b = batch((5, 50), dtype)
    b = replace(b, mask=b.mask & (torch.arange(5) != 3)[:, None])
    poison = torch.tensor(
        [float("nan"), float("inf"), float("-inf")]
    )  # any of them at every place of every input
    dirty = b.floats(lambda x: torch.where(b.mask, x, poison[torch.randint(3, x.shape)]).to(x.dtype))
    for aggregation in AGGREGATIONS:
        options = {**_options(aggregation), "objective": objective}
        clean = _everything(b, **options)
        _assert_same(_everything(dirty, **options), clean)
        assert bool((clean[2][~b.mask] == 0).all())
        assert bool((clean[3][~b.mask] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_nan_of_a_counting_token_is_not_hidden(backend, name):
    b = replace(batch((4, 33)), mask=torch.ones(4, 33).bool())
    clean = b.gradients(**FULL)
    getattr(b, name)[2, 5] = float("nan")
    loss, d_logprobs, d_entropy = b.gradients(**FULL)
    assert bool(loss.isnan())
    others = torch.ones(4, 33).bool()
    others[2, 5] = False
    contract.assert_bitwise(d_logprobs[others], clean[1][others])
    contract.assert_bitwise(d_entropy, clean[2])
    assert bool(d_logprobs[2, 5].isnan()) == (name != "entropy")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 40), (0, 5), (3, 0), (0, 0), (0,), (40,)], ids=str)
def test_nothing_counts(backend, aggregation, shape):
    b = replace(batch(shape), mask=torch.zeros(shape).bool()).floats(lambda x: x * float("nan"))
    bounds = None if len(shape) == 2 else torch.tensor([0, *shape])
    loss, metrics = b.loss(**_options(aggregation), cu_seqlens=bounds)
    assert loss.item() == 0
    assert all(value.item() == 0 for value in metrics.values())
    for gradient in b.gradients(**_options(aggregation), cu_seqlens=bounds)[1:]:
        assert gradient.shape == shape
        assert bool((gradient == 0).all())


def test_packed_without_any_sequence(backend):
    b = batch((0,))
    loss, d_logprobs, _ = b.gradients(
        **_options("seq_mean_token_mean"), cu_seqlens=torch.zeros(1, dtype=torch.int64)
    )
    assert (loss.item(), d_logprobs.shape) == (0, (0,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_integer_masks_equal_bool(backend, dtype):
    b = batch((3, 20))
    _assert_same(_everything(replace(b, mask=b.mask.to(dtype)), **FULL), _everything(b, **FULL))


def test_any_strides(backend):
    b = batch((6, 10, 40))
    for view in (lambda x: x[1].t(), lambda x: x[2, :, ::2], lambda x: x[::2, 3], lambda x: x[:, 4, 1:]):
        _assert_same(
            _everything(b.each(view), **FULL),
            _everything(b.each(lambda x, view=view: view(x).contiguous()), **FULL),
        )
    row = batch((1, 40))
    _assert_same(
        _everything(row.each(lambda x: x.expand(6, 40)), **FULL),
        _everything(row.each(lambda x: x.repeat(6, 1)), **FULL),
    )


def test_row_does_not_depend_on_the_batch(backend):
    b = batch((50, 300))
    for aggregation in AGGREGATIONS:
        options = {**FULL, "aggregation": aggregation, "denominator": 1000.0}
        whole = b.gradients(**options)
        for i in (0, 17, 49):
            one = b.each(lambda x, i=i: x[i : i + 1]).gradients(**options)
            _assert_same(one[1:], [g[i : i + 1] for g in whole[1:]])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_threads_agree(aggregation):
    b = batch((300, 701))
    for rows in (b, replace(b, advantages=b.advantages[:, 0])):
        for i in range(4):
            contract.assert_threads_agree(
                lambda rows=rows, i=i: _everything(rows, **_options(aggregation))[i]
            )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_agrees(isa, objective, dtype):
    b = batch((37, 131), dtype)
    options = {**FULL, "objective": objective}
    with rf.use_backend("cpu"):
        actual = _everything(b, **options)
    with rf.use_backend("reference"):
        expected = _everything(b.floats(torch.Tensor.double), **options)
    for a, e in zip(actual, expected, strict=True):
        # test_policy_loss derives the bounds; here a wrong lane or tail would show as an error of order 1.
        scale = contract.EPS[a.dtype] if a.dtype == dtype else contract.EPS[torch.float32]
        torch.testing.assert_close(a.double(), e, rtol=100 * scale, atol=1e-6)
    assert _core.isa() == isa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_survive_a_loss_scale(backend, dtype):
    """1 / n of 2^18 tokens is below float16's subnormals; times the loss scale it is not."""
    shape = (64, 4096) if backend == "cpu" else (2, 8)
    logprobs = torch.full(shape, -1.0, dtype=dtype, requires_grad=True)
    advantages, mask = torch.ones(shape[0], dtype=dtype), torch.ones(shape).bool()
    loss = rf.policy_loss(logprobs, None, advantages, mask, denominator=2.0**18).loss
    (gradient,) = torch.autograd.grad(loss * 2.0**16, logprobs)
    assert bool((gradient == -(2.0**-2)).all())


@pytest.mark.parametrize("log_ratio", [20.0, -20.0, 200.0, -200.0, float("inf"), -float("inf")])
def test_ratios_without_bound_stay_finite(backend, log_ratio):
    """Of either sign of the advantage, and of both zeros, whose loss and gradient are 0."""
    old, mask = torch.full((1, 1), -log_ratio).double(), torch.ones(1, 1).bool()
    for A in (2.0, -2.0, 0.0, -0.0):
        logp = torch.full((1, 1), -0.5, dtype=torch.float64, requires_grad=True)
        for objective in (PPOClip(dual_clip=3.0), Reinforce()):
            loss = rf.policy_loss(logp, old, torch.full((1, 1), A).double(), mask, objective=objective).loss
            (gradient,) = torch.autograd.grad(loss, logp)
            assert bool(loss.isfinite())
            assert bool(gradient.isfinite())
            assert A != 0 or (float(loss.detach()), float(gradient)) == (0.0, 0.0)
            assert abs(float(loss.detach())) <= 3 * abs(A)


def test_upstream_gradient_and_partial_gradients(backend):
    b = batch((3, 20), torch.float64)
    _, d_logprobs, d_entropy = b.gradients(**FULL)
    for wanted in (("logprobs",), ("entropy",), ("logprobs", "entropy")):
        leaves = {name: getattr(b, name).clone().requires_grad_() for name in wanted}
        loss = replace(b, **leaves).loss(**FULL).loss
        for name, gradient in zip(wanted, torch.autograd.grad(-3 * loss, list(leaves.values())), strict=True):
            expected = -3 * {"logprobs": d_logprobs, "entropy": d_entropy}[name]
            torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=0)


def test_everything_else_is_a_constant(backend):
    b = batch((3, 20))
    leaves = {name: getattr(b, name).clone().requires_grad_() for name in NAMES}
    result = replace(b, **leaves).loss(**FULL)
    result.loss.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in ("logprobs", "entropy"))
    assert not any(value.requires_grad for value in result.metrics.values())


def test_compiles(backend):
    b = batch((4, 9))

    def op(logprobs, entropy):
        loss, metrics = replace(b, logprobs=logprobs, entropy=entropy).loss(**FULL)
        return loss + 0 * metrics["ratio/max"]

    contract.assert_compiles(op, b.logprobs.requires_grad_(), b.entropy.requires_grad_())


def test_opcheck():
    b = batch((4, 9))
    optional = (b.ref_logprobs, b.entropy, b.importance)
    tail = (1, [0.8, 1.2, 3.0, 4.0], 1, 0.1, 2, 2, 0.01)
    tensors = (b.logprobs.requires_grad_(), b.old_logprobs, b.advantages, b.mask, *optional)
    contract.assert_opcheck("policy_loss", *tensors, None, None, 0.0, *tail, True, False)
    contract.assert_opcheck("policy_loss", *tensors, None, torch.tensor(5.0), 0.0, *tail, True, False)
    bare = (b.logprobs.detach().flatten(), None, b.advantages[:, 0], b.mask.flatten(), None, None, None)
    contract.assert_opcheck(
        "policy_loss", *bare, torch.arange(5) * 9, None, 0.0, *tail[:3], 0.0, 0, 0, 0.0, False, False
    )


def test_inference_mode_autocast_and_meta(backend):
    b = batch((3, 20))
    expected = b.loss(**FULL)
    with torch.inference_mode():
        contract.assert_bitwise(b.loss(**FULL).loss, expected.loss)
        inside = b.floats(torch.clone)
    contract.assert_bitwise(inside.loss(**FULL).loss, expected.loss)
    with torch.autocast("cpu", torch.bfloat16):
        contract.assert_bitwise(b.loss(**FULL).loss, expected.loss)
    meta = b.each(lambda x: x.to("meta")).floats(torch.Tensor.bfloat16)
    leaf = meta.logprobs.requires_grad_()
    loss, metrics = meta.loss(**FULL)
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    assert metrics.keys() == expected.metrics.keys()
    loss.backward()
    assert (leaf.grad.shape, leaf.grad.dtype) == ((3, 20), torch.bfloat16)


ONES, MASK = torch.ones(2, 3), torch.ones(2, 3).bool()
FLAT = {
    "logprobs": torch.ones(6),
    "old_logprobs": None,
    "advantages": torch.ones(6),
    "mask": torch.ones(6).bool(),
}


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logprobs": [[1.0]]}, TypeError, "logprobs must be a torch.Tensor, got list"),
        ({"logprobs": ONES.int()}, TypeError, "logprobs must be float32, bfloat16"),
        ({"logprobs": torch.ones(1, 2, 3)}, ValueError, r"must be \[B, T\] or packed \[N\], got \[1, 2, 3\]"),
        ({"logprobs": torch.ones(())}, ValueError, r"logprobs must be \[B, T\] or packed"),
        ({"old_logprobs": torch.ones(2, 4)}, ValueError, r"old_logprobs must be \[2, 3\] like logprobs"),
        ({"old_logprobs": ONES.double()}, TypeError, "old_logprobs must be float32 like logprobs, got float64"),
        ({"old_logprobs": ONES.to("meta")}, ValueError, "old_logprobs must be on cpu like logprobs, got meta"),
        ({"old_logprobs": 0.0}, TypeError, "old_logprobs must be a torch.Tensor, got float"),
        ({"ref_logprobs": torch.ones(3)}, ValueError, r"ref_logprobs must be \[2, 3\] like logprobs"),
        ({"entropy": ONES.half()}, TypeError, "entropy must be float32 like logprobs, got float16"),
        ({"importance": ONES.to("meta")}, ValueError, "importance must be on cpu like logprobs"),
        ({"importance": torch.ones(2, 1)}, ValueError, r"importance must be \[2, 3\] like logprobs, got \[2, 1\]"),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages must be .* or one per sequence \[2\]"),
        ({"advantages": torch.ones(2, 1)}, ValueError, r"advantages must be \[2, 3\] like logprobs, got \[2, 1\]"),
        ({"advantages": torch.ones(2).double()}, TypeError, "advantages must be float32 like logprobs"),
        ({"advantages": torch.ones(2).to("meta")}, ValueError, "advantages must be on cpu like logprobs"),
        ({"advantages": 1.0}, TypeError, "advantages must be a torch.Tensor, got float"),
        ({"mask": MASK[:, :2]}, ValueError, r"mask must be \[2, 3\] like logprobs, got \[2, 2\]"),
        ({"mask": ONES}, TypeError, "mask must be bool or an integer 0/1 mask, got float32"),
        ({"mask": MASK.to("meta")}, ValueError, "mask must be on cpu like logprobs"),
        ({"mask": None}, TypeError, "mask must be a torch.Tensor, got NoneType"),
        ({"objective": "ppo"}, TypeError, r"objective must be one of Reinforce.*VESPO.*, got 'ppo'"),
        ({"objective": PPOClip}, TypeError, "objective must be one of"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of 'token_mean', .* got 'mean'"),
        ({"aggregation": "token_sum_norm"}, ValueError, "denominator must be given"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of 'k1', 'k2', 'k3', 'abs', got 'k4'"),
        ({"kl_gradient": "none"}, ValueError, "kl_gradient must be one of 'value', 'k2', 'ratio', got 'none'"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs must be given when kl_coef is not 0, got None"),
        ({"entropy_coef": 0.1}, ValueError, "entropy must be given when entropy_coef is not 0, got None"),
        ({"kl_coef": "0.1", "ref_logprobs": ONES}, TypeError, "kl_coef must be a number, got str"),
        ({"kl_coef": float("nan"), "ref_logprobs": ONES}, ValueError, "kl_coef must be in"),
        ({"kl_coef": float("inf"), "ref_logprobs": ONES}, ValueError, "kl_coef must be finite, got inf"),
        ({"entropy_coef": float("-inf"), "entropy": ONES}, ValueError, "entropy_coef must be finite, got -inf"),
        ({"denominator": 0}, ValueError, r"denominator must be in \(0, inf\], got 0"),
        ({"denominator": -2.0}, ValueError, "denominator must be in"),
        ({"denominator": float("nan")}, ValueError, "denominator must be in"),
        ({"denominator": float("inf")}, ValueError, "denominator must be finite, got inf"),
        ({"denominator": torch.tensor(-1.0)}, ValueError, "denominator must be in"),
        ({"denominator": torch.tensor(0)}, ValueError, "denominator must be in"),
        ({"denominator": torch.ones(2)}, ValueError, r"denominator must be a number or one element, got \[2\]"),
        ({"denominator": torch.ones((), device="meta")}, ValueError, "denominator must be on cpu like logprobs"),
        ({"denominator": "7"}, TypeError, "denominator must be a number, got str"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"logprobs must be packed"),
        ({**FLAT, "cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        ({**FLAT, "cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must be int64 or int32"),
        ({**FLAT, "cu_seqlens": torch.tensor(6)}, ValueError, r"cu_seqlens must be \[B \+ 1\], got \[\]"),
        ({**FLAT, "cu_seqlens": torch.tensor([0, 5])}, ValueError, r"must rise from 0 to 6 like .*, got \[0, 5\]"),
        ({**FLAT, "cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens must rise from 0 to 6"),
        ({**FLAT, "cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens must rise from 0 to 6"),
        ({**FLAT, "cu_seqlens": torch.tensor([0, 9, 6])}, ValueError, "cu_seqlens must rise from 0 to 6"),
        ({**FLAT, "cu_seqlens": torch.tensor([0, 6]).to("meta")}, ValueError, "cu_seqlens must be on cpu"),
        ({**FLAT, "aggregation": "seq_mean_token_sum"}, ValueError, "cu_seqlens must be given"),
        ({**FLAT, "advantages": torch.ones(2)}, ValueError, "one per sequence needs cu_seqlens"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(chosen, change, error, text):
    given = {"logprobs": ONES, "old_logprobs": None, "advantages": ONES, "mask": MASK, **change}
    with rf.use_backend(chosen), pytest.raises(error, match=text):
        rf.policy_loss(**given)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({"ratio_min": 1.3}, "ratio_min and ratio_max must satisfy"),
        ({"ratio_min": -0.1}, "got -0.1 and 1.2"),
        ({"ratio_max": float("nan")}, "ratio_min and ratio_max must satisfy"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0"),
        ({"ratio_cap": 0.0}, "ratio_cap must be above 0, got 0.0"),
    ],
)
def test_bad_bounds_are_refused(bounds, text):
    with pytest.raises(ValueError, match=text):
        PPOClip(**bounds)
    assert Reinforce() == Reinforce()
