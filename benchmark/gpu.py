"""Measure grpo.py with a 1.5B model on one GPU: memory and seconds, in about ten minutes.

    python benchmark/gpu.py

Prints each check with the bounds expected on an H100 of 80 GB and writes
benchmark/results/gpu.json, from which `python docs/memory.py --write` reads its measured values.
The 1.5B model has the shape of Qwen2.5-1.5B and random weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import shared
import torch
from shared import ROOT
from speed import Shape, model_folder, problem_file

import grpo
from infra.cli import launch, require
from infra.run import read_lines
from infra.vllm_engine import VLLMEngine

BOUNDS = {
    "exit code": (0, 0),
    "seconds of sync": (0, 1),
    "seconds of rollout": (0, 4),
    "seconds of score": (0, 1.5),
    "seconds of update": (0, 3),
    "score and update, share of the step": (0, 0.5),
    "GB awake": (0, 52),
    "GB asleep": (0, 15),
    "GB at most": (0, 66),
    "--token-budget 16384: fits, or one line names the flag": (1, 1),
}


def train(folder: Path, budget: int) -> None:
    """Run four steps of grpo.py on the 1.5B model in this process.

    Writes the GB in use after the last sync, after the last sleep, and at most, to memory.json.
    """
    memory = {"sync": 0.0, "sleep": 0.0, "most": 0.0}

    def note(moment: str) -> None:
        free, total = torch.cuda.mem_get_info()
        memory[moment] = (total - free) / 1e9
        memory["most"] = max(memory.values())

    def noting(name: str) -> Callable[..., None]:
        method = getattr(VLLMEngine, name)

        def call(*given: Any) -> None:
            method(*given)
            note(name)

        return call

    def watch() -> None:
        while True:
            note("now")
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    problems = str(problem_file(Shape("1.5B", "cuda", 16, 8, 256, 4, budget), folder))
    model = folder / "model"
    if not model.exists():
        model_folder("1.5B", model)
    sys.argv = ["grpo.py", "--model", str(model), "--steps", "4", "--max-new-tokens", "256"]
    sys.argv += ["--dataset", problems, "--eval-dataset", problems, "--eval-problems", "1"]
    sys.argv += ["--token-budget", str(budget), "--run-dir", str(folder / str(budget))]
    with mock.patch.multiple(VLLMEngine, sync=noting("sync"), sleep=noting("sleep")):
        launch(grpo.main, grpo.Args)
    shared.write_json(folder / "memory.json", memory)


def run(folder: Path, budget: int) -> subprocess.CompletedProcess[str]:
    """Call `train` in a process of its own."""
    code = f"import gpu, pathlib; gpu.train(pathlib.Path({str(folder)!r}), {budget})"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT / "benchmark", capture_output=True, text=True)


def measure(folder: Path) -> dict[str, float]:
    """The measured value of each check."""
    exit_code = run(folder, 8192).returncode
    last = read_lines(folder / "8192" / "metrics.jsonl")[-1]
    memory = shared.read_json(folder / "memory.json")
    larger = run(folder, 16384)
    one_line = "--token-budget" in larger.stderr and "Traceback" not in larger.stderr
    parts = [last[f"seconds/{part}"] for part in ("sync", "rollout", "score", "update")]
    gigabytes = [memory[moment] for moment in ("sync", "sleep", "most")]
    training_share = sum(parts[2:]) / last["seconds/step"]
    values = [exit_code, *parts, training_share, *gigabytes, larger.returncode == 0 or one_line]
    return dict(zip(BOUNDS, map(float, values), strict=True))


def main() -> None:
    require(torch.cuda.is_available(), "--device", "cuda", "no CUDA device is available")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder))
    results = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, **measured}
    gib = [measured[f"GB {when}"] / 1.073741824 for when in ("awake", "asleep", "at most")]
    results["memory"] = {"full": {"1.5B": gib}}  # for docs/memory.py
    shared.write_json(shared.RESULTS / "gpu.json", results)
    for check, (least, most) in BOUNDS.items():
        print(f"{check}: {measured[check]:.3g} (expected {least} to {most})")


if __name__ == "__main__":
    main()
