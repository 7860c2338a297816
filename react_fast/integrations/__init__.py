"""Other trainers with react_fast under them: `patch` for those that take names, classes for those that have doors."""

from .patching import Patch, is_patched, patch, unpatch
from .points import PatchError

__all__ = ["Patch", "PatchError", "is_patched", "patch", "unpatch"]
