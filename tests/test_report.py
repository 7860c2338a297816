"""The report says what it was given, loads nothing, and stands any token and any number."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")

from react_fast.tracker.records import EffectRow, HeatMap, KeyFeature, PositionMean, Window
from react_fast.tracker.report import CausalityReport

NAN, INF = math.nan, math.inf
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "hr", "img", "input", "line", "polyline", "polygon"}


TABLES = ("features", "by_position", "heat_maps", "effects")


def full_report():
    heat_map = HeatMap(
        prompt_tokens=(" Islas", EVIL, "\n"),
        response_tokens=(" Ilhas", "�"),
        scores=((0.5, -0.25, 0.0, 0.0, 0.0), (0.25, 0.125, -1.0, 2.0, 0.0)),
        title=f"es>pt {EVIL}",
    )
    # One token, a missing number, an empty response, a long text's totals.
    odd = (HeatMap(("x",), ("y",), ((NAN, 0.0),)), HeatMap(("alone",), (), ()))
    odd += (HeatMap(("only", EVIL), ("totals",), (), EVIL, (0.5, NAN, -0.5)),)
    effects = [
        EffectRow((" Islas",), 1.5, 1.0, 2.0, 0, 0, 1, False, 8, 0.001, True),
        EffectRow((EVIL, "\n"), -0.5, -INF, INF, 0, 1, 3, False, 8, 0.5),
        EffectRow(("x",), NAN, NAN, NAN, 1, 0, 1),
        EffectRow(('"ghost"',), 0.0, 0.0, 0.0, 9, 0, 1),  # an example without a heat map
    ]
    windows = (Window(0, 3, 5, 0.1, 0.0, 0.2), Window(4, 7, 1, 0.4, NAN, NAN))
    moved = {"drift": 0.3, "drift_low": 0.1, "drift_high": 0.5, "drift_significant": True, "windows": windows}
    features = [
        KeyFeature(
            "attribution", "token", " Ilhas", (7,), 1234, 0.25, 0.05, 0.15, 0.35, 1e-6, True, 1200.5, **moved
        ),
        KeyFeature("attribution", "span", EVIL + " and", (8, 9), 5, -0.1, 0.2, -0.5, 0.3, 0.6, False),
        KeyFeature("effect", "token", "\x00", (9,), 2, 0.0, 0.0, 0.0, 0.0, 1.0, False),
        KeyFeature("effect", "span", EVIL, (8, 3), 9, -0.5, 0.1, -0.7, -0.3, 1e-5, True, **moved),
        KeyFeature("effect", "group", EVIL, (0,), 9, -0.5, 0.1, -0.7, -0.3, 1e-5, True),
        KeyFeature("effect", "position", "3", (3,), 9, -INF, NAN, NAN, NAN, NAN, False),
        KeyFeature(
            "return_effect", "token_at_position", EVIL, (8, 3), 9, -0.5, 0.1, -0.7, -0.3, 1e-5, True, **moved
        ),
    ]
    positions = [PositionMean(p, 10, 0.1 * p - 0.2, 0.05, 0.1 * p - 0.3, 0.1 * p - 0.1) for p in (0, 1, 2, 5)]
    meta = {"model": EVIL, "observed_tokens": 1234567, "seed": 0, "rate": 0.5, "nothing": None}
    return CausalityReport(features, positions, (heat_map, *odd), effects, meta)


class Page(HTMLParser):
    """Elements of a page; fails where one is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data.strip())

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(params=["full", "empty"])
def report(request):
    return full_report() if request.param == "full" else CausalityReport()


@pytest.fixture
def page(report, tmp_path):
    return Page(report.to_html(tmp_path / "new folder" / "report.html").read_text(encoding="utf-8"))


def test_page_loads_nothing(page, report, tmp_path):
    for _, attrs in page.elements:
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
    assert not page.of("link")
    text = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)


def test_page_is_well_formed(page, report, tmp_path):
    text = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    assert page.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in pairwise(levels))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.of("th"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for attrs in page.of("a")} <= set(ids)


def test_text_is_escaped(tmp_path):
    page = Page(full_report().to_html(tmp_path / "page.html").read_text(encoding="utf-8"))
    # Four heat maps and the page's own script; tokens, spans, groups, titles and meta are text.
    assert len(page.of("script")) == 5
    # Meta; summary, graph, table, drift of the span; table of groups; two titles, two tokens, an action twice.
    assert sum(EVIL in word for word in page.words) >= 12


def test_page_shows_the_numbers(tmp_path):
    text = full_report().to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "1,234,567" in page.words
    assert "[+0.150, +0.350]" in page.words
    assert "+1.50" in page.words
    first, _, _, last = (
        json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text)
    )
    assert first["rows"] == [[0.5, -0.25, 0.0], [0.25, 0.125, -1.0, 2.0]]
    # Column sums of the heat map; the effects' places, means and intervals, infinite ones as null.
    assert first["totals"] == [0.75, -0.125, -1.0, 2.0, 0.0]
    assert first["effects"] == [[0, 1, 1.5, 1.0, 2.0, True, True], [1, 3, -0.5, None, None, True, False]]
    assert last == {"rows": [], "totals": [0.5, None, -0.5], "effects": []}


