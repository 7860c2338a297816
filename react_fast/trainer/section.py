"""Validated, frozen sections of a configuration tree, with errors of one line."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=1)]
Few = Annotated[int, Field(ge=1, le=1024)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """A wrong key or value, in one line.

    Attributes:
        key: dotted key as the user would write it.
        problem: what is wrong with it.
        suggestion: dotted key that was probably meant, or None.
    """

    def __init__(self, key: str, problem: str, suggestion: str | None = None) -> None:
        self.key, self.problem, self.suggestion = key, problem, suggestion
        super().__init__(f"{key} {problem}" + (f"; did you mean {suggestion}?" if suggestion else ""))

    def within(self, section: str) -> "ConfigError":
        """The same error seen from the tree that holds `section`."""
        suggestion = self.suggestion and f"{section}.{self.suggestion}"
        return ConfigError(f"{section}.{self.key}" if self.key else section, self.problem, suggestion)


class Section(BaseModel):
    """A frozen set of validated fields; errors are ConfigError."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _first_error(type(self), error) from None

    def replace(self, **changes: Any) -> Any:
        """A validated copy with some fields changed."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _first_error(section: type[Section], error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    path, inner = [str(part) for part in first["loc"]], first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        for name in reversed(path):
            inner = inner.within(name)
        return inner
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ConfigError(key, "is not a key", nearest_key(key, section))
    problem = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    given = first["input"]
    shown = f", got {given!r}" if not isinstance(given, Mapping) else ""
    choices = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))
    meant = nearest(given, choices) if isinstance(given, str) else None
    hint = f"; did you mean {meant}?" if meant else ""
    return ConfigError(key, problem[:1].lower() + problem[1:] + shown + hint)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that resembles `name` most, or None when none resembles it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def valid_keys(section: type[Section]) -> list[str]:
    """Every dotted key of a tree."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += [f"{name}.{key}" for key in valid_keys(field.annotation)]
    return keys


def nearest_key(key: str, section: type[Section]) -> str | None:
    """The valid dotted key that resembles `key` most, or None when none resembles it."""
    keys = valid_keys(section)
    if close := nearest(key, keys):
        return close
    by_name = {name.rpartition(".")[2]: name for name in reversed(keys)}
    close = nearest(key.rpartition(".")[2], by_name)
    return by_name[close] if close else None
