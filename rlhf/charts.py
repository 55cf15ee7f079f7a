"""Charts as inline SVG: lines with a band, stacked bars. Colours are CSS variables (--c1 ...) of the page.

n steps; a value is a float or None (not measured at that step: the line has a gap there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 20, 38
MAX_POINTS = 300
MAX_BARS = 120
MARKER_POINTS = 12  # up to so many points each one gets a dot
SAME = 1e-6  # values whose spread is less than this part of them are drawn as equal: no tick could tell them apart
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Values = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One named curve."""

    name: str
    values: Values  # [n]
    color: int = 1  # CSS variable --c<color>
    band: Values | None = None  # [n]: drawn as value +- band


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to pixels; `ticks` are round numbers inside [low, high]."""

    low: float
    high: float
    start: float  # pixel of low
    end: float  # pixel of high
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The pixel of a value, held inside the axis."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0), 1) * (self.end - self.start)


def round_ticks(low: float, high: float, count: int, *, integers: bool = False) -> tuple[float, ...]:
    """About `count` multiples of 1, 2, 2.5 or 5 times a power of ten that lie in [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    if integers:
        steps = [step for step in steps if step >= 1 and step == int(step)] or [1.0]
    step = next((step for step in steps if step >= raw * 0.999), steps[-1])
    return tuple(round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits: 0.1235, 12,346, 1.2e-6."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def thin(values: Values, limit: int) -> list[float | None]:
    """At most `limit` values: means of equal runs of neighbours."""
    run = math.ceil(len(values) / limit) if values else 1
    if run == 1:
        return list(values)
    known = [[v for v in values[i : i + run] if v is not None] for i in range(0, len(values), run)]
    return [fmean(part) if part else None for part in known]


def running_mean(values: Values, window: int) -> list[float | None]:
    """Mean of the known values among the `window` around each step; None stays None."""
    means: list[float | None] = []
    for i, value in enumerate(values):
        known = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if v is not None]
        means.append(fmean(known) if known and value is not None else None)
    return means


def line_chart(steps: Sequence[int], series: Sequence[Series], *, window: int = 1) -> str:
    """Curves over steps; with `window` > 1 the measured values are thin and their running mean is thick.

    Returns "" when no series has a value.
    """
    edges = [
        value + sign * (one.band[i] or 0 if one.band else 0)
        for one in series
        for i, value in enumerate(one.values)
        if value is not None
        for sign in (-1, 1)
    ]
    if not edges:
        return ""
    smooth = [running_mean(one.values, window) for one in series]
    spans = _spans(steps, MAX_POINTS)
    steps = [last for _, last in spans]
    x, y = _step_axis(steps), _value_axis(min(edges), max(edges))
    parts = [_frame(x, y)]
    for one, mean in zip(series, smooth):
        values, band = thin(one.values, MAX_POINTS), thin(one.band, MAX_POINTS) if one.band else None
        if band:
            parts.append(_band(x, y, steps, values, band, one.color))
        parts.append(_line(x, y, steps, values, one.color, "thin" if window > 1 else "line"))
        if window > 1:
            parts.append(_line(x, y, steps, thin(mean, MAX_POINTS), one.color, "line"))
    bands = [thin(one.band, MAX_POINTS) if one.band else None for one in series]
    names = [(one.name, thin(one.values, MAX_POINTS), band) for one, band in zip(series, bands)]
    parts.append(_hover(x, spans, names))
    return _svg("".join(parts), ", ".join(one.name for one in series))


def stacked_bars(steps: Sequence[int], layers: Sequence[Series], *, unit: str) -> str:
    """One bar a step, a layer on the other. Bars beyond four times the median are cut, with their total above them."""
    totals = [sum(one.values[i] or 0 for one in layers) for i in range(len(steps))]
    if not any(totals):
        return ""
    spans = _spans(steps, MAX_BARS)
    steps, totals = [last for _, last in spans], [total or 0 for total in thin(totals, MAX_BARS)]
    thinned = [thin(one.values, MAX_BARS) for one in layers]
    top = min(max(totals), 4 * median(totals)) or max(totals)
    x, y = _step_axis(steps, room=0.6 * (steps[1] - steps[0] if len(steps) > 1 else 1)), _value_axis(0, top)
    width = min(x.at(steps[1]) - x.at(steps[0]), 40) if len(steps) > 1 else 40
    gap = 1 if width > 4 else 0
    parts = [_frame(x, y)]
    for i, step in enumerate(steps):
        base = 0.0
        for one, values in zip(layers, thinned):
            value = values[i] or 0
            bottom, upper = y.at(base), y.at(base + value)
            if bottom - upper > 0.05:
                parts.append(
                    f'<rect x="{x.at(step) - width / 2:.1f}" y="{upper:.1f}" width="{width - gap:.1f}" '
                    f'height="{bottom - upper:.1f}" fill="var(--c{one.color})"/>'
                )
            base += value
        if totals[i] > y.high:
            side = "start" if x.at(step) < WIDTH / 2 else "end"
            parts.append(
                f'<text x="{x.at(step) - width / 2:.1f}" y="{TOP - 6}" text-anchor="{side}" class="tick">'
                f"{number(totals[i])} {escape(unit)}</text>"
            )
    parts.append(_hover(x, spans, [(one.name, values, None) for one, values in zip(layers, thinned)]))
    return _svg("".join(parts), ", ".join(one.name for one in layers))


def _step_axis(steps: Sequence[int], room: float = 0.0) -> Axis:
    low, high = steps[0] - room, steps[-1] + room
    if low == high:
        low, high = low - 1, high + 1
    ticks = round_ticks(steps[0], max(steps[-1], steps[0] + 1), 6, integers=True)
    ticks = tuple(tick for tick in ticks if steps[0] <= tick <= steps[-1])
    if steps[0] == 1 and 1 not in ticks:
        ticks = (1, *(tick for tick in ticks if tick - 1 > (high - low) / 20))
    return Axis(low=low, high=high, start=LEFT, end=WIDTH - RIGHT, ticks=ticks)


def _value_axis(low: float, high: float) -> Axis:
    if 0 < low <= 0.6 * high:
        low = 0.0
    if high - low <= SAME * max(abs(low), abs(high)):
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    pad = (high - low) * 0.06
    low, high = (low if low == 0 else low - pad), high + pad
    return Axis(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP, ticks=round_ticks(low, high, 4))


def _frame(x: Axis, y: Axis) -> str:
    """Grid, ticks and the axes' labels; very small or large values share one power of ten, written above the axis."""
    largest = max(abs(y.low), abs(y.high))
    exponent = math.floor(math.log10(largest))
    exponent = exponent if exponent < -1 or exponent > 4 else 0
    gaps = [b - a for a, b in zip(y.ticks, y.ticks[1:])] or [largest]
    digits = max(0, -math.floor(math.log10(min(gaps) / 10**exponent) + 1e-9))
    digits += round(min(gaps) / 10**exponent * 10**digits, 6) % 1 != 0  # a step of 2.5 needs one digit more
    parts = []
    for tick in y.ticks:
        text = f"{tick / 10**exponent:,.{digits}f}".replace("-", "−")
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}" class="grid"/>'
            f'<text x="{LEFT - 7}" y="{y.at(tick) + 4:.1f}" text-anchor="end" class="tick">{text}</text>'
        )
    for tick in x.ticks:
        parts.append(
            f'<text x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" class="tick">{tick:,.0f}</text>'
        )
    if exponent:
        power = str(exponent).translate(SUPERSCRIPTS)
        parts.append(f'<text x="{LEFT - 7}" y="{TOP - 8}" text-anchor="end" class="tick">×10{power}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" class="tick">step</text>')
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.start}" y2="{y.start}" class="axis"/>')
    return "".join(parts)


