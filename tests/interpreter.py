"""Makes Triton's interpreter quick, and fit for numpy 2.5 with Triton 3.6; what kernels compute stays the same.

The interpreter patches the language at every launch and at every call of a device function, which takes most of
its time, and scans element by element.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor
_scan_by_element = interpreter.ScanOps.generic_scan


def _patch_lang_once(fn: Any) -> Any:
    """Patches every module of the language where none is patched, and nothing inside a launch."""
    if not tl.core.is_builtin(tl.core.load):
        return interpreter._LangPatchScope()
    return _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


@lru_cache
def _builtins(package: Any) -> list[str]:
    """Names of what `_patch_builtin` replaces; asked first when nothing is patched."""
    return [name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None))]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtins(package):
        interpreter._patch_attr(package, name, getattr(package, name), builder, scope)


def _patch_lang_tensor_for_numpy(tensor: Any, scope: Any) -> None:
    """Triton 3.6 calls int() on one-element arrays, which numpy 2.5 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _scan_by_doubling(self: Any, given: Any) -> list[Any]:
    """The scan in log2(n) joins of whole blocks, as GPUs do it, instead of one join an element."""
    found, shift = [x.handle.data for x in given], 1
    if found[0].ndim != 1:
        return _scan_by_element(self, given)
    while shift < found[0].size:
        near = [self.to_tensor(np.roll(part, shift), x.dtype) for part, x in zip(found, given, strict=True)]
        far = [self.to_tensor(part, x.dtype) for part, x in zip(found, given, strict=True)]
        joined = self.combine_fn.fn(*near, *far)
        joined = joined if isinstance(joined, tuple) else (joined,)
        first = np.arange(found[0].size) < shift
        found = [
            np.where(first, part, y.handle.data).astype(part.dtype)
            for part, y in zip(found, joined, strict=True)
        ]
        shift *= 2
    return [self.to_tensor(part, x.dtype) for part, x in zip(found, given, strict=True)]


def quicken() -> None:
    interpreter._patch_lang = _patch_lang_once
    interpreter._patch_builtin = _patch_builtin
    interpreter.ScanOps.generic_scan = _scan_by_doubling
    if triton.__version__.startswith("3.6"):
        interpreter._patch_lang_tensor = _patch_lang_tensor_for_numpy
