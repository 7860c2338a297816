"""The tracker's findings as a page, a file or a table in the terminal."""

from .report import CausalityReport

__all__ = ["CausalityReport"]
