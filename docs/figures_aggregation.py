"""Draw the figures of docs/holderpo.md, docs/arca.md and docs/reft.md with the scripts' functions.

python docs/figures_aggregation.py                     # from docs/arca.json and docs/reft.json
python docs/figures_aggregation.py --arca runs/A --reft runs/B     # from two runs, anew
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from figures import BLUE, FOLDER, GREY, ORANGE, Drawing  # also makes the scripts importable

import arca
import common
import models
from holderpo import anneal_p, gradient_weights

GREEN, PURPLE, RED = "#2f9e60", "#a866c9", "#d0504a"


class Panel:
    """Axes in a drawing."""

    def __init__(
        self,
        drawing: Drawing,
        box: tuple[float, float, float, float],  # left, top, width, height
        x: tuple[float, float],
        y: tuple[float, float],
        title: str = "",
    ) -> None:
        self.drawing, self.box, self.x, self.y = drawing, box, x, y
        left, top, width, height = box
        drawing.line([(left, top), (left, top + height), (left + width, top + height)])
        drawing.text(left, top - 14, title, anchor="start")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies in the drawing."""
        left, top, width, height = self.box
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        down = (self.y[1] - y) / (self.y[1] - self.y[0])
        return left + across * width, top + down * height

    def ticks(self, x: list[float], y: list[float], label: str = "") -> None:
        left, top, width, height = self.box
        for value in x:
            self.drawing.text(self.at(value, 0)[0], top + height + 16, f"{value:g}")
        for value in y:
            self.drawing.line([self.at(self.x[0], value), self.at(self.x[1], value)], width=0.4)
            self.drawing.text(left - 8, self.at(0, value)[1] + 4, f"{value:g}", anchor="end")
        self.drawing.text(left + width / 2, top + height + 36, label)

    def curve(self, x: list[float], y: list[float], colour: str) -> None:
        self.drawing.line([self.at(*point) for point in zip(x, y, strict=True)], colour, 2)

    def bar(self, x: float, y: float, colour: str) -> None:
        """From the axis up to y, or to the top where y lies above."""
        (left, top), (right, _) = self.at(x - 0.35, min(y, self.y[1])), self.at(x + 0.35, 0)
        bottom = self.box[1] + self.box[3]
        self.drawing.box(left, top, right - left, bottom - top, colour)


def draw_holderpo() -> None:
    """Share of the gradient against the token ratio for several p; p over training."""
    drawing = Drawing(760, 320)
    ratios = torch.linspace(0.5, 2.0, 151)
    logp = ratios.log()[None]
    mask = torch.ones_like(logp, dtype=torch.bool)
    shares = Panel(drawing, (50, 50, 240, 210), (0.5, 2.0), (0, 4), "share of the gradient, T · W")
    shares.ticks([0.5, 1, 1.5, 2], [0, 1, 2, 3, 4], "token ratio π / π_old")
    colours = {2: BLUE, 1: GREEN, 0: GREY, -1: ORANGE, -2: RED}
    for p, colour in colours.items():
        weights = gradient_weights(logp, torch.zeros_like(logp), mask, p)[0] * len(ratios)
        shares.curve(ratios.tolist(), weights.tolist(), colour)
        x, y = shares.at(2.0, weights[-1].item())
        drawing.text(x + 8, y + {-2: 8, -1: -1}.get(p, 4), f"p = {p}", colour, "start")

    schedules = Panel(drawing, (420, 50, 230, 210), (0, 500), (-2, 2), "p, from 2 to -2")
    schedules.ticks([0, 250, 500], [-2, -1, 0, 1, 2], "step of 500")
    colours = {"linear": BLUE, "cosine": GREEN, "quadratic": ORANGE, "cubic": PURPLE}
    steps = list(range(0, 501, 5))
    for place, (shape, colour) in enumerate(colours.items()):
        schedules.curve(steps, [anneal_p(step, 500, schedule=shape) for step in steps], colour)
        drawing.text(660, 64 + 18 * place, shape, colour, "start")
    drawing.save("holderpo.svg")


