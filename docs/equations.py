"""Point the links of the method pages at lines: those of equations, functions and tests.

    python docs/equations.py

A row of a page's table of equations begins with a source such as `16-18 [paper]`. The line of code
that computes the equation ends in `# Eq. 16-18 [paper]`, and the row's link to the code leads
there. All other links lead to the definition of what they name.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PAGES = (
    "grpo",
    "ep_grpo",
    "erpo",
    "gtpo",
    "holderpo",
    "arca",
    "reft",
    "vineppo",
    "forking",
    "lambda_grpo",
    "fipo",
    "stare",
)
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([^)#]+\.py)(?:#L\d+)?\)")  # [`name`](../file.py#L12)


class Row(NamedTuple):
    """A row of a page's table of equations."""

    source: str  # as in the code after `# Eq. `, or the mark alone if no single line computes it
    equation: str
    code: list[tuple[str, str]]  # (function or file, path)
    tests: list[tuple[str, str]]


def read_rows(page: str) -> list[Row]:
    table = re.search(r"^\| source \| equation \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = []
    for line in table[1].splitlines():
        source, equation, code, tests = line.strip("| ").split(" | ")
        rows.append(Row(source, equation, LINK.findall(code), LINK.findall(tests)))
    return rows


def tagged_line(code: str, source: str) -> int | None:
    """Number of the line that ends in `# Eq. <source>`."""
    for number, line in enumerate(code.splitlines(), 1):
        if line.endswith(f"# Eq. {source}"):
            return number
    return None


def definition_line(code: str, name: str) -> int:
    """Number of the line that defines a function, method or class."""
    for node in ast.walk(ast.parse(code)):
        if getattr(node, "name", None) == name:
            return node.lineno
    raise LookupError(f"a page links {name}, which no longer exists")


def with_lines(page: str) -> str:
    """The text of a page with the current line in each link to code."""
    lines = []
    for text in page.splitlines():
        source = text.split(" | ")[0].strip("| ")

        def current(link: re.Match, source: str = source) -> str:
            name, path = link.groups()
            code = (ROOT / path).read_text(encoding="utf-8")
            line = tagged_line(code, source)
            if line is None and name.isidentifier():
                line = definition_line(code, name)
            return f"[`{name}`](../{path}#L{line})" if line else f"[`{name}`](../{path})"

        lines.append(LINK.sub(current, text))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for page in PAGES:
        file = FOLDER / f"{page}.md"
        file.write_text(with_lines(file.read_text(encoding="utf-8")), encoding="utf-8")
