"""torchrl's TransformersWrapper with its log-probabilities and with ours: numbers, gradients, a whole wrapper."""

import pytest
import torch

import react_fast as rf

from .peers import peer
from .training import make_policy

PLACE = "torchrl.modules.llm.policies.transformers_wrapper"
NAMES = ("_compute_log_probs_from_model_output", "_log_probs_generate")


@pytest.fixture(scope="module")
def methods():
    """(original, ours) of both methods, held where `patch` replaces nothing."""
    wrapper = peer(PLACE).TransformersWrapper
    before = {name: vars(wrapper)[name] for name in NAMES}
    with rf.patch("torchrl"):
        ours = {name: vars(wrapper)[name] for name in NAMES}
    assert all(vars(wrapper)[name] is before[name] for name in NAMES)
    return [(before[name], ours[name]) for name in NAMES]


def _same(functions, call, logits, dtype):
    found = []
    for function in functions:
        logp, moved = call(function)
        weights = torch.linspace(-1, 2, logp.numel()).view_as(logp)
        found.append((logp.detach(), moved, *torch.autograd.grad((logp * weights).sum(), logits)))
        assert logp.dtype == dtype
    # One rounding of the result; of bfloat16 theirs rounds the log-softmax before the token is taken from it.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for theirs, ours in zip(*found, strict=True):
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "steps"), [(1, 2), (4, 33)])
def test_of_a_forward_pass(methods, rows, steps, dtype):
    logits = torch.randn(rows, steps, 300).to(dtype).requires_grad_()
    tokens = torch.randint(300, (rows, steps))
    for attention in (torch.ones(rows, steps), torch.rand(rows, steps) < 0.6, torch.zeros(rows, steps)):
        tokens[attention == 0] = -100
        _same(
            methods[0], lambda f, m=attention: f(None, {"logits": logits}, tokens, m.long(), 0), logits, dtype
        )
    alone = methods[0][1](None, {"logits": logits}, tokens, torch.ones(rows, steps), 0, True)
    assert alone[0] is None
    assert alone[1].shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pad", [-100, 7])
def test_of_generation(methods, dtype, pad):
    logits = torch.randn(40, 300).to(dtype).requires_grad_()
    tokens = torch.randint(300, (40,))
    lengths = (1, 20, 5, 14)

    def call(function):
        return function.__func__(None, tokens.split(lengths), logits.split(lengths), pad)

    _same(methods[1], call, logits, dtype)


@pytest.mark.parametrize("pad_model_input", [True, False])
def test_a_wrapper_scores_the_same(pad_model_input, monkeypatch):
    from tensordict import TensorDict

    from react_fast.integrations import torchrl_logprobs

    place = peer("torchrl.modules.llm")
    model, tokenizer = make_policy(torch.float32)
    rows = [torch.randint(3, 20, (n,)) for n in (9, 4)]
    wrapper = place.TransformersWrapper(
        model, tokenizer=tokenizer, input_mode="tokens", generate=False, return_log_probs=True,
        pad_output=True, pad_model_input=pad_model_input,
    )  # fmt: skip
    full = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(x) for x in rows], batch_first=True, padding_side="left"
    ).bool()
    data = TensorDict({("tokens", "full"): full, ("masks", "all_attention_mask"): mask}, [2])
    wanted = wrapper(data.clone())["log_probs", "full"]
    calls, scored = [], torchrl_logprobs.token_logprobs
    monkeypatch.setattr(
        torchrl_logprobs, "token_logprobs", lambda *a, **k: calls.append(1) or scored(*a, **k)
    )
    with rf.patch("torchrl"):
        calls.clear()
        got = wrapper(data.clone())["log_probs", "full"]
    assert len(calls) == 1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
