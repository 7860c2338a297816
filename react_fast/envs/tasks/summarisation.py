"""Summaries of documentation: the docstrings of the Python standard library, body to first line.

The sources of the running interpreter are parsed, never imported, so nothing is downloaded or executed; another
version of Python has other records. A docstring counts if its first line stands alone and more text follows.
"""

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..record import Record
from .splits import SPLITS, Groups, check_split

REWARD, METRICS, OPTIONS = "rouge_l", ("rouge_1", "rouge_2", "rouge_l"), ()
# A body is cut behind the last word that ends within so many characters; first lines are of these lengths.
BODY, SUMMARY = 160, range(12, 81)
# Folders that hold no documentation of a library: tests, tools, what pip installed.
_LEFT_OUT = {
    "__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip


def load(split: str = "train", sources: str | Path | None = None) -> list[Record]:
    """The records of one split, in a fixed order.

    A prompt is the name of what is documented and the body of its docstring on one line, cut after 160
    characters, such as `splitdrive: Return tuple (drive, tail) where ...\\n`; its reference is the first line. Of
    equal first lines the first is kept, and equal documents are in one split. Metadata holds module and name.

    Args:
        split: "train" | "validation" | "test", about 72%, 10% and 18% of the docstrings.
        sources: folder of Python files; None: the running interpreter's standard library.
    Raises: ValueError for an unknown split, or a folder without any such docstring.
    """
    check_split(split)
    return list(_split_records(Path(sources or sysconfig.get_path("stdlib")))[split])


def prompt(document: str) -> str:
    """How a document is put."""
    return f"{document}\n"


@functools.lru_cache(maxsize=4)
def _split_records(folder: Path) -> dict[str, list[Record]]:
    first: dict[str, Record] = {}
    groups = Groups()
    for record in _records(folder):
        summary = _normal(record.reference or "")
        groups.join(f"summary:{summary}", f"document:{_normal(record.prompt.partition(':')[2])}")
        first.setdefault(summary, record)
    if not first:
        raise ValueError(f"sources must hold docstrings of a first line and a body, got none in {folder}")
    place = groups.splits()
    result: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for summary, record in first.items():
        result[place[f"summary:{summary}"]].append(record)
    return result


def _records(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            yield from _docstrings(path, ".".join(parts).removesuffix(".__init__"))


def _docstrings(path: Path, module: str) -> Iterator[Record]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        summary, _, body = (ast.get_docstring(node) or "").partition("\n\n")
        body = _cut(" ".join(body.split()))
        if body and "\n" not in summary and len(summary.strip()) in SUMMARY and (summary + body).isascii():
            name = getattr(node, "name", module)
            yield Record(prompt(f"{name}: {body}"), summary.strip(), {"module": module, "name": name})


def _cut(text: str) -> str:
    """At most BODY characters, whole words."""
    return text if len(text) <= BODY else text[: BODY + 1].rpartition(" ")[0]


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
