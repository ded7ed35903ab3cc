"""Kill a run with SIGKILL at random moments, go on each time, compare with a run left alone.

    python benchmark/soak.py                               # 50 kills, vLLM, about 10 minutes
    python benchmark/soak.py --engine transformers --kills 8
    python benchmark/soak.py --minutes 5                   # a piece of it; call again to go on

What it does not know is passed on to the script. It ends with exit code 1 unless the weights, the
optimiser, the metrics and the rollouts are those of the run left alone, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "soak.json"
# Where a kill is aimed at, and for how many seconds after its beginning.
TARGETS = {"start": 6.0, "rollout": 0.1, "update": 0.04, "metrics": 0.002, "checkpoint": 0.01}


def child(place: str, script: str, *command: str) -> None:
    """Run a script that keeps its present part of the step in the file `place`."""
    sys.path.insert(0, str(ROOT))
    import files

    import runs

    handle = os.open(place, os.O_WRONLY | os.O_CREAT)
    visits: collections.Counter[str] = collections.Counter()

    def mark(part: str) -> None:
        visits[part] += 1
        os.pwrite(handle, f"{part} {visits[part]}".ljust(32).encode(), 0)

    def marked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @contextlib.contextmanager
        def context(*args: Any) -> Iterator[Any]:
            mark(part or args[1])
            with function(*args) as value:
                yield value
            mark("between")

        return context

    def marked_log(*args: Any, **kwargs: Any) -> None:
        mark("metrics")
        log(*args, **kwargs)
        mark("between")

    log, runs.Run.log = runs.Run.log, marked_log
    runs.Run.time = marked(runs.Run.time, "")
    files.whole_folder = marked(files.whole_folder, "checkpoint")
    mark("start")
    sys.argv = [script, *command]
    runpy.run_path(script, run_name="__main__")


def place_of(path: Path) -> tuple[str, int]:
    """The part of the step a run is in, and how often it has begun that part."""
    with contextlib.suppress(OSError, ValueError):
        part, visits = path.read_text().split()
        return part, int(visits)
    return "start", 1


def live_and_die(command: list[str], place: Path, draw: random.Random) -> str | None:
    """Start a run and kill it; the part of the step it was in. None: it came to its end."""
    target = draw.choice(list(TARGETS))
    visit = 1 if target == "start" else draw.randint(1, 2)
    delay = draw.random() * TARGETS[target]
    place.unlink(missing_ok=True)
    with (place.parent / "output.txt").open("a") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    while process.poll() is None:
        part, visits = place_of(place)
        if part == target and visits >= visit:
            time.sleep(delay)
            process.kill()
            process.wait()
            return place_of(place)[0]
        time.sleep(0.0005)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: see {place.parent / 'output.txt'}")
    return None


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
    import logging

    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # each life purges some events
    last = f"checkpoints/step-{steps:06d}"
    weights = (
        "model/model.safetensors",
        *(f.relative_to(alone) for f in alone.glob(f"{last}/*.s*s")),
    )
    state = [torch.load(run / last / "trainer.pt", weights_only=True) for run in (alone, killed)]
    board = EventAccumulator(str(killed / "tensorboard")).Reload().Scalars("reward")
    return {
        "weights": all((alone / f).read_bytes() == (killed / f).read_bytes() for f in weights),
        "optimizer_and_random_state": equal(*state),
        "metrics": rows(alone / "metrics.jsonl") == rows(killed / "metrics.jsonl"),
        "each_step_once": [r["step"] for r in rows(killed / "metrics.jsonl")]
        == [*range(steps + 1)],
        "rollouts": rows(alone / "rollouts.jsonl") == rows(killed / "rollouts.jsonl"),
        "tensorboard_each_step_once": [e.step for e in board] == [*range(1, steps + 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--script", default="grpo.py")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after, to go on later")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args, settings = parser.parse_known_args()
    settings += ["--engine", args.engine, "--steps", str(args.steps)]
    began = time.perf_counter()

    args.folder.mkdir(parents=True, exist_ok=True)
    note = args.folder / "so_far.json"
    so_far = {"settings": settings, "seconds": 0.0, "killed_in": [], "done": False}
    if note.exists():
        so_far = json.loads(note.read_text())
        if so_far["settings"] != settings or so_far["done"]:
            shutil.rmtree(args.folder)
            args.folder.mkdir()
            so_far = {"settings": settings, "seconds": 0.0, "killed_in": [], "done": False}
    before = so_far["seconds"]
    alone, killed = args.folder / "alone", args.folder / "killed"

    def command(run: Path, save_every: int) -> list[str]:
        place = str(args.folder / "place")
        begin = [sys.executable, __file__, "child", place, str(ROOT / args.script), *settings]
        return [*begin, "--save-every", str(save_every), "--resume", "--run-dir", str(run)]

    with (args.folder / "output.txt").open("a") as output:
        subprocess.run(command(alone, 50), cwd=ROOT, stdout=output, stderr=output, check=True)
    while not so_far["done"]:
        if args.minutes and time.perf_counter() - began > 60 * args.minutes:
            print("enough for now; the same command goes on")
            return
        life = len(so_far["killed_in"])
        draw = random.Random(f"{args.seed} {life}")
        one = command(killed, draw.randint(1, 3))
        if life < args.kills:
            part = live_and_die(one, args.folder / "place", draw)
            if part is None:
                raise SystemExit(f"the run ended after {life} kills; give it more --steps")
            so_far["killed_in"].append(part)
        else:
            with (args.folder / "output.txt").open("a") as output:
                subprocess.run(one, cwd=ROOT, stdout=output, stderr=output, check=True)
            so_far["done"] = True
        so_far["seconds"] = before + time.perf_counter() - began
        note.write_text(json.dumps(so_far))
        print(f"life {life}: {'ended' if so_far['done'] else 'killed in ' + part}", flush=True)

    same = compare(alone, killed, args.steps)
    result = {
        "script": args.script,
        "settings": settings,
        "seed": args.seed,
        "kills": len(so_far["killed_in"]),
        "killed_in": dict(collections.Counter(so_far["killed_in"]).most_common()),
        "seconds": round(so_far["seconds"]),
        "same": same,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not all(same.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
