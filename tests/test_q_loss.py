"""TD and expectile losses: equal the float64 reference, what each is, the op contract."""

import itertools

import pytest
import torch

import react_fast as rf
from react_fast import _core
from react_fast.ops._policy_loss import AGGREGATIONS

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN, INF = float("nan"), float("inf")
LENGTHS = [50, 1, 0, 17, 33]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)


def _batch(shape=(5, 50), dtype=torch.float32):
    names = ("first", "second", "targets", "weights")
    batch = {name: torch.randn(shape).mul(2).to(dtype) for name in names}
    batch["weights"] = batch["weights"].abs()
    batch["mask"] = torch.rand(shape) > 0.3
    return batch


def _squared(b, **options):
    return rf.q_loss(b["first"], b["targets"], b["mask"], **options)


def _twin_huber(b, **options):
    twins = (b["first"], b["second"])
    return rf.q_loss(twins, b["targets"], b["mask"], huber=1.0, weights=b["weights"], **options)


def _expectile(b, **options):
    return rf.expectile_loss(b["first"], b["targets"], b["mask"], tau=0.8, weights=b["weights"], **options)


KINDS = (_squared, _twin_huber, _expectile)


def _options(aggregation):
    return {"aggregation": aggregation, "denominator": 37.0 if aggregation == "token_sum_norm" else None}


def _everything(kind, b, **options):
    """[loss, metrics, gradients of both heads (None without the second)]"""
    leaves = {k: b[k].clone().requires_grad_() for k in ("first", "second")}
    loss, metrics = kind({**b, **leaves}, **options)
    assert not any(x.requires_grad for x in metrics.values())
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [loss.detach(), torch.stack(list(metrics.values())), *grads]


def _expected(kind, b, **options):
    with rf.use_backend("reference"):
        wide = {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
        return _everything(kind, wide, **options)


def _assert_close(found, expected, dtype):
    """Losses and means below 50 of float32 partial sums of at most 1,024; gradients below 20, a few roundings."""
    wide = contract.EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    for a, e in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=64 * wide, atol=64 * wide)
    for a, e in zip(found[2:], expected[2:], strict=True):
        if e is None:
            assert a is None
            continue
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), e, rtol=2 * contract.EPS[dtype] + 8 * wide, atol=8 * wide + 2.0**-25
        )  # a gradient below float16's normal numbers has an absolute error of 2^-25


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_reference(backend, kind, dtype, aggregation):
    b = _batch(dtype=dtype)
    _assert_close(
        _everything(kind, b, **_options(aggregation)), _expected(kind, b, **_options(aggregation)), dtype
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_agrees(isa, kind):
    b = _batch((3, 1100))
    _assert_close(_everything(kind, b), _expected(kind, b), torch.float32)
    assert _core.isa() == isa


def test_targets_in_the_precision_that_ops_return(backend):
    """bfloat16 heads beside float32 targets: the targets are not rounded."""
    b = _batch(dtype=torch.bfloat16)
    b["targets"], b["weights"] = torch.randn(5, 50), torch.rand(5, 50)
    for kind in KINDS:
        _assert_close(_everything(kind, b), _expected(kind, b), torch.bfloat16)


# ---- what each loss is -----------------------------------------------------------------------------------------


def test_limits(backend):
    b = _batch(dtype=torch.float64)
    mse = _squared(b).loss
    close = {"rtol": 1e-12, "atol": 1e-12}  # 250 float64 terms
    error = (b["first"] - b["targets"])[b["mask"]]
    torch.testing.assert_close(mse, (error**2).mean() / 2, **close)
    half = rf.expectile_loss(b["first"], b["targets"], b["mask"], tau=0.5)
    torch.testing.assert_close(half.loss, mse, **close)
    above = rf.expectile_loss(b["first"], b["targets"], b["mask"], tau=0.9)
    expected = torch.where(error < 0, 0.9 * error**2, 0.1 * error**2).mean()
    torch.testing.assert_close(above.loss, expected, **close)
    far = rf.q_loss(b["first"], b["targets"], b["mask"], huber=1e6)
    torch.testing.assert_close(far.loss, mse, **close)
    near = rf.q_loss(b["first"], b["targets"], b["mask"], huber=0.5)
    torch.testing.assert_close(
        near.loss, torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=0.5), **close
    )
    for key, x in {
        "tokens": torch.tensor(float(len(error))), "td_error/mean": error.mean(),
        "td_error/abs": error.abs().mean(), "td_error/max": error.abs().max(),
        "prediction/mean": b["first"][b["mask"]].mean(), "target/mean": b["targets"][b["mask"]].mean(),
        "above": (error > 0).double().mean(),
    }.items():  # fmt: skip
        torch.testing.assert_close(near.metrics[key], x.double(), **close)


