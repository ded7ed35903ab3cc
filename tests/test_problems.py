"""infra/rows.py and infra/data.py: files, folders and hub layouts, columns, reference answers,
prompts, order."""

import bz2
import copy
import csv
import gzip
import json
import logging
import math
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, SHARED_DATA, byte_tokenizer, shared_rows, write_jsonl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from grading import Grader
from infra import data
from infra.data import (
    Problem,
    Problems,
    check_system_prompt,
    epoch_order,
    grade,
    load_problems,
    prompt_tokens,
    reference_answers,
    turn_ends,
)
from infra.data import reference_answer as reference
from infra.models import named_stop_tokens, seed_for
from infra.rows import read_rows

ROWS = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(5)]
PAIRS = [(row["problem"], row["answer"]) for row in ROWS]
CASES = SHARED_DATA.parent / "cases" / "data"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer("<|endoftext|>")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


@pytest.fixture
def load(make_args, tokenizer, grader, monkeypatch) -> Callable[..., Problems]:
    monkeypatch.setattr(data, "context_limit", lambda _: math.inf)  # some prompts here are long

    def load(name: Path | str, flag: str = "--dataset", **settings: Any) -> Problems:
        field = flag.strip("-").replace("-", "_")
        return load_problems(make_args(**{field: str(name)}, **settings), flag, tokenizer, grader)

    return load


@pytest.fixture
def load_rows(load, tmp_path) -> Callable[..., Problems]:
    """Loads rows from the file data.jsonl."""

    def load_rows(rows: list[dict[str, Any]], *flag: str, **settings: Any) -> Problems:
        return load(write_jsonl(tmp_path / "data.jsonl", rows), *flag, **settings)

    return load_rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_csv(path: Path, rows: list[Any], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    return path


def pairs(problems: Problems) -> list[tuple[str, str]]:
    return [(problem.text, problem.answer) for problem in problems]


# ------------------------------------------------------------------ formats

LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "problem,answer\n" + "".join(f"{problem},{answer}\n" for problem, answer in PAIRS)
FILES = {
    "lines.json": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "DATA.JSONL": LINES.encode(),
    "bom.jsonl": LINES.encode("utf-8-sig"),
    "powershell.jsonl": LINES.encode("utf-16"),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "blank lines.jsonl": LINES.replace("\n", "\n\n").encode(),
    "list.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "wrapped.json": json.dumps({"version": "1", "ids": [1], "data": ROWS}, indent=1).encode(),
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}).encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed.csv.bz2": bz2.compress(TABLE.encode()),
    "commas.csv": TABLE.encode(),
    "tabs.tsv": TABLE.replace(",", "\t").encode(),
    "excel.csv": TABLE.replace(",", ";").encode("utf-8-sig"),
    "unicode.csv": TABLE.replace(",", "\t").encode("utf-16"),
    "crlf.csv": TABLE.replace("\n", "\r\n").encode(),
    # One row per line, and a later row on several lines.
    "sequence.jsonl": LINES.replace('3+1", ', '3+1",\n ').encode(),
    "one line.jsonl": LINES.replace("\n", " ").encode(),
    # Names of files may contain anything.
    "a@b:c.jsonl": LINES.encode(),
    "mit leerzeichen und ü.jsonl": LINES.encode(),
    "v1.5.jsonl": LINES.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_file(load, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert pairs(load(tmp_path / name)) == PAIRS


def test_a_table_keeps_its_text(load, tmp_path):
    """Numbers, dates and quotes do not change. Windows' encoding is tried last."""
    answers = ["007", "3.10", "1/2", "2024-01-01", "123456789012345678901234567890"]
    rows = [(f'1,{i} "café’s €"\n?', answer) for i, answer in enumerate(answers)]
    path = write_csv(tmp_path / "data.csv", [("problem", "answer"), *rows], "cp1252")
    assert pairs(load(path)) == rows


def test_a_line_separator_in_a_text_ends_no_line(load, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"problem": "1\u2028+\x85 1", "answer": 123456789012345678901}\n')
    assert pairs(load(path)) == [("1\u2028+\x85 1", "123456789012345678901")]


def test_a_long_cell(load, tmp_path):
    rows = [("problem", "answer", "trace"), *((q, a, "so " * 50000) for q, a in PAIRS)]
    assert pairs(load(write_csv(tmp_path / "data.csv", rows))) == PAIRS


# Values that `datasets` would change in a column of several types.
MIXED = [
    *(("007", "007"), (7, "7"), ("1/2", "1/2"), (r"\frac{1}{2}", r"\frac{1}{2}")),
    *(("2024-01-01", "2024-01-01"), (2.5, "2.5"), ("x", "x"), (["8", "9"], "8")),
    *(("3.10", "3.10"), ("1e5", "1e5"), (123456789012345678901, "123456789012345678901")),
    *((r'"x"', "x"), ("[1, 2]", "[1, 2]"), ("1.50", "1.50"), ([[1, 2], [3, 4]], "(1, 2), (3, 4)")),
]
MIXED_ROWS = [{"problem": f"{i}?\n", "answer": value} for i, (value, _) in enumerate(MIXED)]
MIXED_PAIRS = [(f"{i}?\n", answer) for i, (_, answer) in enumerate(MIXED)]


def test_half_a_character_discards_a_row(load, tmp_path, capsys):
    """A cut emoji in scraped JSON."""
    (tmp_path / "data.jsonl").write_text(
        '{"problem": "a \\ud83d b", "answer": "1"}\n{"problem": "2+3", "answer": "5"}\n'
    )
    (problem,) = load(tmp_path / "data.jsonl")
    assert problem.answer == "5"
    assert "discarded 1 of 2: problems hold an unpaired surrogate" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ['["\\frac{1}{2}"]', "['\\frac{1}{2}']", '["\\\\frac{1}{2}"]'])
