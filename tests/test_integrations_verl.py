"""verl's estimators, log-probabilities and fused head beside ours, and its plugin."""

import importlib
import importlib.metadata
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import react_fast as rf

from .peers import peer

ALGOS = "verl.trainer.ppo.core_algos"
PLUGIN = "react_fast.integrations.verl_plugin"
GROUPED = ("grpo", "rloo", "opo", "reinforce_plus_plus_baseline")
ESTIMATORS = (*GROUPED, "reinforce_plus_plus")
CONFIG = types.SimpleNamespace(gamma=0.9)
B, T = 12, 23


class Verl:
    """Modules, and by name what verl has there and what we put there."""

    def __init__(self):
        self.algos = peer(ALGOS)
        self.torch = peer("verl.utils.torch_functional")
        self.fused = peer("verl.utils.experimental.torch_functional")
        self.theirs = self._held()
        with rf.patch("verl"):
            self.ours = self._held()

    def _held(self):
        held = {name: getattr(self.algos, f"compute_{name}_outcome_advantage") for name in ESTIMATORS}
        held |= {"gae": self.algos.compute_gae_advantage_return, "find": self.algos.get_adv_estimator_fn}
        held["logprobs"] = self.torch.logprobs_from_logits_v2
        return held | {"fused": self.fused.FusedLinearForPPOFunction}


@pytest.fixture(scope="module")
def verl():
    return Verl()


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    monkeypatch.delenv("REACT_FAST_DISABLE", raising=False)


def _batch(dtype=torch.float32):
    """Gaps, padding, a response without a token."""
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    mask &= torch.rand(B, T) > 0.2
    mask[3] = False
    ids = np.array([f"uid-{i}" for i in np.random.default_rng(0).integers(0, 4, B)], dtype=object)
    ids[0] = "alone"
    return torch.randn(B, T, dtype=dtype), torch.randn(B, T, dtype=dtype), mask.long(), ids


def _same(verl, name, *args, tolerance=2e-5, **options):
    ours, theirs = (held[name](*args, **options) for held in (verl.ours, verl.theirs))
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    return ours


def test_patching_takes_every_name_and_gives_it_back(verl):
    assert all(verl.ours[name] is not verl.theirs[name] for name in verl.ours)
    found = verl._held()
    assert all(found[name] is verl.theirs[name] for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (1, 0)])
def test_gae_at_masked_places_too(verl, dtype, gamma, lam):
    rewards, values, mask, _ = _batch(dtype)
    _same(verl, "gae", rewards, values, mask, gamma, lam)
    _same(verl, "gae", rewards, values, torch.ones_like(mask), gamma, lam)
    _same(verl, "gae", rewards, values, mask.int(), gamma, lam)
    _same(verl, "gae", rewards, values, mask.to(dtype), gamma, lam)
    with rf.use_backend("reference"):
        _same(verl, "gae", rewards[:4], values[:4], mask[:4], gamma, lam)
    wide = [x.repeat(1, 6) for x in (rewards, values, mask)]  # vectors that count wholly, or not at all
    wide[2][:, 30:70], wide[2][0] = 0, 1
    _same(verl, "gae", *wide, gamma, lam)


def test_gae_of_too_few_tokens_raises_as_verl_does(verl):
    rewards, values, mask, _ = _batch()
    for few in (
        torch.zeros_like(mask),
        torch.nn.functional.pad(torch.ones(1, 1).long(), (2, T - 3, 0, B - 1)),
    ):
        with pytest.raises(ValueError, match="mask"):
            verl.ours["gae"](rewards, values, few, 0.9, 0.9)


