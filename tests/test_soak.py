"""A run that is killed and resumed many times equals an uninterrupted run, bit for bit.

`make test` kills a short run twice. `make soak` kills a run with the default engine fifty
times, which takes about ten minutes.
"""

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_run, needs_vllm

SETTINGS = "--device cpu --precision float32 --lr 1e-3 --prompts-per-step 4 --group-size 4"
SETTINGS += " --max-new-tokens 32 --eval-every 4 --eval-problems 4 --eval-samples 1 --save-every 1"


def start(run: Path, steps: int, engine: str) -> subprocess.Popen:
    command = ["--resume", str(run)]
    if not (run / "args.json").exists():
        command = [*SETTINGS.split(), "--steps", str(steps), "--engine", engine]
        command += ["--run-dir", str(run)]
    with (run.parent / "output.txt").open("a") as output:
        command = [sys.executable, "grpo.py", *command]
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def kill_at_random(process: subprocess.Popen, run: Path, draw: random.Random) -> None:
    """Kill a run during its start, after a saved step or while it writes a checkpoint."""
    moment, delay = draw.choice(["start", "step", "checkpoint"]), draw.random()
    log, begun = run / "metrics.jsonl", time.time()
    reached = moment == "start"
    while process.poll() is None and not reached:
        time.sleep(0.0005)
        resumed = log.exists() and log.stat().st_mtime > begun
        names = [folder.name for folder in run.glob("checkpoints/*")]
        complete = [name for name in names if re.fullmatch(r"step-\d+", name)]
        reached = resumed and bool(complete if moment == "step" else len(names) > len(complete))
    time.sleep(delay * {"start": 6.0, "step": 0.3, "checkpoint": 0.02}[moment])
    assert process.poll() is None, "the run ended before it was killed: it needs more steps"
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("engine", "kills", "steps"),
    [
        ("transformers", 2, 30),
        pytest.param("auto", 50, 120, marks=[pytest.mark.slow, needs_vllm]),
    ],
)
def test_a_killed_run_equals_an_uninterrupted_run(engine, kills, steps, tiny_model, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert start(alone, steps, engine).wait() == 0
    for life in range(kills):
        kill_at_random(start(killed, steps, engine), killed, random.Random(life))
    assert start(killed, steps, engine).wait() == 0
    assert_same_run(alone, killed, f"step-{steps:06d}")
