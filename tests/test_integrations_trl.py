"""TRL's own functions beside what `patch("trl")` puts in their place: numbers and gradients."""

import types

import pytest
import torch

import react_fast as rf

from .peers import peer

ROWS, WIDTH, VOCAB = 7, 12, 37
NAMES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ALL = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.fixture(scope="module")
def utils():
    return peer("trl.trainer.utils")


def _functions(utils):
    """In a namespace, since globals of this module would be replaced, too."""
    names = ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits")
    return types.SimpleNamespace(
        head=utils._ChunkedLogProbFunction, **{name: getattr(utils, name) for name in names}
    )


@pytest.fixture(scope="module")
def originals(utils):
    return _functions(utils)


@pytest.fixture(scope="module")
def replacements(utils):
    before = torch.get_rng_state()
    with rf.patch("trl"):
        assert torch.equal(torch.get_rng_state(), before)  # what a user draws next is what it was
        return _functions(utils)


def _inputs(dtype=torch.float32, bias=False, rows=ROWS, wanted=("hidden", "weight", "bias")):
    given = {"hidden": torch.randn(rows, WIDTH), "weight": torch.randn(VOCAB, WIDTH) * 0.5}
    given["bias"] = torch.randn(VOCAB) if bias else None
    given = {
        name: None if x is None else x.to(dtype).requires_grad_(name in wanted) for name, x in given.items()
    }
    return given, torch.randint(0, VOCAB, (rows,))


def _head(function, given, ids, temperature=1.0, softcap=None, scale=1.0, outputs=ALL, chunk=16):
    """Outputs by name, and gradients of a random combination of logp and entropy."""
    parts = function.apply(*given.values(), ids, temperature, chunk, softcap, scale, outputs)
    found = {name: x for name, x in zip(NAMES, parts, strict=True) if x is not None}
    live = {name: x for name, x in given.items() if x is not None and x.requires_grad}
    if live:
        weights = torch.randn(2, len(ids), generator=torch.Generator().manual_seed(4))
        loss = sum((w * found[name]).sum() for w, name in zip(weights, NAMES, strict=False) if name in found)
        pulled = torch.autograd.grad(loss, list(live.values()))
        found |= {f"d {name}": x for name, x in zip(live, pulled, strict=True)}
    return found


def _assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype, name
        if wanted.dtype == torch.bool:
            assert torch.equal(ours[name], wanted), name
            continue
        scale = float(wanted.detach().abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=tolerance * max(scale, 1e-6), msg=name)


OPTIONS = {
    "plain": {},
    "log-probabilities alone": {"outputs": ("log_probs",)},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 1.5, "temperature": 1.4, "outputs": ("log_probs", "entropy", "is_top1")},
    "scale": {"scale": 0.3, "temperature": 0.8},
    "negative scale": {"scale": -0.3},
    "chunk beyond the vocabulary": {"chunk": 32768},
}


def test_head_on_the_kernels_of_a_gpu(replacements, originals):
    """In Triton's interpreter: the top token is told from what the kernels leave, too."""
    given, ids = _inputs(bias=True)
    ids[:3] = (given["hidden"] @ given["weight"].T + given["bias"]).argmax(1)[:3]
    theirs = _head(originals.head, given, ids, 0.7)
    with rf.use_backend("triton"):
        ours = _head(replacements.head, given, ids, 0.7)
    _assert_same(ours, theirs, 2e-6)
    assert ours["is_top1"].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_head_gives_trl_s_numbers_and_gradients(replacements, originals, option, bias):
    given, ids = _inputs(bias=bias)
    ours, theirs = (_head(f, given, ids, **OPTIONS[option]) for f in (replacements.head, originals.head))
    _assert_same(ours, theirs, 2e-6)  # sums of some tens of float32 numbers


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("hidden", "bias"), ()])
def test_head_with_frozen_parts(replacements, originals, wanted):
    given, ids = _inputs(bias=True, wanted=wanted)
    ours, theirs = (_head(f, given, ids, 0.7) for f in (replacements.head, originals.head))
    _assert_same(ours, theirs, 2e-6)


def test_head_in_half_precision_and_under_autocast(replacements, originals):
    given, ids = _inputs(torch.bfloat16)
    functions = replacements.head, originals.head
    ours, theirs = (_head(f, given, ids, 0.7) for f in functions)
    _assert_same(ours, theirs, 0.03)  # bfloat16 has 8 bits; both round the logits' tile to it
    given, ids = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (_head(f, given, ids, 0.7) for f in functions)
    _assert_same(ours, theirs, 0.03)
    # cast_lm_head_to_fp32: float32 hidden states meet a bfloat16 matrix.
    given["weight"] = given["weight"].detach().bfloat16().requires_grad_()
    ours, theirs = (_head(f, given, ids, 0.7) for f in functions)
    rounded = [{"d weight": found.pop("d weight")} for found in (ours, theirs)]
    _assert_same(*rounded, 0.01)  # to bfloat16 at the end
    _assert_same(ours, theirs, 2e-6)