def test_page_says_what_raises_and_what_lowers(tmp_path):
    report, escaped = full_report(), EVIL.replace("<", "&lt;").replace(">", "&gt;")
    without = [one for one in report.features if one.kind != "return_effect"]
    # The causal graph: effects on the return, or the accumulated ones where there are none.
    for one, name, expected in (
        (report, f"{escaped} at 3", ["s-neg"]),
        (replace(report, features=without), escaped, ["s-zero unsure", "s-neg"]),
    ):
        text = one.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
        assert name in text[text.index("Reliably lowers it") : text.index("<figure>")]
        assert re.findall(r'<path class="edge ([^"]*)"', text[: text.index('id="features"')]) == expected


def test_page_of_an_empty_report_says_so(tmp_path):
    page = Page(CausalityReport().to_html(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not page.of("table")
    assert "No example was explained." in page.words
    assert "No intervention was carried out often enough." in page.words


def test_ten_thousand_tokens_are_one_page_of_megabytes(tmp_path):
    size, part = 10_000, 40
    totals = tuple(math.sin(i) for i in range(size))
    tokens = tuple("a\n" if i % 97 == 0 else EVIL for i in range(size))
    rows = tuple(tuple(float(j < size + i) for j in range(size)) for i in range(part))
    maps = [HeatMap(tokens[:-part], tokens[-part:], scores, "", totals) for scores in ((), rows)]
    effects = [EffectRow((tokens[i],), totals[i], -1.0, 1.0, 0, i, i + 1, samples=8) for i in range(size)]
    path = CausalityReport(heat_maps=maps, effects=effects).to_html(tmp_path / "p.html")
    page = Page(path.read_text(encoding="utf-8"))
    chips = [attrs for attrs in page.of("span") if attrs.get("class", "").startswith("chip")]
    assert len(chips) >= 2 * size
    # The 400,000 numbers of the second text's matrix are not in the page, nor rows of 10,000 effects.
    assert path.stat().st_size < 6e6
    assert len(page.of("tr")) < 200
    # Browsers lay out a block at a time: blocks of 250 tokens at most, and an overview of the whole.
    assert len([attrs for attrs in page.of("div") if attrs.get("class") == "chips"]) >= 2 * size / 250
    assert 2 * 100 <= len(page.of("i")) <= 2 * 120


def test_json_comes_back(report, tmp_path):
    path = report.to_json(tmp_path / "report.json")
    again = CausalityReport.from_json(path)
    # repr: NaN is not equal to itself.
    for name in TABLES:
        assert repr(list(getattr(again, name))) == repr(list(getattr(report, name)))
    assert again.meta == report.meta
    json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


def test_parquet_comes_back(report, tmp_path):
    pytest.importorskip("pyarrow")
    again = CausalityReport.from_parquet(report.to_parquet(tmp_path / "report.parquet"))
    for name in TABLES:
        assert repr(list(getattr(again, name))) == repr(list(getattr(report, name)))
    assert again.meta == report.meta


def test_another_parquet_table_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"record": ["feature"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="version 2, got None"):
        CausalityReport.from_parquet(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"version": 99}', "of version 2, got 99"),
        ('{"version": 2}', "got one without 'meta'"),
        ("<!doctype html>", "got no JSON"),
    ],
)
def test_another_json_is_refused(content, told, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"path must name a causality report,? {told} in ") as caught:
        CausalityReport.from_json(path)
    assert str(caught.value).endswith(str(path))
    assert "\n" not in str(caught.value)


def test_graphml_holds_every_edge(tmp_path):
    networkx = pytest.importorskip("networkx")
    path = full_report().to_graphml(tmp_path / "report.graphml")
    assert ElementTree.parse(path).getroot().tag.endswith("graphml")
    graph = networkx.read_graphml(path, force_multigraph=True)
    assert graph["e0.t3"]["e0.t4"][0]["weight"] == 2.0
    kinds = [kind for _, _, kind in graph.edges(data="kind")]
    # Six scores of the first heat map are not 0, two totals of the last are known; of the four effects one is NaN.
    assert kinds.count("attribution") == 6 + 2
    assert kinds.count("effect") == 3
    assert kinds.count("mean attribution") == 2
    assert kinds.count("mean effect") == 4
    assert graph["f0"]["outcome"][0]["weight"] == 0.25
    assert graph["f0"]["outcome"][0]["drift"] == 0.3
    assert json.loads(graph.nodes["f0"]["windows"])[0]["mean"] == 0.1
    assert graph.nodes["f3"]["name"] == EVIL
    assert graph.nodes["p5"]["mean"] == pytest.approx(0.3)
    assert json.loads(graph.graph["meta"])["model"] == EVIL
    assert graph.nodes["e0.t1"]["label"] == EVIL
    assert graph["e0.a1-3"]["e0.outcome"][0]["weight"] == -0.5


