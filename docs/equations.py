"""Write docs/equations.md: every equation of every method, its line of code and its tests.

    python docs/equations.py

The equations and their tests come from the tables of the methods' pages, the lines from the tags
`# Eq. <tag> [<mark>]` in the code. A row without a tag leads to its function.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PAGES = ("grpo", "ep_grpo", "erpo", "gtpo", "holderpo", "arca", "reft", "vineppo")
HEAD = """# Equations, lines and tests

Every equation of every method, the line of code that computes it and the tests that hold it, \
written by `python docs/equations.py` from the tables of the methods' pages and the tags in the \
code.

A line that computes an equation ends in `# Eq. <tag> [<mark>]`. The mark says where the equation \
comes from: **[paper]** its text, **[code]** its authors' code, **[second-hand]** summaries that \
agree, **[open]** our choice. An equation without a tag has no line of its own: the link leads to \
the function.
"""


class Row(NamedTuple):
    """A row of a page's table of equations."""

    tag: str  # a dash where the equation has no line of its own
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
        tag, equation, source, *linked = ["–", *cells][-5:]
        links = [re.findall(r"\[`([^`]+)`\]\(\.\./([^)#]+)\)", cell) for cell in linked]
        rows.append(Row(tag, equation, re.match(r"\[[a-z-]+\]", source)[0], *links))
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
    tests = (n for n in ast.parse(source).body if getattr(n, "name", "").startswith("test_"))
    call = rf"\b{name}\("
    return [test.name for test in tests if re.search(call, ast.get_source_segment(source, test))]


def links(row: Row) -> tuple[str, str]:
    """The tagged lines, or the functions where the row has no tag; and the tests that the page
    names, or where it names a file those in it that call the function."""
    lines, tests = [], []
    for name, path in row.code:
        source = (ROOT / path).read_text(encoding="utf-8")
        found = tagged_lines(source, row.tag, row.mark)
        if not found and name.isidentifier():
            found = [definition_line(source, name)]
        lines += [f"[{path}:{n}](../{path}#L{n})" for n in found] or [f"[{path}](../{path})"]
    for name, path in row.tests:
        source = (ROOT / path).read_text(encoding="utf-8")
        called = [test for used, _ in row.code for test in tests_that_call(source, used)]
        for test in [name] if name.isidentifier() else called:
            tests.append(f"[`{test}`](../{path}#L{definition_line(source, test)})")
    return ", ".join(dict.fromkeys(lines)), ", ".join(dict.fromkeys(tests))


def make_page() -> str:
    """The whole of docs/equations.md."""
    lines = [HEAD]
    for page in PAGES:
        text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        lines += [f"## [{title}]({page}.md)", "", "| tag | equation | source | line | tests |"]
        lines += ["|---|---|---|---|---|"]
        lines += [f"| {' | '.join([*row[:3], *links(row)])} |" for row in read_rows(text)] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    (FOLDER / "equations.md").write_text(make_page(), encoding="utf-8")
