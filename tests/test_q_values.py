"""Values over a vocabulary: equal the float64 reference, what makes each the value it is, the op contract."""

import pytest
import torch

import react_fast as rf
from react_fast import _core

from . import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One token; below a vector; ragged above one; above the core's piece of 256 with a ragged end.
VOCABULARIES = [1, 5, 37, 531]
NAN, INF = float("nan"), float("inf")


def _tables(rows, vocab, dtype=torch.float32, count=4):
    """[*rows, V] each; a tenth of the first is forbidden, its first token never."""
    tables = [torch.randn(*rows, vocab).mul(3).to(dtype) for _ in range(count)]
    forbidden = torch.rand(*rows, vocab) < 0.1
    forbidden[..., 0] = False
    tables[0] = tables[0].masked_fill(forbidden, -INF)
    return tables


def _constants(q, other, target, target_other, **options):
    """Everything that has no gradient, in one list."""
    return [
        rf.max_q_values(q, **options),
        rf.max_q_values((q, other), **options),
        rf.double_q_values(q, target, **options),
        rf.double_q_values((q, other), (target, target_other), **options),
        rf.expected_q_values(other, q, temperature=0.7, **options),
    ]


def _all(q, other, target, target_other, **options):
    prior = target.log_softmax(-1)
    return [
        *_constants(q, other, target, target_other, **options),
        rf.soft_values(q, alpha=0.8, **options),
        rf.soft_values(q, alpha=0.8, prior_logprobs=prior, **options),
    ]


def _wide(tables):
    return [x.double() for x in tables]


