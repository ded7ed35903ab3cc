"""Compare all methods on a small task: a learning rate for each, several seeds, equal rollouts.

    python benchmark/compare.py               # trains the runs that compare.json lacks
    python benchmark/compare.py --task needle --prompts 4 --rates 5e-5 1e-4 2e-4 4e-4 8e-4 \\
        --results benchmark/results/compare-needle.json --runs runs/compare-needle
    python benchmark/compare.py --write       # writes the tables and figures of the pages

Each method first trains once per learning rate. The rate with the highest accuracy on the
validation problems is selected. The method then trains at that rate with other seeds and is
evaluated on the test problems. The same command resumes an interrupted comparison. docs/compare.md
describes the rules and names the command of each table.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import shared
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json

from docs import figures
from infra.cli import first_line, reject, require
from infra.run import read_lines

METHODS = {
    "GRPO": "grpo.py",
    "DAPO": "grpo.py --clip-high 0.28 --dynamic-sampling --overlong-buffer 8",
    "Dr. GRPO": "grpo.py --no-scale-rewards --loss-average constant",
    "EP-GRPO": "ep_grpo.py",
    "EP-GRPO without progress": "ep_grpo.py --eta 0",
    # --gamma 0 sets every gate to 1/2. The other weights are halved too, so the loss is half the
    # loss without a gate. AdamW takes the same step for half the gradient.
    "EP-GRPO without gate": "ep_grpo.py --gamma 0 --eta 0.1 --kl 0.0005 --max-grad-norm 0.5",
    "ERPO": "erpo.py",
    "GTPO": "gtpo.py",
    "GTPO by batch": "gtpo.py --scope batch",
    "GRPO-S": "gtpo.py --level sequence",
    "HölderPO": "holderpo.py",
    "GMPO": "holderpo.py --schedule constant --p-start 0 --clip-level token",
    "forking tokens": "forking.py",
    "λ-GRPO": "lambda_grpo.py",
    "REFT": "reft.py",
    "VinePPO": "vineppo.py",
    "VinePPO by token": "vineppo.py --step-end '(?s).'",  # every token is a step
    "ARCA": "arca.py",
    "uniform credit": "arca.py --credit uniform",
    "surprisal credit": "arca.py --credit surprisal",
    "entropy credit": "arca.py --credit entropy",
    "divergence credit": "arca.py --credit divergence",
    "STARE": "stare.py",
    "STARE C2": "stare.py --attenuate 0.9",
    # FIPO is DAPO in the first update of a step, so it takes four, as the two rows next to it do.
    "GRPO with 4 updates": "grpo.py --updates-per-rollout 4",
    "DAPO with 4 updates": "grpo.py --clip-high 0.28 --dynamic-sampling --overlong-buffer 8 "
    "--updates-per-rollout 4",
    "FIPO": "fipo.py --dynamic-sampling --overlong-buffer 8",
}
DEFAULT_METHODS = ",".join(name for name in METHODS if name != "VinePPO by token")  # expensive
RATE_OF = {  # variants that use the learning rate of another method
    "EP-GRPO without progress": "EP-GRPO",
    "EP-GRPO without gate": "EP-GRPO",
    "GTPO by batch": "GTPO",
    "VinePPO by token": "VinePPO",
    "STARE C2": "STARE",
}
BASELINES_OF_ARCA = {"surprisal credit", "entropy credit", "divergence credit"}


@dataclass
class Task:
    model: str  # folder of the model, with train.jsonl and test.jsonl
    max_new_tokens: int
    flags: str = ""  # additional flags of all methods
    method_flags: dict[str, str] = field(default_factory=dict)  # additional flags of a method
    # Rates measured in addition to the selected rate: close to it in selection, or GRPO's
    second_rate: dict[str, str] = field(default_factory=dict)
    validation: int = 256  # the last rows of train.jsonl; no run trains on them


TASKS = {
    "sums": Task("tiny", 64, second_rate={"EP-GRPO": "4e-4"}),
    "needle": Task("tiny/needle", 80, method_flags={"VinePPO": "--continuations 3"}),
    "real": Task(  # benchmark/real.py makes the folder
        "runs/real/model",
        24,
        flags="--precision bfloat16",
        second_rate={"GTPO": "1e-5", "forking tokens": "1e-5"},
        validation=96,
    ),
}
CURVE = "--eval-every 10 --eval-problems 64 --eval-samples 1"
NO_CURVE = "--eval-every 0 --eval-problems 1 --eval-samples 1"  # selection runs
RATES = ("1e-4", "2e-4", "4e-4", "8e-4", "16e-4")
GROUP = 8  # --group-size of the scripts, by default
SAMPLES = 8  # sampled answers to each problem of an evaluation
PAGES = ROOT / "README.md", ROOT / "docs" / "compare.md", ROOT / "docs" / "real.md"
SELECTION_SEED = 101  # of the runs that select the learning rate
# 97.5% quantile of Student's t distribution with 1, 2, ... degrees of freedom.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FREE_CORES: queue.SimpleQueue[int] = queue.SimpleQueue()
for core in sorted(os.sched_getaffinity(0)):
    FREE_CORES.put(core)


@dataclass
class Args:
    task: Literal["sums", "needle", "real"] = "sums"  # in tiny/, tiny/needle, or of docs/real.md
    seeds: int = 5  # runs of each method at its learning rate, with seeds 1, 2, ... (at most 10)
    rates: tuple[str, ...] = RATES  # learning rates to select from; a single one is not selected
    steps: int = 40  # training steps; DAPO's runs are cut earlier, see docs/compare.md
    prompts: int = 16  # problems per training step, with 8 rollouts each
    only: str = DEFAULT_METHODS  # methods to run, separated by commas
    jobs: int = 2  # parallel runs, each on its own core; at most the number of available cores
    results: Path = RESULTS / "compare.json"  # file of the results
    runs: Path = ROOT / "runs" / "compare"  # folder of the runs
    refresh: bool = False  # repeat seed 1 of the methods whose code has changed, see `repeat`
    write: bool = False  # only write the tables and figures from the results

    @property
    def settings(self) -> str:
        """Flags that all methods share."""
        task = TASKS[self.task]
        flags = f"--max-new-tokens {task.max_new_tokens} --log-rollouts 0 {task.flags}".strip()
        if self.task == "sums":  # its model is the default
            return flags
        return f"--model {task.model} {flags}"


class Job(NamedTuple):
    """One training run."""

    method: str
    lr: str
    seed: int

    @property
    def folder(self) -> str:
        name = re.sub(r"[^a-zöλ]+", "-", self.method.lower()).strip("-")
        return f"{name}-{self.lr}-{self.seed}"


def job_of(row: dict) -> Job:
    return Job(row["method"], row["lr"], row["seed"])


def code(method: str) -> str:
    """Digest of the code that a method's runs depend on."""
    return shared.training_code(METHODS[method].split()[0])


