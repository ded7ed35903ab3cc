"""What the benchmarks share: results written whole, pages filled in from them, and refusals."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))  # where the scripts lie
LINE = 400  # characters of JSON that may stand on one line: a run with its figures


def refuse(flag: str, value: Any, why: str) -> NoReturn:
    """One line that names the flag and the value, then exit code 2."""
    print(f"error: {flag} {value}: {why}", file=sys.stderr)
    raise SystemExit(2)


def chosen(flag: str, names: str, known: Iterable[str]) -> list[str]:
    """The names that a flag lists, separated by commas; all that are known where it is empty."""
    known = list(known)
    asked = [name.strip() for name in names.split(",")] if names else known
    for name in asked:
        if name not in known:
            refuse(flag, name or "''", f"known are {', '.join(known)}")
    return asked


def at_least(args: Any, **least: int) -> None:
    """Refuse what lies below its minimum."""
    for name, minimum in least.items():
        if (value := getattr(args, name)) < minimum:
            refuse("--" + name.replace("_", "-"), value, f"must be at least {minimum}")


def cores(count: int) -> str:
    """How many cores, and of which kind."""
    return f"{count} {'core' if count == 1 else 'cores'}, {platform.machine()}"


def surroundings(*packages: str) -> dict[str, Any]:
    """What figures were measured on and with; packages by the names they are imported by."""
    distributions = packages_distributions()
    installed = {name: distributions[name][0] for name in packages if name in distributions}
    return {
        "machine": cores(len(os.sched_getaffinity(0))),
        "versions": {"python": platform.python_version()}
        | {name: version(distribution) for name, distribution in installed.items()},
    }


def run_command(script: str, flags: list[str], folder: Path) -> list[str]:
    """What starts a run in a folder, or goes on with the one that is there."""
    if (folder / "args.json").exists():
        return [script, "--resume", str(folder)]
    return [script, *flags, "--run-dir", str(folder)]


def write_whole(path: Path, text: str) -> None:
    """A reader, or a start after a kill, never sees a part of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".unfinished")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def as_json(value: Any, newline: str = "\n") -> str:
    """JSON with a line for whatever fits on one."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= LINE or not isinstance(value, dict | list):
        return text
    inner = newline + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(key))}: {as_json(part, inner)}" for key, part in value.items()]
    else:
        parts = [as_json(part, inner) for part in value]
    return text[0] + inner + f",{inner}".join(parts) + newline + text[-1]


def write_json(path: Path, value: Any) -> None:
    write_whole(path, as_json(value) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(head: list[str], rows: Iterable[Iterable[Any]], words: int = 1) -> str:
    """A table; its first columns hold words, the others figures."""
    aligned = ["---"] * words + ["---:"] * (len(head) - words)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(aligned)}|", *lines[1:]])


def filled(page: Path, blocks: dict[str, str]) -> str:
    """A page's text with each block between its marks, `<!-- results:NAME -->` and the next
    `<!-- /results -->`."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marks = rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)"
        text = re.sub(marks, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)
    return text


def write_page(page: Path, blocks: dict[str, str]) -> None:
    write_whole(page, filled(page, blocks))
