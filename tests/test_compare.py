"""benchmark/compare.py: its rules by hand, its tables, and two methods from start to end."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pandas as pd
import pytest
import shared
import torch
from compare import Args, Job
from conftest import ROOT, needs_vllm

RATES = ["1e-4", "2e-4", "4e-4"]
ABOUT = {"steps": 2, "prompts": 4, "command": "c", "machine": "m", "versions": {"vllm": "1"}}
START = {"start": {"accuracy": 0.4, "pass@8": 0.9, "length": 41.0}}


def row(method: str, lr: str, seed: int, accuracy: float, **other: float) -> dict[str, Any]:
    values = {"pass@8": 0.95, "entropy": 0.05, "length": 40.0, "tokens": 2e5, "step": 2}
    values |= {"rollouts": 64, "method": method, "lr": lr, "seed": seed, "accuracy": accuracy}
    return values | other


def selection(method: str, *accuracy: float) -> list[dict[str, Any]]:
    """Rows with these accuracies at RATES."""
    return [row(method, lr, 101, value) for lr, value in zip(RATES, accuracy, strict=True)]


# ------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("accuracy", "best"),
    [
        ((0.5, 0.6, 0.7), "4e-4"),
        ((0.5, 0.7, 0.7), "2e-4"),  # the lower rate on a tie
        ((0.5, 0.4, 0.0), "1e-4"),  # the last run stopped itself
    ],
)
def test_selection_of_the_learning_rate(accuracy, best):
    rows = selection("M", *accuracy)[::-1] + selection("N", 1.0, 0.0, 0.0)
    assert compare.selected_rate({"selection": rows, "rates": RATES}, "M") == best


def test_an_ablation_takes_the_rate_of_the_full_method(monkeypatch):
    assert set(compare.RATE_OF) | set(compare.RATE_OF.values()) <= set(compare.METHODS)
    monkeypatch.setitem(compare.RATE_OF, "half of M", "M")
    results = {"selection": selection("M", 0.5, 0.7, 0.6), "rates": RATES}
    assert compare.selected_rate(results, "half of M") == "2e-4"
    assert compare.selected_rate({"selection": [], "rates": ["2e-4"]}, "M") == "2e-4"


def test_expensive_methods_run_only_if_named():
    assert set(compare.check(Args())) == set(compare.METHODS) - {"VinePPO by token"}
    assert compare.check(Args(only="GRPO,VinePPO by token")) == ["GRPO", "VinePPO by token"]


def accuracies(*values: float | None) -> pd.DataFrame:
    """Runs with seeds 1, 2, ... and these accuracies; None: there is no run with that seed."""
    runs = pd.DataFrame({"accuracy": values}, range(1, 1 + len(values)), dtype=float)
    return runs.dropna()


def test_paired_interval_by_hand():
    # Differences 1, 2, 3, 4, 5: mean 3, variance 2.5, standard error sqrt(2.5 / 5) = sqrt(0.5).
    assert 3 - 2.776 * math.sqrt(0.5) == pytest.approx(1.037, abs=1e-3)
    found = compare.versus(accuracies(1, 2.5, 3, 4, 5), accuracies(0, 0.5, 0, 0, 0))
    assert found == "+3.000 [+1.037, +4.963]"
    same = accuracies(0.5, 0.25)
    assert compare.versus(same, accuracies(1, 0.75)) == "−0.500 [−0.500, −0.500]"
    assert compare.versus(same, same) == ""


def test_quantiles_of_t_by_their_density():
    """97.5% of each density, by the trapezoid rule, lies below the quantile."""
    for freedom, quantile in enumerate(compare.T_QUANTILE, 1):
        x = np.linspace(0, quantile, 200_001)
        gamma = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = math.exp(gamma) / math.sqrt(freedom * math.pi)
        density = density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=1e-4)


def test_differences_are_paired_by_seed():
    baseline = accuracies(0.9, 0.5, None, 0.5)[::-1]  # has no seed 3
    found = compare.versus(accuracies(1.0, 0.6, 0.1), baseline)
    assert found == "+0.100 [+0.100, +0.100]"
    assert compare.versus(accuracies(1.0), baseline) == ""  # one seed has no interval


@pytest.mark.parametrize(("steps", "last"), [(4, 3), (5, 4)])
def test_a_run_is_cut_within_the_budget(tmp_path, steps, last):
    for step, position in enumerate((2, 6, 8, 10), 1):  # problems taken
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        torch.save({"problems": {"position": position}}, folder / "trainer.pt")
    part = compare.cut(tmp_path, Args(steps=steps, prompts=2))
    assert (part.step, part.sampled) == (last, {1: 16, 2: 48, 3: 64, 4: 80})
    assert part.weights == tmp_path / "checkpoints" / f"step-{last:06d}"
    assert compare.cut(tmp_path, Args(steps=4, prompts=3)).weights == tmp_path / "model"


# ------------------------------------------------------------------------------- the commands


def flags_of(method: str, args: Args) -> dict[str, str]:
    return dict(itertools.pairwise(compare.training_command(Job(method, "2e-4", 1), args)))


@pytest.mark.parametrize("method", compare.METHODS)
def test_flags_of_a_run(method, tmp_path):
    sums, needle = Args(prompts=2, runs=tmp_path), Args(task="needle", runs=tmp_path)
    flags = flags_of(method, sums)
    assert flags["--prompts-per-step"] == "2" and flags["--max-new-tokens"] == "64"
    resamples = "--dynamic-sampling" in compare.METHODS[method]
    assert flags["--save-every"] == ("1" if resamples else "0")
    assert not {"--model", "--continuations"} & set(flags)
    flags = flags_of(method, needle)
    assert (flags["--model"], flags["--max-new-tokens"]) == ("tiny/needle", "80")
    assert flags.get("--continuations") == ("3" if method == "VinePPO" else None)


def test_a_task_has_a_model_and_problems():
    for task in (compare.TASKS["sums"], compare.TASKS["needle"]):
        folder = ROOT / task.model
        assert all((folder / name).exists() for name in ("config.json", "test.jsonl"))
        assert len((folder / "train.jsonl").read_text().splitlines()) > 2 * task.validation


@pytest.mark.parametrize(("selected", "measured"), [("4e-4", ["4e-4"]), ("8e-4", ["8e-4", "4e-4"])])
def test_the_second_rate_is_measured_once(selected, measured, tmp_path, monkeypatch):
    phases = []
    monkeypatch.setattr(compare, "run_phase", lambda name, jobs, *_: phases.append(jobs))
    monkeypatch.setattr(compare, "evaluate", lambda *_: {})
    args = Args(rates=(selected,), seeds=2, runs=tmp_path, results=tmp_path / "x.json")
    results = compare.read_results(args) | {"command": "the first"}
    compare.run_everything(args, results, ["EP-GRPO"])
    assert results["command"] == "the first"
    assert phases == [[Job("EP-GRPO", lr, seed) for lr in measured] for seed in (1, 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": "GRPO,PPO"}, "--only PPO"),
        ({"steps": 0}, "--steps 0"),
        ({"seeds": 11}, "--seeds 11"),
    ],
)
def test_a_mistake_is_one_line(settings, message, rejection):
    assert rejection(compare.check, Args(**settings)).startswith(message)


def test_a_task_without_its_model_is_rejected(tmp_path, monkeypatch, rejection):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    line = rejection(compare.check, Args(task="real"))
    assert line == "--task real: needs its model: python benchmark/real.py"


@pytest.mark.parametrize("rate", ["x", "1e", "-1e-4", "nan"])
def test_what_is_no_learning_rate_is_rejected(rate, rejection):
    line = rejection(compare.check, Args(rates=("1e-4", rate)))
    assert line == f"--rates {rate}: is not a learning rate"
    compare.check(Args(rates=("1e-4", "0.001", "2")))


def test_an_evaluation_is_read_from_its_own_folder(tmp_path, monkeypatch):
    def run(command: list[str]) -> None:
        flags = dict(itertools.pairwise(command))
        assert flags["--models"] == "a/model" and flags["--precision"] == "bfloat16"
        assert flags["--samples"] == "8" and flags["--max-new-tokens"] == "24"
        assert flags["--datasets"] == str(tmp_path / "test.jsonl")
        values = {f"mean@{compare.SAMPLES}": 0.5, "pass@8": 1.0, "length": 5.0, "greedy": 0.25}
        metrics = {name: {"value": value} for name, value in values.items()}
        summary = Path(flags["--folder"]) / "summary.json"
        summary.write_text(json.dumps({"results": [{"model": "a/model", "metrics": metrics}]}))

    monkeypatch.setattr(compare, "run_on_free_core", run)
    args = Args(task="real", runs=tmp_path)
    found = compare.evaluate(Path("a/model"), tmp_path / "test.jsonl", tmp_path, args)
    assert found == {"accuracy": 0.5, "pass@8": 1.0, "length": 5.0}


# ------------------------------------------------------------------------------- what is kept
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 41}, "--steps 41"),
        ({"task": "needle"}, "--settings --model tiny/needle"),
        ({"task": "real"}, "--settings --model runs/real/model"),
        ({"rates": ("1e-4", "2e-4")}, "--rates"),  # without 4e-4, which has runs
        ({"rates": ("1e-4", "2e-4", "4e-4")}, ""),  # a wider grid keeps what was measured
    ],
)
def test_results_are_of_one_kind(changed, message, tmp_path, rejection):
    results, rates = tmp_path / "compare.json", ("2e-4", "4e-4")
    first = compare.read_results(Args(results=results, rates=rates))
    shared.write_json(results, first | {"selection": [row("GRPO", "2e-4", 101, 0.5)]})
    args = Args(**{"results": results, "rates": rates} | changed)
    if message:
        assert rejection(compare.read_results, args).startswith(message)
    else:
        found = compare.read_results(args)
        assert found["rates"] == list(args.rates) and len(found["selection"]) == 1


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("{}", "holds no results of benchmark/compare.py"),
        ("[]", "holds no results of benchmark/compare.py"),
        (None, "cannot be read: [Errno 21] Is a directory"),
    ],
)
@pytest.mark.parametrize("write", [True, False])
def test_another_file_as_results(write, text, cause, tmp_path, rejection):
    results = tmp_path
    if text is not None:
        results = tmp_path / "other.json"
        results.write_text(text)
    line = rejection(compare.read_results, Args(results=results, write=write))
    assert line.startswith(f"--results {results}: {cause}")


def finished_row(job: Job, *_: Any) -> dict:
    return job._asdict() | {"code": compare.code(job.method)}


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    """Seed 1 has a row and seed 2 a model; seed 3 was interrupted."""
    args = Args(results=tmp_path / "compare.json", runs=tmp_path / "runs", steps=2, jobs=1)
    jobs = [Job("GRPO", "2e-4", seed) for seed in (1, 2, 3)]
    for job in jobs[1:]:
        compare.run_folder(job, args).mkdir(parents=True)
        (compare.run_folder(job, args) / "args.json").write_text('{"steps": 2}')
    (compare.run_folder(jobs[1], args) / "model").mkdir()
    (compare.run_folder(jobs[2], args) / "model.unfinished").mkdir()
    started = []
    monkeypatch.setattr(compare, "run_on_free_core", lambda c: started.append(c[-2:]) or "")
    monkeypatch.setattr(compare, "cut", lambda folder, args: compare.Cut(folder, 2, {}))
    monkeypatch.setattr(compare, "evaluate", lambda *_: {})
    monkeypatch.setattr(compare, "result_row", finished_row)
    results = compare.read_results(args) | {"rows": [jobs[0]._asdict()]}
    compare.run_phase("rows", jobs, ROOT / "tiny" / "test.jsonl", results, args)
    assert started == [["--resume", str(compare.run_folder(jobs[2], args))]]
    assert [row["seed"] for row in shared.read_json(args.results)["rows"]] == [1, 2, 3]
    args.refresh, started[:] = True, []  # seed 1 has another code now, the others have this one
    results["rows"][0]["code"] = "other"
    compare.run_phase("rows", jobs, ROOT / "tiny" / "test.jsonl", results, args)
    assert [command[-1] for command in started] == [str(compare.run_folder(jobs[0], args))]
    assert [row["seed"] for row in results["rows"]] == [1, 2, 3]
    assert {row["code"] for row in results["rows"]} == {compare.code("GRPO")}
    with pytest.raises(SystemExit):  # a run of another length
        compare.train(jobs[1], Args(runs=args.runs, steps=3))


@pytest.mark.parametrize("name", ["selection", "rows"])
def test_each_run_is_saved_when_it_is_measured(name, tmp_path, monkeypatch):
    """The second of three runs stops itself: a selection counts it as 0, a measured run does not
    enter the table. The third is measured in either case."""
    args = Args(results=tmp_path / "compare.json", runs=tmp_path, jobs=1)
    jobs = [Job("GRPO", lr, 101) for lr in RATES]
    saved = []
    stops = {RATES[1]: "stopped: why"}
    monkeypatch.setattr(compare, "write_json", lambda _, all: saved.append(len(all[name])))
    monkeypatch.setattr(compare, "train", lambda job, _: stops.get(job.lr, ""))
    monkeypatch.setattr(compare, "cut", lambda folder, args: compare.Cut(folder, 2, {}))
    monkeypatch.setattr(compare, "evaluate", lambda *_: {})
    monkeypatch.setattr(compare, "result_row", finished_row)
    results = compare.read_results(args)
    if name == "selection":
        compare.run_phase(name, jobs, tmp_path, results, args)
        stopped = {"accuracy": 0.0, "stopped": "stopped: why"}
        assert stopped.items() <= results[name][1].items()
        assert saved == [1, 2, 3]
    else:
        with pytest.raises(SystemExit):
            compare.run_phase(name, jobs, tmp_path, results, args)
        assert [row["lr"] for row in results[name]] == [RATES[0], RATES[2]]
        assert saved == [1, 2]


@pytest.mark.parametrize("task", ["sums", "real"])
def test_rates_are_selected_for_every_method(task, tmp_path, monkeypatch):
    """A variant takes the rate of its method."""
    phases = {}
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    model = tmp_path / compare.TASKS[task].model
    model.mkdir(parents=True)
    (model / "train.jsonl").write_text("{}\n" * 300)
    monkeypatch.setattr(compare, "run_phase", lambda name, jobs, *_: phases.update({name: jobs}))
    monkeypatch.setattr(compare, "evaluate", lambda *_: {})
    args = Args(task=task, rates=("1e-5", "2e-5"), seeds=1, runs=tmp_path, results=tmp_path / "x")
    results = compare.read_results(args)
    methods = ["GRPO", "GTPO", "GTPO by batch", "ARCA"]
    compare.run_everything(args, results, methods)
    selected = [(job.method, job.lr) for job in phases["selection"]]
    assert selected == [(m, lr) for m in ("GRPO", "GTPO", "ARCA") for lr in args.rates]
    assert [job.method for job in phases["rows"]] == methods
    rows = [row("GTPO", "2e-5", 101, 0.5), row("GTPO", "1e-5", 101, 0.4)]
    rows += [row("ARCA", "2e-5", 101, 0.5), row("ARCA", "1e-5", 101, 0.5)]
    found = {"selection": rows, "rates": args.rates}
    assert compare.selected_rate(found, "GTPO by batch") == "2e-5"
    assert compare.selected_rate(found, "ARCA") == "1e-5"  # the lower of equals


@pytest.mark.parametrize("accuracy", [0.5, 0.6])
def test_equal_figures_of_seed_1_confirm_a_method(accuracy, tmp_path, monkeypatch):
    """Otherwise only seed 1 counts as a result of today's code."""
    rows = [row("GRPO", "2e-4", seed, 0.5) | {"code": "other"} for seed in (1, 2)]
    results = {"rows": rows, "selection": selection("GRPO", 0.1, 0.3, 0.2), "rates": RATES}

    def train_again(name: str, jobs: list[Job], problems: Path, results: dict, _: Args) -> None:
        assert (name, jobs) == ("rows", [Job("GRPO", "2e-4", 1)])
        again = row("GRPO", "2e-4", 1, accuracy) | {"code": compare.code("GRPO")}
        results["rows"] = [again, results["rows"][1]]

    monkeypatch.setattr(compare, "run_phase", train_again)
    args = Args(results=tmp_path / "compare.json", refresh=True)
    compare.repeat("GRPO", ROOT, results, args)
    found = [part["code"] for part in results["rows"] + results["selection"] if "code" in part]
    today = compare.code("GRPO")
    assert found == ([today] * 5 if accuracy == 0.5 else [today, "other"])
    compare.repeat("GRPO", ROOT, results, args)  # after an interruption
    assert (results["rows"][1]["code"] == today) == (accuracy == 0.5)


