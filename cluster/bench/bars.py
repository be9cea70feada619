"""A bar chart with intervals as SVG, which every browser shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

BAR, GAP, HEIGHT, TOP, LEFT, LEGEND = 26, 28, 260, 44, 46, 20
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A value and its interval."""

    value: float
    low: float
    high: float


def bar_chart(title: str, kinds: Sequence[str], groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Groups of bars side by side, with a line at 1.

    kinds: what the bars of every group are. groups: a label, and a bar for each kind.
    """
    top = 1.1 * max(1.0, *(bar.high for _, bars in groups for bar in bars))
    step = BAR * len(kinds) + GAP
    width = max(LEFT + step * len(groups) + GAP, 420)
    height = TOP + HEIGHT + 30 + LEGEND * len(kinds)
    parts = [_text(LEFT, 22, title, size=15)]
    parts += [_tick(value, top, width) for value in range(int(top) + 1)]
    for index, (label, bars) in enumerate(groups):
        left = LEFT + GAP + index * step
        parts += [_bar(bar, left + BAR * kind, kind, top) for kind, bar in enumerate(bars)]
        parts.append(_text(left + BAR * len(kinds) / 2, TOP + HEIGHT + 18, label, anchor="middle"))
    for index, kind in enumerate(kinds):
        y = TOP + HEIGHT + 34 + LEGEND * index
        parts.append(f'<rect x="{LEFT}" y="{y}" width="12" height="12" fill="{_colour(index)}"/>')
        parts.append(_text(LEFT + 18, y + 11, kind))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *parts])
    return f'{head}font-family="sans-serif">\n{body}\n</svg>\n'


def _height(value: float, top: float) -> float:
    """Where a value is, from above."""
    return TOP + HEIGHT * (1 - value / top)


def _bar(bar: Bar, x: float, kind: int, top: float) -> str:
    y, middle = _height(bar.value, top), x + BAR / 2
    low, high = _height(bar.low, top), _height(bar.high, top)
    return (
        f'<rect x="{x}" y="{y:.1f}" width="{BAR - 3}" height="{TOP + HEIGHT - y:.1f}" fill="{_colour(kind)}">'
        f"<title>{bar.value:.2f} ({bar.low:.2f} to {bar.high:.2f})</title></rect>"
        f'<path d="M{middle} {low:.1f}V{high:.1f}M{middle - 4} {low:.1f}h8M{middle - 4} {high:.1f}h8" '
        'stroke="black"/>'
    )


def _tick(value: int, top: float, width: float) -> str:
    y = _height(value, top)
    colour = "black" if value in (0, 1) else "#ddd"
    line = f'<path d="M{LEFT} {y:.1f}H{width - GAP / 2}" stroke="{colour}"/>'
    return line + _text(LEFT - 8, y + 4, str(value), anchor="end")


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(text)}</text>"


def _colour(kind: int) -> str:
    return COLOURS[kind % len(COLOURS)]