def test_empty_graphml(tmp_path):
    ElementTree.parse(CausalityReport().to_graphml(tmp_path / "report.graphml"))


def test_parquet_holds_every_number(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(full_report().to_parquet(tmp_path / "report.parquet"))
    rows = table.to_pylist()
    counts = {name: sum(row["record"] == name for row in rows) for name in set(table["record"].to_pylist())}
    # Two heat maps of 2 x 5 and 1 x 2; tokens 5 + 2 + 1 + 3.
    assert counts == {"feature": 7, "window": 6, "position": 4, "token": 11, "score": 12, "effect": 4}
    score = next(row for row in rows if row["record"] == "score" and row["target"] == 4 and row["start"] == 3)
    assert score["name"] == " Ilhas"
    assert score["mean"] == 2.0
    assert score["in_response"]
    assert json.loads(table.schema.metadata[b"react_fast"])["meta"]["model"] == EVIL


HARD = ("a\uffffb", "a\ud800b", "a\x1bb")


@pytest.mark.parametrize("text", HARD, ids=["no character", "lone surrogate", "escape"])
@pytest.mark.parametrize("kind", ["html", "json", "parquet", "graphml"])
def test_what_a_file_cannot_hold_is_replaced(kind, text, tmp_path):
    pytest.importorskip({"parquet": "pyarrow", "graphml": "networkx"}.get(kind, "json"))
    numbers = (2, 1.0, 0.1, 0.8, 1.2, 0.1, False)
    features = [KeyFeature("effect", family, text, (1,), *numbers) for family in ("token", "group")]
    effects = [EffectRow((text, text), 1.0, 0.5, 1.5, 0, 0, 2)]
    heat_maps = [HeatMap((text,), ("y",), ((1.0, 0.0),), text)]
    report = CausalityReport(features, [], heat_maps, effects, {"name": text})
    path = getattr(report, f"to_{kind}")(tmp_path / f"report.{kind}")
    if kind == "html":
        Page(path.read_text(encoding="utf-8"))
    elif kind == "graphml":
        graph = pytest.importorskip("networkx").read_graphml(path, force_multigraph=True)
        # JSON spells the escape in letters.
        assert json.loads(graph.graph["meta"])["name"] == (text if text.isascii() else "a\ufffdb")
        assert ElementTree.parse(path).getroot().tag.endswith("graphml")
    else:
        again = getattr(CausalityReport, f"from_{kind}")(path)
        expected = text.replace("\ud800", "\ufffd")
        assert (again.heat_maps[0].title, again.meta["name"]) == (expected, expected)
        assert again.features[0].name == again.effects[0].tokens[1] == expected


def test_heat_maps_alone_are_something_seen():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=80, file=StringIO())
    CausalityReport(heat_maps=[HeatMap(("\x1b[31mup\n",), ("down",), ((1.0, 0.0),))]).show(console=console)
    assert console.export_text().split() == ["␛[31mup⏎", "▸", "down"]


def test_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow.*react-fast\[report\]"):
        CausalityReport().to_parquet(tmp_path / "report.parquet")


def test_terminal(report):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=120, file=StringIO())
    report.show(console=console)
    shown = console.export_text()
    assert ("␣Ilhas" in shown) == bool(report.features)
    assert ("nothing yet" in shown) == (not report.features)


def test_markup_of_the_terminal_is_text():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=120, file=StringIO())
    CausalityReport([KeyFeature("effect", "token", "[/bold]", (1,), 2, 1.0, 0.1, 0.8, 1.2, 0.1, False)]).show(
        console=console
    )
    assert "[/bold]" in console.export_text()


def test_terminal_colours_a_heat_map(capsys):
    rich = pytest.importorskip("rich.console")
    file = StringIO()
    console = rich.Console(file=file, force_terminal=True, color_system="truecolor", width=80)
    CausalityReport(heat_maps=[HeatMap(("up", "[b]"), ("down",), (), "", (1.0, 0.0, -0.5))]).show(
        console=console
    )
    shown = file.getvalue()
    assert "48;2;224;112;16mup" in shown  # all of the colour for the strongest
    assert "[b]" in shown
    assert "48;2;24;69;138mdown" in shown  # 0.25 + 0.75 / 2 of it for half as much


def test_totals_must_fit_their_tokens():
    with pytest.raises(ValueError, match=r"heat_maps\[0\]\.totals must be \[2\] or none, got \[1\]"):
        CausalityReport(heat_maps=[HeatMap(("a",), ("b",), (), "", (0.0,))])


def test_scores_must_fit_their_tokens():
    with pytest.raises(ValueError, match=r"heat_maps\[0\]\.scores must be \[1, 2\], got \[1, 3\]"):
        CausalityReport(heat_maps=[HeatMap(("a",), ("b",), ((0.0, 0.0, 0.0),))])
