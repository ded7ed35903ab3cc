r"""tools/evaluate.py: its metrics against slow versions, its saved results, its rejections."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, fail, needs_vllm, shared_rows
from damage import BROKEN

from common import bootstrap_interval, evaluate
from grading import Grader
from infra.data import Problem, load_problems, reference_answer
from infra.models import load_policy, load_tokenizer
from infra.vllm_engine import make_engine
from tools import evaluate as tool
from tools.metrics import difference, majority, metric_values, pass_at_k, summary

# ------------------------------------------------------------------ pass@k


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs include it
        (4, 2, 2, 5 / 6),
        (5, 2, 3, 9 / 10),  # only the triple of the three wrong ones includes none
        (4, 2, 3, 1.0),  # more drawn than are wrong
        (8, 0, 8, 0.0),
        (8, 8, 1, 1.0),
        (64, 1, 64, 1.0),
        (10**6, 1, 3, 3e-6),  # a product of factors near 1 loses digits here
    ],
)
def test_pass_at_k_by_hand(n, correct, k, expected):
    assert pass_at_k(n, correct, k) == pytest.approx(expected, rel=1e-15, abs=0)


def test_pass_at_k_is_the_average_over_all_subsets():
    rng = random.Random(1)
    for _ in range(60):
        n = rng.randint(1, 9)
        verdicts = [rng.random() < 0.3 for _ in range(n)]
        k = rng.randint(1, n)
        average = statistics.mean(any(drawn) for drawn in itertools.combinations(verdicts, k))
        assert pass_at_k(n, sum(verdicts), k) == pytest.approx(average, abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_impossible_counts(n, correct, k):
    with pytest.raises(ValueError, match=f"n={n}, correct={correct}, k={k}"):
        pass_at_k(n, correct, k)


# ------------------------------------------------------------------ intervals


def simulated(simulations: int, problems: int, samples: int = 8) -> tuple[np.ndarray, float]:
    """Accuracies over problems of very different difficulty, [simulations, problems], and the
    mean that they estimate."""
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.5, 0.7, size=(simulations, problems))
    return rng.binomial(samples, difficulty) / samples, 0.5 / (0.5 + 0.7)


def coverage(values: np.ndarray, truth: float) -> float:
    """The share of rows whose interval includes the truth."""
    problems = values.shape[1]
    # bootstrap_interval's own resamples, as the number of times that each problem is drawn
    draws = np.random.default_rng(0).integers(problems, size=(2000, problems))
    counts = np.stack([np.bincount(draw, minlength=problems) for draw in draws])
    low, high = np.quantile(values @ counts.T / problems, [0.025, 0.975], axis=1)
    for row in range(3):
        assert bootstrap_interval(values[row]) == pytest.approx((low[row], high[row]), abs=1e-12)
    return float(((low <= truth) & (truth <= high)).mean())


def test_coverage_of_intervals():
    values, truth = simulated(2000, problems=200)
    assert 0.93 <= coverage(values, truth) <= 0.97
    gain = np.random.default_rng(1).normal(0.05, 0.2, size=values.shape)
    assert 0.93 <= coverage(values + gain - values, 0.05) <= 0.97  # a paired difference
    assert 0.90 <= coverage(*simulated(2000, problems=30)) <= 0.95


# ------------------------------------------------------------------ majority


@pytest.fixture(scope="module")
def grader():
    with Grader() as shared:
        yield shared


@pytest.mark.parametrize(
    ("answers", "reference", "expected"),
    [
        (["7", "7", "8"], "7", 1.0),
        (["7", "8", "8"], "7", 0.0),
        (["7", "8", "8", "7"], "7", 0.5),
        (["7", "8", "9"], "7", 1 / 3),
        ([None, None, None, "7"], "7", 1.0),  # a response without a box has no vote
        ([None, None], "7", 0.0),
        (["8", "9"], "7", 0.0),
        (["7.0", "7", "8", "8.5"], "7", 1.0),  # two ways of writing one number
        (["7", "8.0", "8"], "7", 0.0),
        ([r"\frac{1}{2}", r"2\pi", r"\pi+\pi"], "0.5", 0.0),  # equal only for math-verify
        ([r"\frac{1}{2}", "0.5", r"2\pi", r"\pi+\pi"], "0.5", 0.5),
        ([r"\frac{1}{2}", "0.5", r"2\pi", r"3\pi", r"\text{no }", r"\text{no  }"], "0.5", 0.5),
        (["7", "7", "[", "}{", r"\frac"], "7", 1.0),  # an unreadable answer equals no other
    ],
)
def test_majority_by_hand(answers, reference, expected, grader):
    responses = ["nothing" if answer is None else rf"\boxed{{{answer}}}" for answer in answers]
    correct = [float(verdict) for verdict in grader.grade(responses, [reference] * len(answers))]
    for seed in range(3):
        both = list(zip(answers, correct, strict=True))
        random.Random(seed).shuffle(both)
        assert majority(grader, *zip(*both, strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("answer_format", ["boxed", "line", "auto"])
def test_two_spellings_are_one_answer_in_every_format(answer_format):
    with Grader(answer_format) as grader:
        assert majority(grader, ["7", r"2\pi", r"\pi+\pi"], [1, 0, 0]) == 0.0


def test_majority_asks_math_verify_only_if_it_can_decide(monkeypatch):
    monkeypatch.setattr(Grader, "_ask", lambda self, requests: 1 / (not requests) and [])
    with Grader() as never_asked:
        assert majority(never_asked, ["x", "y", "x", "z", "x"], [1, 0, 1, 0, 1]) == 1.0
        assert majority(never_asked, ["x", "y", "y", "z"], [1, 0, 0, 0]) == 0.0
        assert majority(never_asked, ["x", "y", "z", "z"], [0, 0, 0, 0]) == 0.0
        with pytest.raises(ZeroDivisionError):
            majority(never_asked, ["x", "y", "z"], [1, 0, 0])


# ------------------------------------------------------------------ summaries


def record(number: int, correct: list[int], **more: Any) -> dict[str, Any]:
    n = len(correct)
    plain = {"number": number, "problem": f"problem {number}", "majority": 1.0, "lengths": [3] * n}
    plain |= {"truncated": [False] * n, "greedy": {"correct": [1.0]}}
    return plain | {"correct": correct} | more


def test_summary_by_hand():
    records = [
        record(0, [1, 0, 0, 0], lengths=[1, 2, 3, 4], truncated=[True, False, False, False]),
        record(1, [1, 1, 1, 1], majority=0.5, greedy={"correct": [0.0]}),
    ]
    found = summary(records, ks=(1, 2))
    assert (found["problems"], found["samples"]) == (2, 4)
    expected = {"mean@4": 0.625, "pass@1": 0.625, "pass@2": 0.75, "majority@4": 0.75}
    expected |= {"greedy": 0.5, "length": 2.75, "truncated": 0.125}
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values == pytest.approx(expected)
    assert found["metrics"]["mean@4"]["low"] == 0.25  # both times the hard problem
    assert found["metrics"]["mean@4"]["high"] == 1.0


def test_differences_are_paired_by_problem():
    rng = random.Random(3)
    before = [record(i, [int(rng.random() < i / 40) for _ in range(8)]) for i in range(40)]
    after = [record(i, [1, *row["correct"][1:]]) for i, row in enumerate(before)]
    gain = difference(after, before[::-1], ks=(8,))["mean@8"]
    plain = metric_values(after, ()), metric_values(before, ())
    expected = plain[0]["mean@8"] - plain[1]["mean@8"]
    assert gain["value"] == pytest.approx(expected.mean())
    apart = [summary(rows, ())["metrics"]["mean@8"] for rows in (after, before)]
    assert gain["high"] - gain["low"] < 0.3 * (apart[0]["high"] - apart[0]["low"])
    # only the problems that both have, and each occurrence of a repeated one with its own
    assert difference(after[:3], before[2:], ())["mean@8"]["value"] == pytest.approx(expected[2])
    twice = [record(0, [1, 1]), record(1, [0, 0], problem="problem 0")]
    assert difference(twice, twice, (1,))["pass@1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert difference(after[:1], before[1:], ()) == {}


# ------------------------------------------------------------------ command


@pytest.fixture
def run(tied_model, problem_file, tmp_path) -> Callable[..., dict[str, Any]]:
    """A short evaluation with the transformers engine; any setting can be overridden."""

    def run(**settings: Any) -> dict[str, Any]:
        defaults = {"models": (str(tied_model),), "datasets": (str(problem_file),)}
        defaults |= {"samples": 2, "max_new_tokens": 6, "batch": 5, "engine": "transformers"}
        defaults |= {"device": "cpu", "folder": str(tmp_path / "saved")}
        return tool.main(tool.Args(**defaults | settings))

    return run


def saved_files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.jsonl")}


def test_an_interrupted_evaluation_resumes(run, tmp_path, monkeypatch, capsys):
    uninterrupted = run()
    [(name, text)] = saved_files(tmp_path / "saved").items()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 1 + 12

    evaluated: list[int] = []
    evaluate_model = tool.evaluate_model

    def counted(engine: Any, grader: Grader, problems: Any, numbers: list[int], args: Any) -> Any:
        evaluated.extend(numbers)
        return evaluate_model(engine, grader, problems, numbers, args)

    monkeypatch.setattr(tool, "evaluate_model", counted)
    sixth, eighth = len("".join(lines[:6])), len("".join(lines[:8]))
    # in the settings, between two lines, in the middle of a line, and before the last line's end
    for cut, first in ((20, 0), (sixth, 5), (eighth + 30, 7), (len(text) - 2, 11)):
        folder = tmp_path / f"cut-{cut}"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text[:cut])
        evaluated.clear()
        resumed = run(folder=str(folder))
        assert evaluated == list(range(first, 12))
        assert saved_files(folder) == {name: text}
        for part in ("results", "differences"):
            assert resumed[part] == uninterrupted[part]
    evaluated.clear()
    run(k=(2,), batch=1)  # finished problems cost nothing, whatever is computed of them
    assert evaluated == []
    assert "pass@2" in capsys.readouterr().out


def test_fewer_problems_first(run, tmp_path):
    part = run(problems=5)
    assert part["results"][0]["problems"] == 5
    run(folder=str(tmp_path / "at once"))
    run()
    assert saved_files(tmp_path / "saved") == saved_files(tmp_path / "at once")
    assert run(problems=5)["results"] == part["results"]


def test_settings_that_differ_from_the_saved_ones(
    run, tied_model, problem_file, tmp_path, rejection
):
    model = shutil.copytree(tied_model, tmp_path / "model")
    problems = shutil.copy(problem_file, tmp_path / "problems.jsonl")
    mine = {"models": (str(model),), "datasets": (str(problems),), "problems": 2}
    run(**mine)
    before = saved_files(tmp_path / "saved")
    for name, value, was in [
        ("samples", 3, 2),
        ("max_new_tokens", 7, 6),
        ("temperature", 0.5, 1.0),
        ("seed", 2, 1),
        ("precision", "bfloat16", "float32"),
        ("stop_tokens", ("a",), []),
    ]:
        line = rejection(run, **mine | {name: value})
        value = list(value) if isinstance(value, tuple) else value
        assert line.startswith(f"--{name.replace('_', '-')} {value}: ")
        assert f"was made with {was}; choose another --folder" in line

    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert rejection(run, **mine).startswith(f"--models {model} (")
    shutil.copy(tied_model / "model.safetensors", weights)
    config = model / "generation_config.json"  # holds the tokens that end a response
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 5}))
    assert rejection(run, **mine).startswith(f"--models {model} (")
    shutil.copy(tied_model / config.name, config)
    problems.write_text('{"problem": "1+1", "answer": "2"}\n')
    assert rejection(run, **mine).startswith(f"--datasets {problems} (")
    assert saved_files(tmp_path / "saved") == before


def test_settings_of_an_evaluation_without_a_response_may_change(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tool, "evaluate_model", fail(KeyboardInterrupt()))
        run(problems=2, max_new_tokens=7)
    run(problems=2)
    [text] = saved_files(tmp_path / "saved").values()
    assert json.loads(text.splitlines()[0])["max_new_tokens"] == 6


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (tool.StopRun("the cause"), 1, "the cause"),
        (torch.OutOfMemoryError("out of memory"), 1, "lower --batch 32 or --gpu-memory 0.9"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (tool.WorkerError("no worker"), 1, "no worker"),
        (RuntimeError("Available memory on node 0"), 1, "lower --batch 32 or --gpu-memory 0.9"),
    ],
)
def test_an_evaluation_that_stops_says_how_to_go_on(error, code, cause, monkeypatch, capsys):
    monkeypatch.setattr(tool, "main", fail(error))
    with pytest.raises(SystemExit) as stopped:
        tool.launch(tool.Args())
    assert stopped.value.code == code
    assert f"{cause}; repeat the command to resume\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("has_gpu", "cause"),
    [(True, "raise --gpu-memory 0.9"), (False, "set VLLM_CPU_KVCACHE_SPACE above 1 (GiB)")],
)
def test_a_cache_that_is_too_small_for_vllm(has_gpu, cause, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    error = ValueError("Try increasing `gpu_memory_utilization`")
    assert cause in tool.memory_advice(error, 0.9, "--batch 32")


def test_other_errors_of_an_evaluation_are_raised(monkeypatch):
    monkeypatch.setattr(tool, "main", fail(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        tool.launch(tool.Args())


def test_spellings_of_a_path(run, tied_model, problem_file, tmp_path, monkeypatch):
    """They name the same model and data set, in one command and when it is repeated."""
    shutil.copytree(tied_model, tmp_path / "runs" / "model")
    (tmp_path / "latest").symlink_to(tmp_path / "runs")
    (tmp_path / "data").mkdir()
    shutil.copy(problem_file, tmp_path / "data" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    models = ("./runs/model", "runs/model", "runs/model/", "runs/../runs//model", "latest/model")
    datasets = ("data/train.jsonl", "./data/train.jsonl", "./data@train", "data/@train")
    report = run(models=models, datasets=datasets, problems=2)
    names = [(row["model"], row["dataset"]) for row in report["results"]]
    assert names == [("runs/model", "data/train.jsonl"), ("runs/model", "data@train")]
    before = saved_files(tmp_path / "saved")
    assert list(before) == ["runs-model/data-train-jsonl.jsonl", "runs-model/data-train.jsonl"]

    monkeypatch.setattr(tool, "evaluate_model", lambda *_: pytest.fail("evaluated again"))
    for model in (*models, str(tmp_path / "runs" / "model")):
        run(models=(model,), datasets=datasets[:1], problems=2)
    for dataset in (*datasets, str(tmp_path / "data" / "train.jsonl")):
        run(models=models[:1], datasets=(dataset,), problems=2)
    assert saved_files(tmp_path / "saved") == before


def test_names_that_are_no_paths_do_not_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "a@b:c.jsonl").touch()
    unchanged = ["gsm8k", "Qwen/Qwen3-1.7B", "openai/gsm8k:main@test", "no/such/", "a@b:c.jsonl"]
    assert [tool.canonical(name) for name in ("", *unchanged)] == ["", *unchanged]
    assert tool.canonical("./gsm8k:main@test") == "gsm8k:main@test"
    assert tool.canonical("./a@b:c.jsonl") == "a@b:c.jsonl"
    assert tool.canonical("..") == str(tmp_path.parent)


def test_two_models_with_one_folder(
    run, tied_model, untied_model, tmp_path, monkeypatch, rejection
):
    """They are told apart by their weights, and the message says which files they share."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tied_model, "a/b")
    shutil.copytree(tied_model, "a-b")
    weights = tmp_path / "a-b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    line = rejection(run, models=("a/b", "a-b"), problems=1)
    assert line.startswith("--models a-b (") and "was made with a/b (" in line


