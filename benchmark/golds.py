r"""Whether the verifier takes each gold answer of the known problem sets for what it is.

    python benchmark/golds.py --data-dir data     # the files that docs/evaluation.md names
    python benchmark/golds.py --write             # only puts the results into docs/evaluation.md

Three questions of each set, counted in benchmark/results/golds.json:

- right: is `\boxed{gold}` graded right against the gold? An identical text always is.
- read: does math-verify read the gold as mathematics, and find it equal to itself? Where it does
  not, another way of writing the same answer could not be told to be right, so evaluation drops
  the problem. These golds are the exceptions.
- solutions: where a set has worked solutions that end in a box, are they graded right?
"""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import gold_answer, read_rows  # noqa: E402
from tools.evaluate import KNOWN  # noqa: E402
from verifier import Grader, last_boxed  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "golds.json"
PAGE = ROOT / "docs" / "evaluation.md"
MARKS = r"(<!-- results:golds -->\n).*?(<!-- /results -->)"
PACKAGES = ("math-verify", "sympy", "latex2sympy2_extended", "antlr4-python3-runtime")


@dataclass
class Args:
    data_dir: str = "data"
    """folder with the sets' files"""
    write: bool = False
    """only write the table of docs/evaluation.md from the results"""


def check_set(rows: list[dict[str, Any]], grader: Grader) -> dict[str, Any]:
    """What the verifier makes of one set's golds."""
    golds = [gold_answer(str(row["answer"])) for row in rows]
    right = grader.grade([rf"\boxed{{{gold}}}" for gold in golds], golds)
    read = grader.readable(golds)
    solved = [
        (row["solution"], gold)
        for row, gold in zip(rows, golds, strict=True)
        if last_boxed(row.get("solution", "")) is not None
    ]
    found = {
        "problems": len(rows),
        "right": sum(right),
        "read": sum(read),
        "wrong": [gold for gold, fine in zip(golds, right, strict=True) if not fine],
        "exceptions": [gold for gold, fine in zip(golds, read, strict=True) if not fine],
    }
    if solved:
        verdicts = grader.grade(*map(list, zip(*solved, strict=True)))
        found |= {"solutions": len(solved), "solutions_right": sum(verdicts)}
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| set | file | on the hub | problems | gold right | gold read | solutions right |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name, (file, hub) in KNOWN.items():
        found = results["sets"].get(name)
        counts = ["not at hand", "", "", ""]
        if found:
            share = f"{found['read']} ({found['read'] / found['problems']:.1%})"
            counts = [found["problems"], found["right"], share, "none boxed"]
            if "solutions" in found:
                counts[3] = f"{found['solutions_right']} of {found['solutions']}"
        lines.append(f"| `{name}` | `{file}` | `{hub}` | {' | '.join(map(str, counts))} |")
    lines += ["", "The golds that math-verify does not read:", ""]
    for name, found in results["sets"].items():
        lines += [f"- `{name}`: `{gold}`" for gold in found["exceptions"]]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines += ["", f"`{results['command']}`, {versions}."]
    return "\n".join(lines)


def filled_page(results: dict[str, Any]) -> str:
    """docs/evaluation.md with the results between their marks."""
    block = table(results) + "\n"
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(MARKS, lambda m: m[1] + block + m[2], text, flags=re.DOTALL)


def main(args: Args) -> None:
    if not args.write:
        sets = {}
        with Grader() as grader:
            for name, (file, _) in KNOWN.items():
                path = Path(args.data_dir) / file
                if path.is_file():
                    sets[name] = check_set(read_rows("--data-dir", str(path), "test"), grader)
        if not sets:
            print(f"error: --data-dir {args.data_dir}: holds none of the sets", file=sys.stderr)
            raise SystemExit(2)
        results = {
            "command": "python benchmark/golds.py",
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
            "sets": sets,
            "not_at_hand": [name for name in KNOWN if name not in sets],
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(filled_page(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
