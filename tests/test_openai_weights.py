"""New weights for a server of completions: written whole, reloaded, and told where nobody reloads them."""

import json
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from react_fast.trainer.rollout import EngineError
from react_fast.trainer.rollout.weights import WeightFolder

from .completion_client import IDS, LOGPROBS, MODEL, PARAMS, PROMPT, TOKENIZER
from .completion_client import make_engine as _engine
from .completion_server import Double, vllm


def test_weights_appear_complete_and_are_reloaded(tmp_path):
    def reload(handler: Any, body: dict[str, Any]) -> None:
        loaded.append(body)
        handler.send(200, {"success": len(loaded) < 3, "message": "no room"})

    loaded: list[dict[str, Any]] = []
    with Double(vllm(IDS, LOGPROBS), models=["m"]) as server:
        engine = _engine(
            server, sync_dir=tmp_path / "weights", reload=f"{server.url}/update_weights_from_disk"
        )
        server.replies = [reload]
        for version in (1, 1, 2):
            engine.sync_weights(MODEL, version)
        assert [body["weight_version"] for body in loaded] == ["1", "2"]
        with pytest.raises(EngineError, match="did not load version 3: no room"):
            engine.sync_weights(MODEL, 3)
        assert engine.version == 2
        server.replies = [vllm(IDS, LOGPROBS)]
        assert engine.generate([PROMPT], PARAMS)[0].weights_version == 2
    written = AutoModelForCausalLM.from_pretrained(loaded[1]["model_path"], dtype=torch.float32)
    for name, value in MODEL.state_dict().items():
        assert torch.equal(written.state_dict()[name], value), name
    # Nothing half-written stays, and only what a server may still be reading.
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "version-00000002",
        "version-00000003",
    ]


def test_a_reload_may_be_a_function(tmp_path):
    seen = []
    with Double(vllm(IDS, LOGPROBS), models=["m"]) as server:
        engine = _engine(
            server, sync_dir=tmp_path, reload=lambda folder, version: seen.append((folder, version))
        )
        engine.sync_weights(MODEL, 7)
    assert [(folder.name, version) for folder, version in seen] == [("version-00000007", 7)]
    assert json.loads((seen[0][0] / "config.json").read_text())["vocab_size"] == MODEL.config.vocab_size


def test_a_server_without_new_weights_is_told():
    with Double(vllm(IDS, LOGPROBS), models=["m"]) as server:
        engine = _engine(server)
        with pytest.warns(UserWarning, match="the server keeps the weights it started with"):
            engine.sync_weights(MODEL, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.sync_weights(MODEL, 0)


def test_what_a_killed_or_taken_back_run_left_is_removed(tmp_path):
    folder = WeightFolder(tmp_path, TOKENIZER)
    for version in (8, 9):
        folder.write(MODEL, version)
    (tmp_path / ".version-00000010.1").mkdir()
    for version in (5, 6, 7):
        folder.write(MODEL, version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-00000006", "version-00000007"]


def test_weights_that_nobody_tells_the_server_of_are_told(tmp_path):
    with Double(vllm(IDS, LOGPROBS), models=["m"]) as server:
        engine = _engine(server, sync_dir=tmp_path)
        with pytest.warns(UserWarning, match="nothing tells the server, since reload_url is not set"):
            engine.sync_weights(MODEL, 1)