# ------------------------------------------------------------------------------- the pages


def test_the_caption_gives_every_number_of_seeds():
    rows = []
    for method, seeds in {"GRPO": 4, "ERPO": 2, "GTPO": 2, "ARCA": 1}.items():
        rows += [row(method, "2e-4", seed, 0.5) for seed in range(1, seeds + 1)]
    results = {"rows": rows, "selection": [], "rates": ["2e-4"], **START, **ABOUT}
    assert compare.described(results).startswith("Means over 1 or 2 or 4 seeds of ")


def test_tables_by_hand():
    accuracy = 0.1, 0.3, 0.2
    results = {"selection": selection("GRPO", *accuracy) + selection("ERPO", *accuracy)}
    results |= {"rates": RATES, "rows": [], **START}
    for method, lr, gain in (("GRPO", "2e-4", 0.0), ("ERPO", "1e-4", -0.1), ("ERPO", "2e-4", 0.1)):
        results["rows"] += [row(method, lr, s, 0.5 + (0.1 + gain) * s) for s in (1, 2)]
    # Differences 0.1 and 0.2: mean 0.15, standard error 0.05, 12.706 of it to either side.
    other, last = compare.table(results).splitlines()[-2:]
    cells = "0.950 | 0.050 | 40.0 | 0.20"
    assert last == f"| ERPO | 2e-4 | 0.800 | {cells} | +0.150 [−0.485, +0.785] |"
    cells = f"0.500 | {cells} | −0.150 [−0.785, +0.485]"
    assert other == f"| ERPO | 1e-4 (not selected) | {cells} |"


