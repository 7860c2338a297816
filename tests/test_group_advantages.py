"""Groups, moments and whitening: equal the float64 reference, exact gradients, no noise taken for signal."""

import itertools

import numpy as np
import pytest
import torch

import react_fast as rf

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BASELINES, SCALES = ("mean", "leave_one_out", "none"), ("std", "none")
# Any ids in any order, groups of 1 to 5.
IDS = torch.tensor([5, -7, 1, 1, 10**9, 5, 1, 9, -7, 9, 9, 9, 1, 1, 0, 9])


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_equal_float64_reference(backend, baseline, scale, dtype):
    rewards = torch.randn(16).to(dtype)
    for options in ({}, {"ddof": 0, "min_std": 0.9}, {"eps": 0.1, "singleton": "raw"}):
        if baseline == "none" and scale == "std" and "eps" not in options:
            options = {**options, "eps": 0.1}  # a group of one has no spread: only eps is left to divide by
        given = {"baseline": baseline, "scale": scale, **options}
        actual = rf.group_advantages(rewards, IDS, **given)
        expected = contract.reference(rf.group_advantages, rewards, IDS, **given)
        assert actual.dtype == _wide(dtype)
        # At most five rewards of size 3, a dozen roundings each, magnified by at most 1 / the smallest spread.
        scale_up = 1e4 if scale == "std" and given.get("min_std", 0) == 0 else 100
        bound = 12 * 3 * contract.EPS[actual.dtype] * min(scale_up, 1e3)
        assert float((actual.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.1, 0.2, 0.35, 1000.1, 1e5, -3.3e7])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 100])
def test_equal_rewards_give_exactly_zero(backend, size, reward, baseline):
    rewards = torch.full((size,), reward, requires_grad=True)
    ids = torch.zeros(size, dtype=torch.int64)
    advantages = rf.group_advantages(rewards, ids, baseline=baseline)
    assert bool((advantages == 0).all())
    (slope,) = torch.autograd.grad(advantages.sum(), rewards)
    assert bool((slope == 0).all())


def _beside(baseline, dtype=torch.float64, count=16):
    """What a baseline needs beside the rewards."""
    return {
        "length_weighted": {"lengths": torch.arange(count) % 5 + 1},
        "given": {"baselines": torch.linspace(-1, 1, count).to(dtype)},
    }.get(baseline, {})


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none", "length_weighted", "given"])
@pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_baseline_and_scale_equals_float64_reference(backend, baseline, scale, dtype):
    rewards = torch.randn(16).to(dtype)
    rewards[4] = float("nan")
    valid = torch.arange(16) != 9
    for options in ({"ddof": 0}, {"min_std": 2.0, "singleton": "raw"}):
        given = {"baseline": baseline, "scale": scale, "eps": 0.1, "valid": valid, **options}
        actual = rf.group_advantages(rewards, IDS, **given, **_beside(baseline, dtype))
        expected = contract.reference(
            rf.group_advantages,
            rewards,
            IDS,
            **given,
            **{k: x.double() if k == "baselines" else x for k, x in _beside(baseline, dtype).items()},
        )
        # Rewards of size 3, a dozen roundings, magnified by at most 1 / eps = 10.
        assert float((actual.double() - expected).abs().max()) <= 12 * 3 * 10 * contract.EPS[actual.dtype]


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none", "length_weighted", "given"])
@pytest.mark.parametrize("scale", ["none", "std", "batch_std"])
def test_gradcheck_of_every_baseline_and_scale(backend, baseline, scale):
    count, kinds = (9, ("zero", "raw")) if backend == "cpu" else (4, ("raw",))
    beside = _beside(baseline, count=count)
    for singleton in kinds:
        contract.assert_gradcheck(
            lambda r, singleton=singleton: rf.group_advantages(
                r, IDS[:count], baseline=baseline, scale=scale, singleton=singleton, eps=0.1, **beside
            ),
            torch.randn(count),
        )


def test_length_weighted_baseline(backend):
    """OPO by hand; a group of empty responses has its mean, equal rewards give exactly 0."""
    rewards = torch.tensor([1.0, 0.0, 4.0, 2.0, 1000.1, 1000.1, 1000.1])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    found = rf.group_advantages(
        rewards,
        ids,
        baseline="length_weighted",
        scale="none",
        lengths=torch.tensor([30, 10, 0, 0, 7, 11, 13]),
    )
    assert found.tolist() == [0.25, -0.75, 1.0, -1.0, 0.0, 0.0, 0.0]


