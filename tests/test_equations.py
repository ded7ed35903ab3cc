"""The method pages' tables of equations agree with the code, so that none goes stale.

A line that computes an equation ends in `# Eq. <tag> [<mark>]`. A row of a page's table begins with
the same tag and mark, or with a mark alone, and links the code and its test.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import equations  # noqa: E402

MARK = r"\[(?:paper|code|second-hand|open)\]"
MEANINGS = [
    "[paper]: the paper",
    "[code]: the authors' code",
    "[second-hand]: others' summaries or code",
    "[open]: our choice",
]


def sources_in_code(file: Path) -> set[str]:
    """Each tag with its mark, such as "20-25 [second-hand]"."""
    code = file.read_text(encoding="utf-8")
    found = re.findall(rf"# Eq\. (.+? {MARK})", code)
    assert code.count("# Eq.") == len(found), f"{file.name}: a tag without a mark"
    return set(found)


def rows_of(page) -> list[equations.Row]:
    return equations.read_rows((DOCS / f"{page}.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", equations.PAGES)
def test_links_lead_to_the_current_lines(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert text == equations.with_lines(text), "stale: python docs/equations.py"


@pytest.mark.parametrize("page", equations.PAGES)
def test_a_page_and_the_code_have_the_same_equations(page):
    rows = rows_of(page)
    assert len(rows) >= 8
    assert sources_in_code(ROOT / f"{page}.py") <= {row.source for row in rows}
    for row in rows:
        in_code = set().union(*(sources_in_code(ROOT / path) for _, path in row.code))
        untagged = re.fullmatch(MARK + ".*", row.source)
        assert untagged or row.source in in_code, f"{row.source} is in no code"
        assert row.tests, f"no test of {row.equation}"


def explained_marks(script: str) -> list[str]:
    """The marks with their meanings that a script's docstring gives."""
    docstring = " ".join(ast.get_docstring(ast.parse(script)).split())
    return re.findall(rf"{MARK}: [^;.]+", docstring)


@pytest.mark.parametrize("page", equations.PAGES)
def test_a_script_explains_the_marks_that_it_uses(page):
    script = (ROOT / f"{page}.py").read_text(encoding="utf-8")
    body = script.partition("from __future__")[2]
    used = [text for text in MEANINGS if text.partition(":")[0] in body]
    assert explained_marks(script) == used


def test_explained_marks_by_hand():
    script = '"""[paper]: the\npaper; [open]:\nour choice.\n\nMore [code].\n"""\nx = 1  # [code]\n'
    assert explained_marks(script) == ["[paper]: the paper", "[open]: our choice"]


def test_shared_equations_are_on_a_page():
    on_pages = {row.source for page in equations.PAGES for row in rows_of(page)}
    assert sources_in_code(ROOT / "common.py") <= on_pages


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_to_functions_that_exist(page):
    for name, path in re.findall(r"\[`([^`]+)`\]\(\.\./([^)#]+)[)#]", page.read_text("utf-8")):
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
        "| source | equation | code | test |\n|---|---|---|---|\n"
        "| 3 [paper] | a = b | [`f`](../x.py#L5), [`C`](../y.py) | [`test_f`](../t.py) |\n"
        "| [open] | \\|c\\| | [`x.py`](../x.py) | [`test_c`](../t.py#L12) |\n\n| 4 | d | e | f |\n"
    )
    code = [("f", "x.py"), ("C", "y.py")]
    assert equations.read_rows(page) == [
        equations.Row("3 [paper]", "a = b", code, [("test_f", "t.py")]),
        equations.Row("[open]", "\\|c\\|", [("x.py", "x.py")], [("test_c", "t.py")]),
    ]


def test_lines_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(equations, "ROOT", tmp_path)
    code = "def f():\n    a = 1  # Eq. 3 [paper]\n    b = 2  # Eq. 30 [paper]\n"
    (tmp_path / "x.py").write_text(code + "    c = 3  # Eq. 3 [paper], but not yet\n")
    (tmp_path / "t.py").write_text("class C:\n    def test_f(self): ...\n")
    page = (
        "| 3 [paper] | a | [`f`](../x.py#L2) | [`test_f`](../t.py#L2) |\n"
        "| 30 [paper] | b | [`x.py`](../x.py#L3) | [`test_f`](../t.py#L2) |\n"
        "| [open] | c | [`x.py`](../x.py) | [`C`](../t.py#L1) |\n\nSee [`f`](../x.py#L1).\n"
    )
    assert equations.with_lines(page) == page
    assert equations.with_lines(re.sub(r"#L\d+", "", page)) == page
    assert equations.with_lines(page.replace("#L", "#L9")) == page


def test_a_tag_without_a_mark_is_noticed(tmp_path):
    (tmp_path / "x.py").write_text("x = 1  # Eq. 3 [paper]")
    assert sources_in_code(tmp_path / "x.py") == {"3 [paper]"}
    (tmp_path / "x.py").write_text("x = 1  # Eq. 3")
    with pytest.raises(AssertionError):
        sources_in_code(tmp_path / "x.py")
