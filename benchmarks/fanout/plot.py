"""The plot of `python -m benchmarks.fanout`, as SVG: seconds over receivers, as measured and on
paper. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

Point = tuple[int, float, float]  # receivers, seconds measured, seconds on paper
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 44, 52
_COLOURS = ("#b3412f", "#c98a1b", "#1f6f8b", "#4c7a34")


def svg(title: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """A line for each name, with a point for each measurement, and a dotted one for what was
    expected.
    """
    points = [point for some in lines.values() for point in some]
    most = max(receivers for receivers, _, _ in points)
    longest = max(max(measured, paper) for _, measured, paper in points)
    step = _step(longest)
    top = step * math.ceil(longest / step)

    def x(receivers: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * receivers / most

    def y(seconds: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * seconds / top

    def path(places: Iterable[tuple[float, float]], style: str) -> str:
        return (
            f'<polyline points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in places)}" '
            f'fill="none" {style}/>'
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{title}</text>',
        _text(_WIDTH / 2, _HEIGHT - 12, "receivers", "middle"),
        f'<text transform="translate(18 {_HEIGHT / 2}) rotate(-90)" '
        'text-anchor="middle">seconds until the last has all</text>',
    ]
    for number in range(round(top / step) + 1):
        level = y(number * step)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" '
            'stroke="#dddddd"/>'
        )
        parts.append(_text(_LEFT - 8, level + 4, f"{number * step:g}", "end"))
    parts += [
        _text(x(receivers), _HEIGHT - _BOTTOM + 20, str(receivers), "middle")
        for receivers in sorted({p[0] for p in points})
    ]
    for number, (name, some) in enumerate(lines.items()):
        colour, height = _COLOURS[number % len(_COLOURS)], _TOP + 18 * number
        parts.append(
            path(
                [(receivers, paper) for receivers, _, paper in some],
                f'stroke="{colour}" stroke-dasharray="2 4"',
            )
        )
        parts.append(
            path(
                [(receivers, measured) for receivers, measured, _ in some],
                f'stroke="{colour}" stroke-width="2"',
            )
        )
        parts += [
            f'<circle cx="{x(at):.1f}" cy="{y(measured):.1f}" r="4" fill="{colour}"/>'
            for at, measured, _ in some
        ]
        parts.append(
            f'<rect x="{_LEFT + 16}" y="{height}" width="12" height="12" fill="{colour}"/>'
        )
        parts.append(_text(_LEFT + 34, height + 11, name, "start"))
    parts.append(_text(_LEFT + 16, _TOP + 18 * len(lines) + 11, "dotted: on paper", "start"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _step(longest: float) -> float:
    """Between lines across: 1, 2 or 5 times a power of ten, so that there are at least five."""
    power = 10.0 ** math.floor(math.log10(longest / 5))
    return power * max(
        factor for factor in (1, 2, 5) if factor * power * 5 <= longest or factor == 1
    )