def test_latex_in_a_list_that_is_not_escaped(load_rows, answer):
    (problem,) = load_rows([{"problem": "1/2", "answer": answer}])
    assert problem.answer == "\\frac{1}{2}"


def test_escapes_of_a_chat_written_as_json_stay(load_rows):
    chat = r'[{"role": "user", "content": "Let\nu = 5.\tan 1?"}]'
    (problem,) = load_rows([{"prompt": chat, "answer": "1"}])
    assert problem.text == "Let\nu = 5.\tan 1?"


def test_brackets_too_deep_for_a_parser_are_text(load_rows):
    (problem,) = load_rows([{"problem": "[" * 5000 + '"1"', "answer": "1"}], max_prompt_tokens=9999)
    assert problem.text.endswith('"1"')


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "data/train-0.jsonl", "a.csv"])
def test_a_folder_is_read_like_a_file(load, tmp_path, name):
    """`datasets` would read 007 as 7 and a date as a time."""
    path = tmp_path / "folder" / name
    path.parent.mkdir(parents=True)
    expected = MIXED_PAIRS
    if name.endswith(".jsonl"):
        write_jsonl(path, MIXED_ROWS)
    elif name.endswith(".json"):
        path.write_text(json.dumps({"train": MIXED_ROWS}, indent=1))
    else:
        expected = [row for row in MIXED_PAIRS if "(" not in row[1]]
        write_csv(path, [("problem", "answer"), *expected])
    assert pairs(load(path)) == pairs(load(tmp_path / "folder")) == expected


def test_a_single_row_with_a_list_of_objects(load, tmp_path):
    row = ROWS[0] | {"generations": [{"text": "no"}]}
    assert pairs(load(write_jsonl(tmp_path / "data.jsonl", [row]))) == PAIRS[:1]


def test_a_folder_may_have_the_name_of_a_loader(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "json" / "problems.jsonl", ROWS)
    write_jsonl(tmp_path / "others.jsonl", ROWS)  # `datasets` would read these too
    assert pairs(load("json")) == PAIRS


def test_what_datasets_made_of_a_mixed_column(load, tmp_path):
    r"""It stores texts as JSON, `"1\/2"`, except `007` and `[1, 2]`, which its parser reads."""
    import datasets

    rows = [row | {"task": {"answer": row["answer"], "kind": '"a'}} for row in MIXED_ROWS]
    huge = 123456789012345678901
    rows = [row for row in rows if row["answer"] != huge]  # datasets rejects it
    expected = [pair for pair in MIXED_PAIRS if pair[1] != str(huge)]
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    made = datasets.load_dataset("json", data_files=str(source), split="train")
    made.to_parquet(tmp_path / "data.parquet")
    made.save_to_disk(tmp_path / "saved")
    for name in ("data.parquet", "saved"):
        assert pairs(load(tmp_path / name)) == expected
        assert pairs(load(tmp_path / name, answer_column="task.answer")) == expected


def test_dates_that_datasets_read_as_times(load, tmp_path):
    import datasets

    rows = [{"problem": "When?", "answer": f"2024-01-0{i}"} for i in range(1, 5)]
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    made = datasets.load_dataset("json", data_files=str(source), split="train")
    assert isinstance(made[0]["answer"], datetime)
    made.to_parquet(tmp_path / "data.parquet")
    assert [p.answer for p in load(tmp_path / "data.parquet")] == [row["answer"] for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "folder", "saved"])
def test_columns_that_are_not_needed_take_no_memory(load, tmp_path, name):
    import datasets
    import pyarrow

    trace = "so " * 3000
    rows = [row | {"trace": trace, "solution": trace, "messages": trace} for row in ROWS * 200]
    if name == "a.csv":
        write_csv(tmp_path / name, [rows[0].keys(), *(row.values() for row in rows)])
    elif name == "a.jsonl":
        write_jsonl(tmp_path / name, rows)
    elif name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    else:
        write_parquet(tmp_path / name.replace("folder", "folder/train.parquet"), rows)
    del rows
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    assert len(load(tmp_path / name)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9e6 and pyarrow.total_allocated_bytes() - before < 1e6  # 27 MB in the file


def test_saved_to_disk(load, tmp_path, rejection):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(tmp_path / "all")
    assert len(load(tmp_path / "all")) == 5
    assert len(load(tmp_path / "all", "--eval-dataset")) == 2
    assert len(load(f"{tmp_path / 'all'}@test")) == 2
    rows.save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one")) == len(load(tmp_path / "one", "--eval-dataset")) == 5
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "train")
    line = rejection(load, tmp_path / "train", "--eval-dataset")
    assert "its splits are train, and none is test" in line


