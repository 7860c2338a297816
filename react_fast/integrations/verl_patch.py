"""Importing this module is `patch("verl")`, with one line printed: for the processes that verl starts itself.

VERL_USE_EXTERNAL_MODULES=react_fast.integrations.verl_patch
"""

import sys

from .patching import is_patched, patch
from .points import PatchError

try:
    patch("verl")
    if is_patched("verl"):
        print("react_fast is active in verl: patched", file=sys.stderr, flush=True)
except PatchError as error:  # verl stays as it is, and goes on
    print(f"react_fast is not active in verl: {error}", file=sys.stderr, flush=True)
