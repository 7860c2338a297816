"""Ahead-of-time build of every kernel variant, without a GPU: `python -m react_fast.kernels.aot`.

Compiles for sm_80, sm_90 and sm_100, prints registers, shared memory, spills, global loads of 16 bytes and an
occupancy estimate, of every variant and at last of every kernel's worst one, and exits with 1 if a kernel spills.
Needs triton alone: the kernels are loaded as source, never launched.

`resources.json` holds what the compiler made of every variant, by a hash of all it reads: source, types,
constants, options, target and triton's version. A variant whose hash is there is not compiled again, but for the
first one of every kernel, which must give the same once more. `--all` compiles everything, `--write` renews the
file.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PATHS = sorted(
    p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "aot", "tuned")
)
TARGETS = (80, 90, 100)
TABLE = Path(__file__).with_name("resources.json")

# Per multiprocessor, from the CUDA C++ programming guide, table "Technical specifications per compute
# capability": 65,536 registers, and resident warps and shared memory as below.
REGISTERS = 65536
WARPS = {80: 64, 90: 64, 100: 64}
SHARED_KIB = {80: 164, 90: 228, 100: 228}


@dataclass(frozen=True)
class Variant:
    """One specialisation that a launcher really uses.

    Attributes:
        kernel: the @triton.jit function.
        signature: type of every runtime argument, in order: "*fp32", "*bf16", "i32", "i64", "fp32", ...
        constants: value of every tl.constexpr argument.
        num_warps: as the launcher passes it (Triton's default is 4).
        divisible: integer arguments that are multiples of 16 in the common case; pointers always are, but for
            those whose alignment the kernel does not specialise on.
        targets: the devices that the options are meant for.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    divisible: tuple[str, ...] = ()
    targets: tuple[int, ...] = TARGETS

    @property
    def name(self) -> str:
        types = "/".join(sorted({t[1:] for t in self.signature.values() if t in ("*fp32", "*bf16", "*fp16")}))
        constants = ",".join(f"{k}={v}" for k, v in self.constants.items())
        return f"{self.kernel.__name__}[{types}; {constants}]"


@dataclass(frozen=True)
class Resources:
    """What the compiler made of one variant on one target.

    Registers and spilled bytes count a thread, shared bytes a block; `key` is the hash of what was compiled.
    """

    key: str
    path: str
    variant: str
    target: str
    registers: int
    shared: int
    spilled: int
    wide_loads: int
    loads: int
    occupancy: float


def variants_of(path: str) -> tuple[Variant, ...]:
    return tuple(importlib.import_module(f"{__package__}.{path}").VARIANTS)


def variants() -> Iterable[tuple[str, Variant]]:
    for path in PATHS:
        for variant in variants_of(path):
            yield path, variant


def _key(variant: Variant, capability: int) -> str:
    import triton

    read = [triton.__version__, variant.kernel.cache_key, dict(variant.signature), dict(variant.constants)]
    read += [variant.num_warps, variant.divisible, capability]
    return hashlib.sha256(json.dumps(read, default=str).encode()).hexdigest()[:16]


def _compile(variant: Variant, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    free = {p.name for p in variant.kernel.params if p.do_not_specialize_on_alignment}
    signature = {n: "constexpr" if n in variant.constants else variant.signature[n] for n in names}
    aligned = [
        n
        for n in names
        if n not in variant.constants
        and n not in free
        and (n in variant.divisible or signature[n].startswith("*"))
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": variant.num_warps}
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of the kernel in a cubin.

    Triton kernels have no arrays of their own in local memory, so every byte there is a spilled register.
    """
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        report = subprocess.run(
            [str(tool), "-res-usage", str(binary)], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert usage is not None, f"cuobjdump printed no resources: {report!r}"
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _occupancy(registers: int, shared: int, num_warps: int, capability: int) -> float:
    """Resident warps over the most a multiprocessor holds, limited by registers and shared memory."""
    by_registers = REGISTERS // (max(registers, 1) * 32 * num_warps)
    by_shared = SHARED_KIB[capability] * 1024 // max(shared + 1024, 1)
    blocks = min(by_registers, by_shared, 32, WARPS[capability] // num_warps)
    return blocks * num_warps / WARPS[capability]


def inspect(path: str, variant: Variant, capability: int) -> Resources:
    compiled = _compile(variant, capability)
    ptx = compiled.asm["ptx"]
    registers, spilled = _resource_usage(compiled.asm["cubin"])
    return Resources(
        key=_key(variant, capability),
        path=path,
        variant=variant.name,
        target=f"sm_{capability}",
        registers=registers,
        shared=compiled.metadata.shared,
        spilled=spilled,
        wide_loads=len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64|8\.b16)", ptx)),
        loads=len(re.findall(r"ld\.global", ptx)),
        occupancy=_occupancy(registers, compiled.metadata.shared, variant.num_warps, capability),
    )


def _inspect_numbered(path: str, number: int, known: Mapping[str, Resources]) -> list[Resources]:
    """One variant on all its targets, named so that another process can find it."""
    variant = variants_of(path)[number]
    found = [known.get(_key(variant, capability)) for capability in variant.targets]
    return [
        old or inspect(path, variant, capability)
        for old, capability in zip(found, variant.targets, strict=True)
    ]


def _jobs(
    paths: Iterable[str], known: Mapping[str, Resources]
) -> list[tuple[str, int, Mapping[str, Resources]]]:
    """(path, number of the variant, what need not be compiled): of every kernel the first one is."""
    jobs: list[tuple[str, int, Mapping[str, Resources]]] = []
    seen = set()
    for path in paths:
        for number, variant in enumerate(variants_of(path)):
            first = variant.kernel.__name__ not in seen
            seen.add(variant.kernel.__name__)
            own = {key: known[key] for c in variant.targets if (key := _key(variant, c)) in known}
            jobs.append((path, number, {} if first else own))
    return jobs


def _print(table: Iterable[Iterable[Resources]]) -> Iterator[Resources]:
    row = "{:<12} {:<78} {:>6} {:>5} {:>7} {:>7} {:>9} {:>10}"
    print(row.format("path", "variant", "target", "regs", "shared", "spills", "16B loads", "occupancy"))
    for found in table:
        for r in found:
            wide = f"{r.wide_loads}/{r.loads}"
            cells = (r.path, r.variant[:78], r.target, r.registers, r.shared, r.spilled, wide)
            print(row.format(*cells, f"{r.occupancy:.0%}"), flush=True)
            yield r


def worst(table: Iterable[Resources]) -> Iterator[str]:
    """A line a kernel: the most registers, shared and spilled bytes, and the lowest occupancy, of its variants.

    Args:
        table: of any variants and targets.
    Returns: lines of a table, the head first.
    """
    kernels: dict[str, dict[str, list[Resources]]] = {}
    for r in table:
        name = f"{r.path}.{r.variant.partition('[')[0]}"
        kernels.setdefault(name, {}).setdefault(r.target, []).append(r)
    targets = [f"sm_{capability}" for capability in TARGETS]
    cell = "{:>4} {:>6} {:>6} {:>9}"
    yield "{:<46} {:>8}".format("", "") + "".join(f" | {target:^28}" for target in targets)
    head = cell.format("regs", "shared", "spills", "occupancy")
    yield "{:<46} {:>8}".format("worst of a kernel", "variants") + f" | {head}" * len(targets)
    for name, own in sorted(kernels.items()):
        cells = ""
        for target in targets:
            found = own.get(target, [])
            most = [
                max((getattr(r, key) for r in found), default="")
                for key in ("registers", "shared", "spilled")
            ]
            lowest = f"{min(r.occupancy for r in found):.0%}" if found else ""
            cells += " | " + cell.format(*most, lowest)
        yield f"{name:<46} {max(map(len, own.values())):>8}" + cells


def _known() -> dict[str, Resources]:
    rows = json.loads(TABLE.read_text()) if TABLE.is_file() else []
    return {row["key"]: Resources(**row) for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="compile what resources.json knows, too")
    parser.add_argument("--write", action="store_true", help="renew resources.json")
    parser.add_argument("--only", choices=PATHS, help="one hot path")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    arguments = parser.parse_args()
    # Triton 3.9 warns when this is unset; fused multiply-add has always been its default.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("kernels.aot: unset TRITON_INTERPRET, the interpreter compiles nothing", file=sys.stderr)
        return 2
    known = _known()
    jobs = _jobs(PATHS if arguments.only is None else [arguments.only], {} if arguments.all else known)
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        table = list(_print(processes.map(_inspect_numbered, *zip(*jobs, strict=True))))
    if arguments.write:
        rows = sorted(
            (asdict(r) for r in table), key=lambda row: (row["path"], row["variant"], row["target"])
        )
        TABLE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    spilling = [r for r in table if r.spilled]
    other = [r for r in table if known.get(r.key, r) != r]
    for r in () if arguments.write else other:
        print(f"{r.variant} on {r.target} is not what {TABLE.name} says: renew it with --all --write")
    print("", *worst(table), "", sep="\n")
    compiled = sum(len(variants_of(path)[number].targets) - len(old) for path, number, old in jobs)
    print(f"{len(table)} kernels, {compiled} of them compiled now, {len(spilling)} spill")
    return 1 if spilling or (other and not arguments.write) else 0


if __name__ == "__main__":
    sys.exit(main())
