"""Records from a file in SQuAD's format, version 1.1 or 2.0."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from .record import Record
from .tasks.question_answering import prompt


def load_squad(path: str | PathLike[str]) -> list[Record]:
    """The questions of a file, in its order.

    A prompt is `context\\nQ: question\\nA:`; the reference is a blank and the first answer, metadata["answers"]
    holds all answers and metadata["id"] the question's id. A question that the context does not answer (an empty
    list of answers) has the reference "", as in SQuAD's own evaluation; one without the field has none.

    Args:
        path: UTF-8 JSON, {"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}.
    Raises: FileNotFoundError or IsADirectoryError if there is no such file; ValueError naming file and place for
        what is no UTF-8, no JSON, lacks a field, or holds no question; TypeError for a field of the wrong type.
    Source: Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822).
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, a SQuAD file was wanted")
    try:
        tree = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: invalid JSON at column {error.colno}: {error.msg}"
        ) from None
    records = list(_records(tree, str(path)))
    if not records:
        raise ValueError(f"{path}: no questions")
    return records


def _records(tree: Any, path: str) -> Iterator[Record]:
    for article, where in _items(tree, "data", f"{path}: "):
        for paragraph, place in _items(article, "paragraphs", f"{where}."):
            context = _field(paragraph, "context", str, f"{place}.")
            for question, here in _items(paragraph, "qas", f"{place}."):
                yield _record(question, context, f"{here}.")


def _record(question: Any, context: str, where: str) -> Record:
    asked = prompt(context, _field(question, "question", str, where))
    metadata = {"id": question["id"]} if "id" in question else {}
    if "answers" not in question:
        return Record(asked, None, metadata)
    found = [_field(answer, "text", str, f"{place}.") for answer, place in _items(question, "answers", where)]
    answers = list(dict.fromkeys(found)) or [""]
    return Record(asked, f" {answers[0]}".rstrip(" "), {**metadata, "answers": answers})


def _items(tree: Any, name: str, where: str) -> Iterator[tuple[Any, str]]:
    for number, item in enumerate(_field(tree, name, list, where)):
        yield item, f"{where}{name}[{number}]"


_NAMES: dict[type, str] = {str: "a string", list: "an array"}


def _field(tree: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(tree, dict):
        raise TypeError(f"{where.rstrip(':. ')} must be an object with {name!r}, got {type(tree).__name__}")
    if name not in tree:
        raise ValueError(f"{where}{name} is missing")
    if not isinstance(tree[name], kind):
        raise TypeError(f"{where}{name} must be {_NAMES[kind]}, got {type(tree[name]).__name__}")
    return tree[name]
