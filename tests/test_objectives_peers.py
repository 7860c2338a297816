"""The same numbers as Liger's and TRL's own functions, where they are installed (the `bench` extra).

Where the same name means other numbers, the docstrings say which arguments give theirs; these tests use them.
"""

import pytest
import torch

import react_fast as rf
from react_fast import CISPO, GSPO, LUSPO, SAPO, VESPO, PPOClip

ROWS, LENGTH = 5, 23


def _batch():
    logprobs = (-3 * torch.rand(ROWS, LENGTH)).double()
    old, ref = (logprobs + s * torch.randn(ROWS, LENGTH) for s in (0.3, 0.5))
    mask = torch.arange(LENGTH) < torch.tensor([23, 17, 5, 1, 20])[:, None]
    return logprobs, old, ref, torch.randn(ROWS).double(), mask, torch.rand(ROWS, LENGTH).double() + 0.5


TOKENS, ROW_MEANS = {"aggregation": "token_mean"}, {"aggregation": "seq_mean_token_mean"}
# Liger's loss_type and options, and what gives the same here.
LIGER = {
    "dapo": ({"loss_type": "dapo"}, {"objective": PPOClip(), **TOKENS}),
    "bnpo, two-sided": (
        {"loss_type": "bnpo", "delta": 1.1, "epsilon_high": 0.28},
        {"objective": PPOClip(0.8, 1.28, ratio_cap=1.1), **TOKENS},
    ),
    "grpo": ({"loss_type": "grpo"}, {"objective": PPOClip(), **ROW_MEANS}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "max_completion_length": 40},
        {"objective": PPOClip(), "aggregation": "token_sum_norm", "denominator": ROWS * 40},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, {"objective": CISPO(ratio_max=1.2), **TOKENS}),
    "sapo": ({"loss_type": "sapo"}, {"objective": SAPO(), **ROW_MEANS}),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.05,
            "epsilon_high": 0.1,
        },
        {"objective": GSPO(0.95, 1.1), **ROW_MEANS},
    ),
    "luspo": (
        {
            "loss_type": "luspo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.05,
            "epsilon_high": 0.1,
        },
        {"objective": LUSPO(0.95, 1.1), **ROW_MEANS},
    ),
    "vespo": ({"loss_type": "vespo"}, {"objective": VESPO(), **TOKENS}),
}


# Liger's row-level losses weight the KL with the row's ratio, or sum it over the padded row: another definition.
WITH_KL = [(case, kl) for case in LIGER if case not in ("gspo", "luspo") for kl in ("value", "ratio")]


@pytest.mark.parametrize(("case", "kl"), [*((case, None) for case in LIGER), *WITH_KL])
@pytest.mark.parametrize("weighted", [False, True])
def test_liger(case, weighted, kl):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel is not installed")
    theirs, ours = LIGER[case]
    logprobs, old, ref, A, mask, weights = _batch()
    importance = weights if weighted else None
    if weighted and case == "luspo":
        importance = weights[:, :1].expand_as(weights).contiguous()  # one a row keeps Liger's loss at [B, 1]
    theirs_weights = None
    if weighted:
        theirs_weights = weights[:, :1] if case == "luspo" else torch.where(mask, weights, 1.0)
    x = logprobs.clone().requires_grad_()
    expected, _ = liger.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        x, mask, A, mask, ref_per_token_logps=ref, old_per_token_logps=old, beta=0.0 if kl is None else 0.1,
        use_bias_correction_kl=kl == "ratio", vllm_is_ratio=theirs_weights, **theirs,
    )  # fmt: skip
    (slopes,) = torch.autograd.grad(expected, x)
    x = logprobs.clone().requires_grad_()
    terms = {} if kl is None else {"ref_logprobs": ref, "kl_coef": 0.1, "kl_gradient": kl}
    loss = rf.policy_loss(x, old, A, mask, importance=importance, **terms, **ours).loss
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], slopes, rtol=1e-11, atol=1e-13)


def test_trl_off_policy_mask():
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
    logprobs, old, _, A, mask, _ = _batch()
    for threshold in (0.0, 0.05, 0.2):
        expected = trl.GRPOTrainer.get_off_policy_mask(A[:, None], logprobs, old, mask, threshold)
        kept = rf.off_policy_mask(logprobs, old, A, mask, threshold=threshold)
        assert bool((kept == (expected & mask)).all())
