"""linear_policy_loss: the numbers of policy_loss(linear_token_logprobs(...)), in three GEMMs or four."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import react_fast as rf

from . import contract
from .policy_cases import BATCH, ROW, TOKEN, named
from .test_linear_logprob import Gemms

HEADS = {
    "plain": {},
    "everything": {"softcap": 3.0, "logit_scale": 0.5, "temperature": "row", "bias": True},
}
# PPO with every term, on policy, one advantage a sequence, each aggregation, a denominator that is given.
LOSSES = {
    "ppo": {"ref": True, "kl_coef": 0.1, "entropy_coef": 0.01, "importance": True},
    "on policy": {"old": False, "objective": rf.Reinforce(), "aggregation": "seq_mean_token_sum"},
    "per sequence": {"rows": True, "aggregation": "seq_mean_token_mean", "kl_coef": 0.2, "ref": True},
    "norm": {"aggregation": "token_sum_norm", "denominator": 7.0, "entropy_coef": -0.3},
    "sequences": {"objective": rf.GSPO(0.95, 1.05), "ref": True, "kl_coef": 0.1, "entropy_coef": 0.01},
    "dual clip": {"objective": rf.PPOClip(0.9, 1.1, dual_clip=2.0, ratio_cap=3.0), "denominator": 11},
}


def _case(head, loss, shape=(4, 6), dim=5, vocab=40, dtype=torch.float64, packed=False):
    """(differentiable inputs, the other arguments)."""
    head, loss = dict(HEADS[head]), dict(LOSSES[loss])
    leaves = {"hidden": torch.randn(*shape, dim), "weight": torch.randn(vocab, dim)}
    if head.pop("bias", False):
        leaves["bias"] = torch.randn(vocab)
    leaves = {k: x.to(dtype).requires_grad_() for k, x in leaves.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.rand(shape) > 0.3
    mask[1] = False
    ids = torch.randint(0, vocab, shape).where(mask, -100)
    if head.get("temperature") == "row":
        head["temperature"] = torch.rand(shape) + 0.5
    with torch.no_grad():
        near = (
            rf.linear_token_logprobs(*leaves.values(), ids, mask=mask)
            if len(leaves) == 2
            else -torch.ones(shape)
        )
    near = near.to(wide) + 0.3 * torch.randn(shape, dtype=wide)
    advantages = torch.randn(shape[:1] if loss.pop("rows", False) else shape, dtype=wide)
    given = {
        "token_ids": ids,
        "old_logprobs": near if loss.pop("old", True) else None,
        "advantages": advantages,
        "mask": mask,
        "ref_logprobs": near + 0.1 if loss.pop("ref", False) else None,
        "importance": torch.rand(shape, dtype=wide) if loss.pop("importance", False) else None,
    }
    if packed:
        leaves["hidden"] = leaves["hidden"].detach().flatten(0, 1).requires_grad_()
        flat = ("token_ids", "old_logprobs", "mask", "ref_logprobs", "importance")
        given |= {k: None if given[k] is None else given[k].flatten() for k in flat}
        given["advantages"] = advantages.flatten()
        if "temperature" in head:
            head["temperature"] = head["temperature"].flatten()
        given["cu_seqlens"] = torch.arange(0, shape[0] * shape[1] + 1, shape[1])
    return leaves, {**given, **head, **loss}


def _all(leaves, given):
    loss, metrics = rf.linear_policy_loss(**leaves, **given)
    return loss, metrics, *torch.autograd.grad(3 * loss, list(leaves.values()))


def _two_steps(leaves, given):
    """The same through policy_loss and linear_token_logprobs."""
    head = {k: given[k] for k in ("softcap", "logit_scale", "temperature") if k in given}
    terms = {k: v for k, v in given.items() if k not in (*head, "token_ids")}
    logp, entropy = rf.linear_token_logprobs(
        **leaves, token_ids=given["token_ids"], mask=given["mask"], return_entropy=True, **head
    )
    loss, metrics = rf.policy_loss(logp, entropy=entropy, **terms)
    return loss, metrics, *torch.autograd.grad(3 * loss, list(leaves.values()))


def _assert_close(found, expected, rtol):
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[1][k], expected[1][k]) for k in found[1]]
    for f, e in [*pairs, *zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True)]:
        scale = float(e.detach().abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(f, e, rtol=rtol, atol=rtol * (1 + scale))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_equals_reference_and_two_steps_in_float64(backend, head, loss, packed):
    case = _case(head, loss, packed=packed)
    found = _all(*case)
    with rf.use_backend("reference"):
        _assert_close(found, _all(*case), 1e-11)
    _assert_close(found, _two_steps(*case), 1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", named((*TOKEN, *BATCH, *ROW)))
def test_every_objective(objective, packed):
    """All that `policy_loss` takes, with every term."""
    leaves, given = _case("plain", "ppo", packed=packed)
    given |= {"objective": objective, "aggregation": "seq_mean_token_sum"}
    if objective in ROW:
        given["advantages"] = torch.randn(4, dtype=torch.float64)
    found = _all(leaves, given)
    assert all(bool(x.any()) for x in found[2:])
    with rf.use_backend("reference"):
        _assert_close(found, _all(leaves, given), 1e-11)
    _assert_close(found, _two_steps(leaves, given), 1e-11)


@pytest.mark.parametrize("loss", ["ppo", "per sequence", "sequences"])
def test_blocks_of_rows_and_tiles_add_up(monkeypatch, loss):
    """A budget of one MiB holds 26 float64 rows of 5000 logits: several blocks, several tiles of 2048 columns."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")
    monkeypatch.setattr(rf.ops._tiles, "_cache_bytes", lambda device: 1 << 19)
    case = _case("everything", loss, shape=(5, 12), vocab=5000)
    with rf.use_backend("reference"):
        expected = _all(*case)
    _assert_close(_all(*case), expected, 1e-11)


