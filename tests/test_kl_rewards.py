"""kl_rewards: equals the printed equation in float64 and the reference, and the contract of every op."""

import pytest
import torch

import react_fast as rf
from react_fast.ops._policy_loss import KL_ESTIMATORS

from . import contract
from .policy_cases import DTYPES, KL


def _case(shape=(5, 37), dtype=torch.float32):
    logprobs = (-3 * torch.rand(shape)).to(dtype)
    ref = (logprobs + 0.5 * torch.randn(shape)).to(dtype)
    return torch.randn(shape).to(dtype), logprobs, ref, torch.rand(shape) < 0.7


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_equals_the_equation(backend, estimator, dtype, clip):
    rewards, logprobs, ref, mask = _case(dtype=dtype)
    mask[3] = False
    k = KL[estimator](logprobs.double() - ref.double())
    k = k if clip is None else k.clip(-clip, clip)
    last = torch.zeros_like(mask)
    for row, m in enumerate(mask):
        if m.any():
            last[row, m.nonzero()[-1]] = True
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for given, placed in (
        (rewards, rewards.double()),
        (rewards[:, 0].contiguous(), last * rewards[:, :1].double()),
    ):
        expected = torch.where(mask, placed - 0.2 * k, 0.0)
        shaped, metrics = rf.kl_rewards(
            given, logprobs, ref, mask, kl_coef=0.2, estimator=estimator, clip=clip
        )
        assert shaped.dtype == metrics["kl"].dtype == wide
        assert bool((shaped[~mask] == 0).all())
        # A log-ratio below 4 keeps 4 eps, an exponential of it e^4 times that.
        torch.testing.assert_close(shaped.double(), expected, rtol=0, atol=100 * contract.EPS[wide])
        torch.testing.assert_close(
            metrics["kl"].double(), k[mask].mean(), rtol=0, atol=100 * contract.EPS[wide]
        )
        flat = (x.flatten() for x in (given, logprobs, ref, mask))
        packed, _ = rf.kl_rewards(
            *flat, kl_coef=0.2, estimator=estimator, clip=clip, cu_seqlens=torch.arange(6) * 37
        )
        torch.testing.assert_close(packed.view(5, 37), shaped, rtol=0, atol=4 * contract.EPS[wide])
        with rf.use_backend("reference"):
            other, _ = rf.kl_rewards(
                given.double(),
                logprobs.double(),
                ref.double(),
                mask,
                kl_coef=0.2,
                estimator=estimator,
                clip=clip,
            )
        torch.testing.assert_close(other, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_masked_elements_influence_nothing(backend, poison):
    rewards, logprobs, ref, mask = _case()
    dirty = [torch.where(mask, x, poison) for x in (rewards, logprobs, ref)]
    for given in (False, True):
        clean = rf.kl_rewards(
            rewards[:, 0].contiguous() if given else rewards, logprobs, ref, mask, kl_coef=0.1
        )
        dirty[0] = rewards[:, 0].contiguous() if given else dirty[0]
        other = rf.kl_rewards(*dirty, mask, kl_coef=0.1)
        contract.assert_bitwise(other[0], clean[0])
        contract.assert_bitwise(other[1]["kl"], clean[1]["kl"])


@pytest.mark.parametrize("shape", [(3, 20), (0, 5), (3, 0), (0,)], ids=str)
def test_nothing_counts(backend, shape):
    rewards, logprobs, ref, mask = _case(shape)
    shaped, metrics = rf.kl_rewards(rewards, logprobs * float("nan"), ref, mask & False, kl_coef=0.1)
    assert shaped.shape == shape
    assert bool((shaped == 0).all())
    assert metrics["kl"] == 0


def test_log_ratios_are_clamped(backend):
    logprobs, ref = torch.tensor([[float("-inf"), -1.0, -300.0]]), torch.tensor([[-1.0, -300.0, -1.0]])
    shaped, _ = rf.kl_rewards(torch.zeros(1), logprobs, ref, torch.ones(1, 3).bool(), kl_coef=1.0)
    assert shaped.tolist() == [[20.0, -20.0, 20.0]]


def test_threads_and_instruction_sets(isa):
    case = _case((300, 701))
    with rf.use_backend("cpu"):
        contract.assert_threads_agree(lambda: rf.kl_rewards(*case, kl_coef=0.1, estimator="k3")[0])
        contract.assert_threads_agree(lambda: rf.kl_rewards(*case, kl_coef=0.1, estimator="k3")[1]["kl"])
        actual = rf.kl_rewards(*case, kl_coef=0.1, estimator="k3")[0]
    with rf.use_backend("reference"):
        expected = rf.kl_rewards(*case, kl_coef=0.1, estimator="k3")[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_constant_compiled_and_opcheck(backend):
    rewards, logprobs, ref, mask = _case((3, 9))
    shaped, metrics = rf.kl_rewards(rewards, logprobs.requires_grad_(), ref, mask, kl_coef=0.1)
    assert not shaped.requires_grad
    assert not metrics["kl"].requires_grad
    plain = logprobs.detach()
    contract.assert_compiles(lambda x: rf.kl_rewards(rewards, x, ref, mask, kl_coef=0.1)[0], plain)
    contract.assert_opcheck("kl_rewards", rewards, plain, ref, mask, None, 0.1, 2, 10.0)
    meta, _ = rf.kl_rewards(*(x.to("meta") for x in (rewards, plain, ref, mask)), kl_coef=0.1)
    assert (meta.shape, meta.dtype) == ((3, 9), torch.float32)


ONES, MASK = torch.ones(2, 3), torch.ones(2, 3).bool()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"rewards": torch.ones(3)},
            ValueError,
            r"rewards must be \[2, 3\] like logprobs or one per sequence \[2\]",
        ),
        ({"rewards": ONES.half()}, TypeError, "rewards must be float32 like logprobs"),
        ({"ref_logprobs": torch.ones(2, 4)}, ValueError, r"ref_logprobs must be \[2, 3\] like logprobs"),
        ({"mask": MASK[:1]}, ValueError, r"mask must be \[2, 3\] like logprobs"),
        ({"estimator": "k4"}, ValueError, "estimator must be one of 'k1', 'k2', 'k3', 'abs', got 'k4'"),
        ({"kl_coef": "1"}, TypeError, "kl_coef must be a number, got str"),
        ({"clip": 0.0}, ValueError, "clip must be in"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    given = {"rewards": ONES, "logprobs": ONES, "ref_logprobs": ONES, "mask": MASK, "kl_coef": 0.1, **change}
    with pytest.raises(error, match=text):
        rf.kl_rewards(**given)
