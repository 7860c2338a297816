"""The environment's part of the configuration tree."""

from typing import Literal

from pydantic import Field

from .section import Count, Positive, Section


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
    rewards: dict[str, float] = Field(default={})
    """Several rewards in place of one: their weights by such names."""
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
