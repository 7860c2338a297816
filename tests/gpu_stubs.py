"""Empty modules in the place of packages that want a GPU, for other packages that import them and call nothing."""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class _Empty(types.ModuleType):
    """Any name is a class of that name; any module below it is another one, but those of `absent`."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    def __init__(self, packages: tuple[str, ...], absent: tuple[str, ...]) -> None:
        self.packages, self.absent = packages, absent

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages or name in self.absent:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> Any:
        return _Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


@contextmanager
def stubs(*packages: str, absent: tuple[str, ...] = (), forget: str = "") -> Iterator[None]:
    """The packages can be imported inside; afterwards they and all of the package `forget` are as before."""
    before = {name: x for name, x in sys.modules.items() if name.partition(".")[0] in (*packages, forget)}
    finder: Any = _Finder(packages, absent)
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [x for x in sys.modules if x.partition(".")[0] in (*packages, forget)]:
            del sys.modules[name]
        sys.modules.update(before)
