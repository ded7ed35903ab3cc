"""Compare all methods on a small task: a learning rate for each, several seeds, equal rollouts.

    python benchmark/compare.py               # trains the runs that compare.json lacks
    python benchmark/compare.py --task needle --prompts 4 --rates 5e-5 1e-4 2e-4 4e-4 8e-4 \\
        --results benchmark/results/compare-needle.json --runs runs/compare-needle
    python benchmark/compare.py --write       # writes the tables and figures of the pages

Each method first trains once per learning rate and selection seed. The learning rate with the
highest accuracy on the validation problems is selected. The method then trains at that rate with
other seeds and is evaluated on the test problems. Run the same command again to resume an
interrupted comparison. docs/compare.md describes the rules and names the command of each table.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import shared
import tyro
from shared import RESULTS, ROOT, markdown, read_json, reject, write_json

from docs import figures

METHODS = {
    "GRPO": "grpo.py",
    "DAPO": "grpo.py --clip-high 0.28 --dynamic-sampling --overlong-buffer 8",
    "Dr. GRPO": "grpo.py --no-scale-rewards --loss-average constant",
    "EP-GRPO": "ep_grpo.py",
    "EP-GRPO gate alone": "ep_grpo.py --eta 0",
    # --gamma 0 sets every gate to 1/2. The other weights are halved too, so the loss is half the
    # loss without a gate. AdamW takes the same step for half the gradient.
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
EXPENSIVE = {"VinePPO by token"}  # runs only if --only names it
RATE_OF = {  # variants that use the learning rate of another method
    "EP-GRPO gate alone": "EP-GRPO",
    "EP-GRPO progress alone": "EP-GRPO",
    "VinePPO by token": "VinePPO",
}


class Task(NamedTuple):
    model: str  # folder of the model, with train.jsonl and test.jsonl
    max_new_tokens: int
    flags: dict[str, str]  # additional flags of a method
    second_rate: dict[str, str]  # measured in addition to the selected rate, if both were close


TASKS = {
    "sums": Task("tiny", 64, {}, {"EP-GRPO": "4e-4"}),
    "needle": Task("tiny/needle", 80, {"VinePPO": "--continuations 3"}, {}),
}
CURVE = "--eval-every 10 --eval-problems 64 --eval-samples 1"
NO_CURVE = "--eval-every 0 --eval-problems 1 --eval-samples 1"  # selection runs
RATES = ("1e-4", "2e-4", "4e-4", "8e-4", "16e-4")
GROUP = 8  # --group-size of the scripts, by default
EQUAL_TOKENS = RESULTS / "compare-tokens.json"
FEW_ROLLOUTS = RESULTS / "compare-few.json"
NEEDLE = RESULTS / "compare-needle.json"
NEEDLE_TOKENS = RESULTS / "compare-needle-tokens.json"
PAGES = ROOT / "README.md", ROOT / "docs" / "compare.md"
VALIDATION = 256  # the last rows of train.jsonl; no run trains on them
SELECTION = 100  # seeds above 100 are used for the selection of the learning rate
# 97.5% quantile of Student's t distribution with 1, 2, ... degrees of freedom.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FREE_CORES: queue.SimpleQueue[int] = queue.SimpleQueue()
for core in sorted(os.sched_getaffinity(0)):
    FREE_CORES.put(core)


@dataclass
class Args:
    task: Literal["sums", "needle"] = "sums"  # the task in tiny/, or the task in tiny/needle
    seeds: int = 5  # runs of each method at its learning rate, with seeds 1, 2, ... (2 to 10)
    selection_seeds: int = 1  # runs of each method at each learning rate, with seeds 101, 102, ...
    rates: tuple[str, ...] = RATES  # learning rates to select from; a single one is not selected
    steps: int = 40  # training steps; DAPO's runs are cut earlier, see docs/compare.md
    prompts: int = 16  # problems per training step, with 8 rollouts each
    samples: int = 8  # sampled answers to each of the 256 problems of an evaluation
    only: str = ""  # methods to run, separated by commas; empty: all except VinePPO by token
    jobs: int = 2  # parallel runs, each on its own core; at most the number of available cores
    results: Path = RESULTS / "compare.json"  # file of the results
    runs: Path = ROOT / "runs" / "compare"  # folder of the runs
    write: bool = False  # only write the tables and figures from the results

    @property
    def settings(self) -> str:
        """Flags that all methods share."""
        flags = f"--max-new-tokens {TASKS[self.task].max_new_tokens} --log-rollouts 0"
        if self.task == "sums":  # its model is the default
            return flags
        return f"--model {TASKS[self.task].model} {flags}"


class Job(NamedTuple):
    """One training run."""

    method: str
    lr: str
    seed: int

    @property
    def folder(self) -> str:
        name = re.sub(r"[^a-zö]+", "-", self.method.lower()).strip("-")
        return f"{name}-{self.lr}-{self.seed}"


# ------------------------------------------------------------------------------- runs


def training_command(job: Job, args: Args) -> list[str]:
    script, *flags = shlex.split(METHODS[job.method])
    flags += shlex.split(TASKS[args.task].flags.get(job.method, ""))
    flags += args.settings.split()
    flags += (NO_CURVE if job.seed > SELECTION else CURVE).split()
    if "--dynamic-sampling" in flags:
        # It samples more rollouts per step. The run is cut at a checkpoint within the budget.
        flags += ["--save-every", "1", "--keep-checkpoints", str(args.steps)]
    else:
        flags += ["--save-every", "0"]
    flags += ["--dataset", str(args.runs / "train.jsonl")]
    flags += ["--eval-dataset", str(args.runs / "validation.jsonl")]
    flags += ["--steps", str(args.steps), "--prompts-per-step", str(args.prompts)]
    flags += ["--lr", job.lr, "--seed", str(job.seed)]
    return shared.run_command(script, flags, args.runs / job.folder)


def run_on_free_core(command: list[str]) -> str:
    """Run a script with one thread on one core.

    Returns the reason if the script stopped itself, otherwise an empty string. Raises RuntimeError
    for any other failure.
    """
    core = FREE_CORES.get()
    os.sched_setaffinity(0, {core})  # affinity of this thread; the script inherits it
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    settings = {"cwd": ROOT, "env": os.environ | threads, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command], **settings)
    FREE_CORES.put(core)
    if done.returncode == 0:
        return ""
    stopped = re.search(r"^stopped: .*", done.stderr, re.MULTILINE)
    if done.returncode == 1 and stopped:
        return stopped[0]
    raise RuntimeError(f"python {shlex.join(command)} failed:\n{done.stderr[-2000:]}")


def train(job: Job, args: Args) -> str:
    """Train one run, unless it is complete. Returns the reason if the run stopped itself."""
    folder = args.runs / job.folder
    if (folder / "args.json").exists():
        steps = read_json(folder / "args.json")["steps"]
        if steps != args.steps:
            why = f"{folder.name} is a run of {steps} steps, not {args.steps}"
            reject("--runs", args.runs, why)
    if (folder / "model").exists():  # the last thing that a run writes
        return ""
    return run_on_free_core(training_command(job, args))


def train_all(jobs: list[Job], args: Args) -> dict[Job, str]:
    """Train runs in parallel. Returns a reason for each run that stopped itself."""
    stopped = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        reasons = pool.map(lambda job: train(job, args), jobs)
        for job, reason in zip(jobs, reasons, strict=True):
            print(f"{job.folder} {reason}", flush=True)
            if reason:
                stopped[job] = reason
    return stopped


class Cut(NamedTuple):
    """The part of a run that is within the budget of rollouts."""

    weights: Path
    step: int
    sampled: dict[int, int]  # rollouts sampled up to the step of each checkpoint


def cut(folder: Path, args: Args) -> Cut:
    """Cut a finished run after the last checkpoint that is within the budget."""
    import torch

    sampled, last = {}, 0
    for checkpoint in sorted(folder.glob("checkpoints/step-*")):
        state = torch.load(checkpoint / "trainer.pt", weights_only=True)
        step = int(checkpoint.name.removeprefix("step-"))
        sampled[step] = state["problems"]["position"] * GROUP
        if sampled[step] <= args.steps * args.prompts * GROUP:
            last = step
    if last == args.steps:
        return Cut(folder / "model", last, sampled)
    return Cut(folder / "checkpoints" / f"step-{last:06d}", last, sampled)


def evaluate(models: list[str], problems: Path, args: Args) -> dict[str, dict[str, float]]:
    """Accuracy, pass@8 and length of each model. tools/evaluate.py keeps finished evaluations."""
    output = args.runs / f"{problems.stem}-results.json"
    command = ["tools/evaluate.py", "--datasets", str(problems), "--samples", str(args.samples)]
    command += ["--k", "8", "--max-new-tokens", str(TASKS[args.task].max_new_tokens)]
    command += ["--folder", str(args.runs / "evaluations"), "--output", str(output)]
    command += ["--models", *models]
    run_on_free_core(command)
    evaluated = {}
    for row in read_json(output)["results"]:
        metrics = row["metrics"]
        evaluated[row["model"]] = {
            "accuracy": metrics[f"mean@{args.samples}"]["value"],
            "pass@8": metrics["pass@8"]["value"],
            "length": metrics["length"]["value"],
        }
    return evaluated


def result_row(job: Job, part: Cut, evaluated: dict[str, float], args: Args) -> dict[str, Any]:
    """The entry of a run in the results file."""
    lines = (args.runs / job.folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines[: part.step + 1]]
    steps = metrics[1:]  # the first line is the evaluation before training
    continuation_tokens = sum(row.get("value/tokens", 0) for row in steps)  # VinePPO
    tokens = part.sampled[part.step] * mean(steps, "length") + continuation_tokens
    curve = []  # validation accuracy by rollouts sampled
    for row in metrics:
        if "eval/accuracy" in row:
            without_resampling = row["step"] * args.prompts * GROUP
            sampled = part.sampled.get(row["step"], without_resampling)
            curve.append((sampled, row["eval/accuracy"]))
    found = job._asdict() | {"step": part.step, "rollouts": part.sampled[part.step]}
    found |= {name: round(value, 4) for name, value in evaluated.items()}
    entropy = round(mean(steps[-10:], "entropy"), 4)
    return found | {"entropy": entropy, "tokens": round(tokens), "curve": curve}


def select(rows: list[dict], **values: Any) -> list[dict]:
    """The rows that have the given values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def mean(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def validation_accuracy(selection: list[dict], method: str) -> dict[str, float]:
    """Mean accuracy over seeds by learning rate. A run that stopped itself counts as 0."""
    rows = sorted(select(selection, method=method), key=lambda row: float(row["lr"]))
    return {row["lr"]: mean(select(rows, lr=row["lr"]), "accuracy") for row in rows}


def selected_rate(results: dict, method: str) -> str:
    """The learning rate with the highest validation accuracy; the lower rate on a tie."""
    accuracy = validation_accuracy(results["selection"], RATE_OF.get(method, method))
    return max(accuracy, key=accuracy.get) if accuracy else results["rates"][0]


# ------------------------------------------------------------------------------- the pages


def at_selected_rates(results: dict) -> dict[str, list[dict]]:
    """The measured runs of each method at its learning rate."""
    runs: dict[str, list[dict]] = {}
    for row in results["rows"]:
        if row["lr"] == selected_rate(results, row["method"]):
            runs.setdefault(row["method"], []).append(row)
    return runs


def t_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the mean by Student's t distribution."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = T_QUANTILE[len(values) - 2] * error
    center = statistics.mean(values)
    return center - reach, center + reach


def differences(rows: list[dict], baseline: list[dict]) -> list[float]:
    """Accuracy minus the baseline's accuracy with the same seed, for each seed of both."""
    accuracy = {row["seed"]: row["accuracy"] for row in baseline}
    found = []
    for row in rows:
        if row["seed"] in accuracy:
            found.append(row["accuracy"] - accuracy[row["seed"]])
    return found


def versus(rows: list[dict], baseline: list[dict]) -> str:
    """The mean difference to the baseline and its interval; empty for the baseline itself."""
    values = differences(rows, baseline)
    if rows == baseline or len(values) < 2:
        return ""
    low, high = t_interval(values)
    return f"{statistics.mean(values):+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")