@pytest.mark.parametrize("name", GROUPED)
def test_estimators_of_groups(verl, name):
    rewards, _, mask, ids = _batch()
    first, second = _same(verl, name, rewards, mask, ids)
    assert first is second
    assert torch.equal(_same(verl, name, rewards, mask.float(), ids)[0], first)
    _same(verl, name, rewards, mask, np.arange(B) // 3)  # integers, too
    _same(verl, name, rewards, mask, np.arange(B), tolerance=5e-5)  # all alone


def test_grpo_s_options(verl):
    rewards, _, mask, ids = _batch()
    _same(verl, "grpo", rewards, mask, ids, norm_adv_by_std_in_grpo=False)
    _same(verl, "grpo", rewards, mask, ids, epsilon=0.1)


def test_equal_rewards_get_0_where_verl_leaves_rounding(verl):
    rewards, mask, ids = torch.full((3, 1), 0.1), torch.ones(3, 1).long(), np.zeros(3)
    assert not verl.ours["grpo"](rewards, mask, ids)[0].any()
    assert verl.theirs["grpo"](rewards, mask, ids)[0].abs().max() < 0.1  # an ulp of 0.1 over 1e-6


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_reinforce_plus_plus(verl, gamma):
    rewards, _, mask, _ = _batch()
    for given in (mask, mask.float()):
        _same(verl, "reinforce_plus_plus", rewards, given, types.SimpleNamespace(gamma=gamma), index=None)


def test_what_ours_does_not_cover_goes_to_the_original(verl):
    rewards, values, mask, ids = _batch()
    for args in ((rewards, values, mask / 2, 0.9, 0.8), (rewards, values, mask, torch.tensor(0.9), 1.1)):
        found, wanted = verl.ours["gae"](*args), verl.theirs["gae"](*args)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    found, wanted = (held["grpo"](rewards, mask, list(ids))[0] for held in (verl.ours, verl.theirs))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["gae", *ESTIMATORS])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("other", [2, -1, 3])
def test_a_mask_of_other_numbers_weighs_as_in_verl(verl, name, dtype, other):
    rewards, values, mask, ids = _batch()
    mask[::2, 3] = other
    more = {"gae": (0.9, 0.8), "reinforce_plus_plus": (CONFIG,)}.get(name, (ids,))
    _same(verl, name, rewards, *([values] if name == "gae" else []), mask.to(dtype), *more)


def test_the_registry_leads_to_ours_while_patched(verl):
    before = verl.algos.get_adv_estimator_fn("rloo")
    with rf.patch("verl"):
        assert verl.algos.get_adv_estimator_fn("rloo").__wrapped__ is before
        assert verl.algos.get_adv_estimator_fn(verl.algos.AdvantageEstimator.OPO).__wrapped__
        assert not hasattr(verl.algos.get_adv_estimator_fn("remax"), "__wrapped__")
        with pytest.raises(ValueError, match="nosuch"):
            verl.algos.get_adv_estimator_fn("nosuch")
    assert verl.algos.get_adv_estimator_fn("rloo") is before


@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logprobs_and_their_gradient(verl, shape, dtype):
    logits, labels = torch.randn(*shape, 31).mul(3).to(dtype), torch.randint(0, 31, shape)
    found = []
    for held in (verl.ours, verl.theirs):
        x = logits.clone().requires_grad_()
        y = held["logprobs"](x, labels)
        found.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    for got, wanted in zip(*found, strict=True):
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_verl_s_own_wrapper_is_live(verl, monkeypatch):
    from react_fast.integrations import verl as ours

    calls, inner = [], ours.token_logprobs
    monkeypatch.setattr(ours, "token_logprobs", lambda *x: calls.append(1) or inner(*x))
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    with rf.patch("verl"):
        calls.clear()
        verl.torch.logprobs_from_logits(torch.randn(3, 5), torch.tensor([0, 4, 2]))
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(11,), (2, 5)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head_and_its_gradients(verl, shape, temperature):
    found = []
    hidden, weight, ids = torch.randn(*shape, 8), torch.randn(37, 8), torch.randint(0, 37, shape).int()
    for patched in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with rf.patch("verl") if patched else torch.enable_grad():
            logp, entropy = verl.fused.FusedLinearForPPO(chunk_size=4)(h, w, ids, temperature)
            loss = (logp * torch.linspace(-1, 1, logp.numel()).view(shape)).sum() - 0.1 * entropy.sum()
            found.append((logp.detach(), entropy.detach(), *torch.autograd.grad(loss, (h, w))))
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# ---- the plugin ------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(verl, monkeypatch):
    """The module as verl imports it, with verl's registries put back afterwards."""
    for name in ("ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"):
        theirs = {x: y for x, y in getattr(verl.algos, name).items() if not x.startswith("react_fast")}
        monkeypatch.setattr(verl.algos, name, theirs)
    kept = sys.modules.pop(PLUGIN, None)

    def load():
        return importlib.metadata.EntryPoint("react_fast", PLUGIN, "verl.plugins").load()

    yield load
    sys.modules.pop(PLUGIN, None)
    if kept is not None:
        sys.modules[PLUGIN] = kept


