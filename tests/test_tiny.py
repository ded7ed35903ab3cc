"""The tasks in `tiny`: limits, problems, tokenizer, the judges of steps, measured statistics."""

import json
import random
import re
from collections import Counter
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import make, needle_task, sums_task
from tiny.steps import check_steps


def read_rows(task: ModuleType, name: str) -> list[dict]:
    text = (task.FOLDER / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_stats(task: ModuleType) -> dict:
    return json.loads((task.FOLDER / "stats.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=make.TASKS)
def task(request) -> ModuleType:
    return make.TASKS[request.param]


@pytest.fixture(scope="module")
def tokenizer(task):
    return AutoTokenizer.from_pretrained(task.FOLDER)


# ------------------------------------------------------------------ limits and problems


def test_model_is_tiny_and_tied(task):
    model = AutoModelForCausalLM.from_pretrained(task.FOLDER)
    assert model.num_parameters() == read_stats(task)["parameters"] <= 1_000_000
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16
    files = [path for path in task.FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def test_problems_are_complete_and_disjoint(task):
    train, test = read_rows(task, "train.jsonl"), read_rows(task, "test.jsonl")
    assert (len(train), len(test)) == (make.TRAIN_PROBLEMS, make.TEST_PROBLEMS)
    for row in train + test:
        assert row.keys() == {"problem", "answer"}
        assert all(isinstance(value, str) for value in row.values())
    problems = [row["problem"] for row in train + test]
    assert len(set(problems)) == len(problems)
    assert make.draw_data(task) == (train, test)


def test_every_answer_is_right():
    for row in read_rows(sums_task, "train.jsonl") + read_rows(sums_task, "test.jsonl"):
        expression = re.fullmatch(r"What is ([\d+*-]+)\?", row["problem"]).group(1)
        assert row["answer"] == str(eval(expression)), row
    for row in read_rows(needle_task, "train.jsonl") + read_rows(needle_task, "test.jsonl"):
        assert re.fullmatch(r"\d\d( \d\d){14}", row["problem"])
        assert row["answer"] == str(int(row["problem"][0]) + int(row["problem"][1]))[-1], row


@pytest.mark.parametrize("task", ["sums"], indirect=True)
def test_solutions_fit_and_slip_only_where_the_judge_sees_it(tokenizer):
    """A solution is right exactly if all of its steps are, or two slips happen to cancel."""
    rng = random.Random(7)
    careless, careful = sums_task.OPENERS[0], sums_task.OPENERS[3]
    slipped = 0
    for row in read_rows(sums_task, "test.jsonl"):
        for opener in (careless, careful):
            solution = sums_task.draw_solution(row["problem"], opener, rng)
            assert len(tokenizer(solution).input_ids) < sums_task.MAX_NEW_TOKENS
            wrong = sum(not right for _, _, right in check_steps(row["problem"], solution))
            right = solution.endswith(f"\\boxed{{{row['answer']}}}")
            assert (wrong == 0) <= right and (wrong == 1) <= (not right), solution
            assert opener is careless or wrong == 0
            slipped += wrong > 0
    assert slipped > 100


@pytest.mark.parametrize("task", ["needle"], indirect=True)
def test_only_the_first_sum_of_a_needle_counts(tokenizer):
    """A step slips at one rate at any position, to one digit; only the first decides."""
    rng = random.Random(7)
    school, habits = needle_task.STAGES[-2:]
    seen, slips, digits = Counter(), Counter(), {}
    for row in read_rows(needle_task, "train.jsonl"):
        faultless = needle_task.draw_example(row["problem"], school, rng)
        judged = needle_task.check_steps(row["problem"], faultless)
        assert len(judged) == 15 and all(right for _, _, right in judged)
        assert faultless.endswith(f"\\boxed{{{row['answer']}}}")
        solution = needle_task.draw_example(row["problem"], habits, rng)
        assert len(tokenizer(solution).input_ids) < needle_task.MAX_NEW_TOKENS
        judged = needle_task.check_steps(row["problem"], solution)
        assert len(judged) == 15
        assert judged[0][2] == solution.endswith(f"\\boxed{{{row['answer']}}}")
        pairs = needle_task.parse(row["problem"])
        for i, ((_, end, right), pair) in enumerate(zip(judged, pairs, strict=True)):
            for part in (i, (pair, i == 0)):  # all of a turn; all of a pair, first or not
                seen[part] += 1
                slips[part] += not right
            digits.setdefault(pair, set()).add(solution[end - 2])
    assert len(digits) == 100 and all(len(found) == 2 for found in digits.values())
    for part, count in seen.items():
        error = (0.6 * 0.4 / count) ** 0.5
        assert slips[part] / count == pytest.approx(0.6, abs=4.5 * error)


# ------------------------------------------------------------------ tokenizer


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
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens(task, tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer("<|im_start|>a<|im_end|><|endoftext|>").input_ids
    assert len(ids) == 4 and ids[2] == tokenizer.eos_token_id != tokenizer.pad_token_id == ids[3]
    text = (task.FOLDER / "generation_config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "What is 1+1?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"


# ------------------------------------------------------------------ judges of steps


@pytest.mark.parametrize(
    ("problem", "response", "expected"),
    [
        ("What is 7+5*3-4?", "Well, 5*3=15; 7+15=22; 22-4=18; \\boxed{18}", [True, True, True]),
        # A wrong result; the steps that continue from it are right.
        ("What is 7+5*3-4?", "5*3=20; 7+20=27; 27-4=23; \\boxed{23}", [False, True, True]),
        ("What is 7+5*3-4?", "5*3=15; 7+15=12; 12-4=8; \\boxed{8}", [True, False, True]),
        # Right arithmetic in the wrong order.
        ("What is 7+5*3-4?", "7+5=12; 12*3=36; 36-4=32; \\boxed{32}", [False, True, True]),
        ("What is 9-5-2?", "5-2=3; 9-3=6; \\boxed{6}", [False, True]),
        # Another valid order.
        ("What is 2*3+4*5?", "4*5=20; 2*3=6; 6+20=26; \\boxed{26}", [True, True, True]),
        # Numbers that are not in the expression, and a step done twice.
        ("What is 7+5*3-4?", "2+2=4; 5*3=15; 5*3=15", [False, True, False]),
        # The same pair twice: only the second may be taken out, the first follows a minus.
        ("What is 9-2+3+2+3?", "2+3=5; 9-2=7; 7+3=10; 10+5=15", [True, True, True, True]),
        # Below zero.
        ("What is 2-9+3?", "2-9=-7; -7+3=-4", [True, True]),
        ("What is 7+5*3-4?", "I do not know: \\boxed{18}", []),
    ],
)
def test_check_steps(problem, response, expected):
    judged = check_steps(problem, response)
    assert [right for _, _, right in judged] == expected
    steps = re.findall(r"-?\d+[+*-]\d+=-?\d+", response)
    assert [response[start:end] for start, end, _ in judged] == steps


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("752\n392\n886\n\\boxed{2}", [True, True, True]),
        ("753\n392\n885\n\\boxed{3}", [False, True, False]),
        ("752\n886\n392\n", [True, False, False]),  # another turn
        ("752\n392\n886\n392\n", [True, True, True, False]),  # one too many
        ("752\n39\n886\n", [True, False]),  # no step, so the next is out of turn
        ("\\boxed{2}", []),
    ],
)
def test_check_steps_of_the_needle(response, expected):
    judged = needle_task.check_steps("75 39 88", response)
    assert [right for _, _, right in judged] == expected
    assert all(re.fullmatch("[0-9]{3}\n", response[start:end]) for start, end, _ in judged)


# ------------------------------------------------------------------ measured by make.py


def test_room_and_structure_for_credit():
    stats = read_stats(sums_task)
    assert 0.30 <= stats["sampled_accuracy"] <= 0.60
    assert stats["greedy_accuracy"] - stats["sampled_accuracy"] >= 0.10
    assert stats["longest"] <= sums_task.MAX_NEW_TOKENS
    common, mediocre, good, careful, _ = stats["openers"].values()
    assert common["probability"] > mediocre["probability"] > good["probability"]
    assert 0.03 <= careful["probability"] <= 0.12
    assert common["sampled_accuracy"] < 0.4 < mediocre["sampled_accuracy"] < 0.6
    assert mediocre["sampled_accuracy"] < good["sampled_accuracy"] < careful["sampled_accuracy"]
    assert careful["sampled_accuracy"] >= 0.80


def test_room_for_credit_in_the_needle():
    stats = read_stats(needle_task)
    assert 0.30 <= stats["sampled_accuracy"] <= 0.50
    assert stats["greedy_accuracy"] <= 0.25  # the wrong digit is the likelier one


@torch.no_grad()
def test_stats_are_true_of_the_model(task, tokenizer):
    """Half of the test problems, sampled again: four standard errors are 0.16."""
    model = AutoModelForCausalLM.from_pretrained(task.FOLDER, dtype=torch.float32)
    torch.manual_seed(1)
    rows = read_rows(task, "test.jsonl")[::2]
    problems = [row["problem"] for row in rows]
    responses = make.respond(task, model, tokenizer, problems)
    stats = read_stats(task)
    assert make.accuracy(responses, rows) == pytest.approx(stats["sampled_accuracy"], abs=0.16)


@pytest.mark.parametrize("task", ["needle"], indirect=True)
def test_every_step_of_a_needle_slips_alike(tokenizer):
    """The model slips as its examples did: in 0.6 of the first sums, and as often in the others."""
    model = AutoModelForCausalLM.from_pretrained(needle_task.FOLDER, dtype=torch.float32)
    torch.manual_seed(2)
    problems = [row["problem"] for row in read_rows(needle_task, "test.jsonl")]
    responses = make.respond(needle_task, model, tokenizer, problems)
    first, others = [], []
    for problem, response in zip(problems, responses, strict=True):
        judged = [right for *_, right in needle_task.check_steps(problem, response)]
        if len(judged) == 15:  # nearly all
            first.append(judged[0])
            others += judged[1:]
    assert len(first) >= 0.95 * len(problems)
    assert sum(first) / len(first) == pytest.approx(0.4, abs=0.12)  # four standard errors
    assert sum(others) / len(others) == pytest.approx(0.4, abs=0.05)


def test_openers_differ_in_their_first_byte():
    letters = [opener.text[0] for opener in sums_task.OPENERS[:-1]]
    assert len({*letters, *sums_task.OTHER_LETTERS}) == len([*letters, *sums_task.OTHER_LETTERS])
    assert sum(opener.share for opener in sums_task.OPENERS) == pytest.approx(1)