def table(results: dict) -> str:
    """Means over seeds of each method at its learning rate, and at its second rate, if any."""
    head = ["method", "learning rate", "accuracy", "pass@8", "entropy", "length", "tokens, M"]
    head.append("accuracy minus GRPO's")
    start, rates = results["start"], results["rates"]
    cells = f"{start['accuracy']:.3f}", f"{start['pass@8']:.3f}", "", f"{start['length']:.1f}"
    lines = [["before training", "", *cells, "", ""]]
    runs = at_selected_rates(results)
    for method, lr in dict.fromkeys((row["method"], row["lr"]) for row in results["rows"]):
        rows = select(results["rows"], method=method, lr=lr)
        rate = lr
        if rows != runs[method]:
            rate += " (not selected)"
        elif len(rates) > 1 and lr in (rates[0], rates[-1]):
            rate += " †"
        cells = [f"{mean(rows, name):.3f}" for name in ("accuracy", "pass@8", "entropy")]
        cells += [f"{mean(rows, 'length'):.1f}", f"{mean(rows, 'tokens') / 1e6:.2f}"]
        lines.append([method, rate, *cells, versus(rows, runs["GRPO"])])
    return markdown(head, lines)


def credit_table(sums: dict, needle: dict) -> str:
    """The credits of arca.py against its uniform credit, which trains the same adapters."""
    lines = []
    for method, command in METHODS.items():
        if command.startswith("arca.py") and method != "uniform credit":
            lines.append([method])
            for runs in (at_selected_rates(sums), at_selected_rates(needle)):
                lines[-1].append(versus(runs[method], runs["uniform credit"]))
    return markdown(["accuracy minus that of uniform credit", "sums", "needle"], lines)


