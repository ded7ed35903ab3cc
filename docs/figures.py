"""Draw the figure of docs/ep_grpo.md and docs/erpo.md with the scripts' own functions.

    python docs/figures.py

The benchmarks draw the figures of other pages. Plain SVG with a transparent background, in colours
that are legible on white and on black.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from ep_grpo import entropy_buckets  # noqa: E402
from erpo import position_buckets  # noqa: E402

GREY, BLUE, ORANGE = "#7d8590", "#3b82f6", "#e0752d"

# A response of the tiny model to 4*6+(3-3)+7 that contains an error, and its entropies in nats.
TOKENS = [*"Easy! 4*6=24; 3-3=1; 1+24=25; 25+7=32; \\boxed{32}", "¶"]
SURPRISES = {0: 1.27, 6: 0.01, 10: 0.19, 11: 0.7, 18: 0.68, 23: 0.01, 27: 0.91, 35: 0.61, 36: 0.09}

WIDTH, HEIGHT = 216, 124  # of a panel with labels; two panels fit next to each other on a phone
# The metrics that distinguish each failed run from the healthy one.
TELLING = (
    *("collapse: reward", "collapse: entropy", "collapse: zero_variance", "collapse: length"),
    *("entropy blow-up: reward", "entropy blow-up: entropy"),
    *("entropy blow-up: truncated", "entropy blow-up: length"),
    *("stale weights: reward", "stale weights: logp_gap/mean"),
)


class Drawing:
    """An SVG under construction; y grows downwards."""

    def __init__(self, width: int, height: int) -> None:
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        font = 'font-family="ui-monospace, monospace" font-size="12"'
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>']

    def box(self, x: float, y: float, width: float, height: float, colour: str, solid: float = 1):
        at = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {at} fill="{colour}" fill-opacity="{solid}"/>')

    def text(self, x: float, y: float, words: str, colour: str = GREY, anchor: str = "middle"):
        at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text {at} fill="{colour}">{escape(words)}</text>')

    def line(
        self, points: Iterable[Sequence], colour: str = GREY, width: float = 1, solid: float = 0
    ) -> None:
        """A line, or the area that it encloses; solid: the fill's opacity, 0 to 1."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        look = f'stroke="{colour}" stroke-width="{width}" fill="{colour}" fill-opacity="{solid}"'
        self.parts.append(f'<polyline points="{path}" {look}/>')

    def save(self, path: str | Path) -> None:
        text = "\n".join([*self.parts, "</svg>", ""])
        (FOLDER / path).write_text(text, encoding="utf-8")


def draw_buckets() -> None:
    """The entropy of each token of a response, and its bucket in both methods."""
    entropy = torch.tensor([[[SURPRISES.get(t, 0.0) for t in range(len(TOKENS))]]])
    mask = torch.ones_like(entropy, dtype=torch.bool)
    left, step, base = 20, 13.6, 140
    drawing = Drawing(720, 246)
    drawing.text(left, 20, "entropy of the policy at each token", anchor="start")
    for t, value in enumerate(entropy[0, 0].tolist()):
        drawing.box(left + step * t + 2, base - 80 * value, step - 4, 80 * value, GREY)
        drawing.text(left + step * (t + 0.5), base + 16, TOKENS[t])

    for y, buckets, words in (
        (base + 24, entropy_buckets(entropy, mask, 10), "EP-GRPO: tenths of summed entropy"),
        (base + 66, position_buckets(mask, 10), "ERPO: tenths of the length"),
    ):
        x = left
        numbers, counts = buckets[0, 0].unique_consecutive(return_counts=True)
        for place, (number, count) in enumerate(zip(numbers, counts, strict=True)):
            width = step * int(count)
            drawing.box(x, y, width, 18, (BLUE, ORANGE)[place % 2], 0.35)
            drawing.text(x + width / 2, y + 13, f"{number}")
            x += width
        drawing.text(left, y + 32, words, anchor="start")
    drawing.save("ep_grpo.svg")


