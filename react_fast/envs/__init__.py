"""Environments of texts. They import nothing else of this package."""

from .jsonl import load_jsonl
from .spaces import UnicodeText
from .text_env import Record, TextEnv

__all__ = ["Record", "TextEnv", "UnicodeText", "load_jsonl"]
