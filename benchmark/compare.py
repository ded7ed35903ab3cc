"""Which method learns most on a tiny task, on equal terms? A learning rate for each, seeds.

    python benchmark/compare.py               # trains what benchmark/results/compare.json lacks
    python benchmark/compare.py --only GRPO --steps 360 --rates 4e-4 --seeds 3 \\
        --results benchmark/results/compare-tokens.json --runs runs/compare-tokens
    python benchmark/compare.py --only 'GRPO,VinePPO,VinePPO by token' --prompts 2 \\
        --rates 1e-4 2e-4 4e-4 --seeds 4 --results benchmark/results/compare-few.json \\
        --runs runs/compare-few
    python benchmark/compare.py --task needle --prompts 4 --rates 5e-5 1e-4 2e-4 4e-4 8e-4 \\
        --results benchmark/results/compare-needle.json --runs runs/compare-needle
    python benchmark/compare.py --task needle --prompts 4 --only GRPO --steps 710 --rates 2e-4 \\
        --seeds 3 --results benchmark/results/compare-needle-tokens.json \\
        --runs runs/compare-needle-tokens
    python benchmark/compare.py --write       # puts the numbers into README.md and docs/compare.md

First each method trains once for every learning rate and selection seed; the rate with the highest
accuracy on the validation problems is its own. Then it trains at that rate with other seeds, and is
measured on the test problems. It can be stopped and started again at any time. The second command
trains GRPO for as many tokens as VinePPO draws in the first, the third both with few rollouts a
step; the fourth trains all methods on the second task, the fifth GRPO for as many tokens as VinePPO
draws there. See docs/compare.md.
"""

from __future__ import annotations

import collections
import json
import math
import os
import queue
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import shared
import tyro
from shared import RESULTS, ROOT, markdown, read_json, refuse, write_json, write_whole

from docs import figures

METHODS = {
    "GRPO": "grpo.py",
    "DAPO": "grpo.py --clip-high 0.28 --dynamic-sampling --overlong-buffer 8",
    "Dr. GRPO": "grpo.py --no-scale-rewards --loss-average constant",
    "EP-GRPO": "ep_grpo.py",
    "EP-GRPO gate alone": "ep_grpo.py --eta 0",
    # --gamma 0 gates every token by 1/2. With the other weights halved too this is half the loss
    # without a gate, and AdamW takes the same step for half a gradient.
    "EP-GRPO progress alone": "ep_grpo.py --gamma 0 --eta 0.1 --kl 0.0005 --max-grad-norm 0.5",
    "ERPO": "erpo.py",
    "GTPO": "gtpo.py",
    "GRPO-S": "gtpo.py --level sequence",
    "HölderPO": "holderpo.py",
    "GMPO": "holderpo.py --schedule constant --p-start 0 --clip-level token",
    "REFT": "reft.py",
    "VinePPO": "vineppo.py",
    "VinePPO by token": "vineppo.py --step-end (?s).",  # every token is a step
    "ARCA": "arca.py",
    "uniform credit": "arca.py --credit uniform",
    "surprisal credit": "arca.py --credit surprisal",
    "entropy credit": "arca.py --credit entropy",
    "divergence credit": "arca.py --credit divergence",
}
COSTLY = {"VinePPO by token"}  # only where --only names them
# Variants that take another method's learning rate.
RATE_OF = {"EP-GRPO gate alone": "EP-GRPO", "EP-GRPO progress alone": "EP-GRPO"}
RATE_OF |= {"VinePPO by token": "VinePPO"}


class Task(NamedTuple):
    """What is trained on, and what the methods need there."""

    model: str
    """folder of the model, its train.jsonl and its test.jsonl"""
    max_new_tokens: int
    flags: dict[str, str]
    """of methods that take other settings than by default"""
    also: dict[str, str]
    """rates at which methods are measured too: the next best in the choice, by little"""


