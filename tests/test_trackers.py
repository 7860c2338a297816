"""Numbers reach accelerate's trackers; a package that is missing is named in one line."""

import json
import sys
import types

import pytest

from react_fast.cli import main

from .tiny import train_words


class Service(types.ModuleType):
    """A double of wandb and of trackio, which accelerate calls alike: init(project, name), config.update, log."""

    def __init__(self, name):
        super().__init__(name)
        self.logged, self.settings, self.finished = [], {}, False
        self.config = types.SimpleNamespace(update=lambda values, **_: self.settings.update(values))

    def init(self, project, name):
        self.project, self.run_name = project, name
        return self

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_sends_what_metrics_jsonl_holds(tmp_path, monkeypatch, name):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    words = train_words(tmp_path, logging={"trackers": [name], "project": "mine"}, trainer={"steps": 2})
    assert main(words) == 0
    assert (service.project, service.run_name, service.finished) == ("mine", "run", True)
    assert service.settings["trainer.steps"] == 2
    assert service.settings["logging.trackers"] == f"['{name}']"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == ["warm_start"] * 3 + ["rl"] * 2
    assert [step for step, _ in service.logged] == [1, 2, 3, 4, 5], "steps of a service must not fall"
    for record, (_, sent) in zip(records, service.logged, strict=True):
        phase = record.pop("phase")
        kept = {f"{phase}/{key}": value for key, value in record.items() if key not in ("step", "time")}
        assert sent == kept
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert main([*train_words(tmp_path), "--logging.trackers", f"[{name}]"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("react-fast")]
    assert f"logging.trackers names {name}, which is not installed; pip install {name}" in line
