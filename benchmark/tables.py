"""List the tables whose results are older than the code, and regenerate those.

    python benchmark/tables.py --check    # only list them
    make tables                           # regenerate: many hours on 2 cores, interruptible

A results file keeps a digest of the code that made each part of it: the script of the method and
the modules of a training step, without comments and docstrings. A part whose digest differs from
today's, or that has none, is measured again. Then the pages are written from the results. The table
of graders has no results file: benchmark/graders.py measures it in minutes.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import compare
import credit
import real
import shared
import speed
import tyro

FEW = "--only 'GRPO,VinePPO,VinePPO by token' --prompts 2 --rates 1e-4 2e-4 4e-4 --seeds 4"
NEEDLE = "--task needle --prompts 4"


class Table(NamedTuple):
    results: str  # its file in benchmark/results, without .json
    script: str  # in benchmark/
    flags: str  # that measure it


def of_compare(name: str, flags: str) -> Table:
    files = f"--results benchmark/results/{name}.json --runs runs/{name}"
    return Table(name, "compare", f"{flags} {files}")


TABLES = (
    Table("speed", "speed", "--before 3759d09"),
    Table("credit", "credit", ""),
    Table("compare", "compare", ""),
    of_compare("compare-few", FEW),
    of_compare("compare-tokens", "--only GRPO --steps 360 --rates 4e-4 --seeds 3"),
    of_compare("compare-again", "--only VinePPO,GRPO --seeds 1 --rates 4e-4"),
    of_compare("compare-again-needle", f"{NEEDLE} --only VinePPO,GRPO --seeds 1 --rates 2e-4"),
    of_compare("compare-needle", f"{NEEDLE} --rates 5e-5 1e-4 2e-4 4e-4 8e-4"),
    of_compare("compare-needle-tokens", f"{NEEDLE} --only GRPO --steps 710 --rates 2e-4 --seeds 3"),
    Table("real", "real", ""),
)


@dataclass
class Args:
    check: bool = False  # only list the tables; exit code 1 if one is older than the code


def parts(table: Table, results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The name of each part of the results, the digest of its code, and of the code today."""
    if table.script == "compare":
        for row in results["selection"] + results["rows"]:
            yield row["method"], row.get("code", ""), compare.code(row["method"])
    elif table.script == "real":
        for method, run in results["runs"].items():
            yield method, run.get("code", ""), real.code(method)
    elif table.script == "speed":
        for name, rounds in results[speed.DEVICE]["sections"].items():
            for sides in rounds:
                yield name, sides.get("code", ""), speed.code()
    else:
        yield "all", results.get("code", ""), credit.code()


def older(table: Table) -> list[str]:
    """The parts that other code has made."""
    results = shared.read_json(shared.RESULTS / f"{table.results}.json")
    found = [name for name, then, now in parts(table, results) if then != now]
    return list(dict.fromkeys(found))


def run(table: Table, *flags: str) -> None:
    command = [f"benchmark/{table.script}.py", *shlex.split(table.flags), *flags]
    print("python", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=shared.ROOT, check=True)


def main(args: Args) -> None:
    to_measure = {}
    for table in TABLES:
        names = older(table)
        if names:
            to_measure[table] = names
        state = f"older than the code: {', '.join(names)}" if names else "up to date"
        print(f"{table.results}.json: {state}", flush=True)
    if args.check:
        sys.exit(1 if to_measure else 0)

    for table in to_measure:
        refresh = [] if table.script == "credit" else ["--refresh"]  # credit.py measures all
        run(table, *refresh)
    for script in dict.fromkeys(table.script for table in to_measure):
        run(Table("", script, ""), "--write")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