def run_folder(job: Job, args: Args) -> Path:
    return args.runs / code(job.method) / job.folder


def training_command(job: Job, args: Args) -> list[str]:
    script, *flags = shlex.split(METHODS[job.method])
    flags += shlex.split(TASKS[args.task].method_flags.get(job.method, ""))
    flags += args.settings.split()
    flags += (NO_CURVE if job.seed == SELECTION_SEED else CURVE).split()
    # Dynamic sampling takes more rollouts per step. `cut` then needs every step's checkpoint.
    every = int("--dynamic-sampling" in flags)
    flags += ["--save-every", str(every), "--keep-checkpoints", str(args.steps)]
    flags += ["--dataset", str(args.runs / "train.jsonl")]
    flags += ["--eval-dataset", str(args.runs / "validation.jsonl")]
    flags += ["--steps", str(args.steps), "--prompts-per-step", str(args.prompts)]
    flags += ["--lr", job.lr, "--seed", str(job.seed)]
    return shared.run_command(script, flags, run_folder(job, args))


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
    folder = run_folder(job, args)
    if (folder / "args.json").exists() and read_json(folder / "args.json")["steps"] != args.steps:
        reject("--steps", args.steps, f"{folder} is a run of another length")
    stopped = ""
    if not (folder / "model").exists():  # the last thing that a run writes
        stopped = run_on_free_core(training_command(job, args))
    print(f"{job.folder} {stopped}", flush=True)
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


def evaluate(model: Path, problems: Path, folder: Path, args: Args) -> dict[str, float]:
    """Accuracy, pass@8 and length. tools/evaluate.py keeps finished evaluations in the folder."""
    task = TASKS[args.task]
    command = ["tools/evaluate.py", "--models", str(model), "--datasets", str(problems)]
    command += ["--samples", str(SAMPLES), "--k", "8", *task.flags.split()]
    command += ["--max-new-tokens", str(task.max_new_tokens), "--folder", str(folder)]
    run_on_free_core(command)
    [result] = read_json(folder / "summary.json")["results"]
    columns = {"accuracy": f"mean@{SAMPLES}", "pass@8": "pass@8", "length": "length"}
    return {name: result["metrics"][key]["value"] for name, key in columns.items()}


