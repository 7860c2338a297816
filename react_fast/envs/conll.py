"""Records from semantic roles in columns, as in the CoNLL shared tasks of 2005 and 2012."""

import re
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from .match import Span, linearised
from .record import Record
from .tasks.semantic_roles import prompt

_BRACKETS = re.compile(r"(\([^()*\s]+)*\*\)*")
# CoNLL-2012: document, part, number, word, and eight more columns before the roles; coreference comes last.
_LEADING_2012, _WORD_2012 = 11, 3
_Row = tuple[int, list[str]]


def load_conll(path: str | PathLike[str]) -> list[Record]:
    """One record for every predicate of a file, in its order.

    A prompt is the sentence with the predicate between asterisks; the reference has one argument a line, in the
    order of the sentence: `ARG0 the old woman`. Roles are as in the file (A0 or ARG0; continuations C-A1 and
    references R-A1 are roles of their own, where the shared tasks' scorer joins them). The verb is no argument.

    Args:
        path: UTF-8 text, a token a line, sentences apart by an empty line. CoNLL-2005 with words first: any
            columns, the target verbs (`-` elsewhere), then `(A0*`, `*`, `*)` for every verb; CoNLL-2012: its
            eleven columns, the roles, coreference; lines that begin with `#begin` or `#end` are skipped.
    Raises: FileNotFoundError or IsADirectoryError if there is no such file; ValueError naming file and line for
        no UTF-8, rows of unequal length, columns that are no roles, brackets that do not match, a predicate
        without a verb, and for a file without predicates.
    Source: Carreras & Marquez 2005; Pradhan et al. 2012.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, a CoNLL file was wanted")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start + 1}") from None
    records = [record for rows in _sentences(lines) for record in _records(rows, f"{path}:")]
    if not records:
        raise ValueError(f"{path}: no predicates")
    return records


def _sentences(lines: Sequence[str]) -> Iterator[list[_Row]]:
    rows: list[_Row] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith(("#begin", "#end")):
            continue
        if columns := line.split():
            rows.append((number, columns))
        elif rows:
            yield rows
            rows = []


def _records(rows: Sequence[_Row], path: str) -> Iterator[Record]:
    width = len(rows[0][1])
    for number, columns in rows:
        if len(columns) != width:
            raise ValueError(
                f"{path}{number}: must have {width} columns like line {rows[0][0]}, got {len(columns)}"
            )
    word, roles = _layout(rows, path)
    words = [columns[word] for _, columns in rows]
    for column in roles:
        spans = list(_spans(rows, column, path))
        verbs = {place for role, start, end in spans if role == "V" for place in range(start, end)}
        if not verbs:
            raise ValueError(f"{path}{rows[0][0]}: column {column + 1} must have a span (V*) for its verb")
        marked = [f"*{text}*" if place in verbs else text for place, text in enumerate(words)]
        arguments = [Span(role, " ".join(words[a:b])) for role, a, b in spans if role != "V"]
        yield Record(prompt(" ".join(marked)), linearised(arguments), {"line": rows[0][0]})


def _layout(rows: Sequence[_Row], path: str) -> tuple[int, range]:
    """Column of the words, columns of the roles."""
    width = len(rows[0][1])
    if width > _LEADING_2012 and [columns[2] for _, columns in rows] == [str(i) for i in range(len(rows))]:
        return _WORD_2012, range(_LEADING_2012, width - 1)
    for verbs in range(width - 1, 0, -1):
        if sum(columns[verbs] != "-" for _, columns in rows) == width - 1 - verbs:
            return 0, range(verbs + 1, width)
    raise ValueError(f"{path}{rows[0][0]}: must have a column of verbs and one of roles for each of them")


def _spans(rows: Sequence[_Row], column: int, path: str) -> Iterator[tuple[str, int, int]]:
    """(role, first word, word behind the last) by their first words."""
    found, open_ = [], []
    for place, (number, columns) in enumerate(rows):
        text = columns[column]
        if not _BRACKETS.fullmatch(text):
            raise ValueError(f"{path}{number}: column {column + 1} must be like (A0*, * or *), got {text!r}")
        open_ += [(role, place) for role in text.partition("*")[0].split("(")[1:]]
        for _ in range(text.count(")")):
            if not open_:
                raise ValueError(f"{path}{number}: column {column + 1} closes a span that is not open")
            role, start = open_.pop()
            found.append((role, start, place + 1))
    if open_:
        raise ValueError(f"{path}{rows[-1][0]}: column {column + 1} leaves a span {open_[-1][0]} open")
    return iter(sorted(found, key=lambda span: (span[1], -span[2])))