TASKS = {
    "sums": Task("tiny", 64, {}, {"EP-GRPO": "4e-4"}),
    "needle": Task("tiny/needle", 80, {"VinePPO": "--continuations 3"}, {}),
}
CURVE = "--eval-every 10 --eval-problems 64 --eval-samples 1"
NO_CURVE = "--eval-every 0 --eval-problems 1 --eval-samples 1"  # of the runs for the choice
GROUP = 8  # what the scripts take by default
EQUAL_TOKENS, FEW_ROLLOUTS = RESULTS / "compare-tokens.json", RESULTS / "compare-few.json"
NEEDLE, NEEDLE_TOKENS = RESULTS / "compare-needle.json", RESULTS / "compare-needle-tokens.json"
PAGES = ROOT / "README.md", ROOT / "docs" / "compare.md"
VALIDATION = 256  # the last rows of train.jsonl, which no run trains on
SELECTION = 100  # seeds above this one are for the choice
# 97.5% quantile of Student's t distribution with 1, 2, ... degrees of freedom.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Args:
    task: Literal["sums", "needle"] = "sums"
    """the first task, or that of tiny/needle"""
    seeds: int = 5
    """runs of each method at its learning rate, with seeds 1, 2, ... (2 to 10)"""
    selection_seeds: int = 1
    """runs of each method at each learning rate, with seeds 101, 102, ..."""
    rates: tuple[str, ...] = ("1e-4", "2e-4", "4e-4", "8e-4", "16e-4")
    """learning rates to choose from; with one, nothing is chosen; later more can be added"""
    steps: int = 40
    """training steps; DAPO takes fewer: see docs/compare.md"""
    prompts: int = 16
    """problems of a training step, with 8 rollouts each"""
    samples: int = 8
    """sampled answers to each of the 256 problems of an evaluation"""
    only: str = ""
    """methods to run, separated by commas; empty: all but VinePPO by token"""
    jobs: int = 2
    """runs at a time, each on a core of its own; never more than the cores allowed"""
    results: Path = RESULTS / "compare.json"
    """file of the results"""
    runs: Path = ROOT / "runs" / "compare"
    """folder of the runs"""
    write: bool = False
    """only write the tables and the figures from the results"""

    @property
    def settings(self) -> str:
        """Flags of every run, whatever its method."""
        task = TASKS[self.task]
        model = "" if task.model == "tiny" else f"--model {task.model} "  # their default
        return f"{model}--max-new-tokens {task.max_new_tokens} --log-rollouts 0"


class Job(NamedTuple):
    """One training run."""

    method: str
    lr: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{re.sub(r'[^a-zö]+', '-', self.method.lower()).strip('-')}-{self.lr}-{self.seed}"


def training_command(job: Job, args: Args) -> list[str]:
    script, *own = shlex.split(METHODS[job.method])
    own += shlex.split(TASKS[args.task].flags.get(job.method, ""))
    # Dynamic sampling draws more rollouts a step: a checkpoint a step lets us cut at the budget.
    saves = ["--save-every", "1", "--keep-checkpoints", str(args.steps)]
    saves = saves if "--dynamic-sampling" in own else ["--save-every", "0"]
    data = ["--dataset", str(args.runs / "train.jsonl")]
    data += ["--eval-dataset", str(args.runs / "validation.jsonl")]
    settings = f"{args.settings} {NO_CURVE if job.seed > SELECTION else CURVE}"
    run = ["--steps", str(args.steps), "--prompts-per-step", str(args.prompts)]
    run += ["--lr", job.lr, "--seed", str(job.seed)]
    flags = [*own, *settings.split(), *saves, *data, *run]
    return shared.run_command(script, flags, args.runs / job.folder)


def run_on_this_core(command: list[str]) -> str:
    """Run a script with one thread, on the core of the calling thread. Returns why it stopped
    itself, if it did; raises RuntimeError on any other failure."""
    core = min(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    words = [sys.executable, *command]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    stopped = re.search(r"^stopped: .*", done.stderr, re.MULTILINE)
    if done.returncode == 1 and stopped:
        return stopped[0]
    raise RuntimeError(f"python {shlex.join(command)} failed:\n{done.stderr[-2000:]}")


def on_cores(work: Callable[[Any], Any], items: list[Any], jobs: int) -> Iterator[tuple[Any, Any]]:
    """(item, work(item)) as they end: one thread a core, which what it starts inherits."""
    cores = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    pool = ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, {cores.get()}))
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # on a failure or Ctrl-C: what runs is left to end, the rest begins next time
        pool.shutdown(cancel_futures=True)


def train(job: Job, args: Args) -> str:
    """Train a run unless it is there whole; why it stopped itself, if it did."""
    folder = args.runs / job.folder
    if (folder / "args.json").exists():
        steps = read_json(folder / "args.json")["steps"]
        if steps != args.steps:
            why = f"{folder.name} is a run of {steps} steps, not {args.steps}"
            refuse("--runs", args.runs, why)
    if (folder / "model").exists():  # which is given its name when it is whole
        return ""
    return run_on_this_core(training_command(job, args))


