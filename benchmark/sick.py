"""A healthy run and three sick ones on the tiny task, to show what each does to the metrics.

    python benchmark/sick.py               # runs what benchmark/results/sick.json lacks
    python benchmark/sick.py --write       # puts its numbers into docs/metrics.md

The stale runs are grpo.py whose engine never gets the policy's weights after the start: once with
the guard against that set aside, once as it is.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results" / "sick.json"
PAGE = ROOT / "docs" / "metrics.md"
SETTINGS = "--max-new-tokens 64 --steps 40 --eval-every 0 --save-every 0 --log-rollouts 0"
RUNS = {
    "healthy": "grpo.py --lr 2e-4",
    "collapse": "grpo.py --lr 3e-3",
    "entropy blow-up": "grpo.py --lr 2e-4 --weight-decay 100",
    "stale weights": "grpo.py --lr 2e-4 --max-logp-gap 100",
    "stale, guarded": "grpo.py --lr 2e-4",
}
WITHOUT_SYNC = """
import runpy, sys, models
sync, calls = models.VLLM.sync, []

def first_only(engine, policy):
    if not calls:
        sync(engine, policy)
    calls.append(True)

models.VLLM.sync = first_only
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHOWN = ("reward", "entropy", "length", "truncated", "zero_variance", "grad_norm", "logp_gap/mean")


@dataclass
class Args:
    only: str = ""
    """runs to make, separated by commas; empty: all"""
    write: bool = False
    """only write the numbers into docs/metrics.md, and draw its figure"""


def run_once(name: str) -> dict[str, Any]:
    """One run in a folder of its own: the curves of its metrics, and why it stopped itself."""
    script, *flags = RUNS[name].split()
    start = ["-c", WITHOUT_SYNC, script] if name.startswith("stale") else [script]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *start, *flags, *SETTINGS.split(), "--run-dir", f"{folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        stopped = re.search(r"^stopped: (.*)", done.stderr, re.MULTILINE)
        if done.returncode and not stopped:
            sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    before, *steps = [json.loads(line) for line in lines]
    return {
        "name": name,
        "command": f"python {RUNS[name]}",
        "steps": len(steps),
        "stopped": stopped[1] if stopped else None,
        "before": before["eval/accuracy"],
        "after": steps[-1].get("eval/accuracy") if steps else None,
        "logged": sorted({key for row in (before, *steps) for key in row} - {"step"}),
        "curves": {key: [float(f"{row[key]:.4g}") for row in steps] for key in SHOWN},
    }


def table(results: dict[str, Any]) -> str:
    """A line a run: each metric over the first five and over the last five steps."""
    runs = [run for run in results["runs"] if not run["stopped"]]
    lines = ["| metric |" + "".join(f" {run['name']} |" for run in runs)]
    lines.append("|---|" + "---:|" * len(runs))
    for key in SHOWN:
        cells = []
        for run in runs:
            ends = run["curves"][key][:5], run["curves"][key][-5:]
            cells.append(" → ".join(f"{statistics.mean(end):.3g}" for end in ends))
        lines.append(f"| `{key}` | {' | '.join(cells)} |")
    ends = [f"{run['before']:.3f} → {run['after']:.3f}" for run in runs]
    lines.append(f"| `eval/accuracy` | {' | '.join(ends)} |")
    return "\n".join(lines)


def filled_page(results: dict[str, Any]) -> str:
    """docs/metrics.md with the numbers between their marks."""
    guarded = next(run for run in results["runs"] if run["name"] == "stale, guarded")
    commands = ", ".join(
        f"{run['name']} `{run['command']}`" for run in results["runs"] if not run["stopped"]
    )
    said = (
        f"Means over the first five steps → over the last five of {results['runs'][0]['steps']}. "
        f"{commands}; all with `{results['settings']}`. `{results['command']}`, "
        f"{results['machine']}, vLLM {results['versions']['vllm']} for the CPU."
    )
    blocks = {
        "sick": f"{table(results)}\n\n{said}",
        "sick-guard": f"```\nstep {guarded['steps'] + 1}: stopped: {guarded['stopped']}\n```",
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marks = rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)"
        text = re.sub(marks, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)
    return text


def main(args: Args) -> None:
    chosen = args.only.split(",") if args.only else list(RUNS)
    for unknown in set(chosen) - set(RUNS):
        print(f"error: --only {unknown}: known are {', '.join(RUNS)}", file=sys.stderr)
        sys.exit(2)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    if args.write:
        PAGE.write_text(filled_page(results), encoding="utf-8")
        subprocess.run([sys.executable, "docs/figures_runs.py", "metrics"], cwd=ROOT, check=True)
        return
    results |= {
        "command": "python benchmark/sick.py",
        "settings": SETTINGS,
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "vllm": version(packages_distributions()["vllm"][0]),
            "transformers": version("transformers"),
        },
    }
    for name in chosen:
        if any(run["name"] == name for run in results["runs"]):
            continue
        run = run_once(name)
        reward = run["curves"]["reward"]
        print(f"{name:16} reward {reward[0]:.2f} -> {reward[-1]:.2f}  {run['stopped'] or ''}")
        results["runs"].append(run)
        results["runs"].sort(key=lambda run: list(RUNS).index(run["name"]))
        text = json.dumps(results, ensure_ascii=False, indent=1)
        text = re.sub(r"\[\s+([-\d][^\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        partial = RESULTS.with_name(RESULTS.name + ".unfinished")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(RESULTS)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
