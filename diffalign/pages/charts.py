"""Curves of figures over steps, as SVG within a page: no script, no library, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffalign.pages.environment import part
from diffalign.pages.parts import Html

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 30
_MOST_POINTS = 400
"""Of a curve; of longer ones every so-many-th is left out but for the extremes."""
COLOURS = 6
"""How many curves of a chart have a colour of their own."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One figure over steps."""

    name: str
    points: Sequence[Point]
    """Step and value, by rising step; values that are not finite leave a gap."""
    band: Sequence[tuple[float, float, float]] = ()
    """Step, lower and upper end of an interval around the curve."""


def chart(title: str, curves: Sequence[Curve], *, mark: float | None = None) -> Html:
    """A chart with its axes and a legend; nothing where no curve has a finite value.

    Args:
        title: above it.
        curves: at least one; those after the sixth share their colours with the first ones.
        mark: a value that gets a dashed line, such as that of chance, where it is in sight.
    """
    drawn = [curve for curve in curves if any(math.isfinite(y) for _, y in curve.points)]
    if not drawn:
        return Html("")
    finite = [(x, y) for c in drawn for x, y in c.points if math.isfinite(y)]
    bands = [(x, y) for c in drawn for x, *ends in c.band for y in ends if math.isfinite(y)]
    first, last = min(x for x, _ in finite), max(x for x, _ in finite)
    low, high = _range([y for _, y in finite + bands])
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return round(_LEFT + inner * (step - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low), 1)

    return part(
        "chart",
        {
            "title": title,
            "width": _WIDTH,
            "height": _HEIGHT,
            "left": _LEFT,
            "right": _WIDTH - _RIGHT,
            "bottom": _HEIGHT - _BOTTOM,
            "rows": [(y(tick), said) for tick, said in zip(ticks, _labels(ticks), strict=True)],
            "columns": [(x(t), f"{t:,.0f}") for t in _ticks(first, last, 5) if first <= t <= last],
            "mark": y(mark) if mark is not None and low <= mark <= high else None,
            "curves": [
                {
                    "name": curve.name,
                    "colour": number % COLOURS,
                    "lines": [
                        " ".join(f"{x(a)},{y(b)}" for a, b in line)
                        for line in _lines(_thinned(curve.points))
                    ],
                    "dots": [
                        (x(a), y(b), f"{curve.name}, step {a:,.0f}: {b:.5g}")
                        for a, b in _thinned(curve.points)
                        if math.isfinite(b)
                    ],
                    "band": _outline([(x(a), y(b), y(c)) for a, b, c in curve.band]),
                    "last": _spelt([b for _, b in curve.points if math.isfinite(b)][-1]),
                }
                for number, curve in enumerate(drawn)
            ],
        },
        of="charts.html",
    )


def charts(items: Sequence[Html]) -> Html:
    """Charts side by side, where there is room; nothing where there are none."""
    drawn = [item for item in items if item]
    return part("charts", drawn, of="charts.html") if drawn else Html("")


def curve_of(rows: Sequence[Mapping[str, float]], name: str, label: str = "") -> Curve:
    """A figure of `metrics.jsonl` as a curve, with the interval `NAME_low` to `NAME_high`, if any.

    Args:
        rows: of the file; those without the figure are passed over.
        name: of the figure.
        label: in the legend; empty takes the name.
    """
    low, high = f"{name}_low", f"{name}_high"
    return Curve(
        label or name,
        [(row["step"], row[name]) for row in rows if name in row],
        [(row["step"], row[low], row[high]) for row in rows if low in row and high in row],
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' ends, apart from each other."""
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    return low, high


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose a range, some `count` steps apart."""
    if low == high:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * by for by in (1, 2, 2.5, 5, 10) if power * by >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Ticks with as many digits as tell them apart."""
    if len(ticks) < 2:
        return [_spelt(tick) for tick in ticks]
    most, step = max(map(abs, ticks)), ticks[1] - ticks[0]
    digits = max(2, math.ceil(math.log10(most / step) + 1e-9) + 2)
    return [f"{tick:.{digits}g}" if abs(tick) > step / 1e6 else "0" for tick in ticks]


def _spelt(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}"
    return f"{value:.4g}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most so many points; of each stretch the lowest and the highest stay."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (_MOST_POINTS / 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part_of = [p for p in points[start : start + stretch] if math.isfinite(p[1])]
        if part_of:
            ends = {min(part_of, key=lambda p: p[1]), max(part_of, key=lambda p: p[1])}
            kept += sorted(ends)
    return kept


def _lines(points: Sequence[Point]) -> list[list[Point]]:
    """The stretches of a curve between values that are not finite."""
    lines: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            lines[-1].append(point)
        elif lines[-1]:
            lines.append([])
    return [line for line in lines if line]


def _outline(band: Sequence[tuple[float, float, float]]) -> str:
    upper = [f"{x},{high}" for x, _, high in band]
    lower = [f"{x},{low}" for x, low, _ in reversed(band)]
    return " ".join([*upper, *lower])
