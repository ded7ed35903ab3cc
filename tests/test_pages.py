"""docs/: the index, the pages' sections and results, the figures, the page of metrics."""

import importlib
import re

import compare
import credit
import graders
import pytest
import shared
import speed
from conftest import ROOT

from docs import equations, figures

DOCS = ROOT / "docs"
RESULTS = {file.stem: shared.read_json(file) for file in shared.RESULTS.glob("*.json")}
SICK = {run["name"]: run for run in RESULTS["sick"]["runs"]}


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\(([a-z_]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        (compare.PAGES[0], lambda: compare.blocks(RESULTS["compare"])),
        (compare.PAGES[1], lambda: compare.blocks(RESULTS["compare"])),
        (credit.PAGE, lambda: {"credit": credit.tables(RESULTS["credit"])}),
        (graders.README, lambda: {"kinds": graders.kinds_table(), "rules": graders.rules_table()}),
        (compare.PAGES[2], lambda: compare.blocks(RESULTS["compare"])),
        (speed.PAGE, lambda: {"speed": speed.table(RESULTS["speed"])}),
    ],
    ids=["README", "compare", "credit", "grading", "real", "speed"],
)
def test_a_page_shows_its_results(page, blocks):
    text = page.read_text(encoding="utf-8")
    assert text == shared.fill_blocks(page, blocks()), "run the benchmark with --write"


def test_the_figures_show_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.draw_buckets()
    figures.draw_metrics({name: run["curves"] for name, run in SICK.items()})
    figures.draw_credit(RESULTS["credit"]["policies"]["half-trained"]["example"])
    compare.draw(RESULTS["compare"])
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(file.name for file in DOCS.glob("*.svg"))
    for name in drawn:
        assert (tmp_path / name).read_text("utf-8") == (DOCS / name).read_text("utf-8"), name


def test_curves_of_the_comparison_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    runs = {"GRPO": [[(0, 0.5), (120, 0.5)]], "X": [[(0, 0.5), (60, 1)], [(0, 0.5), (60, 0.8)]]}
    figures.draw_compare("compare.svg", runs)
    drawn = (tmp_path / "compare.svg").read_text("utf-8")
    *_, shade, mean, _, baseline = [line for line in drawn.splitlines() if "<polyline" in line]
    right, top, bottom = 38 + figures.WIDTH - 60, 76, 76 + figures.HEIGHT - 56
    assert f"{right:.1f},{top:.1f}" in shade  # 1 of the better seed is at the top
    assert f"{right:.1f},{top + 0.2 * (bottom - top):.1f}" in mean  # 0.9, from 0.5 to 1
    assert f"{right:.1f},{bottom:.1f}" in baseline


def test_the_functions_to_copy_exist():
    page = (DOCS / "README.md").read_text(encoding="utf-8").partition("## Copying a method")[2]
    rows = re.findall(r"^\| [^|]+ \| ([^|]*`[^|]*) \|", page, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    scripts = [importlib.import_module(name) for name in equations.PAGES]
    assert len(rows) == 11 and len(named) > 15
    assert [name for name in named if not any(hasattr(script, name) for script in scripts)] == []


def test_every_logged_metric_is_explained():
    named = re.findall(r"`([a-z_/…]+)`", (DOCS / "metrics.md").read_text(encoding="utf-8"))
    for name in SICK["healthy"]["logged"]:
        assert name in named or f"{name.split('/')[0]}/…" in named, f"{name} is not in metrics.md"


def test_no_page_has_a_placeholder():
    """A page says what was measured, or that it was not."""
    for page in [ROOT / "README.md", ROOT / "grading" / "README.md", *DOCS.glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for comment in re.findall(r"<!--.*?-->", text, re.DOTALL):
            assert re.fullmatch(r"<!-- (results:[\w-]+|/results) -->", comment), (page, comment)
        assert not re.search(r"\b(TODO|BENCH|NEEDLE|XXX)\b", text), page


def method_page(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", equations.PAGES)
def test_method_pages_have_the_same_sections(page):
    sections = re.findall(r"^## .*", method_page(page), re.MULTILINE)
    assert sections == re.findall(r"^## .*", method_page("grpo"), re.MULTILINE)


def results_of(method: str) -> list[str]:
    """The cells of a method: accuracy on both tasks, cosine of its credit for both policies."""
    cells = []
    for name in ("compare", "compare-needle"):
        runs = compare.at_selected_rates(RESULTS[name])
        cell = compare.versus(runs[method], runs["GRPO"]) if method in runs else ""
        if method == "GRPO":
            cell = f"{compare.mean(runs[method], 'accuracy'):.3f}"
        cells.append(cell)
    for policy in RESULTS["credit"]["policies"].values():
        measures = policy["methods"].get(method)
        cells.append(f"{measures['cosine']['value']:.2f}" if measures else "")
    return cells


@pytest.mark.parametrize("page", equations.PAGES)
def test_a_method_page_gives_the_defaults_of_its_script(page):
    defaults = importlib.import_module(page).Args()
    table = r"^\| flag \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)"
    for line in re.search(table, method_page(page), re.MULTILINE)[1].splitlines():
        flags, shown = line.split("|")[1:3]
        if "not a flag" in shown:
            continue
        names = re.findall("`--([a-z0-9-]+)`", flags)
        values = [part.split()[0].strip("`").replace("−", "-") for part in shown.split(",")]
        for name, value in zip(names, values, strict=True):
            default = getattr(defaults, name.replace("-", "_"))
            if isinstance(default, bool):
                value = {"on": True, "off": False}[value]
            assert type(default)(value) == default, name


def test_fipo_is_compared_with_dapo_of_as_many_updates():
    text = " ".join((DOCS / "fipo.md").read_text(encoding="utf-8").split())
    found = re.search(r"FIPO minus DAPO with four updates is (.+?) on the sums and (.+?) on", text)
    for shown, name in zip(found.groups(), ("compare", "compare-needle"), strict=True):
        runs = compare.at_selected_rates(RESULTS[name])
        assert shown == compare.versus(runs["FIPO"], runs["DAPO with 4 updates"])


@pytest.mark.parametrize("page", equations.PAGES)
def test_a_method_page_shows_its_results(page):
    head = re.escape("| | sums | needle | cosine, starting | cosine, half-trained |")
    table = re.search(rf"^{head}\n.*\n((?:\|.*\n)+)", method_page(page), re.MULTILINE)
    for line in table[1].splitlines():
        method, *cells = [cell.strip() for cell in line[1:-1].split("|")]
        assert cells == results_of(method), method
