"""A score by length and depth of the needle, as a picture and as a table."""

import pathlib

import numpy as np


def heat_map(path: pathlib.Path, cells: list[dict], score: str, title: str, chance: float | None = None) -> None:
    """Writes a PNG of a score from 0 (dark) to 1 (bright) by length and depth.

    Args:
      path: of the picture.
      cells: those of `means`.
      score: 'generated' or 'chosen'.
      title: of the picture; several lines.
      chance: the score of a guess, which is marked on the scale; None: none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({cell['context_length'] for cell in cells})
    depths = sorted({cell['depth_percent'] for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell['depth_percent']), lengths.index(cell['context_length'])] = cell[score]
    width = max(2.5 + 0.8 * len(lengths), 0.6 + 0.075 * max(map(len, title.splitlines())))
    figure = Figure(figsize=(width, 2.2 + 0.45 * len(depths)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Light and dark differ in this map for every reader, colour-blind or in grey print.
    image = axes.imshow(grid, cmap='viridis', vmin=0, vmax=1, aspect='auto')
    axes.set_title(title, fontsize=9)
    axes.set(xlabel='tokens of haystack, question and answer', ylabel='depth of the needle, %')
    axes.set_xticks(range(len(lengths)), [f'{length:,}' for length in lengths])
    axes.set_yticks(range(len(depths)), [f'{depth:g}' for depth in depths])
    for (row, column), value in np.ndenumerate(grid):
        color = 'white' if np.isnan(value) or luminance(image.cmap(value)) < 0.18 else 'black'
        text = '-' if np.isnan(value) else f'{value:.2f}'
        axes.text(column, row, text, ha='center', va='center', fontsize=9, color=color)
    scale = figure.colorbar(image, ax=axes)
    if chance is not None:
        scale.ax.axhline(chance, color='red', linewidth=2)
        scale.set_ticks([0, chance, 1], labels=['0', f'chance {chance:.2f}', '1'])
    figure.savefig(path, dpi=120)


def luminance(color: tuple) -> float:
    """Relative luminance, from 0 to 1, of an sRGB colour (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def table(cells: list[dict], score: str) -> str:
    """A score by depth (rows) and length (columns)."""
    lengths = sorted({cell['context_length'] for cell in cells})
    values = {(cell['depth_percent'], cell['context_length']): cell[score] for cell in cells}
    lines = [f'{score:>10s}' + ''.join(f'{length:>9,d}' for length in lengths)]
    lines += [
        f'{depth:>9g}%' + ''.join(f'{values[depth, length]:9.2f}' for length in lengths)
        for depth in sorted({depth for depth, _ in values})
    ]
    return '\n'.join(lines)
