"""Environments whose actions may call tools: plain functions that answer in text."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .calls import Calls, cause
from .record import Record
from .reward_functions import Action
from .text_env import TextEnv

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
RESPONSE = "\n<tool_response>\n{answer}\n</tool_response>\n"
_PREFACE = """The functions between <tools> and </tools> can be called, each described by a JSON schema:
<tools>
{schemas}
</tools>
A call is written as <tool_call>{{"name": "<function>", "arguments": {{"<argument>": <value>}}}}</tool_call>.

"""


class ToolCall(NamedTuple):
    """A call that an action asks for."""

    name: str
    arguments: dict[str, Any]


def tool_calls(action: str) -> list[ToolCall]:
    """The calls in an action: `<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>`.

    Raises: ValueError for what is no such object, or is not closed.
    Source: the syntax of the Hermes and Qwen chat templates.
    """
    found = []
    for text, end in _CALL.findall(action):
        if not end:
            raise ValueError("a call must end with </tool_call>")
        try:
            call = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a call must be JSON: {error.msg} at character {error.pos}") from None
        except RecursionError:
            raise ValueError("a call must be JSON: it is nested too deeply") from None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError('a call must be an object with "name" and "arguments"')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            raise ValueError(f'"arguments" must be an object, got {json.dumps(arguments)[:40]}')
        found.append(ToolCall(call["name"], arguments))
    return found


def tools_preface(tools: Sequence[Callable[..., Any]]) -> str:
    """The tools' JSON schemas, by transformers, and how to call them, between the tags of the Hermes and Qwen chat
    templates.

    Raises: ValueError naming a tool without type hints, or without a docstring that describes every argument
        (in Google's form); ImportError without transformers.
    """
    from transformers.utils import get_json_schema

    schemas = []
    for name, tool in _named(tools).items():
        try:
            schema = get_json_schema(tool)
        except Exception as error:
            raise ValueError(f"tool {name!r} cannot be described: {cause(error)}") from error
        schema["function"].pop("return", None)
        schemas.append(json.dumps(schema))
    return _PREFACE.format(schemas="\n".join(schemas))


class ToolEnv(TextEnv):
    """A TextEnv in which an action that calls tools is answered in text, and one that calls none is the answer.

    The next state is f(state, action, record) followed by the tools' answers, whose tokens are no actions of the
    policy; the episode terminates with an action without a call, and is truncated behind the last turn. A call
    of an unknown tool, with wrong arguments, that raises or takes too long is answered `error: ...`.
    info["counts"] has "tools/calls" and "tools/failed", which the trainer logs as sums of a step.

    Args:
        records: the tasks.
        tools: functions of JSON values, plain or `async def`, known by their names. An answer that is no text is
            written as JSON. They are shared by all environments and have to keep them apart.
        parse: action -> calls, in order; it raises ValueError with a text for the policy.
        response: what is appended to the state; `{answer}` is the answer, or the answers in lines.
        timeout: seconds for a call, see `Calls`. concurrency: calls of one tool at one time.
        longest: characters of an answer that are shown.
        preface: text before every prompt, see `tools_preface`.
        options: of TextEnv; `max_turns` is 4 by default, `terminal` ends an episode too.
    Raises: TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tools: Sequence[Callable[..., Any]],
        *,
        parse: Callable[[str], Sequence[ToolCall]] = tool_calls,
        response: str = RESPONSE,
        timeout: float | None = None,
        concurrency: int = 16,
        longest: int = 4000,
        preface: str = "",
        max_turns: int = 4,
        **options: Any,
    ) -> None:
        if not callable(parse):
            raise TypeError(f"parse must be a function, got {type(parse).__name__}")
        for name, text in (("response", response), ("preface", preface)):
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a str, got {type(text).__name__}")
        if response.count("{answer}") != 1:
            raise ValueError(f"response must hold {{answer}} once, got {response!r}")
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
            raise ValueError(f"longest must be an integer of at least 1, got {longest!r}")
        given = records if hasattr(records, "__len__") else ()
        if any(isinstance(record, Record) and record.conversation is not None for record in given):
            raise ValueError("records must have texts as prompts where tools answer, got messages")
        super().__init__(records, max_turns=max_turns, **options)
        self.tools, self.parse, self.response, self.longest = _named(tools), parse, response, longest
        self.calls = Calls(timeout, concurrency=concurrency)
        if preface:
            self.records = [replace(record, prompt=preface + record.prompt) for record in records]

    def _alike(self) -> tuple[Any, ...]:
        return *super()._alike(), id(self.tools)

    @classmethod
    def _moved(cls, envs: Sequence[Any], actions: Sequence[Action]) -> list[tuple[str, dict[str, float]]]:
        asked = [env._asked(action.text) for env, action in zip(envs, actions, strict=True)]
        answers = envs[0]._answers([call for calls in asked for call in calls])
        rows = []
        for (state, _), calls in zip(super()._moved(envs, actions), asked, strict=True):
            given = [next(answers) for _ in calls]
            failed = float(sum(isinstance(answer, Exception) for answer in given))
            if given:
                text = "\n".join(envs[0]._shown(answer) for answer in given)
                state += envs[0].response.replace("{answer}", text)
            rows.append((state, {"tools/calls": float(len(given)), "tools/failed": failed}))
        return rows

    def _ended(self, action: Action) -> bool:
        return not self._asked(action.text) or bool(super()._ended(action))

    def _asked(self, action: str) -> list[ToolCall | ValueError]:
        try:
            calls = self.parse(action)
        except ValueError as error:
            return [error]
        if not isinstance(calls, Sequence) or not all(isinstance(call, ToolCall) for call in calls):
            raise TypeError(f"parse must give a list of ToolCall, got {calls!r:.60}")
        return list(calls)

    def _answers(self, asked: Sequence[ToolCall | ValueError]) -> Any:
        """An answer or an exception for everything asked; the calls of one tool run at one time."""
        answers: list[Any] = [self._refused(call) for call in asked]
        for name, tool in self.tools.items():
            mine = [i for i, call in enumerate(asked) if answers[i] is None and _name(call) == name]
            found = self.calls.many(tool, [dict(asked[i].arguments) for i in mine]) if mine else []  # type: ignore[union-attr]
            for i, answer in zip(mine, found, strict=True):
                answers[i] = _written(answer)
        return iter(answers)

    def _refused(self, call: ToolCall | ValueError) -> Exception | None:
        if isinstance(call, ValueError):
            return call
        if call.name not in self.tools:
            return ValueError(f"there is no tool {call.name!r}; there are {', '.join(self.tools)}")
        try:
            inspect.signature(self.tools[call.name]).bind(**call.arguments)
        except TypeError as error:
            return ValueError(f"{call.name}: {error}")
        return None

    def _shown(self, answer: str | Exception) -> str:
        if isinstance(answer, Exception):
            answer = f"error: {answer if type(answer) is ValueError else cause(answer)}"
        answer = answer.encode("utf-8", "replace").decode()
        cut = len(answer) - self.longest
        return answer if cut <= 0 else f"{answer[: self.longest]}... ({cut} characters more)"


def _written(answer: Any) -> str | Exception:
    """What a tool gave as text."""
    if answer is None or isinstance(answer, (str, Exception)):
        return "" if answer is None else answer
    try:
        return json.dumps(answer, ensure_ascii=False, default=str)
    except Exception as error:  # an object whose text cannot be had
        return error


def _name(call: Any) -> str | None:
    return getattr(call, "name", None)


def _named(tools: Any) -> dict[str, Callable[..., Any]]:
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence) or not tools:
        raise TypeError(f"tools must be a list of at least one function, got {tools!r:.60}")
    named: dict[str, Callable[..., Any]] = {}
    for tool in tools:
        name = getattr(tool, "__name__", None)
        if not callable(tool) or name is None:
            raise TypeError(f"tools must be functions with a name, got {type(tool).__name__}")
        if name in named:
            raise ValueError(f"tools must have names of their own, got {name!r} twice")
        named[name] = tool
    return named