@pytest.mark.parametrize(("loss", "mib"), [("ppo", "1"), ("ppo", "64"), ("sequences", "1")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_that_of_two_steps(monkeypatch, dtype, loss, mib):
    """At most twice as far from float64 as linear_token_logprobs + policy_loss in the same dtype.

    500 rows of 3000 logits: with one MiB three blocks in bfloat16, of 174 rows and those that lie in the 24
    columns of the gradient and the 48 of its sum; more of the others.
    """
    monkeypatch.setenv("REACT_FAST_TILE_MIB", mib)
    leaves, given = _case("everything", loss, shape=(10, 80), dim=24, vocab=3000, dtype=dtype)
    found, plain = _all(leaves, given), _two_steps(leaves, given)
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    exact = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in given.items()}
    with rf.use_backend("reference"):
        expected = _all(wide, exact)
    for f, p, e in zip(found[2:], plain[2:], expected[2:], strict=True):
        assert f.dtype == dtype
        ours, theirs = (float((v.double() - e).norm() / e.norm()) for v in (f, p))
        assert ours <= 2 * theirs + 2 * contract.EPS[torch.float32]


@pytest.mark.parametrize("budget", [4, 20])
def test_float32_logits_lie_in_a_bfloat16_gradient(monkeypatch, budget):
    """As on a GPU, whose GEMM writes its float32 sums: 7 columns of the gradient hold 3 rows of logits, those of
    its sum 7. `budget` rows more make two blocks, or one."""

    def product(a, b, out):
        return out.copy_(a.float() @ b.float())

    monkeypatch.setattr(rf.ops._tiles, "tile_dtype", lambda hidden: torch.float32)
    monkeypatch.setattr(rf.ops._tiles, "product", product)
    monkeypatch.setattr(rf.ops._tiles, "budget", lambda device: budget * 300 * 4)
    leaves, given = _case("plain", "ppo", shape=(4, 9), dim=7, vocab=300, dtype=torch.bfloat16)
    with rf.use_backend("triton"):
        found = _all(leaves, given)
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    exact = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in given.items()}
    with rf.use_backend("reference"):
        expected = _all(wide, exact)
    for f, e in zip(found[2:], expected[2:], strict=True):
        # d loss / d logit and the result are rounded to bfloat16, each term of a sum on its own.
        assert float((f.double() - e).norm() / e.norm()) <= 2 * contract.EPS[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [rf.PPOClip(), rf.GSPO()], ids=lambda o: type(o).__name__)
