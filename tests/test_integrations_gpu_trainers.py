"""slime, prime-rl and NeMo-RL, which want a GPU: ours beside stubs of what theirs were read to compute."""

import types

import pytest
import torch
import torch.distributed as dist

import react_fast as rf
from react_fast.integrations import PatchError, nemo_rl, prime_rl, slime
from react_fast.integrations.cases import alone
from react_fast.integrations.table import table_lines
from react_fast.ops._shard_logprob import shard_logprobs

from . import trainer_stubs
from .ranks import Collectives

POINTS = {
    name: [point.target for point in integration.points]
    for name, integration in (
        ("slime", slime.INTEGRATION), ("prime_rl", prime_rl.INTEGRATION), ("nemo_rl", nemo_rl.INTEGRATION)
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def held():
    """(theirs, ours) of every name of the three, patched and put back."""
    with trainer_stubs.trainers() as modules:

        def now():
            names = [target for targets in POINTS.values() for target in targets]
            return {name.rpartition(".")[2]: _at(modules, name) for name in names}

        theirs, initialised = now(), dist.is_initialized()
        with rf.patch("slime"), rf.patch("prime_rl"), rf.patch("nemo_rl"):
            ours = now()
            loss = modules["slime.backends.megatron_utils.loss"]
            assert loss.calculate_log_probs_and_entropy is ours["calculate_log_probs_and_entropy"]
        after = now()
        assert dist.is_initialized() == initialised
        assert all(after[name] is theirs[name] is not ours[name] for name in theirs)
        yield types.SimpleNamespace(theirs=theirs, ours=ours, modules=modules)


def _at(modules, target):
    path = next(x for x in modules if target.startswith(f"{x}."))
    found = modules[path]
    for part in target.removeprefix(f"{path}.").split("."):
        found = vars(found)[part]
    return found


@pytest.mark.parametrize("name", POINTS)
def test_another_signature_or_version_is_refused_and_leaves_all(name, monkeypatch):
    with trainer_stubs.trainers() as modules:
        before = [_at(modules, target) for target in POINTS[name]]
        distribution = {"slime": "slime", "prime_rl": "prime-rl", "nemo_rl": "nemo-rl"}[name]
        monkeypatch.setitem(trainer_stubs.VERSIONS, distribution, "9.0")
        with pytest.raises(PatchError, match=rf"^{name} 9\.0 is not in the range"):
            rf.patch(name)
        monkeypatch.undo()
        last = POINTS[name][-1].rpartition(".")
        owner = _at(modules, last[0]) if last[0] not in modules else modules[last[0]]
        call = lambda x: x  # noqa: E731
        if isinstance(getattr(owner, last[2]), type):
            monkeypatch.setattr(getattr(owner, last[2]), "forward", staticmethod(call))
        else:
            monkeypatch.setattr(owner, last[2], call)
        with pytest.raises(PatchError, match=r"has another signature .* \w+\(x\)$"):
            rf.patch(name)
        monkeypatch.undo()
        assert all(_at(modules, target) is x for target, x in zip(POINTS[name], before, strict=True))


def test_the_table_lists_them():
    with trainer_stubs.trainers():
        lines = table_lines(list(POINTS))
    assert len(lines) == 1 + sum(map(len, POINTS.values()))
    assert all(line.endswith("available") for line in lines[1:])


def _pulled(found, *leaves):
    loss = sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in found if x.requires_grad)
    return [x.detach() for x in found], torch.autograd.grad(loss, leaves)


def _assert_same(a, b, tolerance):
    """To the rounding of the largest number."""
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        scale = float(y.abs().max()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(scale, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_prime_heads(held, softcap, dtype):
    name = "_SequenceChunkedLogProbEntropyFn" if softcap is None else "_GemmaChunkedLogProbEntropyFn"
    found = []
    inputs = torch.randn(7, 12), torch.randn(37, 12)
    labels, inverse = torch.randint(0, 37, (7,)), torch.rand(7) + 0.5
    for side in (held.ours, held.theirs):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        rest = [] if softcap is None else [softcap]
        found.append(_pulled(side[name].apply(*leaves, labels, inverse, 4, *rest), *leaves))
    for ours, theirs in zip(*found, strict=True):
        _assert_same(ours, theirs, 0.05 if dtype == torch.bfloat16 else 2e-6)


def _loss_inputs(held, weights=None):
    make = held.modules["prime_rl.trainer.rl.loss"].LossInputs
    logp = (-torch.rand(9)).requires_grad_()
    return logp, make(logp, -torch.rand(9), None, torch.randn(9), torch.rand(9) > 0.3, weights)


def test_prime_loss_by_import_path(held):
    """PPO's clip summed over tokens with their weights, and the mismatch term of prime-rl's own losses."""
    logp, inputs = _loss_inputs(held, torch.rand(9))
    found = prime_rl.loss(inputs, ratio_min=0.9, ratio_max=1.2)
    ratio = (logp - inputs.inference_logprobs).exp()
    wanted = -torch.minimum(ratio * inputs.advantages, ratio.clamp(0.9, 1.2) * inputs.advantages)
    wanted = (wanted * inputs.loss_weights)[inputs.loss_mask].sum()
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logp, retain_graph=True) for x in (found.loss, wanted))
    )
    assert all(x.dim() == 0 for x in found.metrics.values())
    logp, inputs = _loss_inputs(held)
    found = prime_rl.loss(inputs, objective="Reinforce", kl_coef=0.2)
    far = logp - inputs.inference_logprobs
    wanted = (-inputs.advantages * logp + 0.1 * far**2)[inputs.loss_mask].sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (found.loss, wanted)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "PPO"}, r"objective must be one of Reinforce, PPOClip, .*, got 'PPO'"),
        ({"objective": "GSPO", "delta": 1}, r"GSPO has ratio_min, ratio_max.*, got delta"),
        ({"kl_coef": 0.1}, r"kl_coef must be 0 for tokens with weights, got 0.1"),
    ],
)
def test_prime_loss_refuses(held, options, message):
    _, inputs = _loss_inputs(held, torch.ones(9))
    with pytest.raises(ValueError, match=f"^{message}$"):
        prime_rl.loss(inputs, **options)