def tokens_table(results: dict, longer: dict) -> str:
    """VinePPO, GRPO with as many rollouts and GRPO with as many tokens, on the same seeds."""
    runs, more = at_selected_rates(results), longer["rows"]
    seeds, lines = {row["seed"] for row in more}, []
    for method, rows in (("GRPO", runs["GRPO"]), ("VinePPO", runs["VinePPO"]), ("GRPO", more)):
        own = [row for row in rows if row["seed"] in seeds]
        tokens, accuracy = f"{mean(own, 'tokens') / 1e6:.2f}", f"{mean(own, 'accuracy'):.3f}"
        pass_8 = f"{mean(own, 'pass@8'):.3f}"
        lines.append([method, own[0]["step"], own[0]["rollouts"], tokens, accuracy, pass_8])
    head = ["method", "steps", "rollouts", "tokens, M", "accuracy", "pass@8"]
    caption = f"Means over {len(seeds)} seeds. `{longer['command']}`, {longer['machine']}."
    return f"{caption}\n\n{markdown(head, lines)}"


def caption(results: dict) -> str:
    """How the numbers of `table` were measured."""
    runs, steps = at_selected_rates(results), results["steps"]
    seeds = sorted({len(rows) for rows in runs.values()})
    text = f"Means over {' or '.join(map(str, seeds))} seeds; in brackets the 95% interval of the "
    text += "paired difference (Student's t). Learning rates tried on validation problems: "
    text += ", ".join(results["rates"]) + "."
    if "†" in table(results):
        text += " † marks the lowest or highest of these: a better rate may lie outside."
    text += f" Each run has {steps * results['prompts'] * GROUP} rollouts in {steps} steps"
    if "DAPO" in runs:
        cut_at = sorted(row["step"] for row in runs["DAPO"])
        fewest = min(row["rollouts"] for row in runs["DAPO"])
        text += f", DAPO at least {fewest} in {cut_at[0]} to {cut_at[-1]}"
    vllm = results["versions"]["vllm"]
    return f"{text}. `{results['command']}`, {results['machine']}, vLLM {vllm} for CPU."


