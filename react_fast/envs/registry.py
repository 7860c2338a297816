"""The shipped tasks by Gymnasium id; `import react_fast.envs` registers them.

`gymnasium.make("react_fast.envs:react_fast/Translation-v0", split="validation")` imports by itself. Vector form:
`gymnasium.make_vec(id, 8)`, or with vectorization_mode="async" and vector_kwargs={"shared_memory": False}.
"""

import importlib
from collections.abc import Callable
from typing import Any

import gymnasium

from .rewards import REWARDS
from .text_env import TextEnv

TASKS = {
    "react_fast/Translation-v0": "translation",
    "react_fast/QuestionAnswering-v0": "question_answering",
    "react_fast/Summarisation-v0": "summarisation",
    "react_fast/SemanticRoles-v0": "semantic_roles",
}


def make(
    task: str,
    split: str = "train",
    reward: Callable[..., Any] | None = None,
    max_turns: int = 1,
    **options: Any,
) -> TextEnv:
    """The environment of a shipped task.

    Args:
        task: "translation" | "question_answering" | "summarisation" | "semantic_roles".
        split: "train" | "validation" | "test".
        reward: in place of the task's.
        max_turns: actions in an episode.
        options: of the task's `load`, such as `pairs` of the translation.
    Raises: ValueError for an unknown task or split, TypeError for an option that the task does not have.
    """
    if task not in TASKS.values():
        raise ValueError(f"task must be one of {', '.join(TASKS.values())}, got {task!r}")
    module = importlib.import_module(f".tasks.{task}", __package__)
    records = module.load(split=split, **options)
    return TextEnv(records, reward=reward or REWARDS[module.REWARD], max_turns=max_turns)


def register() -> None:
    """Register every id that Gymnasium does not know yet."""
    for name, task in TASKS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=f"{__name__}:make", kwargs={"task": task})
