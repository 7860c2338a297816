"""One tree from Python, YAML and the command line; wrong keys and values are refused in one line."""

import pytest
import yaml

from react_fast.trainer.config import ConfigError, RunConfig, TrainerConfig
from react_fast.trainer.model_config import ModelConfig
from react_fast.trainer.section import Section, valid_keys


def _sections(tree: type[Section]) -> list[type[Section]]:
    inner = [type(value) for value in vars(tree()).values() if isinstance(value, Section)]
    return [tree, *(section for one in inner for section in _sections(one))]


def test_every_field_has_a_default_and_is_documented():
    for section in _sections(RunConfig):
        for name, field in section.model_fields.items():
            nested = isinstance(field.default, Section)
            assert not field.is_required(), f"{section.__name__}.{name}"
            assert nested or field.description, f"{section.__name__}.{name}"


def test_python_yaml_and_command_line_give_the_same_tree(tmp_path):
    python = RunConfig(
        run_dir="runs/a",
        model=ModelConfig(hidden_size=64),
        trainer=TrainerConfig(learning_rate=3e-4, threads=2, credit="attribution"),
        env={"pairs": ["en-de"]},
        warm_start={"steps": 5},
    )
    path = tmp_path / "run.yaml"
    path.write_text(
        "run_dir: runs/a\nmodel: {hidden_size: 64}\nenv: {pairs: [en-de]}\nwarm_start: {steps: 5}\n"
        "trainer:\n  learning_rate: 3e-4\n  threads: 2\n  credit: attribution\n"
    )
    words = "--run_dir runs/a --hidden_size 64 --env.pairs [en-de] --warm_start.steps=5 --learning_rate 3e-4"
    assert RunConfig.from_yaml(path) == python
    assert RunConfig.from_yaml(None, f"{words} --threads 2 --trainer.credit attribution".split()) == python


def test_command_line_wins_over_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trainer: {learning_rate: 1e-3, steps: 7}\n")
    trainer = RunConfig.from_yaml(path, ["--trainer.learning_rate", "2e-3"]).trainer
    assert (trainer.learning_rate, trainer.steps) == (2e-3, 7)


def test_resolved_tree_reads_back(tmp_path):
    config = RunConfig.from_yaml(None, ["--max_grad_norm", "none"])
    config.to_yaml(tmp_path / "config.yaml")
    assert RunConfig.from_yaml(tmp_path / "config.yaml") == config
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(valid_keys(RunConfig)) >= {f"trainer.{key}" for key in written["trainer"]}
    assert set(written["trainer"]) == set(TrainerConfig.model_fields)


def test_a_first_run_needs_no_key():
    assert RunConfig() == RunConfig.from_yaml(None)


def test_text_stays_text():
    config = RunConfig.from_yaml(None, ["--run_dir", "2024", "--model.path", "1e3"])
    assert (config.run_dir, config.model.path) == ("2024", "1e3")
    config = RunConfig.from_yaml(None, ["--model.lora.r", "4", "--model.lora.target_modules", "[q_proj]"])
    assert (config.model.lora.r, config.model.lora.target_modules) == (4, ["q_proj"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainerConfig(learning_rat=1e-3), "learning_rat is not a key; did you mean learning_rate?"),
        (
            lambda: RunConfig(trainer={"learning_rat": 1e-3}),
            "trainer.learning_rat is not a key; did you mean trainer.learning_rate?",
        ),
        (lambda: RunConfig(steps=3), "steps is not a key; did you mean warm_start.steps?"),
        (lambda: RunConfig(xyzzy=3), "xyzzy is not a key"),
        (lambda: TrainerConfig(learning_rate="abc"), "learning_rate must be a valid number, got 'abc'"),
        (lambda: TrainerConfig(learning_rate=-1.0), "learning_rate must be greater than 0, got -1.0"),
        (lambda: TrainerConfig(learning_rate=float("nan")), "learning_rate must be a finite number, got nan"),
        (lambda: TrainerConfig(temperature=0), "temperature must be greater than 0, got 0"),
        (lambda: TrainerConfig(steps=True), "steps must be a valid integer, got True"),
        (lambda: TrainerConfig(steps="5"), "steps must be a valid integer, got '5'"),
        (
            lambda: TrainerConfig(credit="best"),
            "credit must be 'uniform', 'attribution', 'causal', 'monte_carlo' or 'shapley', got 'best'",
        ),
        (
            lambda: RunConfig(trainer={"minibatches": 3}),
            "trainer.minibatches must divide the 128 responses of a step, got 3",
        ),
        (lambda: ModelConfig(heads=3), "heads must divide hidden_size 256, got 3"),
    ],
)
def test_wrong_key_or_value_is_one_line(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--trainer.learning_rat 3e-4",
            "trainer.learning_rat is not a key; did you mean trainer.learning_rate?",
        ),
        ("--learning_rat 3e-4", "learning_rat is not a key; did you mean trainer.learning_rate?"),
        ("--trainr.steps 3", "trainr.steps is not a key; did you mean trainer.steps?"),
        ("--model.lora.rank 3", "model.lora.rank is not a key"),
        ("--lora.alpha 3", "lora.alpha is not a key; did you mean model.lora.alpha?"),
        ("--trainer.steps", "trainer.steps needs a value; write --key value"),
        ("steps 3", "steps is not an option; write --key value"),
        ("--steps 3.5", "trainer.steps must be a valid integer, got 3.5"),
        ("--steps [", "steps has a value that is not YAML, got '['"),
        (
            "--credit attribution --tracker.enabled false",
            "tracker.enabled must be true when trainer.credit is 'attribution', got False",
        ),
        ("--trainer 3", "trainer must be a valid dictionary or instance of TrainerConfig, got 3"),
    ],
)
def test_wrong_override_is_one_line(words, message):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_yaml(None, words.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: [", "line 1 is not YAML"),
        ("- a\n- b\n", "must be a mapping of keys to values"),
        ("trainer:\n  stepz: 3\n", "trainer.stepz is not a key; did you mean trainer.steps?"),
    ],
)
def test_wrong_yaml_is_one_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        RunConfig.from_yaml(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_batch_numbers_are_derived():
    config = TrainerConfig(prompts_per_step=4, group_size=6, minibatches=2, epochs=3, micro_batch=5, steps=10)
    assert (config.sequences_per_step, config.sequences_per_update, config.updates_per_step) == (24, 12, 6)
    line = config.batch_line()
    assert "4 prompts x 6 responses = 24 sequences a step" in line
    assert "3 micro-batch(es) of 5" in line
    assert "10 steps = 60 updates, 240 responses" in line


def test_replace_validates():
    config = TrainerConfig(steps=3)
    assert config.replace(seed=7) == TrainerConfig(steps=3, seed=7)
    with pytest.raises(ConfigError, match="steps must be greater than or equal to 1"):
        config.replace(steps=0)