def test_the_table_of_both_tasks_by_hand():
    sums = {"rates": RATES, "selection": [], "rows": [], **START}
    for method, gain in (("GRPO", 0.0), ("ERPO", 0.1)):
        sums["rows"] += [row(method, RATES[0], s, 0.5 + (0.1 + gain) * s) for s in (1, 2)]
    left_out = [row(name, RATES[0], 1, 0.5) for name in ("GTPO by batch", "entropy credit")]
    needle = sums | {"rows": sums["rows"][:2], "start": {"accuracy": 0.3}}
    sums["rows"] = sums["rows"] + left_out
    before, grpo, erpo = compare.accuracy_table(sums, needle).splitlines()[2:]
    assert before == "| before training | 0.400 |  | 0.300 |  |"
    assert grpo == "| GRPO | 0.650 |  | 0.650 |  |"
    assert erpo == "| ERPO | 0.800 | +0.150 [−0.485, +0.785] | not measured |  |"


def test_the_table_of_credits_by_hand():
    """Differences of 0.1 and 0.2 to uniform credit, or none."""
    sums = {"rates": RATES, "selection": [], "rows": []}
    gains = {"uniform credit": 0.0, "ARCA": 0.1, "surprisal credit": 0.0, "entropy credit": 0.1}
    for method, gain in (gains | {"divergence credit": 0.0}).items():
        sums["rows"] += [row(method, RATES[0], s, 0.5 + (0.1 + gain) * s) for s in (1, 2)]
    needle = sums | {"rows": [part | {"accuracy": 0.5} for part in sums["rows"]]}
    head, _, *lines = compare.credit_table(sums, needle).splitlines()
    assert head == "| accuracy minus that of uniform credit | sums | needle |"
    none, some = "+0.000 [+0.000, +0.000]", "+0.150 [−0.485, +0.785]"
    assert lines == [
        f"| ARCA | {some} | {none} |",
        f"| surprisal credit | {none} | {none} |",
        f"| entropy credit | {some} | {none} |",
        f"| divergence credit | {none} | {none} |",
    ]