def within_budget(drawn: dict[int, int], budget: int) -> int:
    """The last step by which no more rollouts were drawn than the budget allows; drawn: by step."""
    return max(step for step, rollouts in drawn.items() if rollouts <= budget)


def cut(folder: Path, args: Args) -> dict[str, Any]:
    """The weights of a finished run that are within the budget: where they lie, after which step,
    and how many rollouts had been drawn by then. Written down once; checkpoints that are not
    needed are removed."""
    found = folder / "cut.json"
    if not found.exists():
        import torch

        checkpoints = {int(f.name[5:]): f for f in folder.glob("checkpoints/step-*")}
        drawn = {
            step: torch.load(saved / "trainer.pt", weights_only=True)["position"] * GROUP
            for step, saved in checkpoints.items()
        }
        step = within_budget(drawn, args.steps * args.prompts * GROUP)
        # model/ is the last checkpoint, with LoRA added in.
        weights = folder / "model" if step == args.steps else checkpoints[step]
        drawn = dict(sorted(drawn.items()))
        write_json(found, {"weights": str(weights), "step": step, "drawn": drawn})
        for saved in set(checkpoints.values()) - {weights}:
            shutil.rmtree(saved)
    return read_json(found)


def evaluate(models: list[str], problems: Path, args: Args) -> dict[str, dict[str, float]]:
    """Accuracy, pass@8 and length of models by their folders: one engine a core, each with its
    share of them. tools/evaluate.py keeps what it has done."""
    command = ["tools/evaluate.py", "--datasets", str(problems), "--samples", str(args.samples)]
    command += ["--k", "8", "--max-new-tokens", str(TASKS[args.task].max_new_tokens)]
    command += ["--folder", str(args.runs / "evaluations")]
    shares = [models[k :: args.jobs] for k in range(args.jobs) if models[k :: args.jobs]]
    outputs = [args.runs / f"{problems.stem}-{k}.json" for k in range(len(shares))]
    commands = [
        [*command, "--output", str(output), "--models", *share]
        for output, share in zip(outputs, shares, strict=True)
    ]
    list(on_cores(run_on_this_core, commands, args.jobs))
    names = {"accuracy": f"mean@{args.samples}", "pass@8": "pass@8", "length": "length"}
    return {
        found["model"]: {new: found["metrics"][old]["value"] for new, old in names.items()}
        for output in outputs
        for found in read_json(output)["results"]
    }


def row_of(job: Job, evaluated: dict[str, dict[str, float]], args: Args) -> dict[str, Any]:
    """What the results say of a run."""
    folder, per_step = args.runs / job.folder, args.prompts * GROUP
    at = cut(folder, args)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines][: at["step"] + 1]
    steps = metrics[1:]
    length = statistics.mean(row["length"] for row in steps)
    continued = sum(row.get("value/tokens", 0) for row in steps)  # VinePPO's
    return {
        **job._asdict(),
        "step": at["step"],
        "rollouts": at["drawn"][str(at["step"])],
        **{name: round(value, 4) for name, value in evaluated[at["weights"]].items()},
        "entropy": round(statistics.mean(row["entropy"] for row in steps[-10:]), 4),
        "tokens": round(at["drawn"][str(at["step"])] * length + continued),
        "curve": [  # validation accuracy by rollouts drawn
            (at["drawn"].get(str(row["step"]), row["step"] * per_step), row["eval/accuracy"])
            for row in metrics
            if "eval/accuracy" in row
        ],
    }


def validation_accuracy(selection: list[dict], method: str) -> dict[str, float]:
    """By learning rate: the mean over seeds; -1 where a run stopped itself."""
    found: dict[str, list[float]] = {}
    for row in selection:
        if row["method"] == method:
            found.setdefault(row["lr"], []).append(row["accuracy"])
    return {
        lr: -1.0 if None in values else statistics.mean(values)
        for lr, values in sorted(found.items(), key=lambda item: float(item[0]))
    }


