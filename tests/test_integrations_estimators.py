"""torchrl's value estimators and Stable-Baselines3's rollout buffers beside ours: numbers, gradients, training."""

import types

import numpy as np
import pytest
import torch

import react_fast as rf
from react_fast import cli
from react_fast.integrations import patching

from .peers import peer

NAMES = (
    "generalized_advantage_estimate",
    "vec_generalized_advantage_estimate",
    "td_lambda_return_estimate",
    "vec_td_lambda_return_estimate",
    "vtrace_advantage_estimate",
)
VALUES = ("state_value", "next_state_value", "reward")
FLOATS = {
    **dict.fromkeys(NAMES[:2], VALUES),
    **dict.fromkeys(NAMES[2:4], VALUES[1:]),
    NAMES[4]: ("log_pi", "log_mu", *VALUES),
}


@pytest.fixture(scope="module")
def torchrl():
    """(original, ours) of every estimator, held where `patch` replaces nothing."""
    place = peer("torchrl.objectives.value.functional")
    user = peer("torchrl.objectives.value.advantages")
    before = {name: getattr(place, name) for name in NAMES}
    state = torch.get_rng_state()
    with rf.patch("torchrl"):
        assert torch.equal(torch.get_rng_state(), state)
        ours = {name: getattr(place, name) for name in NAMES}
        assert all(getattr(user, name) is ours[name] for name in NAMES)
    assert all(getattr(place, name) is before[name] is getattr(user, name) for name in NAMES)
    return types.SimpleNamespace(theirs=before, ours=ours, advantages=user)


def _given(name, shape=(3, 17, 1), dtype=torch.float32, time_dim=1):
    """Tensors with the time on axis `time_dim`, of `shape` [B, T, F] before it was moved there."""
    tensors = {key: torch.randn(shape, dtype=dtype) for key in FLOATS[name]}
    tensors["done"] = torch.rand(shape) < 0.2
    tensors["terminated"] = tensors["done"] & (torch.rand(shape) < 0.5)
    moved = {key: x.movedim(1, time_dim).contiguous() for key, x in tensors.items()}
    return {key: x.requires_grad_(x.is_floating_point()) for key, x in moved.items()}


def _numbers(name, lam=0.9, gamma=0.97):
    return {"gamma": gamma, **({} if name == NAMES[4] else {"lmbda": lam})}


def _found(function, given, **numbers):
    results = function(**numbers, **given)
    results = results if isinstance(results, tuple) else (results,)
    live = [x for x in given.values() if x.requires_grad]
    loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in results)
    return [*results, *torch.autograd.grad(loss, live)]


