"""One configuration tree for Python, YAML and the command line.

Every field has a default and its unit in its description; values are never silently cast; an unknown key is
refused with the nearest valid one.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from .env_config import EnvConfig
from .model_config import ModelConfig
from .overrides import assign, override_pairs, read_yaml
from .section import ConfigError, Count, Few, Natural, NonNegative, Positive, Section, Seed


def _need_evaluations(section: Any) -> Any:
    for name in ("early_stopping", "best_by"):
        if getattr(section, name, None) and not section.eval_every:
            raise ConfigError("eval_every", f"must be at least 1 when {name} is given, got 0")
    return section


class WarmStartConfig(Section):
    """Supervised warm start on the records' references, before reinforcement learning."""

    learns: Literal["reference", "all"] = "reference"
    """Tokens that are learnt: the reference's, or the prompt's too."""
    steps: Natural = 0
    """Optimiser steps; 0: none."""
    batch_size: Count = 64
    """Records per optimiser step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    lr_warmup_steps: Natural = 20
    """Steps of linear warm-up from 0."""
    eval_every: Natural = 0
    """Steps between evaluations; 0: none."""
    save_every: Natural = 0
    """Steps between checkpoints; 0: at the end only."""
    early_stopping: Natural = 0
    """Evaluations without gain before a stop; 0: never."""

    _evaluates = model_validator(mode="after")(_need_evaluations)


class AlgorithmConfig(Section):
    """The algorithm; its options are checked against its fields."""

    name: str = "grpo"
    """Algorithm: grpo, ppo, dpo, ...; react_fast.trainer.algorithms has the table."""
    options: dict[str, Any] = Field(default={})
    """Fields of the algorithm's class."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        from .algorithms import ALGORITHMS  # which needs much more than a configuration does

        if name not in ALGORITHMS:
            close = difflib.get_close_matches(name, ALGORITHMS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError("", f"must be one of {', '.join(ALGORITHMS)}, got {name!r}{hint}")
        return name


class TrackerConfig(Section):
    """What the causality tracker observes."""

    enabled: bool = True
    """Track attribution; write report.html."""
    every: Count = 1
    """Training steps between observations."""
    intervention_prompts: Natural = 8
    """Test prompts for token deletion."""
    seed: Seed = 0
    """Seed of the interventions."""
    groups: list[str] = Field(default=[])
    """Names that records bear as metadata "group", told apart by the tracker; each record one of them."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Weight of what was observed, one training step later; 1: all counts alike."""


class TrainerConfig(Section):
    """Everything the trainer needs beside model, environment, algorithm and tracker."""

    seed: Seed = 0
    """Seed of every random number, keyed with step and row."""
    steps: Count = 100
    """Training steps; each collects one rollout batch."""
    prompts_per_step: Count = 16
    """Prompts of a rollout batch."""
    group_size: Count = 8
    """Responses sampled for each prompt."""
    micro_batch: Count | None = None
    """Sequences per forward; none: a minibatch."""
    micro_tokens: Count | None = None
    """Tokens per forward, padding included, instead of micro_batch: sequences of like length go together; one
    beyond it goes alone."""
    padding: Literal["padded", "packed"] = "padded"
    """Sequences of a forward stand in rows of their own, or several share a row where the model's attention allows
    it; the same gradients."""
    minibatches: Count = 1
    """Optimiser updates that share one pass over a rollout batch."""
    epochs: Count = 1
    """Passes over each rollout batch."""
    max_new_tokens: Count = 32
    """Longest response of a turn, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature of the rollouts, in [1e-30, 1e30]."""
    top_k: Count | None = None
    """Rollouts sample from this many of the most probable tokens; none: all. What is kept is what the policy is
    scored over, exactly so in a step's first update."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rollouts sample from the fewest most probable tokens of this mass; 1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rollouts sample from tokens at least this share as probable as the most probable one; 0: all."""
    importance: Literal["none", "truncate", "mask"] = "none"
    """Weights p/q for tokens that the rollout engine sampled with another probability q: bounded by clipping, or
    by leaving out."""
    importance_low: NonNegative = 0.0
    """Smallest weight."""
    importance_high: Positive = 2.0
    """Largest weight."""
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    """A weight's ratio: a token's, the product over its sequence, or that product's mean per token."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimiser."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    lr_warmup_steps: Natural = 0
    """Optimiser updates of linear warm-up from 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive | None = 1.0
    """Gradient norm is clipped to this; none: never."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the model's products in updates and scores; bfloat16: autocast, parameters stay as they are."""
    gradient_checkpointing: bool = False
    """Run every layer again in the backward instead of keeping its activations."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL divergence to the policy at the start."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    credit: Literal["uniform", "attribution", "causal", "monte_carlo", "shapley"] = "uniform"
    """Spread of an advantage over tokens."""
    credit_floor: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share that attribution, causal and shapley credit leave uniform; 1: all."""
    credit_actions: Literal["token", "word", "sentence", "line", "step", "turn"] = "token"
    """Actions that causal and shapley credit measure and monte_carlo credit values."""
    credit_interventions: Count = 16
    """Causal and shapley credit: most episodes that a step plays again."""
    credit_every: Count = 1
    """Causal and shapley credit: training steps between interventions."""
    credit_by: Literal["episode", "token", "token_at_position"] = "episode"
    """Causal credit: effects count in the episode they were measured in, or in all by token (and place)."""
    credit_half_life: Annotated[float, Field(ge=0.01)] | None = None
    """Causal credit by token (and place): training steps after which a measured effect counts half, as the policy
    has moved; none: all count alike."""
    credit_samples: Count = 4
    """monte_carlo credit: episodes played on from each state; shapley: pairs of orders above 10 actions."""
    eval_every: Natural = 0
    """Steps between evaluations; 0: none."""
    eval_batch: Count = 64
    """Episodes generated together in an evaluation or a replay."""
    early_stopping: Natural = 0
    """Evaluations without gain before a stop; 0: never."""
    save_every: Natural = 0
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    best_by: str | None = None
    """Metric whose best evaluation is saved and kept, too, such as eval/reward; "-" in front: the lowest is best;
    none: no best checkpoint."""
    checkpoint_dir: str | None = None
    """Folder of the checkpoints; none: no checkpoints."""
    sample_every: Natural = 0
    """Steps between printed samples; 0: none."""
    sharded: bool = False
    """Several processes split the parameters (FSDP2); false: each holds a copy (DDP)."""
    threads: Few | None = None
    """CPU threads; none: what torch chose."""

    _evaluates = model_validator(mode="after")(_need_evaluations)

    @model_validator(mode="after")
    def _few_actions(self) -> "TrainerConfig":
        if self.credit == "shapley" and self.credit_actions == "token":
            raise ConfigError("credit_actions", "must be longer than 'token' when credit is 'shapley'")
        if self.credit == "shapley" and self.credit_samples < 2:
            raise ConfigError("credit_samples", "must be at least 2 when credit is 'shapley', got 1")
        return self

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "TrainerConfig":
        if self.importance_low > self.importance_high:
            problem = f"must be at most importance_high {self.importance_high:g}, got {self.importance_low:g}"
            raise ConfigError("importance_low", problem)
        return self

    @field_validator("temperature")
    @classmethod
    def _divides_logits(cls, temperature: float) -> float:
        if not 1e-30 <= temperature <= 1e30:
            raise ConfigError("", f"must be in [1e-30, 1e+30], got {temperature:g}")
        return temperature

    @model_validator(mode="after")
    def _one_size_of_forwards(self) -> "TrainerConfig":
        if self.micro_batch is not None and self.micro_tokens is not None:
            raise ConfigError("micro_tokens", f"must be none beside micro_batch, got {self.micro_tokens}")
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "TrainerConfig":
        if self.sequences_per_step % self.minibatches:
            problem = f"must divide the {self.sequences_per_step} responses of a step, got {self.minibatches}"
            raise ConfigError("minibatches", problem)
        return self

    @property
    def sequences_per_step(self) -> int:
        """Responses of a rollout batch."""
        return self.prompts_per_step * self.group_size

    @property
    def sequences_per_update(self) -> int:
        """Responses that one optimiser update sees."""
        return self.sequences_per_step // self.minibatches

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates of a training step."""
        return self.minibatches * self.epochs

    def batch_line(self) -> str:
        """Every batch number that follows from the ones the user gave, in one line."""
        micro = min(self.micro_batch or self.sequences_per_update, self.sequences_per_update)
        forwards = f"{-(-self.sequences_per_update // micro)} micro-batch(es) of {micro}"
        if self.micro_tokens is not None:
            forwards = f"micro-batches of at most {self.micro_tokens} tokens"
        per_step, per_update = self.sequences_per_step, self.sequences_per_update
        updates, responses = self.steps * self.updates_per_step, self.steps * per_step
        return (
            f"{self.prompts_per_step} prompts x {self.group_size} responses = {per_step} sequences a step;"
            f" {self.updates_per_step} update(s) a step, each of {per_update} sequences in {forwards};"
            f" {self.steps} steps = {updates} updates, {responses} responses of"
            f" at most {self.max_new_tokens} tokens"
        )


class RolloutConfig(Section):
    """What generates the rollouts. With the engine "policy" runs resume to the bit; a server's do not repeat."""

    engine: Literal["policy", "generate", "continuous", "openai"] = "policy"
    """The policy itself, transformers' generate or its continuous batching, or a server that speaks OpenAI's
    completions API (vLLM, SGLang, llama.cpp)."""
    generation_options: dict[str, Any] = Field(default={})
    """generate, continuous: more fields of transformers' GenerationConfig."""
    base_url: str = "http://localhost:8000/v1"
    """openai: where the server is."""
    served_model: str | None = None
    """openai: the server's name for the model; none: the only one it serves."""
    api_key_variable: str | None = None
    """openai: environment variable that holds the key; none: no key."""
    timeout: Positive = 120.0
    """openai: seconds for one answer."""
    retries: Natural = 4
    """openai: further attempts after a failure, with growing waits."""
    concurrency: Count = 16
    """openai: requests at a time."""
    server_logprobs: Literal["raw", "processed"] = "raw"
    """openai: log-probabilities are at temperature 1 (llama.cpp, vLLM as it starts), or those sampled from."""
    sync_dir: str | None = None
    """openai: folder for new weights; none: in the run folder if reload_url is set, else none are written."""
    reload_url: str | None = None
    """openai: where {"model_path", "weight_version"} is posted then (SGLang: /update_weights_from_disk)."""


class LoggingConfig(Section):
    """Where the numbers of metrics.jsonl go, too."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=["tensorboard"])
    """Through accelerate; wandb and trackio need their packages and log every phase as PHASE/metric."""
    project: Annotated[str, Field(min_length=1)] = "react_fast"
    """wandb, trackio: the project; a run has the name of its folder, one gone on with begins another."""


class RunConfig(Section):
    """A whole run: what `react-fast train` does."""

    run_dir: Annotated[str, Field(min_length=1)] = "runs/default"
    """Run folder."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    tracker: TrackerConfig = TrackerConfig()
    trainer: TrainerConfig = TrainerConfig()
    rollout: RolloutConfig = RolloutConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _attribution_is_tracked(self) -> "RunConfig":
        if self.trainer.credit == "attribution" and not self.tracker.enabled:
            raise ConfigError(
                "tracker.enabled", "must be true when trainer.credit is 'attribution', got False"
            )
        return self

    @model_validator(mode="after")
    def _references_are_there(self) -> "RunConfig":
        if self.env.gym.id is not None and self.warm_start.steps:
            problem = f"must be 0 for env.gym, which has no references, got {self.warm_start.steps}"
            raise ConfigError("warm_start.steps", problem)
        return self

    @model_validator(mode="after")
    def _engine_knows_the_sampler(self) -> "RunConfig":
        for name, whole in (("top_k", None), ("top_p", 1.0), ("min_p", 0.0)):
            if self.rollout.engine == "openai" and getattr(self.trainer, name) != whole:
                problem = (
                    f"must be {whole} for rollout.engine 'openai': a server does not say which tokens it kept"
                )
                raise ConfigError(f"trainer.{name}", problem)
        if self.rollout.engine == "continuous" and self.trainer.min_p:
            problem = "must be 0 for rollout.engine 'continuous', which does not know it"
            raise ConfigError("trainer.min_p", f"{problem}, got {self.trainer.min_p:g}")
        return self

    def training(self, phase: str, checkpoints: str | Path | None = None) -> TrainerConfig:
        """The trainer's part for the phase "warm_start" or "rl", with its folder of checkpoints."""
        common = self.trainer.replace(checkpoint_dir=None if checkpoints is None else str(checkpoints))
        if phase == "rl":
            return common
        warm = self.warm_start.model_dump()
        batch, _ = warm.pop("batch_size"), warm.pop("learns")
        off = {"kl_coef": 0.0, "entropy_coef": 0.0, "best_by": None, "credit": "uniform"}
        single = {"prompts_per_step": batch, "group_size": 1, "minibatches": 1, "epochs": 1}
        return common.replace(**single, **off, **warm)

    @classmethod
    def from_yaml(cls, path: str | Path | None, overrides: Sequence[str] = ()) -> "RunConfig":
        """Read a YAML file and apply command-line overrides.

        Args:
            path: YAML file, or None for the defaults.
            overrides: words such as ["--trainer.learning_rate", "3e-4", "--seed=1"]. A name without a section
                is a top-level key, else one of `trainer`, else the only section's that has it.
        Raises: ConfigError in one line.
        """
        tree = read_yaml(Path(path)) if path is not None else {}
        for key, text in override_pairs(overrides):
            assign(cls, tree, key, text)
        return cls(**tree)

    def to_yaml(self, path: str | Path) -> None:
        """Write the resolved tree, every key included."""
        text = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")