def chosen_rate(selection: list[dict], method: str, rates: list[str]) -> tuple[str, bool]:
    """The learning rate with the highest validation accuracy, the lower one on a tie; and whether
    it lies at an end of the grid, beyond which there may be a better one."""
    accuracy = validation_accuracy(selection, RATE_OF.get(method, method))
    best = max(accuracy, key=accuracy.get) if accuracy else rates[0]
    return best, len(rates) > 1 and best in (min(rates, key=float), max(rates, key=float))


def split_rows(results: dict) -> tuple[list[dict], list[dict]]:
    """The measured runs at the chosen learning rates, and those at rates of an earlier choice."""
    grid, selection = results["rates"], results["selection"]
    best = {method: chosen_rate(selection, method, grid)[0] for method in METHODS}
    at_best = [row for row in results["rows"] if row["lr"] == best[row["method"]]]
    return at_best, [row for row in results["rows"] if row not in at_best]


def t_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the mean by Student's t distribution: of paired differences, or of runs."""
    reach = T_QUANTILE[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return mean - reach, mean + reach


def difference(rows: list[dict], method: str, baseline: str) -> list[float]:
    """Accuracy of a method less that of another, seed by seed."""
    of = {(row["method"], row["seed"]): row["accuracy"] for row in rows}
    seeds = sorted(seed for name, seed in of if name == method and (baseline, seed) in of)
    return [of[method, seed] - of[baseline, seed] for seed in seeds]


# ------------------------------------------------------------------------------- the pages


def signed(values: list[float]) -> str:
    """The mean of differences and its interval, with signs."""
    if len(values) < 2:
        return ""
    low, high = t_interval(values)
    return f"{statistics.mean(values):+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")


def table(results: dict) -> str:
    """One line a method: means over seeds."""
    head = ["method", "learning rate", "accuracy", "pass@8", "entropy", "length", "tokens, M"]
    shown = ("accuracy", "pass@8", "entropy")
    start, rows = results["start"], split_rows(results)[0]
    before = [f"{start['accuracy']:.3f}", f"{start['pass@8']:.3f}", "", f"{start['length']:.1f}"]
    lines = [["before training", "", *before, "", ""]]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        mean = {k: statistics.mean(row[k] for row in mine) for k in (*shown, "length")}
        tokens = statistics.mean(row["tokens"] for row in mine) / 1e6
        lr, at_end = chosen_rate(results["selection"], method, results["rates"])
        cells = [method, lr + " †" * at_end, *(f"{mean[k]:.3f}" for k in shown)]
        against = difference(rows, method, "GRPO") if method != "GRPO" else []
        lines.append([*cells, f"{mean['length']:.1f}", f"{tokens:.2f}", signed(against)])
    return markdown([*head, "accuracy less GRPO's"], lines)


def choice_table(results: dict) -> str:
    """Validation accuracy of each method at each learning rate; the chosen one in bold."""
    rates, lines = results["rates"], []
    for method in dict.fromkeys(row["method"] for row in results["selection"]):
        accuracy = validation_accuracy(results["selection"], method)
        best, _ = chosen_rate(results["selection"], method, rates)
        shown = {lr: "stopped" if a < 0 else f"{a:.3f}" for lr, a in accuracy.items()}
        shown[best] = f"**{shown[best]}**"
        lines.append([method, *(shown.get(lr, "") for lr in rates)])
    return markdown(["method", *rates], lines)


def credit_table(results: dict) -> str:
    """The credits of arca.py against its own uniform credit, which has the same adapters."""
    rows, baseline = split_rows(results)[0], "uniform credit"
    credits = [name for name, command in METHODS.items() if command.startswith("arca.py")]
    lines = [[m, signed(difference(rows, m, baseline))] for m in credits if m != baseline]
    return markdown(["credit", "accuracy less that of uniform credit"], lines)


def others_table(results: dict) -> str:
    """What was measured, with the same seeds, at learning rates that are not the chosen ones."""
    chosen, others = split_rows(results)
    baseline, lines = [row for row in chosen if row["method"] == "GRPO"], []
    for method, lr in dict.fromkeys((row["method"], row["lr"]) for row in others):
        rows = [row for row in others if (row["method"], row["lr"]) == (method, lr)]
        mean = statistics.mean(row["accuracy"] for row in rows)
        against = difference(baseline + rows, method, "GRPO") if method != "GRPO" else []
        lines.append([method, lr, f"{mean:.3f}", signed(against)])
    return markdown(["method", "learning rate", "accuracy", "accuracy less GRPO's"], lines)


