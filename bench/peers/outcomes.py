"""What a suite's two runs came to: outcomes of two JUnit files compared, and the table of all peers."""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KINDS = ("passed", "failed", "error", "skipped")
_WORST = ("error", "failure", "skipped")  # a test that fails may fail once more at its teardown
TITLE = """# Other trainers' own tests, without and with our patch

Made by `python -m bench.peers.run_suites --out`. Counts are passed / failed / errors / skipped; a call "handed on"
is one that ours does not cover and that went to the original.

| peer | version | tests | without | with | differing | calls of ours | handed on | torch | date |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""


def outcomes(junit: Path) -> dict[str, str]:
    """{class::name of a test: one of KINDS}. Raises: OSError, ET.ParseError for no such file or half of one."""
    found: dict[str, str] = {}
    for case in ET.parse(junit).iter("testcase"):
        tags = {child.tag for child in case}
        worst = next((tag for tag in _WORST if tag in tags), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = "failed" if worst == "failure" else worst
    return found


def counts(found: Mapping[str, str]) -> str:
    by_kind = Counter(found.values())
    return " / ".join(str(by_kind[kind]) for kind in KINDS)


def differing(without: Mapping[str, str], patched: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """{test: (outcome without, outcome with)} where they are not alike; "missing" where a run has no such test."""
    names = dict.fromkeys([*without, *patched])
    pairs = {name: (without.get(name, "missing"), patched.get(name, "missing")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def broken(different: Mapping[str, tuple[str, str]]) -> list[str]:
    """Tests that pass without the patch and do not with it."""
    return [name for name, (before, _) in different.items() if before == "passed"]


@dataclass(frozen=True)
class Result:
    """Both runs of one peer; calls: {replaced name: (calls, of these handed on to the original)}."""

    peer: str
    version: str
    without: Mapping[str, str]
    patched: Mapping[str, str]
    calls: Mapping[str, tuple[int, int]]
    command: str
    torch: str
    date: str

    def row(self) -> str:
        entered, handed_on = (sum(pair[i] for pair in self.calls.values()) for i in (0, 1))
        cells = (
            self.peer, self.version, len(self.without), counts(self.without), counts(self.patched),
            len(differing(self.without, self.patched)), entered, handed_on, self.torch, self.date,
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"

    def details(self) -> str:
        calls = ", ".join(
            f"`{target.removeprefix(f'{self.peer}.')}` {entered}"
            for target, (entered, _) in self.calls.items()
        )
        different = differing(self.without, self.patched).items()
        listed = "".join(f"; differs: `{name}` {old}, {new}" for name, (old, new) in different)
        return f"- {self.peer}: `{self.command}`; calls: {calls}{listed}"


def write(path: Path, results: list[Result]) -> None:
    """The table and a line a peer; what the file says of other peers stays."""
    lines = path.read_text().splitlines() if path.exists() else []
    fresh = [result.peer for result in results]
    rows = {line.split(" ")[1]: line for line in lines if line.startswith("| ") and line[2].islower()}
    notes = {line[2:].partition(":")[0]: line for line in lines if line.startswith("- ")}
    rows = {peer: line for peer, line in rows.items() if peer in notes and peer not in fresh}
    rows |= {result.peer: result.row() for result in results}
    notes |= {result.peer: result.details() for result in results}
    body = "\n".join(rows[peer] for peer in sorted(rows))
    path.write_text(f"{TITLE}{body}\n\n" + "\n".join(notes[peer] for peer in sorted(rows)) + "\n")
