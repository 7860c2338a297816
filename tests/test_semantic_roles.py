"""Semantic roles: a grammar whose test asks for new combinations, spans as text, CoNLL's columns, span F1."""

import hashlib
import re
import subprocess
import sys

import pytest

from react_fast.envs import Record, load_conll
from react_fast.envs.match import Span, f1_of_counts, linearised, span_counts, spans_of
from react_fast.envs.metrics import corpus_difference, corpus_metric
from react_fast.envs.rewards import span_f1
from react_fast.envs.tasks.semantic_roles import load
from react_fast.envs.tasks.splits import SPLITS


@pytest.fixture(scope="module")
def records():
    return {split: load(split) for split in SPLITS}


def test_arguments_stand_in_the_sentence_in_their_order_beside_one_marked_predicate(records):
    for record in records["test"]:
        sentence = record.prompt.removesuffix("\n")
        assert len(re.findall(r"\*\w+\*", sentence)) == 1
        assert record.metadata["verb"]
        spans = spans_of(record.reference)
        place = 0
        for span in spans:
            place = sentence.index(span.text, place) + len(span.text)
        assert len({span.role for span in spans}) == len(spans)
        assert linearised(spans) == record.reference
        assert span_f1("", record.reference, record) == 1


def test_word_order_alone_does_not_tell_the_roles(records):
    """The first core argument of a sentence is not always the same, nor is it for nearly all verbs."""
    first = {}
    for record in records["train"]:
        core = [
            span.role
            for span in spans_of(record.reference)
            if span.role.startswith("ARG") and span.role[3] != "M"
        ]
        first.setdefault(record.metadata["verb"], []).append(core[0])
    everything = [role for roles in first.values() for role in roles]
    assert max(map(everything.count, set(everything))) / len(everything) < 0.7
    assert sum(len(set(roles)) > 1 for roles in first.values()) > 0.9 * len(first)


def test_the_test_asks_for_new_pairs_of_known_verbs_and_constructions(records):
    pairs = {
        s: {(r.metadata["verb"], r.metadata["construction"]) for r in found} for s, found in records.items()
    }
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not pairs[first] & pairs[second]
        assert not {r.prompt for r in records[first]} & {r.prompt for r in records[second]}
    for part in (0, 1):
        assert {pair[part] for pair in pairs["test"]} <= {pair[part] for pair in pairs["train"]}
    assert len({r.prompt for found in records.values() for r in found}) == sum(map(len, records.values()))


def test_other_clauses_of_test_sentences_are_of_training(records):
    """A verb that a test sentence does not ask for stands in a construction of training: its clause, asked for,
    would be one of training's."""
    tails = {re.sub(r"[*]", "", r.prompt) for r in records["train"] if " and " not in r.prompt}
    assert any(
        clause.strip() + "\n" in tails
        for record in records["test"]
        for clause in record.prompt.split(" and ")
        if "*" not in clause
    )