def tokens_table(results: dict, longer: dict) -> str:
    """VinePPO beside GRPO at its rollouts and at its tokens, on the seeds that the latter has."""
    seeds, lines = {row["seed"] for row in longer["rows"]}, []
    same = [row for row in split_rows(results)[0] if row["seed"] in seeds]
    for method, rows in (("GRPO", same), ("VinePPO", same), ("GRPO", longer["rows"])):
        mine = [row for row in rows if row["method"] == method]
        mean = {k: statistics.mean(row[k] for row in mine) for k in ("accuracy", "pass@8")}
        tokens = statistics.mean(row["tokens"] for row in mine) / 1e6
        shown = [f"{value:.3f}" for value in mean.values()]
        lines.append([method, mine[0]["step"], mine[0]["rollouts"], f"{tokens:.2f}", *shown])
    head = ["method", "steps", "rollouts", "tokens, M", "accuracy", "pass@8"]
    said = f"Means over {len(seeds)} seeds. `{longer['command']}`, {longer['machine']}."
    return f"{markdown(head, lines)}\n\n{said}"


def caption(results: dict) -> str:
    """What a reader needs to know beside the table."""
    rows, rates = split_rows(results)[0], ", ".join(results["rates"])
    budget = results["steps"] * results["prompts"] * GROUP
    runs = collections.Counter(row["method"] for row in rows)
    choice = f"The learning rates were chosen from {rates}."
    if any(chosen_rate(results["selection"], method, results["rates"])[1] for method in runs):
        choice += " †: at an end of these, so a better one may lie beyond."
    if len(results["rates"]) == 1:
        choice = f"All took the learning rate {rates}: none was chosen."
    [(usual, _)] = collections.Counter(runs.values()).most_common(1)
    other = "".join(f", {m}'s over {n}" for m, n in runs.items() if n != usual)
    said = (
        f"Means over {usual} seeds{other}; in brackets the 95% interval of "
        f"the mean paired difference (Student's t over seeds). {choice} "
        f"Each run drew {budget} rollouts in {results['steps']} steps"
    )
    if dapo := [row for row in rows if row["method"] == "DAPO"]:
        steps = sorted(row["step"] for row in dapo)
        said += f", DAPO {min(row['rollouts'] for row in dapo)} or more in {steps[0]}–{steps[-1]}"
    vllm = results["versions"]["vllm"]
    return f"{said}. `{results['command']}`, {results['machine']}, vLLM {vllm} for the CPU."


def blocks(results: dict) -> dict[str, str]:
    """What README.md and docs/compare.md show between their marks."""
    few, needle = read_json(FEW_ROLLOUTS), read_json(NEEDLE)
    return {
        "compare": f"{table(results)}\n\n{caption(results)}",
        "compare-choice": choice_table(results),
        "compare-credit": credit_table(results),
        "compare-others": others_table(results),
        "compare-tokens": tokens_table(results, read_json(EQUAL_TOKENS)),
        "compare-few": f"{table(few)}\n\n{caption(few)}",
        "compare-needle": f"{table(needle)}\n\n{caption(needle)}",
        "compare-needle-credit": credit_table(needle),
        "compare-needle-tokens": tokens_table(needle, read_json(NEEDLE_TOKENS)),
        "compare-needle-choice": choice_table(needle),
    }


def draw(results: dict) -> None:
    """The figures of both tasks."""
    for name, of_task in (("compare", results), ("compare-needle", read_json(NEEDLE))):
        curves: dict[str, list] = {}
        for row in split_rows(of_task)[0]:
            curves.setdefault(row["method"], []).append(row["curve"])
        figures.draw_compare(f"{name}.svg", curves)


# ------------------------------------------------------------------------------- all of it