def test_tokens_are_compared_on_the_seeds_of_the_longer_runs():
    """By hand: seed 3 is in no mean, because the longer runs lack it."""
    results = {"rates": RATES, "selection": [], "rows": []}
    for method, gain, tokens in (("GRPO", 0.0, 2e5), ("VinePPO", 0.1, 18e5)):
        for seed, accuracy in ((1, 0.5), (2, 0.7), (3, 0.1)):
            results["rows"].append(row(method, RATES[0], seed, accuracy + gain, tokens=tokens))
    longer = {"command": "python it.py", "machine": "1 core", "rows": []}
    for seed, accuracy in ((1, 0.9), (2, 0.94)):
        longer["rows"].append(row("GRPO", RATES[0], seed, accuracy, tokens=19e5, step=360))
    caption, _, _, _, *lines = compare.tokens_table(results, longer).splitlines()
    assert caption == "Means over 2 seeds. `python it.py`, 1 core."
    assert lines == [
        "| GRPO | 2 | 64 | 0.20 | 0.600 | 0.950 |",
        "| VinePPO | 2 | 64 | 1.80 | 0.700 | 0.950 |",
        "| GRPO | 360 | 64 | 1.90 | 0.920 | 0.950 |",
    ]


def test_the_page_states_the_settings():
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    problems = (ROOT / "tiny" / "train.jsonl").read_text().splitlines()
    trained = len(problems) - compare.TASKS["sums"].validation
    rollouts = Args.steps * Args.prompts * compare.GROUP
    for text in (f"{trained:,} rows", f"{Args.steps} steps", f"{rollouts:,} rollouts"):
        assert text in page
    for command in compare.METHODS.values():
        if " " in command:  # a variant; the other methods are scripts with their defaults
            assert command.removeprefix("arca.py --credit ") in page


