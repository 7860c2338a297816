"""The table of `react-fast info --integrations`."""

from collections.abc import Sequence

from . import patching
from .points import PatchError, installed

_TITLES = ("package", "version", "patch point", "replacement", "state")


def table_lines(names: Sequence[str] | None = None) -> list[str]:
    """One line a name that `patch` replaces, under titles; imports the packages, to see whether it can here.

    States: available, patched, disabled (REACT_FAST_DISABLE), package missing, refused with the reason.
    """
    rows = [_TITLES]
    for name in patching.NAMES if names is None else names:
        integration = patching.find(name)
        state = _state(name)
        for point in integration.points:
            place = point.target.removeprefix(f"{integration.package}.")
            rows.append((integration.package, installed(integration) or "-", place, point.ours, state))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _state(name: str) -> str:
    integration = patching.find(name)
    if installed(integration) is None:
        return "package missing"
    if patching.is_patched(name):
        return "patched"
    if patching.disabled(name):
        return "disabled"
    try:
        patching.check(integration)
    except PatchError as error:
        return f"refused: {error}"
    return "available"
