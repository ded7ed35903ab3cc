"""List the results files that are older than the code, and measure them again.

    python benchmark/tables.py --check    # only list them
    make tables                           # measure: many hours on 2 cores, interruptible

A results file keeps the command that made it, and for each part a digest of the code that the part
depends on: the script of the method and the modules of a training step, without comments,
docstrings and imports. A part whose digest differs from today's, or that has none, is measured
again by that command; of a method in benchmark/compare.py first seed 1, whose figures may show that
nothing has changed. Then the pages are written from the results. benchmark/graders.py keeps no
results: it measures its table in minutes.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import compare
import credit
import shared
import speed
import tyro


@dataclass
class Args:
    check: bool = False  # only list the files; exit code 1 if one is older than the code


def parts(script: str, results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The name of each part of the results, the digest of its code, and of the code today."""
    if script == "benchmark/compare.py":
        for row in results["selection"] + results["rows"]:
            yield row["method"], row.get("code", ""), compare.code(row["method"])
    elif script == "benchmark/speed.py":
        for name, rounds in results["sections"].items():
            for sides in rounds:
                yield name, sides.get("code", ""), speed.code()
    elif script == "benchmark/credit.py":
        yield "all", results.get("code", ""), credit.code()


def run(*command: str) -> None:
    print("python", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=shared.ROOT, check=True)


def main(args: Args) -> None:
    commands = []
    for file in sorted(shared.RESULTS.glob("*.json")):
        results = shared.read_json(file)
        results = results.get(speed.DEVICE, results)  # speed.json has a part for each device
        _, *command = shlex.split(results.get("command", "python none"))
        found = list(parts(command[0], results))
        older = dict.fromkeys(name for name, then, now in found if then != now)
        if older:
            commands.append(command)
            print(f"{file.name}: older than the code: {', '.join(older)}", flush=True)
        elif found:  # the others were made by scripts that are retired
            print(f"{file.name}: up to date", flush=True)
    if args.check:
        sys.exit(1 if commands else 0)

    for script, *flags in commands:
        if script != "benchmark/credit.py":  # it always measures all
            flags.append("--refresh")
        if "real" in flags:
            run("benchmark/real.py")  # makes the model of that task
        run(script, *flags)
    for script in dict.fromkeys(script for script, *_ in commands):
        run(script, "--write")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
