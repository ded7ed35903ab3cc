"""Write docs/equations.md: each method's equations with the line of code and the tests.

    python docs/equations.py

Equations and tests come from the tables of the method pages, lines from the tags
`# Eq. <tag> [<mark>]` in the code. A row without a tag links to its function.
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
HEAD = """# Equations, lines and tests

`python docs/equations.py` writes this page from the tables of the method pages. The first column \
links the line of code that ends in `# Eq. <tag> [<mark>]`, or without a tag the function. \
**[paper]** is the paper's text, **[code]** its authors' code, **[second-hand]** summaries that \
agree or third-party code, **[open]** our choice.
"""


class Row(NamedTuple):
    """A row of a page's equation table."""

    tag: str  # a dash if no single line computes the equation
    equation: str
    mark: str
    code: list[tuple[str, str]]  # (function or file, path)
    tests: list[tuple[str, str]]


def read_rows(page: str) -> list[Row]:
    """The rows of the equation table in a method page. grpo.md has no tag column."""
    table = re.search(r"^\| (?:tag \| )?equation \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = []
    for line in table[1].splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        tag, equation, source, *linked = ["–", *cells][-5:]
        links = [re.findall(r"\[`([^`]+)`\]\(\.\./([^)#]+)\)", cell) for cell in linked]
        rows.append(Row(tag, equation, re.match(r"\[[a-z-]+\]", source)[0], *links))
    return rows


def tagged_lines(source: str, tag: str, mark: str) -> list[int]:
    """Line numbers that end in `# Eq. <tag> [<mark>]`."""
    end = f"# Eq. {tag} {mark}"
    return [n for n, line in enumerate(source.splitlines(), 1) if line.endswith(end)]


def definition_line(source: str, name: str) -> int:
    """Line number of the definition of a function, method or class."""
    nodes = ast.walk(ast.parse(source))
    return next(node.lineno for node in nodes if getattr(node, "name", None) == name)


def tests_that_call(source: str, name: str) -> list[str]:
    """Names of the tests in a file that call a function, in file order."""
    tests = (n for n in ast.parse(source).body if getattr(n, "name", "").startswith("test_"))
    call = rf"\b{name}\("
    return [test.name for test in tests if re.search(call, ast.get_source_segment(source, test))]


def links(row: Row) -> tuple[str, str]:
    """The cells of a row that link its code and its tests.

    The tag and the mark link the first tagged line, or the first function if the row has no tag;
    further lines follow. If the page names a test file, its tests are those that call the function.
    """
    targets, tests = [], []
    for name, path in row.code:
        source = (ROOT / path).read_text(encoding="utf-8")
        found = tagged_lines(source, row.tag, row.mark)
        if not found and name.isidentifier():
            found = [definition_line(source, name)]
        targets += [f"{path}#L{line}" for line in found] or [path]
    for name, path in row.tests:
        source = (ROOT / path).read_text(encoding="utf-8")
        called = [test for used, _ in row.code for test in tests_that_call(source, used)]
        for test in [name] if name.isidentifier() else called:
            tests.append(f"[`{test}`](../{path}#L{definition_line(source, test)})")
    first, *others = dict.fromkeys(targets)
    tag = f"{row.tag} {row.mark}".removeprefix("– ")  # as in the code: `# Eq. 3 [paper]`
    lines = [f"[{tag}](../{first})"]
    lines += [f"[{path.replace('#L', ':')}](../{path})" for path in others]
    return ", ".join(lines), ", ".join(dict.fromkeys(tests))


def make_page() -> str:
    """The text of docs/equations.md."""
    lines = [HEAD]
    for page in PAGES:
        text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        lines += [f"## [{title}]({page}.md)", "", "| code | equation | tests |", "|---|---|---|"]
        for row in read_rows(text):
            code, tests = links(row)
            lines.append(f"| {code} | {row.equation} | {tests} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (FOLDER / "equations.md").write_text(make_page(), encoding="utf-8")
