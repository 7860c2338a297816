"""Splits by hash of whole groups: what belongs together is in one split, on every machine the same."""

import hashlib

SPLITS = ("train", "validation", "test")
# Of 100 hash buckets: a test set large enough for an interval of about two points of chrF either side.
_TEST, _VALIDATION = 18, 10


def check_split(split: str) -> None:
    """Raises: ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")


def split_of(group: str) -> str:
    """The split of a group by the hash of its name: about 72%, 10% and 18% of them."""
    bucket = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % 100
    return "test" if bucket < _TEST else "validation" if bucket < _TEST + _VALIDATION else "train"


class Groups:
    """Union-find over strings."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, member: str) -> str:
        parent = self._parent.setdefault(member, member)
        while parent != self._parent[parent]:
            parent = self._parent[parent]
        self._parent[member] = parent
        return parent

    def join(self, a: str, b: str) -> None:
        self._parent[self.find(a)] = self.find(b)

    def splits(self) -> dict[str, str]:
        """The split of every member: that of its group's least member."""
        groups: dict[str, list[str]] = {}
        for member in self._parent:
            groups.setdefault(self.find(member), []).append(member)
        return {
            member: split for group in groups.values() for split in [split_of(min(group))] for member in group
        }