def test_any_or_all_of_a_list_of_references(run, tmp_path, grader, rejection):
    class FakeEngine:
        stop_tokens = (0,)

        def generate(self, prompts: list[list[int]], *_: Any) -> Any:
            return [([number, 0], []) for number, _ in enumerate(prompts)]

        def decode(self, rows: list[list[int]]) -> list[str]:
            return [(r"\boxed{0.5}", r"\boxed{7}", r"\boxed{8}")[number % 3] for number, _ in rows]

    problems = [Problem("1+1", "1/2", [5], ("7",)), Problem("2+2", "8", [6])]
    args = tool.Args(samples=3)
    first, second = tool.evaluate_model(FakeEngine(), grader, problems, [0, 1], args)
    assert (first["correct"], second["correct"]) == ([1, 1, 0], [0, 0, 1])
    assert (first["reference"], first["alternatives"]) == ("1/2", ("7",))
    assert (second["reference"], "alternatives" in second) == ("8", False)

    path = tmp_path / "lists.jsonl"
    path.write_text('{"problem": "1+1", "answer": ["1", "2"]}\n')
    run(datasets=(str(path),))
    line = rejection(run, datasets=(str(path),), references="all")
    assert line.startswith(f"--datasets {path} (") and "was made with" in line


def test_a_second_writer_is_rejected(run, rejection, tmp_path):
    run(problems=1)
    [saved] = (tmp_path / "saved").rglob("*.jsonl")
    with filelock.FileLock(saved.parent / "lock"):
        line = rejection(run)
    assert line == f"--folder {saved.parent}: another process is writing here"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--k 1 9 --samples 8", "--k 9: must be from 1 to --samples 8"),
        ("--k 0", "--k 0: must be from 1 to --samples 64"),
        ("--samples 0", "--samples 0: must be at least 1"),
        ("--batch 0", "--batch 0: must be at least 1"),
        ("--gpu-memory 1.5", "--gpu-memory 1.5: must be below 1"),
        ("--output tests", "--output tests: is a folder; name a file"),
        ("--output .", "--output .: is a folder; name a file"),
        (
            "--output Makefile/new/x.json",
            f"--output Makefile/new/x.json: cannot be written: {ROOT}/Makefile is no folder",
        ),
        ("--problems -1", "--problems -1: must be at least 0"),
        ("--temperature 0", "--temperature 0.0: must be above 0"),
        pytest.param("--temperature 3", "--temperature 3.0: vLLM takes", marks=needs_vllm),
        ("--models", "--models : name at least one"),
        ("--datasets", "--datasets : name at least one"),
        ("--models no/such/folder", "--models no/such/folder: cannot be loaded: "),
        ("--datasets none.jsonl", "--datasets none.jsonl: no such file"),
        ("--stop-tokens </think>", "--stop-tokens </think>: must be one token of tiny, and is "),
        ("--max-new-tokens 4096", "--max-new-tokens 4096: leaves no room in the model"),
    ],
)
def test_flags_that_cannot_work(flags, line, tiny_model, rejection, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = tyro.cli(tool.Args, args=[*flags.split(), "--folder", str(tmp_path)])
    assert rejection(tool.main, args).startswith(line)


@pytest.mark.parametrize(("damage", "why"), BROKEN)
def test_a_model_that_cannot_be_loaded_is_rejected(
    damage, why, run, tied_model, tmp_path, rejection
):
    folder = shutil.copytree(tied_model, tmp_path / "model")
    damage(folder)
    line = rejection(run, models=(str(folder),))
    assert line.startswith(f"--models {folder}: ") and why in line


def test_known_names(tmp_path, monkeypatch):
    """The file in --data-dir if it exists, otherwise the hub."""
    seen: list[str] = []
    monkeypatch.setattr(tool, "load_problems", lambda args, *_: seen.append(args.datasets))
    (tmp_path / "math500.jsonl").touch()
    args = tool.Args(data_dir=str(tmp_path))
    for name in ("math500", "gsm8k", "a/b", "a/b:main@train", "sums.jsonl"):
        tool.load_dataset(args, "tiny", name, None, None)
    hub = "openai/gsm8k:main@test"
    assert seen == [str(tmp_path / "math500.jsonl"), hub, "a/b", "a/b:main@train", "sums.jsonl"]


def test_models_of_two_architectures(run, tied_model, untied_model, tmp_path):
    both = (str(tied_model), str(untied_model))
    together = run(models=both)
    assert [row["model"] for row in together["results"]] == list(both)
    for model, row in zip(both, together["results"], strict=True):
        assert run(models=(model,), folder=str(tmp_path / "one"))["results"] == [row]


def test_base_models_in_one_engine(run, untied_model, base_model, tmp_path):
    """A base model stops at the end of a turn in its chat template, as the same weights do whose
    settings name that token. Each model has its own stop tokens."""
    without = shutil.copytree(base_model, tmp_path / "without")
    (without / "chat_template.jinja").unlink()
    models = (str(base_model), str(without))
    report = run(models=models, max_new_tokens=40)
    named, alone = str(untied_model), str(tmp_path / "alone")
    expected = run(models=(named,), max_new_tokens=40, folder=alone)["results"][0]["metrics"]
    [own, without_template] = (row["metrics"] for row in report["results"])
    assert own == expected
    again = run(models=models[1:], max_new_tokens=40, folder=alone)["results"][0]["metrics"]
    assert without_template == again


def test_a_lora_checkpoint(run, make_args, tmp_path, untied_model, rejection):
    """A checkpoint of adapters gives the results of the same weights merged into a model."""
    import torch

    args = make_args(lora_rank=2, model=str(untied_model))
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    for name, weight in policy.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folders = [untied_model, tmp_path / "adapter", tmp_path / "merged"]
    policy.save_pretrained(folders[1])
    policy.merge_and_unload().save_pretrained(folders[2])
    for folder in folders[1:]:
        tokenizer.save_pretrained(folder)
    report = run(models=tuple(str(folder) for folder in folders), samples=4)
    plain, adapter, merged = (row["metrics"] for row in report["results"])
    assert adapter == merged != plain

    (folders[1] / "adapter_model.safetensors").unlink()
    line = rejection(run, models=(str(folders[1]),), folder=str(tmp_path / "again"))
    assert line.startswith(f"--models {folders[1]}: cannot be loaded: ")
    (folders[1] / "adapter_config.json").write_text("{}")
    line = rejection(run, models=(str(folders[1]),))
    assert line.startswith(f"--models {folders[1]}: its adapter_config.json cannot be read")


# ------------------------------------------------------------------ with vLLM


@needs_vllm
def test_two_models_on_two_datasets_with_vllm(tiny_model, tmp_path, capsys):
    models = (str(tiny_model), str(shutil.copytree(tiny_model, tmp_path / "copy")))
    rows = (tiny_model / "test.jsonl").read_text().splitlines(keepends=True)
    datasets = (str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl"))
    Path(datasets[0]).write_text("".join(rows[:24]))
    Path(datasets[1]).write_text("".join(rows[24:36]))
    files = {"folder": str(tmp_path / "saved"), "output": str(tmp_path / "report.json")}
    shape = {"samples": 4, "max_new_tokens": 64, "batch": 16, "engine": "vllm", "device": "cpu"}
    report = tool.main(tool.Args(models=models, datasets=datasets, **files, **shape))
    assert json.loads((tmp_path / "report.json").read_text())["results"] == report["results"]
    assert f"{datasets[0]}: 24 problems, 4 samples of each" in capsys.readouterr().out

    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert len(report["differences"]) == 2
    for row in report["differences"]:
        assert row["metrics"] == dict.fromkeys(row["metrics"], zero)

    # every verdict again, from the saved answers
    for text in saved_files(tmp_path / "saved").values():
        for line in text.splitlines()[1:]:
            saved = json.loads(line)
            greedy = saved["greedy"]
            for row in (saved, greedy):
                right = [answer == saved["reference"] for answer in row["answers"]]
                assert row["correct"] == [float(one) for one in right]
            assert len(saved["answers"]) == 4 and len(greedy["answers"]) == 1
    means = [row["metrics"]["mean@4"]["value"] for row in report["results"]]
    assert all(0.2 < mean < 0.8 for mean in means)


def test_the_samples_are_those_of_a_runs_own_evaluation(run, make_args, tiny_model):
    problems = str(tiny_model / "test.jsonl")
    shape = {"max_new_tokens": 48, "seed": 7}
    report = run(models=(str(tiny_model),), datasets=(problems,), samples=3, problems=8, **shape)
    ours = report["results"][0]["metrics"]
    shape |= {"model": str(tiny_model), "eval_dataset": problems}
    args = make_args(eval_samples=3, eval_problems=8, **shape)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    with Grader() as grader:
        held_out = load_problems(args, "--eval-dataset", tokenizer, grader)
        theirs = evaluate(make_engine(args, policy, tokenizer, held_out), grader, held_out, args)
    assert ours["length"]["value"] == pytest.approx(theirs["eval/length"])
    assert ours["greedy"]["value"] == pytest.approx(theirs["eval/greedy"])
    expected = [theirs[f"eval/accuracy{part}"] for part in ("", "_low", "_high")]
    assert list(ours["mean@3"].values()) == pytest.approx(expected)


# ------------------------------------------------------------------ reference answers


@pytest.mark.parametrize("name", tool.KNOWN)
def test_references_of_the_known_datasets(name, grader):
    """Each is right against itself, and so is its solution. docs/evaluation.md gives their number
    and names those that cannot be read."""
    file, hub = tool.KNOWN[name]
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = f"| `{name}` | `{file}` | `{hub}` |"
    assert row in page
    rows = shared_rows(f"data/{file}")
    references = [reference_answer(str(row["answer"])) for row in rows]
    assert all(grader.grade([rf"\boxed{{{text}}}" for text in references], references))
    readable = grader.readable(references)
    assert f"{row} {len(references)} | {sum(readable)} |" in page
    for text, is_readable in zip(references, readable, strict=True):
        assert is_readable or f"- `{name}`: `{text}`" in page
    solved = [row for row in rows if "boxed" in row.get("solution", "")]
    assert all(grader.grade([r["solution"] for r in solved], [r["answer"] for r in solved]))
