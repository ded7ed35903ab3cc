"""benchmark/tables.py: which results are older than the code."""

import json
from pathlib import Path

import compare
import pytest
import shared
import tables

CODE = '''"""A module."""
import math

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
        ("import math", "import math, random", True),
        ("LIMIT = 3", "LIMIT  =  3", True),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("2 * x", "x * 2", False),
    ],
)
def test_the_digest_is_that_of_the_code(old, new, same, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    (tmp_path / "before.py").write_text(CODE)
    (tmp_path / "after.py").write_text(CODE.replace(old, new))
    assert (shared.code_digest("before.py") == shared.code_digest("after.py")) == same


def test_each_results_file_has_the_command_that_makes_it(capsys):
    """Except those of benchmarks that are retired: a page names the commit that made each."""
    retired = {"bf16", "openers", "progress", "sick", "soak", "grading"}
    files = {file.stem for file in shared.RESULTS.glob("*.json")}
    with pytest.raises(SystemExit):
        tables.main(tables.Args(check=True))
    listed = {line.partition(".json: ")[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == files - retired
    for name in files - retired - {"compare", "credit", "speed"}:
        command = shared.read_json(shared.RESULTS / f"{name}.json")["command"]
        assert f"--results benchmark/results/{name}.json --runs runs/{name}" in command
        assert name != "compare-needle" or "--only" not in command  # it has all methods


def compare_results(folder: Path, name: str, command: str, rows: list[dict]) -> None:
    results = {"command": command, "selection": rows[:1], "rows": rows}
    shared.write_json(folder / f"{name}.json", results)


@pytest.fixture
def current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A row of today's code. The folder of the results is empty."""
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    return {"method": "GRPO", "code": compare.code("GRPO")}


def test_parts_of_other_code_are_older(tmp_path, current, capsys):
    rows = [current, {"method": "ERPO"}, {"method": "ERPO", "code": compare.code("ERPO")}]
    compare_results(tmp_path, "compare", "python benchmark/compare.py", rows)
    with pytest.raises(SystemExit) as stopped:
        tables.main(tables.Args(check=True))
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "compare.json: older than the code: ERPO\n"


def test_older_tables_are_measured_and_written(tmp_path, current, monkeypatch, capsys):
    few = "python benchmark/compare.py --only 'GRPO,VinePPO by token' --prompts 2"
    compare_results(tmp_path, "compare", "python benchmark/compare.py", [current])
    compare_results(tmp_path, "compare-few", few, [{"method": "GRPO"}])
    real = "python benchmark/compare.py --task real"
    compare_results(tmp_path, "compare-real", real, [{"method": "ERPO"}])
    shared.write_json(tmp_path / "credit.json", {"command": "python benchmark/credit.py"})
    shared.write_json(tmp_path / "bf16.json", {"command": "python benchmark/bf16.py"})
    monkeypatch.setattr(tables.subprocess, "run", lambda *_, **__: None)
    tables.main(tables.Args())
    assert capsys.readouterr().out.splitlines() == [
        "compare-few.json: older than the code: GRPO",
        "compare-real.json: older than the code: ERPO",
        "compare.json: up to date",
        "credit.json: older than the code: all",
        f"{few} --refresh",
        "python benchmark/real.py",
        f"{real} --refresh",
        "python benchmark/credit.py",
        "python benchmark/compare.py --write",
        "python benchmark/credit.py --write",
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
def test_results_are_written_as_json(value):
    assert json.loads(shared.as_json(value)) == json.loads(json.dumps(value))
