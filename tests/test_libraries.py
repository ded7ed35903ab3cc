"""docs/libraries.md: its tests and scripts exist, and its versions are the pinned ones."""

import ast
import re

from conftest import ROOT

LINES = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8").splitlines()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")] for line in LINES if line[:1] == "|"
]
HEAD, _, *ROWS = ROWS


def test_rows_are_complete_and_sorted_by_library():
    assert len(ROWS) >= 20
    assert {len(row) for row in [HEAD, *ROWS]} == {4}
    assert all(cell for row in ROWS for cell in row)
    assert [row[0] for row in ROWS] == sorted(row[0] for row in ROWS)
    assert len({row[1] for row in ROWS}) == len(ROWS)


def test_versions_are_the_pinned_ones():
    pins = set()
    for name in ("requirements.txt", "requirements-cpu.txt", "requirements-scale.txt"):
        text = (ROOT / name).read_text()
        pins.update(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    assert {tuple(row[0].split()) for row in ROWS} <= pins


def test_tests_and_scripts_exist():
    scripts = {f"findings/{path.name}" for path in (ROOT / "findings").glob("*.sh")}
    named = set()
    for row in ROWS:
        holders = re.findall("`([^`]+)`", row[3])
        assert holders and re.sub("`[^`]+`", "", row[3]).strip(" ,") == ""
        for holder in holders:
            path, _, test = holder.partition("::")
            if test:
                body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
                assert test in {getattr(node, "name", "") for node in body}, holder
            named.add(path)
    assert scripts == {path for path in named if path.startswith("findings/")}
