"""importance_weights: equals the float64 reference and the printed equation, and the contract of every op."""

import pytest
import torch

import react_fast as rf
from react_fast import _core

from . import contract
from .policy_cases import DTYPES

LEVELS, MODES = ("token", "sequence", "geometric"), ("truncate", "mask")


def _case(shape=(5, 33), dtype=torch.float32):
    logprobs = (-3 * torch.rand(shape)).to(dtype)
    return logprobs, (logprobs + 0.3 * torch.randn(shape)).to(dtype), torch.rand(shape) < 0.7


def _all(*case, **options):
    weights, metrics = rf.importance_weights(*case, **{"low": 0.5, "high": 2.0, **options})
    return weights, torch.stack(list(metrics.values()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_equation_in_float64(backend, level, mode, dtype, normalize):
    logprobs, behavior, mask = case = _case(dtype=dtype)
    mask[3] = False
    logs = torch.where(mask, logprobs.double() - behavior.double(), 0.0)
    if level != "token":
        total = logs.sum(1, keepdim=True)
        logs = (total if level == "sequence" else total / mask.sum(1, keepdim=True).clamp(min=1)).expand(
            5, 33
        )
    raw = logs.clamp(-20, 20).exp()
    applied = raw.clip(0.5, 2.0) if mode == "truncate" else raw * ((raw >= 0.5) & (raw <= 2.0))
    applied = torch.where(mask, applied, 0.0)
    if normalize:
        applied = applied / (applied.sum() / mask.sum()).clamp(min=1e-300)
    w, r = applied[mask], raw[mask]
    ess = w.sum() ** 2 / (w.numel() * (w * w).sum()) if bool(w.any()) else torch.zeros(())
    outside = ((r < 0.5) | (r > 2)).double().mean()
    expected = torch.stack([r.mean(), r.max(), w.mean(), w.max(), ess, outside, torch.zeros(())])
    weights, metrics = _all(*case, level=level, mode=mode, normalize=normalize)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert weights.dtype == metrics.dtype == wide
    assert bool((weights[~mask] == 0).all())
    # A log-ratio sums at most 33 differences below 2 and keeps 33 eps of them; exp makes that relative.
    torch.testing.assert_close(weights.double(), applied, rtol=100 * contract.EPS[wide], atol=0)
    torch.testing.assert_close(metrics.double(), expected.double(), rtol=300 * contract.EPS[wide], atol=1e-14)
    with rf.use_backend("reference"):
        other = _all(*(x.double() if x.is_floating_point() else x for x in case), level=level, mode=mode,
                     normalize=normalize)  # fmt: skip
    torch.testing.assert_close(other[0], applied, rtol=1e-13, atol=0)
    torch.testing.assert_close(other[1], expected.double(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_packed_masked_and_nan(backend, level, mode):
    logprobs, behavior, mask = _case((4, 20))
    kept = torch.arange(20) < torch.tensor([20, 1, 0, 13])[:, None]
    bounds = torch.tensor([0, 20, 21, 21, 34], dtype=torch.int32)
    options = {"level": level, "mode": mode}
    padded = _all(logprobs, behavior, mask & kept, **options)
    packed = _all(logprobs[kept], behavior[kept], mask[kept], **options, cu_seqlens=bounds)
    torch.testing.assert_close(
        packed[0], padded[0][kept], rtol=20 * 2.0**-23, atol=0
    )  # row sums grouped otherwise
    for poison in (float("nan"), float("inf"), float("-inf")):
        dirty = [torch.where(mask, x, poison) for x in (logprobs, behavior)]
        for a, e in zip(
            _all(*dirty, mask, **options), _all(logprobs, behavior, mask, **options), strict=True
        ):
            contract.assert_bitwise(a, e)
    mask[1, 5] = True
    clean = _all(logprobs, behavior, mask, **options)[0]
    logprobs[1, 5] = float("nan")
    weights = _all(logprobs, behavior, mask, **options)[0]
    assert bool(weights[1, 5].isnan())
    contract.assert_bitwise(weights[[0, 2, 3]], clean[[0, 2, 3]])
    with rf.use_backend("reference"):
        expected = _all(logprobs, behavior, mask, **options)[0]
    assert weights.isnan().tolist() == expected.isnan().tolist()


@pytest.mark.parametrize("shape", [(3, 20), (0, 5), (3, 0), (0,)], ids=str)
def test_nothing_counts(backend, shape):
    logprobs, behavior, mask = _case(shape)
    weights, metrics = _all(logprobs * float("nan"), behavior, mask & False, normalize=True)
    assert weights.shape == shape
    assert bool((weights == 0).all())
    assert bool((metrics == 0).all())


def test_everything_dropped_stays_zero(backend):
    weights, metrics = _all(*_case(), low=1e6, high=float("inf"), mode="mask", normalize=True)
    assert bool((weights == 0).all())
    assert bool(metrics.isfinite().all())


@pytest.mark.parametrize("level", LEVELS)
def test_threads_strides_and_instruction_sets(isa, level):
    case = _case((300, 701))
    options = {"level": level, "normalize": True}
    with rf.use_backend("cpu"):
        for i in range(2):
            contract.assert_threads_agree(lambda i=i: _all(*case, **options)[i])
        actual = _all(*case, **options)[0]
        sparse = _all(*(x[::3, ::2] for x in case), **options)
        dense = _all(*(x[::3, ::2].contiguous() for x in case), **options)
    for a, e in zip(sparse, dense, strict=True):
        contract.assert_bitwise(a, e)
    with rf.use_backend("reference"):
        expected = _all(*(x.double() if x.is_floating_point() else x for x in case), **options)[0]
    # "sequence" sums 491 differences below 2 in float32 lanes before exp: 1000 eps.
    torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=0)
    assert _core.isa() == isa


def test_constant_compiled_opcheck_inference_and_meta(backend):
    logprobs, behavior, mask = _case((3, 9))
    weights, metrics = rf.importance_weights(logprobs.requires_grad_(), behavior, mask, low=0.0, high=2.0)
    assert not weights.requires_grad
    assert not any(m.requires_grad for m in metrics.values())
    plain = logprobs.detach()
    contract.assert_compiles(lambda x: rf.importance_weights(x, behavior, mask, low=0.0, high=2.0)[0], plain)
    contract.assert_opcheck("importance_weights", plain, behavior, mask, None, 0, 1, 0.5, 2.0, 2, 0.5, 1)
    with torch.inference_mode():
        contract.assert_bitwise(rf.importance_weights(plain, behavior, mask, low=0.0, high=2.0)[0], weights)
    meta, _ = rf.importance_weights(*(x.to("meta") for x in (plain, behavior, mask)), low=0.0, high=2.0)
    assert (meta.shape, meta.dtype) == ((3, 9), torch.float32)


# ---- bounds of another level, vetoes, means over sequences -------------------------------------------------


def _raw(logprobs, behavior, mask, level):
    logs = torch.where(mask, logprobs.double() - behavior.double(), 0.0)
    if level == "sequence":
        logs = logs.sum(1, keepdim=True).expand_as(logs)
    elif level == "geometric":
        logs = (logs.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logs)
    return logs.clamp(-20, 20).exp()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bound_level", LEVELS)
@pytest.mark.parametrize("normalize", [False, True, "sequences"])
@pytest.mark.parametrize("veto", [0.0, 0.2])
def test_bounds_of_another_level(backend, level, bound_level, normalize, veto):
    """seq-mask-tis is level="token", bound_level="geometric"."""
    logprobs, behavior, mask = _case((6, 33), torch.float64)
    mask[3] = False
    mask[1, 7], behavior[1, 7] = (
        True,
        logprobs[1, 7] + 2,
    )  # a ratio of 0.14 in row 1; the others are above 0.2
    low, high = {"token": (0.8, 1.3), "sequence": (0.3, 3.0), "geometric": (0.95, 1.05)}[bound_level]
    held = _raw(logprobs, behavior, mask, bound_level)
    outside = mask & ((held < low) | (held > high))
    dropped = (mask & (_raw(logprobs, behavior, mask, "token") < veto)).any(1, keepdim=True)
    expected = torch.where(mask & ~outside & ~dropped, _raw(logprobs, behavior, mask, level), 0.0)
    if normalize is True:
        expected = expected / (expected.sum() / mask.sum())
    elif normalize:
        first = [row[m][0] for row, m in zip(expected, mask, strict=True) if m.any()]
        expected = expected / torch.stack(first).mean().clamp(min=1e-300)
    weights, metrics = rf.importance_weights(
        logprobs, behavior, mask, level=level, mode="mask", low=low, high=high, bound_level=bound_level, veto=veto,
        normalize=normalize,
    )  # fmt: skip
    assert 0 < int(outside.sum()) < int(mask.sum())
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        metrics["importance/outside"], outside[mask].double().mean(), rtol=1e-12, atol=0
    )
    vetoed = (dropped & mask)[mask].double().mean()
    torch.testing.assert_close(metrics["importance/vetoed"], vetoed, rtol=1e-12, atol=0)
    bounds = torch.arange(7) * 33
    packed, _ = rf.importance_weights(
        logprobs.flatten(), behavior.flatten(), mask.flatten(), level=level, mode="mask", low=low,
        high=high, bound_level=bound_level, veto=veto, normalize=normalize, cu_seqlens=bounds,
    )  # fmt: skip
    torch.testing.assert_close(packed.view(6, 33), weights, rtol=1e-13, atol=0)


def test_long_sequences_do_not_overflow(backend):
    """A sum of 1e5 log-ratios of +-1 is clamped to +-20, and a sampler's -inf to +20."""
    n = 100_000 if backend == "cpu" else 3000
    for sign in (1.0, -1.0):
        logprobs, behavior = torch.zeros(1, n), torch.full((1, n), -sign)
        mask = torch.ones(1, n).bool()
        weights, _ = rf.importance_weights(
            logprobs, behavior, mask, level="sequence", low=0.0, high=float("inf")
        )
        torch.testing.assert_close(
            weights[0, 0].double(), torch.tensor(20 * sign).double().exp(), rtol=1e-6, atol=0
        )
    behavior[0, 0] = float("-inf")
    weights, _ = rf.importance_weights(logprobs, behavior, mask, low=0.0, high=2.0)
    assert weights[0, 0] == 2


def test_a_weight_at_a_bound_is_inside(backend):
    logprobs = torch.tensor([[0.0, 0.0]])
    for mode in MODES:
        weights, metrics = rf.importance_weights(
            logprobs, logprobs, torch.ones(1, 2).bool(), mode=mode, low=1.0, high=1.0
        )
        assert weights.tolist() == [[1.0, 1.0]]
        assert metrics["importance/outside"] == 0


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_policy_mask(backend, dtype):
    logprobs, behavior, mask = _case((8, 33), dtype)
    mask[3] = False
    mean = (torch.where(mask, behavior.double() - logprobs.double(), 0.0).sum(1) / mask.sum(1).clamp(min=1))[
        :, None
    ]
    threshold = float(mean[mean > 0].median()) + 1e-3
    for A in (torch.randn(8, 33).to(dtype), torch.randn(8).to(dtype)):
        better = (A if A.dim() == 2 else A[:, None]) >= 0
        expected = mask & (better | (mean <= threshold))
        kept = rf.off_policy_mask(logprobs, behavior, A, mask, threshold=threshold)
        assert kept.dtype == torch.bool
        assert bool((kept == expected).all())
        assert 0 < int(kept.sum()) < int(mask.sum())
        flat = [x.flatten() for x in (logprobs, behavior)]
        packed = rf.off_policy_mask(
            *flat, A.flatten(), mask.flatten(), threshold=threshold, cu_seqlens=torch.arange(9) * 33
        )
        assert bool((packed.view(8, 33) == expected).all())
        with rf.use_backend("reference"):
            assert bool(
                (rf.off_policy_mask(logprobs, behavior, A, mask, threshold=threshold) == expected).all()
            )
    with pytest.raises(ValueError, match=r"threshold must be in \[0, inf\], got -1"):
        rf.off_policy_mask(logprobs, behavior, A, mask, threshold=-1.0)
    with pytest.raises(ValueError, match="cu_seqlens must be given for packed logprobs, got None"):
        rf.off_policy_mask(logprobs[0], behavior[0], logprobs[0], mask[0], threshold=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_high_entropy_mask(backend, dtype, fraction):
    entropy, mask = torch.rand(5, 40).to(dtype), torch.rand(5, 40) < 0.7
    bound = torch.quantile(entropy[mask].double(), 1 - fraction)
    expected = mask & (entropy.double() >= bound)
    dirty = torch.where(mask, entropy, float("nan"))
    kept = rf.high_entropy_mask(dirty, mask, fraction=fraction)
    assert bool((kept == expected).all())
    assert bool((rf.high_entropy_mask(entropy[mask], mask[mask], fraction=fraction) == expected[mask]).all())
    assert bool((rf.high_entropy_mask(entropy.t(), mask.t(), fraction=fraction).t() == expected).all())
    with rf.use_backend("reference"):
        assert bool((rf.high_entropy_mask(dirty, mask, fraction=fraction) == expected).all())
    assert not rf.high_entropy_mask(entropy, mask & False, fraction=fraction).any()
    assert rf.high_entropy_mask(entropy[:0], mask[:0], fraction=fraction).shape == (0, 40)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        rf.high_entropy_mask(entropy, mask, fraction=0.0)


def test_masks_compile(backend):
    logprobs, behavior, mask = _case((3, 9))
    contract.assert_compiles(lambda x: rf.high_entropy_mask(x, mask, fraction=0.3), -logprobs)
    contract.assert_opcheck("high_entropy_mask", -logprobs, mask, 0.3)
    contract.assert_compiles(
        lambda x: rf.off_policy_mask(x, behavior, logprobs[:, 0].contiguous() + 1, mask, threshold=0.01),
        logprobs,
    )


ONES, MASK = torch.ones(2, 3), torch.ones(2, 3).bool()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logprobs": ONES.int()}, TypeError, "logprobs must be float32, bfloat16"),
        (
            {"behavior_logprobs": torch.ones(2, 4)},
            ValueError,
            r"behavior_logprobs must be \[2, 3\] like logprobs",
        ),
        ({"behavior_logprobs": ONES.half()}, TypeError, "behavior_logprobs must be float32 like logprobs"),
        (
            {"behavior_logprobs": ONES.to("meta")},
            ValueError,
            "behavior_logprobs must be on cpu like logprobs",
        ),
        ({"mask": MASK[:1]}, ValueError, r"mask must be \[2, 3\] like logprobs"),
        ({"level": "row"}, ValueError, "level must be one of 'token', 'sequence', 'geometric', got 'row'"),
        ({"bound_level": "row", "mode": "mask"}, ValueError, "bound_level must be one of 'token'"),
        ({"bound_level": "token"}, ValueError, "bound_level must be None for mode 'truncate', got 'token'"),
        ({"veto": -0.5}, ValueError, "veto must be in"),
        ({"normalize": "rows"}, ValueError, "normalize must be one of 'tokens', 'sequences', got 'rows'"),
        ({"mode": "clip"}, ValueError, "mode must be one of 'truncate', 'mask', got 'clip'"),
        ({"low": -0.1}, ValueError, "low must be in"),
        ({"low": 3.0}, ValueError, r"high must be in \[3, inf\], got 2"),
        ({"high": float("nan")}, ValueError, "high must be in"),
        ({"low": "0"}, TypeError, "low must be a number, got str"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    given = {"logprobs": ONES, "behavior_logprobs": ONES, "mask": MASK, "low": 0.5, "high": 2.0, **change}
    with pytest.raises(error, match=text):
        rf.importance_weights(**given)
    with pytest.raises(ValueError, match="cu_seqlens must be given for packed logprobs and level 'sequence'"):
        rf.importance_weights(ONES[0], ONES[0], MASK[0], level="sequence", low=0.5, high=2.0)
    for change in ({"veto": 0.1}, {"normalize": "sequences"}, {"mode": "mask", "bound_level": "geometric"}):
        with pytest.raises(ValueError, match="cu_seqlens must be given for packed logprobs and "):
            rf.importance_weights(ONES[0], ONES[0], MASK[0], low=0.5, high=2.0, **change)
