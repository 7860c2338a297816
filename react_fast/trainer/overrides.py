"""A configuration tree from a YAML file and from words of the command line."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .section import ConfigError, Section, nearest_key

# A bare name of no other place is looked up in this section first.
USUAL = "trainer"


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"config {path}", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}", f"is not UTF-8 at byte {error.start + 1}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}", f"is not YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(str(path), "must be a mapping of keys to values")
    return tree


def override_pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--"):
            raise ConfigError(word, "is not an option; write --key value")
        key, equals, text = word[2:].partition("=")
        value = text if equals else next(remaining, None)
        if value is None:
            raise ConfigError(key, "needs a value; write --key value")
        yield key, value


def assign(root: type[Section], tree: dict[str, Any], key: str, text: str) -> None:
    """Put the text of one override at its place in a tree for `root`, typed as YAML types it unless the field is a
    string."""
    *sections, name = _resolve(root, key)
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(section, f"must be a section of keys, got {tree!r}")
    tree[name] = (
        text if _is_text(root, sections, name) and text not in ("null", "none") else _scalar(key, text)
    )


def _scalar(key: str, text: str) -> Any:
    if text == "none":
        return None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(key, f"has a value that is not YAML, got {text!r}") from None


def _resolve(root: type[Section], key: str) -> list[str]:
    """Path of a key; a bare name is looked up at the top, in `trainer`, then in the other sections."""
    path = key.split(".")
    sections = _sections(root)
    if len(path) > 1 or key in root.model_fields:
        if path[0] in sections and len(path) == 2 and path[1] not in sections[path[0]].model_fields:
            raise ConfigError(key, "is not a key", nearest_key(key, root))
        if path[0] not in root.model_fields:
            raise ConfigError(key, "is not a key", nearest_key(key, root))
        return path
    if key in sections[USUAL].model_fields:
        return [USUAL, key]
    owners = [section for section, fields in sections.items() if key in fields.model_fields]
    if len(owners) == 1:
        return [owners[0], key]
    if owners:
        raise ConfigError(
            key, f"is ambiguous; write one of {', '.join(f'{owner}.{key}' for owner in owners)}"
        )
    raise ConfigError(key, "is not a key", nearest_key(key, root))


def _is_text(root: type[Section], sections: Sequence[str], name: str) -> bool:
    owner = root
    for section in sections:
        owner = _sections(owner).get(section, owner)
    field = owner.model_fields.get(name)
    return field is not None and (field.annotation is str or str | None == field.annotation)


def _sections(root: type[Section]) -> dict[str, type[Section]]:
    return {
        name: field.annotation
        for name, field in root.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
