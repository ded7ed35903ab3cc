"""Is a run that is killed and goes on the run that was left alone, bit for bit?

    python benchmark/soak.py                               # 50 kills, about 10 minutes
    python benchmark/soak.py --engine transformers --kills 8

Kills a run with SIGKILL at random moments and goes on each time. What it does not know is passed on
to the script. It ends with exit code 1 unless the weights, the optimiser, the metrics and the
rollouts are those of the run left alone.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared import RESULTS, ROOT, as_json, run_command, write_json

# What a kill waits for, and how long after that it comes at most (seconds).
TARGETS = {"start": 6.0, "step": 0.3, "checkpoint": 0.02}


def live_and_die(process: subprocess.Popen, run: Path, draw: random.Random) -> str:
    """Kill a run at a random moment of its start, of a step or of a checkpoint; which of them."""
    target = draw.choice(list(TARGETS))
    delay, wanted = draw.random() * TARGETS[target], draw.randint(2, 3)
    log, written, changes, clean = run / "metrics.jsonl", 0, 0, False
    while process.poll() is None:
        now = log.stat().st_mtime_ns if log.exists() else 0
        changes, written = changes + (now != written), now  # the first is from before, or at start
        checkpoints = [folder.name for folder in run.glob("checkpoints/*")]
        unfinished = any(not re.fullmatch(r"step-\d+", name) for name in checkpoints)
        clean = clean or not unfinished  # what the last kill left is gone
        if {"start": True, "step": changes > wanted, "checkpoint": clean and unfinished}[target]:
            time.sleep(delay)
            process.kill()
            process.wait()
            return target
        time.sleep(0.0005)
    raise SystemExit(f"the run ended by itself, code {process.returncode}; give it more --steps")


def rows(path: Path) -> list[dict[str, Any]]:
    """A run's lines, without what the clock has put there."""
    clock = ("seconds/", "tokens_per_second")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through dictionaries, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a.equal(b) if hasattr(a, "equal") else a == b


def compare(alone: Path, killed: Path, steps: int) -> dict[str, bool]:
    """What must be the same in both runs, and whether it is."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # each life purges some events
    last = f"checkpoints/step-{steps:06d}"
    files = [Path("model/model.safetensors")]
    files += [file.relative_to(alone) for file in alone.glob(f"{last}/*.safetensors")]
    state = [torch.load(run / last / "trainer.pt", weights_only=True) for run in (alone, killed)]
    board = EventAccumulator(str(killed / "tensorboard")).Reload().Scalars("reward")
    metrics, all_steps = rows(killed / "metrics.jsonl"), [*range(steps + 1)]
    return {
        "weights": all((alone / f).read_bytes() == (killed / f).read_bytes() for f in files),
        "optimizer_and_random_state": equal(*state),
        "metrics": rows(alone / "metrics.jsonl") == metrics,
        "each_step_once": [row["step"] for row in metrics] == all_steps,
        "rollouts": rows(alone / "rollouts.jsonl") == rows(killed / "rollouts.jsonl"),
        "tensorboard_each_step_once": [event.step for event in board] == all_steps[1:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--script", default="grpo.py")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak")
    parser.add_argument("--results", type=Path, default=RESULTS / "soak.json")
    args, settings = parser.parse_known_args()
    settings += ["--steps", str(args.steps)]
    begun, killed_in = time.perf_counter(), []
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    output = args.folder / "output.txt"
    alone, killed = args.folder / "alone", args.folder / "killed"

    def start(run: Path, save_every: int) -> subprocess.Popen:
        flags = [*settings, "--save-every", str(save_every)]
        command = [sys.executable, *run_command(args.script, flags, run)]
        with output.open("a") as file:
            return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)

    if start(alone, 50).wait():
        raise SystemExit(f"the run failed: see {output}")
    for life in range(args.kills):
        draw = random.Random(life)
        killed_in.append(live_and_die(start(killed, draw.randint(1, 3)), killed, draw))
        print(f"life {life}: killed in its {killed_in[-1]}", flush=True)
    if start(killed, 50).wait():
        raise SystemExit(f"the last life failed: see {output}")
    result = {
        "script": args.script,
        "settings": settings,
        "kills": len(killed_in),
        "killed_in": dict(collections.Counter(killed_in).most_common()),
        "seconds": round(time.perf_counter() - begun),
        "same": compare(alone, killed, args.steps),
    }
    write_json(args.results, result)
    print(as_json(result))
    if not all(result["same"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
