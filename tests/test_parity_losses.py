"""Policy losses, KL terms, importance weights and the value loss beside other libraries' own functions.

`presets` holds names and defaults; TRL's and Liger's losses are in test_presets.py and test_objectives_peers.py.
Float64 on both sides; 1e-11 is some ten thousand roundings.
"""

import pytest
import torch

import react_fast as rf
from react_fast import presets

from .peers import openrlhf, peer

B, T = 6, 17


def _batch(spread=0.3):
    logprobs = -torch.randn(B, T, dtype=torch.float64).abs()
    old, ref = (logprobs + s * torch.randn(B, T, dtype=torch.float64) for s in (spread, 0.5))
    mask = torch.arange(T) < torch.tensor([T, 12, 7, 1, 15, 3])[:, None]
    mask[0, 3:6] = False
    return logprobs, old, ref, torch.randn(B, 1, dtype=torch.float64).expand(B, T).contiguous(), mask


def _same(ours, theirs, logprobs, tolerance=1e-11):
    """Values and gradients of two functions of the log-probs."""
    results = []
    for function in (ours, theirs):
        x = logprobs.clone().requires_grad_()
        loss = function(x)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---- verl ---------------------------------------------------------------------------------------------------

# loss_mode -> (preset, the actor's options that differ from its config's defaults)
VERL = {
    "vanilla": ("ppo", {"clip_ratio_high": 0.28}),
    "gspo": ("gspo", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}),
    "sapo": ("sapo", {}),
    "gpg": ("gpg", {}),
    "kl_cov": ("kl_cov", {}),
    "geo_mean": ("geo_mean", {}),
    "cispo": ("cispo", {}),
    "dppo_tv": ("dppo_tv", {"clip_ratio_c": 20.0, "clip_ratio_low": 0.1}),
    "dppo_kl": ("dppo_kl", {"clip_ratio_c": 20.0, "clip_ratio_low": 0.05, "clip_ratio_high": 0.05}),
    "dro": ("dro", {}),
}
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def _verl_config(mode, **options):
    configs = peer("verl.workers.config.actor")
    policy = configs.PolicyLossConfig(loss_mode=mode, dro_beta=0.1 if mode == "dro" else None)
    return configs.ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy, **options
    )  # fmt: skip


@pytest.mark.parametrize("mode", VERL)
def test_verl_policy_losses(mode):
    name, options = VERL[mode]
    loss_of = peer("verl.trainer.ppo.core_algos").get_policy_loss_fn(mode)
    logprobs, old, _, advantages, mask = _batch()
    config = _verl_config(mode, **options)
    passed = {k: v for k, v in options.items() if not (mode == "gspo" and k == "clip_ratio_c")}
    preset = getattr(presets.verl, name)(**passed, **({"dro_beta": 0.1} if mode == "dro" else {}))
    aggregation = {"seq_mean_token_mean": "seq-mean-token-mean"}.get(preset["aggregation"], "token-mean")
    _same(
        lambda x: rf.policy_loss(x, old, advantages, mask, **preset).loss,
        lambda x: loss_of(old, x, advantages, mask.double(), aggregation, config)[0],
        logprobs,
        1e-7,  # verl divides its means by n + 1e-8
    )


def test_verl_clip_cov():
    """A fraction of 1 takes all that are eligible, so that nothing is drawn."""
    verl = peer("verl.trainer.ppo.core_algos")
    logprobs, old, _, advantages, mask = _batch()
    config = _verl_config("clip_cov")
    for name, value in (("clip_cov_ratio", 1.0), ("clip_cov_lb", 0.3), ("clip_cov_ub", 5.0)):
        object.__setattr__(config.policy_loss, name, value)
    preset = presets.verl.clip_cov(clip_cov_ratio=1.0, clip_cov_lb=0.3)
    loss = rf.policy_loss(logprobs, old, advantages, mask, **preset).loss
    assert loss != rf.policy_loss(logprobs, old, advantages, mask).loss
    _same(
        lambda x: rf.policy_loss(x, old, advantages, mask, **preset).loss,
        lambda x: verl.compute_policy_loss_clip_cov(old, x, advantages, mask.double(), "token-mean", config)[
            0
        ],
        logprobs,
        1e-7,
    )