BROKEN = [
    ("a.json", b'[{"problem": "1", "answer": "2"},', "JSONDecodeError: Expecting value"),
    ("a.json", b'{"1+1?": "2", "1+2?": "3"}', "columns found: ['1+1?', '1+2?']"),
    ("a.csv", b"1+1?,2\n1+2?,3\n", "columns found: ['1+1?', '2']"),
    ("a.csv", b"problem,answer\n1,000+1,1001\n", "row 1 has more fields than there are columns"),
    ("a.csv", b'problem,answer\n"1+1,2\n1+2,3\n', "unexpected end of data"),
    ("a.parquet", b"nothing of the kind", "ArrowInvalid: "),
    ("a.jsonl.gz", LINES.encode(), "Not a gzipped file"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ("a.txt", LINES.encode(), "its name ends in none of csv, json"),
    ("a/train.jsonl", b'{"problem": 1', "ValueError: train.jsonl: Expecting ',' delimiter: line 1"),
    *[("a.jsonl", content, "holds no problems") for content in (b"", b"\n\n", b"{}\n")],
    # Line 6 is blank.
    ("a.jsonl", LINES.encode() + b'\n{"problem": "1+\n', "line 7 column 16"),
    ("a.jsonl", LINES.encode() + b"\n{'problem'\n", "line 7 column 2"),
    ("a.jsonl", LINES.encode() + b"\n[1, 2]\n", "row 6 is not a JSON object"),
    ("a.jsonl", LINES.encode() + b"\n3\n", "row 6 is not a JSON object"),
    ("a.jsonl", LINES.encode() + b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
]


def test_an_archive_of_several_files_is_rejected(load, tmp_path, rejection):
    """fsspec reads only the first."""
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("train.jsonl", LINES)
        archive.writestr("test.jsonl", LINES)
    line = rejection(load, tmp_path / "a.jsonl.zip")
    assert line.endswith("holds 2 files: unpack it and name the folder")


@pytest.mark.parametrize(("name", "content", "why"), BROKEN)
def test_what_cannot_be_read_is_rejected_with_its_cause(
    load, tmp_path, caplog, name, content, why, rejection
):
    logging.getLogger("datasets").addHandler(caplog.handler)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name.partition("/")[0]
    line = rejection(load, path)
    assert f"--dataset {path}: " in line and why in line
    assert not caplog.records


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    """A dataset as the hub stores it: two configurations with two splits each."""
    text = "---\nconfigs:\n"
    for config in ("main", "socratic"):
        text += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "test"):
            text += f"  - {{split: {split}, path: {config}/{split}-*}}\n"
            rows = [
                {"question": f"{config} {split} {i}", "answer": f"so it is\n#### {i},000"}
                for i in range(3)
            ]
            write_parquet(tmp_path / "hub" / config / f"{split}-00000-of-00001.parquet", rows)
    (tmp_path / "hub" / "README.md").write_text(text + "---\n")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("suffix", "flag", "first"),
    [
        (":main", "--dataset", "main train 0"),
        (":socratic", "--dataset", "socratic train 0"),
        (":main", "--eval-dataset", "main test 0"),
        (":main@train", "--eval-dataset", "main train 0"),
        (":socratic@test", "--dataset", "socratic test 0"),
    ],
)
def test_hub_layout(load, hub_folder, suffix, flag, first):
    problems = load(f"{hub_folder}{suffix}", flag)
    assert problems[0].text == first
    assert [problem.answer for problem in problems] == ["0,000", "1,000", "2,000"]


def test_a_missing_configuration(load, hub_folder, rejection):
    assert "available configs: ['main', 'socratic']" in rejection(load, hub_folder)


def test_folder_without_configurations(load, tmp_path, rejection):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    line = rejection(load, tmp_path, "--eval-dataset")
    assert "its splits are train, and none is test" in line
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    assert len(load(tmp_path)) == 5
    assert len(load(tmp_path, "--eval-dataset")) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("no.jsonl", "no.parquet", "no.jsonl.gz", "no.txt", "data/no.csv", "no.csv@train"),
        *("./no", "no/", "a/b/c", "../no@test", ""),
    ],
)
def test_names_that_look_local_are_not_looked_up_on_the_hub(
    load, tmp_path, monkeypatch, name, rejection
):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    assert rejection(load, name) == f"--dataset {name}: no such file or folder"


def test_other_names_are_looked_up_on_the_hub(load, rejection):
    for name in ("nobody/no-such.set-1.5", "no_such_set:main@train"):
        assert "on the Hub" in rejection(load, name)


@pytest.mark.parametrize("name", ["gsm8k_train", "math_train"])
def test_real_data_does_not_change(load, name, capsys):
    rows = shared_rows(f"data/{name}.jsonl")
    problems = load(SHARED_DATA / f"{name}.jsonl", max_prompt_tokens=10**6)
    assert len(problems) > 0.95 * len(rows)
    by_text = {row["problem"]: row["answer"] for row in rows}
    assert all(by_text[problem.text] == problem.answer for problem in problems)
    if len(problems) < len(rows):
        discarded = f"discarded {len(rows) - len(problems)} of {len(rows)}: reference answers"
        assert discarded in capsys.readouterr().err


# Files of which a part is discarded, and how many problems are left.
IN_PART = {"empty_problem.jsonl": 7, "null_problem.jsonl": 7, "numina15.jsonl": 4}
IN_PART |= {"ints_blank.csv": 7, "fractions.csv": 7}
NAMED = {
    "aqua.jsonl": {"answer_column": "correct"},
    "dict_answer.jsonl": {"answer_column": "answer.value"},
}
REJECTED = {
    "broken.json": "JSONDecodeError: Expecting value: line 1 column 42",
    "dict.json": "columns found: ",
    "no_header.csv": "columns found: ['2', 'what is 1+1?']",
    "metamath.jsonl": "columns found: ['query', 'response', 'type']",
    "orca.jsonl": "8 of 8 reference answers cannot be read",
}


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.glob("*")))
def test_cases(load, capsys, name, rejection):
    if name in REJECTED:
        assert REJECTED[name] in rejection(load, CASES / name)
    else:
        problems = load(CASES / name, **NAMED.get(name, {}))
        assert len(problems) == (IN_PART | {"all_wrong.jsonl": 64}).get(name, 8)
        assert ("discarded" in capsys.readouterr().err) == (name in IN_PART)


# ------------------------------------------------------------------ columns

SHAREGPT = [{"from": "system", "value": "Think."}, {"from": "human", "value": "1+1"}]
VERIFIED = {"from": "assistant", "ground_truth": {"value": "2"}}
DIALOG = {"dialog": [*SHAREGPT, VERIFIED], "problem": "no"}


@pytest.mark.parametrize("question", ["problem", "question", "prompt"])
@pytest.mark.parametrize(
    "answer", ["answer", "final_answer", "expected_answer", "ground_truth", "solution"]
)
def test_columns(load_rows, question, answer):
    for q, a in ((question, answer), (question.title(), f" {answer.upper()}")):
        assert pairs(load_rows([{"id": 7, q: "1+1", a: "2"}])) == [("1+1", "2")]


