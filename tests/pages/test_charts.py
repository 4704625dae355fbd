from __future__ import annotations

import math
import re

import pytest

from diffalign.pages.charts import Curve, chart, charts, curve_of

NAN = float("nan")


def lines_of(markup: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline points="([^"]*)"', markup)
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in found]


def test_a_curve_is_drawn_to_scale():
    markup = chart("loss", [Curve("loss", [(0, 0.0), (50, 1.0), (100, 0.5)])])
    ((first, second, third),) = lines_of(markup)
    assert second[0] - first[0] == pytest.approx(third[0] - second[0])
    assert second[1] < third[1] < first[1]  # upwards is less
    assert first[1] - second[1] == pytest.approx(2 * (third[1] - second[1]), abs=0.2)
    assert "<b>0.5</b>" in markup  # the last value


def test_values_that_are_not_finite_leave_a_gap():
    points = [(0, 1.0), (1, 2.0), (2, NAN), (3, math.inf), (4, 1.0), (5, 2.0)]
    assert [len(line) for line in lines_of(chart("x", [Curve("x", points)]))] == [2, 2]
    assert chart("x", [Curve("x", [(0, NAN)])]) == ""
    assert chart("x", []) == ""


def test_long_curves_keep_their_extremes():
    points = [(step, math.sin(step / 50)) for step in range(100_000)]
    points[70_123] = (70_123, 9.0)
    points[70_124] = (70_124, -9.0)
    (line,) = lines_of(chart("x", [Curve("x", points)]))
    assert len(line) <= 400
    heights = [y for _, y in line]
    assert max(heights) - min(heights) == pytest.approx(198, abs=25)


@pytest.mark.parametrize(
    ("low", "high"), [(0.69310, 0.69316), (0, 1), (-3e-7, 2e-7), (5, 5), (0, 0), (1e6, 3e6)]
)
def test_ticks_are_told_apart_and_enclose_the_curve(low, high):
    markup = chart("x", [Curve("x", [(0, low), (9, high)])])
    labels = re.findall(r'class="row"[^>]*>([^<]*)<', markup)
    values = [float(label) for label in labels]
    assert len(set(values)) == len(labels) >= 2
    slack = (values[1] - values[0]) / 100
    assert values[0] - slack <= low and high <= values[-1] + slack


def test_intervals_are_bands_and_marks_are_lines_where_they_are_in_sight():
    rows = [{"step": s, "a": 0.6, "a_low": 0.5, "a_high": 0.7} for s in (0, 10)]
    curve = curve_of([*rows, {"step": 20}], "a")
    assert curve.band == [(0, 0.5, 0.7), (10, 0.5, 0.7)] and len(curve.points) == 2
    assert 'class="band"' in chart("a", [curve])
    assert 'class="mark"' in chart("a", [curve], mark=0.55)
    assert 'class="mark"' not in chart("a", [curve], mark=5.0)


def test_names_are_escaped_and_empty_charts_are_left_out():
    one = chart("<b>", [Curve("<i>", [(0, 1.0)])])
    assert "<b>&" not in one and "&lt;b&gt;" in one and "<i>" not in one
    assert charts([one, chart("x", [])]).count("<figure") == 1