def result_row(job: Job, part: Cut, evaluated: dict[str, float], args: Args) -> dict[str, Any]:
    """The entry of a run in the results file."""
    metrics = read_lines(run_folder(job, args) / "metrics.jsonl")[: part.step + 1]
    steps = metrics[1:]  # the first line is the evaluation before training
    continuation_tokens = sum(row.get("value/tokens", 0) for row in steps)  # VinePPO
    length = statistics.mean(row["length"] for row in steps)
    tokens = part.sampled[part.step] * length + continuation_tokens

    curve = []  # validation accuracy by rollouts sampled
    for row in metrics:
        if "eval/accuracy" in row:
            without_resampling = row["step"] * args.prompts * GROUP
            sampled = part.sampled.get(row["step"], without_resampling)
            curve.append((sampled, row["eval/accuracy"]))

    found = job._asdict() | {"step": part.step, "rollouts": part.sampled[part.step]}
    found |= {name: round(value, 4) for name, value in evaluated.items()}
    entropy = round(statistics.mean(row["entropy"] for row in steps[-10:]), 4)
    found |= {"entropy": entropy, "tokens": round(tokens), "curve": curve}
    return found | {"code": code(job.method)}


def selected_rate(results: dict, method: str) -> str:
    """The learning rate with the highest validation accuracy; the lower rate on a tie."""
    method = RATE_OF.get(method, method)
    rows = [row for row in results["selection"] if row["method"] == method]
    rows.sort(key=lambda row: float(row["lr"]))
    best = max(rows, key=lambda row: row["accuracy"], default={"lr": results["rates"][0]})
    return best["lr"]


def by_rate(results: dict) -> dict[tuple[str, str], pd.DataFrame]:
    """The measured runs of each method at each learning rate, indexed by seed."""
    rows = pd.DataFrame(results["rows"]).set_index("seed")
    return dict(iter(rows.groupby(["method", "lr"], sort=False)))


def at_selected_rates(results: dict) -> dict[str, pd.DataFrame]:
    """The measured runs of each method at its learning rate, indexed by seed."""
    runs = {}
    for (method, lr), rows in by_rate(results).items():
        if lr == selected_rate(results, method):
            runs[method] = rows
    return runs


def mean(rows: pd.DataFrame, name: str) -> float:
    """The mean of a column, exact: pandas' own may be rounded to another last digit."""
    return statistics.mean(rows[name].tolist())


def versus(rows: pd.DataFrame, baseline: pd.DataFrame) -> str:
    """The mean difference in accuracy to the baseline with the same seed, and its 95% interval.

    The interval is that of Student's t distribution. Empty for the baseline itself.
    """
    differences = (rows.accuracy - baseline.accuracy).dropna()  # of the seeds that both have
    if rows is baseline or len(differences) < 2:
        return ""
    center = statistics.mean(differences)
    reach = T_QUANTILE[len(differences) - 2] * differences.sem()
    text = f"{center:+.3f} [{center - reach:+.3f}, {center + reach:+.3f}]"
    return text.replace("-", "−")


def table(results: dict) -> str:
    """Means over seeds of each method at its learning rate, and at its second rate, if any."""
    head = ["method", "learning rate", "accuracy", "pass@8", "entropy", "length", "tokens, M"]
    head.append("accuracy minus GRPO's")
    start = results["start"]
    cells = f"{start['accuracy']:.3f}", f"{start['pass@8']:.3f}", "", f"{start['length']:.1f}"
    lines = [["before training", "", *cells, "", ""]]
    runs = by_rate(results)
    baseline = runs["GRPO", selected_rate(results, "GRPO")]
    for (method, lr), rows in runs.items():
        rate = lr if lr == selected_rate(results, method) else f"{lr} (not selected)"
        cells = [f"{mean(rows, name):.3f}" for name in ("accuracy", "pass@8", "entropy")]
        cells += [f"{mean(rows, 'length'):.1f}", f"{mean(rows, 'tokens') / 1e6:.2f}"]
        lines.append([method, rate, *cells, versus(rows, baseline)])
    return markdown(head, lines)


