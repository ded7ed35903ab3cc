"""Every script on the tiny task with the settings of `make demo`, and what came of it.

    python benchmark/demo.py                  # runs what benchmark/results/demo.json lacks
    python benchmark/demo.py --write          # puts its numbers into README.md and docs/

One row a method and seed: held-out accuracy before and after, and seconds a step. This shows that
each script learns and what a step costs. It is no comparison of methods: one learning rate for
all, one small task, few seeds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results" / "demo.json"
SETTINGS = "--lr 2e-4 --max-new-tokens 64 --steps 100 --eval-every 0 --save-every 0"
METHODS = {
    "GRPO": "grpo.py",
    "EP-GRPO": "ep_grpo.py",
    "ERPO": "erpo.py",
    "GTPO": "gtpo.py",
    "GRPO-S": "gtpo.py --level sequence",
    "HölderPO": "holderpo.py",
    "ARCA": "arca.py",
    "REFT": "reft.py",
}


@dataclass
class Args:
    seeds: int = 2
    """runs of each method, with seeds 1, 2, ..."""
    only: str = ""
    """methods to run, separated by commas; empty: all"""
    write: bool = False
    """only write the tables of README.md and docs/ from the results"""


def run_once(method: str, seed: int) -> dict:
    """One run in a folder of its own; returns its row."""
    script, *own = shlex.split(METHODS[method])
    command = [script, *SETTINGS.split(), *own, "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, *command, "--run-dir", f"{folder}/run"]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"python {shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = rows[1:]
    parts = ("sync", "rollout", "verify", "score", "update", "other")
    return {
        "method": method,
        "command": f"python {shlex.join(command)}",
        "seed": seed,
        "before": rows[0]["eval/accuracy"],
        "after": rows[-1]["eval/accuracy"],
        "low": rows[-1]["eval/accuracy_low"],
        "high": rows[-1]["eval/accuracy_high"],
        "greedy": rows[-1]["eval/greedy"],
        "entropy": rows[-1]["entropy"],
        "length": rows[-1]["eval/length"],
        "seconds": {
            part: statistics.median(row[f"seconds/{part}"] for row in steps)
            for part in (*parts, "step")
        },
    }


def table(rows: list[dict]) -> str:
    """The results as a Markdown table, one line a method, means over seeds."""
    lines = [
        "| method | held-out accuracy before | after, each seed | greedy | step, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        before = statistics.mean(row["before"] for row in mine)
        after = ", ".join(
            f"{row['after']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in mine
        )
        greedy = statistics.mean(row["greedy"] for row in mine)
        step = 1000 * statistics.mean(row["seconds"]["step"] for row in mine)
        lines.append(f"| {method} | {before:.3f} | {after} | {greedy:.3f} | {step:.0f} |")
    return "\n".join(lines)


def filled_pages(results: dict) -> dict[str, str]:
    """README.md and the pages of the methods, with the table between their marks."""
    said = (
        f"`{results['command']}`, {results['machine']}, vLLM {results['versions']['vllm']} for the "
        f"CPU; settings `{results['settings']}`, and what `benchmark/results/demo.json` names."
    )
    stems = {method: command.split(".py")[0] for method, command in METHODS.items()}
    pages = {"README": ROOT / "README.md"}
    pages |= {stem: ROOT / "docs" / f"{stem}.md" for stem in stems.values()}
    filled = {}
    for name, path in pages.items():
        shown = set(stems.values()) if name == "README" else {"grpo", name}
        rows = [row for row in results["rows"] if stems[row["method"]] in shown]
        marks = rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)"
        text = path.read_text(encoding="utf-8")
        block = f"{table(rows)}\n\n{said}\n"
        text = re.sub(marks, lambda m, b=block: m[1] + b + m[2], text, flags=re.DOTALL)
        filled[str(path.relative_to(ROOT))] = text
    return filled


def main(args: Args) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if not args.write:
        chosen = args.only.split(",") if args.only else list(METHODS)
        for unknown in set(chosen) - set(METHODS):
            print(f"error: --only {unknown}: known are {', '.join(METHODS)}", file=sys.stderr)
            sys.exit(2)
        results |= {
            "command": "python benchmark/demo.py",
            "settings": SETTINGS,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {
                "python": platform.python_version(),
                "torch": version("torch"),
                "vllm": version(packages_distributions()["vllm"][0]),
                "transformers": version("transformers"),
            },
        }
        for seed in range(1, args.seeds + 1):
            for method in chosen:
                if any(r["method"] == method and r["seed"] == seed for r in results["rows"]):
                    continue
                row = run_once(method, seed)
                print(
                    f"{method:10} seed {seed}  {row['before']:.3f} -> {row['after']:.3f}",
                    flush=True,
                )
                results["rows"].append(row)
                order = list(METHODS)
                results["rows"].sort(key=lambda r: (order.index(r["method"]), r["seed"]))
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for page, text in filled_pages(results).items():
        (ROOT / page).write_text(text, encoding="utf-8")
    print(table(results["rows"]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
