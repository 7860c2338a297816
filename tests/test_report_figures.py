"""Texts, numbers and drawings of the report."""

import math

import pytest

pytest.importorskip("jinja2")

from react_fast.tracker.records import PositionMean
from react_fast.tracker.report.figures import curve, graph, scale_of, spark, ticks, trend, whisker
from react_fast.tracker.report.text import interval, number, visible

from .test_report import full_report

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" a", "␣a"),
        ("\n", "⏎"),
        ("\t", "⇥"),
        ("", "∅"),
        ("\x00", "␀"),
        ("\u200b", "‹200B›"),
        ("\u0301", "◌\u0301"),
    ],
)
def test_every_token_can_be_seen(token, shown):
    assert visible(token) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.25, "+0.250"),
        (-1234.5, "−1234"),
        (1e-9, "+1.00e-09"),
        (NAN, "–"),
        (-INF, "−∞"),
    ],
)
def test_numbers_have_three_digits(value, shown):
    assert number(value) == shown


def test_interval():
    assert interval(-1.0, INF) == "[−1.00, +∞]"
    assert interval(NAN, 1.0) == "–"


def test_scale_holds_zero_and_every_mean():
    scale = scale_of([0.5, 2.0, NAN], [-1e9, INF])
    assert scale.low < 0 < 2.0 < scale.high
    # An endless interval may not press the means together: it reaches three times the farthest mean.
    assert scale.high < 7
    assert whisker(scale, 2.0, -1e9, INF)["cut_high"]
    assert whisker(scale, NAN, 0.0, 1.0) is None
    assert scale_of([]).low < 0 < scale_of([]).high


def test_ticks_are_round_and_inside():
    scale = scale_of([0.0, 0.93])
    assert ticks(scale) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], abs=1e-12)


def test_curve_breaks_where_a_position_is_missing():
    drawn = curve(full_report().by_position)
    assert [len(points.split()) for points in drawn["lines"]] == [3, 1]
    assert len(drawn["bands"]) == 1
    assert len(drawn["dots"]) == 1
    assert curve([PositionMean(0, 0, NAN, NAN, NAN, NAN)]) is None


def test_edges_are_as_thick_as_their_means():
    causes = [{"mean": mean, "low": NAN, "high": NAN} for mean in (2.0, -1.0, NAN, 0.0)]
    drawn = graph(causes)
    assert [row["sign"] for row in drawn["rows"]] == ["pos", "neg", "zero"]
    assert [row["width"] for row in drawn["rows"]] == [8.0, 4.5, 1.0]
    assert graph([]) is None


def test_trend_spans_its_windows():
    windows = full_report().features[0].windows
    drawn = trend(windows)
    assert (drawn["first"], drawn["last"]) == (0, 7)
    assert len(drawn["line"].split()) == 2
    assert len(drawn["band"].split()) == 4
    assert len(spark(windows).split()) == 2
    assert spark(windows[:1]) == ""