def test_ratio_is_one_when_nothing_changed(objective, dtype):
    """Log-probs of the same weights from `linear_token_logprobs`, whatever the blocks: no bit differs."""
    leaves, given = _case("plain", "norm", shape=(30, 5), dim=16, vocab=3000, dtype=dtype)
    with torch.no_grad():
        old = rf.linear_token_logprobs(
            **leaves, token_ids=given["token_ids"], mask=given["mask"], batch_invariant=True
        )
    given |= {"objective": objective, "old_logprobs": old}
    _, metrics = rf.linear_policy_loss(**leaves, **given, batch_invariant=True)
    assert (float(metrics["ratio/max"]), float(metrics["approx_kl/k3"])) == (1.0, 0.0)


def test_float16_gradients_survive_many_tokens():
    """1 / n times a probability is below float16's smallest number: the loss scale arrives after the GEMMs."""
    leaves, given = _case("plain", "on policy", shape=(64, 64), dim=4, vocab=2000, dtype=torch.float16)
    given["aggregation"], scale = "token_mean", 4096.0
    loss, _ = rf.linear_policy_loss(**leaves, **given)
    found = torch.autograd.grad(scale * loss, list(leaves.values()))
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    loss, _ = rf.linear_policy_loss(**wide, **{**given, "advantages": given["advantages"].double()})
    for f, e in zip(found, torch.autograd.grad(scale * loss, list(wide.values())), strict=True):
        # Logits, gradient and result are rounded to float16, each term of a sum on its own.
        assert float((f.double() - e).norm() / e.norm()) <= 8 * contract.EPS[torch.float16]


# A token's own loss: the logits stay. With whole rows they are computed again, but for hidden alone (see below).
COUNTS = [(False, False, 1, 1), (True, False, 2, 3), (False, True, 2, 3), (True, True, 3, 4)]