def test_the_entry_point_is_declared():
    project = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    assert f'[project.entry-points."verl.plugins"]\nreact_fast = "{PLUGIN}"\n' in project


def test_the_plugin_registers_prints_once_and_patches_nothing(verl, plugin, capsys):
    plugin()
    plugin()
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("react_fast is active in verl: ")
    assert all(verl._held()[name] is verl.theirs[name] for name in verl.theirs)
    rewards, _, mask, ids = _batch()
    for name in ESTIMATORS:
        registered, theirs = (verl.algos.get_adv_estimator_fn(f"{by}{name}") for by in ("react_fast_", ""))
        options = {"config": CONFIG if name == "reinforce_plus_plus" else None, "index": ids}
        found = registered(token_level_rewards=rewards, response_mask=mask, **options)[0]
        wanted = theirs(token_level_rewards=rewards, response_mask=mask, **options)[0]
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    plain = verl.algos.get_adv_estimator_fn("react_fast_grpo")
    found = plain(rewards, mask, ids, config={"norm_adv_by_std_in_grpo": False}, reward_baselines=None)[0]
    wanted = verl.theirs["grpo"](rewards, mask, ids, norm_adv_by_std_in_grpo=False)[0]
    torch.testing.assert_close(found, wanted)


def test_the_plugin_is_silent_where_disabled(verl, plugin, monkeypatch, capsys):
    monkeypatch.setenv("REACT_FAST_DISABLE", "verl")
    plugin()
    assert capsys.readouterr().err == ""
    assert "react_fast" not in verl.algos.POLICY_LOSS_REGISTRY


def test_the_plugin_says_why_it_failed(verl, plugin, monkeypatch, capsys):
    monkeypatch.delattr(verl.algos, "register_policy_loss")
    plugin()
    line = capsys.readouterr().err
    assert line.startswith(
        "react_fast is not active in verl: ImportError: cannot import name 'register_policy"
    )
    assert line.count("\n") == 1


def test_the_module_that_patches(verl, capsys, monkeypatch):
    name = "react_fast.integrations.verl_patch"
    try:
        for why, said in (("", "is active in verl: patched\n"), ("verl", "")):
            monkeypatch.setenv("REACT_FAST_DISABLE", why)
            sys.modules.pop(name, None)
            importlib.import_module(name)
            assert capsys.readouterr().err.endswith(said)
            assert (verl._held()["gae"] is verl.theirs["gae"]) == bool(why)
            rf.unpatch("verl")
    finally:
        sys.modules.pop(name, None)
        rf.unpatch("verl")


MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
WHOLE = {
    "alone": {},
    "of two ranks": {"dp_size": 2, "batch_num_tokens": 311, "global_batch_size": 24, "loss_scale_factor": 40},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_registered_loss_is_vanilla(verl, plugin, mode, whole, weighted):
    plugin()
    config = peer("verl.workers.config.actor").ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_high=0.28
    )
    config.global_batch_info.update(WHOLE[whole])
    advantages, _, mask, _ = _batch()
    old = -torch.rand(B, T)
    logp = old + 0.5 * torch.randn(B, T)
    weights = torch.rand(B, T) if weighted else None
    found = []
    for name in ("react_fast", "vanilla"):
        x = logp.clone().requires_grad_()
        loss, metrics = verl.algos.get_policy_loss_fn(name)(old, x, advantages, mask, mode, config, weights)
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0], metrics))
    (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = found
    torch.testing.assert_close(loss, their_loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=2e-5, atol=1e-7)
    assert metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-6)


def test_the_registered_loss_refuses_a_rank_that_knows_no_whole(verl, plugin):
    plugin()
    config = types.SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={"dp_size": 2},
        get=lambda name, other: other,
    )  # fmt: skip
    advantages, logp, mask, _ = _batch()
    with pytest.raises(ValueError, match="global_batch_info must hold"):
        verl.algos.get_policy_loss_fn("react_fast")(logp, logp, advantages, mask, "token-mean", config)
    with pytest.raises(ValueError, match=r"response_mask must hold 0 and 1 alone.*vanilla$"):
        verl.algos.get_policy_loss_fn("react_fast")(logp, logp, advantages, 2 * mask, "token-mean", config)