def test_an_empty_column_is_skipped(load_rows):
    rows = [{"problem": "1+1", "answer": None, "solution": r"\boxed{2}"}]
    assert pairs(load_rows(rows)) == [("1+1", "2")]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"query": "1+1", "correct": "2"}, "query", "correct"),
        ({"Query": "1+1", "correct": "2"}, "query", "CORRECT"),
        ({"extra": {"task": {"Query": "1+1"}}, "a": {"value": "2"}}, "extra.task.query", "a.value"),
        ({"extra": '{"query": "1+1", "x": null}', "a.b": "2"}, "extra.query", "a.b"),
        ({"query": "1+1", "problem": "no", "correct": "2", "answer": "3"}, "query", "correct"),
        (DIALOG, "dialog", "dialog.ground_truth.value"),
    ],
)
def test_named_columns(load_rows, row, question, answer):
    named = {"question_column": question, "answer_column": answer}
    assert pairs(load_rows([row], **named)) == [("1+1", "2")]
    assert pairs(load_rows([row], "--eval-dataset", **named)) == [("1+1", "2")]


def test_held_out_problems_may_be_in_usual_columns(load_rows, rejection):
    assert len(load_rows(ROWS, "--eval-dataset", question_column="query", answer_column="no")) == 5
    line = rejection(load_rows, ROWS, answer_column="no")
    assert "columns found: ['answer', 'problem']; wanted: one of ['no']; --answer-column" in line


def test_unknown_columns(load_rows, tmp_path, rejection):
    for row, wanted in (
        ({"frage": "1+1", "answer": "2"}, ("frage", "problem", "messages", "--question-column")),
        ({"problem": "1+1", "antwort": "2"}, ("antwort", "answer", "solution", "--answer-column")),
    ):
        line = rejection(load_rows, [row])
        assert f"--dataset {tmp_path / 'data.jsonl'}: columns found: " in line
        assert all(name in line for name in wanted)


CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1"}]
IN_PARTS = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
LAYOUTS = {
    "verl": {"prompt": CHAT, "reward_model": {"style": "rule", "ground_truth": "2"}},
    "a list": {"prompt": CHAT, "reward_model": {"ground_truth": ["2"]}},
    "a list in a string": {"prompt": CHAT, "reward_model": {"ground_truth": '["2"]'}},
    "Python's list": {"prompt": CHAT, "answer": "['2']"},
    "an object in a string": {"prompt": CHAT, "reward_model": '{"ground_truth": "2", "x": null}'},
    "messages in a string": {"prompt": json.dumps(CHAT), "answer": "2"},
    "TRL": {"prompt": CHAT, "solution": "2"},
    "an assistant's turn": {"messages": [*CHAT, CHAT[1] | {"role": "assistant"}], "answer": "2"},
    "parts": {"messages": IN_PARTS, "answer": "2"},
    "ShareGPT": {"conversations": SHAREGPT, "answer": "2"},
    "ShareGPT in a string": {"conversations": json.dumps(SHAREGPT), "answer": "2"},
    "its solution": {"conversations": [*SHAREGPT, {"from": "gpt", "value": "So \\boxed{2}"}]},
    "Open-Reasoner-Zero": {"conversations": [*SHAREGPT, VERIFIED]},
    "OpenThoughts": {
        "conversations": [
            {"from": "system", "value": "Think."},
            {"from": "user", "value": "1+1"},
            {"from": "assistant", "value": "<think>\\boxed{3}?</think>It is \\boxed{2}."},
        ]
    },
    "a solution": {"messages": [*CHAT, {"role": "assistant", "content": "It is \\boxed{2}."}]},
    "more keys": {"prompt": [m | {"name": None, "tool_calls": None} for m in CHAT], "answer": 2.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_layouts(load, tmp_path, tokenizer, layout, write):
    suffix = write.__name__.removeprefix("write_")
    [problem] = load(write(tmp_path / f"data.{suffix}", [LAYOUTS[layout]]))
    assert (problem.text, problem.answer) == ("1+1", "2")
    assert tokenizer.decode(problem.prompt) == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("messages", [[*SHAREGPT, VERIFIED], LAYOUTS["a solution"]["messages"]])
def test_a_list_of_conversations(load, tmp_path, messages):
    rows = [messages, messages]
    wrapped = json.dumps({"train": rows, "test": []})
    for text in (json.dumps(rows), json.dumps(rows, indent=1), wrapped):
        (tmp_path / "data.json").write_text(text)
        assert pairs(load(tmp_path / "data.json")) == [("1+1", "2")] * 2
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for count in (1, 2):
        (tmp_path / "data.jsonl").write_text(lines[: count * len(lines) // 2])
        assert pairs(load(tmp_path / "data.jsonl")) == [("1+1", "2")] * count


def test_bytes(load, tmp_path):
    rows = [{"prompt": CHAT, "reward_model": {"ground_truth": x}} for x in (b'["2"]', b"3")]
    problems = load(write_parquet(tmp_path / "data.parquet", rows))
    assert pairs(problems) == [("1+1", "2"), ("1+1", "3")]


def test_earlier_turns_are_kept(load_rows, tokenizer):
    turns = [("user", "1+0"), ("assistant", "1"), ("user", "1+1"), ("assistant", "2")]
    chat = [{"role": role, "content": content} for role, content in turns]
    [problem] = load_rows([{"messages": chat, "answer": "2"}], instruction="Box it.")
    assert problem.text == "1+1"
    prompt = tokenizer.decode(problem.prompt)
    assert "1+0<|im_end|>" in prompt and "1+1\nBox it.<|im_end|>\n<|im_start|>assi" in prompt
    assert prompt.endswith("assistant\n")


@pytest.mark.parametrize(
    "name, why",
    [
        ("data.jsonl@validation", "is a file of rows, which has no split"),
        ("data.jsonl:main", "is a file, which has no configuration"),
        ("data.json:main@train", "is a file, which has no configuration"),
    ],
)
def test_a_file_has_no_configuration_and_most_have_no_split(name, why, load, tmp_path, rejection):
    for ending in ("jsonl", "json"):
        write_jsonl(tmp_path / f"data.{ending}", [{"problem": "2+3", "answer": "5"}])
    line = rejection(load, f"{tmp_path}/{name}")
    assert line == f"--dataset {tmp_path}/{name}: ValueError: {why}"


SPLITS = {"train": [{"problem": "2+3", "answer": "5"}], "test": []}


@pytest.mark.parametrize(
    "content",
    [
        SPLITS,
        SPLITS | {"validation": None},
        SPLITS["train"],
        [SPLITS["train"][0] | {"problem": "1+1"}, *SPLITS["train"]],
    ],
)
def test_a_named_split_of_a_json_file_must_exist(content, load, tmp_path, rejection):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    line = rejection(load, f"{path}@validation")
    why = "ValueError: is not an object with a list of rows for validation"
    assert line == f"--dataset {path}@validation: {why}"


def test_an_empty_split_is_not_replaced_by_another(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(SPLITS))
    assert list(read_rows("--eval-dataset", str(path), ["problem", "answer"])) == []
    assert list(read_rows("--dataset", str(path), ["problem", "answer"])) == SPLITS["train"]
    assert list(read_rows("--eval-dataset", f"{path}@train", ["problem"])) == SPLITS["train"]


def test_an_answer_is_preferred_to_a_solution(load_rows):
    rows = [{"solution": "It is \\boxed{3}", "problem": "1+2", "answer": "3.0", "prompt": "no"}]
    assert pairs(load_rows(rows)) == [("1+2", "3.0")]


# ------------------------------------------------------------------ discarded rows

NO_TEXT = [None, "", " \n", 7, [], ["x"], [{"role": "system", "content": "x"}]]
NO_TEXT += [[{"role": "user", "content": content}] for content in (None, 7, "")]
NO_TEXT += [[{"role": "user", "content": "2+3"}, "x"]]
NO_TEXT += [[{"role": "user", "content": [{"type": "text", "text": 2.5}]}]]
DISCARDED = [
    (
        [*({"problem": problem, "answer": "1"} for problem in NO_TEXT), {"answer": "1"}],
        "problems have no text in 'problem'",
    ),
    (
        [
            {"problem": "?", "answer": r"\frac{1"},
            {"problem": "?", "answer": None},
            {"problem": "?"},
        ],
        "reference answers cannot be read: " + repr(r"\frac{1") + ", None",
    ),
    ([{"problem": "1+" * 99, "answer": "2"}], "prompts exceed --max-prompt-tokens 100"),
]


@pytest.mark.parametrize(("rows", "why"), DISCARDED, ids=["no text", "unreadable", "long"])
def test_rows_are_discarded_with_the_reason(load_rows, tmp_path, capsys, rejection, rows, why):
    """A dataset of such rows alone is rejected."""
    count, name = len(rows), f"--dataset {tmp_path / 'data.jsonl'}"
    assert len(load_rows([*ROWS, *rows], max_prompt_tokens=100)) == 5
    assert capsys.readouterr().err == f"{name}: discarded {count} of {count + 5}: {why}\n"
    line = rejection(load_rows, rows, max_prompt_tokens=100)
    assert line == f"{name}: {count} of {count} {why}"


def test_nothing_left_for_several_reasons_is_rejected(load_rows, capsys):
    rows = [{"problem": "", "answer": "1"}, {"problem": "1+1", "answer": "proof"}]
    with pytest.raises(SystemExit) as stop:
        load_rows(rows)
    assert stop.value.code == 2
    *reasons, line = capsys.readouterr().err.splitlines()
    assert len(reasons) == 2 and all("discarded 1 of 2: " in reason for reason in reasons)
    assert line.endswith(": all 2 problems were discarded")


def test_duplicates_are_kept_and_counted(load_rows, capsys):
    problems = load_rows([*ROWS, *ROWS[:2]])
    assert len(problems) == 7
    assert problems[5] is problems[0]  # a dataset may repeat each problem a hundred times
    assert "2 problems repeat another and are kept" in capsys.readouterr().err


# ------------------------------------------------------------------ reference answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Half of 48 is <<48/2=24>>24.\n#### 72", "72"),
        *(("#### 1,234 ", "1,234"), ("a #### 1\n#### -3", "-3"), ("  42 ", "42")),
        (r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"The roots are $\boxed{x=1}$ and $\boxed{x=-2}$.", "x=1, x=-2"),
        (r"\boxed{1} or \boxed{\{2, 3\}}, \boxed{4", r"1, \{2, 3\}"),
        (r"\boxed{2} as above, so \boxed{2}", "2"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"The sum of the two numbers is $\fbox{7}$.", "7"),
        (r"There are $4 \cdot 3 = \boxed 12$ ways, of which 5 are odd.", "12"),
        (r"\boxed{never closed", r"\boxed{never closed"),
        *((18, "18"), (18.0, "18"), (0.5, "0.5"), (-0.1, "-0.1"), (True, "True"), (["2"], "2")),
        *((1e-05, "0.00001"), (2.5e-07, "0.00000025"), (1e16, "10000000000000000")),
        # MetaMathQA
        ("4 pens cost you just 3*4 = <<3*4=12>>12 coins.\n#### 12\nThe answer is: 12", "12"),
        ("It is $\\frac12$.\nThe answer is: \\frac{1}{2}", r"\frac{1}{2}"),
        ("We add. The answer is: 52", "52"),
        ("We halve the number, and then we see what is left.\nThe answer is: 9\n", "9"),
        ("She has 3 + 4 = 7 of them, so the answer is 7.", "7"),
        ("We count all of the days in the week.\n**Final answer:** Friday", "Friday"),
        ("We count all of the cases.\n\n**The answer is $12$.**", "$12$"),
        ("Therefore, the final answer is -3.5.", "-3.5"),
        ("The number is odd because it ends in a three. The answer is no.", "no"),
        ("Only the second one holds for all of them. The correct answer is B", "B"),
        ("Answer: (1, 2)", "(1, 2)"),
        # A box or #### counts before such a sentence.
        (r"It is \boxed{5}. So the answer is 5 apples.", "5"),
        ("so the answer is 3.\n#### 4", "4"),
        ("<think>\\boxed{1}, no, \\boxed{2}</think> It is \\boxed{3}.", "3"),
        (r"a \boxed{1} <|end_of_thought|> It is $\boxed{3}$. <|end_of_solution|>", "3"),
        *((r'"1\/2"', "1/2"), (r'"\\frac{1}{2}"', r"\frac{1}{2}"), ('"a" or "b"', '"a" or "b"')),
        (r'"\frac{1}{2}"', r'"\frac{1}{2}"'),  # in JSON \f is a control character
        ('"1\n2"', '"1\n2"'),  # JSON escapes line breaks
        *((datetime(2024, 1, 2), "2024-01-02"), (date(2024, 1, 2), "2024-01-02")),
        *((datetime(2024, 1, 2, 3, 4), "2024-01-02T03:04:00"), (Decimal("2.50"), "2.5")),
    ],
)
def test_reference_answer(text, answer):
    assert reference(text) == answer


BIG = "12345678901234567890123456789012345"
BOXED_PROSE = r"\boxed{\text{all real numbers except zero and one}}"


@pytest.mark.parametrize(
    ("value", "any_of", "all_of"),
    [
        ("1, 2", ["1, 2"], ["1, 2"]),
        (["1/2", "0.5", "1/2"], ["1/2", "0.5"], ["1/2, 0.5"]),
        (["1", 2.0, r"\boxed{3}"], ["1", "2", "3"], ["1, 2, 3"]),
        (["x", "x", "y"], ["x", "y"], ["x, y"]),
        ([0, 0.0, "0"], ["0"], ["0"]),
        (["2", None], ["2"], []),
        (["2", "We add. So it is three of the four."], ["2"], []),
        (f"So {BOXED_PROSE}.", [BOXED_PROSE], [BOXED_PROSE]),
        (r"#### \boxed{5}", [r"\boxed{5}"], [r"\boxed{5}"]),
        (Decimal(f"{BIG}.50"), [f"{BIG}.5"], [f"{BIG}.5"]),
        (Decimal("1E+3"), ["1000"], ["1000"]),
        # A list of lists is one answer.
        ([[1, 2], [3, 4]], ["(1, 2), (3, 4)"], ["(1, 2), (3, 4)"]),
        ([["1", "2"]], ["(1, 2)"], ["(1, 2)"]),
        ([[1, 2], [1, 2], [3, 4]], ["(1, 2), (3, 4)"], ["(1, 2), (3, 4)"]),
        ([["2"], ["3"]], ["2, 3"], ["2, 3"]),
        ([[1, [2, 3]]], ["(1, (2, 3))"], ["(1, (2, 3))"]),
        ([[1, None], [3, 4]], [], []),
        *(([], [], []), ([""], [], []), ([[]], [], []), (None, [], [])),
    ],
)
def test_a_list_of_references(value, any_of, all_of):
    assert reference_answers(value, "any") == any_of
    assert reference_answers(value, "all") == all_of
    assert [Grader.reference(text) != "" for text in any_of] == [True] * len(any_of)


def verdicts(grader: Grader, problem: Problem, *answers: str) -> list[bool]:
    boxed = [rf"\boxed{{{answer}}}" for answer in answers]
    return grade(grader, boxed, [problem] * len(boxed))


def test_any_or_all_of_a_list(load_rows, grader):
    pairs_of_roots = {"problem": "Find all pairs.", "answer": [[1, 2], [3, 4]]}
    rows = [
        {"problem": "?", "reward_model": {"ground_truth": '["1/3", "\\\\sqrt{2}", "7"]'}},
        {"problem": "?", "reward_model": {"ground_truth": "5"}},
    ]
    either, single = load_rows(rows)
    assert (either.answer, either.alternatives) == ("1/3", (r"\sqrt{2}", "7"))
    assert verdicts(grader, either, "1/3", r"\sqrt{2}", "7.0", "8", "1/3, 7") == [1, 1, 1, 0, 0]
    # Problems with different numbers of references in one call.
    both = [single, either, single, either]
    assert grade(grader, [r"\boxed{5}", r"\boxed{7}"] * 2, both) == [True] * 4
    assert grade(grader, [r"\boxed{7}", r"\boxed{5}"] * 2, both) == [False] * 4

    together, _ = load_rows(rows, references="all")
    assert (together.answer, together.alternatives) == (r"1/3, \sqrt{2}, 7", ())
    assert verdicts(grader, together, r"7, \sqrt{2}, 1/3", "7", "1/3, 7") == [1, 0, 0]

    for references in ("any", "all"):
        [pairs] = load_rows([pairs_of_roots], references=references)
        found = verdicts(grader, pairs, "(1,2),(3,4)", "(3,4),(1,2)", "1,2,3,4", "(1,2)")
        assert found == [1, 1, 0, 0]


def test_unreadable_entries_of_a_list_are_passed_over(load_rows, capsys):
    [problem] = load_rows([{"problem": "?", "answer": [r"\frac{1", "2", "t(0,4]", "3"]}])
    assert (problem.answer, problem.alternatives) == ("2", ("3",))
    assert "discarded" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "value",
    [
        *(None, "", " ", "None", "null", "nan", "NaN", math.nan, "N/A", "proof", "Proof."),
        *("notfound", "Not found", "#### ", r"\boxed{}", [], ["2", None], {"value": "2"}, [{}]),
        "We show that for all of them the answer is independent of x.",
        "It is clear that in all of the cases the answer is a prime.",
        "First we multiply the numbers to get 52. So Tom has 52 apples left in the basket.",
        "There are 3 red and 4 blue marbles, so 7 in all.",
        "It is enough to show that $AB=CD$. The triangles are congruent, therefore we are done.",
        "Proof. Let $x$ be given.",
        "1. Let $ABC$ be a triangle with the given property.",
        "$n^2$ is even. Hence so is $n$, and we are done.",
    ],
)
def test_no_answer(value):
    assert reference(value) == ""


@pytest.mark.parametrize(
    "answer",
    [
        *("A", "Yes", "False", "no real solutions", r"\text{two lines}", "[1, 2]", "n", "∅"),
        *("Softball, Kickball, Picnic", "18 apples and 3 pears", "ab + bc + ca + abc + abd"),
        "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer",
        "sin x + cos x + tan x + log x + exp x",
    ],
)
def test_words_that_are_an_answer(answer):
    assert reference(answer) == answer


@pytest.mark.parametrize("name", sorted(path.stem for path in SHARED_DATA.glob("*[!s].jsonl")))
def test_every_real_reference_is_an_answer(name):
    references = [row["answer"] for row in shared_rows(f"data/{name}.jsonl")]
    assert [reference(text) for text in references] == [text.strip() for text in references]


# ------------------------------------------------------------------ prompts


def test_the_prompt_goes_through_the_chat_template(load_rows, tokenizer):
    [problem] = load_rows([{"problem": "1+1 = ¿?", "answer": "2"}], instruction="Box it.")
    assert problem.text == "1+1 = ¿?"
    expected = "<|im_start|>user\n1+1 = ¿?\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(problem.prompt) == expected
    assert problem.prompt.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


@pytest.fixture
def prompt(make_args, grader, tmp_path) -> Callable[..., str]:
    """The prompt that a chat template makes of a row."""

    def prompt(template: Any, row: Any = None, *, of_tool: bool = False, **settings: Any) -> str:
        path = write_jsonl(tmp_path / "data.jsonl", [row or {"problem": " 1+1 ", "answer": "2"}])
        tokenizer = byte_tokenizer("<|endoftext|>")
        tokenizer.chat_template, tokenizer.name_or_path = template, "some-model"
        flag, args = "--dataset", make_args(dataset=str(path), **settings)
        if of_tool:  # tools/evaluate.py
            args = SimpleNamespace(**vars(args), models=(), datasets=str(path))
            flag = "--datasets"
        [problem] = load_problems(args, flag, tokenizer, grader)
        return tokenizer.decode(problem.prompt)

    return prompt


TRIMMED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
THINKING = TRIMMED + "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
DATED = "{{ strftime_now('%d %b %Y %H:%M') }} " + TRIMMED
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
OWN = {"prompt": CHAT, "answer": "2"}
ANOTHER = json.dumps({"chat_template": "Question: {{ messages[-1].content }}\nAnswer:"})
CONTENT = json.dumps({"chat_template": "{{ messages[-1].content }}"})


@pytest.mark.parametrize(
    ("template", "row", "settings", "expected"),
    [
        (TRIMMED, None, {"system_prompt": "Think."}, "[system]Think.[user]1+1"),
        (TRIMMED, OWN, {"system_prompt": "Other."}, "[system]Think.[user]1+1"),
        (None, OWN, {}, "Think.\n\n1+1"),  # without a chat template
        (THINKING, None, {}, "[user]1+1"),
        (THINKING, None, {"template_args": '{"enable_thinking": false}'}, "[user]1+1!"),
        (PARTS, None, {"system_prompt": "Think."}, "Think.; 1+1 ;"),
        # This one fails if the content is a text.
        ("{{ messages[0].content[0]['text'].strip() }}", None, {}, "1+1"),
        ({"default": TRIMMED, "tool_use": "x"}, None, {}, "[user]1+1"),  # named templates
        (DATED, None, {}, "01 Jan 2025 00:00 [user]1+1"),
        # another template than the model's, and where the model has none
        (TRIMMED, OWN, {"template_args": ANOTHER}, "Question: 1+1\nAnswer:"),
        (None, OWN, {"template_args": ANOTHER}, "Question: 1+1\nAnswer:"),
        (TRIMMED, None, {"template_args": CONTENT}, " 1+1 "),
        (TRIMMED, OWN, {"template_args": '{"chat_template": null}'}, "Think.\n\n1+1"),
    ],
)
def test_templates(prompt, template, row, settings, expected):
    assert prompt(template, row, **settings) == expected


TURNS = "{% for m in messages %}<|im_start|>{{ m.content }}"
UNTRIMMED = TURNS + " {% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
IN_PARTS = TURNS.replace("content", "content[0]['text'].strip()") + "\n<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "template_args", "ends"),
    [
        (CHAT_TEMPLATE, "", ["<|im_end|>"]),
        (UNTRIMMED, "", ["<|endoftext|>"]),
        (TURNS + "{% endfor %}", "", []),
        (IN_PARTS, "", ["<|im_end|>"]),
        (TRIMMED, "", []),  # no special token
        (None, "", []),
        ("{{ raise_exception('no') }}", "", []),
        ("{{ messages[0].content }}<|im_end|>", "", []),  # no assistant's turn
        (None, json.dumps({"chat_template": CHAT_TEMPLATE}), ["<|im_end|>"]),
        (CHAT_TEMPLATE, ANOTHER, ["<|im_end|>"]),  # the model's own still ends a turn
        (CHAT_TEMPLATE, json.dumps({"chat_template": UNTRIMMED}), ["<|im_end|>", "<|endoftext|>"]),
    ],
)
def test_tokens_that_end_a_turn(template, template_args, ends):
    tokenizer = byte_tokenizer("<|endoftext|>")
    tokenizer.chat_template = template
    found = turn_ends(SimpleNamespace(template_args=template_args), tokenizer)
    assert tokenizer.convert_ids_to_tokens(sorted(found)) == ends


