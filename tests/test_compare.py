"""The comparison: its rules by hand, and two methods from end to end."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import pytest
import shared
from compare import Args, Job
from conftest import needs_vllm

ROOT = Path(__file__).parent.parent


def selection(**accuracy: list[float | None]) -> list[dict[str, Any]]:
    """Rows of a method M: learning rate, accuracy of each seed."""
    return [
        {"method": "M", "lr": lr.replace("_", "-"), "seed": 101 + k, "accuracy": value}
        for lr, values in accuracy.items()
        for k, value in enumerate(values)
    ]


RATES = ["1e-4", "2e-4", "4e-4"]


@pytest.mark.parametrize(
    ("rows", "best", "at_end"),
    [
        # Means 0.5, 0.7, 0.6: the one run at 0.9 is not enough for 4e-4.
        (
            selection(**{"1e_4": [0.5, 0.5], "2e_4": [0.7, 0.7], "4e_4": [0.9, 0.3]}),
            "2e-4",
            False,
        ),
        (selection(**{"1e_4": [0.5], "2e_4": [0.6], "4e_4": [0.7]}), "4e-4", True),
        (selection(**{"1e_4": [0.8], "2e_4": [0.6], "4e_4": [0.7]}), "1e-4", True),
        # The lower rate on a tie, in whatever order the rows come.
        (selection(**{"4e_4": [0.7], "2e_4": [0.7], "1e_4": [0.5]}), "2e-4", False),
        # A rate at which a run stopped itself is out, whatever the other run did.
        (selection(**{"1e_4": [0.5, 0.5], "2e_4": [0.4, 0.4], "4e_4": [0.9, None]}), "1e-4", True),
    ],
)
def test_choice_of_the_learning_rate(rows: list[dict[str, Any]], best: str, at_end: bool):
    other = [{"method": "N", "lr": "4e-4", "seed": 101, "accuracy": 1.0}]
    assert compare.chosen_rate(rows + other, "M", RATES) == (best, at_end)


def test_a_rate_that_was_not_chosen_is_not_called_an_end_of_the_grid():
    rows = [{"method": "GRPO", "lr": "2e-4", "seed": 1, "step": 2, "rollouts": 64}]
    results = {"rows": rows, "selection": [], "steps": 2, "prompts": 4}
    results |= {"versions": {"vllm": "1"}, "command": "c", "machine": "m"}
    grids = ["2e-4"], ["1e-4", "2e-4"], ["1e-4", "2e-4", "4e-4"]
    one, two, three = ({**results, "rates": rates} for rates in grids)
    assert compare.chosen_rate([], "GRPO", one["rates"]) == ("2e-4", False)
    assert "All took the learning rate 2e-4: none was chosen." in compare.caption(one)
    assert "†" not in compare.caption(one)
    chosen = [{"method": "GRPO", "lr": "2e-4", "seed": 101, "accuracy": 0.5}]
    two["selection"] = three["selection"] = chosen
    said = "The learning rates were chosen from 1e-4, 2e-4"
    assert f"{said}. †: at an end of these" in compare.caption(two)
    assert f"{said}, 4e-4. Each run" in compare.caption(three)


def test_the_caption_names_methods_that_have_more_seeds_or_fewer():
    row = {"lr": "2e-4", "step": 2, "rollouts": 64}
    seeds = {"GRPO": 4, "ERPO": 2, "GTPO": 2, "ARCA": 1}
    rows = [row | {"method": m, "seed": s} for m, n in seeds.items() for s in range(1, n + 1)]
    results = {"rows": rows, "selection": [], "steps": 2, "prompts": 4, "rates": ["2e-4"]}
    results |= {"versions": {"vllm": "1"}, "command": "c", "machine": "m"}
    assert compare.caption(results).startswith("Means over 2 seeds, GRPO's over 4, ARCA's over 1;")


def test_an_ablation_takes_the_rate_of_the_whole_method(monkeypatch: pytest.MonkeyPatch):
    assert set(compare.RATE_OF) | set(compare.RATE_OF.values()) <= set(compare.METHODS)
    monkeypatch.setitem(compare.RATE_OF, "half of M", "M")
    rows = selection(**{"1e_4": [0.5], "2e_4": [0.7], "4e_4": [0.6]})
    assert compare.chosen_rate(rows, "half of M", RATES) == ("2e-4", False)


def test_what_is_costly_runs_only_where_it_is_named():
    assert set(compare.check(Args())) == set(compare.METHODS) - {"VinePPO by token"}
    assert compare.check(Args(only="GRPO,VinePPO by token")) == ["GRPO", "VinePPO by token"]


def test_paired_interval_by_hand():
    # Differences 1, 2, 3, 4, 5: mean 3, variance 2.5, standard error sqrt(2.5 / 5) = sqrt(0.5).
    low, high = compare.t_interval([1, 2, 3, 4, 5])
    assert low == pytest.approx(3 - 2.776 * math.sqrt(0.5))
    assert high == pytest.approx(3 + 2.776 * math.sqrt(0.5))
    assert compare.t_interval([0.5, 0.5]) == (0.5, 0.5)


def test_quantiles_of_t_by_their_density():
    """97.5% of each density, by the trapezoid rule, lies below the quantile."""
    import numpy as np

    for freedom, quantile in enumerate(compare.T_QUANTILE, 1):
        x = np.linspace(0, quantile, 200_001)
        gamma = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = math.exp(gamma) / math.sqrt(freedom * math.pi)
        density = density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=1e-4)


def test_differences_are_paired_by_seed():
    rows = [
        {"method": "GRPO", "seed": 2, "accuracy": 0.5},
        {"method": "GRPO", "seed": 1, "accuracy": 0.9},
        {"method": "M", "seed": 1, "accuracy": 1.0},
        {"method": "M", "seed": 2, "accuracy": 0.75},
        {"method": "M", "seed": 3, "accuracy": 0.1},  # GRPO has no such seed
    ]
    assert compare.difference(rows, "M", "GRPO") == pytest.approx([0.1, 0.25])


def test_the_cut_keeps_to_the_budget():
    drawn = {1: 128, 2: 384, 3: 512, 4: 640}
    assert compare.within_budget(drawn, 512) == 3
    assert compare.within_budget(drawn, 511) == 2
    with pytest.raises(ValueError):
        compare.within_budget(drawn, 100)


def test_only_dynamic_sampling_saves_every_step():
    for method in compare.METHODS:
        command = compare.training_command(Job(method, "2e-4", 1), Args())
        every = command[command.index("--save-every") + 1]
        assert every == ("1" if method == "DAPO" else "0")


def test_a_run_has_the_problems_a_step_that_are_asked_for():
    command = compare.training_command(Job("GRPO", "2e-4", 1), Args(prompts=2))
    assert command[command.index("--prompts-per-step") + 1] == "2"


def test_a_task_has_its_own_model_problems_and_settings():
    sums, needle = Args(), Args(task="needle", runs=Path("r"))
    assert "tiny" not in sums.settings
    for method, own in (("GRPO", False), ("VinePPO", True)):
        command = compare.training_command(Job(method, "2e-4", 1), needle)
        flags = dict(itertools.pairwise(command))
        assert (flags["--model"], flags["--max-new-tokens"]) == ("tiny/needle", "80")
        assert (flags.get("--continuations") == "3") is own
        assert "--continuations" not in compare.training_command(Job(method, "2e-4", 1), sums)
    for task in compare.TASKS.values():
        folder = ROOT / task.model
        assert all((folder / name).exists() for name in ("config.json", "test.jsonl"))
        assert len((folder / "train.jsonl").read_text().splitlines()) > 2 * compare.VALIDATION


def test_the_other_rate_is_no_second_run_where_it_is_the_chosen_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    phases = []
    monkeypatch.setattr(compare, "run_phase", lambda name, jobs, *_: phases.append(jobs))
    for rates in (("4e-4",), ("8e-4",)):
        args = Args(rates=rates, seeds=2, runs=tmp_path, results=tmp_path / "x.json")
        compare.run_everything(args, compare.read_results(args), ["EP-GRPO"])
    once = [[Job("EP-GRPO", "4e-4", seed)] for seed in (1, 2)]
    twice = [[Job("EP-GRPO", "8e-4", seed), Job("EP-GRPO", "4e-4", seed)] for seed in (1, 2)]
    assert phases == once + twice


def test_runs_of_one_task_are_not_added_to_those_of_another(tmp_path: Path, capsys: Any):
    results = compare.read_results(Args(results=tmp_path / "compare.json"))
    (tmp_path / "compare.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        compare.read_results(Args(task="needle", results=tmp_path / "compare.json"))
    assert "error: --settings --model tiny/needle" in capsys.readouterr().err


def test_other_rates_are_compared_with_grpo_but_its_own_are_not():
    def row(method: str, lr: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {"method": method, "lr": lr, "seed": seed, "accuracy": accuracy}

    rows = [row("GRPO", "4e-4", 1, 0.5), row("GRPO", "4e-4", 2, 0.75)]
    rows += [row("GRPO", "2e-4", 1, 0.75), row("GRPO", "2e-4", 2, 0.625)]
    rows += [row("REFT", "2e-4", 1, 0.625), row("REFT", "2e-4", 2, 0.875)]
    selection = [row("GRPO", "4e-4", 101, 0.5), row("REFT", "4e-4", 101, 0.5)]
    results = {"rows": rows, "selection": selection, "rates": ["2e-4", "4e-4"]}
    assert [line.split(" | ")[1:] for line in compare.others_table(results).splitlines()[2:]] == [
        ["2e-4", "0.688", " |"],
        ["2e-4", "0.750", "+0.125 [+0.125, +0.125] |"],
    ]


def test_tokens_are_compared_on_the_seeds_of_the_longer_runs():
    """By hand: seed 3 is in no mean, as the longer runs lack it."""
    results = {"rates": RATES, "selection": [], "rows": []}
    for method, gain, tokens in (("GRPO", 0.0, 2e5), ("VinePPO", 0.1, 18e5)):
        for seed, accuracy in ((1, 0.5), (2, 0.7), (3, 0.1)):
            row = {"method": method, "lr": RATES[0], "seed": seed, "accuracy": accuracy + gain}
            results["rows"].append(row | {"pass@8": 0.9, "tokens": tokens, "step": 40})
            results["rows"][-1]["rollouts"] = 5120
    longer = {"command": "python it.py", "machine": "1 core", "rows": []}
    for seed, accuracy in ((1, 0.9), (2, 0.94)):
        row = {"method": "GRPO", "lr": RATES[0], "seed": seed, "accuracy": accuracy, "pass@8": 0.95}
        longer["rows"].append(row | {"tokens": 19e5, "step": 360, "rollouts": 46080})
    assert compare.tokens_table(results, longer).splitlines()[2:] == [
        "| GRPO | 40 | 5120 | 0.20 | 0.600 | 0.900 |",
        "| VinePPO | 40 | 5120 | 1.80 | 0.700 | 0.900 |",
        "| GRPO | 360 | 46080 | 1.90 | 0.920 | 0.950 |",
        "",
        "Means over 2 seeds. `python it.py`, 1 core.",
    ]


def test_a_figure_changes_the_table():
    best = selection(**{"1e_4": [0.1], "2e_4": [0.3], "4e_4": [0.2]})
    results = {
        "selection": [row | {"method": method} for method in ("GRPO", "ERPO") for row in best],
        "rates": RATES,
        "start": {"accuracy": 0.4, "pass@8": 0.9, "length": 41.0},
        "rows": [],
    }
    cases = (("GRPO", "2e-4", 0.0), ("ERPO", "2e-4", 0.1), ("ERPO", "1e-4", -0.1))
    for method, lr, gain in cases:
        for seed, accuracy in ((1, 0.6), (2, 0.7)):
            row = {"method": method, "lr": lr, "seed": seed, "accuracy": accuracy + gain * seed}
            row |= {"pass@8": 0.95, "entropy": 0.05, "length": 40.0, "tokens": 2e5}
            results["rows"].append(row)
    last = compare.table(results).splitlines()[-1]
    # Differences 0.1 and 0.2: mean 0.15, standard error 0.05, 12.706 of it to either side.
    assert last == "| ERPO | 2e-4 | 0.800 | 0.950 | 0.050 | 40.0 | 0.20 | +0.150 [−0.485, +0.785] |"
    assert "0.500" not in compare.table(results)  # a rate that is not the chosen one


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "GRPO,PPO"], "--only PPO"),
        (["--samples", "4"], "--samples 4"),
        (["--seeds", "11"], "--seeds 11"),
        (["--rates", "2e-4", "high"], "--rates high"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], message: str):
    command = [sys.executable, "benchmark/compare.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_other_settings_are_not_added_to_the_results(tmp_path: Path, capsys: pytest.CaptureFixture):
    args = Args(results=tmp_path / "compare.json", runs=tmp_path)
    shared.write_json(args.results, compare.read_results(args))
    compare.read_results(args)
    args.steps = 41
    with pytest.raises(SystemExit):
        compare.read_results(args)
    assert "--steps 41" in capsys.readouterr().err


def test_a_wider_grid_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture):
    args = Args(results=tmp_path / "compare.json", runs=tmp_path, rates=("2e-4", "4e-4"))
    row = {"method": "GRPO", "lr": "2e-4", "seed": 101}
    shared.write_json(args.results, compare.read_results(args) | {"selection": [row]})
    args.rates = ("1e-4", "2e-4", "4e-4")
    results = compare.read_results(args)
    assert results["rates"] == list(args.rates) and results["selection"] == [row]
    args.rates = ("1e-4", "2e-4")  # 4e-4 has runs
    with pytest.raises(SystemExit):
        compare.read_results(args)
    assert "--rates" in capsys.readouterr().err


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run whose model is whole, and one whose row is there, are not trained; a half one is."""
    args = Args(results=tmp_path / "compare.json", runs=tmp_path / "runs", steps=2, jobs=1)
    jobs = [Job("GRPO", "2e-4", seed) for seed in (1, 2, 3)]
    for job in jobs[1:]:
        folder = args.runs / job.folder
        folder.mkdir(parents=True)
        (folder / "args.json").write_text('{"steps": 2}')
    (args.runs / jobs[1].folder / "model").mkdir()
    (args.runs / jobs[2].folder / "model.unfinished").mkdir()
    started = []

    def run(command: list[str]) -> str:
        assert "--resume" in command
        started.append(Path(command[-1]).name)
        return ""

    monkeypatch.setattr(compare, "run_on_this_core", run)
    monkeypatch.setattr(compare, "cut", lambda folder, args: {"weights": str(folder)})
    monkeypatch.setattr(compare, "evaluate", lambda models, problems, args: dict.fromkeys(models))
    monkeypatch.setattr(compare, "row_of", lambda job, evaluated, args: job._asdict())
    results = compare.read_results(args)
    results["rows"] = [jobs[0]._asdict()]
    compare.run_phase("rows", jobs, ROOT / "tiny" / "test.jsonl", results, args)
    assert started == [jobs[2].folder]
    assert [row["seed"] for row in json.loads(args.results.read_text())["rows"]] == [1, 2, 3]


