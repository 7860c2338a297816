"""OpenRLHF's log-probabilities, entropies and returns beside ours; what it imports for a GPU is stubbed."""

import importlib.util
import types

import pytest
import torch

import react_fast as rf
from react_fast.integrations import PatchError
from react_fast.integrations import openrlhf as integration

from .gpu_stubs import stubs
from .peers import peer

WANTED = ("aiohttp", "deepspeed", "fastapi", "pylatexenc", "ring_flash_attn", "torchdata", "uvicorn", "vllm")
METHODS = ("get_advantages_and_returns", "get_cumulative_returns")


@pytest.fixture(scope="module")
def openrlhf():
    """(theirs, ours) of every name, and the modules; without flash_attn.ops torch computes OpenRLHF's side."""
    if importlib.util.find_spec("openrlhf") is None:
        pytest.skip("openrlhf is not installed: make parity")
    peer("ray")
    missing = [x for x in WANTED if importlib.util.find_spec(x) is None]
    with stubs("flash_attn", *missing, absent=("flash_attn.ops",), forget="openrlhf"):
        utils, actor = peer("openrlhf.models.utils"), peer("openrlhf.models.actor")
        maker = peer("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
        module = peer("openrlhf.models.loss").PolicyLoss

        def held():
            found = {name: getattr(utils, name) for name in ("log_probs_from_logits", "compute_entropy")}
            assert all(getattr(actor, name) is x for name, x in found.items())
            found |= {name: vars(maker)[name] for name in METHODS}
            return found | {"loss": vars(module)["forward"]}

        theirs = held()
        with rf.patch("openrlhf"):
            ours = held()
        after = held()
        assert all(after[name] is theirs[name] is not ours[name] for name in theirs)
        yield types.SimpleNamespace(theirs=theirs, ours=ours, loss=module)


def test_without_its_packages_one_line_refuses():
    if importlib.util.find_spec("openrlhf") is None:
        reason = "openrlhf is not installed"
    elif importlib.util.find_spec("flash_attn") is None:
        reason = r"openrlhf\.models\.utils cannot be imported: ModuleNotFoundError: No module named '\w+'$"
    else:
        pytest.skip("flash_attn is installed")
    with stubs(forget="openrlhf"), pytest.raises(PatchError, match=reason) as caught:
        rf.patch("openrlhf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["log_probs_from_logits", "compute_entropy"])
def test_log_probs_and_entropy(openrlhf, name, shape, dtype):
    logits, labels = torch.randn(*shape, 31).mul(3).to(dtype), torch.randint(0, 31, shape)
    found = []
    for held in (openrlhf.theirs, openrlhf.ours):
        x = logits.clone().requires_grad_()
        with torch.compiler.set_stance("force_eager"):
            y = held[name](x, labels) if name == "log_probs_from_logits" else held[name](x)
        found.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for wanted, got in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_a_temperature_goes_to_the_original_which_divides_in_place(openrlhf):
    logits, labels = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    changed = logits.clone()
    found = openrlhf.ours["log_probs_from_logits"](changed, labels, temperature=0.5)
    assert torch.equal(changed, logits / 0.5)
    wanted = openrlhf.theirs["log_probs_from_logits"](logits, labels, temperature=0.5)
    assert torch.equal(found, wanted)


MASKS = {
    "none": None,
    "bool": torch.bool,
    "integers": torch.int64,
    "float32": torch.float32,
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (6, 17)], ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.95, 0.8), (1, 0)])
def test_advantages_and_returns(openrlhf, kind, shape, gamma, lam):
    rewards, values, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) > 0.3
    mask[-1] = False
    mask = None if MASKS[kind] is None else mask.to(MASKS[kind])
    name = METHODS[0]
    ours, theirs = (
        f[name](None, values, rewards, mask, gamma, lam) for f in (openrlhf.ours, openrlhf.theirs)
    )
    name = METHODS[1]
    ours += (openrlhf.ours[name](None, rewards, mask, gamma),)
    theirs += (openrlhf.theirs[name](None, rewards, mask, gamma),)
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


LOSSES = {
    "default": {},
    "dual clip": {"dual_clip": 1.2, "clip_eps_high": 0.4},
    "sequences": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "corrected": {"is_correction_level": "token"},
}


@pytest.mark.parametrize("sizes", [{}, {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9}])
@pytest.mark.parametrize("kind", LOSSES)
def test_policy_losses(openrlhf, kind, sizes):
    old, moved, rollout, advantages = torch.randn(4, 6, 17)
    mask, found, module = torch.rand(6, 17) > 0.3, [], openrlhf.loss(**LOSSES[kind])
    mask[-1] = False
    mask[:-1, 0] = True
    for held in (openrlhf.theirs, openrlhf.ours):
        logp = (old + 0.3 * moved).requires_grad_()
        parts = held["loss"](module, logp, old, advantages, mask, old + 0.1 * rollout, **sizes)
        found.append((*parts, torch.autograd.grad(parts[0], logp)[0]))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_what_ours_does_not_cover_goes_to_the_original(openrlhf):
    rewards, values = torch.randn(2, 3, 5)
    for args in ((values.double(), rewards, None, 0.9, 0.8), (values, rewards, None, torch.tensor(0.9), 0.8)):
        ours, theirs = (f[METHODS[0]](None, *args) for f in (openrlhf.ours, openrlhf.theirs))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_package_s_methods_call_ours(openrlhf, monkeypatch):
    calls, inner = [], integration.gae
    monkeypatch.setattr(integration, "gae", lambda *x, **y: calls.append(1) or inner(*x, **y))
    with rf.patch("openrlhf"):
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

        calls.clear()
        maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
        rewards = torch.randn(2, 5)
        maker.get_advantages_and_returns(rewards, rewards, None, gamma=0.9, lambd=0.8)
    assert len(calls) == 1