def test_text_unknown_to_the_tokenizer_ends_no_turn(rejection):
    """Its token is special too. A text of --stop-tokens that encodes to it is rejected."""
    words = Tokenizer(WordLevel({"<unk>": 0, "<end>": 1, "7": 2}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    specials = {"unk_token": "<unk>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **specials)
    tokenizer.chat_template = TURNS + " .{{ eos_token }}{% endfor %}"
    assert turn_ends(SimpleNamespace(template_args=""), tokenizer) == {1}

    args = SimpleNamespace(model="words", stop_tokens=("7", "<unk>", "<end>"))
    assert named_stop_tokens(args, tokenizer) == [2, 0, 1]
    args.stop_tokens = ("Question:",)
    line = rejection(named_stop_tokens, args, tokenizer)
    assert line == "--stop-tokens Question:: is not a token of words"


def test_prompts_that_hold_the_templates_tokens(load_rows, capsys, rejection):
    """They are discarded, because the template would write these tokens a second time."""
    plain = {"prompt": "1+1<|endoftext|>", "answer": "2"}  # which the template does not write
    templated = {"prompt": "<|im_start|>user\n1+1<|im_end|>\n", "answer": "2"}
    advice = f"--template-args '{CONTENT}' takes prompts as they are"
    why = f"prompts hold <|im_end|> or <|im_start|>, which the chat template writes too; {advice}"
    line = rejection(load_rows, [templated] * 3)
    assert line.endswith(f": 3 of 3 {why}")
    assert pairs(load_rows([plain, templated])) == [(plain["prompt"], "2")]
    assert capsys.readouterr().err.endswith(f": discarded 1 of 2: {why}\n")
    earlier = [{"role": "system", "content": "<|im_end|>"}, {"role": "user", "content": "1+1"}]
    assert len(load_rows([{"messages": earlier, "answer": "2"}, plain])) == 1
    for problem in load_rows([templated], template_args=CONTENT):
        assert problem.prompt[0] == 258 and problem.prompt.count(258) == 1  # <|im_start|>


def test_a_question_without_a_chat_template():
    tokenizer = byte_tokenizer("<|endoftext|>")
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_tokens(tokenizer, [{"role": "user", "content": "1+1"}])) == "1+1"


@pytest.mark.parametrize(
    ("template", "settings", "why"),
    [
        ("{{ raise_exception('not today') }}", {}, ": not today"),
        ("{{ 1 / 0 }}", {}, ": division by zero"),
        ("{{ unclosed", {}, ": "),
        ("hello", {}, ": it omits the question"),
        ({"rag": TRIMMED}, {}, ": "),
        (NO_SYSTEM + TRIMMED, {"system_prompt": "S"}, ", given --system-prompt S: no system"),
        (TRIMMED, {"template_args": '{"tokenize": 1}'}, ', given --template-args {"tokenize": 1}:'),
        (TRIMMED, {"template_args": '{"add_generation_prompt": 0}'}, ", given --template-args "),
    ],
)
def test_a_template_that_fails(prompt, template, settings, why, rejection):
    line = rejection(prompt, template, **settings)
    assert f"--model some-model: its chat template{why}" in line
    line = rejection(prompt, template, of_tool=True, **settings)
    assert f"--models some-model: its chat template{why}" in line


@pytest.mark.parametrize("template_args", [CONTENT, ANOTHER])
def test_a_template_that_leaves_the_system_prompt_out(prompt, template_args, rejection):
    settings = {"system_prompt": "Think.", "template_args": template_args}
    line = rejection(prompt, TRIMMED, **settings)
    assert line == "--system-prompt Think.: the chat template omits it"


def test_a_system_prompt_may_be_the_templates_default(tokenizer):
    first = "{{ messages[0].content if messages[0].role == 'system' else 'Help.' }}"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = first + "{{ messages[-1].content }}"
    check_system_prompt(tokenizer, "Help.", {})


@pytest.mark.parametrize("value", ["{enable_thinking: false}", "[1]", "[]", "3", "null", "{"])
def test_template_arguments_that_are_no_object(prompt, value, rejection):
    line = rejection(prompt, TRIMMED, template_args=value)
    assert line.startswith(f"--template-args {value}: is not a JSON object")


# ------------------------------------------------------------------ order


def take(problems: Problems, count: int, seed: int = 1) -> list[int]:
    return [int(problem.text) for problem in problems.take(count, seed)]


def problems_of(count: int) -> Problems:
    return Problems(Problem(str(i), "", []) for i in range(count))


def test_each_epoch_is_a_permutation_of_its_own():
    """It depends on the seed, and not on the number of problems taken at a time."""
    expected = []
    for epoch in range(4):
        order = np.random.default_rng(seed_for(1, "epoch", epoch)).permutation(11).tolist()
        assert sorted(order) == list(range(11)) and order not in expected
        expected.append(order)
    problems = problems_of(11)
    assert [take(problems, 11) for _ in range(4)] == expected
    problems = problems_of(11)
    by_fours = [number for _ in range(11) for number in take(problems, 4)]
    assert by_fours == [number for order in expected for number in order]
    assert by_fours != take(problems_of(11), 44, seed=2)


def test_an_epoch_is_shuffled_once():
    epoch_order.cache_clear()
    problems = problems_of(100)
    for _ in range(30):
        take(problems, 9)
    assert epoch_order.cache_info().misses == 3  # 270 problems


def test_a_position_resumes_the_order():
    problems = problems_of(7)
    take(problems, 10)
    resumed = problems_of(7)
    resumed.load_state_dict(problems.state_dict())
    assert take(resumed, 9) == take(problems, 9)