def test_a_run_of_another_length_is_refused(tmp_path: Path):
    job = Job("GRPO", "2e-4", 1)
    (tmp_path / job.folder).mkdir()
    (tmp_path / job.folder / "args.json").write_text('{"steps": 3}')
    with pytest.raises(SystemExit):
        compare.train(job, Args(runs=tmp_path, steps=2))


def test_the_pages_and_figures_show_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = json.loads(Args.results.read_text()) if Args.results.exists() else {}
    if "start" not in results:
        pytest.skip("no results yet: python benchmark/compare.py")
    for page in compare.PAGES:
        fresh = page.read_text(encoding="utf-8") == shared.filled(page, compare.blocks(results))
        assert fresh, f"{page.name} is stale: python benchmark/compare.py --write"
    folder = compare.figures.FOLDER
    monkeypatch.setattr(compare.figures, "FOLDER", tmp_path)
    compare.draw(results)
    drawn = list(tmp_path.iterdir())
    assert len(drawn) == 2
    for file in drawn:
        fresh = file.read_text("utf-8") == (folder / file.name).read_text("utf-8")
        assert fresh, f"{file.name} is stale: python benchmark/compare.py --write"


def test_the_page_says_what_is_run():
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    trained = len((ROOT / "tiny" / "train.jsonl").read_text().splitlines()) - compare.VALIDATION
    rollouts = Args.steps * Args.prompts * compare.GROUP
    curve = compare.CURVE.split()[3]
    numbers = (f"{trained:,} rows", f"{Args.steps} steps", f"{rollouts:,} rollouts")
    for said in (*numbers, f"{Args.samples} answers", f"on {curve} of the validation problems"):
        assert said in page
    for command in compare.METHODS.values():
        assert command.removeprefix("arca.py --credit ") in page