SLIME = {
    "plain": {},
    "entropy": {"with_entropy": True, "chunk_size": 3},
    "entropy for reading": {"with_entropy": True, "with_entropy_grad": False},
    "top-p": {"log_prob_keep_mask": torch.arange(7 * 31).view(7, 31) % 3 != 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", SLIME)
@pytest.mark.parametrize("grouped", [False, True])
def test_slime_log_probs(held, option, dtype, grouped):
    logits, tokens, found = torch.randn(7, 31) * 3, torch.arange(7) * 5, []
    for side in (held.ours, held.theirs):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        with alone() as group:
            call = side["calculate_log_probs_and_entropy"]
            outputs = call(leaf, tokens, group if grouped else None, **SLIME[option])
            found.append(_pulled([x for x in outputs if x is not None], leaf))
    for ours, theirs in zip(*found, strict=True):
        _assert_same(ours, theirs, 0.02 if dtype == torch.bfloat16 else 2e-6)


def test_slime_without_rows_goes_to_the_original(held):
    logp, entropy = held.ours["calculate_log_probs_and_entropy"](
        torch.randn(0, 5), torch.empty(0, dtype=torch.long), None, with_entropy=True
    )
    assert logp.shape == entropy.shape == (0,)


@pytest.mark.parametrize("gamma", [1.0, 0.95, torch.tensor(0.9)])
def test_slime_scans(held, gamma):
    rewards, values = torch.randn(2, 6, 17)
    for name in ("vanilla_gae", "chunked_gae"):
        ours, theirs = (f[name](rewards, values, gamma, 0.8) for f in (held.ours, held.theirs))
        _assert_same(ours, theirs, 1e-5)
    name = "chunked_discounted_returns"
    ours, theirs = (f[name](rewards, gamma, chunk_size=4) for f in (held.ours, held.theirs))
    _assert_same([ours], [theirs], 1e-5)


@pytest.mark.parametrize("estimator", ["ppo", "reinforce_plus_plus"])
def test_slime_advantages_by_path(held, estimator):
    """Each response alone, by slime's scans: its reward at the last token (that counts), less the KL's penalty."""
    args = types.SimpleNamespace(advantage_estimator=estimator, gamma=0.9, lambd=0.8, kl_coef=0.1)
    lengths = [3, 1, 6]
    data = {
        "response_lengths": lengths,
        "rewards": [1.0, -2.0, 0.5],
        **{name: [torch.randn(n) for n in lengths] for name in ("kl", "values")},
        "loss_masks": [
            torch.tensor([1, 1, 0]),
            torch.ones(1, dtype=torch.int),
            torch.tensor([0, 1, 1, 0, 1, 0]),
        ],
    }
    slime.advantages(args, data)
    for i, n in enumerate(lengths):
        mask = torch.ones(n) if estimator == "ppo" else data["loss_masks"][i]
        rewards = -0.1 * data["kl"][i] * mask
        rewards[mask.nonzero().max()] += data["rewards"][i]
        if estimator == "ppo":
            wanted = held.theirs["vanilla_gae"](rewards[None], data["values"][i][None], 0.9, 0.8)
        else:
            wanted = (held.theirs["chunked_discounted_returns"](rewards[None], 0.9),) * 2
        _assert_same([data["advantages"][i], data["returns"][i]], [x[0] for x in wanted], 1e-5)
    data["response_lengths"] = [6, 1, 6]
    with pytest.raises(ValueError, match=r"^context_parallel_size must be 1, got "):
        slime.advantages(args, data)
    args.advantage_estimator = "grpo"
    with pytest.raises(
        ValueError, match=r"^advantage_estimator must be ppo or reinforce_plus_plus, got grpo$"
    ):
        slime.advantages(args, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ChunkedDistributedLogprob", "DistributedLogprob"])
def test_nemo_logits(held, name, dtype):
    logits, target, found = torch.randn(2, 6, 31) * 3, torch.randint(0, 31, (2, 6)), []
    chunk = [4] if name.startswith("Chunked") else []
    for side in (held.ours, held.theirs):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        with alone() as group:
            found.append(_pulled([side[name].apply(leaf, target, 0, 31, *chunk, group)], leaf))
            read = held.ours[name].apply(leaf, target, 0, 31, *chunk, group, True)
            assert not read.requires_grad
    for ours, theirs in zip(*found, strict=True):
        _assert_same(ours, theirs, 0.02 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nemo_hidden_states(held, dtype):
    inputs, found = (torch.randn(6, 2, 12), torch.randn(31, 12)), []
    target = torch.randint(0, 31, (2, 6))
    for side in (held.ours, held.theirs):
        hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        with alone() as group:
            call = side["ChunkedDistributedHiddenStatesToLogprobs"].apply
            found.append(_pulled([call(hidden, target, weight, 0, 31, 4, group)], hidden, weight))
    for ours, theirs in zip(*found, strict=True):
        _assert_same(ours, theirs, 0.05 if dtype == torch.bfloat16 else 2e-6)


MASKS = {"integers": torch.int64, "float32": torch.float32}


@pytest.mark.parametrize("lam", [None, 0.5, "by row"])
@pytest.mark.parametrize("kind", MASKS)
def test_nemo_gae(held, kind, lam):
    rewards, values = torch.randn(2, 6, 17)
    mask = (torch.rand(6, 17) > 0.3).to(MASKS[kind])
    mask[-1] = 0
    estimator = types.SimpleNamespace(gae_gamma=0.95, gae_lambda=0.8)
    lam = torch.rand(6) if lam == "by row" else lam
    ours, theirs = (
        f["_compute_gae"](estimator, rewards, values, mask, lam) for f in (held.ours, held.theirs)
    )
    _assert_same(ours, theirs, 1e-5)


def _over_ranks(rank, world, backend):
    """Logits in float64 over ranks: what one process gives with all of it, after one exchange."""
    sizes = [11, 5, 1, 7][:world]
    whole, first = (torch.randn(9, sum(sizes)) * 3).double(), sum(sizes[:rank])
    whole[0, first : first + sizes[1]] = float("-inf") if rank == 1 else whole[0, first : first + sizes[1]]
    dist.broadcast(whole, 1)
    part, ids = whole[:, first : first + sizes[rank]].clone(), torch.randint(sizes[0], (9,))
    ids[1:4] = sum(sizes) - 1
    found = []
    for way in ("ours", "theirs"):
        x = (part if way == "ours" else whole).clone().requires_grad_()
        if way == "ours":
            with Collectives() as counted, rf.use_backend(backend):
                outputs = shard_logprobs(x, ids, first=first, group=dist.group.WORLD, return_entropy=True)
            assert counted.count == 1
        else:
            outputs = rf.reference.token_logprobs(x, ids, return_entropy=True)
        with rf.use_backend(backend):
            values, (slope,) = _pulled([y.double() for y in outputs], x)
        found.append((*values, slope if way == "ours" else slope[:, first : first + sizes[rank]]))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_logits_split_over_processes(ranks, backend):
    ranks.run(_over_ranks, backend)


def _hidden_over_ranks(rank, world):
    """NeMo-RL's layout: each rank has a part of the sequence and of the vocabulary."""
    group, rows, size = dist.group.WORLD, 3, 5
    hidden, weight = torch.randn(rows * world, 2, 6), torch.randn(size * world, 6)
    target = torch.randint(0, size * world, (2, rows * world))
    g = torch.randn(target.shape)
    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    logits = (whole[0] @ whole[1].T).transpose(0, 1)
    wanted = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    slopes = torch.autograd.grad((g * wanted).sum(), whole)
    places = slice(rank * rows, (rank + 1) * rows), slice(rank * size, (rank + 1) * size)
    own = [x[place].clone().requires_grad_() for x, place in zip((hidden, weight), places, strict=True)]
    original = trainer_stubs.ChunkedDistributedHiddenStatesToLogprobs
    ends = places[1].start, places[1].stop
    found = nemo_rl.head_logprobs(original).apply(own[0], target, own[1], *ends, 2, group)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for got, slope, place in zip(torch.autograd.grad((g * found).sum(), own), slopes, places, strict=True):
        torch.testing.assert_close(got, slope[place], rtol=1e-5, atol=1e-5)


def test_hidden_states_split_over_processes(ranks):
    ranks.run(_hidden_over_ranks)
