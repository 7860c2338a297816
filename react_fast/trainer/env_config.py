"""The environment's part of the configuration tree."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from ..envs.notes import is_number
from .section import ConfigError, Count, Positive, Section


class RewardModelConfig(Section):
    """A reward model, whose logit for prompt and response is the reward; NAME is what logs call it."""

    model: str | None = None
    """Local Hugging Face folder of a sequence classifier with one label."""
    weight: float = 1.0
    """Factor in the total."""
    batch_size: Count = 8
    """Texts of a forward."""
    max_length: Count | None = None
    """Tokens of a text, cut on the left; none: what the model takes. rewards/NAME/truncated counts them."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of its parameters; the device is the trainer's."""


class EnvConfig(Section):
    """What the policy is asked and how its answers are rewarded."""

    task: Literal["translation", "question_answering", "summarisation", "semantic_roles"] = "translation"
    """Shipped task; with `train`: whose reward and metrics are taken."""
    pairs: list[str] = Field(default=["es-pt", "es-it"], min_length=1)
    """Language pairs of the translation task."""
    train: str | None = None
    """File of training records."""
    validation: str | None = None
    """File for evaluations during training."""
    test: str | None = None
    """File for the result table."""
    format: Literal["jsonl", "squad", "conll"] = "jsonl"
    """Of the files."""
    reward: str | None = None
    """Name such as chrf, squad_f1, rouge_l, span_f1, or module:function; none: the task's."""
    rewards: dict[str, float | RewardModelConfig] = Field(default={})
    """Several rewards in place of one: their weights by such names; for a reward model its section by a name of
    yours, such as {helpful: {model: folder, weight: 0.5}}."""
    transition: str | None = None
    """Next state f as module:function; none: the text so far and the action."""
    terminal: str | None = None
    """End of an episode as module:function; none: the last turn."""
    rules: str | None = None
    """Module whose functions marked with @reward, @transition and @terminal are taken."""
    metrics: list[str] | None = None
    """Columns of the result table, such as chrf, bleu, squad_em; none: the task's."""
    tools: list[str] = Field(default=[])
    """Functions that the policy can call, as module:function; an action without a call ends the episode."""
    tool_timeout: Positive | None = None
    """Seconds for a tool's answer; none: no limit."""
    tools_described: bool = True
    """Begin every prompt with the tools' schemas."""
    augment: str | None = None
    """module:function (record, random.Random) -> record whose right answer is the same, for training prompts, anew
    in every step; for questions react_fast.envs.augment:shuffle_facts."""
    max_turns: Count = 1
    """Turns of an episode."""
    eval_prompts: Count = 128
    """Validation prompts of an evaluation during training."""
    test_prompts: Count = 512
    """Test prompts of the result table."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _numbers_or_models(cls, rewards: Any) -> Any:
        """Errors that name the entry: a union's would name its branches."""
        if not isinstance(rewards, Mapping):
            return rewards
        return {name: _weight_or_model(str(name), value) for name, value in rewards.items()}


def _weight_or_model(name: str, value: Any) -> Any:
    if isinstance(value, RewardModelConfig):
        return value
    if not isinstance(value, Mapping):
        if is_number(value):
            return value
        raise ConfigError(name, f"must be a weight or a reward model's section, got {value!r:.60}")
    try:
        found = RewardModelConfig(**value)
    except ConfigError as error:
        raise error.within(name) from None
    if not found.model:
        raise ConfigError(f"{name}.model", "must name a folder, got none")
    return found
