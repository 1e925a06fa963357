"""Two kinds of pictures as SVG, without a library: dots over time, and bars of attempts."""

import math
from dataclasses import dataclass, field
from html import escape

WIDTH, LEFT, RIGHT = 860, 150, 20
COLOURS = {
    "ok": "#2a7f4f", "outrun": "#b0a030", "timeout": "#c0392b", "failed": "#c0392b", "cancelled": "#b0a030",
    "skipped": "#888888",
}  # fmt: skip
STYLE = "font-family: sans-serif; font-size: 12px; fill: #333"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    style = f"{STYLE}; font-size: {size}px"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(text)}</text>'


def _document(height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">\n<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>\n'
    )
    return head + "\n".join([_text(LEFT, 20, title, size=14), *parts]) + "\n</svg>\n"


@dataclass
class Scatter:
    """The latency of each save over time, a strip for each contender; latencies on a logarithmic scale."""

    title: str
    unit: str
    phases: tuple[str, ...]
    seconds: float  # of each phase
    strips: list[tuple[str, list[tuple[float, float, bool]]]] = field(default_factory=list)

    def add(self, name: str, dots: list[tuple[float, float, bool]]) -> None:
        """Add the (time, latency, success) of one contender."""
        self.strips.append((name, dots))

    def svg(self) -> str:
        strip, top = 96, 48
        total = self.seconds * len(self.phases)
        low, high = 0.01, 10.0
        parts = []
        height = top + strip * len(self.strips) + 30

        def x_of(at: float) -> float:
            return LEFT + (WIDTH - LEFT - RIGHT) * min(at, total) / total

        for number, phase in enumerate(self.phases):
            x, width = x_of(number * self.seconds), x_of(self.seconds) - LEFT
            fill = "#f4f4f4" if number % 2 == 0 else "#ffffff"
            parts.append(
                f'<rect x="{x:.1f}" y="{top - 14}" width="{width:.1f}" height="{height - top - 10}" fill="{fill}"/>'
            )
            parts.append(_text(x + width / 2, top - 3, phase, anchor="middle"))
        for number, (name, dots) in enumerate(self.strips):
            bottom = top + strip * (number + 1) - 8

            def y_of(seconds: float, bottom: float = bottom) -> float:
                share = math.log(min(max(seconds, low), high) / low) / math.log(high / low)
                return bottom - share * (strip - 22)

            parts.append(_text(10, bottom - strip / 2, name))
            for mark, label in ((0.01, "10 ms"), (0.1, "100 ms"), (1.0, "1 s"), (10.0, "10 s")):
                y = y_of(mark)
                parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
                parts.append(_text(LEFT - 4, y + 4, label, anchor="end", size=9))
            for at, seconds, ok in dots:
                colour = COLOURS["ok" if ok else "failed"]
                parts.append(f'<circle cx="{x_of(at):.1f}" cy="{y_of(seconds):.1f}" r="1.6" fill="{colour}"/>')
        parts.append(_text(LEFT, height - 10, f"{self.unit}: 0 to {total:g}; each dot is a save, drawn when it began"))
        return _document(height, self.title, parts)


@dataclass
class Bars:
    """The attempts of single saves, one group for each policy."""

    title: str
    unit: str
    groups: list[tuple[str, list[tuple[str, float, float, str]], float]] = field(default_factory=list)

    def add(self, name: str, bars: list[tuple[str, float, float, str]], returned: float) -> None:
        """Add the (original, begin, end, outcome) of the attempts of one save, which returned after so long."""
        self.groups.append((name, bars, returned))

    def svg(self) -> str:
        left = 250
        longest = max(returned for _, _, returned in self.groups) * 1.1
        parts, y = [], 40.0

        def x_of(at: float) -> float:
            return left + (WIDTH - left - 110) * at / longest

        for name, bars, returned in self.groups:
            parts.append(_text(10, y + 12, name))
            begun = y
            for original, begin, end, outcome in sorted(bars, key=lambda bar: (bar[1], bar[0])):
                x, width = x_of(begin), max(2.0, x_of(end) - x_of(begin))
                colour = COLOURS.get(outcome, "#888888")
                parts.append(_text(left - 6, y + 12, original, anchor="end"))
                parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="14" fill="{colour}"/>')
                parts.append(_text(x + width + 5, y + 12, f"{outcome}, {1000 * (end - begin):.0f} ms", size=10))
                y += 19
            x = x_of(returned)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{begun - 3:.1f}" y2="{y:.1f}" stroke="#333333" '
                'stroke-dasharray="3 2"/>'
            )
            y += 12
        parts.append(_text(left, y + 12, f"{self.unit}: 0 to {longest:.2f}; the dashed line is the return of the save"))
        return _document(y + 24, self.title, parts)
