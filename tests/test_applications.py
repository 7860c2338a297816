"""`react-fast applications`: both credits from one warm start, the table, going on where it stopped."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from react_fast import cli
from react_fast.trainer import applications as module
from react_fast.trainer.checkpoint import newest_complete
from react_fast.trainer.config import RunConfig
from react_fast.trainer.model import fresh_model
from react_fast.trainer.sources import load_environments, metric_names, texts

from . import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


def _configs(folder):
    """A task that ships and one from files, tiny."""
    files = {split: tiny.records(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    envs = {
        "words": {**files, "reward": "exact_match", "metrics": ["squad_f1"]},
        "roles": {"task": "semantic_roles"},
    }
    paths = []
    for name, env in envs.items():
        tree = {**tiny.TINY, "model": {**tiny.TINY["model"], "max_length": 96}, "env": env}
        paths.append(str(folder / f"{name}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump(tree))
    return paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("applications")
    out = folder / "out"
    words = ["applications", *_configs(folder), "--out", str(out), "--quick"]
    assert cli.main(words) == 0
    return words, out


def test_the_table_has_every_policy_of_every_task(made):
    _, out = made
    text = (out / "applications.md").read_text()
    assert text.index("## words") < text.index("## roles")
    assert "| policy | F1 | reward x100 |" in text
    assert "| policy | span F1 | reward x100 |" in text
    for policy in (
        "random policy",
        "warm start",
        "RL",
        "RL + causal credit",
        "RL + causal credit minus warm start",
    ):
        assert text.count(f"| {policy}, greedy | ") == 2
    found = json.loads((out / "applications.json").read_text())
    assert list(found["roles"]) == ["random", "warm_start", "rl", "rl_causal", "gain", "gain_causal"]
    for results in found.values():
        for modes in results.values():
            for metrics in modes.values():
                assert all(low <= value <= high for value, low, high in metrics.values())


def test_both_credits_start_from_the_same_weights(made):
    _, out = made
    for name in ("words", "roles"):
        starts, configs, answers = [], [], []
        for credit in ("uniform", "causal"):
            run = out / name / credit
            starts.append(newest_complete(run / "checkpoints" / "warm_start"))
            configs.append(yaml.safe_load((run / "config.yaml").read_text()))
            answers.append((run / "answers" / "warm_start.sampled.json").read_text())
        uniform, causal = (load_file(start / "model.safetensors") for start in starts)
        assert all((uniform[key] == causal[key]).all() for key in uniform)
        assert answers[0] == answers[1]
        assert [config["trainer"].pop("credit") for config in configs] == ["uniform", "causal"]
        assert configs[0].pop("run_dir") != configs[1].pop("run_dir")
        assert configs[0] == configs[1]
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [(line["phase"], line["step"]) for line in steps] == [
            ("warm_start", 1), ("warm_start", 2), ("rl", 1), ("rl", 2)
        ]  # fmt: skip


def test_going_on_does_only_what_is_missing(made, monkeypatch):
    words, out = made
    before = json.loads((out / "applications.json").read_text())
    done = []
    monkeypatch.setattr(module, "run", lambda config, **_: done.append(config.run_dir))
    assert cli.main(words) == 0
    assert not done
    assert json.loads((out / "applications.json").read_text()) == before


def test_another_configuration_is_not_taken_for_finished(made, capsys):
    words, _ = made
    assert cli.main([word for word in words if word != "--quick"]) == 2
    error = capsys.readouterr().err
    assert "was finished with another configuration (env." in error
    assert " -> " in error
    assert "; choose another --out" in error


def test_names_must_differ(capsys, tmp_path):
    assert cli.main(["applications", "a/x.yaml", "b/x.yaml", "--out", str(tmp_path)]) == 2
    assert "configs must be at least one file, each of another name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["question_answering", "semantic_roles"])
def test_examples_fit_their_models(name):
    """Reward and metrics are the task's, and the model can write every answer behind its prompt."""
    config = RunConfig.from_yaml(EXAMPLES / f"{name}.yaml")
    assert config.env.reward in metric_names(config.env)
    records = load_environments(config.env)["train"].records
    sizes = {"vocab_size": config.model.vocab_size, "hidden_size": 8, "layers": 1}
    _, tokenizer = fresh_model(texts(records[:2000]), **sizes)
    for text, limit in (("prompt", config.model.max_length), ("reference", config.trainer.max_new_tokens)):
        longest = sorted((getattr(record, text) for record in records), key=len)[-50:]
        room = limit - (config.trainer.max_new_tokens if text == "prompt" else 1)
        assert max(len(tokenizer(one)["input_ids"]) for one in longest) <= room
