"""benchmark/real.py: its problems."""

from pathlib import Path

import real

from infra import data


def test_problems_are_the_sums_that_are_not_excluded():
    asked = set()
    for row in real.problems():
        *shown, last = data.as_chat(row["messages"])
        assert len(shown) == 2 * len(real.EXAMPLES)
        first, _, second = last["content"].removeprefix("What is ").rstrip("?").split()
        assert int(row["answer"]) == int(first) + int(second)
        asked.add(f"{first} + {second}")
    assert len(asked) == real.LARGEST**2 - len(real.EXCLUDED)
    assert not asked & {*real.EXCLUDED, *real.EXAMPLES}


def test_a_problem_by_hand():
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    assert real.problem(17, 5)["messages"] == [
        user | {"content": "What is 3 + 4?"},
        assistant | {"content": "3 + 4 is \\boxed{7}."},
        user | {"content": "What is 8 + 5?"},
        assistant | {"content": "8 + 5 is \\boxed{13}."},
        user | {"content": "What is 17 + 5?"},
    ]


def test_held_out_problems_are_not_trained_on(tmp_path: Path):
    real.write_problems(tmp_path)
    files = [tmp_path / f"{name}.jsonl" for name in ("test", "train")]
    held_out, train = (set(file.read_text().splitlines()) for file in files)
    assert (len(held_out), len(train)) == (100, 296) and not held_out & train
