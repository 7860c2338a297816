"""react_fast under other trainers: `patch` where names are replaced, classes where they have doors for them."""

from .patching import Patch, is_patched, patch, unpatch
from .points import PatchError

__all__ = ["Patch", "PatchError", "is_patched", "patch", "unpatch"]