def run_phase(name: str, jobs: list[Job], problems: Path, results: dict, args: Args) -> None:
    """Train and evaluate the runs that the results lack, and record them."""
    there = {(row["method"], row["lr"], row["seed"]) for row in results[name]}
    jobs = [job for job in jobs if job not in there]
    begun, stopped = time.perf_counter(), {}
    ended = on_cores(lambda job: train(job, args), jobs, args.jobs)
    for done, (job, why) in enumerate(ended, 1):
        left = (time.perf_counter() - begun) / 60 / done * (len(jobs) - done)
        print(f"{job.folder:30} {done}/{len(jobs)}, {left:.0f} min left  {why}", flush=True)
        stopped |= {job: why} if why else {}
    models = [cut(args.runs / job.folder, args)["weights"] for job in jobs if job not in stopped]
    start = TASKS[args.task].model
    if name == "rows" and "start" not in results:
        models.insert(0, start)
    evaluated = evaluate(models, problems, args)
    if start in evaluated:
        results["start"] = evaluated[start]
    for job in jobs:
        if job not in stopped:
            results[name].append(row_of(job, evaluated, args))
        elif name == "selection":
            results[name].append(job._asdict() | {"accuracy": None, "stopped": stopped[job]})
    order = list(METHODS)
    results[name].sort(key=lambda r: (order.index(r["method"]), float(r["lr"]), r["seed"]))
    write_json(args.results, results)
    if stopped and name == "rows":  # its rate was fine with the selection seeds
        sys.exit("\n".join(f"{job.folder} {why}" for job, why in stopped.items()))


def read_results(args: Args) -> dict:
    """The results so far; refuses to add runs made in another way."""
    names = ("steps", "prompts", "samples", "selection_seeds")
    fixed = {name: getattr(args, name) for name in names}
    fixed |= {"rates": sorted(args.rates, key=float), "settings": f"{args.settings} {CURVE}"}
    if not args.results.exists():
        return fixed | {"selection": [], "rows": []}
    results = read_json(args.results)
    if set(results["rates"]) < set(args.rates) and not args.write:
        results["rates"] = fixed["rates"]  # a wider grid needs more runs, and no other
    for name, value in fixed.items():
        if results[name] != value and not args.write:
            flag = "--" + name.replace("_", "-")
            refuse(flag, value, f"{args.results} was made with {results[name]}")
    return results


def check(args: Args) -> list[str]:
    """The methods asked for; refuses what cannot work."""
    shared.at_least(args, seeds=1, selection_seeds=1, steps=1, prompts=1, samples=8, jobs=1)
    if args.seeds > len(T_QUANTILE) + 1:
        refuse("--seeds", args.seeds, f"must be at most {len(T_QUANTILE) + 1}")
    for rate in args.rates:
        if not re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", rate) or not float(rate) > 0:
            refuse("--rates", rate, "must be numbers above 0")
    methods = shared.chosen("--only", args.only, METHODS)
    return [method for method in methods if args.only or method not in COSTLY]


def run_everything(args: Args, results: dict, methods: list[str]) -> None:
    """Choose a learning rate for each method, then measure it at that."""
    args.jobs = min(args.jobs, len(os.sched_getaffinity(0)))
    data = ROOT / TASKS[args.task].model
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    write_whole(args.runs / "train.jsonl", "".join(lines[:-VALIDATION]))
    validation = args.runs / "validation.jsonl"
    write_whole(validation, "".join(lines[-VALIDATION:]))
    about = shared.surroundings("torch", "vllm", "transformers")
    about["machine"] = f"{shared.cores(args.jobs)}, one run on each"
    # The default file is filled by many commands, each for a part of its methods.
    flags = sys.argv[1:] if args.results != Args.results else []
    results |= {"command": shlex.join(["python", "benchmark/compare.py", *flags])} | about
    if len(args.rates) > 1:
        seeds = range(SELECTION + 1, SELECTION + 1 + args.selection_seeds)
        whole = dict.fromkeys(RATE_OF.get(method, method) for method in methods)
        grid = [Job(method, lr, seed) for method in whole for lr in args.rates for seed in seeds]
        run_phase("selection", grid, validation, results, args)
    best = {m: chosen_rate(results["selection"], m, results["rates"])[0] for m in methods}
    also = TASKS[args.task].also
    for seed in range(1, 1 + args.seeds):  # each is measured and kept before the next begins
        jobs = [Job(m, lr, seed) for m in methods for lr in (best[m], also.get(m)) if lr]
        jobs = list(dict.fromkeys(jobs))  # the other rate may be the chosen one
        run_phase("rows", jobs, data / "test.jsonl", results, args)


def main(args: Args) -> None:
    methods, results = check(args), read_results(args)
    if not args.write:
        run_everything(args, results, methods)
    elif "start" not in results:
        refuse("--results", args.results, "holds no finished seed yet")
    else:
        for page in PAGES:
            shared.write_page(page, blocks(results))
        draw(results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
