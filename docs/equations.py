"""Write docs/equations.md: every equation of every method, its line of code and its tests.

    python docs/equations.py

The equations and their tests come from the tables of the methods' pages, the lines from the tags
`# Eq. <tag> [<mark>]` in the code. A row without a tag leads to its function.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PAGES = ("grpo", "ep_grpo", "erpo", "gtpo", "holderpo", "arca", "reft")
TITLE = "# Equations, lines and tests"
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([^)#]+)\)")


@dataclass
class Row:
    """A row of a page's table of equations."""

    tag: str  # "" where the equation has no line of its own
    equation: str
    mark: str
    code: list[tuple[str, str]]  # (function or file, path)
    tests: list[tuple[str, str]]


def read_rows(page: str) -> list[Row]:
    """The rows of a methods page's table of equations; grpo.md has no column of tags."""
    table = re.search(r"^\| (?:tag \| )?equation \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = []
    for line in table[1].splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        tag, equation, source, code, tests = ["–", *cells][-5:]
        mark = re.match(r"\[[a-z-]+\]", source)[0]
        tag = "" if tag == "–" else tag
        rows.append(Row(tag, equation, mark, LINK.findall(code), LINK.findall(tests)))
    return rows


def tagged_lines(source: str, tag: str, mark: str) -> list[int]:
    """Numbers of the lines that end in `# Eq. <tag> [<mark>]`."""
    end = f"# Eq. {tag} {mark}"
    return [n for n, line in enumerate(source.splitlines(), 1) if line.endswith(end)]


def definition_line(source: str, name: str) -> int:
    """Where a function, method or class is defined."""
    nodes = ast.walk(ast.parse(source))
    return next(node.lineno for node in nodes if getattr(node, "name", None) == name)


def tests_that_call(source: str, name: str) -> list[str]:
    """Names of the tests in a file that call a function, in the file's order."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and re.search(rf"\b{name}\(", ast.get_source_segment(source, node))
    ]


def link(label: str, path: str, line: int | None = None) -> str:
    return f"[{label}](../{path}{f'#L{line}' if line else ''})"


def code_cell(row: Row) -> str:
    """The tagged lines, or the functions where the row has no tag."""
    cells = []
    for name, path in row.code:
        source = (ROOT / path).read_text(encoding="utf-8")
        lines = tagged_lines(source, row.tag, row.mark) if row.tag else []
        cells += [link(f"{path}:{line}", path, line) for line in lines]
        if not lines and name.isidentifier():
            line = definition_line(source, name)
            cells.append(link(f"{path}:{line}", path, line))
        elif not lines:
            cells.append(link(path, path))
    return ", ".join(dict.fromkeys(cells))


def tests_cell(row: Row) -> str:
    """The tests that the page names; where it names a file, those in it that use the function."""
    cells = []
    for name, path in row.tests:
        source = (ROOT / path).read_text(encoding="utf-8")
        names = [name] if name.isidentifier() else []
        if not names:
            names = [test for used, _ in row.code for test in tests_that_call(source, used)]
        cells += [link(f"`{test}`", path, definition_line(source, test)) for test in names]
    return ", ".join(dict.fromkeys(cells))


def make_page() -> str:
    """The whole of docs/equations.md."""
    parts = [
        TITLE,
        "Every equation of every method, the line of code that computes it and the tests that hold "
        "it, written by `python docs/equations.py` from the tables of the methods' pages and the "
        "tags in the code.",
        "A line that computes an equation ends in `# Eq. <tag> [<mark>]`. The mark says where the "
        "equation comes from: **[paper]** its text, **[code]** its authors' code, "
        "**[second-hand]** summaries that agree, **[open]** our choice. An equation without a tag "
        "has no line of its own: the link leads to the function.",
    ]
    for page in PAGES:
        text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        lines = [f"## [{title}]({page}.md)", "", "| tag | equation | source | line | tests |"]
        lines.append("|---|---|---|---|---|")
        for row in read_rows(text):
            cells = [row.tag or "–", row.equation, row.mark, code_cell(row), tests_cell(row)]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (FOLDER / "equations.md").write_text(make_page(), encoding="utf-8")
