"""Accuracy of grading/ on shared cases, and its speed: python benchmark/grading_targets.py [FOLDER]

FOLDER holds cases/ and data/ (default: ../shared); what is missing is left out. Plain numbers and
kinds need no worker, and are measured in CPU time. Of the answers that measure speed, every other
is wrong.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grading import Grader

# References, and the same value written differently. Each list has an odd length.
NUMBERS = [("A", "A.0")]
KINDS = [
    (r"\frac{A}{7} \text{ cm}", r"\dfrac{A}7\text{ cm}"),
    ("(3, A]", r"3<x\le A"),
    (r"\{A, -2\}", r"-2 \text{ and } A"),
    ("A:30", r"A:30"),
    (r"\begin{pmatrix}A\\1\end{pmatrix}", "(A,1)"),
]
LATEX = [
    (r"\frac{A\pi}{7}", r"\dfrac{A}{7}\pi"),
    (r"x^2+Ax-3", r"-3+x^2+Ax"),
    (r"(3, A\pi]", r"\left(3,\pi A\right]"),
    (r"A\sqrt{2}, -2", r"-2,\, \sqrt{2} A"),
    (r"A\sin 5x", r"\sin(5x) \cdot A"),
    (r"y = Ax + 6", r"y=6+Ax"),
    (r"\frac{\sqrt{5}}{A}", r"\frac{1}{A}\sqrt{5}"),
]
SPELLINGS = [("", ""), (" ", r"\, "), (r"\frac", r"\dfrac"), ("", "$")]


def make_pairs(forms: list, count: int) -> tuple[list, list]:
    """Return responses and references. Every other response is wrong."""
    responses, references = [], []
    for number in range(count):
        reference, answer = forms[number % len(forms)]
        answer = answer.replace("A", str(number + number % 2 + 8))
        responses.append(rf"So \boxed{{{answer}}}.")
        references.append(reference.replace("A", str(number + 8)))
    return responses, references


def check(grader: Grader, name: str, cases: list[tuple[str, str, bool]]) -> None:
    """Print how many (response, reference, right) are judged otherwise."""
    responses, references, wanted = zip(*cases, strict=True)
    verdicts = grader.grade(responses, references)
    wrong = sum(verdicts[i] > wanted[i] for i in range(len(cases)))
    missed = sum(verdicts[i] < wanted[i] for i in range(len(cases)))
    print(f"{name}: of {len(cases)}, {wrong} wrong answers accepted, {missed} right ones rejected")


def read_cases(path: Path) -> list[tuple[str, str, bool]]:
    """Pairs with verdicts; or references against themselves in other spellings, and solutions."""
    cases = []
    for line in path.read_text().strip().split("\n"):
        row = json.loads(line)
        if "want" in row:
            answer = row.get("response") or rf"So the answer is \boxed{{{row['answer']}}}."
            cases.append((answer, row["gold"], row["want"]))
        elif isinstance(row.get("answer"), str):
            for old, new in SPELLINGS:
                text = row["answer"].replace(old, new) if old else f"{new}{row['answer']}{new}"
                cases.append((rf"\boxed{{{text}}}", row["answer"], True))
            if path.stem == "math500":
                cases.append((row["solution"], row["answer"], True))
    return cases


def main() -> None:
    shared = Path([*sys.argv, "../shared"][1])
    paths = [*shared.glob("cases/verifier_pairs*.jsonl"), *shared.glob("cases/3/responses.jsonl")]
    paths += shared.glob("data/*.jsonl")
    with Grader() as grader:
        for path in sorted(paths):
            cases = read_cases(path)
            if cases:
                check(grader, path.name, cases)
        for name, forms, count, clock in [
            ("plain numbers", NUMBERS, 40_000, time.process_time),
            ("kinds", KINDS, 10_000, time.process_time),
            ("LaTeX", LATEX, 2000, time.perf_counter),  # a worker does the work
        ]:
            responses, references = make_pairs(forms, count)
            grader.grade(responses[-8:], references[-8:])  # starts the workers
            start = clock()
            right = sum(grader.grade(responses, references))
            rate = count / (clock() - start)
            print(f"{name}: {rate:.0f} per second, {right} of {count} right")


if __name__ == "__main__":
    main()