def _assert_same(torchrl, name, given, **numbers):
    same = name.removeprefix("vec_") if numbers.get("lmbda") == 0 else name  # torchrl's vec_ raise IndexError
    ours, theirs = (_found(f, given, **numbers) for f in (torchrl.ours[name], torchrl.theirs[same]))
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == wanted.dtype
        # torchrl leaves powers of gamma lambda below 1e-7 out.
        tolerance = 3e-6 if got.dtype == torch.float32 else 1e-6
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_numbers_and_gradients(torchrl, name, lam):
    _assert_same(torchrl, name, _given(name), **_numbers(name, lam))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (4, 64, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes_and_dtypes(torchrl, name, shape, dtype):
    _assert_same(torchrl, name, _given(name, shape, dtype), **_numbers(name))


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("time_dim", [0, -3, 1])
def test_the_axis_of_time(torchrl, name, time_dim):
    _assert_same(torchrl, name, _given(name, time_dim=time_dim), **_numbers(name), time_dim=time_dim)


@pytest.mark.parametrize("shape", [(3, 17, 1), (4, 64, 1), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "steps first", "no rows"])
def test_without_gradient_the_numbers_are_bitwise_those_with_one(torchrl, shape, layout):
    name, given = NAMES[0], _given(NAMES[0], shape, time_dim=0 if layout == "steps first" else 1)
    options = {"time_dim": 0} if layout == "steps first" else {}
    if layout == "no rows":
        given["next_state_value"] = (
            given["next_state_value"].detach().transpose(0, 1).contiguous().transpose(0, 1)
        )
    wanted = torchrl.ours[name](**_numbers(name), **given, **options)
    kept = {key: x.clone() for key, x in given.items()}
    with torch.no_grad():
        found = torchrl.ours[name](**_numbers(name), **given, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(x, kept[key]) for key, x in given.items())


@pytest.mark.parametrize("steps", [3, 64, 67])  # less than a vector, whole ones, a rest
@pytest.mark.parametrize("ends", [(), (1,), (2, 40)], ids=len)  # vectors without an end, too
def test_in_the_core_the_bits_are_those_of_the_scan(torchrl, isa, steps, ends):
    given = _given(NAMES[0], (5, steps, 1))
    for name, shift in (("done", 0), ("terminated", 1)):
        given[name] = torch.zeros(5, steps, 1, dtype=torch.bool)
        for i in ends[shift:]:
            given[name][i % 5, min(i, steps - 1)] = True
    given["next_state_value"].detach()[given["terminated"]] = float("nan")  # nothing is read behind an end
    wanted = torchrl.ours[NAMES[0]](0.97, 0.9, **given)
    with torch.no_grad():
        found = torchrl.ours[NAMES[0]](0.97, 0.9, **given)
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got, expected.detach())
        assert bool(got.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_without_termination_done_ends_the_value_too(torchrl, name):
    given = _given(name)
    del given["terminated"]
    _assert_same(torchrl, name, given, **_numbers(name))


@pytest.mark.parametrize("name", NAMES[1:4:2])
def test_discounts_that_are_tensors_of_one_number(torchrl, name):
    numbers = {key: torch.tensor(x) for key, x in _numbers(name).items()}
    _assert_same(torchrl, name, _given(name), **numbers)


def test_v_trace_clips(torchrl):
    for clips in ({"rho_thresh": 0.7}, {"c_thresh": 0.4, "rho_thresh": torch.tensor(1.3)}):
        _assert_same(torchrl, NAMES[4], _given(NAMES[4]), gamma=0.9, **clips)


def test_what_ours_does_not_cover_goes_to_the_original(torchrl):
    name = NAMES[1]
    given = _given(name)
    gamma = torch.full_like(given["reward"], 0.9).detach()
    ours, theirs = (_found(f[name], given, gamma=gamma, lmbda=0.8) for f in (torchrl.ours, torchrl.theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    given["reward"] = given["reward"][:, :5]
    with pytest.raises(RuntimeError, match=r"shape|dimension"):
        torchrl.ours[name](0.9, 0.8, **given)


@pytest.mark.parametrize("name", NAMES[:2])
def test_discounts_with_a_gradient_or_another_dtype_go_to_the_original(torchrl, name):
    given = {key: x.detach() for key, x in _given(name).items()}
    for gamma in (torch.tensor(0.9, requires_grad=True), torch.tensor([0.9], dtype=torch.float64)):
        ours, theirs = (f[name](gamma, 0.8, **given) for f in (torchrl.ours, torchrl.theirs))
        for got, wanted in zip(ours, theirs, strict=True):
            assert (got.dtype, got.requires_grad) == (wanted.dtype, wanted.requires_grad)
            assert torch.equal(got, wanted)


def test_no_steps_go_to_the_original(torchrl):
    for f in (torchrl.ours, torchrl.theirs):
        given = {key: x.detach() for key, x in _given(NAMES[0], (2, 0, 1)).items()}
        assert all(x.shape == (2, 0, 1) for x in f[NAMES[0]](0.9, 0.8, **given))


def test_torchrl_s_gae_module_is_live(torchrl, monkeypatch):
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule

    from react_fast.integrations import torchrl as ours

    critic = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["observation"], out_keys=["state_value"])
    done = torch.zeros(2, 7, 1, dtype=torch.bool)
    done[0, 3] = done[:, -1] = True
    data = TensorDict(
        {
            "observation": torch.randn(2, 7, 3),
            "next": {
                "observation": torch.randn(2, 7, 3),
                "reward": torch.randn(2, 7, 1),
                "done": done,
                "terminated": done,
            },
        },
        [2, 7],
    )
    module = torchrl.advantages.GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    wanted = module(data.clone())["advantage"]
    calls, core = [], ours._core.gae_ahead
    monkeypatch.setattr(ours._core, "gae_ahead", lambda *x: calls.append(1) or core(*x))
    with rf.patch("torchrl"):
        calls.clear()
        got = module(data.clone())["advantage"]
        assert len(calls) == 1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_ppo_of_torchrl_trains_the_same(torchrl, monkeypatch):
    from bench.integration_runs import largest_difference, torchrl_ppo
    from react_fast.integrations import torchrl as ours

    small = {"batches": 1, "frames": 64, "epochs": 3, "size": 32}
    wanted = torchrl_ppo(**small)()
    calls, core = [], ours._core.gae_ahead
    monkeypatch.setattr(ours._core, "gae_ahead", lambda *x: calls.append(1) or core(*x))
    with rf.patch("torchrl"):
        calls.clear()
        got = torchrl_ppo(**small)()
    assert len(calls) == 3  # epochs
    assert len(wanted) == 7
    # Adam divides by the root of squares: what rounding does to a small gradient comes out enlarged.
    far, metric = largest_difference(wanted, got)
    assert far < 1e-4, metric


# ---- Stable-Baselines3 -----------------------------------------------------------------------------------------


def _buffers(envs, steps, lam):
    from gymnasium import spaces

    from react_fast.integrations.stable_baselines3 import RolloutBuffer

    space = spaces.Box(-1, 1, (1,))
    theirs = peer("stable_baselines3.common.buffers").RolloutBuffer
    numbers = np.random.default_rng(0)
    fields = {
        "rewards": numbers.normal(size=(steps, envs)),
        "values": numbers.normal(size=(steps, envs)),
        "episode_starts": numbers.random((steps, envs)) < 0.2,
    }
    for kind in (theirs, RolloutBuffer):
        buffer = kind(steps, space, space, device="cpu", gae_lambda=lam, gamma=0.98, n_envs=envs)
        for name, values in fields.items():
            getattr(buffer, name)[:] = values
        yield buffer


@pytest.mark.parametrize(("envs", "steps"), [(1, 1), (1, 9), (5, 33), (64, 9), (300, 7)])  # 256 at a time
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_rollout_buffer(isa, envs, steps, lam):
    last, dones = torch.randn(envs, 1), np.arange(envs) % 2 == 1
    theirs, ours = _buffers(envs, steps, lam)
    for buffer in (theirs, ours):
        buffer.compute_returns_and_advantage(last, dones)
    for name in ("advantages", "returns"):
        got, wanted = getattr(ours, name), getattr(theirs, name)
        assert got.dtype == wanted.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, wanted)


def test_buffers_that_the_core_cannot_read_go_to_the_original():
    found, last, dones = [], torch.ones(3, 1), np.ones(3, dtype=bool)
    for buffer in _buffers(3, 9, 0.9):
        with pytest.raises(ValueError, match=r"reshape|broadcast"):
            buffer.compute_returns_and_advantage(last[:2], dones)
        buffer.values = buffer.values.astype(np.float64)
        buffer.compute_returns_and_advantage(last, dones)
        found.append((buffer.advantages, buffer.returns))
        buffer.advantages = buffer.advantages[:, :2]
        with pytest.raises(ValueError, match="broadcast"):
            buffer.compute_returns_and_advantage(last, dones)
    for theirs, ours in zip(*found, strict=True):
        assert theirs.dtype == ours.dtype
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
@pytest.mark.parametrize("door", ["class", "patch"])
def test_training_is_the_same(algorithm, door):
    from react_fast.integrations.stable_baselines3 import RolloutBuffer

    kind = getattr(peer("stable_baselines3"), algorithm)
    sizes = {"n_steps": 32, **({"batch_size": 32, "n_epochs": 2} if algorithm == "PPO" else {})}
    found = []
    for ours in (False, True):
        if ours and door == "patch":
            rf.patch("stable_baselines3")
        try:
            chosen = RolloutBuffer if ours and door == "class" else None
            model = kind(
                "MlpPolicy", "CartPole-v1", seed=0, device="cpu", rollout_buffer_class=chosen, **sizes
            )
            model.learn(128)
        finally:
            rf.unpatch("stable_baselines3")
        metrics = {name: x for name, x in model.logger.name_to_value.items() if name.startswith("train/")}
        found.append((metrics, torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()))
    (theirs, before), (ours, after) = found
    assert theirs.keys() == ours.keys()
    assert len(theirs) > 4
    for name, wanted in theirs.items():
        assert ours[name] == pytest.approx(wanted, rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("envs", [1, 3])
def test_advantages_are_0_where_rewards_and_values_cancel(envs):
    """Their own test compares with zeros, to 1e-8."""
    for buffer in _buffers(envs, 192, 0.9):
        buffer.gamma = 1.0
        buffer.values[:] = 1.0
        buffer.rewards[:], buffer.episode_starts[:] = 0.0, 0.0
        buffer.rewards[63::64], buffer.episode_starts[::64] = 1.0, 1.0
        buffer.compute_returns_and_advantage(torch.ones(envs, 1), np.ones(envs, dtype=bool))
        assert not buffer.advantages.any()
        assert (buffer.returns == 1).all()


def test_dictionaries_of_observations_have_a_buffer_too():
    from react_fast.integrations import stable_baselines3 as ours

    theirs = peer("stable_baselines3.common.buffers")
    assert issubclass(ours.DictRolloutBuffer, theirs.DictRolloutBuffer)
    assert ours.RolloutBuffer is ours.RolloutBuffer
    with pytest.raises(AttributeError, match="ReplayBuffers"):
        _ = ours.ReplayBuffers


def test_info_lists_the_integrations(monkeypatch, capsys):
    peer("stable_baselines3")
    monkeypatch.setattr(patching, "NAMES", ("stable_baselines3",))
    assert cli.main(["info", "--integrations"]) == 0
    titles, line = capsys.readouterr().out.splitlines()
    assert titles.split() == ["package", "version", "patch", "point", "replacement", "state"]
    place = "common.buffers.RolloutBuffer.compute_returns_and_advantage"
    assert [*line.split()[:1], *line.split()[2:]] == ["stable_baselines3", place, "gae", "available"]
