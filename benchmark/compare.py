"""Every method on the tiny task on equal terms: a learning rate chosen for each, several seeds.

    python benchmark/compare.py               # trains what benchmark/results/compare.json lacks
    python benchmark/compare.py --write       # puts its numbers into README.md and docs/compare.md

First each method trains once for every learning rate and selection seed; the rate with the highest
accuracy on the validation problems is its own. Then it trains at that rate with other seeds, and is
measured on the test problems. It can be stopped and started again at any time. See docs/compare.md.
"""

from __future__ import annotations

import json
import math
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tyro

ROOT = Path(__file__).resolve().parents[1]
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
    "ARCA": "arca.py",
    "uniform credit": "arca.py --credit uniform",
    "surprisal credit": "arca.py --credit surprisal",
    "entropy credit": "arca.py --credit entropy",
    "divergence credit": "arca.py --credit divergence",
}
# Ablations: they take another method's learning rate.
RATE_OF = {"EP-GRPO gate alone": "EP-GRPO", "EP-GRPO progress alone": "EP-GRPO"}
SETTINGS = "--max-new-tokens 64 --log-rollouts 0"
CURVE = "--eval-every 10 --eval-problems 64 --eval-samples 1"
NO_CURVE = "--eval-every 0 --eval-problems 1 --eval-samples 1"  # of the runs for the choice
PROMPTS, GROUP = 16, 8  # what the scripts take by default
TEST = ROOT / "tiny" / "test.jsonl"
VALIDATION = 256  # the last rows of tiny/train.jsonl, which no run trains on
SELECTION = 100  # seeds above this one are for the choice
PHASES = ("selection", "rows")
# 97.5% quantile of Student's t distribution with 1, 2, ... degrees of freedom.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Args:
    seeds: int = 5
    """runs of each method at its learning rate, with seeds 1, 2, ... (2 to 10)"""
    selection_seeds: int = 1
    """runs of each method at each learning rate, with seeds 101, 102, ..."""
    rates: tuple[str, ...] = ("1e-4", "2e-4", "4e-4", "8e-4", "16e-4")
    """learning rates to choose from; with one, nothing is chosen; later more can be added"""
    steps: int = 40
    """training steps of 16 problems with 8 rollouts each; DAPO takes fewer: see docs/compare.md"""
    samples: int = 8
    """sampled answers to each of the 256 problems of an evaluation"""
    only: str = ""
    """methods to run, separated by commas; empty: all"""
    jobs: int = 2
    """runs at a time, each on a core of its own; never more than the cores allowed"""
    results: Path = ROOT / "benchmark" / "results" / "compare.json"
    """file of the results"""
    runs: Path = ROOT / "runs" / "compare"
    """folder of the runs"""
    write: bool = False
    """only write the tables and the figure from the results"""


class Job(NamedTuple):
    """One training run."""

    method: str
    lr: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{re.sub(r'[^a-zö]+', '-', self.method.lower()).strip('-')}-{self.lr}-{self.seed}"


# ------------------------------------------------------------------------------- training

CHILDREN: list[subprocess.Popen] = []  # to be ended with this process


def training_command(job: Job, args: Args) -> list[str]:
    script, *own = shlex.split(METHODS[job.method])
    # Dynamic sampling draws more rollouts a step: a checkpoint a step lets us cut at the budget.
    saves = ["--save-every", "1", "--keep-checkpoints", str(args.steps)]
    saves = saves if "--dynamic-sampling" in own else ["--save-every", "0"]
    data = ["--dataset", str(args.runs / "train.jsonl")]
    data += ["--eval-dataset", str(args.runs / "validation.jsonl")]
    settings = f"{SETTINGS} {NO_CURVE if job.seed > SELECTION else CURVE}"
    run = ["--steps", str(args.steps), "--lr", job.lr, "--seed", str(job.seed)]
    return [script, *own, *settings.split(), *saves, *data, *run]