@pytest.mark.parametrize("objective", [rf.PPOClip(), rf.GSPO(), rf.KLCov()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(("hidden", "weight", "own", "whole_rows"), COUNTS)
def test_number_of_gemms(monkeypatch, objective, hidden, weight, own, whole_rows):
    """On policy, where every row has a gradient; a mean over sequences and an entropy bonus cost nothing."""
    monkeypatch.setenv("REACT_FAST_TILE_MIB", "1")  # more than one block of rows
    rows, dim, vocab = 64, 32, 10000
    h, w = torch.randn(rows, dim, requires_grad=hidden), torch.randn(vocab, dim, requires_grad=weight)
    shape = (4, rows // 4)
    mask = torch.ones(shape, dtype=torch.bool)
    counts = []
    for entropy_coef in (0.1, 0.0):
        with Gemms(rows * dim * vocab) as counted:
            loss, _ = rf.linear_policy_loss(
                h.view(*shape, dim), w, torch.zeros(shape, dtype=torch.int64), None, torch.randn(4), mask,
                objective=objective, aggregation="seq_mean_token_mean", entropy_coef=entropy_coef,
            )  # fmt: skip
            if hidden or weight:
                loss.backward()
        counts.append(counted.count)
    wanted = own if isinstance(objective, rf.PPOClip) else whole_rows
    # Expected embeddings: the gradient of hidden alone needs no logits a second time without a bonus.
    assert counts == [wanted, 2 if hidden and not weight else wanted]


@pytest.mark.parametrize("loss", ["ppo", "sequences"])
def test_gradcheck(loss):
    leaves, given = _case("everything", loss, shape=(2, 3), dim=3, vocab=6)
    leaves["weight"] = leaves["weight"].detach() / 4
    contract.assert_gradcheck(
        lambda h, w, b: rf.linear_policy_loss(h, w, bias=b, **given).loss,
        leaves["hidden"], leaves["weight"], leaves["bias"],
    )  # fmt: skip


def test_masked_rows_influence_nothing(backend):
    leaves, given = _case("plain", "ppo")
    expected = _all(leaves, given)
    mask = given["mask"]
    dirty = leaves["hidden"].detach().clone()
    dirty[~mask] = float("nan")
    for name in ("old_logprobs", "advantages", "ref_logprobs", "importance"):
        given[name] = given[name].where(mask, float("nan"))
    found = _all({**leaves, "hidden": dirty.requires_grad_()}, given)
    for f, e in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
        contract.assert_bitwise(f.detach(), e.detach())
    assert bool((found[2][~mask] == 0).all())


def test_nothing_counts_and_nothing_is_there(backend):
    leaves, given = _case("everything", "ppo")
    found = _all(leaves, {**given, "mask": torch.zeros(4, 6, dtype=torch.bool)})
    assert float(found[0].detach()) == 0
    assert all(bool((x == 0).all()) for x in found[2:])
    empty = {k: x[:0] if torch.is_tensor(x) and x.shape[:1] == (4,) else x for k, x in given.items()}
    found = _all({**leaves, "hidden": leaves["hidden"].detach()[:0].requires_grad_()}, empty)
    assert float(found[0].detach()) == 0
    assert all(bool((x == 0).all()) for x in found[2:])


@pytest.mark.parametrize("objective", [rf.PPOClip(), rf.GSPO(0.9, 1.2)], ids=lambda o: type(o).__name__)
def test_batch_invariant_hidden_gradient(objective):
    """With a fixed denominator a row's gradient has the same bits alone, in any batch and on any threads."""
    leaves, given = _case("everything", "norm", shape=(30, 5), dim=16, vocab=3000, dtype=torch.float32)
    given["objective"] = objective
    given["mask"], given["token_ids"] = torch.ones(30, 5, dtype=torch.bool), given["token_ids"].clamp_min(0)

    def slope(rows, threads):
        torch.set_num_threads(threads)
        part = {k: x[rows] if torch.is_tensor(x) and x.shape[:1] == (30,) else x for k, x in given.items()}
        own = leaves["hidden"].detach()[rows].requires_grad_()
        loss, _ = rf.linear_policy_loss(**{**leaves, "hidden": own}, **part, batch_invariant=True)
        return torch.autograd.grad(loss, own)[0]

    whole = slope(torch.arange(30), 1)
    for rows, threads in ((torch.arange(30).flip(0), 2), (torch.tensor([3]), 4), (torch.arange(7, 22), 1)):
        contract.assert_bitwise(slope(rows, threads), whole[rows])


def test_compiles_and_opcheck():
    for loss in ("sequences", "ppo"):
        leaves, given = _case("everything", loss, dtype=torch.float32)
        contract.assert_compiles(
            lambda h, w, b, given=given: rf.linear_policy_loss(h, w, bias=b, **given).loss, *leaves.values()
        )
    contract.assert_opcheck(
        "linear_policy_loss", *(x.detach().requires_grad_() for x in leaves.values()), given["token_ids"],
        given["temperature"], given["old_logprobs"], given["advantages"], given["mask"], given["ref_logprobs"],
        given["importance"], None, None, 0.5, 1.0, 3.0, False, 0.0, 1, [0.8, 1.2, 5.0, 9.0], 0, 0.1, 2, 2, 0.01,
        True, True, True,
    )  # fmt: skip
    half = {k: x.detach().to("meta").bfloat16().requires_grad_() for k, x in leaves.items()}
    meta = {k: x.to("meta") if torch.is_tensor(x) else x for k, x in given.items()}
    loss, metrics = rf.linear_policy_loss(**half, **meta)
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    assert {x.device.type for x in metrics.values()} == {"meta"}


@pytest.mark.parametrize("loss", ["ppo", "sequences"])
def test_one_graph_serves_every_length(loss):
    """One for the first length and, with the second, one for all: nothing recompiles after that."""
    counter = CompileCounter()
    _, given = _case("plain", loss)
    numbers = {k: v for k, v in given.items() if v is not None and not torch.is_tensor(v)}
    step = torch.compile(
        lambda leaves, tensors: rf.linear_policy_loss(**leaves, **tensors, **numbers).loss,
        backend=counter,
        fullgraph=True,
    )
    for length in (6, 7, 9, 12, 17):
        leaves, given = _case("plain", loss, shape=(4, length), dtype=torch.float32)
        tensors = {k: v for k, v in given.items() if k not in numbers}
        step(leaves, tensors)
    assert counter.frame_count <= 2


def test_a_second_backward_and_an_unscaled_one():
    """The kept gradients serve several backwards; what a caller does to a .grad does not reach them."""
    leaves, given = _case("plain", "ppo")
    loss, _ = rf.linear_policy_loss(**leaves, **given)
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    loss.backward(retain_graph=True)
    leaves["weight"].grad.zero_()
    for f, s in zip(first, torch.autograd.grad(2 * loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(2 * f, s, rtol=1e-15, atol=0)


def _shard(rank, world, sizes, case, expected, trained):
    leaves, given = case
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    own = {k: (x if k == "hidden" else x[part]).detach().clone() for k, x in leaves.items()}
    given["tp_group"] = torch.distributed.group.WORLD
    if not trained:  # through the expected embeddings of every rank
        hidden = own.pop("hidden").requires_grad_()
        found = _all({"hidden": hidden}, {**given, **own})
        _assert_close(found, expected[:3], 1e-11)
        return
    found = _all({k: x.requires_grad_() for k, x in own.items()}, given)
    slices = (expected[2], *(x[part] for x in expected[3:]))
    _assert_close(found, (expected[0], expected[1], *slices), 1e-11)


@pytest.mark.parametrize(
    ("loss", "shape", "trained"),
    [
        ("ppo", "equal", True),
        ("ppo", "ragged", True),
        ("sequences", "ragged", True),
        ("sequences", "equal", False),
    ],
)
def test_vocabulary_over_processes(ranks, loss, shape, trained):
    """Blocks of rows meet in a collective: a rank with few columns has as many of them as one with many."""
    vocab, world = 5000, ranks.world
    sizes = [vocab // world] * world if shape == "equal" else [vocab - 3 * (world - 1), *[3] * (world - 1)]
    leaves, given = _case("everything", loss, shape=(6, 10), vocab=vocab)
    loss, metrics, *slopes = _all(leaves, given)
    case = {k: x.detach() for k, x in leaves.items()}, given
    ranks.run(_shard, sizes, case, (loss.detach(), metrics, *slopes), trained)


H, W = torch.ones(2, 3, 4), torch.ones(5, 4)
IDS, ONE, ON = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)

BATCH_OF_ONES = {"hidden": H, "token_ids": IDS, "old_logprobs": ONE, "advantages": ONE, "mask": ON}


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"hidden": torch.ones(1, 2, 3, 4), "token_ids": IDS[None]}, ValueError, r"mask must be \[1, 2, 3\]"),
        ({"mask": None}, TypeError, "mask must be a torch.Tensor, got NoneType"),
        ({"old_logprobs": ONE.bfloat16()}, TypeError, "old_logprobs must be float32 like the log-probs"),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages must be \[2, 3\] like logprobs or one per"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs must be given when kl_coef is not 0"),
        ({"objective": "ppo"}, TypeError, "objective must be one of Reinforce"),
        ({"aggregation": "sum"}, ValueError, "aggregation must be one of"),
        ({"aggregation": "token_sum_norm"}, ValueError, "denominator must be given"),
        ({"token_ids": IDS + 5}, IndexError, r"token_ids must be in \[0, 5\) where mask is true, got 5"),
        ({"weight": W.double()}, TypeError, "weight must be float32 like hidden, got float64"),
        (
            {k: x.flatten(0, 1) for k, x in BATCH_OF_ONES.items()} | {"objective": rf.GSPO()},
            ValueError,
            "cu_seqlens must be given for packed tokens and GSPO",
        ),
    ],
)
def test_bad_input_is_refused(changed, error, text):
    given = {
        "hidden": H, "weight": W, "token_ids": IDS, "old_logprobs": ONE, "advantages": ONE, "mask": ON, **changed
    }  # fmt: skip
    with pytest.raises(error, match=text) as caught:
        rf.linear_policy_loss(**given)
    assert "\n" not in str(caught.value)
