"""Summarisation: docstrings out of sources that are never imported, and ROUGE."""

import json
import sysconfig
from pathlib import Path

import pytest

from react_fast.envs import Record, load_jsonl
from react_fast.envs.metrics import corpus_metric
from react_fast.envs.rewards import rouge_1, rouge_2, rouge_l
from react_fast.envs.tasks.splits import SPLITS
from react_fast.envs.tasks.summarisation import BODY, SUMMARY, load

# One package of the standard library: enough docstrings for every split, and quick to parse.
EMAIL = Path(sysconfig.get_path("stdlib")) / "email"


@pytest.fixture(scope="module")
def records():
    return {split: load(split, EMAIL) for split in SPLITS}


def _sources(folder, **modules):
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def test_a_record_is_name_and_body_and_first_line(records):
    found = {record.reference: record for split in SPLITS for record in records[split]}
    record = found["Parser of RFC 2822 and MIME email messages."]
    assert record.prompt.startswith("__init__: Creates an in-memory object tree") or record.prompt.startswith(
        "Parser"
    )
    assert set(record.metadata) == {"module", "name"}
    for record in found.values():
        name, body = record.prompt.removesuffix("\n").split(": ", 1)
        assert name == record.metadata["name"]
        assert 0 < len(body) <= BODY
        assert len(record.reference) in SUMMARY
        assert "\n" not in record.reference + body


def test_no_summary_and_no_document_is_in_two_splits(records):
    summaries = {
        split: {r.reference.casefold().rstrip(".") for r in found} for split, found in records.items()
    }
    documents = {split: {r.prompt.partition(":")[2] for r in found} for split, found in records.items()}
    assert all(summaries.values())
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not summaries[first] & summaries[second]
        assert not documents[first] & documents[second]
    assert sum(map(len, summaries.values())) == sum(map(len, records.values()))


DOCUMENTED = '''
"""The module's own line.

Its body.
"""
import gone_for_good
raise SystemExit("importing this file ends the process")

def one():
    """Only one line here."""

async def two():
    """Two lines that go
    together.

    And a body.
    """

class Three:
    """The summary of three.

    A body   of several
    words, {words}
    """
'''


def test_sources_are_parsed_and_not_run(tmp_path):
    folder = _sources(tmp_path, a=DOCUMENTED.replace("{words}", "word " * 100), broken="def (:")
    (tmp_path / "test").mkdir()
    _sources(tmp_path / "test", b=DOCUMENTED.replace("The", "A"))
    found = {r.reference: r for split in SPLITS for r in load(split, folder)}
    assert set(found) == {"The module's own line.", "The summary of three."}
    assert found["The module's own line."].prompt == "a: Its body.\n"
    document = found["The summary of three."].prompt
    assert document.startswith("Three: A body of several words, word word")
    assert document.endswith("word\n")
    assert len(document) <= len("Three: \n") + BODY


def test_equal_first_lines_are_kept_once_and_equal_documents_stay_together(tmp_path):
    text = '"""{}\n\n{}\n"""\n'
    modules = {f"m{i}": text.format(f"Summary number {i // 2}.", f"Body {i}.") for i in range(20)}
    modules |= {f"n{i}": text.format(f"Another summary {i}.", "The same body.") for i in range(20)}
    splits = {split: load(split, _sources(tmp_path, **modules)) for split in SPLITS}
    assert sum(len(found) for found in splits.values()) == 10 + 20
    assert [any("The same body." in r.prompt for r in found) for found in splits.values()].count(True) == 1


def test_records_do_not_hang_on_the_order_of_calls(records):
    again = {split: load(split, str(EMAIL) + "/.") for split in reversed(SPLITS)}
    assert again == records


def test_folders_without_docstrings_and_unknown_splits_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="sources must hold docstrings of a first line and a body, got none in"
    ):
        load("train", tmp_path)
    with pytest.raises(ValueError, match=r"split must be one of .*, got 'all'"):
        load("all")


# (answer, reference, ROUGE-1, ROUGE-2, ROUGE-L) counted by hand: 2 x common / (words + words).
CASES = [
    ("Return the new list.", "return a new list", 6 / 8, 2 / 6, 6 / 8),
    ("list new", "new list", 1, 0, 1 / 2),
    ("a b a b", "a b", 4 / 6, 2 / 4, 4 / 6),
    ("", "new list", 0, 0, 0),
]


@pytest.mark.parametrize(("answer", "reference", "one", "two", "longest"), CASES)
def test_rouge_is_counted_as_by_hand(answer, reference, one, two, longest):
    pytest.importorskip("rouge_score")
    record = Record("", reference)
    found = [reward("", answer, record) for reward in (rouge_1, rouge_2, rouge_l)]
    assert found == pytest.approx([one, two, longest], rel=1e-12)


def test_corpus_rouge_is_torchmetrics_mean(monkeypatch):
    pytest.importorskip("rouge_score")
    rouge = pytest.importorskip("torchmetrics.functional.text.rouge")
    answers, references = [case[0] for case in CASES[:3]], [case[1] for case in CASES[:3]]
    keys = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    expected = rouge.rouge_score(answers, references, rouge_keys=tuple(keys.values()))
    for name, key in keys.items():
        found = corpus_metric(name, answers, references)
        # torchmetrics sums in float32.
        assert found.value == pytest.approx(100 * float(expected[f"{key}_fmeasure"]), rel=1e-6)
        assert found.low <= found.value <= found.high
    worse = corpus_metric("rouge_1", answers, [["nothing alike", reference] for reference in references])
    assert worse == corpus_metric("rouge_1", answers, references)


def test_documents_and_summaries_come_from_jsonl(tmp_path):
    path = tmp_path / "news.jsonl"
    path.write_text(json.dumps({"document": "A long text.\n", "summary": "A text."}) + "\n")
    assert load_jsonl(path) == [Record("A long text.\n", "A text.")]
    path.write_text(json.dumps({"document": "x", "prompt": "y"}) + "\n")
    with pytest.raises(ValueError, match=r"news.jsonl:1: fields 'prompt' and 'document' are the same"):
        load_jsonl(path)
    path.write_text(json.dumps({"document": 3}) + "\n")
    with pytest.raises(TypeError, match=r"news.jsonl:1: field 'prompt' must be a string or a list"):
        load_jsonl(path)
