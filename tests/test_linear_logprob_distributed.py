"""linear_token_logprobs with a head of fully_shard: what one process gives with all rows."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import react_fast as rf

from . import contract
from .oracle import from_hidden
from .ranks import Collectives

# float64; sums of up to 2503 exponentials, 140 rows and 4 ranks, of terms below 100: 1e-11 is 400 ulp of them.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
VOCAB = 2503  # a fold unit and some; no multiple of 2 or 4


class Policy(torch.nn.Module):
    """Its forward ends at the hidden states, as a trainer that never wants logits calls it."""

    def __init__(self, vocab=VOCAB):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
        self.head = torch.nn.Linear(6, vocab)

    def forward(self, x):
        return self.body(x)


def _loss(logp, entropy, advantages, mask):
    """A rank's local mean; a rank without counting rows has loss 0."""
    return (advantages * logp - 0.1 * entropy).mul(mask).sum() / mask.sum().clamp_min(1)


def _rows(world, rows=140):
    """Inputs, ids, advantages and masks of all ranks. Rank 0 has no counting row, the others 3 and all of them:
    with tiles of 1 MiB, 64 rows of float64, that is 0, 1 and up to 3 blocks."""
    x = torch.randn(world, rows, 4, dtype=torch.float64)
    ids, advantages = torch.randint(VOCAB, (world, rows)), torch.randn(world, rows, dtype=torch.float64)
    counts = torch.tensor([0, rows, 3, rows // 2])[:world, None]
    return x, ids, advantages, torch.arange(rows) < counts


def _mesh(world, shape):
    """A line of all ranks, as fully_shard makes it, or a grid of two copies on two ranks each."""
    if shape == "line":
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def _train_sharded(rank, world, shape, own_unit):
    policy = Policy().double()
    single = copy.deepcopy(policy)
    mesh = _mesh(world, shape)
    for module in (policy.body, policy.head) if own_unit else (policy.body,):
        fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    options = {"softcap": 3.0, "temperature": 0.7}
    steps = [
        torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
        for model in (policy, single)
    ]
    for _ in range(3):
        x, ids, advantages, masks = _rows(world)
        mask = masks[rank]
        logp, entropy = rf.linear_token_logprobs(
            policy(x[rank]), policy.head.weight, ids[rank].where(mask, -100), bias=policy.head.bias, mask=mask,
            return_entropy=True, **options,
        )  # fmt: skip
        _loss(logp, entropy, advantages[rank], mask).backward()
        head = single.head
        logps, entropies = from_hidden(single(x), head.weight, ids, bias=head.bias, mask=masks, **options)
        sum(_loss(*each) for each in zip(logps, entropies, advantages, masks, strict=True)).div(
            world
        ).backward()
        torch.testing.assert_close(logp, logps[rank], **CLOSE)
        torch.testing.assert_close(entropy, entropies[rank], **CLOSE)
        for (name, found), expected in zip(policy.named_parameters(), single.parameters(), strict=True):
            assert isinstance(found.grad, DTensor), name
            assert found.grad.placements == found.placements
            torch.testing.assert_close(found.grad.full_tensor(), expected.grad, **CLOSE)
        for step in steps:
            step.step()
            step.zero_grad()
    for found, expected in zip(policy.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), expected, **CLOSE)


@pytest.mark.parametrize("own_unit", [True, False], ids=["head alone", "head in the root"])
def test_fully_sharded_head_trains_like_one_process(ranks, own_unit):
    """The head's own unit is sharded where the op reads it (a DTensor), the root's is whole (a parameter)."""
    ranks.run(_train_sharded, "line", own_unit)
    if ranks.world == 4:
        ranks.run(_train_sharded, "grid", own_unit)


def _placed(rank, world, shape, placements):
    """Every rank passes other rows."""
    mesh = _mesh(world, shape)
    weight, bias = torch.randn(11, 6).double(), torch.randn(11).double()
    hidden = torch.randn(world, 5, 6).double()
    ids, g = torch.randint(11, (world, 5)), torch.randn(world, 5).double()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logps, _ = from_hidden(leaves[0], leaves[1], ids, bias=leaves[2])
    expected = torch.autograd.grad((logps * g).sum() / world, leaves)
    w = distribute_tensor(weight, mesh, placements).requires_grad_()
    rows = [Replicate() if p.is_shard(1) else p for p in placements]
    b = distribute_tensor(bias, mesh, rows).requires_grad_()
    h = hidden[rank].clone().requires_grad_()
    for _ in range(2):  # the second time on top of the first
        logp = rf.linear_token_logprobs(h, w, ids[rank], bias=b)
        torch.testing.assert_close(logp, logps[rank], **CLOSE)
        logp.backward(g[rank])
    torch.testing.assert_close(h.grad, 2 * world * expected[0][rank], **CLOSE)
    for found, whole in ((w, expected[1]), (b, expected[2])):
        assert found.grad.placements == found.placements
        torch.testing.assert_close(found.grad.full_tensor(), 2 * whole, **CLOSE)


PLACEMENTS = {
    "rows": ("line", [Shard(0)]),
    "columns": ("line", [Shard(1)]),
    "copies": ("line", [Replicate()]),
    "copies of rows": ("grid", [Replicate(), Shard(0)]),
    "rows of rows": ("grid", [Shard(0), Shard(0)]),
    "rows and columns": ("grid", [Shard(0), Shard(1)]),
}


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (world, name)
        for name, (shape, _) in PLACEMENTS.items()
        for world in (2, 4)
        if (shape, world) != ("grid", 2)
    ],
    indirect=["ranks"],
    scope="session",
)
def test_gradient_is_placed_as_the_parameter(ranks, name):
    ranks.run(_placed, *PLACEMENTS[name])


