"""Properties of the log-prob ops over generated shapes, strides, dtypes, masks and values (hypothesis)."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import react_fast as rf

from . import contract
from .oracle import from_hidden, from_logits

# Derandomised: a failure is the change's, and the same everywhere. The backend fixture is one value an example.
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = float("inf")

# Vocabularies around vectors (8, 16), the Triton block (4096) and the fold's unit (2048): each residue is a tail.
VOCABS = st.one_of(
    st.integers(1, 70),
    st.sampled_from([127, 128, 129, 255, 257, 1000, 2047, 2048, 2049, 4095, 4096, 4097, 4111]),
)
LEADING = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def _peaked(x, column):
    x = x.clone()
    x[..., column] = 90.0
    return x


# What has broken other implementations, from a base of normal values: name -> logits.
VALUES = {
    "random": lambda x: 3 * x,
    "sharp": lambda x: 50 * x,
    "huge": lambda x: 1e4 * x.sign(),
    "largest half": lambda x: 65504 * x.sign(),
    "equal": lambda x: torch.full_like(x, 7.25),
    "tiny": lambda x: 1e-30 * x,
    "denormal": lambda x: 1e-40 * x,
    "all far below zero": lambda x: x - 5e4,
    "peaked first": lambda x: _peaked(x, 0),
    "peaked last": lambda x: _peaked(x, -1),
    "peaked in the middle": lambda x: _peaked(x, x.shape[-1] // 2),
    "forbidden": lambda x: torch.where(x < -0.5, -INF, x),
    "one left": lambda x: torch.where(torch.arange(x.shape[-1]) == x.shape[-1] - 1, x, -INF),
}
STRIDES = {
    "contiguous": lambda x: x,
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "vocabulary first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
}


@st.composite
def logits_and_options(draw):
    shape = (*draw(LEADING), draw(VOCABS))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    values = VALUES[draw(st.sampled_from(sorted(VALUES)))](torch.randn(shape))
    logits = STRIDES[draw(st.sampled_from(sorted(STRIDES)))](values.to(dtype))
    ids = torch.randint(shape[-1], shape[:-1], dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    options = {"softcap": draw(st.sampled_from([None, None, 5.0, 30.0]))}
    options["temperature"] = draw(st.sampled_from([1.0, 0.1, 0.7, 1.5, "row"]))
    if options["temperature"] == "row":
        options["temperature"] = torch.rand(shape[:-1]) + 0.5
    if draw(st.booleans()):
        options["mask"] = torch.rand(shape[:-1]) > 0.4
        ids = ids.where(options["mask"], -100)
    return logits, ids, options


def _both(logits, ids, **options):
    return rf.token_logprobs(logits, ids, return_entropy=True, **options)


def _bounds(logits, ids, logp, entropy, *, mask=None, softcap=None, temperature=1.0):
    """Worst-case rounding of (logp, H), u = half an ulp of the accumulation.

    Every d_j = (u_j - largest) / T is off by 2u |d_j| and its exponential by 2u more of itself; of V of them a
    lane adds up 264 at most before double (float64: all). Over the sum that is u (2 E|d| + adds + 8), which the
    logarithm keeps as an absolute error. The entropy's moment has one more factor d. A cap is off by 8u softcap in
    both logits of a d.
    """
    x = logits.double()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    temperature = torch.as_tensor(temperature).double()
    d = ((x - x.amax(-1, keepdim=True)) / temperature.unsqueeze(-1)).nan_to_num(0.0, neginf=0.0).abs()
    p = torch.softmax(x / temperature.unsqueeze(-1), -1).nan_to_num(0.0)
    first, second = (p * d).sum(-1), (p * d * d).sum(-1)
    double = logits.dtype == torch.float64
    u = contract.EPS[torch.float64 if double else torch.float32] / 2
    adds = logits.shape[-1] if double else min(logits.shape[-1], 264)
    loss = adds + 8 + (0.0 if softcap is None else 16 * softcap / temperature)
    size = logp.abs().nan_to_num(0.0, posinf=0.0)
    return (
        u * (2 * size + 2 * first + loss),
        u * (2 * entropy.abs() + loss * (1 + 2 * first) + 2 * second + 2 * first),
    )


@given(case=logits_and_options())
@SETTINGS
def test_equals_oracle(backend, case):
    logits, ids, options = case
    found = _both(logits, ids, **options)
    expected = from_logits(logits.double(), ids, **options)
    for f, e, bound in zip(found, expected, _bounds(logits, ids, *expected, **options), strict=True):
        gap = torch.where(
            f.double() == e, 0.0, (f.double() - e).abs()
        )  # -inf where a forbidden token is chosen
        assert bool((gap <= bound).all())


@given(case=logits_and_options())
@SETTINGS
def test_range_of_results(backend, case):
    """logp <= 0, and H is between 0 and log V up to its rounding; masked rows are 0."""
    logits, ids, options = case
    logp, entropy = _both(logits, ids, **options)
    slack = _bounds(logits, ids, logp.double(), entropy.double(), **options)[1]
    assert bool((logp <= 0).all())
    assert bool((entropy >= -slack).all())
    assert bool((entropy <= math.log(logits.shape[-1]) + slack).all())
    if "mask" in options:
        assert not bool(torch.stack([logp, entropy])[:, ~options["mask"]].any())


# V rows of V logits, so that a few hundred cover the tails of vectors and blocks.
@given(vocab=st.integers(1, 300), name=st.sampled_from(sorted(VALUES)), dtype=st.sampled_from(DTYPES))
@settings(SETTINGS, max_examples=15)
def test_probabilities_sum_to_one(backend, vocab, name, dtype):
    """A row repeated for every token: a phantom column, or a missing one, would change the sum."""
    row = VALUES[name](torch.randn(vocab)).to(dtype)
    ids = torch.arange(vocab)
    logits = row.expand(vocab, vocab)
    logp, entropy = _both(logits, ids)
    bound = _bounds(logits, ids, logp.double(), entropy.double())[0].max()
    # exp(x + e) - exp(x) <= exp(x) (exp(e) - 1), and the probabilities sum to 1.
    assert abs(float(logp.double().exp().sum()) - 1) <= math.expm1(2 * float(bound))


def _slope(logits, ids, **options):
    x = logits.detach().clone().requires_grad_()
    logp, entropy = _both(x, ids, **options)
    ends = torch.where(logp.isinf(), 0.0, logp), entropy
    g, h = (
        torch.linspace(-1, 2, ids.numel()).view(ids.shape),
        torch.linspace(0.5, 1, ids.numel()).view(ids.shape),
    )
    return torch.autograd.grad((g * ends[0]).sum() + (h * ends[1]).sum(), x)[0], g, h


@given(case=logits_and_options())
@SETTINGS
def test_gradient_rows_sum_to_zero(backend, case):
    """Adding a constant to a row changes no probability; masked rows and forbidden tokens get exactly 0."""
    logits, ids, options = case
    slope, g, h = _slope(logits, ids, **{**options, "softcap": None})
    assert bool(slope.isfinite().all())
    if "mask" in options:
        assert not bool(slope[~options["mask"]].any())
    assert not bool(slope[logits == -INF].any())
    # Each element is off by an ulp of its own; p and log p, |d| < 200 where p is not 0, by 400 u of the row's.
    eps, inner = (
        contract.EPS[logits.dtype],
        contract.EPS[torch.float64 if slope.dtype == torch.float64 else torch.float32],
    )
    size = (g.abs() + h * (1 + math.log(logits.shape[-1]))) / torch.as_tensor(options["temperature"])
    assert bool(
        (slope.double().sum(-1).abs() <= eps * slope.double().abs().sum(-1) + 400 * inner * size).all()
    )


@given(case=logits_and_options(), data=st.data())
@SETTINGS
def test_a_row_is_alone(backend, case, data):
    """Bitwise: any order of rows, any part of the batch, padding around it, any number of threads, any strides."""
    logits, ids, options = case
    flat = logits.reshape(-1, logits.shape[-1])
    rows = {k: v.reshape(-1) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    picked = torch.tensor(data.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1, max_size=9)))
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    part = {k: v[picked] if isinstance(v, torch.Tensor) else v for k, v in rows.items()}
    whole = _both(logits, ids, **options)
    for found, expected in zip(_both(flat[picked], ids.reshape(-1)[picked], **part), whole, strict=True):
        contract.assert_bitwise(found, expected.reshape(-1)[picked])
    again = _both(logits, ids, **options)
    assert bool((torch.exp(torch.where(whole[0].isinf(), 0.0, again[0] - whole[0])) == 1).all())


# ---- from hidden states --------------------------------------------------------------------------------------


@st.composite
def heads(draw):
    shape, dim, vocab = draw(LEADING), draw(st.sampled_from([1, 3, 16, 33])), draw(VOCABS)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1.0, 1e-3, 30.0, 0.0]))
    hidden, weight = (scale * torch.randn(*shape, dim)).to(dtype), torch.randn(vocab, dim).to(dtype)
    hidden = STRIDES[draw(st.sampled_from(sorted(STRIDES)))](hidden)
    weight = STRIDES[draw(st.sampled_from(sorted(STRIDES)))](weight)
    ids = torch.randint(vocab, shape, dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    options = {
        "softcap": draw(st.sampled_from([None, 5.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -2.0])),
        "temperature": draw(st.sampled_from([1.0, 0.5, "row"])),
    }
    if options["temperature"] == "row":
        options["temperature"] = torch.rand(shape) + 0.5
    if draw(st.booleans()):
        options["bias"] = torch.randn(vocab).to(dtype)
    if draw(st.booleans()):
        options["mask"] = torch.rand(shape) > 0.4
        ids = ids.where(options["mask"], -100)
    return hidden, weight, ids, options


def _linear(hidden, weight, ids, **options):
    return rf.linear_token_logprobs(hidden, weight, ids, return_entropy=True, **options)


def _wide(options):
    return {k: v.double() if k == "bias" else v for k, v in options.items()}


@given(case=heads(), mib=st.sampled_from(["1", "64"]))
@SETTINGS
def test_linear_equals_oracle(monkeypatch, case, mib):
    """Within what rounding every logit to the tile's dtype may do, and the gradient's contract in float64."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", mib)
    hidden, weight, ids, options = case
    found = _linear(hidden, weight, ids, **options)
    expected = from_hidden(hidden.double(), weight.double(), ids, **_wide(options))
    # A logit is a sum of D products in float32 (float64), rounded once to the tile's dtype; bias and scale round
    # twice more. |d logp| <= 2 max |d z|, |d H| <= 2 max |d z| (1 + max |z - E z|), z within +-spread.
    inner = contract.EPS[torch.float64 if hidden.dtype == torch.float64 else torch.float32]
    largest = (hidden.double().abs() @ weight.double().abs().T).amax(-1)
    largest = largest + (options["bias"].double().abs().max() if "bias" in options else 0.0)
    unit = abs(options["logit_scale"]) / torch.as_tensor(options["temperature"]).double()
    spread = unit * largest
    wrong = spread * (contract.EPS[hidden.dtype] + (hidden.shape[-1] + 12) * inner)
    adds = (min(weight.shape[0], 264) if hidden.dtype != torch.float64 else weight.shape[0]) + 8 + 4 * spread
    bounds = 2 * wrong + adds * inner, 2 * (wrong + adds * inner) * (1 + 2 * spread)
    for f, e, bound in zip(found, expected, bounds, strict=True):
        assert bool(((f.double() - e).abs() <= bound).all())
    assert bool((found[0] <= 0).all())


