"""The committed table of compiled kernels is that of the kernels as they are."""

import dataclasses

import pytest

triton = pytest.importorskip("triton")

from react_fast.kernels import aot  # noqa: E402


def test_every_variant_is_in_the_table_and_none_spills():
    known = aot._known()
    if next(iter(known.values())).key not in {aot._key(v, c) for _, v in aot.variants() for c in v.targets}:
        pytest.skip(f"resources.json is of another triton than {triton.__version__}")
    missing = [
        f"{v.name} on sm_{c}" for _, v in aot.variants() for c in v.targets if aot._key(v, c) not in known
    ]
    assert not missing, f"renew kernels/resources.json with --all --write, it lacks {missing[0]}"
    assert {row.spilled for row in known.values()} == {0}


def test_what_the_compiler_reads_is_in_the_hash():
    variant = aot.variants_of("logprob")[0]
    name, value = next(iter(variant.constants.items()))
    others = [
        dataclasses.replace(variant, num_warps=2 * variant.num_warps),
        dataclasses.replace(variant, constants={**variant.constants, name: (value, "other")}),
        aot.variants_of("logprob")[1],
    ]
    keys = {aot._key(one, 90) for one in (variant, *others)} | {aot._key(variant, 80)}
    assert len(keys) == 5