@pytest.mark.parametrize("aggregation", MODES)
def test_verl_aggregations(aggregation):
    verl = peer("verl.trainer.ppo.core_algos")
    logprobs, old, _, advantages, mask = _batch()
    scale = {"loss_scale_factor": 40} if aggregation.endswith("norm") else {}
    size = {"global_batch_size": B} if scale else {}
    preset = presets.verl.ppo(loss_agg_mode=aggregation, **scale, **size)
    config = _verl_config("vanilla")
    config.global_batch_info.update(scale)
    _same(
        lambda x: rf.policy_loss(x, old, advantages, mask, **preset).loss,
        lambda x: verl.compute_policy_loss_vanilla(old, x, advantages, mask.double(), aggregation, config)[0],
        logprobs,
        1e-7,
    )


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "low_var_kl", "kl+", "abs+", "low_var_kl+"])
def test_verl_kl(kind):
    """As written, or with "+" the straight-through gradient of k2."""
    verl = peer("verl.trainer.ppo.core_algos")
    logprobs, _, ref, _, mask = _batch()
    preset = presets.verl.ppo(use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type=kind)
    nothing = torch.zeros(B, T, dtype=torch.float64)
    _same(
        lambda x: rf.policy_loss(x, None, nothing, mask, ref_logprobs=ref, **preset).loss,
        lambda x: verl.agg_loss(verl.kl_penalty(x, ref, kind), mask.double(), "token-mean"),
        logprobs,
        1e-7,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_verl_rollout_weights(level):
    """rollout_is with one threshold truncates from above."""
    helper = peer("verl.trainer.ppo.rollout_corr_helper")
    logprobs, behavior, _, _, mask = _batch()
    theirs, _ = helper.compute_rollout_correction_weights(
        logprobs - behavior, mask.double(), rollout_is=level, rollout_is_threshold=1.5
    )
    found, _ = rf.importance_weights(logprobs, behavior, mask, level=level, low=0.0, high=1.5)
    torch.testing.assert_close(found[mask], theirs[mask], rtol=1e-11, atol=1e-11)


def test_value_losses():
    clip = 0.2
    values, old, returns, _, mask = _batch()
    found = lambda x: rf.value_loss(x, old, returns, mask, clip=clip)  # noqa: E731
    theirs = openrlhf(
        masked_mean="models/utils.py", aggregate_loss="models/loss.py", ValueLoss="models/loss.py"
    )
    _same(found, lambda x: theirs.ValueLoss(clip_eps=clip)(x, old, returns, mask.double()), values)
    verl = peer("verl.trainer.ppo.core_algos")
    _same(
        found,
        lambda x: verl.compute_value_loss(x, returns, old, mask.double(), clip, "token-mean")[0],
        values,
        1e-7,
    )


# ---- OpenRLHF -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_openrlhf_policy_loss(kind, dual_clip):
    theirs = openrlhf(
        masked_mean="models/utils.py", aggregate_loss="models/loss.py", PolicyLoss="models/loss.py"
    )
    logprobs, old, _, advantages, mask = _batch()
    preset = getattr(presets.openrlhf, kind)(eps_clip_low_high=(0.1, 0.2), dual_clip=dual_clip)
    loss = theirs.PolicyLoss(0.1, 0.2, dual_clip, policy_loss_type=kind)
    _same(
        lambda x: rf.policy_loss(x, old, advantages, mask, **preset).loss,
        lambda x: loss(x, old, advantages, mask.double())[0],
        logprobs,
        1e-8,  # its mean over a sequence divides by n + 1e-8
    )


@pytest.mark.parametrize(("level", "mode"), [("token", "clip"), ("token", "mask"), ("seq", "mask")])
def test_openrlhf_sampler_correction(level, mode):
    theirs = openrlhf(
        masked_mean="models/utils.py", aggregate_loss="models/loss.py", PolicyLoss="models/loss.py"
    )
    logprobs, old, sampled, advantages, mask = _batch()
    loss = theirs.PolicyLoss(
        is_correction_level=level, is_correction_mode=mode, is_correction_threshold=[0.7, 1.4]
    )
    bounds = {"mode": "truncate" if mode == "clip" else "mask", "low": 0.7, "high": 1.4}
    bounds |= {"bound_level": "geometric"} if level == "seq" else {}
    weights, _ = rf.importance_weights(old, sampled, mask, **bounds)
    _same(
        lambda x: rf.policy_loss(x, old, advantages, mask, importance=weights, **presets.openrlhf.ppo()).loss,
        lambda x: loss(x, old, advantages, mask.double(), sampled)[0],
        logprobs,
        1e-8,
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_openrlhf_kl(kind):
    theirs = openrlhf(compute_approx_kl="models/utils.py")
    logprobs, _, ref, _, mask = _batch()
    nothing = torch.zeros(B, T, dtype=torch.float64)
    preset = presets.openrlhf.ppo(kl_use_loss=True, kl_init_coef=1.0, kl_estimator=kind)
    # OpenRLHF computes it in float32.
    _same(
        lambda x: rf.policy_loss(x, None, nothing, mask, ref_logprobs=ref, **preset).loss,
        lambda x: theirs.compute_approx_kl(x, ref, kl_estimator=kind)[mask].double().mean(),
        logprobs,
        2e-6,
    )


def test_openrlhf_reward_with_kl():
    """The score at the last counting token; OpenRLHF leaves the penalty on masked tokens, 0 here."""
    theirs = openrlhf(compute_reward="models/utils.py")
    logprobs, _, ref, _, mask = _batch()
    scores = torch.randn(B, dtype=torch.float64)
    expected = theirs.compute_reward(scores, 0.1, logprobs - ref, mask)
    found, _ = rf.kl_rewards(scores, logprobs, ref, mask, kl_coef=0.1, estimator="k1")
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-12, atol=1e-12)
    assert bool((found[~mask] == 0).all())
    assert bool((expected[~mask] != 0).any())
