"""The engine that a configuration names: made, refused in one line, trained with."""

import types
from typing import Any

import pytest

from react_fast.cli import main
from react_fast.trainer.algorithms import GRPO
from react_fast.trainer.config import RolloutConfig, RunConfig
from react_fast.trainer.rollout import (
    ContinuousBatchingEngine,
    GenerateEngine,
    OpenAIEngine,
    PolicyEngine,
    make_engine,
)
from react_fast.trainer.rollout.engines import ENGINES
from react_fast.trainer.section import ConfigError
from react_fast.trainer.trainer import Trainer

from .completion_server import Double, vllm
from .test_trainer import _config, _env, _Log, _policy, _weights
from .tiny import train_words

MODEL, TOKENIZER = _policy()


def test_every_engine_of_the_configuration_is_in_the_table():
    assert list(ENGINES) == list(RolloutConfig.model_fields["engine"].annotation.__args__)


def test_the_engines_are_made():
    assert make_engine(RolloutConfig(), MODEL, TOKENIZER) is None
    found = make_engine(
        RolloutConfig(engine="generate", generation_options={"repetition_penalty": 1.1}), MODEL, TOKENIZER
    )
    assert isinstance(found, GenerateEngine)
    assert found.options == {"repetition_penalty": 1.1}
    continuous = make_engine(RolloutConfig(engine="continuous"), MODEL, TOKENIZER)
    assert isinstance(continuous, ContinuousBatchingEngine)


def test_a_tokenizer_without_a_pad_token_fills_rows_with_the_end_token():
    tokenizer = types.SimpleNamespace(eos_token_id=0, pad_token_id=None)
    assert make_engine(RolloutConfig(engine="generate"), MODEL, tokenizer).pad_id == 0
    tokenizer.eos_token_id = 7
    assert make_engine(RolloutConfig(engine="continuous"), MODEL, tokenizer).pad_id == 7


def test_a_servers_engine_has_the_options_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    options: dict[str, Any] = {"retries": 2, "timeout": 7.0, "concurrency": 3, "server_logprobs": "processed"}
    with Double(vllm([5], [-1.0]), models=["m"]) as server:
        config = RolloutConfig(engine="openai", base_url=server.url, api_key_variable="SERVER_KEY", **options)
        found = make_engine(config, MODEL, TOKENIZER, tmp_path)
        assert isinstance(found, OpenAIEngine)
        assert (found.client.retries, found.client.timeout, found.client.api_key) == (2, 7.0, "secret")
        assert (found.concurrency, found.server_logprobs, found.weights) == (3, "processed", None)
        config = config.replace(reload_url="http://127.0.0.1:9/reload")
        found = make_engine(config, MODEL, TOKENIZER, tmp_path)
        assert found.weights.path == tmp_path


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"rollout": {"engin": "policy"}}, "rollout.engin is not a key; did you mean rollout.engine?"),
        (
            {"rollout": {"engine": "vllm"}},
            "rollout.engine must be 'policy', 'generate', 'continuous' or 'openai'",
        ),
        (
            {"rollout": {"engine": "openai"}, "trainer": {"top_p": 0.9}},
            "trainer.top_p must be 1.0 for rollout.engine",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tree, message):
    with pytest.raises(ConfigError) as error:
        RunConfig(**tree)
    assert message in str(error.value)


def test_a_missing_key_or_server_ends_the_command_in_one_line(tmp_path, capsys):
    words = train_words(tmp_path)
    server = ["--rollout.engine", "openai", "--base_url", "http://127.0.0.1:9/v1", "--retries", "0"]
    assert main([*words, *server]) == 2
    assert "http://127.0.0.1:9/v1/models: cannot be reached" in capsys.readouterr().err
    assert main([*words, *server, "--api_key_variable", "NO_SUCH_KEY", "--resume", "auto"]) == 2
    assert "rollout.api_key_variable names NO_SUCH_KEY, which is not set" in capsys.readouterr().err


def test_training_with_generate_measures_no_mismatch():
    """Another sampler of the same policy: its log-probabilities are the trainer's to float32 rounding."""
    model, tokenizer = _policy()
    engine = GenerateEngine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    log = _Log()
    config = _config(top_p=0.9, temperature=0.8, importance="truncate")
    trainer = Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=config, reporter=log, engine=engine)
    for _ in range(2):
        trainer.train_step()
        assert log.metrics[-1]["sampling/sampling_logp_difference/max"] < 1e-5
        assert log.metrics[-1]["sampling/ess"] == pytest.approx(1, abs=1e-8)


def test_training_with_a_server_gives_it_the_weights_of_every_step(tmp_path):
    seen = []
    with Double(vllm([70, 71, 72], [-1.0, -2.0, -3.0]), models=["m"]) as server:
        model, tokenizer = _policy()
        engine = OpenAIEngine(
            server.url,
            tokenizer=tokenizer,
            eos_id=tokenizer.eos_token_id,
            sync_dir=tmp_path,
            reload=lambda folder, version: seen.append(version),
        )
        log = _Log()
        config = _config(max_new_tokens=3, epochs=2, importance="truncate")
        trainer = Trainer(
            model, tokenizer, _env(), algorithm=GRPO(), config=config, reporter=log, engine=engine
        )
        before = _weights(model)
        for _ in range(2):
            trainer.train_step()
    assert seen == [0, 2]  # two updates a step
    assert [metrics["rollout/weights_version"] for metrics in log.metrics] == [0, 2]
    assert log.metrics[0]["sampling/kl_k1"] > 0.1
    assert not (_weights(model) == before).all() or log.metrics[0]["reward_std"] == 0


def test_the_policy_engine_is_what_a_trainer_takes_by_itself():
    model, tokenizer = _policy()
    assert isinstance(
        Trainer(model, tokenizer, _env(), algorithm=GRPO(), config=_config()).engine, PolicyEngine
    )
