"""The translation task: real names, no leakage across splits, the same records everywhere."""

import subprocess
import sys

import pytest

from react_fast.envs.tasks import translation
from react_fast.envs.tasks.translation import PAIRS, SPLITS, load

FAR_PAIRS = ("en-de", "uk-sr_Latn")


def _normal(text):
    return translation._normal(text)


def _source(record):
    return record.prompt.partition(":")[2].removesuffix("=")


def _records(pairs):
    return {split: load(pairs, split) for split in SPLITS}


def test_records_are_prompts_with_the_pair_and_human_translations():
    records = {record.prompt: record for split in _records(PAIRS).values() for record in split}
    record = records["es>pt:Alemania="]
    assert record.reference == "Alemanha"
    assert record.metadata == {"pair": "es-pt", "kind": "territory", "key": "DE"}
    assert records["es>it:metros cúbicos="].reference == "metri cubi"
    assert records["es>it:libras esterlinas="].reference == "sterline britanniche"
    kinds = {(record.metadata["pair"], record.metadata["kind"]) for record in records.values()}
    assert kinds == {(pair, kind) for pair in PAIRS for kind in ("territory", "language", "currency", "unit")}


def test_splits_are_large_enough():
    """The shares of the hash buckets are 72, 10 and 18 of 100; groups make them uneven by a few points."""
    sizes = {split: len(records) for split, records in _records(PAIRS).items()}
    total = sum(sizes.values())
    assert total > 2000
    assert sizes["train"] / total == pytest.approx(0.72, abs=0.05)
    assert sizes["validation"] / total == pytest.approx(0.10, abs=0.04)
    assert sizes["test"] / total == pytest.approx(0.18, abs=0.04)


@pytest.mark.parametrize("pairs", [PAIRS, FAR_PAIRS, ("es-pt", "pt-es")], ids=str)
def test_no_name_and_no_translation_is_in_two_splits(pairs):
    names = {split: set() for split in SPLITS}
    items = {split: set() for split in SPLITS}
    for split, records in _records(pairs).items():
        for record in records:
            source, target = record.metadata["pair"].split("-")
            names[split] |= {(source, _normal(_source(record))), (target, _normal(record.reference))}
            items[split].add((record.metadata["kind"], record.metadata["key"]))
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not names[first] & names[second]
        assert not items[first] & items[second]


@pytest.mark.parametrize("pairs", [PAIRS, FAR_PAIRS], ids=str)
def test_no_prompt_twice_no_copies_no_keys(pairs):
    records = [record for split in _records(pairs).values() for record in split]
    prompts = [_normal(record.prompt) for record in records]
    assert len(set(prompts)) == len(prompts)
    for record in records:
        assert _normal(_source(record)) != _normal(record.reference)
        assert record.metadata["key"] not in (_source(record), record.reference)
        assert record.reference == record.reference.strip() != ""


def test_same_records_in_a_new_process_with_another_hash_seed():
    code = (
        "from react_fast.envs.tasks.translation import SPLITS, load; import hashlib;"
        "print(hashlib.sha256(repr([load(split=s) for s in SPLITS]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_order_of_pairs_orders_records_and_nothing_else():
    forward, backward = load(PAIRS, "test"), load(PAIRS[::-1], "test")
    assert forward != backward
    assert sorted(r.prompt for r in forward) == sorted(r.prompt for r in backward)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("split must be one of 'train', 'validation', 'test', got 'dev'", {"split": "dev"}),
        ("pairs must be a sequence of at least one 'source-target', got 'es-pt'", {"pairs": "es-pt"}),
        ("pairs must be a sequence", {"pairs": ()}),
        ("pairs must hold 'source-target' of two different languages, got 'es'", {"pairs": ["es"]}),
        ("two different languages, got 'es-es'", {"pairs": ["es-es"]}),
        ("pairs must hold CLDR language codes, got 'xx'", {"pairs": ["es-xx"]}),
        ("pairs must hold CLDR language codes, got 'p!'", {"pairs": ["es-p!"]}),
        ("pairs must hold CLDR language codes, got ''", {"pairs": ["es-"]}),
    ],
)
def test_refuses(match, arguments):
    with pytest.raises(ValueError, match=match):
        load(**arguments)
