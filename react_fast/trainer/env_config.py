"""The environment's part of the configuration tree."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

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


class GymConfig(Section):
    """A Gymnasium environment with discrete actions, played as text for env.max_turns; its rewards are its own."""

    id: str | None = None
    """Registered id such as FrozenLake-v1, or module:id where importing a module registers it; none: the task."""
    kwargs: dict[str, Any] = Field(default={})
    """Arguments of gymnasium.make, such as {is_slippery: false}."""
    actions: list[str] | None = None
    """A name for every action, in order; none: their numbers."""
    describe: str | None = None
    """module:function (observation) -> text; none: its numbers."""
    instruction: str | None = None
    """Text before the first observation; none: nothing."""
    layout: str = "{observation}\n>"
    """What stands around every observation."""
    seeds: Count = 64
    """Beginnings of training episodes; validation and test have further ones, env.eval_prompts and
    env.test_prompts."""
    on_illegal: Literal["noop", "truncate"] = "noop"
    """What an answer that names no action does: nothing, or end the episode; actions/illegal counts them."""
    penalty: float = 0.0
    """Reward for such an answer."""


# Keys that say nothing about a Gymnasium environment.
_OF_RECORDS = (
    "train", "validation", "test", "reward", "rewards", "transition", "terminal", "rules", "tools", "augment",
    "metrics",
)  # fmt: skip


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
    tool_concurrency: Count = 16
    """Calls of one tool at one time."""
    tool_longest: Count = 4000
    """Characters of an answer that the policy sees."""
    tool_parse: str | None = None
    """module:function (action) -> list of react_fast.envs.ToolCall; none: <tool_call> tags around JSON."""
    tool_response: str | None = None
    """What is appended for an answer, with {answer} in its place; none: it between <tool_response> tags."""
    tools_described: bool = True
    """Begin every prompt with the tools' schemas."""
    gym: GymConfig = GymConfig()
    augment: str | None = None
    """module:function (record, random.Random) -> record whose right answer is the same, for training prompts, anew
    in every step; for questions react_fast.envs.augment:shuffle_facts."""
    max_turns: Count | None = None
    """Most turns of an episode; none: 1, with tools 4, with gym 32."""
    eval_prompts: Count = 128
    """Validation prompts of an evaluation during training."""
    test_prompts: Count = 512
    """Test prompts of the result table."""

    @property
    def turns(self) -> int:
        """Most turns of an episode."""
        usual = 32 if self.gym.id is not None else 4 if self.tools else 1
        return usual if self.max_turns is None else self.max_turns

    @model_validator(mode="after")
    def _gym_stands_alone(self) -> "EnvConfig":
        if self.gym.id is None and self.gym != GymConfig():
            raise ConfigError("gym.id", "must name an environment beside other keys of env.gym, got none")
        for key in _OF_RECORDS if self.gym.id is not None else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                problem = (
                    f"must not stand beside env.gym.id {self.gym.id}, whose tasks and rewards are its own"
                )
                raise ConfigError(key, problem)
        return self

    @model_validator(mode="after")
    def _tools_have_options(self) -> "EnvConfig":
        for key, field in type(self).model_fields.items():
            if key.startswith("tool_") and not self.tools and getattr(self, key) != field.default:
                raise ConfigError(key, "must stand beside env.tools, of which there are none")
        return self

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
