"""The real model's benchmark: its problems, its runs' lives, and its page."""

import json
import subprocess
import sys
import time
from pathlib import Path

import data
import pytest
import real
import shared

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import figures  # noqa: E402

RUN = {"reward": 0.25, "logp_gap/mean": 0.02, "logp_gap/max": 0.5, "seconds/step": 20.0}
RUN |= dict.fromkeys(("length", "entropy", "zero_variance", "truncated", "boxed"), 0.5)
SCRIPT = """
import json, os, signal, sys, time
folder = sys.argv[sys.argv.index("--run-dir" if "--run-dir" in sys.argv else "--resume") + 1]
os.makedirs(folder, exist_ok=True)
if "--resume" in sys.argv:
    print(*sys.argv, file=open(folder + "/args.json", "a"))
    sys.exit()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
open(folder + "/metrics.jsonl", "w").write(METRICS)
open(folder + "/args.json", "w").write("{}")
time.sleep(60)
"""


@pytest.mark.parametrize("format", real.FORMATS)
def test_problems_are_the_sums_that_are_not_shown(format: str):
    asked = set()
    for row in real.problems(format):
        *shown, last = data.as_chat(row["messages"])
        assert len(shown) == 2 * real.FORMATS[format][0]
        first, _, second = last["content"].removeprefix("What is ").partition("?")[0].split()
        assert int(row["answer"]) == int(first) + int(second)
        asked.add(f"{first} + {second}")
    assert len(asked) == real.LARGEST**2 - len(real.SHOWN) and not asked & set(real.SHOWN)


def test_a_prompt_by_hand():
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    assert real.chat("17 + 5", "two turns, sentence") == [
        user | {"content": "What is 3 + 4?"},
        assistant | {"content": "3 + 4 is \\boxed{7}."},
        user | {"content": "What is 8 + 5?"},
        assistant | {"content": "8 + 5 is \\boxed{13}."},
        user | {"content": "What is 17 + 5?"},
    ]
    said = "What is 17 + 5? Put your final answer in \\boxed{}. For example: 3 + 4 = \\boxed{7}"
    assert real.chat("17 + 5", "instruction and example") == [user | {"content": said}]


def test_no_problem_is_held_out_and_trained_on(tmp_path: Path):
    real.write_problems(tmp_path)
    files = [tmp_path / f"{name}.jsonl" for name in (real.CHOSEN, "train")]
    held_out, train = (set(file.read_text().splitlines()) for file in files)
    assert (len(held_out), len(train)) == (100, 296) and not held_out & train


def test_a_run_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ends = {"eval/accuracy": 0.2, "eval/accuracy_low": 0.123456, "eval/accuracy_high": 0.3}
    rows = [{"step": 0} | ends, {"step": 1} | RUN, {"step": 2} | RUN | {"seconds/step": 30.0}]
    metrics = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "fake.py").write_text(f"METRICS = {metrics!r}\n{SCRIPT}")
    monkeypatch.setattr(real, "ROOT", tmp_path)
    args, run = real.Args(runs=tmp_path / "runs", steps=2), {}
    real.train(args, "fake", tmp_path / "model", run, time.monotonic() + 2)
    assert run["steps"] == 2 and run["memory_gb"] > 0
    assert run["seconds"] == {"step": 25.0} and run["gap_max"] == 0.5
    assert run["evaluations"] == [{"step": 0} | ends | {"eval/accuracy_low": 0.1235}]
    real.train(args, "fake", tmp_path / "model", run, time.monotonic() + 60)
    resumed = (tmp_path / "runs" / "fake" / "args.json").read_text()
    assert resumed == f"{{}}fake.py --resume {tmp_path / 'runs' / 'fake'} --steps 2\n"


def test_a_mistake_is_one_line():
    command = [sys.executable, "benchmark/real.py", "--only", "GRPO,PPO"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --only PPO")
    assert done.stderr.count("\n") == 1


def test_the_page_and_its_figure_show_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not real.Args.results.exists():
        pytest.skip("no results yet: python benchmark/real.py")
    results = shared.read_json(real.Args.results)
    fresh = shared.filled(real.PAGE, real.blocks(results))
    stale = "docs/real.md is stale: python benchmark/real.py --write"
    assert real.PAGE.read_text(encoding="utf-8") == fresh, stale
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.draw_real(results["runs"])
    drawn = (tmp_path / "real.svg").read_text(encoding="utf-8")
    assert drawn == (ROOT / "docs" / "real.svg").read_text(encoding="utf-8")
