"""Data sets become problems: files, folders in the hub's layout, columns, gold answers, order."""

import bz2
import csv
import gzip
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data
import pytest
from conftest import SHARED_DATA, byte_tokenizer
from data import gold_answer

import grpo
from common import Problem, Problems, load_problems
from grading import Grader

ROWS = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer("<|endoftext|>")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


@pytest.fixture
def load(
    make_args: Callable[..., grpo.Args], tokenizer: Any, grader: Grader
) -> Callable[..., Problems]:
    def load(name: Path | str, flag: str = "--dataset", **settings: Any) -> Problems:
        field = flag.strip("-").replace("-", "_")
        return load_problems(make_args(**{field: str(name)}, **settings), flag, tokenizer, grader)

    return load


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def pairs(problems: Problems) -> list[tuple[str, str]]:
    return [(problem.text, problem.answer) for problem in problems]


def refusal(capsys: pytest.CaptureFixture, load: Callable, *call: Any, **settings: Any) -> str:
    """The one line on stderr with which the data set was refused."""
    with pytest.raises(SystemExit) as stop:
        load(*call, **settings)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ------------------------------------------------------------------------------- formats

WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet, ".csv": write_csv}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "problem,answer\n" + "".join(f"{row['problem']},{row['answer']}\n" for row in ROWS)


@pytest.mark.parametrize("suffix", WRITERS)
def test_file(load: Callable, tmp_path: Path, suffix: str):
    problems = load(WRITERS[suffix](tmp_path / f"data{suffix}", ROWS))
    assert pairs(problems) == [(row["problem"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES.encode()),
        ("lines.ndjson", LINES.encode()),
        ("DATA.JSONL", LINES.encode()),
        ("bom.jsonl", LINES.encode("utf-8-sig")),
        ("powershell.jsonl", LINES.encode("utf-16")),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("blank lines.jsonl", LINES.replace("\n", "\n\n").encode()),
        ("list.json", json.dumps(ROWS).encode()),
        ("indented.json", json.dumps(ROWS, indent=2).encode()),
        ("wrapped.json", json.dumps({"version": "1", "ids": [1], "data": ROWS}, indent=1).encode()),
        ("splits.json", json.dumps({"test": ROWS[:1], "train": ROWS}).encode()),
        ("packed.jsonl.gz", gzip.compress(LINES.encode())),
        ("packed.csv.bz2", bz2.compress(TABLE.encode())),
        ("tabs.tsv", TABLE.replace(",", "\t").encode()),
        ("excel.csv", TABLE.replace(",", ";").encode("utf-8-sig")),
        ("unicode.csv", TABLE.replace(",", "\t").encode("utf-16")),
        ("crlf.csv", TABLE.replace("\n", "\r\n").encode()),
    ],
)
def test_file_as_others_write_it(load: Callable, tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert pairs(load(tmp_path / name)) == [(row["problem"], row["answer"]) for row in ROWS]


def test_a_table_keeps_its_text(load: Callable, tmp_path: Path):
    """Neither numbers nor dates nor quotes change, and Windows' encoding is tried last."""
    golds = ["007", "3.10", "1/2", "2024-01-01", "123456789012345678901234567890"]
    rows = [{"problem": f'1,{i} "café’s €"\n?', "answer": gold} for i, gold in enumerate(golds)]
    path = write_csv(tmp_path / "data.csv", rows)
    path.write_bytes(path.read_text(encoding="utf-8").encode("cp1252"))
    assert pairs(load(path)) == [(row["problem"], row["answer"]) for row in rows]


def test_a_line_separator_in_a_text_ends_no_line(load: Callable, tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"problem": "1\u2028+\x85 1", "answer": 123456789012345678901}\n')
    assert pairs(load(path)) == [("1\u2028+\x85 1", "123456789012345678901")]


@pytest.mark.parametrize(
    ("suffix", "flag", "count"),
    [("", "--dataset", 5), ("", "--eval-dataset", 2), ("@test", "--dataset", 2)],
)
def test_saved_to_disk(load: Callable, tmp_path: Path, suffix: str, flag: str, count: int):
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    splits["test"] = splits["test"].select(range(2))
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    assert len(load(f"{tmp_path / 'all'}{suffix}", flag)) == count
    splits["train"].save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one", flag)) == 5


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", b'[{"problem": "1", "answer": "2"},', "JSONDecodeError: Expecting value"),
        ("a.json", b'{"1+1?": "2", "1+2?": "3"}', "columns found: ['1+1?', '1+2?']"),
        ("a.csv", b"1+1?,2\n1+2?,3\n", "columns found: ['1+1?', '2']"),
        ("a.csv", b"problem,answer\n1,000+1,1001\n", "row 1 has more fields than there are col"),
        ("a.csv", b'problem,answer\n"1+1,2\n1+2,3\n', "unexpected end of data"),
        ("a.parquet", b"nothing of the kind", "ArrowInvalid: "),
        ("a.jsonl.gz", LINES.encode(), "Not a gzipped file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.txt", LINES.encode(), "its name ends in none of csv, json"),
        ("a/train.jsonl", b'{"problem": 1', "JSON parse error"),
    ],
)
def test_the_cause_is_said(
    load: Callable, tmp_path: Path, capsys: Any, caplog: Any, name: str, content: bytes, why: str
):
    logging.getLogger("datasets").addHandler(caplog.handler)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name.partition("/")[0]
    assert f"--dataset {path}: " in (line := refusal(capsys, load, path))
    assert why in line and not caplog.records