def run_on_this_core(command: list[str]) -> str:
    """Run a script with one thread, on the core of the calling thread. Returns why it stopped
    itself, if it did; raises RuntimeError on any other failure."""
    core = min(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | threads,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    CHILDREN.append(process)
    _, errors = process.communicate()
    CHILDREN.remove(process)
    if process.returncode == 0:
        return ""
    stopped = re.search(r"^stopped: .*", errors, re.MULTILINE)
    if process.returncode == 1 and stopped:
        return stopped[0]
    raise RuntimeError(f"python {shlex.join(command)} failed:\n{errors[-2000:]}")


def on_cores(work: Callable[[Any], Any], items: list[Any], jobs: int) -> Iterator[tuple[Any, Any]]:
    """(item, work(item)) as they end: one thread a core, which what it starts inherits."""
    cores = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    pool = ThreadPoolExecutor(
        min(jobs, cores.qsize()), initializer=lambda: os.sched_setaffinity(0, {cores.get()})
    )
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # on a failure or Ctrl-C: what has ended is recorded, the rest runs again next time
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(CHILDREN):
            process.terminate()


def train(job: Job, args: Args) -> str:
    """Train a run unless it is there whole; why it stopped itself, if it did."""
    folder = args.runs / job.folder
    if (folder / "args.json").exists():
        steps = json.loads((folder / "args.json").read_text())["steps"]
        if steps != args.steps:
            refuse("runs", args.runs, f"{folder.name} is a run of {steps} steps, not {args.steps}")
    if (folder / "model").exists():  # which is given its name when it is whole
        return ""
    command = training_command(job, args)
    return run_on_this_core([*command, "--resume", "--run-dir", str(folder)])


# ------------------------------------------------------------------------------- evaluation


def within_budget(drawn: dict[int, int], budget: int) -> int:
    """The last step by which no more rollouts were drawn than the budget allows.

    drawn: rollouts drawn since the start, by step.
    """
    return max(step for step, rollouts in drawn.items() if rollouts <= budget)


def cut(folder: Path, args: Args) -> dict[str, Any]:
    """The weights of a finished run that are within the budget: where they lie, after which step,
    and how many rollouts had been drawn by then. Written down once; checkpoints that are not
    needed are removed."""
    found = folder / "cut.json"
    if not found.exists():
        import torch

        budget = args.steps * PROMPTS * GROUP
        checkpoints = {int(f.name[5:]): f for f in folder.glob("checkpoints/step-*")}
        drawn = {
            step: torch.load(saved / "trainer.pt", weights_only=True)["position"] * GROUP
            for step, saved in checkpoints.items()
        }
        step = within_budget(drawn, budget)
        # model/ is the last checkpoint, with LoRA added in.
        weights = folder / "model" if step == args.steps else checkpoints[step]
        said = {"weights": str(weights), "step": step, "drawn": dict(sorted(drawn.items()))}
        write_whole(found, json.dumps(said))
        for saved in set(checkpoints.values()) - {weights}:
            shutil.rmtree(saved)
    return json.loads(found.read_text())


def evaluate(models: list[str], problems: Path, args: Args) -> dict[str, dict[str, float]]:
    """Accuracy, pass@8 and length of models by their folders: one engine a core, each with its
    share of them. tools/evaluate.py keeps what it has done."""
    command = ["tools/evaluate.py", "--datasets", str(problems), "--samples", str(args.samples)]
    command += ["--k", "8", "--max-new-tokens", "64", "--folder", str(args.runs / "evaluations")]
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
        for found in json.loads(output.read_text())["results"]
    }


def row_of(job: Job, evaluated: dict[str, dict[str, float]], args: Args) -> dict[str, Any]:
    """What the results say of a run."""
    folder, per_step = args.runs / job.folder, PROMPTS * GROUP
    at = cut(folder, args)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines][: at["step"] + 1]
    steps = metrics[1:]
    return {
        **job._asdict(),
        "step": at["step"],
        "rollouts": at["drawn"][str(at["step"])],
        **{name: round(value, 4) for name, value in evaluated[at["weights"]].items()},
        "entropy": round(statistics.mean(row["entropy"] for row in steps[-10:]), 4),
        "step_seconds": round(statistics.median(row["seconds/step"] for row in steps), 3),
        "tokens_per_step": round(per_step * statistics.mean(row["length"] for row in steps)),
        "curve": [  # validation accuracy by rollouts drawn
            (at["drawn"].get(str(row["step"]), row["step"] * per_step), row["eval/accuracy"])
            for row in metrics
            if "eval/accuracy" in row
        ],
    }


# ------------------------------------------------------------------------------- choosing


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
    grid = sorted(rates, key=float)
    return best, best in (grid[0], grid[-1])


def split_rows(results: dict) -> tuple[list[dict], list[dict]]:
    """The measured runs at the chosen learning rates, and those at others, which an earlier and
    smaller grid chose."""
    grid, selection = results["rates"], results["selection"]
    chosen = {m: chosen_rate(selection, m, grid)[0] for m in METHODS}
    at_chosen = [row for row in results["rows"] if row["lr"] == chosen[row["method"]]]
    return at_chosen, [row for row in results["rows"] if row not in at_chosen]


def t_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the mean by Student's t distribution: of paired differences, or of runs."""
    reach = T_QUANTILE[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return mean - reach, mean + reach


# ------------------------------------------------------------------------------- all of it


def store(results: dict, path: Path) -> None:
    """Write the results, a line for each run."""
    head = {name: value for name, value in results.items() if name not in PHASES}
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    for name in PHASES:
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in results[name])
        text += f',\n "{name}": [\n  {lines}\n ]'
    write_whole(path, text + "\n}\n")