def accuracy_table(sums: dict, needle: dict) -> str:
    """README's table: accuracy on both tasks, with the difference to GRPO's.

    Only docs/compare.md has the variants that were not tuned and the other baselines of ARCA.
    """
    lines = [["before training"]]
    for results in (sums, needle):
        lines[0] += [f"{results['start']['accuracy']:.3f}", ""]
    tasks = at_selected_rates(sums), at_selected_rates(needle)
    for method in tasks[0]:
        if method in RATE_OF or method in BASELINES_OF_ARCA:
            continue
        lines.append([method])
        for runs in tasks:
            cells = ["not measured", ""]
            if method in runs:
                cells = [f"{mean(runs[method], 'accuracy'):.3f}"]
                cells.append(versus(runs[method], runs["GRPO"]))
            lines[-1] += cells
    return markdown(["method", "sums", "minus GRPO's", "needle", "minus GRPO's"], lines)


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
    runs, [more] = at_selected_rates(results), by_rate(longer).values()
    lines = []
    for method, rows in (("GRPO", runs["GRPO"]), ("VinePPO", runs["VinePPO"]), ("GRPO", more)):
        own = rows[rows.index.isin(more.index)]
        cells = [f"{mean(own, 'tokens') / 1e6:.2f}"]
        cells += [f"{mean(own, name):.3f}" for name in ("accuracy", "pass@8")]
        lines.append([method, own.step.iloc[0], own.rollouts.iloc[0], *cells])
    head = ["method", "steps", "rollouts", "tokens, M", "accuracy", "pass@8"]
    caption = f"Means over {len(more)} seeds. `{longer['command']}`, {longer['machine']}."
    return f"{caption}\n\n{markdown(head, lines)}"


def described(results: dict) -> str:
    """A table, and how its numbers were measured."""
    seeds = sorted({len(rows) for rows in at_selected_rates(results).values()})
    rollouts = results["steps"] * results["prompts"] * GROUP
    text = f"Means over {' or '.join(map(str, seeds))} seeds of at most {rollouts} rollouts and "
    text += f"{results['steps']} steps; in brackets the 95% interval of the paired difference. "
    text += f"Learning rates tried: {', '.join(results['rates'])}. "
    text += f"`{results['command']}`, {results['machine']}, vLLM {results['versions']['vllm']}."
    return f"{text}\n\n{table(results)}"


def read_table(name: str) -> dict:
    return read_json(RESULTS / f"compare-{name}.json")


def blocks(results: dict) -> dict[str, str]:
    """The results blocks of the pages."""
    needle = read_table("needle")
    return {
        "accuracy": accuracy_table(results, needle),
        "compare": described(results),
        "compare-credit": credit_table(results, needle),
        "compare-tokens": tokens_table(results, read_table("tokens")),
        "compare-few": described(read_table("few")),
        "compare-needle": described(needle),
        "compare-needle-tokens": tokens_table(needle, read_table("needle-tokens")),
        "compare-real": described(read_table("real")),
    }


def draw(results: dict) -> None:
    """Draw the figure of each task."""
    tasks = {"compare": results}
    tasks |= {f"compare-{name}": read_table(name) for name in ("needle", "real")}
    for name, of_task in tasks.items():
        runs = at_selected_rates(of_task)
        curves = {method: rows.curve.tolist() for method, rows in runs.items()}
        figures.draw_compare(f"{name}.svg", curves)


def run_phase(name: str, jobs: list[Job], problems: Path, results: dict, args: Args) -> None:
    """Train and evaluate the runs that the results lack; save the results after each run.

    name: "selection" or "rows", the list of the results that the runs belong to.
    """
    finished = set()
    for row in results[name]:
        if not args.refresh or row.get("code") == code(row["method"]):
            finished.add(job_of(row))
    jobs = [job for job in jobs if job not in finished]

    stopped = False
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda job: measure(job, problems, args), jobs):
            if name == "rows" and "stopped" in row:
                stopped = True
            else:
                add_row(results[name], row)
                write_json(args.results, results)
    if stopped:
        sys.exit("a measured run stopped itself; see above")


def measure(job: Job, problems: Path, args: Args) -> dict[str, Any]:
    """Train and evaluate a run. Returns the entry of the run in the results file."""
    folder = run_folder(job, args)
    reason = train(job, args)
    if reason:
        return job._asdict() | {"accuracy": 0.0, "stopped": reason, "code": code(job.method)}
    part = cut(folder, args)
    evaluated = evaluate(part.weights, problems, folder / "evaluation", args)
    return result_row(job, part, evaluated, args)


def add_row(rows: list[dict], row: dict) -> None:
    """Add the entry of a run, in place of an older entry of that run, and sort the entries."""
    rows[:] = [other for other in rows if job_of(other) != job_of(row)] + [row]
    order = list(METHODS)
    rows.sort(key=lambda row: (order.index(row["method"]), float(row["lr"]), row["seed"]))


