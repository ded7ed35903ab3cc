"""Data sets become problems: files, folders in the hub's layout, columns, gold answers, order."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA, byte_tokenizer

import common
import grpo
from common import Problem, Problems, gold_answer, load_problems
from verifier import Grader

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


@pytest.mark.parametrize("suffix", WRITERS)
def test_file(load: Callable, tmp_path: Path, suffix: str):
    problems = load(WRITERS[suffix](tmp_path / f"data{suffix}", ROWS))
    assert pairs(problems) == [(row["problem"], row["answer"]) for row in ROWS]


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


# ------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("question", ["problem", "question", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "final_answer", "solution"])
def test_columns(load: Callable, tmp_path: Path, question: str, answer: str):
    rows = [{"id": 7, question: "1+1", answer: "2"}]
    assert pairs(load(write_jsonl(tmp_path / "data.jsonl", rows))) == [("1+1", "2")]


def test_an_answer_is_preferred_to_a_solution(load: Callable, tmp_path: Path):
    rows = [{"solution": "It is \\boxed{3}", "problem": "1+2", "answer": "3.0", "prompt": "no"}]
    assert pairs(load(write_jsonl(tmp_path / "data.jsonl", rows))) == [("1+2", "3.0")]


def test_unknown_columns(load: Callable, tmp_path: Path, capsys: Any):
    path = write_jsonl(tmp_path / "data.jsonl", [{"frage": "1+1", "antwort": "2"}])
    line = refusal(capsys, load, path)
    assert f"--dataset {path}" in line
    for name in ("frage", "antwort", "problem", "question", "prompt", "answer", "solution"):
        assert name in line


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_empty(load: Callable, tmp_path: Path, capsys: Any, content: str):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert "holds no problems" in refusal(capsys, load, path, "--eval-dataset")


@pytest.mark.parametrize(
    "broken", [b'{"problem": "1+', b"[1, 2]", b'{"problem": "\xff", "answer": "1"}', b"3"]
)
def test_a_broken_line_is_named(load: Callable, tmp_path: Path, capsys: Any, broken: bytes):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b"\n" + broken + b"\n")  # line 6 is blank
    assert "line 7 is not" in refusal(capsys, load, path)


def test_a_problem_without_text_is_named(load: Callable, tmp_path: Path, capsys: Any):
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS, {"problem": None, "answer": "1"}])
    assert "problem 6 has no text in its column 'problem'" in refusal(capsys, load, path)


@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.parquet", "nothing"])
def test_missing(load: Callable, tmp_path: Path, capsys: Any, name: str):
    assert f"--dataset {tmp_path / name}: " in refusal(capsys, load, tmp_path / name)


# ------------------------------------------------------------------------------- gold answers


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Half of 48 is <<48/2=24>>24.\n#### 72", "72"),
        ("#### 1,234 ", "1,234"),
        ("a #### 1\n#### -3", "-3"),
        (r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{\{2, 3\}}", r"\{2, 3\}"),
        ("  42 ", "42"),
        (r"\boxed{never closed", r"\boxed{never closed"),
    ],
)
def test_gold_answer(text: str, gold: str):
    assert gold_answer(text) == gold


def test_unreadable_golds_are_dropped_or_refused(load: Callable, tmp_path: Path, capsys: Any):
    bad = [
        {"problem": "?", "answer": r"\frac{1"},
        {"problem": "?", "answer": None},
        {"problem": "?"},
    ]
    rows = [*ROWS, *bad]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert len(load(path)) == 5
    assert "3 of 8 gold answers cannot be read and are dropped" in capsys.readouterr().err
    line = refusal(capsys, load, path, refuse_unreadable=True)
    assert "3 of 8 gold answers cannot be read: " in line and "'', ''" in line
    nothing = write_jsonl(tmp_path / "nothing.jsonl", rows[5:])
    with pytest.raises(SystemExit):
        load(nothing)
    assert "no gold answer can be read" in capsys.readouterr().err


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
    assert tokenizer.decode(common.prompt_tokens(tokenizer, "1+1")) == "1+1"


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
