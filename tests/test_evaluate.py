r"""tools/evaluate.py: its metrics against slow versions, what it keeps, and what it refuses."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from conftest import ROOT, SHARED_DATA, needs_vllm
from damage import BROKEN
from data import gold_answer
from engine import load_policy, load_tokenizer, make_engine

from common import bootstrap_interval, evaluate, load_problems
from grading import Grader, last_boxed
from tools import evaluate as tool
from tools.metrics import difference, majority, metric_values, pass_at_k, summary

# ------------------------------------------------------------------------------- pass@k


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs hold it
        (4, 2, 2, 5 / 6),
        (5, 2, 3, 9 / 10),  # only the triple of the three wrong ones has none
        (4, 2, 3, 1.0),  # more drawn than are wrong
        (8, 0, 8, 0.0),
        (8, 8, 1, 1.0),
        (64, 1, 64, 1.0),
        (10**6, 1, 3, 3e-6),  # a product of factors near 1 loses digits here
    ],
)
def test_pass_at_k_by_hand(n: int, correct: int, k: int, expected: float):
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
def test_pass_at_k_of_what_cannot_be(n: int, correct: int, k: int):
    with pytest.raises(ValueError, match=f"n={n}, correct={correct}, k={k}"):
        pass_at_k(n, correct, k)


# ------------------------------------------------------------------------------- intervals


def simulated(simulations: int, problems: int, samples: int = 8) -> tuple[np.ndarray, float]:
    """Accuracies over problems of very different difficulty, [simulations, problems], and the
    mean that they estimate."""
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.5, 0.7, size=(simulations, problems))
    return rng.binomial(samples, difficulty) / samples, 0.5 / (0.5 + 0.7)


def coverage(values: np.ndarray, truth: float) -> float:
    """How often the interval of a row of values holds the truth."""
    problems = values.shape[1]
    # bootstrap_interval's own resamples, as how often each problem is drawn
    draws = np.random.default_rng(0).integers(problems, size=(2000, problems))
    counts = np.stack([np.bincount(draw, minlength=problems) for draw in draws])
    low, high = np.quantile(values @ counts.T / problems, [0.025, 0.975], axis=1)
    for row in range(3):
        assert bootstrap_interval(values[row]) == pytest.approx((low[row], high[row]), abs=1e-12)
    return float(((low <= truth) & (truth <= high)).mean())


def test_the_interval_covers_as_often_as_it_says():
    assert 0.93 <= coverage(*simulated(2000, problems=200)) <= 0.97


def test_the_interval_of_a_paired_difference_covers_too():
    before, _ = simulated(2000, problems=200)
    rng = np.random.default_rng(1)
    gain = rng.normal(0.05, 0.2, size=before.shape)
    assert 0.93 <= coverage(before + gain - before, 0.05) <= 0.97


def test_thirty_problems_cover_less():
    assert 0.90 <= coverage(*simulated(2000, problems=30)) <= 0.95


# ------------------------------------------------------------------------------- majority


@pytest.fixture(scope="module")
def grader():
    with Grader() as shared:
        yield shared


@pytest.mark.parametrize(
    ("answers", "gold", "expected"),
    [
        (["7", "7", "8"], "7", 1.0),
        (["7", "8", "8"], "7", 0.0),
        (["7", "8", "8", "7"], "7", 0.5),
        (["7", "8", "9"], "7", 1 / 3),
        ([None, None, None, "7"], "7", 1.0),  # what boxes nothing has no vote
        ([None, None], "7", 0.0),
        (["8", "9"], "7", 0.0),
        (["7.0", "7", "8", "8.5"], "7", 1.0),  # two ways of writing one number
        (["7", "8.0", "8"], "7", 0.0),
        ([r"\frac{1}{2}", r"2\pi", r"\pi+\pi"], "0.5", 0.0),  # the same for math-verify alone
        ([r"\frac{1}{2}", "0.5", r"2\pi", r"\pi+\pi"], "0.5", 0.5),
        ([r"\frac{1}{2}", "0.5", r"2\pi", r"3\pi", r"\text{no }", r"\text{no  }"], "0.5", 0.5),
        (["7", "7", "[", "}{", r"\frac"], "7", 1.0),  # what cannot be read equals nothing else
    ],
)
def test_majority_by_hand(answers: list[str | None], gold: str, expected: float, grader: Grader):
    responses = ["nothing" if answer is None else rf"\boxed{{{answer}}}" for answer in answers]
    correct = [float(verdict) for verdict in grader.grade(responses, [gold] * len(answers))]
    for seed in range(3):
        both = list(zip(answers, correct, strict=True))
        random.Random(seed).shuffle(both)
        assert majority(grader, *zip(*both, strict=True)) == pytest.approx(expected)


def test_majority_asks_math_verify_only_where_it_can_decide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Grader, "_ask", lambda self, requests: 1 / (not requests) and [])
    with Grader() as never_asked:
        assert majority(never_asked, ["x", "y", "x", "z", "x"], [1, 0, 1, 0, 1]) == 1.0
        assert majority(never_asked, ["x", "y", "y", "z"], [1, 0, 0, 0]) == 0.0
        assert majority(never_asked, ["x", "y", "z", "z"], [0, 0, 0, 0]) == 0.0
        with pytest.raises(ZeroDivisionError):
            majority(never_asked, ["x", "y", "z"], [1, 0, 0])


# ------------------------------------------------------------------------------- summaries


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
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values == pytest.approx(
        {
            "mean@4": 0.625,
            "pass@1": 0.625,
            "pass@2": 0.75,
            "majority@4": 0.75,
            "greedy": 0.5,
            "length": 2.75,
            "truncated": 0.125,
        }
    )
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


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def run(tied_model: Path, problem_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A short evaluation with the transformers engine; any setting can be overridden."""

    def run(**settings: Any) -> dict[str, Any]:
        defaults = {
            "models": (str(tied_model),),
            "datasets": (str(problem_file),),
            "samples": 2,
            "max_new_tokens": 6,
            "batch": 5,
            "engine": "transformers",
            "device": "cpu",
            "folder": str(tmp_path / "kept"),
        }
        return tool.main(tool.Args(**defaults | settings))

    return run


