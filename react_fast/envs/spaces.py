"""A Gymnasium space of Unicode text."""

from typing import Any

import numpy as np
from gymnasium import Space

# Letters with and without accents, a blank, a line break, Greek, Cyrillic, Han, and one above U+FFFF: a
# sampled text meets everything that a tokenizer or a file can get wrong.
_SAMPLED = "abcxyz ABC 0123 .,;:!?'\"\n éüñøßçãž αβγ привет 中文 🙂"


class UnicodeText(Space[str]):
    """Every Python string of at most `max_length` characters that can be written as UTF-8.

    `gymnasium.spaces.Text` holds ASCII letters and digits unless told otherwise, so it refuses blanks and
    accents. This class is no subclass of it on purpose: Gymnasium's vector environments then refuse to put
    the strings into shared memory, where they would come back as garbage, and ask for `shared_memory=False`.

    Args:
        max_length: longest member, in characters.
        sample_length: longest text that `sample` draws, in characters.
        seed: of `sample`.
    """

    def __init__(
        self, max_length: int = 1 << 20, *, sample_length: int = 32, seed: int | None = None
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.sample_length = min(sample_length, max_length)
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A text of 1 to `sample_length` characters; `mask` and `probability` have no meaning here."""
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText.sample takes no mask and no probability")
        length = int(self.np_random.integers(1, self.sample_length + 1))
        return "".join(_SAMPLED[i] for i in self.np_random.integers(len(_SAMPLED), size=length))

    def contains(self, x: Any) -> bool:
        if not isinstance(x, str) or len(x) > self.max_length:
            return False
        return not any("\ud800" <= character <= "\udfff" for character in x) if not x.isascii() else True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"UnicodeText({self.max_length})"


def as_text(name: str, value: Any, space: Any) -> str:
    """`value`, once it is known to lie in `space`."""
    if not isinstance(value, (str, np.str_)):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in space:
        raise ValueError(
            f"{name} must be UTF-8 text of at most {space.max_length} characters, got {_short(value)}"
        )
    return str(value)


def _short(text: str) -> str:
    return f"{len(text)} characters beginning {text[:20]!r}"
