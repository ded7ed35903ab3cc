"""The tables of README.md and docs/ are those of the results file."""

import json
from pathlib import Path

import demo

ROOT = Path(__file__).parent.parent


def test_every_page_shows_the_results_file():
    results = json.loads(demo.RESULTS.read_text(encoding="utf-8"))
    for page, text in demo.filled_pages(results).items():
        assert (ROOT / page).read_text(encoding="utf-8") == text, (
            f"{page} is stale: python benchmark/demo.py --write"
        )


def test_every_method_has_a_row_and_learned():
    rows = json.loads(demo.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {row["method"] for row in rows} == set(demo.METHODS)
    gain = {row["method"]: row["after"] - row["before"] for row in rows if row["seed"] == 1}
    assert gain["GRPO"] >= 0.25


def test_a_changed_figure_changes_the_pages():
    results = json.loads(demo.RESULTS.read_text(encoding="utf-8"))
    before = demo.filled_pages(results)
    results["rows"][0]["after"] += 0.1
    assert demo.filled_pages(results)["README.md"] != before["README.md"]
