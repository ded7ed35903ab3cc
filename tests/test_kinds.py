"""grading/kinds.py and rules.py: the examples of each kind, symmetry, any text, shared pairs."""

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_lines, shared_rows

from grading import Grader
from grading.answers import find_answer, last_boxed, reference_text
from grading.grader import NeedsWorker, no_worker
from grading.kinds import KINDS, Words, read
from grading.rules import Judge

REFERENCES = ("math_train", "math500", "olympiadbench", "minerva_math", "aime24", "amc23")


def examples(kind: Callable) -> list[tuple[str, str, bool]]:
    """(reference, answer, right) from a docstring: A `reference` is `right`, not `wrong`."""
    cases = []
    for sentence in re.split(r"[;.] (?=`)|: (?=`)", " ".join(kind.__doc__.split())):
        reference, *_ = re.findall("`([^`]*)`", sentence) or [""]
        right, _, wrong = sentence.partition(f"`{reference}`")[2].partition(" not ")
        cases += [(reference, answer, True) for answer in re.findall("`([^`]*)`", right)]
        cases += [(reference, answer, False) for answer in re.findall("`([^`]*)`", wrong)]
    return cases


EXAMPLES = {kind: examples(kind) for _, kind in KINDS}
PAIRS = list(itertools.chain(*EXAMPLES.values()))


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def boxed(answers: list[str]) -> list[str]:
    return [rf"So the answer is \boxed{{{answer}}}." for answer in answers]


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_examples(kind, grader):
    cases = EXAMPLES[kind]
    assert {right for *_, right in cases} == {True, False}
    references, answers, _ = zip(*cases, strict=True)
    verdicts = grader.grade(boxed(answers), references)
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if case[2] != verdict] == []


def quick(reference: str, answer: str) -> bool | None:
    """The verdict if no worker is needed, else None."""
    try:
        return Judge(no_worker, strict=False).equal(read(reference), read(answer))
    except NeedsWorker:
        return None


def test_swapping_the_sides_changes_nothing(grader):
    """Except where an answer shows what it is the value of, and where it must be simplified."""
    texts = {text for reference, answer, _ in PAIRS for text in (reference, answer)}
    texts = sorted(text for text in texts if "=" not in text or text == "x=3")
    pairs = list(itertools.combinations(texts, 2))
    assert len(pairs) > 5000
    asked = []
    for first, second in pairs:
        verdicts = {quick(first, second), quick(second, first)}
        assert len(verdicts - {None}) < 2, (first, second)
        if None in verdicts and "7" not in (first, second):
            asked.append((first, second))
    asked = random.Random(0).sample(asked, 40)
    first, second = zip(*asked, strict=True)
    assert grader.grade(boxed(first), second) == grader.grade(boxed(second), first)


PARTS = r"""
\frac { } ( ) [ ] \{ \} 1 2 0 . , ; x i e = < \le \in \cup _ ^ \pm : and or cm % \% $ \$ \\ &
\begin{pmatrix} \end{pmatrix} \text{ \mathbf{ - + ! PM \pmod A B) ' \overline \dot ½ ² √ °
\infty | yes is answer \ldots \left \mathbb{R} \setminus \ne million feet 5 3/4 1e5 10^{ dozen
\langle \rangle ∞ ٣ [1, 0.\overline{3} 101_2 3:30 \boxed{ \boxed{} #### Answer:"""


def test_any_text_has_a_verdict():
    rng = random.Random(0)
    known = [text for reference, answer, _ in PAIRS for text in (reference, answer)]
    for _ in range(1500):
        parts = rng.choices(
            [*PARTS.split(), " ", "\n", "\0", "\ud800"], k=rng.choice([2, 8, 40, 120])
        )
        text = "".join(parts)
        if rng.random() < 0.5:
            text = rng.choice(known)
            cut = rng.randrange(len(text) + 1)
            text = text[:cut] + rng.choice(parts) + text[cut + rng.randrange(3) :]
        assert quick(rng.choice(known), text) in (True, False, None)
        assert quick(text, text) in (True, None)
        reference_text(text)
        find_answer(text, "auto")


def test_deep_brackets_are_a_phrase():
    assert read("(" * 24 + "1" + ")" * 24) == read("1")
    for deep in ("(" * 25 + "1" + ")" * 25, "{" * 4000, "(" * 500):
        assert read(deep) == Words(deep)


@pytest.mark.parametrize(
    ("name", "off", "accepted"),
    [("verifier_pairs", 11, 6), ("verifier_pairs_3", 7, 0)],
)
def test_shared_pairs(name, off, accepted, grader):
    """Those that differ are arguable or not read, see grading/README.md, or texts."""
    pairs = shared_rows(f"cases/{name}.jsonl")
    answers = boxed([pair["answer"] for pair in pairs])
    verdicts = grader.grade(answers, [pair["gold"] for pair in pairs])
    others = [p for p, verdict in zip(pairs, verdicts, strict=True) if p["want"] != verdict]
    assert len(others) <= off, others
    assert sum(not pair["want"] for pair in others) <= accepted, others


