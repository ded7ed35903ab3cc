"""The CUDA path on one card, in about ten minutes: memory, seconds, what it says when it fails.

    python benchmark/gpu.py

Prints each check beside the bounds expected on an H100 of 80 GB and writes
benchmark/results/gpu.json, from which `python docs/memory.py --write` fills in its page. The 1.5B
model has random weights in the shape of Qwen2.5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402 (the scripts lie one folder up)
import grpo  # noqa: E402

BOUNDS = {
    "attention with a mask, cuDNN's off: share of finite gradients": (1, 1),
    "tiny, 40 steps, then on to 50: exit code": (0, 0),
    "tiny: largest logp_gap/mean": (0, 2e-3),
    "tiny: logp_gap/mean of the last 10 steps, over that of the first": (0, 1.5),
    "tiny: reward of the last 10 steps": (0.6, 1),
    "1.5B: exit code": (0, 0),
    "1.5B: seconds of sync": (0, 1),
    "1.5B: seconds of rollout": (0, 4),
    "1.5B: seconds of score": (0, 1.5),
    "1.5B: seconds of update": (0, 3),
    "1.5B: GB awake": (0, 52),
    "1.5B: GB asleep": (0, 15),
    "1.5B: GB at most": (0, 66),
    "1.5B at --token-budget 16384: fits, or one line names the flag": (1, 1),
}


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def attention() -> list[float]:
    torch.backends.cuda.enable_cudnn_sdp(False)
    finite = []
    for length in (704, 192, 640):
        shape = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
        inputs = [torch.randn(8, 12, length, 128, **shape) for _ in "qkv"]
        mask = torch.ones(8, 1, length, length, dtype=torch.bool, device="cuda").tril()
        scaled_dot_product_attention(*inputs, attn_mask=mask).sum().backward()
        finite += [x.grad.isfinite().all().item() for x in inputs]
    return [sum(finite) / len(finite)]


def tiny(folder: Path) -> list[float]:
    script, run = [sys.executable, "grpo.py"], folder / "tiny"
    flags = ["--lr", "2e-4", "--max-new-tokens", "64", "--steps", "40", "--run-dir", str(run)]
    codes = [
        subprocess.run([*script, *more], cwd=ROOT).returncode
        for more in (flags, ["--resume", str(run), "--steps", "50"])
    ]
    gaps, rewards = ([row[x] for row in metrics(run)] for x in ("logp_gap/mean", "reward"))
    return [max(codes), max(gaps), sum(gaps[-10:]) / sum(gaps[:10]), sum(rewards[-10:]) / 10]


def steps(folder: Path, budget: int) -> None:
    """Four steps of grpo.py on the 1.5B model in this process. Writes the GB in use after the last
    sync, after the last sleep, and at most, to memory.json."""
    from speed import Shape, model_folder, problem_file

    memory = {"sync": 0.0, "sleep": 0.0, "most": 0.0}

    def note(moment: str) -> None:
        free, total = torch.cuda.mem_get_info()
        memory[moment] = (total - free) / 1e9
        memory["most"] = max(memory.values())

    class Noted(engine.VLLM):
        def sync(self, policy: torch.nn.Module) -> None:
            super().sync(policy)
            note("sync")

        def sleep(self) -> None:
            super().sleep()
            note("sleep")

    def watch() -> None:
        while True:
            note("now")
            time.sleep(0.02)

    engine.VLLM = Noted
    threading.Thread(target=watch, daemon=True).start()
    problems = problem_file(Shape("cuda", 16, 8, 256, steps=4), folder)
    model = folder / "model"
    flags = {"model": model if model.exists() else model_folder("1.5B", model), "steps": 4}
    flags |= {"dataset": problems, "eval-dataset": problems, "eval-problems": 1}
    flags |= {"max-new-tokens": 256, "token-budget": budget, "run-dir": folder / str(budget)}
    sys.argv = ["grpo.py", *(str(x) for name, value in flags.items() for x in (f"--{name}", value))]
    grpo.launch(grpo.main, grpo.Args)
    (folder / "memory.json").write_text(json.dumps(memory))


def large(folder: Path) -> list[float]:
    def run(budget: int) -> subprocess.CompletedProcess[str]:
        code = f"import gpu, pathlib; gpu.steps(pathlib.Path({str(folder)!r}), {budget})"
        where = {"cwd": ROOT / "benchmark", "capture_output": True, "text": True}
        return subprocess.run([sys.executable, "-c", code], **where)

    fits, last = run(8192).returncode, metrics(folder / "8192")[-1]
    memory = json.loads((folder / "memory.json").read_text())
    seconds = [last[f"seconds/{part}"] for part in ("sync", "rollout", "score", "update")]
    most = run(16384)
    said = "--token-budget" in most.stderr and "Traceback" not in most.stderr
    memory = [memory[moment] for moment in ("sync", "sleep", "most")]
    return [fits, *seconds, *memory, not most.returncode or said]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        engine.refuse("--device", "cuda", "no CUDA device is there")
    with tempfile.TemporaryDirectory() as name:
        values = [*attention(), *tiny(Path(name)), *large(Path(name))]
    measured = dict(zip(BOUNDS, map(float, values), strict=True))
    results = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, **measured}
    gib = [measured[f"1.5B: GB {when}"] / 1.073741824 for when in ("awake", "asleep", "at most")]
    results["memory"] = {"full": {"1.5B": gib}}  # for docs/memory.py
    file = ROOT / "benchmark" / "results" / "gpu.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for check, (least, most) in BOUNDS.items():
        print(f"{check}: {measured[check]:.3g} (expected {least} to {most})")


if __name__ == "__main__":
    main()