def blocks(results: dict) -> dict[str, str]:
    """The results blocks of README.md and docs/compare.md."""
    few, needle = read_json(FEW_ROLLOUTS), read_json(NEEDLE)
    return {
        "compare": f"{caption(results)}\n\n{table(results)}",
        "compare-credit": credit_table(results, needle),
        "compare-tokens": tokens_table(results, read_json(EQUAL_TOKENS)),
        "compare-few": f"{caption(few)}\n\n{table(few)}",
        "compare-needle": f"{caption(needle)}\n\n{table(needle)}",
        "compare-needle-tokens": tokens_table(needle, read_json(NEEDLE_TOKENS)),
    }


def draw(results: dict) -> None:
    """Draw the figures of both tasks."""
    for name, of_task in (("compare", results), ("compare-needle", read_json(NEEDLE))):
        curves = {}
        for method, rows in at_selected_rates(of_task).items():
            curves[method] = [row["curve"] for row in rows]
        figures.draw_compare(f"{name}.svg", curves)


# ------------------------------------------------------------------------------- the comparison


def run_phase(name: str, jobs: list[Job], problems: Path, results: dict, args: Args) -> None:
    """Train and evaluate the runs that the results lack, and add them to the results.

    name: "selection" or "rows", the list of the results that the runs belong to.
    """
    finished = {(row["method"], row["lr"], row["seed"]) for row in results[name]}
    jobs = [job for job in jobs if job not in finished]
    stopped = train_all(jobs, args)
    parts, models = {}, []
    for job in jobs:
        if job not in stopped:
            parts[job] = cut(args.runs / job.folder, args)
            models.append(str(parts[job].weights))
    start = TASKS[args.task].model
    if name == "rows" and "start" not in results:
        models.append(start)
    evaluated = evaluate(models, problems, args) if models else {}
    if start in evaluated:
        results["start"] = evaluated[start]
    for job, part in parts.items():
        results[name].append(result_row(job, part, evaluated[str(part.weights)], args))
    if name == "selection":
        for job, reason in stopped.items():
            results[name].append(job._asdict() | {"accuracy": 0.0, "stopped": reason})
    order = list(METHODS)
    results[name].sort(key=lambda row: (order.index(row["method"]), float(row["lr"]), row["seed"]))
    write_json(args.results, results)
    if stopped and name == "rows":
        sys.exit("\n".join(f"{job.folder} {reason}" for job, reason in stopped.items()))