def _assert_close(found, expected, dtype):
    # Sums of weights that add up to 1 (or their logarithm) over values below 20; exponentials to 1.3e-7.
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e, rtol=0, atol=20 * 8 * contract.EPS[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_equals_float64_reference(backend, vocab, dtype):
    tables, mask = _tables((2, 3), vocab, dtype), torch.rand(2, 3) > 0.3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for options in ({}, {"mask": mask}):
        with rf.use_backend("reference"):
            prior = tables[2].log_softmax(-1)  # as rounded as the op sees it
            expected = _all(*_wide(tables), **options)
            soft = rf.soft_values(tables[0].double(), alpha=0.8, prior_logprobs=prior.double(), **options)
        _assert_close(_all(*tables, **options), [*expected[:-1], soft], wide)
    with rf.use_backend("reference"):
        logits = rf.guided_logits(
            tables[1].double(), tables[0].double(), tables[2][..., 0].double(), beta=0.3
        )
    found = rf.guided_logits(tables[1], tables[0], tables[2][..., 0], beta=0.3)
    _assert_close([found], [logits], wide)


def test_every_instruction_set_agrees(isa):
    tables = _tables((4,), 531)
    with rf.use_backend("reference"):
        expected = _all(*_wide(tables))
    _assert_close(_all(*tables), expected, torch.float32)
    assert _core.isa() == isa


def test_a_long_row(backend):
    """More than the Triton block of 4096."""
    tables = _tables((2,), 4100)
    tables[0][0, 4097] = 15.0
    with rf.use_backend("reference"):
        expected = _all(*_wide(tables))
    _assert_close(_all(*tables), expected, torch.float32)


# ---- the best token --------------------------------------------------------------------------------------------


def test_double_q_evaluates_the_chosen_token(backend):
    """The online network chooses, the target evaluates; with one network for both it is the maximum."""
    online, _, target, other = _tables((3, 4), 37, torch.float64)
    chosen = online.argmax(-1, keepdim=True)
    found = rf.double_q_values(online, (target, other))
    expected = torch.minimum(target.gather(-1, chosen), other.gather(-1, chosen)).squeeze(-1)
    contract.assert_bitwise(found, expected)
    contract.assert_bitwise(rf.double_q_values(online, online), rf.max_q_values(online))
    contract.assert_bitwise(rf.max_q_values(online), online.amax(-1))
    both = torch.minimum(target, other)
    contract.assert_bitwise(rf.max_q_values((target, other)), both.amax(-1))
    picked = rf.double_q_values((target, other), online)
    contract.assert_bitwise(picked, online.gather(-1, both.argmax(-1, keepdim=True)).squeeze(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_token(backend, dtype):
    """Equal maxima in one vector, in several, and beyond a piece of the row; -0 is 0."""
    for at in ([3, 4], [20, 300], [0, 530], [255, 256, 257]):
        q = torch.full((1, 531), -1.0).to(dtype)
        q[0, at] = 2.0
        target = torch.arange(531, dtype=dtype)[None]
        assert float(rf.double_q_values(q, target)) == float(target[0, at[0]])
    zeros = torch.tensor([[-1.0, -0.0, 0.0]]).to(dtype)
    assert float(rf.double_q_values(zeros, torch.arange(3.0).to(dtype)[None])) == 1.0


def test_forbidden_tokens_and_unordered_rows(backend):
    q = torch.tensor([[-INF, 1.0, -INF], [-INF] * 3, [NAN, 1.0, 2.0], [1.0, INF, 2.0]])
    other = torch.tensor([[5.0, 6.0, 7.0]]).expand(4, 3)
    torch.testing.assert_close(rf.max_q_values(q), torch.tensor([1.0, -INF, NAN, INF]), equal_nan=True)
    found = rf.double_q_values(q, other)
    torch.testing.assert_close(found, torch.tensor([6.0, -INF, NAN, 6.0]), equal_nan=True)
    # A NaN of either head counts, wherever it stands.
    for place in (0, 300, 530):
        clean, dirty = torch.zeros(1, 531), torch.zeros(1, 531)
        dirty[0, place] = NAN
        assert rf.max_q_values((clean, dirty)).isnan().all()
        assert rf.max_q_values((dirty, clean)).isnan().all()
        assert rf.max_q_values(dirty).isnan().all()


# ---- means and soft maxima -------------------------------------------------------------------------------------


def test_expected_values(backend):
    """A uniform policy's mean, a greedy one's choice, and no look at the Q of tokens it forbids."""
    q, logits = torch.randn(3, 37, dtype=torch.float64), torch.randn(3, 37, dtype=torch.float64)
    uniform = rf.expected_q_values(q, torch.zeros_like(q))
    torch.testing.assert_close(uniform, q.mean(-1), rtol=1e-12, atol=1e-12)
    greedy = rf.expected_q_values(q, logits, temperature=1e-9)
    torch.testing.assert_close(greedy, rf.double_q_values(logits, q), rtol=0, atol=0)
    sharp = (logits / 0.5).softmax(-1)
    found = rf.expected_q_values(q, logits, temperature=0.5)
    torch.testing.assert_close(found, (sharp * q).sum(-1), rtol=1e-12, atol=1e-12)
    forbidden = torch.rand(3, 37) < 0.3
    forbidden[:, 0] = False
    closed = logits.masked_fill(forbidden, -INF)
    expected = (closed.softmax(-1) * q).sum(-1)
    for poison in (NAN, INF, -INF):
        found = rf.expected_q_values(q.masked_fill(forbidden, poison), closed)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # A token whose probability turns out to be 0, an inf Q before the logit that shows it.
    for x in (torch.float32, torch.float64):
        late = torch.zeros(1, 600, dtype=x)
        late[0, 599] = 5000.0
        value = torch.ones(1, 600, dtype=x)
        value[0, 3] = INF
        assert float(rf.expected_q_values(value, late)) == 1.0
    nothing = torch.full((1, 5), -INF)
    assert float(rf.expected_q_values(torch.ones(1, 5), nothing)) == -INF
    unordered = torch.tensor([[0.0, NAN], [INF, 0.0]])
    assert rf.expected_q_values(torch.ones(2, 2), unordered).isnan().all()


def test_soft_values(backend):
    """alpha log-sum-exp: the value of softmax(q / alpha) with its entropy, the maximum as alpha -> 0."""
    (q,) = _tables((3, 4), 37, torch.float64, 1)
    alpha = 0.6
    v = rf.soft_values(q, alpha=alpha)
    p = (q / alpha).softmax(-1)
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    mean = rf.expected_q_values(q, q, temperature=alpha)
    torch.testing.assert_close(v, mean + alpha * entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rf.soft_values(q, alpha=1e-12), q.amax(-1), rtol=0, atol=1e-9)
    ids = torch.zeros(3, 4, dtype=torch.int64)
    logp = rf.token_logprobs(q, ids, temperature=alpha)
    torch.testing.assert_close(alpha * logp, q[..., 0] - v, rtol=1e-12, atol=1e-12)
    # A prior that is uniform over V tokens takes alpha log V away.
    uniform = torch.full_like(q, 1 / 37).log()
    moved = rf.soft_values(q, alpha=alpha, prior_logprobs=uniform)
    torch.testing.assert_close(moved, v + alpha * uniform[..., 0], rtol=1e-12, atol=1e-12)
    hidden = rf.soft_values(q, alpha=alpha, prior_logprobs=uniform.masked_fill(q > 0, -INF))
    expected = rf.soft_values(q.masked_fill(q > 0, -INF), alpha=alpha) + alpha * uniform[..., 0]
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    assert float(rf.soft_values(torch.full((1, 5), -INF), alpha=1.0)) == -INF


def test_soft_gradients(backend):
    """softmax(q / alpha), 0 where forbidden, masked or without an allowed token; the prior's is alpha times it."""
    (q,) = _tables((2, 3), 11, torch.float64, 1)
    q[1, 1] = -INF
    mask = torch.rand(2, 3) > 0.3
    mask[1, 1] = True
    q = torch.where(mask[..., None], q, NAN).requires_grad_()
    prior = torch.randn(2, 3, 11, dtype=torch.float64).log_softmax(-1).requires_grad_()
    upstream = torch.randn(2, 3, dtype=torch.float64)
    for given in (None, prior):
        v = rf.soft_values(q, alpha=0.6, prior_logprobs=given, mask=mask)
        leaves = [q] if given is None else [q, prior]
        grads = torch.autograd.grad(v, leaves, upstream)
        z = q.detach() / 0.6 + (0 if given is None else prior.detach())
        p = torch.where(
            mask[..., None] & (q.detach().amax(-1) > -INF)[..., None], z.softmax(-1), 0.0
        ).nan_to_num()
        for grad, scale in zip(grads, (1.0, 0.6), strict=False):
            torch.testing.assert_close(grad, scale * upstream[..., None] * p, rtol=1e-12, atol=1e-12)


def test_soft_gradcheck(backend):
    q, prior = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    mask = torch.tensor([True, False])
    contract.assert_gradcheck(lambda x: rf.soft_values(x, alpha=0.7, mask=mask), q)
    contract.assert_gradcheck(lambda x, y: rf.soft_values(x, alpha=0.7, prior_logprobs=y), q, prior)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_gradient_in_the_dtype_of_q(backend, dtype):
    (q,) = _tables((2, 3), 531, dtype, 1)
    wide = q.double().requires_grad_()
    q.requires_grad_()
    upstream = torch.randn(2, 3)
    v = rf.soft_values(q, alpha=0.6)
    (grad,) = torch.autograd.grad(v, q, upstream.to(v.dtype))
    (expected,) = torch.autograd.grad(0.6 * torch.logsumexp(wide / 0.6, -1), wide, upstream.double())
    assert grad.dtype == dtype
    # Probabilities below 1 times an upstream below 4, one rounding to dtype, exponents of size 30 in float32.
    wide_eps = contract.EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    assert float((grad.double() - expected).abs().max()) <= 4 * (contract.EPS[dtype] + 60 * wide_eps)


# ---- guidance --------------------------------------------------------------------------------------------------


def test_guided_logits_decode_the_papers_policy(backend):
    """pi exp(beta (min Q - V)), normalised, whatever V is; what logits or Q forbid stays forbidden."""
    logits, q, other = _tables((3,), 37, torch.float64, 3)
    v = torch.randn(3, dtype=torch.float64)
    found = rf.guided_logits(logits, (q, other), v, beta=1.7)
    policy = logits.softmax(-1) * torch.exp(1.7 * (torch.minimum(q, other) - v[:, None]))
    torch.testing.assert_close(
        found.softmax(-1), policy / policy.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        rf.guided_logits(logits, (q, other), beta=1.7).softmax(-1), found.softmax(-1), rtol=1e-12, atol=1e-12
    )
    contract.assert_bitwise(rf.guided_logits(logits, q, v, beta=0.0), logits)
    x = torch.tensor([[0.0, -INF, 1.0]])
    poisoned = torch.tensor([[-INF, NAN, 2.0]])
    for beta in (0.0, 0.5):
        expected = torch.tensor([[-INF, -INF, 1.0 + 2.0 * beta]])
        contract.assert_bitwise(rf.guided_logits(x, poisoned, beta=beta), expected)


# ---- the rest of the contract ----------------------------------------------------------------------------------


def test_masked_rows_touch_nothing(backend):
    tables, mask = _tables((4, 5), 37), torch.rand(4, 5) > 0.4
    expected = _all(*tables, mask=mask)
    for poison in (NAN, INF, 1e30):
        dirty = [torch.where(mask[..., None], x, poison) for x in tables]
        for a, e in zip(_constants(*dirty, mask=mask), expected[:5], strict=True):
            contract.assert_bitwise(a, e)
            assert bool((a[~mask] == 0).all())
        contract.assert_bitwise(rf.soft_values(dirty[0], alpha=0.8, mask=mask), expected[5])
        prior = torch.where(mask[..., None], tables[2].log_softmax(-1), poison)
        found = rf.soft_values(dirty[0], alpha=0.8, prior_logprobs=prior, mask=mask)
        contract.assert_bitwise(found, expected[6])


def test_a_row_does_not_depend_on_the_others(backend):
    tables = _tables((3, 4), 37)
    together = [x.flatten() for x in _all(*tables)]
    for i in (0, 5, 11):
        alone = _all(*[x.view(12, 37)[i] for x in tables])
        for t, a in zip(together, alone, strict=True):
            contract.assert_bitwise(t[i], a)


def test_any_strides_and_threads(backend):
    tables = _tables((3, 4), 37)
    views = {
        "transposed rows": [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tables],
        "every other token": [torch.stack([x, x], -1)[..., 0] for x in tables],
        "shifted by one": [torch.cat([x[..., :1], x], -1)[..., 1:] for x in tables],
    }
    expected = [*_all(*tables), rf.guided_logits(tables[1], tables[0], beta=0.5)]
    for moved in views.values():
        found = [*_all(*moved), rf.guided_logits(moved[1], moved[0], beta=0.5)]
        for a, e in zip(found, expected, strict=True):
            contract.assert_bitwise(a, e)
    broadcast = rf.double_q_values(tables[0], tables[2][:1].expand(3, 4, 37))
    contract.assert_bitwise(broadcast, rf.double_q_values(tables[0], tables[2][:1].repeat(3, 1, 1)))
    if backend == "cpu":
        large = _tables((60, 5), 531)
        contract.assert_threads_agree(lambda: torch.stack(_all(*large)))
        contract.assert_threads_agree(lambda: rf.guided_logits(large[1], large[0], beta=0.5))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0, 0)], ids=str)
