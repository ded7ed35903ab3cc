"""The folder `tiny`: its limits, its problems, its tokenizer, and the judge of its steps."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import make
from tiny.steps import check_steps

TINY = Path(make.__file__).parent


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def stats() -> dict:
    return json.loads((TINY / "stats.json").read_text(encoding="utf-8"))


def judge(problem: str, response: str) -> list[tuple[str, bool]]:
    return [(response[start:end], right) for start, end, right in check_steps(problem, response)]


# Limits


def test_model_is_tiny_and_tied(stats: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert model.num_parameters() == stats["parameters"] <= 1_000_000
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16


def test_folder_is_small() -> None:
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000


# Problems


def test_problems_are_complete_and_disjoint() -> None:
    train, test = read_rows("train.jsonl"), read_rows("test.jsonl")
    assert (len(train), len(test)) == (make.TRAIN_PROBLEMS, make.TEST_PROBLEMS)
    for row in train + test:
        assert row.keys() == {"problem", "answer"}
        assert all(isinstance(value, str) for value in row.values())
    problems = [row["problem"] for row in train + test]
    assert len(set(problems)) == len(problems)


def test_every_answer_is_right() -> None:
    for row in read_rows("train.jsonl") + read_rows("test.jsonl"):
        expression = re.fullmatch(r"What is ([\d+*-]+)\?", row["problem"]).group(1)
        assert row["answer"] == str(eval(expression)), row


def test_problems_are_those_that_make_draws() -> None:
    assert make.draw_data() == (read_rows("train.jsonl"), read_rows("test.jsonl"))


def test_solutions_fit_and_slip_only_where_the_judge_sees_it(tokenizer) -> None:
    """A solution is right exactly if all of its steps are, or two slips happen to cancel."""
    rng = random.Random(7)
    careless, careful = make.OPENERS[0], next(o for o in make.OPENERS if o.slip == 0)
    slipped = 0
    for row in read_rows("test.jsonl"):
        for opener in (careless, careful):
            solution = make.draw_solution(row["problem"], opener, rng)
            assert len(tokenizer(solution).input_ids) < make.MAX_NEW_TOKENS
            wrong = sum(not right for _, _, right in check_steps(row["problem"], solution))
            right = solution.endswith(f"\\boxed{{{row['answer']}}}")
            assert (wrong == 0) <= right and (wrong == 1) <= (not right), solution
            assert opener is careless or wrong == 0
            slipped += wrong > 0
    assert slipped > 100


# Tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "What is 7+5*3-4?",
        "  two  spaces , a tab\t and a line\r\n\nthat ends ",
        "Grüße, Hölder; ∑∫√π ≤ ∞",
        "算术 かな 한국어 العربية",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301",
        "".join(map(chr, range(0x20))) + "\x7f\u200b\ufeff\U0010ffff",
        "don 't , stop . n't",
        "",
    ],
)
def test_any_text_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer("<|im_start|>a<|im_end|><|endoftext|>").input_ids
    assert len(ids) == 4 and ids[2] == tokenizer.eos_token_id != tokenizer.pad_token_id == ids[3]
    config = json.loads((TINY / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_chat_template(tokenizer) -> None:
    messages = [{"role": "user", "content": "What is 1+1?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"


# Judge of the steps


@pytest.mark.parametrize(
    ("problem", "response", "expected"),
    [
        ("What is 7+5*3-4?", "Well, 5*3=15; 7+15=22; 22-4=18; \\boxed{18}", [True, True, True]),
        # A wrong result; what follows goes on from it and is right.
        ("What is 7+5*3-4?", "5*3=20; 7+20=27; 27-4=23; \\boxed{23}", [False, True, True]),
        ("What is 7+5*3-4?", "5*3=15; 7+15=12; 12-4=8; \\boxed{8}", [True, False, True]),
        # Right arithmetic in the wrong order.
        ("What is 7+5*3-4?", "7+5=12; 12*3=36; 36-4=32; \\boxed{32}", [False, True, True]),
        ("What is 9-5-2?", "5-2=3; 9-3=6; \\boxed{6}", [False, True]),
        # Another order that is as good.
        ("What is 2*3+4*5?", "4*5=20; 2*3=6; 6+20=26; \\boxed{26}", [True, True, True]),
        # Numbers that the expression does not hold, and a step done twice.
        ("What is 7+5*3-4?", "2+2=4; 5*3=15; 5*3=15", [False, True, False]),
        # The same pair twice: only the second may be taken out, the first follows a minus.
        ("What is 9-2+3+2+3?", "2+3=5; 9-2=7; 7+3=10; 10+5=15", [True, True, True, True]),
        # Below zero.
        ("What is 2-9+3?", "2-9=-7; -7+3=-4", [True, True]),
        ("What is 7+5*3-4?", "I do not know: \\boxed{18}", []),
    ],
)
def test_check_steps(problem: str, response: str, expected: list[bool]) -> None:
    assert [right for _, right in judge(problem, response)] == expected


def test_check_steps_says_where() -> None:
    response = "Easy! 5*3=20; 7+20=27; \\boxed{27}"
    assert judge("What is 7+5*3?", response) == [("5*3=20", False), ("7+20=27", True)]


# What make.py measured


def test_room_and_structure_for_credit(stats: dict) -> None:
    assert 0.30 <= stats["sampled_accuracy"] <= 0.60
    assert stats["greedy_accuracy"] - stats["sampled_accuracy"] >= 0.10
    assert stats["longest"] <= make.MAX_NEW_TOKENS
    common, mediocre, good, careful, _ = stats["openers"].values()
    assert common["probability"] > mediocre["probability"] > good["probability"]
    assert 0.03 <= careful["probability"] <= 0.12
    assert common["sampled_accuracy"] < 0.4 < mediocre["sampled_accuracy"] < 0.6
    assert mediocre["sampled_accuracy"] < good["sampled_accuracy"] < careful["sampled_accuracy"]
    assert careful["sampled_accuracy"] >= 0.80


def test_openers_differ_in_their_first_byte() -> None:
    letters = [opener.text[0] for opener in make.OPENERS[:-1]]
    assert len(set(letters) | set(make.OTHER_LETTERS)) == len(letters) + len(make.OTHER_LETTERS)
    assert sum(opener.share for opener in make.OPENERS) == pytest.approx(1)