@given(case=heads(), data=st.data())
@SETTINGS
def test_linear_row_is_alone(monkeypatch, case, data):
    """batch_invariant: bitwise the same in any order, part, tile budget and number of threads, gradient too."""
    hidden, weight, ids, options = case
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = {
        k: v.reshape(-1) if k != "bias" and isinstance(v, torch.Tensor) else v for k, v in options.items()
    }
    picked = torch.tensor(
        data.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1, max_size=9, unique=True))
    )

    def results(index):
        x = flat[index].detach().requires_grad_()
        part = {
            k: v[index] if k in ("mask", "temperature") and isinstance(v, torch.Tensor) else v
            for k, v in rows.items()
        }
        logp, entropy = _linear(x, weight, ids.reshape(-1)[index], **part, batch_invariant=True)
        (slope,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
        return logp.detach(), entropy.detach(), slope

    whole = results(torch.arange(len(flat)))
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    monkeypatch.setenv("REACT_FAST_TILE_MIB", data.draw(st.sampled_from(["1", "7", "64"])))
    for found, expected in zip(results(picked), whole, strict=True):
        contract.assert_bitwise(found, expected[picked])
    if "mask" in rows:
        assert not any(bool(x[~rows["mask"]].any()) for x in whole)


@given(
    vocab=st.one_of(VOCABS, st.sampled_from([6143, 6145])),
    where=st.sampled_from(["first", "last", "last tile"]),
)
@SETTINGS
def test_linear_peak_at_the_edge_of_a_tile(monkeypatch, vocab, where):
    """One token has nearly everything: phantom columns behind the vocabulary would take it, or give logp > 0."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    peak = {"first": 0, "last": vocab - 1, "last tile": (vocab - 1) // 2048 * 2048}[where]
    weight = torch.zeros(vocab, 2)
    weight[:, 0] = -1.0
    weight[peak] = torch.tensor([1.0, 1.0])
    hidden = torch.full((3, 2), 20.0)
    logp, entropy = _linear(hidden, weight, torch.full((3,), peak))
    rest = (vocab - 1) * math.exp(-60.0)  # logits of 40 and -20, all exact
    torch.testing.assert_close(logp.double(), torch.full((3,), -math.log1p(rest)).double(), rtol=1e-5, atol=0)
    assert bool((logp <= 0).all())
    assert bool((entropy >= 0).all())