def test_empty(backend, shape):
    q = torch.randn(shape, requires_grad=True)
    for found in _constants(q, q, q, q):
        assert found.shape == shape[:-1]
        assert not found.requires_grad
        assert bool((found == -INF).all())  # no token at all
    v = rf.soft_values(q, alpha=1.0)
    assert bool((v == -INF).all())
    v.sum().backward()
    assert q.grad.shape == shape
    assert rf.guided_logits(q, q, beta=1.0).shape == shape


def test_targets_receive_no_gradient(backend):
    tables = [x.requires_grad_() for x in _tables((2,), 5)]
    for chosen in (backend, "reference"):
        with rf.use_backend(chosen):
            assert not any(x.requires_grad for x in _constants(*tables))
            assert not rf.guided_logits(tables[0], tables[1], beta=1.0).requires_grad


def test_compiles_opcheck_meta_autocast_and_inference(backend):
    q, other, target, target_other = _tables((2, 3), 7)
    mask = torch.rand(2, 3) > 0.3
    leaf = q.clone().requires_grad_()
    contract.assert_compiles(lambda x: rf.soft_values(x, alpha=0.5, mask=mask), leaf)
    contract.assert_compiles(
        lambda *x: torch.stack(_constants(*x, mask=mask)), q, other, target, target_other
    )
    contract.assert_compiles(lambda x, y: rf.guided_logits(x, y, beta=0.5), q, other)
    contract.assert_opcheck("best_values", q, other, target, None, mask)
    contract.assert_opcheck("best_values", q, None, None, None, None)
    contract.assert_opcheck("expected_values", q, other, mask, 0.5)
    contract.assert_opcheck("soft_values", leaf, mask, 0.5)
    contract.assert_opcheck("guided_logits", q, other, target, None, 0.5)
    meta = [x.to("meta").bfloat16() for x in (q, other, target, target_other)]
    for found in _all(*meta):
        assert (found.shape, found.dtype, found.device.type) == ((2, 3), torch.float32, "meta")
    expected = _all(q, other, target, target_other)
    with torch.autocast("cpu", torch.bfloat16):
        prior = _all(q, other, target, target_other)
    with torch.inference_mode():
        for a, b, e in zip(prior, _all(q, other, target, target_other), expected, strict=True):
            contract.assert_bitwise(a, e)
            contract.assert_bitwise(b, e)


def test_pairs_are_two_alike(backend):
    q = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^q must be a tensor or a pair of two, got 3"):
        rf.max_q_values((q, q, q))
    with pytest.raises(ValueError, match=r"^q\[1\] must be \[2, 3\] like q\[0\], got \[2, 4\]"):
        rf.max_q_values((q, torch.zeros(2, 4)))
    with pytest.raises(TypeError, match=r"^q_target\[1\] must be float32 like q_online, got float64"):
        rf.double_q_values(q, (q, q.double()))
    with pytest.raises(ValueError, match=r"^q must be \[\.\.\., V\], got a scalar"):
        rf.max_q_values(torch.zeros(()))