def put(axes: tuple, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Drawing coordinates of values, [points, 2]. axes: ticks on x, ticks on y, left, top."""
    across, up, left, top = axes
    x = np.interp(x, (across[0], across[-1]), (left, left + WIDTH - 60))
    y = np.interp(y, (up[0], up[-1]), (top + HEIGHT - 56, top))
    return np.stack(np.broadcast_arrays(x, y), axis=-1)


def draw_panels(name: str, title: str, thick: str, thin: str, panels: Sequence[tuple]) -> None:
    """Panels of two curves. Each panel: title, ticks on x, ticks on y, x, and the y of the thick
    and of the thin curve, both [runs, points]. A line shows the mean, a shade the range."""
    drawing = Drawing(2 * WIDTH + 32, 76 + HEIGHT * -(-len(panels) // 2))
    drawing.text(8, 16, title, anchor="start")

    for left, colour, width, words in ((8, BLUE, 2.5, thick), (150, ORANGE, 1, thin)):
        drawing.line([(left, 32), (left + 20, 32)], colour, width)
        drawing.text(left + 26, 36, words, colour, "start")

    for place, (of_panel, across, up, x, *curves) in enumerate(panels):
        left, top = 38 + WIDTH * (place % 2), 76 + HEIGHT * (place // 2)
        at = partial(put, (across, up, left, top))
        drawing.text(left, top - 14, of_panel, anchor="start")
        for value in across:
            drawing.text(*np.add(at(value, up[0]), (0, 16)), f"{value:g}")
        for value in up:
            drawing.line(at(across, value), width=0.4)
            drawing.text(*np.add(at(across[0], value), (-8, 4)), f"{value:g}", anchor="end")
        for y, colour, width in zip(curves, (BLUE, ORANGE), (2.5, 1), strict=True):
            drawing.line([*at(x, y.min(0)), *at(x, y.max(0))[::-1]], colour, 0, 0.25)
            drawing.line(at(x, y.mean(0)), colour, width)
    drawing.save(name)


def draw_compare(name: str, runs: dict[str, list]) -> None:
    """Each method's accuracy by number of rollouts, next to GRPO's.
    runs: for each method, including GRPO, and each seed, its evaluations (rollouts, accuracy)."""
    x = np.linspace(0, max(rollouts for run in runs["GRPO"] for rollouts, _ in run), 13)
    curves = {
        method: np.array([np.interp(x, *zip(*run, strict=True)) for run in seeds])
        for method, seeds in runs.items()
    }
    low = np.floor(10 * min(values.min() for values in curves.values())) / 10
    baseline = curves.pop("GRPO")
    ticks = (x[0], x[-1]), (low, (low + 1) / 2, 1)
    panels = [(method, *ticks, x, own, baseline) for method, own in curves.items()]
    title = "validation accuracy by rollouts drawn; shaded: all seeds"
    draw_panels(name, title, "the method", "GRPO", panels)


def draw_metrics(runs: dict[str, dict[str, list[float]]]) -> None:
    """The metrics that reveal each failed run, next to those of the run named healthy.
    runs: for each run, each metric's value at every step."""
    panels = []
    for title in TELLING:
        name, metric = title.split(": ")
        curves = [np.array([runs[run][metric]]) for run in (name, "healthy")]
        top = float(f"{1.2 * max(curve.max() for curve in curves):.0e}")
        steps = np.arange(1, 1 + curves[1].size)
        panels.append((title, (1, steps[-1]), (0, top / 2, top), steps, *curves))
    draw_panels("metrics.svg", "metrics by step", "the failed run", "the healthy run", panels)


def draw_credit(example: dict) -> None:
    """The tokens of one rollout, shaded by the truth and by each method's credit.
    example: the problem, the text of each token, and each row's value of every token."""
    pieces, credits = example["pieces"], example["credit"]
    left, step, tall, top = 190, 12.4, 20, 62
    right = left + step * len(pieces)
    drawing = Drawing(int(right) + 12, top + tall * len(credits) + 34)
    drawing.text(left, 20, example["problem"], anchor="start")
    for t, piece in enumerate(pieces):
        blank = "␣" if piece else "¶"
        drawing.text(left + step * (t + 0.5), top - 8, piece.strip() or blank)

    for row, (name, credit) in enumerate(credits.items()):
        y = top + tall * row
        drawing.text(left - 10, y + 14, name, anchor="end")
        drawing.line([(left, y + tall - 2), (right, y + tall - 2)], GREY, 0.3)
        largest = max(map(abs, credit)) or 1.0
        for t, value in enumerate(credit):
            opacity = abs(value) / largest
            if opacity >= 0.01:
                colour = ORANGE if value < 0 else BLUE
                x = left + step * t + 0.5
                drawing.box(x, y, step - 1, tall - 3, colour, round(opacity, 2))

    legend = top + tall * len(credits) + 12
    for x, colour, words in ((left, BLUE, "for the token"), (left + 150, ORANGE, "against it")):
        drawing.box(x, legend, step, 12, colour)
        drawing.text(x + step + 6, legend + 10, words, anchor="start")
    drawing.save("credit.svg")


if __name__ == "__main__":
    draw_buckets()
