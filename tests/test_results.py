"""benchmark/shared.py: results files, pages, rejected flags."""

from types import SimpleNamespace

import pytest
import shared


def test_a_results_file_is_written_and_read(tmp_path):
    value = {"name": "Hölder", "curve": [[0, 0.5], [1, 0.5]]}
    shared.write_json(tmp_path / "new" / "results.json", value)
    assert shared.read_json(tmp_path / "new" / "results.json") == value
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]


def test_a_page_shows_the_command_without_refresh(monkeypatch):
    argv = ["/any/benchmark/compare.py", "--refresh", "--only", "GRPO,GTPO by batch"]
    monkeypatch.setattr(shared.sys, "argv", argv)
    assert shared.own_command() == "python benchmark/compare.py --only 'GRPO,GTPO by batch'"
    assert "--refresh" in argv


def test_a_block_replaces_the_text_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    marks = "a\n<!-- results:one -->\n{}<!-- /results -->\n"
    marks += "b\n<!-- results:two -->\n{}<!-- /results -->\n"
    page.write_text(marks.format("old\n\nold\n", "kept\n"))
    shared.write_page(page, {"one": r"\1 new", "three": "nowhere"})
    assert page.read_text() == marks.format("\\1 new\n", "kept\n")


def test_a_table_by_hand():
    table = "| a | b | c |\n|---|---|---:|\n| x |  | 1 |"
    assert shared.markdown(["a", "b", "c"], [["x", "", 1]], words=2) == table


@pytest.mark.parametrize(
    ("names", "seeds", "message"),
    [
        ("a, c", 2, "error: --only c: known are a, b\n"),
        ("a,", 2, "error: --only '': known are a, b\n"),
        ("", 1, "error: --eval-seeds 1: must be at least 2\n"),
    ],
)
def test_a_mistake_is_one_line(names, seeds, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        assert shared.parse_names("--only", names, "ab") == ["a", "b"]
        shared.require_at_least(SimpleNamespace(eval_seeds=seeds), eval_seeds=2)
    assert stopped.value.code == 2 and capsys.readouterr().err == message
