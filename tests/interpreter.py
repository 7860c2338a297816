"""Makes Triton's interpreter quick, and fit for numpy 2.5 with Triton 3.6; what kernels compute stays the same.

The interpreter makes all patches of the language anew at every launch and at every call of a device function,
looks into every shape and type of every value again, and scans element by element.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor
_scan_by_element = interpreter.ScanOps.generic_scan
_get_np_dtype = interpreter._get_np_dtype
_block_type_init = tl.core.block_type.__init__
_broadcast_impl_value = TritonSemantic.broadcast_impl_value


class _Patches:
    """All patches of the language, made once."""

    def __init__(self) -> None:
        scope = _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        self._changes = [(owner, name, getattr(owner, name), old) for owner, name, old in scope._changes]
        scope.restore()

    def apply(self) -> "_Patches":
        for owner, name, new, _ in self._changes:
            setattr(owner, name, new)
        return self

    def restore(self) -> None:
        for owner, name, _, old in reversed(self._changes):
            if old is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


_patches = lru_cache(_Patches)


def _patch_lang_once(fn: Any) -> Any:
    """Patches every module of the language where none is patched, and nothing inside a launch."""
    if not tl.core.is_builtin(tl.core.load):
        return interpreter._LangPatchScope()
    return _patches().apply()


@lru_cache
def _builtins(package: Any) -> list[str]:
    """Names of what `_patch_builtin` replaces; asked first when nothing is patched."""
    return [name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None))]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtins(package):
        _patch_attr(package, name, getattr(package, name), scope)


def _patch_attr(owner: Any, name: str, builtin: Any, scope: Any) -> None:
    plain = getattr(builtin, "__wrapped__", builtin)  # without the question whether _semantic was given

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return plain(*args, **kwargs)

    scope.set_attr(owner, name, call)


def _patch_lang_tensor_for_numpy(tensor: Any, scope: Any) -> None:
    """Triton 3.6 calls int() on one-element arrays, which numpy 2.5 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@lru_cache(typed=True)
def _shape(*dims: int) -> tuple[Any, int, str, tuple[Any, Any]]:
    """What block types and tensors of one shape have in common."""
    block = object.__new__(tl.core.block_type)
    _block_type_init(block, tl.int1, list(dims))
    of_tensor = tl.core.tuple([tl.constexpr(d) for d in dims]), tl.constexpr(block.numel)
    return block.shape, block.numel, str(block.shape), of_tensor


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape, self.numel, printed, self.of_tensor = _shape(*shape)
    self.name = f"<{printed}, {element_ty}>"


_OF_SCALAR = tl.core.tuple([]), tl.constexpr(1)


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _OF_SCALAR


def _broadcast_unequal(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
        return lhs, rhs
    return _broadcast_impl_value(self, lhs, rhs)


_numpy_types: dict[str, Any] = {}


def _numpy_type(dtype: Any) -> Any:
    name = dtype.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _get_np_dtype(dtype)
    return _numpy_types[name]


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
    interpreter._get_np_dtype = _numpy_type
    interpreter.ScanOps.generic_scan = _scan_by_doubling
    tl.core.block_type.__init__ = _init_block_type
    tl.core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast_unequal
    if triton.__version__.startswith("3.6"):
        interpreter._patch_lang_tensor = _patch_lang_tensor_for_numpy
