"""The Triton kernels of this library: which there are, and which a piece of code launches."""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGE = "react_fast.kernels."


@cache
def kernels() -> dict[str, list[str]]:
    """Kernel file -> names of what it launches: every @triton.jit function that is named so."""
    found = {}
    for file in sorted(KERNELS.glob("*.py")):
        names = [
            node.name
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name.endswith("_kernel")
        ]
        if names:
            found[file.stem] = names
    return found


def names() -> list[str]:
    """ "logprob.fold_kernel" and all others."""
    return [f"{path}.{name}" for path, own in kernels().items() for name in own]


@contextmanager
def watched(told: Callable[[str, Any], None]) -> Iterator[None]:
    """Calls told("logprob.fold_kernel", what Triton compiled or None) after every launch inside."""
    from triton.runtime import interpreter, jit

    run, call = jit.JITFunction.run, interpreter.GridExecutor.__call__

    def tell(fn: Any, compiled: Any) -> None:
        if fn.__module__.startswith(PACKAGE):
            told(f"{fn.__module__.removeprefix(PACKAGE)}.{fn.__name__}", compiled)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = run(self, *args, **kwargs)
        tell(self.fn, compiled)
        return compiled

    def interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(self, *args, **kwargs)
        tell(self.fn, None)
        return result

    jit.JITFunction.run, interpreter.GridExecutor.__call__ = launched, interpreted
    try:
        yield
    finally:
        jit.JITFunction.run, interpreter.GridExecutor.__call__ = run, call
