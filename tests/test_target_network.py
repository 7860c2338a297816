"""Polyak averages and periodic copies of a target network."""

import copy
import io

import pytest
import torch

import react_fast as rf

from .ranks import Collectives


def _network(dtype=torch.float32):
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    return network.to(dtype)


def _numbers(network):
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_polyak_closes_the_gap_geometrically(chosen):
    """k updates leave (1 - tau)^k of the distance to an online network that stands still."""
    online, target, tau = _network(torch.float64), _network(torch.float64), 0.1
    start, goal = _numbers(target), _numbers(online)
    with rf.use_backend(chosen):
        for _ in range(7):
            rf.polyak_update(target, online, tau=tau)
    expected = goal + (1 - tau) ** 7 * (start - goal)
    torch.testing.assert_close(_numbers(target), expected, rtol=1e-14, atol=1e-14)  # seven float64 roundings
    assert torch.equal(_numbers(online), goal)


@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_ends(chosen):
    """tau 1 copies the bits, whatever the target held; tau 0 leaves the parameters; buffers are copied whole."""
    for dtype in (torch.float32, torch.bfloat16):
        online, target = _network(dtype), _network(dtype)
        online[1].running_mean.fill_(3.0)
        online[1].num_batches_tracked.fill_(7)
        with torch.no_grad():
            target[0].weight.fill_(float("nan"))
        with rf.use_backend(chosen):
            rf.polyak_update(target, online, tau=1.0)
        assert torch.equal(_numbers(target), _numbers(online))
        assert float(target[1].running_mean[0]) == 3.0
        assert int(target[1].num_batches_tracked) == 7
    online, target = _network(), _network()
    before = _numbers(target)
    with rf.use_backend(chosen):
        rf.polyak_update(target, online, tau=0.0)
    assert torch.equal(_numbers(target), before)


def test_backends_agree():
    online, target = _network(torch.float64), _network(torch.float64)
    other = copy.deepcopy(target)
    rf.polyak_update(target, online, tau=0.7)
    with rf.use_backend("reference"):
        rf.polyak_update(other, online, tau=0.7)
    torch.testing.assert_close(_numbers(target), _numbers(other), rtol=1e-15, atol=1e-15)


def test_in_place_and_without_gradient():
    online, target = _network(), _network()
    pointers = [p.data_ptr() for p in target.parameters()]
    online(torch.randn(4, 3)).sum().backward()
    rf.polyak_update(target, online, tau=0.5)
    assert [p.data_ptr() for p in target.parameters()] == pointers
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in target.parameters())


def test_iterables_of_tensors():
    online, target = [torch.ones(3), torch.full((2,), 4.0)], [torch.zeros(3), torch.zeros(2)]
    rf.polyak_update(iter(target), tuple(online), tau=0.25)
    assert target[0].tolist() == [0.25] * 3
    assert target[1].tolist() == [1.0] * 2
    rf.polyak_update([], [], tau=0.5)
    strided = torch.zeros(4, 4).T[::2]
    rf.polyak_update([strided], [torch.ones(2, 4)], tau=1.0)
    assert bool((strided == 1).all())


def test_periodic_copies():
    online, target = [torch.zeros(1)], [torch.zeros(1)]
    update = rf.TargetUpdate(target, online, every=3)
    moved, seen = [], []
    for step in range(1, 8):
        online[0].fill_(step)
        moved.append(update.step())
        seen.append(float(target[0]))
    assert moved == [False, False, True] * 2 + [False]
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_the_counter_survives_a_checkpoint():
    online, target = [torch.ones(1)], [torch.zeros(1)]
    update = rf.TargetUpdate(target, online, every=4, tau=0.5)
    for _ in range(3):
        update.step()
    file = io.BytesIO()
    torch.save(update.state_dict(), file)
    file.seek(0)
    resumed = rf.TargetUpdate(target, online, every=4, tau=0.5)
    resumed.load_state_dict(torch.load(file))
    assert resumed.step()
    assert float(target[0]) == 0.5
    for state in ({}, {"steps": -1}, {"steps": True}, {"steps": "3"}):
        with pytest.raises(ValueError, match=r"^state must be what state_dict\(\) returned"):
            resumed.load_state_dict(state)


def test_every_step_of_an_optimizer():
    """Polyak after each step is the exponential average of the weights."""
    online = [torch.zeros(1, dtype=torch.float64)]
    target = [torch.zeros(1, dtype=torch.float64)]
    update, average = rf.TargetUpdate(target, online, tau=0.01), 0.0
    for step in range(100):
        online[0].add_(step)
        average += 0.01 * (float(online[0]) - average)
        assert update.step()
    assert float(target[0]) == pytest.approx(average, rel=1e-13)


def _sharded(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    whole, goal = torch.arange(12.0).view(6, 2), torch.ones(6, 2)
    target, online = (distribute_tensor(x.clone(), mesh, [Shard(0)]) for x in (whole, goal))
    with Collectives() as seen:
        rf.polyak_update([target], [online], tau=0.5)
    assert seen.count == 0
    assert torch.equal(target.full_tensor(), (whole + goal) / 2)
    other = distribute_tensor(goal, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"^target\[0\] must be placed like online\[0\]"):
        rf.polyak_update([target], [other], tau=0.5)


def test_sharded_parameters_move_in_their_parts(ranks):
    ranks.run(_sharded)


@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_refusals(chosen):
    a, b = torch.zeros(3), torch.ones(3)
    wrong = [
        (([a], [b, b]), {}, ValueError, r"^target must have 2 tensors like online, got 1"),
        (([a], [b[:2]]), {}, ValueError, r"^target\[0\] must be \[2\] like online\[0\], got \[3\]"),
        (([a], [b.double()]), {}, TypeError, r"^target\[0\] must be float64 like online\[0\], got float32"),
        (([a], [b.to("meta")]), {}, ValueError, r"^target\[0\] must be on meta like online\[0\], got cpu"),
        (([a], [a]), {}, ValueError, r"^target\[0\] must not be online\[0\] itself"),
        (
            ([a.bfloat16()], [b.bfloat16()]),
            {},
            TypeError,
            r"^target\[0\] must be float32 or float64 with tau 0.1",
        ),
        (
            ([a.int()], [b.int()]),
            {},
            TypeError,
            r"^target\[0\] must be float32, bfloat16, float16 or float64",
        ),
        ((a, [b]), {}, TypeError, r"^target must be a module or an iterable of tensors, got Tensor"),
        (([a], 3), {}, TypeError, r"^online must be a module or an iterable of tensors, got int"),
        (([a], [[1.0]]), {}, TypeError, r"^online\[0\] must be a torch.Tensor, got list"),
        (([a], [b]), {"tau": 1.5}, ValueError, r"^tau must be in \[0, 1\], got 1.5"),
        (([a], [b]), {"tau": float("nan")}, ValueError, r"^tau must be in \[0, 1\], got nan"),
        (([a], [b]), {"tau": "1"}, TypeError, r"^tau must be a number, got str"),
    ]
    with rf.use_backend(chosen):
        for given, options, error, line in wrong:
            for call in (rf.polyak_update, rf.TargetUpdate):
                with pytest.raises(error, match=line) as caught:
                    call(*given, **{"tau": 0.1, **options})
                assert "\n" not in str(caught.value)
        for every, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
            with pytest.raises(error, match=r"^every must be "):
                rf.TargetUpdate([a], [b], every=every)
        same = _network()
        with pytest.raises(ValueError, match=r"^target\[0\] must not be online\[0\] itself"):
            rf.polyak_update(same, same, tau=0.5)
    assert not bool(a.any())