@torch.no_grad()
def measure_arca(folder: Path) -> dict[str, Any]:
    """The five scores of the last logged response, under the run's last adapter."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    settings = json.loads((folder / "args.json").read_text())
    names = {field.name for field in dataclasses.fields(arca.Args)}
    args = arca.Args(**{name: settings[name] for name in names & settings.keys()})
    tokenizer, policy = models.load_tokenizer(args), models.load_policy(args)
    checkpoint = sorted((folder / "checkpoints").glob("step-*"))[-1]
    set_peft_model_state_dict(policy, load_file(checkpoint / "adapter_model.safetensors"))
    row = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[-1])
    tokens, text = row["tokens"], row["problem"]
    problem = common.Problem(text, row["answer"], common.prompt_tokens(tokenizer, text))
    group = common.Group(problem, [tokens], [[0.0] * len(tokens)], [row["text"]])
    rollouts = common.stack([group], [], torch.device("cpu"))
    reference = models.Reference(policy, args)
    logp, entropy = common.score(policy, rollouts, args)
    with reference as frozen:
        ref_logp, _ = common.score(frozen, rollouts, args)
    scores = {
        "uniform": torch.zeros_like(logp),
        "surprisal": arca.surprisal(logp),
        "entropy": arca.entropy_reduction(entropy, rollouts.mask),
        "divergence": arca.divergence(logp, ref_logp),
        "arca": arca.residuals(policy, reference, rollouts, args),
    }
    return {
        "problem": text,
        "tokens": [tokenizer.decode([token]) for token in tokens[:-1]] + ["¶"],
        "scores": {
            name: [round(value, 6) for value in score[0, 0].tolist()]
            for name, score in scores.items()
        },
    }


def draw_arca(measured: dict[str, Any]) -> None:
    """A row of bars for each credit, over the tokens of one response."""
    tokens, scores = measured["tokens"], measured["scores"]
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    drawing = Drawing(760, 370)
    drawing.text(20, 20, "weight of each token of one response", anchor="start")
    for place, (name, colour) in enumerate(
        zip(scores, (GREY, ORANGE, GREEN, PURPLE, BLUE), strict=True)
    ):
        weights = arca.credit_weights(torch.tensor([scores[name]]), mask)
        box = (140, 36 + 62 * place, 600, 46)
        panel = Panel(drawing, box, (-0.5, len(tokens) - 0.5), (0, 0.5))
        panel.ticks([], [0, 0.5])
        for t, weight in enumerate(weights[0].tolist()):
            panel.bar(t, weight, colour)
        drawing.text(20, box[1] + 18, name, colour, "start")
        drawing.text(20, box[1] + 36, f"Gini {arca.gini(weights, mask).item():.2f}", anchor="start")
    for t, token in enumerate(tokens):
        drawing.text(panel.at(t, 0)[0], 352, token)
    drawing.save("arca.svg")


def measure_reft(folder: Path) -> dict[str, Any]:
    """Success and probability of openers by rank, mean over the steps that drew the rank."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured: dict[str, Any] = {"steps": rows[-1]["step"]}
    for what in ("success", "probability"):
        prefix = f"opener/{what}_of_rank_"
        found: dict[str, list[float]] = {}
        for row in rows:
            for name in sorted(name for name in row if name.startswith(prefix)):
                found.setdefault(name.removeprefix(prefix), []).append(row[name])
        means = {rank: sum(values) / len(values) for rank, values in sorted(found.items())}
        measured[what] = {rank: float(f"{mean:.4g}") for rank, mean in means.items()}
    return measured


def draw_reft(measured: dict[str, Any]) -> None:
    """Success by rank, and below it the probability."""
    drawing = Drawing(760, 330)
    success, probability = measured["success"], measured["probability"]
    across = (0.4, len(success) + 0.6)
    ranks = [int(rank) for rank in success]
    title = f"accuracy of rollouts by the rank of their opener, {measured['steps']} steps"
    upper = Panel(drawing, (50, 40, 690, 110), across, (0, 1), title)
    upper.ticks(ranks, [0, 0.5, 1])
    title = "probability of the opener under the policy"
    lower = Panel(drawing, (50, 210, 690, 70), across, (0, 0.6), title)
    lower.ticks(ranks, [0, 0.3, 0.6], "rank among the candidates")
    for rank in success:
        upper.bar(int(rank), success[rank], BLUE)
        lower.bar(int(rank), probability[rank], ORANGE)
    drawing.save("reft.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arca", type=Path, help="folder of a run of arca.py")
    parser.add_argument("--reft", type=Path, help="folder of a run of reft.py")
    runs = vars(parser.parse_args())
    draw_holderpo()
    for name, measure, draw in (
        ("arca", measure_arca, draw_arca),
        ("reft", measure_reft, draw_reft),
    ):
        stored = FOLDER / f"{name}.json"
        if runs[name]:
            text = json.dumps(measure(runs[name]), ensure_ascii=False)
            stored.write_text(text + "\n", encoding="utf-8")
        draw(json.loads(stored.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
