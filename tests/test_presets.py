"""Presets: what they hold, that they refuse, and the numbers of TRL's own loss function with the same options."""

from collections import defaultdict
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import react_fast as rf
from react_fast import presets

ROWS, LENGTH = 5, 23
TRL = {
    "grpo": {},
    "bnpo": {"epsilon_high": 0.28, "delta": 1.1},
    "dapo": {"beta": 0.3},
    "dr_grpo": {"beta": 0.2, "use_bias_correction_kl": False},
    "gspo": {"epsilon": 0.05, "epsilon_high": 0.1, "beta": 0.1},
    "cispo": {"epsilon_high": 1.2},
    "sapo": {"sapo_temperature_neg": 1.25, "beta": 0.1},  # TRL keeps temperatures in float32
    "luspo": {"epsilon": 0.05, "delta": 1.05},
    "vespo": {"vespo_k_pos": 1.5, "beta": 0.1},
}
VERL = [
    "ppo", "grpo", "dapo", "gspo", "cispo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dppo_tv", "dppo_kl",
]  # fmt: skip


def _batch():
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logprobs = -draw(ROWS, LENGTH).abs()
    old, ref = logprobs + 0.3 * draw(ROWS, LENGTH), logprobs + 0.5 * draw(ROWS, LENGTH)
    mask = torch.arange(LENGTH) < torch.tensor([23, 17, 5, 1, 20])[:, None]
    return logprobs, old, ref, draw(ROWS), mask


def _trl_loss(name, options, logprobs, old, ref, advantages, mask):
    """GRPOTrainer._compute_loss on a stand-in for the trainer that hands it these log-probs."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is in the extra `bench`")
    config = {f.name: f.default for f in fields(pytest.importorskip("trl").GRPOConfig)}
    config |= {"use_bias_correction_kl": name != "gspo"}
    config |= {k: v for k, v in options.items() if k in config} | {"num_iterations": 1}
    level = "sequence" if name in ("gspo", "luspo") else "token"
    identity = SimpleNamespace(
        gather=lambda x: x, num_processes=1, reduce=lambda x, **_: x, sync_gradients=False
    )
    high = config["epsilon_high"]
    trainer = SimpleNamespace(
        args=SimpleNamespace(**config), accelerator=identity, model=SimpleNamespace(training=False),
        loss_type="grpo" if name == "gspo" else name, importance_sampling_level=level, beta=config["beta"],
        epsilon_low=config["epsilon"], epsilon_high=config["epsilon"] if high is None else high,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, max_completion_length=40,
        vllm_importance_sampling_correction=False, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(old), None),
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


@pytest.mark.parametrize("name", TRL)
def test_trl_presets_give_trls_loss_and_gradient(name):
    """Float64 on both sides; 1e-12 is a thousand roundings."""
    logprobs, old, ref, advantages, mask = _batch()
    options = TRL[name]
    sizes = {"rows": ROWS, "max_completion_length": 40} if name == "dr_grpo" else {}
    preset = getattr(presets.trl, name)(**options, **sizes)
    ours, theirs = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    expected = _trl_loss(name, options, theirs, old, ref, advantages, mask)
    loss = rf.policy_loss(ours, old, advantages, mask, ref_logprobs=ref, **preset).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, v)[0] for x, v in ((loss, ours), (expected, theirs))), rtol=1e-12, atol=1e-13
    )


def test_trl_defaults_are_those_of_its_config():
    config = {f.name: f.default for f in fields(pytest.importorskip("trl").GRPOConfig)}
    for name in ("grpo", "dapo", "sapo", "vespo"):
        given = {"sapo": ("sapo_temperature_pos", "sapo_temperature_neg"), "vespo": (
            "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"
        )}.get(name, ("epsilon", "epsilon_high", "delta"))  # fmt: skip
        options = {key: config[key] for key in (*given, "beta", "use_bias_correction_kl", "scale_rewards")}
        function = getattr(presets.trl, name)
        assert function() == function(**options)
        assert function().advantages == function(**options).advantages


@pytest.mark.parametrize(
    "preset",
    [getattr(presets.verl, name)() for name in VERL]
    + [presets.verl.dro(dro_beta=0.1), presets.verl.dr_grpo(loss_scale_factor=40, global_batch_size=5)]
    + [presets.openrlhf.ppo(kl_use_loss=True, kl_estimator="k3"), presets.openrlhf.gspo(dual_clip=3.0)],
    ids=lambda preset: type(preset["objective"]).__name__,
)
def test_presets_are_arguments_of_both_functions(preset):
    logprobs, old, ref, rewards, mask = _batch()
    advantages = rf.group_advantages(rewards, torch.tensor([0, 0, 1, 1, 2]), **preset.advantages)
    assert (advantages[4] == rewards[4]) == (preset.advantages.get("singleton") == "raw")
    with_reference = {"ref_logprobs": ref} if "kl_coef" in preset else {}
    assert rf.policy_loss(logprobs, old, advantages, mask, **with_reference, **preset).loss.isfinite()


def test_verls_constants():
    """As its 0.9.1 configuration has them."""
    assert presets.verl.grpo() == {
        "objective": rf.PPOClip(0.8, 1.2, dual_clip=3.0), "aggregation": "token_mean", "kl_coef": 0.001,
        "kl_estimator": "k3", "kl_gradient": "value",
    }  # fmt: skip
    straight = presets.verl.grpo(kl_loss_type="low_var_kl+", entropy_coeff=0.01)
    assert (straight["kl_gradient"], straight["entropy_coef"]) == ("k2", 0.01)
    assert presets.verl.dapo()["objective"] == rf.PPOClip(0.8, 1.28, dual_clip=10.0)
    assert presets.verl.ppo(loss_agg_mode="token-sum")["denominator"] == 1
    assert presets.verl.dr_grpo(loss_scale_factor=512, global_batch_size=8).advantages["scale"] == "none"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: presets.trl.dapo(scale_rewards="std"), ValueError, "scale_rewards must be one of 'group'"),
        (lambda: presets.trl.grpo(epsilon=1.5), ValueError, "lower clip range must be in [0, 1], got 1.5"),
        (lambda: presets.trl.dapo(beta=-1.0), ValueError, "KL coefficient must be in [0, inf], got -1"),
        (lambda: presets.trl.dr_grpo(rows=0, max_completion_length=4), ValueError, "rows must be an integer"),
        (lambda: presets.verl.ppo(loss_agg_mode="mean"), ValueError, "loss_agg_mode must be one of 'token-mean'"),
        (lambda: presets.verl.ppo(loss_agg_mode="seq-mean-token-sum-norm"), ValueError, "loss_scale_factor must"),
        (lambda: presets.verl.grpo(kl_loss_type="k4"), ValueError, "kl_loss_type must be one of"),
        (lambda: presets.openrlhf.ppo(advantage_estimator="gae"), ValueError, "advantage_estimator must be"),
        (lambda: presets.openrlhf.ppo(clip=0.2), TypeError, "unexpected keyword argument 'clip'"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
