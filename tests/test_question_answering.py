"""Question answering: facts of CLDR in contexts, SQuAD's file format and its two scores."""

import json
import re

import pytest

from react_fast.envs import Record, load_squad
from react_fast.envs.match import squad_match, squad_normal, squad_overlap
from react_fast.envs.metrics import corpus_difference, corpus_metric
from react_fast.envs.rewards import squad_em, squad_f1
from react_fast.envs.tasks.question_answering import load
from react_fast.envs.tasks.splits import SPLITS


@pytest.fixture(scope="module")
def records():
    return {split: load(split) for split in SPLITS}


def test_facts_are_those_of_cldr(records):
    known = {
        (r.metadata["kind"], r.metadata["key"], r.metadata["attribute"]): r.reference
        for split in SPLITS
        for r in records[split]
        if not r.metadata["exchanged"]
    }
    assert known["territory", "JP", "currency"] == " Japanese Yen"
    assert known["territory", "BR", "language"] == " Portuguese"
    assert known["currency", "KWD", "number of decimals"] == " 3"
    assert known["language", "hi", "script"] == " Devanagari"


def test_the_answer_stands_in_the_context_and_order_does_not_tell_it(records):
    places = set()
    for record in records["test"]:
        context, question, rest = record.prompt.split("\n")
        asked = re.fullmatch(r"Q: (.*)\?", question)
        sentence = f"The {asked[1]} is{record.reference}."
        assert sentence in context
        assert rest == f"A: The {asked[1]} is"
        places.add(context.count(". ", 0, context.index(sentence)))
    assert places >= {0, 1, 2}


def test_no_thing_is_in_two_splits_nor_in_their_contexts(records):
    things = {
        split: {(r.metadata["kind"], r.metadata[name]) for r in found for name in ("key", "other")}
        for split, found in records.items()
    }
    facts = {
        split: {s for r in found for s in re.split(r"\. (?=The )", r.prompt.split("\n")[0])}
        for split, found in records.items()
    }
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not things[first] & things[second]
        assert not {s.rstrip(".") for s in facts[first]} & {s.rstrip(".") for s in facts[second]}
    assert len(records["test"]) > 500


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', got 'dev'"):
        load("dev")


# --- scores

# (answer, right answers, EM, F1), counted by hand.
CASES = [
    ("the Cat, sat!", ["cat sat"], 1, 1),
    ("a cat on the mat", ["cat mat"], 0, 4 / 5),
    ("cat", ["dog", "The  CAT."], 1, 1),
    ("cat cat", ["cat"], 0, 2 / 3),
    ("two dogs", ["two cats", "three big dogs"], 0, 1 / 2),
    ("theory", ["the ory"], 0, 0),
    ("", ["cat"], 0, 0),
    ("cat", [""], 0, 0),
    ("the", [""], 1, 1),
]


@pytest.mark.parametrize(("answer", "right", "match", "overlap"), CASES, ids=repr)
def test_scores_are_squads(answer, right, match, overlap):
    assert squad_match(answer, right) == match
    assert squad_overlap(answer, right) == pytest.approx(overlap, rel=1e-12)
    record = Record("", right[0], {"answers": right})
    assert (squad_em("", answer, record), squad_f1("", answer, record)) == (match, pytest.approx(overlap))


def test_normalisation():
    assert squad_normal(" The\tU.S.A.'s  an  apple ") == "usas apple"
    assert squad_normal("Ánodo — 'El'") == "ánodo — el"


def test_corpus_scores_are_torchmetrics():
    text = pytest.importorskip("torchmetrics.text")
    answers = [case for case in CASES if all(case[1])]  # torchmetrics scores unanswerable questions otherwise
    expected = text.SQuAD()(
        [{"prediction_text": case[0], "id": str(i)} for i, case in enumerate(answers)],
        [
            {"answers": {"answer_start": [0] * len(case[1]), "text": case[1]}, "id": str(i)}
            for i, case in enumerate(answers)
        ],
    )
    given = [case[0] for case in answers], [case[1] for case in answers]
    for name, key in (("squad_em", "exact_match"), ("squad_f1", "f1")):
        interval = corpus_metric(name, *given)
        # torchmetrics sums in float32.
        assert interval.value == pytest.approx(float(expected[key]), rel=1e-6)
        assert interval.low <= interval.value <= interval.high
        assert corpus_difference(name, given[0], given[0], given[1]) == (0, 0, 0)


# --- files


def _file(tmp_path, tree):
    path = tmp_path / "squad.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def _tree(*questions, context="Ana has a dog."):
    return {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}],
    }


def test_both_versions_are_read(tmp_path):
    two = {
        "id": "1",
        "question": "Who?",
        "answers": [{"text": "Ana", "answer_start": 0}, {"text": "Ana has"}],
    }
    none = {"id": "2", "question": "When?", "answers": [], "is_impossible": True, "plausible_answers": []}
    open_ = {"id": "3", "question": "What?"}
    assert load_squad(_file(tmp_path, _tree(two, none, open_))) == [
        Record("Ana has a dog.\nQ: Who?\nA:", " Ana", {"id": "1", "answers": ["Ana", "Ana has"]}),
        Record("Ana has a dog.\nQ: When?\nA:", "", {"id": "2", "answers": [""]}),
        Record("Ana has a dog.\nQ: What?\nA:", None, {"id": "3"}),
    ]


@pytest.mark.parametrize(
    ("error", "tree", "message"),
    [
        (ValueError, "{", "squad.json:1: invalid JSON at column 2"),
        (TypeError, [], "squad.json must be an object with 'data', got list"),
        (ValueError, {}, "squad.json: data is missing"),
        (TypeError, {"data": {}}, "squad.json: data must be an array, got dict"),
        (ValueError, {"data": []}, "squad.json: no questions"),
        (TypeError, {"data": [3]}, r"data\[0\] must be an object with 'paragraphs', got int"),
        (TypeError, _tree(context=None), r"data\[0\].paragraphs\[0\].context must be a string, got NoneType"),
        (ValueError, _tree({"id": "1"}), r"paragraphs\[0\].qas\[0\].question is missing"),
        (TypeError, _tree({"question": "?", "answers": "x"}), r"qas\[0\].answers must be an array, got str"),
        (ValueError, _tree({"question": "?", "answers": [{}]}), r"qas\[0\].answers\[0\].text is missing"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path, error, tree, message):
    with pytest.raises(error, match=message) as caught:
        load_squad(_file(tmp_path, tree))
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        load_squad(tmp_path / "gone")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_squad(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"data": "caf\xe9"}')
    with pytest.raises(ValueError, match="latin: not UTF-8 at byte 14"):
        load_squad(tmp_path / "latin")