@needs_vllm
def test_two_methods_from_end_to_end(tmp_path: Path):
    """One learning rate, one seed, two steps; then again, which trains nothing."""
    results, runs = tmp_path / "compare.json", tmp_path / "runs"
    flags = "--only GRPO,DAPO --seeds 1 --rates 2e-4 --steps 2 --samples 8"
    command = [sys.executable, "benchmark/compare.py", *flags.split()]
    command += ["--results", str(results), "--runs", str(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(results.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"GRPO", "DAPO"}
    assert found["command"].startswith(f"python benchmark/compare.py {flags} --results ")
    cores = min(2, len(os.sched_getaffinity(0)))
    assert found["machine"] == f"{shared.cores(cores)}, one run on each"
    assert rows["GRPO"]["rollouts"] == 256 and rows["GRPO"]["step"] == 2
    assert rows["DAPO"]["rollouts"] <= 256
    assert found["start"] != {k: rows["DAPO"][k] for k in found["start"]}
    trained = (runs / "train.jsonl").read_text().splitlines()
    validated = (runs / "validation.jsonl").read_text().splitlines()
    assert len(trained) == 2744 and len(validated) == 256 and not set(trained) & set(validated)

    before = results.read_bytes()
    shutil.rmtree(runs)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and results.read_bytes() == before
    assert not re.search(r"\d+/\d+, ", done.stdout)
