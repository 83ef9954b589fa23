"""Curves of several runs: as SVG for a page, and as PNG."""

import dataclasses
import html
import math
import pathlib
from collections.abc import Sequence

# Told apart by readers who are colour-blind, on white and on black (after Okabe and Ito); a page maps them to its themes.
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b8860b', '#3aa0d8', '#7a5cc7', '#808080')
DASHES = ('', '6 3', '2 3', '8 3 2 3')
WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 34, 44  # of the plot's frame


@dataclasses.dataclass(frozen=True)
class Curve:
    """A named series of points; curves of one color belong together.

    Attributes:
      name: for the legend.
      points: (x, y), finite.
      color: number of the color, from 0.
      dash: number of the line's style, from 0.
    """

    name: str
    points: list[tuple[float, float]]
    color: int = 0
    dash: int = 0


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
      file: name of its PNG, without suffix.
      title, x, y: of the chart and its axes.
      curves: what is drawn.
      skips_start: whether the values of the first twentieth of the axis may lie above the frame (a loss falls fast).
      dots: whether points are drawn without the lines between them.
      x_ticks: (x, label) of the axis where x is a place and no number; a label may have two lines. Empty: round numbers.
      is_wide: whether the chart is as wide as two; its lines have no legend, and with y='' no numbers stand beside it.
    """

    file: str
    title: str
    x: str
    y: str
    curves: list[Curve]
    skips_start: bool = False
    dots: bool = False
    x_ticks: tuple[tuple[float, str], ...] = ()
    is_wide: bool = False

    def ranges(self) -> tuple[float, float, float, float]:
        """x and y that the frame spans: (least x, largest x, least y, largest y)."""
        points = [point for curve in self.curves for point in curve.points]
        xs = [x for x, _ in points]
        low, high = min(xs), max(xs)
        skips = self.skips_start and all(len(curve.points) >= 20 for curve in self.curves)
        start = low + (high - low) / 20 if skips else low
        ys = [y for x, y in points if x >= start] or [y for _, y in points]
        if self.x_ticks:
            low, high = min(low, self.x_ticks[0][0]), max(high, self.x_ticks[-1][0])
        if self.dots:  # none is cut by the frame
            low, high = low - (high - low) * 0.04, high + (high - low) * 0.04
        return low, high if high > low else low + 1, *_widened(min(ys), max(ys))


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between low and high, at most `most`."""
    size = (high - low) / most
    scale = 10 ** math.floor(math.log10(size))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= size * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A number for an axis: 2M, 15k, 0.03."""
    for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if abs(value) >= size:
            return f'{value / (1e3 if letter == "k" else size):.4g}{letter}'
    return f'{value:.4g}'


def svg(chart: Chart) -> str:
    """The chart as an SVG element whose colors are CSS variables: --ink, --grid and --c0 to --c7."""
    x_low, x_high, y_low, y_high = chart.ranges()
    full = 2 * WIDTH if chart.is_wide else WIDTH
    width, height = full - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x, y):
        return LEFT + (x - x_low) / (x_high - x_low) * width, TOP + (y_high - y) / (y_high - y_low) * height

    parts = [
        f'<svg viewBox="0 0 {full} {HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">',
        f'<clipPath id="{chart.file}"><rect x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/></clipPath>',
        f'<text x="{LEFT}" y="18" class="title">{html.escape(chart.title)}</text>',
    ]
    for tick in ticks(y_low, y_high) if chart.y else []:
        _, y = at(x_low, tick)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick, text in chart.x_ticks or [(tick, label(tick)) for tick in ticks(x_low, x_high)]:
        x, _ = at(tick, y_low)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + height}" class="grid"/>')
        # What is wider than a number must not reach over the edge.
        near_edge = len(text) > 6 and not LEFT + 40 < x < LEFT + width - 40
        anchor = ('start' if x < full / 2 else 'end') if near_edge else 'middle'
        for row, line in enumerate(text.splitlines()):
            place = f'x="{x:.1f}" y="{TOP + height + 16 + 14 * row}" text-anchor="{anchor}"'
            parts.append(f'<text {place}>{html.escape(line)}</text>')
    parts.append(f'<text x="{LEFT + width}" y="{HEIGHT - 8}" text-anchor="end">{html.escape(chart.x)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">{html.escape(chart.y)}</text>')
    for curve in chart.curves:
        if chart.dots:
            for point in curve.points:
                x, y = at(*point)
                fill = f'fill="var(--c{curve.color % len(COLORS)})"'
                name = f'<title>{html.escape(curve.name)}</title>'
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {fill}>{name}</circle>')
            continue
        points = ' '.join('{:.1f},{:.1f}'.format(*at(*point)) for point in _thinned(curve.points))
        color, dash = curve.color % len(COLORS), DASHES[curve.dash % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ''
        parts.append(
            f'<polyline points="{points}" clip-path="url(#{chart.file})" class="curve" stroke="var(--c{color})"{style}>'
            f'<title>{html.escape(curve.name)}</title></polyline>'
        )
        if len(curve.points) == 1:
            x, y = at(*curve.points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--c{color})"/>')
    return '\n'.join([*parts, '</svg>'])


def _thinned(points: Sequence, most: int = 600) -> list:
    """At most `most` points, each the mean of its neighbours, so that a page of long runs stays small."""
    size = -(-len(points) // most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def write_png(path: pathlib.Path, chart: Chart) -> None:
    """Writes the chart as PNG. Raises ImportError where matplotlib is missing (pip install -e .[eval])."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14 if chart.is_wide else 7, 4.2), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = ('-', '--', ':', '-.')
    for curve in chart.curves:
        xs, ys = zip(*_thinned(curve.points))
        color, style = COLORS[curve.color % len(COLORS)], styles[curve.dash % len(styles)]
        marker = 'o' if len(xs) <= 12 or chart.dots else None  # few points are measurements
        style = '' if chart.dots else style
        axes.plot(xs, ys, color=color, linestyle=style, marker=marker, markersize=4, linewidth=1.4, label=curve.name)
    x_low, x_high, y_low, y_high = chart.ranges()
    axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title, xlim=(x_low, x_high), ylim=(y_low, y_high))
    x_ticks = chart.x_ticks or [(tick, label(tick)) for tick in ticks(x_low, x_high)]
    axes.set_xticks([x for x, _ in x_ticks], [text for _, text in x_ticks])
    axes.grid(alpha=0.3)
    if not chart.y:
        axes.set_yticks([])
    if len(chart.curves) <= 24 and not (chart.dots or chart.is_wide):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def write_pngs(directory: pathlib.Path, drawn: Sequence[Chart]) -> None:
    """Writes every chart as FILE.png; without matplotlib none is written, which is printed."""
    try:
        for chart in drawn:
            write_png(directory / f'{chart.file}.png', chart)
    except ImportError:
        print('note: no PNG is written, because matplotlib is not installed (pip install -e .[eval])')
