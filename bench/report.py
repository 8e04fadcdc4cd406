"""Tables and the plot."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from bench.load import Load

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 720, 300, 70, 40, 50, 90
CALLS_COLOUR, P99_COLOUR = "#2563eb", "#dc2626"


class Required(NamedTuple):
    """A target for one figure."""

    what: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def row(self) -> str:
        bound = f"{'≤' if self.at_most else '≥'} {self.bound:g}"
        verdict = "pass"
        if not self.reached:
            short = abs(self.value - self.bound) / self.bound * 100
            verdict = f"short by {short:.0f} %"
        return f"| {self.what} | {self.value:.3g} | {bound} | {verdict} |"


def median(rounds: list[Load]) -> Load:
    """Return the medians of several rounds."""
    return Load(
        statistics.median(each.per_sec for each in rounds),
        statistics.median(each.p99_ms for each in rounds),
    )


def ratio(some: list[Load], others: list[Load]) -> float:
    """Return the median, over rounds, of the ratio of calls per second."""
    pairs = zip(some, others, strict=True)
    return statistics.median(one.per_sec / other.per_sec for one, other in pairs)


def load_row(name: str, rounds: list[Load]) -> str:
    """Return a contestant's row: medians, and the spread of the rate."""
    middle = median(rounds)
    rates = sorted(each.per_sec for each in rounds)
    return (
        f"| {name} | {middle.per_sec:,.0f} | {rates[0]:,.0f} to {rates[-1]:,.0f} "
        f"| {middle.p99_ms:.2f} |"
    )


def plot(found: dict[int, Load], file: Path) -> None:
    """Plot throughput and p99 against live sessions, as SVG."""
    panel = (WIDTH - LEFT - GAP) / 2
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_panel("calls per second", LEFT, panel, CALLS_COLOUR, _rates(found)),
        *_panel("p99, milliseconds", LEFT + panel + GAP - 10, panel, P99_COLOUR, _tails(found)),
        "</svg>",
    ]
    file.write_text("\n".join(body) + "\n")


def _rates(found: dict[int, Load]) -> dict[int, float]:
    return {sessions: each.per_sec for sessions, each in found.items()}


def _tails(found: dict[int, Load]) -> dict[int, float]:
    return {sessions: each.p99_ms for sessions, each in found.items()}


def _panel(
    title: str, left: float, width: float, colour: str, values: dict[int, float]
) -> list[str]:
    top_value = max(values.values()) * 1.25
    base, height = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    low, high = math.log10(min(values)), math.log10(max(values))

    def x(sessions: int) -> float:
        return left + width * (math.log10(sessions) - low) / ((high - low) or 1)

    def y(value: float) -> float:
        return base - height * value / top_value

    parts = [f'<text x="{left}" y="{TOP - 16}" font-weight="bold">{title}</text>']
    for step in range(5):
        value = top_value * step / 4
        label = f"{value:,.0f}" if top_value > 100 else f"{value:.1f}"
        parts.append(
            f'<path d="M{left} {y(value):.1f}H{left + width:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    line = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in values.items())
    parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for sessions, value in values.items():
        parts.append(
            f'<circle cx="{x(sessions):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>'
            f'<text x="{x(sessions):.1f}" y="{base + 18}" text-anchor="middle">'
            f"{_short(sessions)}</text>"
        )
    middle = left + width / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{base + 38}" text-anchor="middle">live sessions</text>'
    )
    return parts


def _short(sessions: int) -> str:
    if sessions >= 1_000_000:
        return f"{sessions // 1_000_000}M"
    return f"{sessions // 1000}k" if sessions >= 1000 else str(sessions)