def test_heads_add_up(backend):
    b = _batch(dtype=torch.float64)
    twins = rf.q_loss((b["first"], b["second"]), b["targets"], b["mask"])
    each = [rf.q_loss(b[k], b["targets"], b["mask"]) for k in ("first", "second")]
    torch.testing.assert_close(twins.loss, each[0].loss + each[1].loss, rtol=1e-12, atol=1e-12)
    for key in ("td_error/mean", "td_error/abs", "prediction/mean", "target/mean", "above"):
        mean = (each[0].metrics[key] + each[1].metrics[key]) / 2
        torch.testing.assert_close(twins.metrics[key], mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_the_expectile_is_where_the_gradient_vanishes(backend, tau):
    """tau E[(Q - V)+] = (1 - tau) E[(V - Q)+], by bisection of a formula of its own."""
    q = torch.randn(1, 101, dtype=torch.float64)
    low, high = q.min(), q.max()
    for _ in range(60):
        v = (low + high) / 2
        over = tau * (q - v).clamp_min(0).mean() > (1 - tau) * (v - q).clamp_min(0).mean()
        low, high = (v, high) if over else (low, v)
    v = v.expand(1, 101).clone().requires_grad_()
    rf.expectile_loss(v, q, torch.ones(1, 101).bool(), tau=tau).loss.backward()
    assert abs(float(v.grad.sum())) < 1e-12
    assert float(v.detach()[0, 0]) <= float(q.max())


# ---- the op contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    b = _batch((2, 4), torch.float64)
    inputs = [b["first"], b["second"]] if kind is _twin_huber else [b["first"]]

    def op(*heads):
        return kind(
            {**b, **dict(zip(("first", "second"), heads, strict=False))}, aggregation="seq_mean_token_mean"
        ).loss

    contract.assert_gradcheck(op, *inputs)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_denominator_makes_micro_batches_sum_to_the_batch(backend, aggregation):
    b = _batch((7, 40))
    count = int(b["mask"].sum()) if aggregation.startswith("token") else int(b["mask"].any(1).sum())
    for denominator in (float(count), torch.tensor(count)):
        options = {"aggregation": aggregation, "denominator": denominator}
        for kind in KINDS:
            whole = _everything(kind, b, **options)
            parts = [_everything(kind, {k: x[i : i + 1] for k, x in b.items()}, **options) for i in range(7)]
            for head in (2, 3):
                if whole[head] is not None:
                    contract.assert_bitwise(torch.cat([p[head] for p in parts]), whole[head])
            # Seven more float32 roundings of a sum whose parts are below 50 in all.
            torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=0, atol=8 * 50 * 2.0**-24)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_packed_equals_padded(backend, aggregation, integer):
    b = _batch()
    kept = torch.arange(50) < torch.tensor(LENGTHS)[:, None]
    b["mask"] &= kept
    packed = {k: x[kept] for k, x in b.items()}
    for kind in KINDS:
        found = _everything(kind, packed, **_options(aggregation), cu_seqlens=CU_SEQLENS.to(integer))
        expected = _everything(kind, b, **_options(aggregation))
        for a, e in zip(found[:2], expected[:2], strict=True):  # sums of other groups of tokens
            torch.testing.assert_close(a, e, rtol=64 * 2.0**-23, atol=64 * 2.0**-23)
        for a, e in zip(found[2:], expected[2:], strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                contract.assert_bitwise(a, e[kept])


@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_touch_nothing(backend, kind, poison):
    b = _batch()
    b["mask"][3] = False
    dirty = {k: x.masked_fill(~b["mask"], poison) if x.is_floating_point() else x for k, x in b.items()}
    for aggregation in AGGREGATIONS:
        clean = _everything(kind, b, **_options(aggregation))
        for a, e in zip(_everything(kind, dirty, **_options(aggregation)), clean, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                contract.assert_bitwise(a, e)
        assert bool((clean[2][~b["mask"]] == 0).all())


def test_nan_of_a_counting_token_is_not_hidden(backend):
    for kind, name in itertools.product(KINDS, ("first", "targets")):
        b = _batch((4, 33))
        b["mask"][2, 5] = True
        clean = _everything(kind, b)
        b[name][2, 5] = NAN
        found = _everything(kind, b)
        assert bool(found[0].isnan())
        others = torch.ones(4, 33).bool()
        others[2, 5] = False
        contract.assert_bitwise(found[2][others], clean[2][others])
        assert bool(found[2][2, 5].isnan())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 40), (0, 5), (3, 0), (0,), (7,)], ids=str)
