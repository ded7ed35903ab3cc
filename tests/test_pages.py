"""docs/: the index and the page of metrics say what is so."""

import re
import sys
from pathlib import Path

import pytest
import shared
import sick

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import figures  # noqa: E402


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\(([a-z_]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


# ------------------------------------------------------------------------------- metrics

RESULTS = shared.read_json(sick.FILE)
RUNS = {run["name"]: run for run in RESULTS["runs"]}


def test_the_page_of_metrics_shows_the_results():
    fresh = shared.filled(sick.PAGE, sick.blocks(RESULTS))
    assert sick.PAGE.read_text(encoding="utf-8") == fresh, (
        "docs/metrics.md is stale: python benchmark/sick.py --write"
    )


def test_the_figures_are_what_the_results_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.draw_buckets()
    figures.draw_metrics({name: run["curves"] for name, run in RUNS.items()})
    for drawn in tmp_path.iterdir():
        assert drawn.read_text("utf-8") == (DOCS / drawn.name).read_text("utf-8"), drawn.name


def test_curves_of_the_comparison_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    runs = {"GRPO": [[(0, 0.5), (120, 0.5)]], "X": [[(0, 0.5), (60, 1)], [(0, 0.5), (60, 0.8)]]}
    figures.draw_compare("compare.svg", runs)
    drawn = (tmp_path / "compare.svg").read_text("utf-8")
    *_, shade, mean, _, baseline = [line for line in drawn.splitlines() if "<polyline" in line]
    right, top, bottom = 38 + figures.WIDTH - 60, 76, 76 + figures.HEIGHT - 56
    assert f"{right:.1f},{top:.1f}" in shade  # the better seed's 1 is the top
    assert f"{right:.1f},{top + 0.2 * (bottom - top):.1f}" in mean  # 0.9, from 0.5 to 1
    assert f"{right:.1f},{bottom:.1f}" in baseline


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
    assert "vLLM holds stale weights" in RUNS["stale, guarded"]["stopped"]