def read_results(args: Args) -> dict:
    """The results so far. Rejects settings that differ from those of the results."""
    names = ("steps", "prompts", "samples", "selection_seeds")
    fixed: dict[str, Any] = {name: getattr(args, name) for name in names}
    fixed["rates"] = sorted(args.rates, key=float)
    fixed["settings"] = f"{args.settings} {CURVE}"
    if not args.results.exists():
        return fixed | {"selection": [], "rows": []}
    results = read_json(args.results)
    if args.write:
        return results
    if set(results["rates"]) < set(args.rates):
        results["rates"] = fixed["rates"]  # finished runs remain valid in a wider grid
    for name, value in fixed.items():
        if results[name] != value:
            flag = "--" + name.replace("_", "-")
            reject(flag, value, f"{args.results} was made with {results[name]}")
    return results


def check(args: Args) -> list[str]:
    """Reject invalid settings; return the selected methods."""
    shared.require_at_least(args, seeds=1, selection_seeds=1, steps=1, prompts=1, samples=8, jobs=1)
    if args.seeds > len(T_QUANTILE) + 1:
        reject("--seeds", args.seeds, f"must be at most {len(T_QUANTILE) + 1}")
    for rate in args.rates:
        if not re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", rate) or not float(rate) > 0:
            reject("--rates", rate, "must be numbers above 0")
    methods = shared.parse_names("--only", args.only, METHODS)
    if args.only:
        return methods
    return [method for method in methods if method not in EXPENSIVE]


def run_everything(args: Args, results: dict, methods: list[str]) -> None:
    """Select a learning rate for each method, then measure the method at that rate."""
    args.jobs = min(args.jobs, len(os.sched_getaffinity(0)))
    data = ROOT / TASKS[args.task].model
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    shared.atomic_write(args.runs / "train.jsonl", "".join(lines[:-VALIDATION]))
    validation = args.runs / "validation.jsonl"
    shared.atomic_write(validation, "".join(lines[-VALIDATION:]))
    results.update(shared.environment("torch", "vllm", "transformers"))
    results["machine"] = f"{shared.describe_cores(args.jobs)}, one run on each"
    # Several commands, each for some of the methods, fill the default file.
    flags = [] if args.results == Args.results else sys.argv[1:]
    results["command"] = shlex.join(["python", "benchmark/compare.py", *flags])
    if len(args.rates) > 1:
        grid = []
        for method in dict.fromkeys(RATE_OF.get(method, method) for method in methods):
            for rate in args.rates:
                for seed in range(1, 1 + args.selection_seeds):
                    grid.append(Job(method, rate, SELECTION + seed))
        run_phase("selection", grid, validation, results, args)
    for seed in range(1, 1 + args.seeds):  # the results of a seed are saved before the next seed
        jobs = []
        for method in methods:
            rate = selected_rate(results, method)
            second_rate = TASKS[args.task].second_rate.get(method, rate)
            for lr in dict.fromkeys([rate, second_rate]):  # they may be equal
                jobs.append(Job(method, lr, seed))
        run_phase("rows", jobs, data / "test.jsonl", results, args)


def main(args: Args) -> None:
    methods = check(args)
    results = read_results(args)
    if not args.write:
        run_everything(args, results, methods)
    elif "start" not in results:
        reject("--results", args.results, "contains no finished seed yet")
    else:
        for page in PAGES:
            shared.write_page(page, blocks(results))
        draw(results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
