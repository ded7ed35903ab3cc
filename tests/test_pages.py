"""docs/: the index, the page of equations and the page of metrics say what is so."""

import re
import sys
from pathlib import Path

import pytest
import shared
import sick

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import equations  # noqa: E402


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\(([a-z_]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


# ------------------------------------------------------------------------------- equations


def test_the_page_of_equations_is_fresh():
    fresh = (DOCS / "equations.md").read_text(encoding="utf-8") == equations.make_page()
    assert fresh, "docs/equations.md is stale: python docs/equations.py"


@pytest.mark.parametrize("page", equations.PAGES)
def test_every_equation_has_its_line_and_a_test(page: str):
    rows = equations.read_rows((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert len(rows) >= 8
    for row in rows:
        tagged = [
            line
            for _, path in row.code
            for line in equations.tagged_lines((ROOT / path).read_text(), row.tag, row.mark)
        ]
        assert tagged or not row.tag, f"{page}.md: no line ends in # Eq. {row.tag} {row.mark}"
        assert equations.tests_cell(row), f"{page}.md: no test of {row.equation}"


def test_rows_by_hand():
    page = (
        "| tag | equation | source | computed by | tested by |\n|---|---|\n"
        "| 3 | a = b | [paper], Eq. 2 | [`f`](../x.py), [`C`](../y.py) | [`test_f`](../t.py) |\n"
        "| – | c | [open] | [`x.py`](../x.py) | [`t.py`](../t.py) |\n\n| 4 | d |\n"
    )
    code = [("f", "x.py"), ("C", "y.py")]
    assert equations.read_rows(page) == [
        equations.Row("3", "a = b", "[paper]", code, [("test_f", "t.py")]),
        equations.Row("", "c", "[open]", [("x.py", "x.py")], [("t.py", "t.py")]),
    ]
    without_tags = page.replace("| tag ", "").replace("| 3 ", "").replace("| – ", "")
    assert [row.tag for row in equations.read_rows(without_tags)] == ["", ""]


def test_lines_by_hand():
    source = "a = 1  # Eq. 3 [paper]\nb = 2  # Eq. 30 [paper]\nc = 3  # Eq. 3 [open]\n"
    assert equations.tagged_lines(source, "3", "[paper]") == [1]
    source = "def f(): ...\nclass C:\n    def g(self): ...\ndef test_f(): f()\ndef test_g(): 'f'\n"
    assert [equations.definition_line(source, name) for name in "fCg"] == [1, 2, 3]
    assert equations.tests_that_call(source, "f") == ["test_f"]


# ------------------------------------------------------------------------------- metrics

RESULTS = shared.read_json(sick.FILE)
RUNS = {run["name"]: run for run in RESULTS["runs"]}


def test_the_page_of_metrics_shows_the_results():
    fresh = shared.filled(sick.PAGE, sick.blocks(RESULTS))
    assert sick.PAGE.read_text(encoding="utf-8") == fresh, (
        "docs/metrics.md is stale: python benchmark/sick.py --write"
    )


def test_every_logged_metric_is_explained():
    named = re.findall(r"`([a-z_/…]+)`", (DOCS / "metrics.md").read_text(encoding="utf-8"))
    for name in RUNS["healthy"]["logged"]:
        assert name in named or f"{name.split('/')[0]}/…" in named, f"{name} is not in metrics.md"


def test_the_runs_are_as_sick_as_the_page_says():
    assert set(RUNS) == set(sick.RUNS)
    assert RUNS["healthy"]["after"] > RUNS["healthy"]["before"] + 0.25
    assert max(RUNS["healthy"]["curves"]["logp_gap/mean"]) < 1e-4
    assert RUNS["stale weights"]["curves"]["logp_gap/mean"][-1] > 1e-2
    assert RUNS["stale, guarded"]["steps"] == 1
    assert "the engine does not hold the policy's weights" in RUNS["stale, guarded"]["stopped"]