def test_head_without_rows_keeps_the_graph(replacements, originals):
    given, ids = _inputs(rows=0)
    ours, theirs = (_head(f, given, ids) for f in (replacements.head, originals.head))
    _assert_same(ours, theirs, 0)


def test_a_penalty_on_the_gradient_is_refused_in_one_line(replacements):
    given, ids = _inputs()
    logp = replacements.head.apply(*given.values(), ids, 1.0, 16, None, 1.0, ALL)[0]
    (slope,) = torch.autograd.grad(logp.sum(), given["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^a fused head of react_fast can be differentiated once; .*$"):
        slope.square().sum().backward()


def test_the_first_of_equal_logits_is_the_top(replacements, originals):
    given, _ = _inputs()
    weight = given["weight"].detach().clone()
    weight[5] = weight[20] = weight[31]  # some rows have them on top
    hidden = given["hidden"].detach()
    hidden[:3] = weight[5] * 3
    for scale, softcap in ((1.0, None), (0.5, 0.01), (-1.0, None)):  # a small cap makes most logits equal
        for target in (5, 20, 31):
            ids = torch.full((ROWS,), target)
            found = [
                f.apply(hidden, weight, None, ids, 0.7, 16, softcap, scale, ("is_top1",))[4]
                for f in (replacements.head, originals.head)
            ]
            assert torch.equal(*found)


def test_what_ours_does_not_give_comes_from_the_original(replacements, originals):
    given, ids = _inputs()
    for options in ({"outputs": NAMES}, {"outputs": ALL, "softcap": 2.0}):
        ours, theirs = (_head(f, given, ids, **options) for f in (replacements.head, originals.head))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with rf.use_backend("reference"):
        ours, theirs = (_head(f, given, ids) for f in (replacements.head, originals.head))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_temperature_that_is_a_tensor_stays_trl_s(replacements, originals):
    logits, ids = torch.randn(2, ROWS, VOCAB), torch.randint(0, VOCAB, (2, ROWS))
    given, targets = _inputs()
    for temperature in (torch.tensor(0.7), torch.tensor(1.5)):
        found, wanted = (
            (
                f.selective_log_softmax(logits, ids, temperature=temperature),
                *f.selective_log_softmax_and_entropy(logits, ids, temperature=temperature),
                *_head(f.head, given, targets, temperature).values(),
            )
            for f in (replacements, originals)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_target_outside_the_vocabulary_is_refused(replacements):
    given, ids = _inputs()
    ids[2] = VOCAB
    with pytest.raises(IndexError, match=r"^token_ids must be in"):
        _head(replacements.head, given, ids)


SHAPES = [(3, 4), (1, 5), (6,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_log_probabilities_from_logits(replacements, originals, shape, dtype):
    logits = torch.randn(*shape, VOCAB).to(dtype).requires_grad_()
    ids, mask = torch.randint(0, VOCAB, shape), torch.rand(shape) > 0.4
    several = torch.randint(0, VOCAB, (*shape, 3))
    # Half precision is rounded at every step in TRL's code, and its own tests compare with equality.
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, 0)
    calls = {
        "selective_log_softmax": [
            lambda f: f(logits, ids),
            lambda f: f(logits, ids, temperature=0.6),
            lambda f: f(logits, ids, 1.7, mask.long()),
            lambda f: f(logits, several),
        ],
        "selective_log_softmax_and_entropy": [
            lambda f: f(logits, ids),
            lambda f: f(logits, ids, True, 0.6, mask),
            lambda f: f(logits, ids, entropy_requires_grad=False),
        ],
        "entropy_from_logits": [lambda f: f(logits), lambda f: f(logits, chunk_size=2)],
    }
    for name, cases in calls.items():
        for case in cases:
            ours, theirs = (_pulled(case(getattr(f, name)), logits) for f in (replacements, originals))
            _assert_same(ours, theirs, tolerance)


def _pulled(found, logits):
    parts = dict(enumerate(found if isinstance(found, tuple) else (found,)))
    loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in parts.values())
    return parts | {"gradient": torch.autograd.grad(loss, logits)[0]}


def test_rows_of_experimental_trainers_are_replaced_too(utils, originals):
    other = peer("trl.experimental.cpo.cpo_trainer")
    with rf.patch("trl"):
        assert other.selective_log_softmax is utils.selective_log_softmax
        assert other.selective_log_softmax is not originals.selective_log_softmax
    assert other.selective_log_softmax is originals.selective_log_softmax


def test_the_kernels_own_names_stay(utils):
    kernels = peer("trl.kernels.chunked_logprob")
    before = kernels._use_triton, kernels.ChunkedLogProbFunction
    with rf.patch("trl"):
        assert (kernels._use_triton, kernels.ChunkedLogProbFunction) == before
        assert utils._use_triton is not before[0]
    assert utils._use_triton is before[0]


def test_another_signature_of_trl_is_refused(utils, monkeypatch):
    before = dict(vars(utils))
    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits, chunk_size=64: logits)
    with pytest.raises(rf.integrations.PatchError, match="entropy_from_logits has another signature"):
        rf.patch("trl")
    monkeypatch.undo()
    assert all(vars(utils)[name] is x for name, x in before.items())