def _one_rank(rank, world):
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))["shard"]
    weight = torch.randn(11, 6).double()
    hidden, ids = torch.randn(5, 6).double(), torch.randint(11, (5,))
    found = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    for _ in range(2):
        logp = rf.linear_token_logprobs(hidden, found, ids)
        logp.sum().backward()
    assert not found.to_local().detach().requires_grad
    assert found._local_tensor.grad_fn is None  # the shard itself, which is the whole, has joined no graph
    leaf = weight.clone().requires_grad_()
    from_hidden(hidden, leaf, ids)[0].sum().backward()
    torch.testing.assert_close(found.grad.full_tensor(), 2 * leaf.grad, **CLOSE)


def test_mesh_of_one_rank(ranks):
    ranks.run(_one_rank)


def _frozen(rank, world):
    mesh = _mesh(world, "line")
    weight, ids = torch.randn(11, 6).double(), torch.randint(11, (5,))
    hidden = torch.randn(5, 6).double().requires_grad_()
    head = distribute_tensor(weight, mesh, [Shard(0)])
    with Collectives() as forward:
        logp = rf.linear_token_logprobs(hidden, head, ids)
    with Collectives() as backward:
        (slope,) = torch.autograd.grad(logp.sum(), hidden)
    assert (forward.count, backward.count) == (1, 0)
    (expected,) = torch.autograd.grad(from_hidden(hidden, weight, ids)[0].sum(), hidden)
    torch.testing.assert_close(slope, expected, **CLOSE)
    with Collectives() as trained:
        rf.linear_token_logprobs(hidden, head.requires_grad_(), ids).sum().backward()
    assert trained.count == 2


def test_frozen_head_is_gathered_and_not_reduced(ranks):
    ranks.run(_frozen)


def _autocast(rank, world):
    """float32 masters, bfloat16 matmuls: the mean of the ranks' gradients is taken in float32."""
    mesh = _mesh(world, "line")
    weight, ids = torch.randn(51, 6), torch.randint(51, (world, 9))
    hidden = torch.randn(world, 9, 6)
    head = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    slopes = []
    with torch.autocast("cpu", torch.bfloat16):
        for each in range(world):
            leaf = weight.clone().requires_grad_()
            logp = rf.linear_token_logprobs(hidden[each], leaf, ids[each])
            slopes += torch.autograd.grad(logp.sum(), leaf)
            if each == rank:
                expected = logp.detach()
        logp = rf.linear_token_logprobs(hidden[rank], head, ids[rank])
    contract.assert_bitwise(logp.detach(), expected)
    logp.sum().backward()
    assert head.grad.dtype == torch.float32
    every = torch.stack(slopes)
    # world - 1 additions and one division, each half an ulp of at most the sum of sizes.
    bound = world * contract.EPS[torch.float32] / 2 * every.abs().mean(0)
    assert bool(((head.grad.full_tensor() - every.double().mean(0)).abs() <= bound).all())


