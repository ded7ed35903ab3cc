"""benchmark/real.py: its problems, and the start and resumption of a run."""

import json
from pathlib import Path

import pytest
import real

from infra import data

ENDS = {"eval/accuracy": 0.2, "eval/accuracy_low": 0.123456, "eval/accuracy_high": 0.3}
STEP = {"logp_gap/mean": 0.02, "logp_gap/max": 0.5} | dict.fromkeys(real.CURVES, 0.25)
SCRIPT = """
import pathlib, sys
flag = "--run-dir" if "--run-dir" in sys.argv else "--resume"
run = pathlib.Path(sys.argv[sys.argv.index(flag) + 1])
run.mkdir(parents=True, exist_ok=True)
with open(run / "args.json", "a") as file:
    print(*sys.argv, file=file)
"""


def test_problems_are_the_sums_that_are_not_excluded():
    asked = set()
    for row in real.problems():
        *shown, last = data.as_chat(row["messages"])
        assert len(shown) == 2 * len(real.EXAMPLES)
        first, _, second = last["content"].removeprefix("What is ").rstrip("?").split()
        assert int(row["answer"]) == int(first) + int(second)
        asked.add(f"{first} + {second}")
    assert len(asked) == real.LARGEST**2 - len(real.EXCLUDED)
    assert not asked & {*real.EXCLUDED, *real.EXAMPLES}


def test_a_problem_by_hand():
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    assert real.problem(17, 5)["messages"] == [
        user | {"content": "What is 3 + 4?"},
        assistant | {"content": "3 + 4 is \\boxed{7}."},
        user | {"content": "What is 8 + 5?"},
        assistant | {"content": "8 + 5 is \\boxed{13}."},
        user | {"content": "What is 17 + 5?"},
    ]


def test_held_out_problems_are_not_trained_on(tmp_path: Path):
    real.write_problems(tmp_path)
    files = [tmp_path / f"{name}.jsonl" for name in ("test", "train")]
    held_out, train = (set(file.read_text().splitlines()) for file in files)
    assert (len(held_out), len(train)) == (100, 296) and not held_out & train


def test_a_run_starts_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "fake.py").write_text(SCRIPT)
    monkeypatch.setattr(real, "ROOT", tmp_path)
    monkeypatch.setattr(real, "METHODS", {"Fake": "fake"})
    monkeypatch.setattr(real, "code", lambda _: "abc")
    args = real.Args(runs=tmp_path / "runs", steps=2)
    assert real.train(args, "Fake", tmp_path / "model") > 0
    real.train(args, "Fake", tmp_path / "model")
    folder = tmp_path / "runs" / "abc" / "fake"
    first, second = (folder / "args.json").read_text().splitlines()
    assert first.startswith(f"fake.py {real.SETTINGS} --model {tmp_path / 'model'} ")
    assert second == f"fake.py --resume {folder} --steps 2"


def test_what_a_run_logged(tmp_path: Path):
    rows = [{"step": 0} | ENDS, {"step": 1, "seconds/step": 20.0} | STEP]
    rows.append({"step": 2, "seconds/step": 30.0} | STEP)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = real.logged(tmp_path / "metrics.jsonl")
    assert run["steps"] == 2 and run["gap_max"] == 0.5
    assert run["seconds"] == {"step": 25.0}
    assert run["evaluations"] == [{"step": 0} | ENDS | {"eval/accuracy_low": 0.1235}]