def _runs(values: Values) -> list[range]:
    """Index ranges without gaps."""
    runs, start = [], None
    for i, value in enumerate([*values, None]):
        if value is not None and start is None:
            start = i
        elif value is None and start is not None:
            runs.append(range(start, i))
            start = None
    return runs


def _line(x: Axis, y: Axis, steps: Sequence[int], values: Values, color: int, css: str) -> str:
    parts = []
    for run in _runs(values):
        points = [(x.at(steps[i]), y.at(values[i])) for i in run]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="{css}" stroke="var(--c{color})" points="{path}"/>')
        if css == "line" and (len(run) == 1 or len(values) <= MARKER_POINTS):
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="var(--c{color})"/>' for a, b in points]
    return "".join(parts)


def _band(x: Axis, y: Axis, steps: Sequence[int], values: Values, band: Values, color: int) -> str:
    parts = []
    for run in _runs(values):
        upper = [f"{x.at(steps[i]):.1f},{y.at(values[i] + (band[i] or 0)):.1f}" for i in run]
        lower = [f"{x.at(steps[i]):.1f},{y.at(values[i] - (band[i] or 0)):.1f}" for i in reversed(run)]
        parts.append(f'<polygon class="band" fill="var(--c{color})" points="{" ".join(upper + lower)}"/>')
    return "".join(parts)


def _hover(x: Axis, spans: Sequence[tuple[int, int]], names: Sequence[tuple[str, Values, Values | None]]) -> str:
    """An unseen column over every point: it lights up and says its values."""
    parts = []
    width = (WIDTH - LEFT - RIGHT) / max(len(spans) - 1, 1)
    for i, (first, last) in enumerate(spans):
        lines = [f"step {last:,}" if first == last else f"mean of steps {first:,} to {last:,}"]
        for name, values, band in names:
            spread = f" ± {number(band[i])}" if band and band[i] is not None else ""
            lines.append(f"{name} {number(values[i])}{spread}")
        left = max(x.at(last) - width / 2, LEFT)
        right = min(x.at(last) + width / 2, WIDTH - RIGHT)
        parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(chr(10).join(lines))}</title></rect>"
        )
    return "".join(parts)


def _spans(steps: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """First and last step of each of the points that `thin` leaves; a point is drawn at its last step."""
    run = math.ceil(len(steps) / limit)
    return [(steps[i], steps[min(i + run, len(steps)) - 1]) for i in range(0, len(steps), run)]


def _svg(body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} by step">{body}</svg>'