def test_autocast_of_a_sharded_head(ranks):
    ranks.run(_autocast)


def _waiting(rank, world):
    """hidden that a sequence-parallel layer has just sent for."""
    weight, ids = torch.randn(11, 6).double(), torch.randint(11, (5 * world,))
    part = torch.randn(5, 6).double()
    hidden = collectives.all_gather_tensor(part, 0, dist.group.WORLD)
    found = rf.linear_token_logprobs(hidden, weight, ids)
    torch.testing.assert_close(found, from_hidden(part.repeat(world, 1), weight, ids)[0], **CLOSE)


def test_result_of_an_asynchronous_collective(ranks):
    ranks.run(_waiting)


def _refused(rank, world):
    mesh = _mesh(world, "line")
    hidden, weight, ids = torch.ones(4, 3), torch.ones(6, 3), torch.zeros(4, dtype=torch.int64)
    group, elsewhere = dist.group.WORLD, [dist.new_group([each]) for each in range(world)][rank - 1]

    def spread(x):
        return distribute_tensor(x, mesh, [Replicate()])

    pending = DTensor.from_local(weight, mesh, [Partial()])
    cases = [
        ((spread(hidden), weight, ids), {}, TypeError, "hidden must be a plain tensor, got DTensor; pass its"),
        ((hidden, weight, spread(ids)), {}, TypeError, "token_ids must be a plain tensor, got DTensor"),
        ((hidden, weight, ids), {"mask": spread(ids == 0)}, TypeError, "mask must be a plain tensor"),
        ((hidden, weight, ids), {"temperature": spread(torch.ones(4))}, TypeError, "temperature must be a plain"),
        ((hidden, spread(weight), ids), {"tp_group": group}, TypeError, r"tp_group pass weight\.to_local\(\)"),
        (
            (hidden, weight, ids),
            {"tp_group": group, "bias": spread(torch.ones(6))},
            TypeError,
            r"bias must be a plain tensor, got DTensor; with tp_group pass bias\.to_local\(\)",
        ),
        ((hidden, pending, ids), {}, ValueError, "weight must be sharded or replicated, got placements"),
        ((hidden, spread(weight).double(), ids), {}, TypeError, "weight must be float32 like hidden"),
        ((hidden, spread(weight), ids), {"main_grad": weight}, ValueError, "main_grad must be None for a DTensor"),
        ((hidden, weight, ids), {"main_grad": spread(weight)}, TypeError, "main_grad must be a plain tensor"),
        ((hidden, weight, ids), {"tp_group": "tp"}, TypeError, "tp_group must be a process group .*, got str"),
        ((hidden, weight, ids), {"tp_group": elsewhere}, TypeError, "tp_group must be a process group that holds"),
    ]  # fmt: skip
    for arguments, options, error, text in cases:
        with pytest.raises(error, match=text):
            rf.linear_token_logprobs(*arguments, **options)


def test_what_no_kernel_can_read_is_refused(ranks):
    ranks.run(_refused)


@pytest.mark.parametrize("options", [{}, {"tp_group": object()}], ids=["whole", "shard"])
def test_parameter_that_was_put_away_is_refused(options):
    """ZeRO-3 leaves a parameter of shape [0] where no one has gathered it."""
    hidden, ids = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight must hold its elements, got \[0\]: gather it"):
        rf.linear_token_logprobs(hidden, torch.empty(0), ids, **options)


def test_other_wrappers_are_refused():
    """Quantised weights among them: their data_ptr leads nowhere."""
    hidden, weight, ids = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)
    wrapped = TwoTensor(weight, weight)
    with pytest.raises(TypeError, match="weight must be a plain tensor, got TwoTensor"):
        rf.linear_token_logprobs(hidden, wrapped, ids)
    with pytest.raises(TypeError, match="hidden must be a plain tensor, got TwoTensor"):
        rf.linear_token_logprobs(TwoTensor(hidden, hidden), weight, ids)