def test_a_missing_split_is_named(load: Callable, tmp_path: Path, capsys: Any):
    import datasets

    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    line = refusal(capsys, load, tmp_path / "saved", "--eval-dataset")
    assert "its splits are train, and none is test" in line
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    line = refusal(capsys, load, tmp_path, "--eval-dataset")
    assert "Unknown split \"test\". Should be one of ['train']" in line


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A data set as the hub lays it out: two configurations, two splits."""
    folder = tmp_path / "hub"
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            rows = [
                {"question": f"{config} {split} {i}", "answer": f"so it is\n#### {i},000"}
                for i in range(3)
            ]
            write_parquet(folder / config / f"{split}-00000-of-00001.parquet", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n"
            f"  - {{split: train, path: {config}/train-*}}\n"
            f"  - {{split: test, path: {config}/test-*}}\n"
            for config in ("main", "socratic")
        )
        + "---\n"
    )
    return folder


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
def test_hub_layout(load: Callable, hub_folder: Path, suffix: str, flag: str, first: str):
    problems = load(f"{hub_folder}{suffix}", flag)
    assert problems[0].text == first
    assert [problem.answer for problem in problems] == ["0,000", "1,000", "2,000"]


def test_folder_without_configurations(load: Callable, tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    assert len(load(tmp_path)) == 5
    assert len(load(tmp_path, "--eval-dataset")) == 2


@pytest.mark.parametrize("name", ["gsm8k_train", "math_train"])
def test_real_data_goes_through_unchanged(load: Callable, name: str, capsys: Any):
    path = SHARED_DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the shared data is not here")
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    problems = load(path, max_prompt_tokens=10**6)
    assert len(problems) > 0.95 * len(rows)
    by_text = {row["problem"]: row["answer"] for row in rows}
    assert all(by_text[problem.text] == problem.answer for problem in problems)
    if len(problems) < len(rows):
        assert f"{len(rows) - len(problems)} of {len(rows)} gold answers" in capsys.readouterr().err


CASES = SHARED_DATA.parent / "cases" / "data"
ONLY_IN_PART = {"empty_problem.jsonl": 7, "null_problem.jsonl": 7, "numina15.jsonl": 4}
ONLY_IN_PART |= {"ints_blank.csv": 7, "fractions.csv": 7, "all_wrong.jsonl": 64}
NAMED = {
    "aqua.jsonl": {"answer_column": "correct"},
    "dict_answer.jsonl": {"answer_column": "answer.value"},
}
REFUSED = {
    "broken.json": "JSONDecodeError: Expecting value: line 1 column 42",
    "dict.json": "columns found: ",
    "no_header.csv": "columns found: ['2', 'what is 1+1?']",
    "metamath.jsonl": "columns found: ['query', 'response', 'type']",
    "orca.jsonl": "8 of 8 gold answers cannot be read",
}


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.glob("*")))
def test_cases(load: Callable, capsys: Any, name: str):
    if name in REFUSED:
        assert REFUSED[name] in refusal(capsys, load, CASES / name)
    else:
        problems = load(CASES / name, **NAMED.get(name, {}))
        assert len(problems) == ONLY_IN_PART.get(name, 8)
        dropped = "dropped" in capsys.readouterr().err
        assert dropped == (name in ONLY_IN_PART and name != "all_wrong.jsonl")


# ------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("question", ["problem", "question", "prompt"])
@pytest.mark.parametrize(
    "answer", ["answer", "final_answer", "expected_answer", "ground_truth", "solution"]
)
def test_columns(load: Callable, tmp_path: Path, question: str, answer: str):
    for q, a in ((question, answer), (question.title(), f" {answer.upper()}")):
        rows = [{"id": 7, q: "1+1", a: "2"}]
        assert pairs(load(write_jsonl(tmp_path / "data.jsonl", rows))) == [("1+1", "2")]


def test_a_column_that_holds_nothing_is_passed_over(load: Callable, tmp_path: Path):
    rows = [{"problem": "1+1", "answer": None, "solution": r"\boxed{2}"}]
    assert pairs(load(write_jsonl(tmp_path / "data.jsonl", rows))) == [("1+1", "2")]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"query": "1+1", "correct": "2"}, "query", "correct"),
        ({"Query": "1+1", "correct": "2"}, "query", "CORRECT"),
        ({"extra": {"task": {"Query": "1+1"}}, "a": {"value": "2"}}, "extra.task.query", "a.value"),
        ({"extra": '{"query": "1+1", "x": null}', "a.b": "2"}, "extra.query", "a.b"),
        ({"query": "1+1", "problem": "no", "correct": "2", "answer": "3"}, "query", "correct"),
    ],
)
def test_named_columns(load: Callable, tmp_path: Path, row: dict, question: str, answer: str):
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    named = {"question_column": question, "answer_column": answer}
    assert pairs(load(path, **named)) == [("1+1", "2")]
    assert pairs(load(path, "--eval-dataset", **named)) == [("1+1", "2")]


def test_held_out_problems_may_lie_in_known_columns(load: Callable, tmp_path: Path, capsys: Any):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS)
    assert len(load(path, "--eval-dataset", question_column="query", answer_column="no")) == 5
    line = refusal(capsys, load, path, answer_column="no")
    assert "columns found: ['answer', 'problem']; wanted: one of ['no']; --answer-column" in line


CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1"}]
LAYOUTS = {
    "verl": {"prompt": CHAT, "reward_model": {"style": "rule", "ground_truth": "2"}},
    "a list": {"prompt": CHAT, "reward_model": {"ground_truth": ["2"]}},
    "a list in a string": {"prompt": CHAT, "reward_model": {"ground_truth": '["2"]'}},
    "Python's list": {"prompt": CHAT, "answer": "['2']"},
    "an object in a string": {"prompt": CHAT, "reward_model": '{"ground_truth": "2", "x": null}'},
    "messages in a string": {"prompt": json.dumps(CHAT), "answer": "2"},
    "TRL": {"prompt": CHAT, "solution": "2"},
    "an assistant's turn": {
        "messages": [*CHAT, {"role": "assistant", "content": "2"}],
        "answer": "2",
    },
    "parts": {
        "messages": [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT
        ],
        "answer": "2",
    },
    "more keys": {"prompt": [m | {"name": None, "tool_calls": None} for m in CHAT], "answer": 2.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_layouts(load: Callable, tmp_path: Path, tokenizer: Any, layout: str, suffix: str):
    (problem,) = load(WRITERS[suffix](tmp_path / f"data{suffix}", [LAYOUTS[layout]]))
    assert (problem.text, problem.answer) == ("1+1", "2")
    assert tokenizer.decode(problem.prompt) == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_bytes(load: Callable, tmp_path: Path):
    rows = [{"prompt": CHAT, "reward_model": {"ground_truth": gold}} for gold in (b'["2"]', b"3")]
    problems = load(write_parquet(tmp_path / "data.parquet", rows))
    assert pairs(problems) == [("1+1", "2"), ("1+1", "3")]


def test_earlier_turns_are_kept(load: Callable, tmp_path: Path, tokenizer: Any):
    turns = [("user", "1+0"), ("assistant", "1"), ("user", "1+1"), ("assistant", "2")]
    chat = [{"role": role, "content": content} for role, content in turns]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": chat, "answer": "2"}])
    (problem,) = load(path, instruction="Box it.")
    assert problem.text == "1+1"
    prompt = tokenizer.decode(problem.prompt)
    assert "1+0<|im_end|>" in prompt and "1+1\nBox it.<|im_end|>\n<|im_start|>assi" in prompt
    assert prompt.endswith("assistant\n")


def test_an_answer_is_preferred_to_a_solution(load: Callable, tmp_path: Path):
    rows = [{"solution": "It is \\boxed{3}", "problem": "1+2", "answer": "3.0", "prompt": "no"}]
    assert pairs(load(write_jsonl(tmp_path / "data.jsonl", rows))) == [("1+2", "3.0")]


def test_unknown_columns(load: Callable, tmp_path: Path, capsys: Any):
    for row, wanted in (
        ({"frage": "1+1", "answer": "2"}, ("frage", "problem", "messages", "--question-column")),
        ({"problem": "1+1", "antwort": "2"}, ("antwort", "answer", "solution", "--answer-column")),
    ):
        path = write_jsonl(tmp_path / "data.jsonl", [row])
        line = refusal(capsys, load, path)
        assert f"--dataset {path}: columns found: " in line
        assert all(name in line for name in wanted)


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_empty(load: Callable, tmp_path: Path, capsys: Any, content: str):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert "holds no problems" in refusal(capsys, load, path, "--eval-dataset")


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (b'{"problem": "1+', "line 7 column 16"),
        (b"{'problem'", "line 7 column 2"),
        (b"[1, 2]", "row 6 is not a JSON object"),
        (b"3", "row 6 is not a JSON object"),
        (b'{"problem": "\xff", "answer": "1"}', "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_broken_line_is_named(
    load: Callable, tmp_path: Path, capsys: Any, broken: bytes, why: str
):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b"\n" + broken + b"\n")  # line 6 is blank
    assert why in refusal(capsys, load, path)


def test_problems_without_text_are_dropped(load: Callable, tmp_path: Path, capsys: Any):
    empty = [None, "", " \n", 7, [], ["x"], [{"role": "system", "content": "x"}]]
    empty += [[{"role": "user", "content": content}] for content in (None, 7, "")]
    rows = [*ROWS, *({"problem": problem, "answer": "1"} for problem in empty), {"answer": "1"}]
    assert len(load(write_jsonl(tmp_path / "data.jsonl", rows))) == 5
    line = "11 of 16 problems have no text in 'problem' and are dropped"
    assert line in capsys.readouterr().err
    path = write_jsonl(tmp_path / "empty.jsonl", [{"problem": 7, "answer": "1"}])
    assert "1 of 1 problems have no text in 'problem'" in refusal(capsys, load, path)


@pytest.mark.parametrize(
    "name",
    [
        *("no.jsonl", "no.parquet", "no.jsonl.gz", "no.txt", "data/no.csv", "no.csv@train"),
        *("./no", "no/", "a/b/c", "../no@test", ""),
    ],
)
def test_what_is_missing_here_is_not_looked_for_on_the_hub(
    load: Callable, tmp_path: Path, capsys: Any, monkeypatch: Any, name: str
):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, load, name) == f"error: --dataset {name}: no such file or folder"


def test_other_names_are_looked_for_on_the_hub(load: Callable, capsys: Any):
    for name in ("nobody/no-such.set-1.5", "no_such_set:main@train"):
        assert "on the Hub" in refusal(capsys, load, name)


def test_names_of_files_may_hold_anything(load: Callable, tmp_path: Path):
    for name in ("a@b:c.jsonl", "mit leerzeichen und ü.jsonl", "v1.5.jsonl"):
        assert len(load(write_jsonl(tmp_path / name, ROWS))) == 5


# ------------------------------------------------------------------------------- gold answers


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Half of 48 is <<48/2=24>>24.\n#### 72", "72"),
        ("#### 1,234 ", "1,234"),
        ("a #### 1\n#### -3", "-3"),
        (r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"The roots are $\boxed{x=1}$ and $\boxed{x=-2}$.", "x=1, x=-2"),
        (r"\boxed{1} or \boxed{\{2, 3\}}, \boxed{4", r"1, \{2, 3\}"),
        (r"\boxed{2} as above, so \boxed{2}", "2"),
        (r"\boxed{\boxed{2}}", "2"),
        ("  42 ", "42"),
        (r"\boxed{never closed", r"\boxed{never closed"),
        (18, "18"),
        (18.0, "18"),
        (0.5, "0.5"),
        (1e-05, "0.00001"),
        (2.5e-07, "0.00000025"),
        (1e16, "10000000000000000"),
        (-0.1, "-0.1"),
        (True, "True"),
        (["2"], "2"),
        (["1", 2.0, r"\boxed{3}"], "1, 2, 3"),
    ],
)
def test_gold_answer(text: Any, gold: str):
    assert gold_answer(text) == gold


@pytest.mark.parametrize(
    "value",
    [
        *(None, "", " ", "None", "null", "nan", "NaN", math.nan, "N/A", "proof", "Proof."),
        *("notfound", "Not found", "#### ", r"\boxed{}", [], ["2", None], {"value": "2"}, [{}]),
        "First we multiply the numbers to get 52. So Tom has 52 apples left in the basket.",
        "We add. The answer is: 52",
        "There are 3 red and 4 blue marbles, so 7 in all.",
        "It is enough to show that $AB=CD$. The triangles are congruent, therefore we are done.",
        "Proof. Let $x$ be given.",
        "1. Let $ABC$ be a triangle with the given property.",
        "$n^2$ is even. Hence so is $n$, and we are done.",
    ],
)
def test_no_answer(value: Any):
    assert gold_answer(value) == ""


@pytest.mark.parametrize(
    "answer",
    [
        *("A", "Yes", "False", "no real solutions", r"\text{two lines}", "[1, 2]", "n", "∅"),
        *("Softball, Kickball, Picnic", "18 apples and 3 pears", "ab + bc + ca + abc + abd"),
        "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer",
        "sin x + cos x + tan x + log x + exp x",
    ],
)
def test_words_that_are_an_answer(answer: str):
    assert gold_answer(answer) == answer


GOLDS = ("gsm8k_test", "math500", "aime24", "amc23", "olympiadbench", "minerva_math")


@pytest.mark.parametrize("name", ["gsm8k_train", "math_train", *GOLDS])
def test_no_real_gold_is_taken_for_none(name: str):
    path = SHARED_DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the shared data is not here")
    golds = [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]
    assert [gold_answer(gold) for gold in golds] == [gold.strip() for gold in golds]


def test_duplicates_are_kept_and_counted(load: Callable, tmp_path: Path, capsys: Any):
    assert len(load(write_jsonl(tmp_path / "data.jsonl", [*ROWS, *ROWS[:2]]))) == 7
    assert "2 of 7 problems repeat another and are kept" in capsys.readouterr().err


def test_unreadable_golds_are_dropped(load: Callable, tmp_path: Path, capsys: Any):
    bad = [
        {"problem": "?", "answer": r"\frac{1"},
        {"problem": "?", "answer": None},
        {"problem": "?"},
    ]
    rows = [*ROWS, *bad]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert len(load(path)) == 5
    said = capsys.readouterr().err.strip()
    assert "3 of 8 gold answers cannot be read and are dropped" in said
    assert said.endswith(repr(bad[0]["answer"]) + ", None")
    nothing = write_jsonl(tmp_path / "nothing.jsonl", rows[5:])
    with pytest.raises(SystemExit):
        load(nothing)
    assert "3 of 3 gold answers cannot be read" in capsys.readouterr().err


# ------------------------------------------------------------------------------- prompts


def test_prompt_goes_through_the_chat_template(load: Callable, tmp_path: Path, tokenizer: Any):
    path = write_jsonl(tmp_path / "data.jsonl", [{"problem": "1+1 = ¿?", "answer": "2"}])
    (problem,) = load(path, instruction="Box it.")
    assert problem.text == "1+1 = ¿?"
    expected = "<|im_start|>user\n1+1 = ¿?\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(problem.prompt) == expected
    assert problem.prompt.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_prompt_without_a_chat_template():
    tokenizer = byte_tokenizer("<|endoftext|>")
    tokenizer.chat_template = None
    assert tokenizer.decode(data.prompt_tokens(tokenizer, "1+1")) == "1+1"


def with_template(template: Any) -> Any:
    tokenizer = byte_tokenizer("<|endoftext|>")
    tokenizer.chat_template, tokenizer.name_or_path = template, "some-model"
    return tokenizer


@pytest.fixture
def prompt(make_args: Callable, grader: Grader, tmp_path: Path) -> Callable[..., str]:
    """The prompt made of a row by a chat template."""

    def prompt(template: Any, row: dict | None = None, **settings: Any) -> str:
        path = write_jsonl(tmp_path / "data.jsonl", [row or {"problem": " 1+1 ", "answer": "2"}])
        tokenizer = with_template(template)
        args = make_args(dataset=str(path), **settings)
        (problem,) = load_problems(args, "--dataset", tokenizer, grader)
        return tokenizer.decode(problem.prompt)

    return prompt


TRIMMED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
IN_PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
THINKING = TRIMMED + "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
DATED = "{{ strftime_now('%d %b %Y %H:%M') }} " + TRIMMED
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def test_system_prompt(prompt: Callable):
    assert prompt(TRIMMED, system_prompt="Think.") == "[system]Think.[user]1+1"
    own = {"prompt": CHAT, "answer": "2"}
    assert prompt(TRIMMED, own, system_prompt="Other.") == "[system]Think.[user]1+1"
    assert prompt(None, own) == "Think.\n\n1+1"


def test_template_arguments(prompt: Callable):
    assert prompt(THINKING) == "[user]1+1"
    assert prompt(THINKING, template_args='{"enable_thinking": false}') == "[user]1+1!"


def test_contents_in_parts(prompt: Callable):
    assert prompt(IN_PARTS, system_prompt="Think.") == "Think.; 1+1 ;"
    first = "{{ messages[0].content[0]['text'].strip() }}"  # raises on a text
    assert prompt(first) == "1+1"


def test_named_templates(prompt: Callable):
    assert prompt({"default": TRIMMED, "tool_use": "x"}) == "[user]1+1"


def test_the_date_is_pinned(prompt: Callable):
    assert prompt(DATED) == "01 Jan 2025 00:00 [user]1+1"


@pytest.mark.parametrize(
    ("template", "settings", "why"),
    [
        ("{{ raise_exception('not today') }}", {}, ": not today"),
        ("{{ 1 / 0 }}", {}, ": division by zero"),
        ("{{ unclosed", {}, ": "),
        ("hello", {}, ": it leaves the question out"),
        ({"rag": TRIMMED}, {}, ": "),
        (NO_SYSTEM + TRIMMED, {"system_prompt": "S"}, ", given --system-prompt S: no system"),
        (TRIMMED, {"template_args": '{"tokenize": 1}'}, ', given --template-args {"tokenize": 1}:'),
    ],
)
def test_a_template_that_fails(
    prompt: Callable, capsys: Any, template: Any, settings: dict, why: str
):
    line = refusal(capsys, prompt, template, **settings)
    assert f"--model some-model: its chat template{why}" in line


@pytest.mark.parametrize("value", ["{enable_thinking: false}", "[1]", "3", "null", "{"])
def test_template_arguments_that_are_none(prompt: Callable, capsys: Any, value: str):
    line = refusal(capsys, prompt, TRIMMED, template_args=value)
    assert line.startswith(f"error: --template-args {value}: is no JSON object")


def test_long_prompts_are_dropped_and_counted(load: Callable, tmp_path: Path, capsys: Any):
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS, {"problem": "1+" * 99, "answer": "2"}])
    assert len(load(path, max_prompt_tokens=100)) == 5
    assert (
        "1 of 6 prompts exceed --max-prompt-tokens 100 and are dropped" in capsys.readouterr().err
    )
    assert "6 of 6 prompts exceed" in refusal(capsys, load, path, max_prompt_tokens=10)


# ------------------------------------------------------------------------------- order


def problems_of(count: int) -> Problems:
    return Problems(Problem(str(i), "", []) for i in range(count))


def take(problems: Problems, count: int, seed: int = 1) -> list[str]:
    return [problem.text for problem in problems.take(count, seed)]


def test_each_epoch_is_a_permutation_of_its_own():
    problems = problems_of(11)
    epochs = [take(problems, 11) for _ in range(4)]
    assert all(sorted(epoch) == sorted(str(i) for i in range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_and_not_on_the_batch():
    batches = problems_of(7)
    by_threes = [text for _ in range(7) for text in take(batches, 3)]
    assert by_threes == take(problems_of(7), 21)
    assert by_threes != take(problems_of(7), 21, seed=2)


def test_position_is_all_there_is_to_resume():
    problems = problems_of(7)
    take(problems, 10)
    later = problems_of(7)
    later.position = problems.position
    assert take(later, 9) == take(problems, 9)
