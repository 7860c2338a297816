"""Tasks, whose prompt is a text, or a conversation that a chat template turns into one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .calls import cause

# {"role": str, "content": str}, and whatever else a chat template knows.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One task: the input I (`prompt`) and the target T (`reference`).

    Args:
        prompt: a text, or a list of messages {"role": str, "content": str}, of which `rendered` makes a text.
        reference: the right answer; None: there is none.
        metadata: what else is known, by name.
        messages: those that the prompt was rendered from; None: it was given as it is.
    """

    prompt: Any
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Message] | None = None

    @property
    def conversation(self) -> list[dict[str, Any]] | None:
        """A copy of the messages, rendered or not; None if the prompt is plain text, which a tokenizer begins with
        its special tokens; a chat template has them of its own."""
        given = self.prompt if isinstance(self.prompt, (list, tuple)) else self.messages
        return None if given is None else [dict(message) for message in given]

    @property
    def texts(self) -> list[str]:
        """Every text in it."""
        said = self.conversation
        prompt = [self.prompt] if said is None else [message["content"] for message in said]
        return [text for text in (*prompt, self.reference) if text]


class RecordError(ValueError):
    """A record lacks what a training needs of it, in one line."""


def check_messages(name: str, messages: Any) -> None:
    """Raises: TypeError or ValueError, in one line that begins with `name`, for what is no conversation."""
    if not messages:
        raise ValueError(f"{name} is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}[{i}] must be a message, got {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"must have a text as {key!r}, got {message.get(key)!r:.40}"
                raise TypeError(f"{name}[{i}] {problem}")


def rendered(record: Record, tokenizer: Any) -> Record:
    """The record with the text that the tokenizer's chat template makes of its messages, up to where the answer
    begins (`add_generation_prompt`); a record of plain text as it is.

    Raises: ValueError in one line without a chat template, or if it refuses the messages.
    """
    if not isinstance(record.prompt, (list, tuple)):
        return record
    messages = record.conversation
    text = chat_text(tokenizer, messages, add_generation_prompt=True)
    return replace(record, prompt=text, messages=tuple(messages or ()))


def check_template(tokenizer: Any, whose: str = "the tokenizer") -> None:
    """Raises: ValueError in one line, which says what to do, for a tokenizer without a chat template."""
    if getattr(tokenizer, "chat_template", None):
        return
    key = (
        "model.chat_template in a configuration"
        if whose == "the tokenizer"
        else "chat_template.jinja beside it"
    )
    raise ValueError(
        f"{whose} has no chat template, which prompts of messages need: take a model that has one, set"
        f" tokenizer.chat_template ({key}), or give prompts as texts"
    )


def chat_text(tokenizer: Any, messages: Any, *, add_generation_prompt: bool = False) -> str:
    """A conversation as text, by the tokenizer's chat template.

    Raises: ValueError in one line without a chat template, or if it refuses the messages.
    """
    check_template(tokenizer)
    try:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # of the template's own
        shown = f"{messages!r:.60}"
        raise ValueError(f"the chat template cannot render {shown}: {cause(error)}") from error
