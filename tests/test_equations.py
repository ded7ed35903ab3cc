"""The pages' tables of equations and the code agree, so that neither can go stale alone.

A line that computes an equation ends in `# Eq. <tag> [<mark>]`; a row of a page's table begins
with the tag, names the source with the same mark, and links the function and its test.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARK = r"(paper|code|second-hand|open)"
HEAD = "| tag | equation | source | computed by | tested by |"
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if HEAD in page.read_text()]
SHARED = [ROOT / "common.py"]

Tag = tuple[str, str]  # such as ("20-25", "second-hand")


def tags_in_code(source: str) -> set[Tag]:
    assert len(re.findall(r"# Eq\.", source)) == len(re.findall(rf"# Eq\. .+? \[{MARK}\]", source))
    return set(re.findall(rf"# Eq\. (.+?) \[{MARK}\]", source))


def rows(page: str) -> list[list[str]]:
    """Cells of each row of the table of equations."""
    lines = page.split(HEAD + "\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def tags_on_page(page: str) -> dict[Tag, str]:
    """Each tag and mark of the table, with the cell that links the code. Rows without a tag (a
    dash) describe what has no line of its own."""
    found = {}
    for tag, _, source, code, _ in rows(page):
        mark = re.match(rf"\[{MARK}\]", source)
        assert mark, f"{tag}: the source begins with no mark"
        if tag != "–":
            found[tag, mark[1]] = code
    return found


def links(text: str) -> list[tuple[str, str]]:
    """(`name`, path) of each link to a file of the project."""
    return re.findall(r"\[`([^`]+)`\]\(\.\./([^)#]+)\)", text)


def test_the_methods_here_have_pages():
    assert {"ep_grpo", "erpo", "gtpo"} <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_and_its_script_have_the_same_equations(page: Path):
    script = (ROOT / f"{page.stem}.py").read_text()
    on_page = tags_on_page(page.read_text())
    assert tags_in_code(script) <= on_page.keys()
    for (tag, mark), code in on_page.items():
        linked = "".join((ROOT / path).read_text() for _, path in links(code))
        assert (tag, mark) in tags_in_code(linked), f"{page.name}: {tag} [{mark}] is in no code"


def test_shared_equations_are_on_a_page():
    on_pages = {tag for page in PAGES for tag in tags_on_page(page.read_text())}
    for file in SHARED:
        assert tags_in_code(file.read_text()) <= on_pages


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_to_functions_that_exist(page: Path):
    for name, path in links(page.read_text()):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
        if name.isidentifier():
            defined = re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text(), re.M)
            assert defined, f"{page.name}: {path} has no {name}"


def test_what_the_comparison_notices():
    assert tags_in_code("x = 1  # Eq. 3 [paper]") == {("3", "paper")}
    with pytest.raises(AssertionError):
        tags_in_code("x = 1  # Eq. 3")
    page = f"{HEAD}\n|---|\n| 3 | x = 1 | [paper] | [`f`](../f.py) | `t` |\n\n"
    assert tags_on_page(page) == {("3", "paper"): "[`f`](../f.py)"}
    with pytest.raises(AssertionError):
        tags_on_page(page.replace("[paper]", "the paper"))