# ------------------------------------------------------------------------------- start to end


@pytest.mark.slow
@needs_vllm
def test_two_methods_from_start_to_end(tmp_path):
    """One learning rate, one seed, two steps; a second start trains nothing."""
    results, runs = tmp_path / "compare.json", tmp_path / "runs"
    flags = "--only GRPO,DAPO --seeds 1 --rates 2e-4 --steps 2"
    command = [sys.executable, "benchmark/compare.py", *flags.split()]
    command += ["--results", str(results), "--runs", str(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(results.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"GRPO", "DAPO"}
    assert found["command"].startswith(f"python benchmark/compare.py {flags} --results ")
    cores = shared.describe_cores(min(2, len(os.sched_getaffinity(0))))
    assert found["machine"] == f"{cores}, one run on each"
    assert rows["GRPO"]["rollouts"] == 256 and rows["GRPO"]["step"] == 2
    assert rows["DAPO"]["rollouts"] <= 256
    assert found["start"] != {name: rows["DAPO"][name] for name in found["start"]}
    trained = (runs / "train.jsonl").read_text().splitlines()
    validated = (runs / "validation.jsonl").read_text().splitlines()
    assert len(trained) == 2744 and len(validated) == 256 and not set(trained) & set(validated)

    before = results.read_bytes()
    shutil.rmtree(runs)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and results.read_bytes() == before
    assert "grpo" not in done.stdout  # names the folder of each run that trains
