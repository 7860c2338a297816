"""One prompt and response as token ids."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import _check

Ids = Sequence[int] | torch.Tensor
Span = tuple[int, int]


# What a tokenizer writes for bytes that are no character, and how many bytes one character has at most.
_BROKEN, _LONGEST = "\ufffd", 4
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Text:
    """Token ids of prompt and response, P + R; prompt_length: P."""

    ids: tuple[int, ...]
    prompt_length: int


def check_ids(name: str, value: Ids, vocab_size: int) -> list[int]:
    """One sequence of token ids as a list.

    Raises: TypeError, ValueError or IndexError in one line.
    """
    if isinstance(value, torch.Tensor):
        if _check.integer(name, value).dim() != 1:
            raise ValueError(f"{name} must be one sequence of token ids, got {list(value.shape)}")
        value = value.tolist()
    ids = list(value)
    if not ids:
        raise ValueError(f"{name} must hold at least one token, got none")
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name}[{i}] must be an integer, got {token!r}")
        if not 0 <= token < vocab_size:
            raise IndexError(f"{name}[{i}] must be in [0, {vocab_size}), got {token}")
    return ids


def check_count(name: str, value: Any, least: int) -> int:
    """A whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def before_last(actions: torch.Tensor) -> torch.Tensor:
    """[B, T] true where an action comes later in the row."""
    count = actions.cumsum(1)
    return count < count[:, -1:]


def check_rectangle(name: str, value: torch.Tensor) -> None:
    if value.dim() != 2:
        raise ValueError(f"{name} must be [B, T], got {list(value.shape)}")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of every token behind those before it, which joined can be read: a character that several tokens make
    belongs to the last of them, and the others have none of it. A token whose bytes never become one has U+FFFD.

    Source: the incremental detokenisation of text-generation-inference and vLLM, which decode a token behind the
        last piece of text, as some tokenizers take the blank off a text's first token.
    """
    ids, before = list(ids), 0
    texts: list[str] = []
    while len(texts) < len(ids):
        first = len(texts)
        known = tokenizer.decode(ids[before:first])
        pieces: list[str] = []
        for end in range(first + 1, min(first + _LONGEST, len(ids)) + 1):
            whole = tokenizer.decode(ids[before:end])
            pieces.append(whole.rstrip(_BROKEN).removeprefix(known))
            known += pieces[-1]
            if known == whole and pieces[-1] and _BROKEN not in "".join(pieces):
                before = first
                break
        else:
            pieces, before = [tokenizer.decode(ids[first : first + 1])], first + 1
        texts += pieces
    return texts


def token_name(tokenizer: Any, token: int) -> str:
    """Text of a token of the vocabulary; of one that holds a part of a character its bytes, as ⟨E3 81⟩."""
    text = str(tokenizer.decode([token]))
    written = getattr(tokenizer, "convert_ids_to_tokens", lambda _: None)(token) if _BROKEN in text else None
    if not isinstance(written, str):
        return text
    lone, byte_of = _BYTE.fullmatch(written), _byte_of()
    if lone:
        return f"⟨{lone[1].upper()}⟩"
    known = all(letter in byte_of for letter in written)
    return "⟨" + " ".join(f"{byte_of[letter]:02X}" for letter in written) + "⟩" if known else text


def _byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: printable Latin-1 for itself, the others in
    order from U+0100.

    Source: Radford et al. 2019, GPT-2.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
