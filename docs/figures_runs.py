"""Draw the figures of docs/compare.md and docs/metrics.md from the results of real runs.

    python docs/figures_runs.py

Narrow enough for a phone; two panels side by side. Method and baseline differ in colour and in
the width of their lines.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from figures import BLUE, FOLDER, GREY, ORANGE, Drawing  # also makes the scripts importable
from figures_aggregation import Panel

RESULTS = FOLDER.parent / "benchmark" / "results"
sys.path.insert(0, str(RESULTS.parent))

from compare import GROUP, METHODS, PROMPTS, split_rows, t_interval  # noqa: E402

WIDTH, HEIGHT = 196, 124  # of a panel with its labels


def panel(drawing: Drawing, place: int, top: float, x: tuple, y: tuple, title: str) -> Panel:
    """The panel at a place in two columns; y has three ticks, x its ends."""
    left = 34 + WIDTH * (place % 2)
    box = (left, top + HEIGHT * (place // 2), WIDTH - 50, HEIGHT - 56)
    new = Panel(drawing, box, x, y, title)
    new.ticks(list(x), [y[0], (y[0] + y[1]) / 2, y[1]])
    return new


def band(panel: Panel, x: list[float], low: list[float], high: list[float], colour: str) -> None:
    """The area between two curves."""
    edge = [*zip(x, low, strict=True), *reversed([*zip(x, high, strict=True)])]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (panel.at(*point) for point in edge))
    panel.drawing.parts.append(f'<polygon points="{points}" fill="{colour}" fill-opacity="0.25"/>')


def draw_compare(results: dict) -> None:
    """Each method's validation accuracy by rollouts drawn, beside GRPO's."""
    budget = results["steps"] * PROMPTS * GROUP
    x = np.linspace(0, budget, 13)
    curves: dict[str, np.ndarray] = {}  # [seeds, places]
    rows, _ = split_rows(results)
    for method in METHODS:
        runs = [row["curve"] for row in rows if row["method"] == method]
        if runs:
            curves[method] = np.array([np.interp(x, *zip(*run, strict=True)) for run in runs])
    others = [method for method in curves if method != "GRPO"]
    lowest = min(np.floor(10 * values.mean(0).min()) / 10 for values in curves.values())
    drawing = Drawing(400, 70 + HEIGHT * -(-len(others) // 2))
    drawing.text(8, 16, "validation accuracy by rollouts drawn", anchor="start")
    drawing.line([(8, 32), (28, 32)], BLUE, 2.5)
    drawing.text(32, 36, "the method", BLUE, "start")
    drawing.line([(116, 32), (136, 32)], ORANGE, 1)
    drawing.text(140, 36, "GRPO", ORANGE, "start")
    drawing.text(182, 36, "bands: 95%, over seeds", GREY, "start")
    for place, method in enumerate(others):
        axes = panel(drawing, place, 74, (0, budget), (float(lowest), 1.0), method)
        for name, colour, width in (("GRPO", ORANGE, 1.0), (method, BLUE, 2.5)):
            if name not in curves:
                continue
            columns = curves[name].T.tolist()
            if len(columns[0]) > 1:
                low, high = zip(*map(t_interval, columns), strict=True)
                # With few seeds an interval reaches past the axis.
                low, high = np.clip([low, high], lowest, 1).tolist()
                band(axes, x.tolist(), low, high, colour)
            mean = curves[name].mean(0)
            drawing.line([axes.at(*p) for p in zip(x, mean, strict=True)], colour, width)
    drawing.save("compare.svg")


# What tells each sick run from the healthy one.
TELLING = {
    "collapse": ("reward", "entropy", "zero_variance", "length"),
    "entropy blow-up": ("reward", "entropy", "truncated", "length"),
    "stale weights": ("reward", "logp_gap/mean"),
}


def draw_metrics(results: dict) -> None:
    """The metrics that give each sick run away, beside the healthy run's."""
    runs = {run["name"]: run["curves"] for run in results["runs"]}
    rows = sum(-(-len(metrics) // 2) for metrics in TELLING.values())
    drawing = Drawing(400, 50 + HEIGHT * rows + 24 * len(TELLING))
    drawing.line([(8, 14), (28, 14)], BLUE, 2.5)
    drawing.text(32, 18, "the sick run", BLUE, "start")
    drawing.line([(134, 14), (154, 14)], ORANGE, 1)
    drawing.text(158, 18, "the healthy run, by step", ORANGE, "start")
    top = 46
    for name, metrics in TELLING.items():
        drawing.text(8, top, name, anchor="start")
        for place, metric in enumerate(metrics):
            sick, healthy = runs[name][metric], runs["healthy"][metric]
            highest = nice(max(sick + healthy))
            axes = panel(drawing, place, top + 36, (1, len(healthy)), (0, highest), metric)
            for curve, colour, width in ((healthy, ORANGE, 1), (sick, BLUE, 2.5)):
                points = [axes.at(step, value) for step, value in enumerate(curve, 1)]
                drawing.line(points, colour, width)
        top += HEIGHT * -(-len(metrics) // 2) + 24
    drawing.save("metrics.svg")


def nice(value: float) -> float:
    """The lowest of 1, 2, 4 and 10 times a power of ten that is not below a value."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-9)))
    return float(next(power * factor for factor in (1, 2, 4, 10) if power * factor >= value))


def main() -> None:
    """Draws the figures named on the command line, or both."""
    figures = {"compare": ("compare", draw_compare), "metrics": ("sick", draw_metrics)}
    for name in sys.argv[1:] or figures:
        results, draw = figures[name]
        draw(json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
