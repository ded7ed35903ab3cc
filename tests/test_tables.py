"""benchmark/tables.py: which results are older than the code."""

import json
from pathlib import Path
from typing import Any

import compare
import pytest
import shared
import tables

CODE = '''"""A module."""
LIMIT = 3


def double(x: int) -> int:
    """Twice x."""
    return 2 * x  # a product
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""Twice x."""', '"""x + x."""', True),
        ("  # a product", "", True),
        ("LIMIT = 3", "LIMIT  =  3", True),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("2 * x", "x * 2", False),
    ],
)
def test_the_digest_is_that_of_the_code(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    (tmp_path / "before.py").write_text(CODE)
    (tmp_path / "after.py").write_text(CODE.replace(old, new))
    assert (shared.code_digest("before.py") == shared.code_digest("after.py")) == same


def test_each_results_file_belongs_to_a_table():
    """Except those of benchmarks that are retired: a page names the commit that made each."""
    retired = {"bf16", "openers", "progress", "sick", "soak", "grading"}
    files = {file.stem for file in shared.RESULTS.glob("*.json")}
    assert files - retired == {table.results for table in tables.TABLES}


def test_parts_of_other_code_are_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    rows = [{"method": "GRPO", "code": compare.code("GRPO")}, {"method": "ERPO"}]
    rows.append({"method": "ERPO", "code": compare.code("ERPO")})
    results = {"selection": rows[:1], "rows": rows}
    shared.write_json(tmp_path / "compare.json", results)
    table = tables.Table("compare", "compare", "")
    monkeypatch.setattr(tables, "TABLES", (table,))
    assert tables.older(table) == ["ERPO"]
    with pytest.raises(SystemExit) as stopped:
        tables.main(tables.Args(check=True))
    assert stopped.value.code == 1


def test_older_tables_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    current = [{"method": "GRPO", "code": compare.code("GRPO")}]
    for name, rows in (("compare", current), ("compare-few", [{"method": "GRPO"}])):
        shared.write_json(tmp_path / f"{name}.json", {"selection": [], "rows": rows})
    few = tables.of_compare("compare-few", "--prompts 2")
    monkeypatch.setattr(tables, "TABLES", (tables.Table("compare", "compare", ""), few))
    monkeypatch.setattr(tables.subprocess, "run", lambda *_, **__: None)
    tables.main(tables.Args())
    files = "--results benchmark/results/compare-few.json --runs runs/compare-few"
    assert capsys.readouterr().out.splitlines() == [
        "compare.json: up to date",
        "compare-few.json: older than the code: GRPO",
        f"python benchmark/compare.py --prompts 2 {files} --refresh",
        "python benchmark/compare.py --write",
    ]


@pytest.mark.parametrize(
    "value",
    [
        *({}, [], [{}], {"a": [], "b": {}, "c": [[{"d": 1}]]}),
        {"rows": [{"λ": [1, None]}, 2], "é": "é"},
        {"steps": {"a": [{"b": True}]}, "2": [{"c": 0.5}]},
        {1: 2},  # a name that is no text becomes one
    ],
)
def test_results_are_written_as_json(value: Any):
    assert json.loads(shared.as_json(value)) == json.loads(json.dumps(value))