def test_baselines_must_be_asked_for():
    rewards, ids = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    for options, text in (
        ({"baseline": "given"}, "baselines must be given"),
        ({"baseline": "length_weighted"}, "lengths must be given"),
        ({"lengths": ids}, "lengths must be given with baseline 'length_weighted' and with no other"),
        ({"baselines": rewards}, "baselines must be given with baseline 'given' and with no other"),
        ({"baseline": "length_weighted", "lengths": ids - 1}, "lengths must not be negative, got -1"),
        (
            {"baseline": "given", "baselines": rewards.clone().requires_grad_()},
            "baselines must not require a",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            rf.group_advantages(rewards, ids, **options)


def test_singletons(backend):
    rewards, ids = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([7, 3, 3])
    assert rf.group_advantages(rewards, ids, scale="none").tolist() == [0.0, -0.5, 0.5]
    assert rf.group_advantages(rewards, ids, scale="none", singleton="raw").tolist() == [2.0, -0.5, 0.5]
    assert rf.group_advantages(rewards, ids, scale="none", baseline="leave_one_out").tolist() == [
        0,
        -1.0,
        1.0,
    ]
    assert rf.group_advantages(rewards, ids, scale="none", baseline="none").tolist() == [2.0, 3.0, 4.0]


def test_seven_against_one(backend):
    """Leave-one-out of 7 x 0.35 and one 0: -0.35 for the one, 0.05 for the others."""
    rewards = torch.tensor([0.35] * 7 + [0.0], dtype=torch.float64)
    found = rf.group_advantages(
        rewards, torch.zeros(8, dtype=torch.int64), baseline="leave_one_out", scale="none"
    )
    expected = torch.tensor([0.05] * 7 + [-0.35], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


def test_offset_costs_no_digits(backend):
    """Centred two-pass statistics: rewards of 1e5 + {0, 1, ...} are as exact as without the offset."""
    spread = torch.arange(16).float() % 5
    ids = torch.arange(16) // 8
    near, far = rf.group_advantages(spread, ids), rf.group_advantages(spread + 1e5, ids)
    # The offset rewards are exact float32 numbers; what remains are roundings of numbers of size 5.
    torch.testing.assert_close(far, near, rtol=0, atol=32 * contract.EPS[torch.float32])


@pytest.mark.parametrize("scale", SCALES)
def test_invalid_and_nan_members_are_left_out(backend, scale):
    rewards, ids = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    valid = torch.ones(12, dtype=torch.bool)
    valid[[1, 6]] = False
    dirty = rewards.clone()
    dirty[[1, 6]] = torch.tensor([float("inf"), 1e30], dtype=torch.float64)
    dirty[8] = float("nan")
    kept = valid & ~dirty.isnan()
    dirty.requires_grad_()
    found = rf.group_advantages(dirty, ids, scale=scale, valid=valid)
    expected = rf.group_advantages(rewards[kept], ids[kept], scale=scale)
    torch.testing.assert_close(found[kept], expected, rtol=1e-12, atol=1e-12)
    assert bool((found[~kept] == 0).all())
    (slope,) = torch.autograd.grad(found, dirty, torch.randn(12, dtype=torch.float64))
    assert bool((slope[~kept] == 0).all())
    assert bool(slope.isfinite().all())


def test_whole_group_left_out(backend):
    nan = torch.full((4,), float("nan"))
    assert rf.group_advantages(nan, torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4
    none = torch.zeros(4, dtype=torch.bool)
    assert rf.group_advantages(torch.randn(4), torch.arange(4), valid=none).tolist() == [0.0] * 4


def test_group_does_not_depend_on_the_others(backend):
    rewards = torch.randn(16)
    whole = rf.group_advantages(rewards, IDS)
    for name in IDS.unique():
        members = name == IDS
        contract.assert_bitwise(rf.group_advantages(rewards[members], IDS[members]), whole[members])
    order = torch.argsort(IDS, stable=True)  # groups move, members keep their order
    contract.assert_bitwise(rf.group_advantages(rewards[order], IDS[order]), whole[order])
    contract.assert_bitwise(rf.group_advantages(rewards, IDS.int()), whole)


def test_large_batch_and_strides(backend):
    rewards = torch.randn(2, 3000 if backend == "cpu" else 700).T
    ids = torch.randint(0, len(rewards) // 8, rewards.shape)
    found = rf.group_advantages(rewards[:, 1], ids[:, 0])
    expected = contract.reference(rf.group_advantages, rewards[:, 1], ids[:, 0])
    # About eight rewards a group; a group of two close rewards magnifies by at most 1 / eps = 1e4.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_empty_groups(backend):
    rewards = torch.empty(0, requires_grad=True)
    rf.group_advantages(rewards, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert rewards.grad.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_equal_float64_reference(backend, dtype):
    x, mask = (torch.randn(7, 333) + 3).to(dtype), torch.rand(7, 333) > 0.4
    for given in (None, mask):
        found = rf.moments(x, given)
        counted = x.double() if given is None else x.double()[given]
        wanted = (counted.numel(), counted.mean(), ((counted - counted.mean()) ** 2).sum())
        for f, w in zip(found, wanted, strict=True):
            # Sums of positive size carried in parallel parts: a few dozen roundings.
            torch.testing.assert_close(
                f.double(), torch.as_tensor(w).double(), rtol=64 * contract.EPS[_wide(dtype)], atol=0
            )


def test_moments_of_parts_are_those_of_the_whole(backend):
    x = torch.randn(1000, dtype=torch.float64) + 100
    cuts = (0, 1, 1, 400, 1000)  # one part is empty, one a single element
    parts = [rf.moments(x[a:b]) for a, b in itertools.pairwise(cuts)]
    for merged, whole in zip(rf.merge_moments(*parts), rf.moments(x), strict=True):
        torch.testing.assert_close(merged.double(), whole.double(), rtol=1e-12, atol=0)
    mask = torch.rand(1000) > 0.5
    given = rf.whiten(x, mask=mask, moments=rf.moments(x, mask))
    torch.testing.assert_close(given, rf.whiten(x, mask=mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whiten_equals_float64_reference(backend, dtype, ddof, shift_mean):
    x, mask = (torch.randn(5, 70) + 2).to(dtype), torch.rand(5, 70) > 0.3  # more than one interpreted block
    for given in (None, mask):
        found = rf.whiten(x, mask=given, ddof=ddof, shift_mean=shift_mean)
        expected = contract.reference(rf.whiten, x, mask=given, ddof=ddof, shift_mean=shift_mean)
        assert found.dtype == _wide(dtype)
        # A mean and a spread of 350 numbers of size 5: a few dozen roundings of that size.
        assert float((found.double() - expected).abs().max()) <= 5 * 64 * contract.EPS[found.dtype]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_gradcheck(backend, shift_mean):
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    for given in (None, mask):
        contract.assert_gradcheck(
            lambda x, m=given: rf.whiten(x, mask=m, shift_mean=shift_mean), torch.randn(2, 4)
        )
    fixed = rf.moments(torch.randn(9, dtype=torch.float64))
    contract.assert_gradcheck(
        lambda x: rf.whiten(x, mask=mask, moments=fixed, shift_mean=shift_mean), torch.randn(2, 4)
    )


def test_whiten_touches_counting_elements_only(backend):
    x, mask = torch.randn(3, 50), torch.rand(3, 50) > 0.4
    expected = rf.whiten(x, mask=mask)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = x.masked_fill(~mask, poison).requires_grad_()
        found = rf.whiten(dirty, mask=mask)
        contract.assert_bitwise(found, expected)
        assert bool((found[~mask] == 0).all())
        (slope,) = torch.autograd.grad(found, dirty, torch.randn(3, 50))
        assert bool((slope[~mask] == 0).all())
        assert bool(slope.isfinite().all())


def test_whiten_constant_and_few(backend):
    assert bool((rf.whiten(torch.full((1000,), 1000.1)) == 0).all())  # no noise over 1e-4
    assert rf.whiten(torch.full((5,), 2.0), eps=0.0).tolist() == [0.0] * 5  # no spread to divide by
    with rf.use_backend("reference"):
        assert rf.whiten(torch.full((5,), 2.0), eps=0.0).tolist() == [0.0] * 5
    assert rf.whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert rf.whiten(torch.tensor([3.0, 5.0]), mask=torch.tensor([False, True])).tolist() == [0.0, 0.0]
    assert rf.whiten(torch.randn(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2
    for shape in ((0,), (0, 4), (3, 0)):
        assert rf.whiten(torch.empty(shape)).shape == shape


def test_layouts_and_threads(backend):
    x, mask = torch.randn(200, 700), torch.rand(200, 700) > 0.4
    if backend == "cpu":
        contract.assert_threads_agree(lambda: rf.whiten(x, mask=mask))
        contract.assert_threads_agree(lambda: torch.stack([m.double() for m in rf.moments(x, mask)]))
    view, seen = x[::50, ::3], mask[::50, ::3]
    contract.assert_bitwise(rf.whiten(view, mask=seen), rf.whiten(view.contiguous(), mask=seen.contiguous()))
    contract.assert_bitwise(rf.whiten(view, mask=seen.int()), rf.whiten(view, mask=seen))


def test_compiles_and_meta(backend):
    x, mask = torch.randn(4, 9, requires_grad=True), torch.rand(4, 9) > 0.3
    contract.assert_compiles(lambda x: rf.whiten(x, mask=mask), x)
    contract.assert_compiles(lambda r: rf.group_advantages(r, IDS), torch.randn(16, requires_grad=True))
    whitened = rf.whiten(x.detach().to("meta").half())
    assert (whitened.shape, whitened.dtype, whitened.device.type) == ((4, 9), torch.float32, "meta")
    advantages = rf.group_advantages(torch.ones(16, device="meta"), IDS.to("meta"))
    assert (advantages.shape, advantages.device.type) == ((16,), "meta")


def test_numpy_in_numpy_out():
    rewards, ids = np.array([1.0, 2.0, 4.0], np.float32), np.array([3, 3, 3])
    found = rf.group_advantages(rewards, ids)
    assert isinstance(found, np.ndarray)
    expected = rf.group_advantages(torch.from_numpy(rewards), torch.from_numpy(ids))
    np.testing.assert_array_equal(found, expected.numpy())
    assert isinstance(rf.whiten(rewards), np.ndarray)


ONES, ZEROS = torch.ones(4), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: rf.group_advantages(ONES.int(), ZEROS), TypeError, "rewards must be float32"),
        (lambda: rf.group_advantages(torch.ones(2, 2), ZEROS), ValueError, "rewards must be"),
        (lambda: rf.group_advantages(ONES, ZEROS[:3]), ValueError, r"group_ids must be \[4\] like rewards"),
        (lambda: rf.group_advantages(ONES, ONES), TypeError, "group_ids must be int64 or int32"),
        (lambda: rf.group_advantages(ONES, ZEROS.to("meta")), ValueError, "group_ids must be on cpu"),
        (lambda: rf.group_advantages(ONES, ZEROS, baseline="median"), ValueError, "baseline must be one of"),
        (lambda: rf.group_advantages(ONES, ZEROS, scale="iqr"), ValueError, "scale must be one of"),
        (lambda: rf.group_advantages(ONES, ZEROS, singleton="nan"), ValueError, "singleton must be one of"),
        (lambda: rf.group_advantages(ONES, ZEROS, eps=-1.0), ValueError, "eps must be"),
        (lambda: rf.group_advantages(ONES, ZEROS, min_std=-1.0), ValueError, "min_std must be"),
        (lambda: rf.group_advantages(ONES, ZEROS, ddof=2), ValueError, "ddof must be"),
        (lambda: rf.group_advantages(ONES, ZEROS, valid=ONES), TypeError, "valid must be bool"),
        (lambda: rf.group_advantages(ONES, ZEROS, valid=ZEROS[:2]), ValueError, "valid must be"),
        (lambda: rf.whiten(ZEROS), TypeError, "x must be float32"),
        (lambda: rf.whiten(ONES, mask=ONES), TypeError, "mask must be bool"),
        (lambda: rf.whiten(ONES, mask=ZEROS[:3]), ValueError, r"mask must be \[4\] like x"),
        (lambda: rf.whiten(ONES, eps=-1.0), ValueError, "eps must be"),
        (lambda: rf.whiten(ONES, ddof=-1), ValueError, "ddof must be"),
        (lambda: rf.whiten(ONES, moments=(1.0, 2.0)), (TypeError, ValueError), "moments must be"),
        (lambda: rf.moments(ZEROS), TypeError, "x must be float32"),
        (lambda: rf.moments(ONES, ZEROS[:3]), ValueError, "mask must be"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_opcheck(backend):
    x = torch.randn(6, requires_grad=True)
    contract.assert_opcheck(
        "group_advantages", x, torch.tensor([1, 1, 2, 2, 2, 3]), None, None, None, 0, 1, False, 1e-4, 1, 0.0
    )
    contract.assert_opcheck("moments", x.detach(), torch.rand(6) > 0.3)
    stats = torch.tensor([6.0, 0.1, 5.0], dtype=torch.float64)
    contract.assert_opcheck("whiten", x, torch.rand(6) > 0.3, stats, True, 1e-8, 1, True)
