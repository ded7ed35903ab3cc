"""What does a sick run look like? A healthy run and three that are not, on the tiny task.

    python benchmark/sick.py             # runs what benchmark/results/sick.json lacks
    python benchmark/sick.py --write     # puts the numbers into docs/metrics.md, draws its figure

The stale runs are grpo.py whose engine never gets the policy's weights after the start: once with
the guard against that set aside, once as it is.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shared
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json

from docs import figures

FILE, PAGE = RESULTS / "sick.json", ROOT / "docs" / "metrics.md"
SETTINGS = "--max-new-tokens 64 --steps 40 --eval-every 0 --save-every 0 --log-rollouts 0"
RUNS = {
    "healthy": "grpo.py --lr 2e-4",
    "collapse": "grpo.py --lr 3e-3",
    "entropy blow-up": "grpo.py --lr 2e-4 --weight-decay 100",
    "stale weights": "grpo.py --lr 2e-4 --max-logp-gap 100",
    "stale, guarded": "grpo.py --lr 2e-4",
}
# The engine hears of no weights after the first sync; the first argument says whether it looks.
WITHOUT_SYNC = """
import runpy, sys, engine
sync, calls, look = engine.VLLM.sync, [], sys.argv.pop(1) == "look"

def first_only(self, policy):
    if calls:
        self.llm.collective_rpc = lambda *_, **__: None
    if look or not calls:
        sync(self, policy)
    calls.append(True)

engine.VLLM.sync = first_only
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
    looks = "look" if name == "stale, guarded" else "blind"
    start = ["-c", WITHOUT_SYNC, looks, script] if name.startswith("stale") else [script]
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


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """A line a metric: each run's mean over the first five and over the last five steps; and how
    the guarded run ended."""
    runs = [run for run in results["runs"] if not run["stopped"]]
    rows = []
    for key in SHOWN:
        ends = [(run["curves"][key][:5], run["curves"][key][-5:]) for run in runs]
        cells = [" → ".join(f"{statistics.mean(end):.3g}" for end in both) for both in ends]
        rows.append([f"`{key}`", *cells])
    rows.append(["`eval/accuracy`", *(f"{r['before']:.3f} → {r['after']:.3f}" for r in runs)])
    commands = ", ".join(f"{run['name']} `{run['command']}`" for run in runs)
    said = (
        f"Means over the first five steps → over the last five of {runs[0]['steps']}. "
        f"{commands}; all with `{results['settings']}`. `{results['command']}`, "
        f"{results['machine']}, vLLM {results['versions']['vllm']} for the CPU."
    )
    guarded = next(run for run in results["runs"] if run["name"] == "stale, guarded")
    end = f"step {guarded['steps'] + 1}: stopped: {guarded['stopped']}"
    table = markdown(["metric", *(run["name"] for run in runs)], rows)
    return {"sick": f"{table}\n\n{said}", "sick-guard": f"```\n{end}\n```"}


def main(args: Args) -> None:
    names = shared.chosen("--only", args.only, RUNS)
    results = read_json(FILE) if FILE.exists() else {"runs": []}
    if args.write:
        shared.write_page(PAGE, blocks(results))
        figures.draw_metrics({run["name"]: run["curves"] for run in results["runs"]})
        return
    results |= {"command": "python benchmark/sick.py", "settings": SETTINGS}
    results |= shared.surroundings("torch", "vllm", "transformers")
    there = {run["name"] for run in results["runs"]}
    for run in (run_once(name) for name in names if name not in there):
        print(f"{run['name']:16} {run['before']:.3f} -> {run['after']}  {run['stopped'] or ''}")
        results["runs"].append(run)
        results["runs"].sort(key=lambda run: list(RUNS).index(run["name"]))
        write_json(FILE, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
