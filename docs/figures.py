"""Draw the figures of docs/ep_grpo.md, docs/erpo.md and docs/gtpo.md with the scripts' functions.

    python docs/figures.py

Plain SVG on a transparent ground, in colours that can be read on white and on black.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from ep_grpo import entropy_buckets  # noqa: E402
from erpo import entropy_gate, position_buckets  # noqa: E402
from gtpo import shaped_rewards  # noqa: E402

GREY, BLUE, ORANGE = "#7d8590", "#3b82f6", "#e0752d"

# An answer of the tiny model to 4*6+(3-3)+7, with a slip, and its entropies in nats.
TOKENS = [*"Easy! 4*6=24; 3-3=1; 1+24=25; 25+7=32; \\boxed{32}", "end"]
SURPRISES = {0: 1.27, 6: 0.01, 10: 0.19, 11: 0.7, 18: 0.68, 23: 0.01, 27: 0.91, 35: 0.61, 36: 0.09}
ENTROPY = torch.tensor([[[SURPRISES.get(t, 0.0) for t in range(len(TOKENS))]]])
MASK = torch.ones_like(ENTROPY, dtype=torch.bool)


class Drawing:
    """An SVG under construction; y grows downwards."""

    def __init__(self, width: int, height: int) -> None:
        self.size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, colour: str, solid: float = 1):
        at = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {at} fill="{colour}" fill-opacity="{solid}"/>')

    def text(self, x: float, y: float, words: str, colour: str = GREY, anchor: str = "middle"):
        at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text {at} fill="{colour}">{escape(words)}</text>')

    def line(self, points: list[tuple[float, float]], colour: str = GREY, width: float = 1):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        stroke = f'stroke="{colour}" stroke-width="{width}"'
        self.parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')

    def save(self, name: str) -> None:
        font = 'font-family="ui-monospace, monospace" font-size="12"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {self.size} {font}>'
        (FOLDER / name).write_text("\n".join([head, *self.parts, "</svg>", ""]), encoding="utf-8")


def draw_tokens(name: str, title: str, heights: list[float], bucket: list[int], strip: str) -> None:
    """A bar for each token of the answer, and the bucket of each in a strip below."""
    left, step, base, tall = 20, 13.6, 150, 100
    drawing = Drawing(720, 226)
    drawing.text(left, 20, title, anchor="start")
    drawing.line([(left, base), (left + step * len(TOKENS), base)])
    used = sorted(set(bucket))
    for t, height in enumerate(heights):
        x = left + t * step
        colour = (BLUE, ORANGE)[used.index(bucket[t]) % 2]
        drawing.box(x + 2, base - tall * height, step - 4, tall * height, colour)
        drawing.box(x, base + 24, step, 18, colour, 0.35)
        drawing.text(x + step / 2, base + 16, {"end": "¶"}.get(TOKENS[t], TOKENS[t]))
    for number in used:
        of_bucket = [t for t, b in enumerate(bucket) if b == number]
        middle = left + step * (of_bucket[0] + of_bucket[-1] + 1) / 2
        drawing.text(middle, base + 37, str(number))
    drawing.text(left, base + 62, strip, anchor="start")
    drawing.save(name)


def draw_ep_grpo() -> None:
    draw_tokens(
        "ep_grpo.svg",
        "entropy of the distribution that each token was drawn from",
        (ENTROPY / ENTROPY.max())[0, 0].tolist(),
        entropy_buckets(ENTROPY, MASK, 10)[0, 0].tolist(),
        "bucket: tenth of the answer's entropy that is spent, up to and with the token",
    )


def draw_erpo() -> None:
    draw_tokens(
        "erpo.svg",
        "gate: 1/2 at mean entropy, towards 1 above",
        entropy_gate(ENTROPY, MASK)[0, 0].tolist(),
        position_buckets(MASK, 10)[0, 0].tolist(),
        "bucket: tenth of the answer's tokens, the same for every answer of a like length",
    )


def draw_gtpo() -> None:
    """The shaped reward of one of four right and of one of four wrong answers at a position,
    against its own entropy; that of the others is 1 nat."""
    drawing = Drawing(720, 300)
    left, right, top, bottom, largest = 60, 700, 40, 250, 4.0

    def place(entropy: float, reward: float) -> tuple[float, float]:
        across = left + (right - left) * entropy / largest
        return across, top + (bottom - top) * (1.5 - reward) / 3

    for reward in (-1, 0, 1):
        drawing.line([place(0, reward), place(largest, reward)], width=0.5)
        drawing.text(left - 8, place(0, reward)[1] + 4, str(reward), anchor="end")
    for entropy in range(int(largest) + 1):
        drawing.text(place(entropy, 0)[0], bottom + 16, str(entropy))
    correct = torch.tensor([[True] * 4 + [False] * 4])
    mask = torch.ones(1, 8, 1, dtype=torch.bool)
    grid = torch.linspace(0.02, largest, 200)
    for rollout, colour, label in ((0, BLUE, "right answer"), (4, ORANGE, "wrong answer")):
        curve = []
        for value in grid:
            entropy = torch.ones(1, 8, 1)
            entropy[0, rollout] = value
            shaped = sum(shaped_rewards(correct, entropy, mask, 1.0, 0.1))
            curve.append(place(float(value), float(shaped[0, rollout, 0])))
        drawing.line(curve, colour, 2.5)
        drawing.text(right, curve[-1][1] - 10, label, colour, "end")
    drawing.text(left - 40, 20, "shaped reward of a token", anchor="start")
    drawing.text(
        right, bottom + 36, "its entropy (nats); that of the other answers is 1", anchor="end"
    )
    drawing.save("gtpo.svg")


if __name__ == "__main__":
    draw_ep_grpo()
    draw_erpo()
    draw_gtpo()