def test_same_records_in_a_new_process_with_another_hash_seed(records):
    """Of question answering too: one process for both."""
    from react_fast.envs.tasks import question_answering

    code = (
        "import hashlib; from react_fast.envs.tasks import question_answering as q, semantic_roles as s;"
        "print(hashlib.sha256(repr([q.load('test'), s.load('test')]).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    here = repr([question_answering.load("test"), records["test"]])
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of .*, got 'dev'"):
        load("dev")


# --- spans

WANTED = "ARG0 the boy\nARG1 a red cup\nARGM-TMP at noon"
# (answer, right, answered, wanted)
CASES = [
    (WANTED, 3, 3, 3),
    ("ARGM-TMP at noon\nARG0 the boy", 2, 2, 3),
    ("ARG1 the boy\nARG0 a red cup", 0, 2, 3),
    ("ARG0 the boy\nARG0 the boy", 1, 2, 3),
    ("ARG0  the   boy \n\n", 1, 1, 3),
    ("ARG0 boy\nARG9x the\nARG1\nnonsense\nARG0the boy\narg0 the boy", 0, 6, 3),
    ("", 0, 0, 3),
    ("\x00\ufffd\n" * 3, 0, 3, 3),
]


@pytest.mark.parametrize(("answer", "right", "answered", "wanted"), CASES, ids=repr)
def test_counts_are_those_by_hand_and_what_is_no_span_is_wrong(answer, right, answered, wanted):
    assert span_counts(answer, WANTED) == (right, answered, wanted)
    assert span_f1("", answer, Record("", WANTED)) == pytest.approx(
        2 * right / (answered + wanted), rel=1e-12
    )


def test_nothing_answered_where_nothing_is_wanted_is_right():
    assert span_f1("", "", Record("", "")) == 1
    assert span_f1("", "ARG0 x", Record("", "")) == 0
    assert f1_of_counts(0, 0, 0) == 1


def test_corpus_f1_is_the_micro_average():
    answers = [case[0] for case in CASES]
    right, answered, wanted = (sum(case[i] for case in CASES) for i in (1, 2, 3))
    found = corpus_metric("span_f1", answers, [WANTED] * len(answers))
    assert found.value == pytest.approx(200 * right / (answered + wanted), rel=1e-12)
    assert found.low <= found.value <= found.high
    better = corpus_difference("span_f1", answers, [WANTED] * len(answers), [WANTED] * len(answers))
    assert better.value == pytest.approx(100 - found.value)


def test_corpus_f1_is_seqevals():
    """Spans of unlike words in one sentence: as texts and as BIO tags they are the same."""
    metrics = pytest.importorskip("seqeval.metrics")
    words = ["Anna", "gave", "the", "old", "king", "a", "ring", "yesterday"]
    sentences = [
        ([("ARG0", 0, 1), ("ARG2", 2, 5), ("ARG1", 5, 7)], [("ARG0", 0, 1), ("ARG1", 2, 5), ("ARG1", 5, 7)]),
        ([("ARG0", 0, 1), ("ARGM-TMP", 7, 8)], [("ARGM-TMP", 7, 8)]),
        ([("ARG2", 2, 5)], [("ARG2", 3, 5), ("ARG0", 0, 1)]),
    ]  # fmt: skip

    def text(spans):
        return linearised(Span(role, " ".join(words[a:b])) for role, a, b in spans)

    def tags(spans):
        found = ["O"] * len(words)
        for role, a, b in spans:
            found[a:b] = [f"B-{role}", *[f"I-{role}"] * (b - a - 1)]
        return found

    expected = metrics.f1_score([tags(s[0]) for s in sentences], [tags(s[1]) for s in sentences])
    found = corpus_metric("span_f1", [text(s[1]) for s in sentences], [text(s[0]) for s in sentences])
    assert found.value == pytest.approx(100 * expected, rel=1e-12)


# --- files

CONLL_2005 = """\
The     DT  (S(NP*  -     (A0*     (A0*
boy     NN  *)      -     *)       *)
gave    VBD (VP*    give  (V*)     *
Ana     NNP (NP*)   -     (A2*)    *
a       DT  (NP*    -     (A1*     *
cup     NN  *)      -     *)       *
and     CC  *       -     *        *
left    VBD (VP*    leave *        (V*)
today   NN  (NP*)   -     *        (AM-TMP*)

Yes     UH  (S*)    -

It      PRP (S(NP*) -     (A1*)
broke   VBD (VP*)   break (V*)
"""
CONLL_2012 = """\
#begin document (x); part 000
x 0 0 She PRP (TOP(S(NP*) - - - - * (ARG0*) (1)
x 0 1 put VBD (VP* put 01 1 - * (V*) -
x 0 2 it PRP (NP*) - - - - * (ARG1*) (2)
x 0 3 on RP (PRT*)))) - - - - * (ARG2*) -

#end document
"""


def test_conll_2005_is_read(tmp_path):
    (tmp_path / "props").write_text(CONLL_2005)
    assert load_conll(tmp_path / "props") == [
        Record("The boy *gave* Ana a cup and left today\n", "A0 The boy\nA2 Ana\nA1 a cup", {"line": 1}),
        Record("The boy gave Ana a cup and *left* today\n", "A0 The boy\nAM-TMP today", {"line": 1}),
        Record("It *broke*\n", "A1 It", {"line": 13}),
    ]
    for record in load_conll(tmp_path / "props"):
        assert span_f1("", record.reference, record) == 1


def test_conll_2012_is_read(tmp_path):
    (tmp_path / "gold_conll").write_text(CONLL_2012)
    assert load_conll(tmp_path / "gold_conll") == [
        Record("She *put* it on\n", "ARG0 She\nARG1 it\nARG2 on", {"line": 2})
    ]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("cup     NN  *)      -     *)       *", "cup NN", "6: must have 6 columns like line 1, got 2"),
        ("(A2*)", "A2", r"4: column 5 must be like \(A0\*, \* or \*\), got 'A2'"),
        ("(A2*)", "(A2*))", "4: column 5 closes a span that is not open"),
        ("(AM-TMP*)", "(AM-TMP*", "9: column 6 leaves a span AM-TMP open"),
        ("(V*)     *\nAna", "*        *\nAna", r"1: column 5 must have a span \(V\*\) for its verb"),
        ("give ", "- ", "1: must have a column of verbs and one of roles for each of them"),
    ],
)
def test_a_malformed_file_names_its_line(tmp_path, before, after, message):
    assert before in CONLL_2005
    (tmp_path / "props").write_text(CONLL_2005.replace(before, after, 1))
    with pytest.raises(ValueError, match=f"props:{message}") as caught:
        load_conll(tmp_path / "props")
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        load_conll(tmp_path / "gone")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_conll(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9 x")
    with pytest.raises(ValueError, match="latin: not UTF-8 at byte 4"):
        load_conll(tmp_path / "latin")
    (tmp_path / "empty").write_text("\n\nYes UH -\n")
    with pytest.raises(ValueError, match="empty: no predicates"):
        load_conll(tmp_path / "empty")
