"""Actions: which places of a prompt and response are taken as one action each."""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .text import Span, Text

# Where the next piece of a text begins: behind each match.
_ENDS = {
    "sentence": re.compile(r"[.!?][\"')\]]*\s+|[。！？]|\n+"),
    "line": re.compile(r"\n+"),
}
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
WITH_TEXT = ("span", "word", "sentence", "line", "step")
ACTIONS = ("token", *WITH_TEXT, "turn")

Actions = str | re.Pattern[str] | Sequence[Span]


def find_actions(
    actions: Any, text: Text, texts: Sequence[str] | None, turn_index: Sequence[int] | None
) -> list[Span]:
    """Places (start, end) in prompt + response; prompt and response never share an action, unless given.

    Args:
        actions: "token"; "word" (or "span"): up to the next token that begins with white space; "sentence";
            "line"; "step", a reasoning step: paragraphs, or lines where no line is blank; "turn"; a compiled
            regular expression, whose matches are widened to whole tokens; or the places.
        texts: of every token; None: without a tokenizer.
        turn_index: turn of every token, for "turn".
    Raises: TypeError, ValueError or IndexError in one line.
    """
    pattern = isinstance(actions, re.Pattern)
    if pattern or actions in WITH_TEXT:
        if texts is None:
            raise ValueError(f"tokenizer must be given to the tracker for actions {actions!r}, got None")
        sides = [(0, text.prompt_length), (text.prompt_length, len(text.ids))]
        return [
            (start + begin, end + begin)
            for begin, stop in sides
            for start, end in (_matches if pattern else _pieces)(actions, texts[begin:stop])
        ]
    if isinstance(actions, str) and actions == "token":
        return [(i, i + 1) for i in range(len(text.ids))]
    if isinstance(actions, str) and actions == "turn":
        return _turns(text, turn_index)
    return _given(actions, text)


def unit_of(actions: Any) -> str:
    """What one of these actions is called, in features.UNITS."""
    if isinstance(actions, re.Pattern):
        return "match"
    return {"span": "word"}.get(actions, actions) if isinstance(actions, str) else "span"


def _pieces(kind: str, texts: Sequence[str]) -> Iterator[Span]:
    """The tokens cut where a piece begins."""
    if kind in ("span", "word"):
        begins = {i for i, token in enumerate(texts) if token[:1].isspace()}
    else:
        whole = "".join(texts)
        steps = _PARAGRAPH if _PARAGRAPH.search(whole.strip()) else _ENDS["line"]
        cuts = [match.end() for match in _ENDS.get(kind, steps).finditer(whole)]
        places = [0, *accumulate(map(len, texts))]
        begins = {next(i for i, place in enumerate(places) if place >= cut) for cut in cuts}
    edges = sorted(begins | {0, len(texts)})
    return pairwise(edges)


def _matches(pattern: re.Pattern[str], texts: Sequence[str]) -> Iterator[Span]:
    """The tokens that each match touches; one match never takes a token from the one before it."""
    places = [0, *accumulate(map(len, texts))]
    free = 0
    for match in pattern.finditer("".join(texts)):
        touched = [
            i
            for i, (start, end) in enumerate(pairwise(places))
            if i >= free and start < match.end() and end > match.start()
        ]
        if touched:
            first = touched[0]
            while first > free and not texts[first - 1]:  # the other tokens of its first character
                first -= 1
            free = touched[-1] + 1
            yield first, free


def _turns(text: Text, turn_index: Sequence[int] | None) -> list[Span]:
    """Runs of one turn number in the response."""
    if turn_index is None:
        raise ValueError("turn_index must be given for actions 'turn', got None")
    numbers = [int(turn) for turn in turn_index]
    if len(numbers) != len(text.ids):
        raise ValueError(
            f"turn_index must be [{len(text.ids)}] like prompt and response, got [{len(numbers)}]"
        )
    first = text.prompt_length
    inside = range(first + 1, len(numbers))
    return list(pairwise([first, *(i for i in inside if numbers[i] != numbers[i - 1]), len(numbers)]))


def _given(actions: Any, text: Text) -> list[Span]:
    if isinstance(actions, str) or not isinstance(actions, Sequence):
        names = ", ".join(map(repr, ACTIONS))
        raise TypeError(
            f"actions must be {names}, a compiled regular expression or a list of (start, end), got {actions!r}"
        )
    spans = []
    for i, span in enumerate(actions):
        pair = isinstance(span, Sequence) and len(span) == 2
        if not pair or not all(isinstance(x, int) and not isinstance(x, bool) for x in span):
            raise TypeError(f"actions[{i}] must be a pair of integers (start, end), got {span!r}")
        start, end = span
        if not 0 <= start < end <= len(text.ids):
            raise IndexError(
                f"actions[{i}] must be 0 <= start < end <= {len(text.ids)}, got ({start}, {end})"
            )
        spans.append((start, end))
    return spans