def repeat(method: str, problems: Path, results: dict, args: Args) -> None:
    """Repeat seed 1 of a method if its code has changed since.

    If all its figures are the same, the code computes what it did, and all results of the method
    count as results of today's code. Otherwise the other seeds are trained again too.
    """
    job = Job(method, selected_rate(results, method), 1)
    before = result_of(job, results)
    if before is None or before.get("code") == code(method):
        return
    run_phase("rows", [job], problems, results, args)
    after = result_of(job, results)
    if shared.as_json(before | {"code": after["code"]}) == shared.as_json(after):
        for row in results["selection"] + results["rows"]:
            if row["method"] == method:
                row["code"] = after["code"]
        write_json(args.results, results)


def result_of(job: Job, results: dict) -> dict | None:
    for row in results["rows"]:
        if job_of(row) == job:
            return row
    return None


def run_everything(args: Args, results: dict, methods: list[str]) -> None:
    """Select a learning rate for each method, then measure the method at that rate."""
    args.jobs = min(args.jobs, len(os.sched_getaffinity(0)))
    task = TASKS[args.task]
    start, test = ROOT / task.model, ROOT / task.model / "test.jsonl"
    lines = (start / "train.jsonl").read_text().splitlines(keepends=True)
    validation = args.runs / "validation.jsonl"
    shared.write_text(args.runs / "train.jsonl", "".join(lines[: -task.validation]))
    shared.write_text(validation, "".join(lines[-task.validation :]))

    results.update(shared.environment())
    results["machine"] = f"{shared.describe_cores(args.jobs)}, one run on each"
    # `make tables` repeats the command that made the file, not those that added methods to it. The
    # default file may be filled by several commands, each for some of the methods.
    is_default = args.results == Args.results
    command = "python benchmark/compare.py" if is_default else shared.own_command()
    results.setdefault("command", command)

    if "start" not in results:
        results["start"] = evaluate(start, test, args.runs / "start", args)
    if args.refresh:
        for method in methods:
            repeat(method, test, results, args)

    if len(args.rates) > 1:
        grid = []
        for method in dict.fromkeys(RATE_OF.get(method, method) for method in methods):
            grid += [Job(method, rate, SELECTION_SEED) for rate in args.rates]
        run_phase("selection", grid, validation, results, args)

    for seed in range(1, 1 + args.seeds):
        jobs = []
        for method in methods:
            rate = selected_rate(results, method)
            second_rate = task.second_rate.get(method, rate)
            for lr in dict.fromkeys([rate, second_rate]):  # they may be equal
                jobs.append(Job(method, lr, seed))
        run_phase("rows", jobs, test, results, args)


def check(args: Args) -> list[str]:
    """Reject invalid settings; return the selected methods."""
    shared.require_at_least(args, seeds=1, steps=1, prompts=1, jobs=1)
    most = len(T_QUANTILE) + 1
    require(args.seeds <= most, "--seeds", args.seeds, f"must be at most {most}")
    for rate in args.rates:
        is_rate = re.fullmatch(r"\d*\.?\d+(e-?\d+)?", rate) is not None
        require(is_rate, "--rates", rate, "is not a learning rate")
    has_model = args.write or (ROOT / TASKS[args.task].model / "train.jsonl").exists()
    require(has_model, "--task", args.task, "needs its model: python benchmark/real.py")
    return shared.parse_names("--only", args.only, METHODS)


def read_results(args: Args) -> dict:
    """The results so far. Rejects settings that differ from those of the results."""
    settings: dict[str, Any] = {"steps": args.steps, "prompts": args.prompts}
    settings |= {"rates": sorted(args.rates, key=float), "settings": f"{args.settings} {CURVE}"}
    if not args.results.exists():
        return settings | {"selection": [], "rows": []}

    try:
        results = read_json(args.results)
    except (OSError, ValueError) as error:
        reject("--results", args.results, f"cannot be read: {first_line(error)}")

    of_compare = "holds no results of benchmark/compare.py"
    require("rows" in results, "--results", args.results, of_compare)
    if args.write:
        require(results["rows"], "--results", args.results, "contains no finished seed yet")
        return results

    if set(results["rates"]) < set(args.rates):
        results["rates"] = settings["rates"]  # finished runs remain valid in a wider grid
    for name, value in settings.items():
        made_with = f"{args.results} was made with {results[name]}"
        require(results[name] == value, f"--{name}", value, made_with)
    return results


def main(args: Args) -> None:
    methods = check(args)
    results = read_results(args)
    if args.write:
        for page in PAGES:
            shared.write_page(page, blocks(results))
        draw(results)
    else:
        run_everything(args, results, methods)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
