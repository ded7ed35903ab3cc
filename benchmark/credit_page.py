"""The tables and the figure of docs/credit.md, from benchmark/results/credit.json."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from figures import BLUE, GREY, ORANGE, Drawing  # noqa: E402
from measures import MEASURES  # noqa: E402

PAGE, FIGURE = ROOT / "docs" / "credit.md", ROOT / "docs" / "credit.svg"


def cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    low, high = figure["interval"]
    value = f"{figure['value']:.2f}"
    return f"{f'**{value}**' if figure['differs'] else value} [{low:.2f}, {high:.2f}]"


def plain(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: dict[str, Any]) -> str:
    """All tables of the page."""
    policies = results["policies"]
    first, *_ = policies.values()
    parts = []
    for name, policy in policies.items():
        rows = [[m, *map(cell, row.values())] for m, row in policy["methods"].items()]
        parts += [f"The {name} policy:", markdown(["credit", *MEASURES], rows)]
    for part, title in (("facts", "the rollouts"), ("soundness", "the truth")):
        rows = [[key, *(plain(p[part][key]) for p in policies.values())] for key in first[part]]
        parts.append(markdown([title, *policies], rows))
    head = ["signal, against the size of the true advantage"]
    head += [f"{measure}, {name}" for name in policies for measure in first["signals"]["entropy"]]
    rows = [
        [s, *(cell(c) for p in policies.values() for c in p["signals"][s].values())]
        for s in first["signals"]
    ]
    parts.append(markdown(head, rows))
    settings = results["settings"]
    parts.append(
        f"`{results['command']}`, seed {settings['seed']}: {settings['prompts']} problems, "
        f"{settings['group_size']} rollouts of each, {settings['continuations']} continuations for "
        f"each of two estimates; {results['machine']}, vLLM {results['versions']['vllm']} for the "
        f"CPU. All numbers: `benchmark/results/credit.json`."
    )
    return "\n\n".join(parts)


def filled_page(results: dict[str, Any]) -> str:
    """docs/credit.md with the tables between its marks."""
    marks = r"(<!-- results:credit -->\n).*?(<!-- /results -->)"
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(marks, lambda m: f"{m[1]}{tables(results)}\n{m[2]}", text, flags=re.DOTALL)


def draw(results: dict[str, Any], path: Path) -> None:
    """One rollout: a row of shaded tokens for the truth and for each method."""
    *_, policy = results["policies"].values()
    shown = policy["example"]
    left, step, tall, top = 190, 12.4, 20, 62
    across = left + step * len(shown["pieces"])
    drawing = Drawing(int(across) + 12, top + tall * len(shown["credit"]) + 34)
    drawing.text(left, 20, shown["problem"], anchor="start")
    for t, piece in enumerate(shown["pieces"]):
        drawing.text(left + step * (t + 0.5), top - 8, piece.strip() or ("¶", "␣")[bool(piece)])
    for row, (name, credit) in enumerate(shown["credit"].items()):
        y = top + tall * row
        drawing.text(left - 10, y + 14, name, anchor="end")
        drawing.line([(left, y + tall - 2), (across, y + tall - 2)], GREY, 0.3)
        largest = max(map(abs, credit)) or 1.0
        for t, value in enumerate(credit):
            colour, solid = (BLUE, ORANGE)[value < 0], abs(value) / largest
            if solid >= 0.01:
                drawing.box(left + step * t + 0.5, y, step - 1, tall - 3, colour, round(solid, 2))
    legend = top + tall * len(shown["credit"]) + 12
    for x, colour, words in ((left, BLUE, "for the token"), (left + 150, ORANGE, "against it")):
        drawing.box(x, legend, step, 12, colour)
        drawing.text(x + step + 6, legend + 10, words, anchor="start")
    drawing.save(str(path))


def write(results: dict[str, Any]) -> None:
    PAGE.write_text(filled_page(results), encoding="utf-8")
    draw(results, FIGURE)