def test_nothing_counts(backend, aggregation, shape):
    b = _batch(shape)
    b["mask"][...] = False
    options = _options(aggregation)
    if len(shape) == 1 and aggregation.startswith("seq"):
        options["cu_seqlens"] = torch.tensor([0, shape[0]])
    for kind in KINDS:
        loss, metrics, first, _ = _everything(kind, b, **options)
        assert float(loss) == 0
        assert bool((metrics == 0).all())
        assert bool((first == 0).all())


def test_any_strides_and_threads(backend):
    b = _batch((7, 30))
    views = {k: x.T.contiguous().T for k, x in b.items()}
    for kind in KINDS:
        for a, e in zip(_everything(kind, views)[:3], _everything(kind, b)[:3], strict=True):
            contract.assert_bitwise(a, e)
    if backend == "cpu":
        large = _batch((40, 2100))
        for kind in KINDS:
            contract.assert_threads_agree(
                lambda kind=kind: torch.cat([x.flatten() for x in _everything(kind, large)[:3]])
            )


def test_no_gradient_for_constants(backend):
    b = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in _batch().items()}
    for chosen, kind in itertools.product((backend, "reference"), KINDS):
        with rf.use_backend(chosen):
            loss = kind(b).loss
            used = torch.autograd.grad(loss, [b["targets"], b["weights"]], allow_unused=True)
            assert all(x is None or not bool(x.any()) for x in used)


def test_one_head_alone_needs_a_gradient(backend):
    b = _batch()
    first = b["first"].clone().requires_grad_()
    (alone,) = torch.autograd.grad(_twin_huber({**b, "first": first}).loss, first)
    contract.assert_bitwise(alone, _everything(_twin_huber, b)[2])
    second = b["second"].clone().requires_grad_()
    (alone,) = torch.autograd.grad(_twin_huber({**b, "second": second}).loss, second)
    contract.assert_bitwise(alone, _everything(_twin_huber, b)[3])


def test_compiles_opcheck_meta_autocast_and_inference(backend):
    b = _batch((3, 7))
    first, second = (b[k].clone().requires_grad_() for k in ("first", "second"))
    contract.assert_compiles(lambda x, y: _twin_huber({**b, "first": x, "second": y}).loss, first, second)
    contract.assert_compiles(lambda x: _expectile({**b, "first": x}).loss, first)
    for aggregation in (0, 1):
        given = b["targets"], b["mask"], b["weights"], None, None, 0.0, 1, 1.0, aggregation
        contract.assert_opcheck("q_loss", first, second, *given, True, True)
    flat = [x.detach().flatten() for x in (first, b["targets"], b["mask"])]
    given = None, torch.tensor([0, 4, 21]), torch.tensor(3.0), 0.0, 2, 0.7, 1
    contract.assert_opcheck("q_loss", flat[0].requires_grad_(), None, *flat[1:], *given, True, False)
    meta = {k: x.to("meta") for k, x in b.items()}
    for kind in KINDS:
        loss, metrics = kind(meta)
        assert {(x.shape, x.dtype, x.device.type) for x in (loss, *metrics.values())} == {
            ((), torch.float32, "meta")
        }
        expected = _everything(kind, b)
        with torch.autocast("cpu", torch.bfloat16):
            contract.assert_bitwise(kind(b).loss, expected[0])
        with torch.inference_mode():
            contract.assert_bitwise(kind(b).loss, expected[0])


def test_other_refusals(backend):
    q, mask = torch.zeros(4), torch.ones(4).bool()
    for aggregation in ("seq_mean_token_mean", "seq_mean_token_sum"):
        with pytest.raises(ValueError, match=r"^cu_seqlens must be given for packed q_values"):
            rf.q_loss(q, q, mask, aggregation=aggregation)
    with pytest.raises(
        ValueError, match=r"^denominator must be given for aggregation 'token_sum_norm', got None"
    ):
        rf.q_loss(q, q, mask, aggregation="token_sum_norm")
    with pytest.raises(ValueError, match=r"^aggregation must be one of 'token_mean', .*, got 'mean'"):
        rf.q_loss(q, q, mask, aggregation="mean")
    with pytest.raises(ValueError, match=r"^q_values must be a tensor or a pair of two, got 3"):
        rf.q_loss((q, q, q), q, mask)
    with pytest.raises(TypeError, match=r"^q_values\[1\] must be float32 like q_values\[0\], got float64"):
        rf.q_loss((q, q.double()), q, mask)
    if contract.DEVICE == "cpu":  # a GPU would have to be waited for
        with pytest.raises(ValueError, match=r"^cu_seqlens must rise from 0 to 4"):
            rf.q_loss(q, q, mask, aggregation="seq_mean_token_sum", cu_seqlens=torch.tensor([0, 3]))