def kept_files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.jsonl")}


def test_a_killed_evaluation_goes_on(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    whole = run()
    (name, text), *none = kept_files(tmp_path / "kept").items()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 1 + 12 and not none
    results = {k: v for k, v in whole.items() if k in ("results", "differences")}

    asked: list[int] = []
    real = tool.evaluate_model

    def counted(*values: Any, numbers: list[int], **more: Any) -> list[dict[str, Any]]:
        asked.extend(numbers)
        return real(*values, numbers=numbers, **more)

    monkeypatch.setattr(tool, "evaluate_model", counted)
    # in the settings, between two lines, in the middle of a line, and just before its end
    for cut in (20, len("".join(lines[:6])), len("".join(lines[:8])) + 30, len(text) - 1):
        again = tmp_path / f"cut-{cut}"
        (again / name).parent.mkdir(parents=True)
        (again / name).write_text(text[:cut])
        asked.clear()
        resumed = run(folder=str(again))
        assert asked == list(range(12))[max(0, text[:cut].count("\n") - 1) :]
        assert kept_files(again) == {name: text}
        assert {k: resumed[k] for k in results} == results
    asked.clear()
    run(k=(2,), batch=1)  # what is done costs nothing, whatever is asked of it
    assert asked == []
    assert "pass@2" in capsys.readouterr().out


def test_fewer_problems_first(run: Callable, tmp_path: Path):
    part = run(problems=5)
    assert part["results"][0]["problems"] == 5
    run(folder=str(tmp_path / "at once"))
    run()
    assert kept_files(tmp_path / "kept") == kept_files(tmp_path / "at once")
    assert run(problems=5)["results"] == part["results"]


def refused(capsys: pytest.CaptureFixture, function: Callable, *args: Any, **more: Any) -> str:
    """The one line with which a call refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args, **more)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line


def test_other_settings_than_what_is_kept(
    run: Callable,
    tied_model: Path,
    problem_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    shutil.copytree(tied_model, tmp_path / "model")
    shutil.copy(problem_file, tmp_path / "problems.jsonl")
    mine = {"models": (f"{tmp_path}/model",), "datasets": (f"{tmp_path}/problems.jsonl",)}
    mine["problems"] = 2
    run(**mine)
    before = kept_files(tmp_path / "kept")
    for name, value, was in [
        ("samples", 3, 2),
        ("max_new_tokens", 7, 6),
        ("temperature", 0.5, 1.0),
        ("seed", 2, 1),
        ("precision", "float32", "auto"),
    ]:
        line = refused(capsys, run, **mine | {name: value})
        assert line.startswith(f"error: --{name.replace('_', '-')} {value}: ")
        assert f"was made with {was}; choose another --folder" in line

    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert refused(capsys, run, **mine).startswith(f"error: --models {tmp_path / 'model'} (")
    shutil.copy(tied_model / "model.safetensors", weights)
    (tmp_path / "problems.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    line = refused(capsys, run, **mine)
    assert line.startswith(f"error: --datasets {tmp_path / 'problems.jsonl'} (")
    assert kept_files(tmp_path / "kept") == before


def test_a_second_writer_is_refused(run: Callable, capsys: pytest.CaptureFixture, tmp_path: Path):
    run(problems=1)
    (kept,) = (tmp_path / "kept").rglob("*.jsonl")
    with kept.open("a") as file:
        tool.fcntl.flock(file, tool.fcntl.LOCK_EX)
        line = refused(capsys, run)
    assert line.startswith("error: --folder ") and "another evaluation is writing" in line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--k 1 9 --samples 8", "--k 9: must be from 1 to --samples 8"),
        ("--k 0", "--k 0: must be from 1 to --samples 64"),
        ("--samples 0", "--samples 0: must be at least 1"),
        ("--batch 0", "--batch 0: must be at least 1"),
        ("--gpu-memory 1.5", "--gpu-memory 1.5: must be above 0 and at most 1"),
        ("--output tests", "--output tests: is a folder; name a file"),
        ("--output .", "--output .: is a folder; name a file"),
        ("--problems -1", "--problems -1: must be at least 0"),
        ("--temperature 0", "--temperature 0.0: must be above 0"),
        ("--models", "--models : name at least one"),
        ("--datasets", "--datasets : name at least one"),
        ("--models no/such/folder", "--models no/such/folder: cannot be loaded: "),
        ("--datasets none.jsonl", "--datasets none.jsonl: no such file"),
        ("--max-new-tokens 4096", "--max-new-tokens 4096: 256 of 256 prompts leave less"),
    ],
)
def test_flags_that_cannot_work(
    flags: str,
    line: str,
    tiny_model: Path,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    args = tyro.cli(tool.Args, args=[*flags.split(), "--folder", str(tmp_path)])
    assert refused(capsys, tool.main, args).startswith(f"error: {line}")


@pytest.mark.parametrize(("damage", "why"), BROKEN)
def test_a_model_that_cannot_be_loaded_is_refused(
    damage: Callable[[Path], None],
    why: str,
    run: Callable,
    tied_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    folder = tmp_path / "model"
    shutil.copytree(tied_model, folder)
    damage(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(models=(str(folder),))
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert said.startswith(f"error: --models {folder}: ") and why in said


def test_known_names(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """The file in --data-dir where it is there, the hub otherwise."""
    seen: list[str] = []
    monkeypatch.setattr(tool, "load_problems", lambda args, *_: seen.append(args.datasets))
    (tmp_path / "math500.jsonl").touch()
    args = tool.Args(data_dir=str(tmp_path))
    for name in ("math500", "gsm8k", "a/b", "a/b:main@train", "sums.jsonl"):
        tool.load_set(name, None, args, None)
    hub = "openai/gsm8k:main@test"
    assert seen == [str(tmp_path / "math500.jsonl"), hub, "a/b", "a/b:main@train", "sums.jsonl"]


def test_models_of_two_architectures(run: Callable, tied_model: Path, untied_model: Path):
    both = (str(tied_model), str(untied_model))
    together = run(models=both)
    assert [row["model"] for row in together["results"]] == list(both)
    for model, row in zip(both, together["results"], strict=True):
        assert run(models=(model,), folder=str(tied_model.parent / "one"))["results"] == [row]


def test_a_lora_checkpoint(
    run: Callable, make_args: Callable, tmp_path: Path, tied_model: Path, untied_model: Path
):
    """A checkpoint of adapters gives what the same weights merged into a model give."""
    import torch

    args = make_args(lora_rank=2, model=str(untied_model))
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    for name, weight in policy.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    policy.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged = policy.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    models = tuple(
        str(folder) for folder in (untied_model, tmp_path / "adapter", tmp_path / "merged")
    )
    report = run(models=models, samples=4)
    plain, adapter, whole = (row["metrics"] for row in report["results"])
    assert adapter == whole != plain


# ------------------------------------------------------------------------------- with vLLM


@needs_vllm
def test_two_models_on_two_sets_with_vllm(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    rows = (tiny_model / "test.jsonl").read_text().splitlines(keepends=True)
    sets = []
    for name, part in (("first", rows[:24]), ("second", rows[24:36])):
        sets.append(str(tmp_path / f"{name}.jsonl"))
        Path(sets[-1]).write_text("".join(part))
    shape = {"samples": 4, "max_new_tokens": 64, "batch": 16, "engine": "vllm", "device": "cpu"}
    args = tool.Args(
        models=(str(tiny_model), str(copy)),
        datasets=tuple(sets),
        folder=str(tmp_path / "kept"),
        output=str(tmp_path / "report.json"),
        **shape,
    )
    report = tool.main(args)
    assert json.loads((tmp_path / "report.json").read_text())["results"] == report["results"]
    shown = capsys.readouterr().out
    assert f"{sets[0]}: 24 problems, 4 samples of each" in shown

    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert len(report["differences"]) == 2
    for row in report["differences"]:
        assert row["metrics"] == dict.fromkeys(row["metrics"], zero)

    # every verdict again, from the answers that were kept
    for path in (tmp_path / "kept").rglob("*.jsonl"):
        for line in path.read_text().splitlines()[1:]:
            kept = json.loads(line)
            greedy = kept["greedy"]
            for row in (kept, greedy):
                right = [answer == kept["gold"] for answer in row["answers"]]
                assert row["correct"] == [float(one) for one in right]
            assert len(kept["answers"]) == 4 and len(greedy["answers"]) == 1
    means = [row["metrics"]["mean@4"]["value"] for row in report["results"]]
    assert all(0.2 < mean < 0.8 for mean in means)


def test_the_samples_are_those_of_a_runs_own_evaluation(
    run: Callable, make_args: Callable, tiny_model: Path
):
    problems = str(tiny_model / "test.jsonl")
    shape = {"max_new_tokens": 48, "seed": 7}
    report = run(models=(str(tiny_model),), datasets=(problems,), samples=3, problems=8, **shape)
    ours = report["results"][0]["metrics"]
    args = make_args(
        model=str(tiny_model), eval_dataset=problems, eval_samples=3, eval_problems=8, **shape
    )
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    with Grader() as grader:
        held_out = load_problems(args, "--eval-dataset", tokenizer, grader)
        theirs = evaluate(make_engine(args, policy, tokenizer, held_out), grader, held_out, args)
    assert ours["length"]["value"] == pytest.approx(theirs["eval/length"])
    assert ours["greedy"]["value"] == pytest.approx(theirs["eval/greedy"])
    expected = [theirs[f"eval/accuracy{part}"] for part in ("", "_low", "_high")]
    assert list(ours["mean@3"].values()) == pytest.approx(expected)


# ------------------------------------------------------------------------------- golds


@pytest.mark.parametrize("name", tool.KNOWN)
def test_golds_of_the_known_sets(name: str, grader: Grader):
    """Each is right against itself, its solution too; the page says how many are read, and which
    are not."""
    file, hub = tool.KNOWN[name]
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = f"| `{name}` | `{file}` | `{hub}` |"
    assert row in page
    if not (SHARED_DATA / file).is_file():
        pytest.skip(f"{file} is not here")
    rows = [json.loads(line) for line in (SHARED_DATA / file).read_text().splitlines()]
    golds = [gold_answer(str(row["answer"])) for row in rows]
    assert all(grader.grade([rf"\boxed{{{gold}}}" for gold in golds], golds))
    read = grader.readable(golds)
    assert f"{row} {len(golds)} | {sum(read)} |" in page
    for gold, fine in zip(golds, read, strict=True):
        assert fine or f"- `{name}`: `{gold}`" in page
    solved = [row for row in rows if last_boxed(row.get("solution", "")) is not None]
    assert all(grader.grade([r["solution"] for r in solved], [r["answer"] for r in solved]))


def test_a_gold_that_cannot_be_read_is_found(grader: Grader):
    assert grader.readable(["7", r"\frac{1}{2}", "t(0,4]"]) == [True, True, False]
