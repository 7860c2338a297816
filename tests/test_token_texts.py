"""Texts of tokens that hold parts of characters, wherever they are shown."""

import re
from io import StringIO

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from react_fast.tracker import CausalityTracker
from react_fast.tracker.report.terminal import heat_map_text
from react_fast.tracker.text import token_name, token_texts

from .byte_tokenizers import byte_fallback, byte_level

TEXT = "日本 café😀\nx"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_character_belongs_to_the_token_that_completes_it(make):
    """The k bytes of a character: k - 1 tokens without text, then the character."""
    tokenizer = make()
    ids = tokenizer(TEXT)["input_ids"]
    expected = [piece for letter in TEXT for piece in [""] * (len(letter.encode()) - 1) + [letter]]
    assert token_texts(tokenizer, ids) == expected


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize(
    "shape",
    [
        b"a\xe6a",
        b"\xe6\x97",
        b"\xe6\xe6\x97\xa5",
        b"\x80" * 9,
        b"\xf0\x9f\x98",
        b"a\xef\xbf\xbda",
        b"\xc3a\xa9",
    ],
)
def test_bytes_that_are_no_character_stay_what_the_whole_text_has(make, shape):
    tokenizer = make()
    ids = [i for byte in shape for i in tokenizer.convert_tokens_to_ids([_written(tokenizer, byte)])]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts).count("a") == shape.count(b"a")
    assert "\ufffd" in "".join(texts)
    if make is byte_level:  # byte fallback gives up all bytes of a stretch
        expected = shape.decode(errors="replace")
        assert re.sub("�+", "�", "".join(texts)) == re.sub("�+", "�", expected)


def _written(tokenizer, byte):
    for token in range(len(tokenizer)):
        if token_name(tokenizer, token) in (f"⟨{byte:02X}⟩", chr(byte)):
            return tokenizer.convert_ids_to_tokens(token)
    raise AssertionError(byte)


def test_a_token_by_itself_is_named_by_its_bytes():
    for tokenizer in (byte_level(), byte_fallback()):
        ids = tokenizer("日a")["input_ids"]
        assert [token_name(tokenizer, i) for i in ids] == ["⟨E6⟩", "⟨97⟩", "⟨A5⟩", "a"]


def test_long_texts_take_linear_time():
    """No more than the tokens of one character are decoded again for each token."""
    tokenizer, sizes = byte_level(), []
    ids = tokenizer("日本語" * 50)["input_ids"]

    class Counted:
        def decode(self, part):
            sizes.append(len(part))
            return tokenizer.decode(part)

    assert "".join(token_texts(Counted(), ids)) == "日本語" * 50
    assert max(sizes) <= 8


def test_a_blank_at_the_start_of_a_word_stays():
    """As SentencePiece's decoders take it off the first token of whatever they decode."""
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "▁": 1, "b": 2, ".": 3}, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    assert token_texts(whole, [0, 2, 0, 1, 0, 3]) == ["a", "b", " a", " ", " a", "."]


def test_a_decoder_that_leaves_out_what_is_no_character():
    class Ignoring:
        def decode(self, ids):
            return bytes(ids).decode(errors="ignore")

    assert token_texts(Ignoring(), list("é日😀a".encode())) == ["", "é", "", "", "日", "", "", "", "😀", "a"]


def test_what_is_shown_of_a_text_is_readable(tmp_path):
    """The terminal's heat map, the page, spans of a regular expression, key features."""

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256)

        def forward(self, ids):
            return self.head(self.embed(ids).cumsum(1))

    tokenizer = byte_level()
    tracker = CausalityTracker(Last(), tokenizer)
    prompt, response = "<日é", "本é"
    tracker.explain([prompt], [response])
    ids = [tokenizer(text)["input_ids"] for text in (prompt, response)]
    shown = heat_map_text(tracker.heat_maps[0]).plain
    assert shown == "<··日·é ▸ ··本·é"
    assert "".join(tracker.heat_maps[0].response_tokens) == response
    console = Console(file=StringIO(), width=200)
    tracker.report().show(console=console)
    page = tracker.report().to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    blocks = re.findall(r'<div class="chips">(.*?)</div>', page, re.DOTALL)
    assert re.sub(r"<[^>]*>|\s", "", "".join(blocks)) == "&lt;··日·é··本·é"
    table = console.file.getvalue()
    assert "\ufffd" not in table + page.replace("� bytes that are no character", "")
    effects = tracker.intervene(*ids, re.compile("本"))
    assert effects.spans == ((6, 9),)
    tracker.intervene(*ids, [(3, 4)], accumulate=True)
    tracker.intervene(*ids, [(3, 4), (4, 5)], accumulate=True)
    names = {one.name for one in tracker.key_features(99, kind="effect", families=("token",), min_count=2)}
    assert "⟨A5⟩" in names