# (reference, answer): arguable or not read, see grading/README.md
ARGUABLE = {
    ("5", r"\text{about } 5"), ("7", r"\text{approximately } 7"), ("12", r"\text{twelve}"),
    ("0.25", r"\text{one quarter}"), ("A", r"\text{a}"), (r"\text{ab}", r"\text{ba}"),
    (r"\langle 1,-2,3\rangle", r"\mathbf{i}-2\mathbf{j}+3\mathbf{k}"),
    (r"(-\infty,2)\cup(2,\infty)", r"x \ne 2"), (r"9\text{:}30", "9:30"),
    (r"\mathbb{R} \setminus \{0\}", r"(-\infty,0)\cup(0,\infty)"),
    (r"x\ge 1 \text{ and } x<5", "[1,5)"),
    (r"9.8 \text{ m/s}^2", r"9.8 \frac{\text{m}}{\text{s}^2}"),
    (r"\begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 & 3 \end{pmatrix}^T"),
    (r"\begin{pmatrix} 1/2 & 0 \\ 0 & 1/2 \end{pmatrix}",
     r"\frac12 \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}"),
}  # fmt: skip


def test_pairs_by_kind(grader):
    """Pairs with the verdict of a careful teacher, written without looking at the rules."""
    pairs = read_lines(Path(__file__).with_name("grading_pairs.jsonl"))
    references = [pair["reference"] for pair in pairs]
    verdicts = grader.grade(boxed([pair["answer"] for pair in pairs]), references)
    others = {
        (pair["reference"], pair["answer"])
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if pair["right"] != verdict
    }
    assert len(pairs) > 290 and others == ARGUABLE


def test_large_numbers_reach_no_worker():
    """At the edge of the limit: four digits are asked about, five are wrong."""
    small = ["x^{9999}", "9999!", r"\binom{9999}{2}", "C_{9999}^{2}", "x^{y+9999}"]
    large = [text.replace("9999", "10000") for text in small]
    large += ["x^{y^2}", "x^y^2", "(x^{2})^{3}y!!", "(5!)!"]
    grader = Grader(strict=False)
    for text in small:
        assert isinstance(grader._quick_verdict(rf"\boxed{{{text}}}", "z+1"), tuple)
        assert isinstance(grader._quick_readable(text), tuple)
    for text in large:
        assert grader.grade([rf"\boxed{{{text}}}", r"\boxed{z+1}"], ["z+1", text]) == [False] * 2
        assert grader.readable([text]) == [False]
    assert not grader._idle


def test_shared_responses(grader):
    cases = shared_rows("cases/3/responses.jsonl")
    references = [case["gold"] for case in cases]
    verdicts = grader.grade([case["response"] for case in cases], references)
    assert verdicts == [case["want"] for case in cases]


@pytest.mark.parametrize("name", REFERENCES)
def test_references_equal_themselves_written_otherwise(name, grader):
    texts = sorted({row["answer"] for row in shared_rows(f"data/{name}.jsonl")})
    for rewritten in (
        texts,
        [re.sub(" +", "  ", text) for text in texts],
        [text.replace(" ", r"\, ") for text in texts],
        [text.replace(r"\frac", r"\dfrac") for text in texts],
        [text if "$" in text else f"${text}$" for text in texts],
    ):
        verdicts = grader.grade(boxed(rewritten), texts)
        pairs = zip(texts, rewritten, verdicts, strict=True)
        assert [(text, other) for text, other, verdict in pairs if not verdict] == []


def test_boxes_and_lines_of_references():
    for row, wanted in zip(shared_rows("cases/3/fbox_gold.jsonl"), ("7", "12"), strict=True):
        assert reference_text(row["solution"]) == wanted
    for row, wanted in zip(
        shared_rows("cases/3/solution_then_answer_is.jsonl"), ("12", "12", "9"), strict=True
    ):
        assert reference_text(row["answer"]) == wanted


@pytest.mark.parametrize(
    ("response", "line"),
    [
        ("We add.\nAnswer: 42", "42"), ("**Answer:** $\\frac{1}{2}$", r"$\frac{1}{2}$"),
        ("so\n#### 1,080", "1,080"), ("The final answer is 7.\nDone", "7."),
        ("Answer: \\boxed{5}", "5"), ("Answer: 1\nWait.\nAnswer: 2", "2"),
        ("No answer here", None), ("Answer:", None), ("answers vary", None),
    ],
)  # fmt: skip
def test_answer_lines(response, line):
    assert find_answer(response, "line") == line
    assert find_answer(response, "boxed") == last_boxed(response)
    assert find_answer(response, "auto") == (last_boxed(response) or line)
    assert find_answer(rf"\boxed{{8}} {response}", "auto") in ("8", "5")


def test_the_answer_format_is_a_setting():
    responses = ["Answer: 17", "#### 17", r"\boxed{17}", "17"]
    for answer_format, wanted in [("boxed", "0010"), ("line", "1100"), ("auto", "1110")]:
        grader = Grader(answer_format=answer_format)
        assert grader.grade(responses, ["17"] * 4) == [digit == "1" for digit in wanted]
    with pytest.raises(ValueError, match="answer_format"):
        Grader(answer_format="box")