def write_whole(path: Path, text: str) -> None:
    """A reader, or a start after a kill, never sees a part of the file."""
    partial = path.with_name(path.name + ".unfinished")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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
    if name == "rows" and "start" not in results:
        models.insert(0, "tiny")
    evaluated = evaluate(models, problems, args)
    if "tiny" in evaluated:
        results["start"] = evaluated["tiny"]
    for job in jobs:
        if job not in stopped:
            results[name].append(row_of(job, evaluated, args))
        elif name == "selection":
            results[name].append(job._asdict() | {"accuracy": None, "stopped": stopped[job]})
    order = list(METHODS)
    results[name].sort(key=lambda r: (order.index(r["method"]), float(r["lr"]), r["seed"]))
    store(results, args.results)
    if stopped and name == "rows":  # its rate was fine with the selection seeds
        sys.exit("\n".join(f"{job.folder} {why}" for job, why in stopped.items()))


def other_than_default(args: Args) -> list[str]:
    """The flags that shape the results, where they are not at their defaults."""
    flags = []
    for name in ("seeds", "selection_seeds", "rates", "steps", "samples"):
        if (value := getattr(args, name)) != getattr(Args, name):
            values = value if isinstance(value, tuple) else (value,)
            flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def read_results(args: Args) -> dict:
    """The results so far; refuses to add runs made in another way."""
    fixed = {name: getattr(args, name) for name in ("steps", "samples", "selection_seeds")}
    fixed |= {"rates": sorted(args.rates, key=float), "settings": f"{SETTINGS} {CURVE}"}
    if not args.results.exists():
        return fixed | {"selection": [], "rows": []}
    results = json.loads(args.results.read_text())
    if set(results["rates"]) < set(args.rates) and not args.write:
        results["rates"] = fixed["rates"]  # a wider grid needs more runs, and no other
    for name, value in fixed.items():
        if results[name] != value and not args.write:
            refuse(name, value, f"{args.results} was made with {results[name]}")
    return results


def refuse(name: str, value: Any, why: str) -> NoReturn:
    """One line that names the flag and the value, then exit code 2."""
    print(f"error: --{name.replace('_', '-')} {value}: {why}", file=sys.stderr)
    sys.exit(2)


def check(args: Args) -> list[str]:
    """The methods asked for; refuses what cannot work."""
    chosen = args.only.split(",") if args.only else list(METHODS)
    for unknown in set(chosen) - set(METHODS):
        refuse("only", unknown, f"known are {', '.join(METHODS)}")
    least = {"seeds": 1, "selection_seeds": 1, "steps": 1, "samples": 8, "jobs": 1}
    for name, minimum in least.items():
        if getattr(args, name) < minimum:
            refuse(name, getattr(args, name), f"must be at least {minimum}")
    if args.seeds > len(T_QUANTILE) + 1:
        refuse("seeds", args.seeds, f"must be at most {len(T_QUANTILE) + 1}")
    for rate in args.rates:
        if not re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", rate) or not float(rate) > 0:
            refuse("rates", rate, "must be numbers above 0")
    return chosen


def run_everything(args: Args, results: dict, chosen: list[str]) -> None:
    """Choose a learning rate for each method, then measure it at that."""
    args.jobs = min(args.jobs, len(os.sched_getaffinity(0)))
    args.runs.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    write_whole(args.runs / "train.jsonl", "".join(lines[:-VALIDATION]))
    validation = args.runs / "validation.jsonl"
    write_whole(validation, "".join(lines[-VALIDATION:]))
    results |= {
        "command": shlex.join(["python", "benchmark/compare.py", *other_than_default(args)]),
        "machine": f"{args.jobs} cores, {platform.machine()}, one run on each",
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "vllm": version(packages_distributions()["vllm"][0]),
            "transformers": version("transformers"),
        },
    }
    if len(args.rates) > 1:
        seeds = range(SELECTION + 1, SELECTION + 1 + args.selection_seeds)
        choosing = [method for method in chosen if method not in RATE_OF]
        grid = [Job(method, lr, seed) for method in choosing for lr in args.rates for seed in seeds]
        run_phase("selection", grid, validation, results, args)
    best = {m: chosen_rate(results["selection"], m, results["rates"])[0] for m in chosen}
    for seed in range(1, 1 + args.seeds):  # each is measured and kept before the next begins
        run_phase("rows", [Job(m, best[m], seed) for m in chosen], TEST, results, args)


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended too
    import compare_pages  # which needs this module

    chosen, results = check(args), read_results(args)
    if args.write and "start" not in results:
        refuse("results", args.results, "holds no finished seed yet")
    if args.write:
        for page, text in compare_pages.filled_pages(results).items():
            write_whole(ROOT / page, text)
        subprocess.run([sys.executable, "docs/figures_runs.py", "compare"], cwd=ROOT, check=True)
    else:
        run_everything(args, results, chosen)
    print(compare_pages.table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
