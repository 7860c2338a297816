"""The committed table of compiled kernels is that of the kernels as they are."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from react_fast.kernels import aot

# In a process of its own: here the kernels are interpreted.
TABLE = """
from react_fast.kernels import aot

known = aot._known()
keys = {aot._key(v, c): f"{v.name} on sm_{c}" for _, v in aot.variants() for c in v.targets}
print("other triton" if not keys.keys() & known.keys() else [keys[k] for k in keys.keys() - known.keys()])
print({row.spilled for row in known.values()})
"""
HASH = """
import dataclasses
from react_fast.kernels import aot

variant, other = aot.variants_of("logprob")[:2]
name, value = next(iter(variant.constants.items()))
changed = dataclasses.replace(variant, constants={**variant.constants, name: (value, "other")})
wider = dataclasses.replace(variant, num_warps=2 * variant.num_warps)
print(len({aot._key(one, 90) for one in (variant, other, changed, wider)} | {aot._key(variant, 80)}))
"""
SPILL = """
import dataclasses, json, sys
from contextlib import nullcontext
from react_fast.kernels import aot

class Given:
    def map(self, *_):
        return [table]

rows = [aot.Resources(**row) for row in json.loads(aot.TABLE.read_text()) if row["path"] == "moments"]
aot.ProcessPoolExecutor = lambda *_, **__: nullcontext(Given())
aot._known = lambda: {row.key: row for row in table}
sys.argv = ["aot", "--only", "moments"]
for spilled in (0, 8):
    table = [dataclasses.replace(rows[0], spilled=spilled), *rows[1:]]
    print("exit", aot.main())
"""


def _printed(script: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_every_variant_is_in_the_table_and_none_spills():
    missing, spilled = _printed(TABLE)
    assert missing in ("[]", "other triton"), "renew kernels/resources.json with --all --write"
    assert spilled == "{0}"


def test_what_the_compiler_reads_is_in_the_hash():
    assert _printed(HASH) == ["5"]


def test_a_spill_fails_the_build():
    """Of the committed rows, with one spill made up and without; nothing is compiled."""
    assert [line for line in _printed(SPILL) if line.startswith("exit")] == ["exit 0", "exit 1"]


def test_the_worst_of_every_kernel():
    """The most of each resource over a kernel's variants, by target; a target that a kernel is not built for is
    blank."""
    rows = [
        aot.Resources("k", "a", f"x_kernel[{i}]", "sm_90", registers, shared, 0, 1, 2, occupancy)
        for i, (registers, shared, occupancy) in enumerate([(32, 512, 0.5), (64, 0, 0.25)])
    ]
    *_, line = aot.worst([*rows, aot.Resources("k", "a", "x_kernel[]", "sm_80", 40, 16, 8, 1, 2, 1.0)])
    cells = [cell.split() for cell in line.split("|")]
    assert cells == [["a.x_kernel", "2"], ["40", "16", "8", "100%"], ["64", "512", "0", "25%"], []]
