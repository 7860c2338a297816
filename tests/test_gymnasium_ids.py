"""The shipped tasks by Gymnasium id, alone and in vectors."""

import json
import warnings
from pathlib import Path

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from react_fast.envs.registry import TASKS, make
from react_fast.envs.tasks import semantic_roles, translation

TINY = "react_fast/SemanticRoles-v0"


@pytest.mark.parametrize("name", TASKS)
def test_every_id_passes_the_checker_without_a_warning(name):
    # The whole standard library takes seconds to read.
    few = {"sources": Path(json.__file__).parent} if "Summ" in name else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(f"react_fast.envs:{name}", split="train", **few)
        check_env(env.unwrapped)
    state, info = env.reset(seed=3, options={"index": 1})
    record = env.unwrapped.records[1]
    assert (state, info["index"]) == (record.prompt, 1)
    assert env.step(record.reference)[1] == pytest.approx(1)


def test_options_reach_the_task_and_the_environment():
    env = gymnasium.make(
        "react_fast/Translation-v0", pairs=["es-it"], split="test", max_turns=2, reward=lambda s, a, r: 0.5
    ).unwrapped
    assert env.records == translation.load(["es-it"], "test")
    env.reset(seed=0)
    assert env.step("x")[1:4] == (0.5, False, False)
    with pytest.raises(ValueError, match=r"task must be one of translation, .*, got 'chess'"):
        make("chess")
    with pytest.raises(ValueError, match="split must be one of"):
        gymnasium.make(TINY, split="dev")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vectors(mode):
    options = {} if mode == "sync" else {"shared_memory": False}
    envs = gymnasium.make_vec(
        TINY,
        num_envs=2,
        vectorization_mode=mode,
        vector_kwargs={**options, "autoreset_mode": AutoresetMode.SAME_STEP},
        split="validation",
    )
    try:
        records = semantic_roles.load("validation")
        states, info = envs.reset(seed=[5, 6])
        chosen = [records[i] for i in info["index"]]
        assert states == tuple(record.prompt for record in chosen)
        _, rewards, terminated, _, info = envs.step((chosen[0].reference, ""))
        assert rewards.tolist() == [1, 0]
        assert terminated.all()
        assert info["final_obs"][0] == chosen[0].prompt + chosen[0].reference
    finally:
        envs.close()
