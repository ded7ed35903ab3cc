"""What the benchmarks share: training runs, results files, blocks of pages, checks of flags."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and their modules

from infra.cli import flag_of, require
from infra.run import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
# The code that a training run depends on, in addition to its script. Tests hold the engines, the
# problems and the verdicts.
TRAINING = ("common.py", "infra/forward.py", "infra/lm_head.py")


def parse_names(flag: str, names: str, known: Iterable[str]) -> list[str]:
    """Split the comma-separated value of a flag; an empty value selects all known names."""
    known = list(known)
    if not names:
        return known
    selected = [name.strip() for name in names.split(",")]
    for name in selected:
        require(name in known, flag, name or "''", f"known are {', '.join(known)}")
    return selected


def require_at_least(args: Any, **minimums: int) -> None:
    """Reject each setting that is below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(args, name)
        require(value >= minimum, flag_of(name), value, f"must be at least {minimum}")


def own_command() -> str:
    """The command that started this process, as a page shows it."""
    command = ["python", f"benchmark/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--refresh" in command:
        command.remove("--refresh")
    return shlex.join(command)


def describe_cores(count: int) -> str:
    noun = "core" if count == 1 else "cores"
    return f"{count} {noun}, {platform.machine()}"


def environment() -> dict[str, Any]:
    """The machine and the versions of Python and of the main packages."""
    distributions = packages_distributions()
    versions = {"python": platform.python_version()}
    for name in ("torch", "vllm", "transformers"):
        if name in distributions:
            versions[name] = version(distributions[name][0])
    return {"machine": describe_cores(len(os.sched_getaffinity(0))), "versions": versions}


def versions_of(results: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in results["versions"].items())


def code_digest(*files: str) -> str:
    """Digest of files of the repository, without comments, docstrings, imports and formatting.

    A results file keeps the digest of the code that made it: see benchmark/tables.py.
    """
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [statement for statement in node.body if computes(statement)]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


def computes(statement: ast.stmt) -> bool:
    """Whether a statement is neither an import nor a docstring of a function or a setting."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return False
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not (is_constant and isinstance(statement.value.value, str))


@functools.cache
def training_code(script: str) -> str:
    """Digest of the code that the runs of a script depend on."""
    return code_digest(script, *TRAINING)


def run_command(script: str, flags: list[str], folder: Path) -> list[str]:
    """The command that starts a training run in a folder, or resumes the run in that folder."""
    if (folder / "args.json").exists():
        return [script, "--resume", str(folder)]
    return [script, *flags, "--run-dir", str(folder)]


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, as_json(value) + "\n")


def as_json(value: Any, top: bool = True) -> str:
    """JSON with each entry of the top object, and each object of a list in it, on its own line."""
    if isinstance(value, dict) and top:
        lines = []
        for name, part in value.items():
            lines.append(f"{json.dumps(str(name))}: {as_json(part, top=False)}")
        return "{\n " + ",\n ".join(lines) + "\n}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        lines = [json.dumps(row, ensure_ascii=False) for row in value]
        return "[\n  " + ",\n  ".join(lines) + "\n ]"
    return json.dumps(value, ensure_ascii=False)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(head: list[str], rows: Iterable[Iterable[Any]], words: int = 1) -> str:
    """A table. The first `words` columns are aligned left, the other columns right."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    alignment = ["---"] * words + ["---:"] * (len(head) - words)
    lines.insert(1, "|" + "|".join(alignment) + "|")
    return "\n".join(lines)


def fill_blocks(page: Path, blocks: dict[str, str]) -> str:
    """The text of a page with each block between its marks: `<!-- results:NAME -->` and the next
    `<!-- /results -->`."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marks = rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)"
        literal = block.replace("\\", r"\\")  # re.sub reads a backslash as an escape
        text = re.sub(marks, rf"\g<1>{literal}\n\g<2>", text, flags=re.DOTALL)
    return text


def write_page(page: Path, blocks: dict[str, str]) -> None:
    write_text(page, fill_blocks(page, blocks))
