"""The pages' tables of equations, docs/equations.md and the code agree, so that none goes stale.

A line that computes an equation ends in `# Eq. <tag> [<mark>]`; a row of a page's table begins
with the tag, names the source with the same mark, and links the function and its test.
"""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import equations  # noqa: E402

TAG = r"# Eq\. (.+?) (\[(?:paper|code|second-hand|open)\])"


def tags_in_code(file: Path) -> set[tuple[str, ...]]:
    """Each tag with its mark, such as ("20-25", "[second-hand]")."""
    source = file.read_text(encoding="utf-8")
    found = re.findall(TAG, source)
    assert source.count("# Eq.") == len(found), f"{file.name}: a tag without a mark"
    return set(found)


def rows_of(page: str) -> list[equations.Row]:
    return equations.read_rows((DOCS / f"{page}.md").read_text(encoding="utf-8"))


def test_the_page_of_equations_is_fresh():
    fresh = (DOCS / "equations.md").read_text(encoding="utf-8") == equations.make_page()
    assert fresh, "docs/equations.md is stale: python docs/equations.py"


@pytest.mark.parametrize("page", equations.PAGES)
def test_a_page_and_the_code_have_the_same_equations(page):
    rows = rows_of(page)
    assert len(rows) >= 8
    assert tags_in_code(ROOT / f"{page}.py") <= {(row.tag, row.mark) for row in rows}
    for row in rows:
        in_code = set().union(*(tags_in_code(ROOT / path) for _, path in row.code))
        assert row.tag == "–" or (row.tag, row.mark) in in_code, f"{row.tag} is in no code"
        _, tests = equations.links(row)
        assert tests, f"no test of {row.equation}"


def test_shared_equations_are_on_a_page():
    on_pages = {(row.tag, row.mark) for page in equations.PAGES for row in rows_of(page)}
    assert tags_in_code(ROOT / "common.py") <= on_pages


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_to_functions_that_exist(page):
    for name, path in re.findall(r"\[`([^`]+)`\]\(\.\./([^)#]+)\)", page.read_text("utf-8")):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
        if name.isidentifier():
            defined = re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text(), re.M)
            assert defined, f"{page.name}: {path} has no {name}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_images_are_there(page):
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (DOCS / name).exists(), f"{page.name}: {name}"


def test_rows_by_hand():
    page = (
        "| tag | equation | source | computed by | tested by |\n|---|---|\n"
        "| 3 | a = b | [paper], Eq. 2 | [`f`](../x.py), [`C`](../y.py) | [`test_f`](../t.py) |\n"
        "| – | c | [open] | [`x.py`](../x.py) | [`t.py`](../t.py) |\n\n| 4 | d |\n"
    )
    code = [("f", "x.py"), ("C", "y.py")]
    assert equations.read_rows(page) == [
        equations.Row("3", "a = b", "[paper]", code, [("test_f", "t.py")]),
        equations.Row("–", "c", "[open]", [("x.py", "x.py")], [("t.py", "t.py")]),
    ]
    without_tags = page.replace("| tag ", "").replace("| 3 ", "").replace("| – ", "")
    assert [row.tag for row in equations.read_rows(without_tags)] == ["–", "–"]


def test_lines_by_hand():
    source = "a = 1  # Eq. 3 [paper]\nb = 2  # Eq. 30 [paper]\nc = 3  # Eq. 3 [open]\n"
    source += "d = 4  # Eq. 3 [paper], but not yet\n"
    assert equations.tagged_lines(source, "3", "[paper]") == [1]
    source = "def f(): ...\nclass C:\n    def g(self): ...\ndef test_f(): f()\ndef test_g(): 'f'\n"
    assert [equations.definition_line(source, name) for name in "fCg"] == [1, 2, 3]
    assert equations.tests_that_call(source, "f") == ["test_f"]


def test_a_tag_without_a_mark_is_noticed(tmp_path):
    (tmp_path / "x.py").write_text("x = 1  # Eq. 3 [paper]")
    assert tags_in_code(tmp_path / "x.py") == {("3", "[paper]")}
    (tmp_path / "x.py").write_text("x = 1  # Eq. 3")
    with pytest.raises(AssertionError):
        tags_in_code(tmp_path / "x.py")
