"""Measure grading/ and other graders on labelled answers.

    python benchmark/graders.py FOLDER          # the graders that others use, in minutes
    python benchmark/graders.py FOLDER --own    # grading/ alone: accuracy by file, and speed

FOLDER holds cases/ and data/ (default: ../shared). Files that it lacks are left out. Both commands
fill the tables of kinds and rules in grading/README.md; the first also fills that of the graders,
the second prints its lines. The first needs verl, whose graders are read without what verl imports:
`pip install --no-deps --target PACKAGES verl pylatexenc`, and PACKAGES in PYTHONPATH. `prime_math`
is PRM800K's grader as verl distributes it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import shared
import tyro
from shared import ROOT, markdown

from grading import Grader, last_boxed
from grading.answers import reference_text
from grading.kinds import KINDS
from grading.rules import RULES

README = ROOT / "grading" / "README.md"
Grade = Callable[[str, str], bool]  # of a response and a reference answer
Case = tuple[str, str, bool]  # a response, a reference answer, whether the response is right

# References, and the same value written differently. Each list has an odd length.
NUMBERS = [("A", "A.0")]
OF_KINDS = [
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
SPEED = {  # forms and number of answers
    "plain numbers": (NUMBERS, 40_000),
    "kinds": (OF_KINDS, 10_000),
    "LaTeX": (LATEX, 2_000),
}
SPELLINGS = [("", ""), (" ", r"\, "), (r"\frac", r"\dfrac"), ("", "$")]


@dataclass
class Args:
    folder: tyro.conf.Positional[Path] = Path("../shared")  # holds cases/ and data/
    own: bool = False  # only grading/: its accuracy in each file, and its speed


def read_cases(path: Path) -> list[Case]:
    """The labelled pairs of a file.

    Of a data set each reference is graded against itself in four spellings, of MATH-500 also
    against its solution.
    """
    cases = []
    for line in path.read_text().strip().split("\n"):
        row = json.loads(line)
        if "want" in row:
            answer = row.get("response") or rf"So the answer is \boxed{{{row['answer']}}}."
            cases.append((answer, row["gold"], row["want"]))
        elif "answer" in row:
            for old, new in SPELLINGS:
                text = row["answer"].replace(old, new) if old else f"{new}{row['answer']}{new}"
                cases.append((rf"\boxed{{{text}}}", row["answer"], True))
            if path.stem == "math500":
                cases.append((row["solution"], row["answer"], True))
    return cases


def count_errors(verdicts: list[bool], cases: list[Case]) -> tuple[int, int]:
    """Wrong answers accepted, right answers rejected."""
    accepted = rejected = 0
    for verdict, (_, _, right) in zip(verdicts, cases, strict=True):
        accepted += verdict and not right
        rejected += right and not verdict
    return accepted, rejected


# ------------------------------------------------------------------------------- grading/ alone


def make_pairs(forms: list, count: int) -> tuple[list, list]:
    """Return responses and references. Every other response is wrong."""
    responses, references = [], []
    for number in range(count):
        reference, answer = forms[number % len(forms)]
        answer = answer.replace("A", str(number + number % 2 + 8))  # odd responses are wrong
        responses.append(rf"So \boxed{{{answer}}}.")
        references.append(reference.replace("A", str(number + 8)))
    return responses, references


def measure_own(folder: Path) -> None:
    """Print the errors of grading/ in each file, and its answers per second."""
    paths = [*folder.glob("cases/verifier_pairs*.jsonl"), *folder.glob("cases/3/responses.jsonl")]
    paths += folder.glob("data/*.jsonl")
    with Grader() as grader:
        for path in sorted(paths):
            cases = read_cases(path)
            if cases:
                responses, references, _ = zip(*cases, strict=True)
                wrong, missed = count_errors(grader.grade(responses, references), cases)
                text = f"{wrong} wrong answers accepted, {missed} right ones rejected"
                print(f"{path.name}: of {len(cases)}, {text}")

        for name, (forms, count) in SPEED.items():
            responses, references = make_pairs(forms, count)
            grader.grade(responses[-8:], references[-8:])  # starts the workers
            # The others need no worker, so the CPU time of this process is enough.
            clock = time.perf_counter if name == "LaTeX" else time.process_time
            start = clock()
            right = sum(grader.grade(responses, references))
            rate = count / (clock() - start)
            print(f"{name}: {rate:.0f} per second, {right} of {count} right")


# ------------------------------------------------------------------------------- all graders


def ours() -> Grade:
    grader = Grader()
    return lambda response, reference: grader.grade([response], [reference])[0]


def math_verify() -> Grade:
    from math_verify import parse, verify

    return lambda response, reference: verify(parse(rf"\boxed{{{reference}}}"), parse(response))


def from_verl(module: str, verdict: Callable[[object], bool]) -> Grade:
    """`compute_score` of a module of verl, whose packages are not executed."""
    for package in ("verl", "verl.utils", "verl.utils.reward_score"):
        sys.modules[package] = types.ModuleType(package)
        folder = distribution("verl").locate_file(package.replace(".", "/"))
        sys.modules[package].__path__ = [str(folder)]
    helpers = types.ModuleType("verl.utils.py_functional")
    helpers.timeout_limit = lambda *_, **__: lambda function: function
    sys.modules["verl.utils.py_functional"] = helpers
    found = importlib.import_module(f"verl.utils.reward_score.{module}")
    return lambda response, reference: verdict(found.compute_score(response, reference))


def math_dapo() -> Grade:
    """Compares text, less strictly on the answer line that DAPO's prompts ask for than in a box."""
    grade = from_verl("math_dapo", lambda score: bool(score["acc"]))
    return lambda response, reference: grade(f"Answer: {last_boxed(response)}", reference)


GRADERS = {
    "grading": ours,
    "math-verify, its defaults": math_verify,
    "verl `math_reward`": lambda: from_verl("math_reward", bool),
    "verl `math_dapo`": math_dapo,
    "verl `prime_math` (PRM800K)": lambda: from_verl("prime_math", lambda score: bool(score[0])),
}


def measure(grade: Grade, cases: list[Case]) -> tuple[int, int, str]:
    """The cells of a grader: wrong answers accepted, right ones rejected, answers per second."""
    verdicts = []
    with contextlib.redirect_stdout(io.StringIO()):  # some print
        grade(r"\boxed{x+1}", "1+x")  # starts a worker, builds a parser
        start = time.perf_counter()
        for response, reference, _ in cases:
            try:
                verdicts.append(grade(response, reference_text(reference)))
            except Exception:
                verdicts.append(False)
        rate = len(cases) / (time.perf_counter() - start)
    return *count_errors(verdicts, cases), f"{rate:.0f}"


def graders_table(folder: Path) -> str:
    cases = []
    for path in sorted(folder.glob("cases/verifier_pairs*.jsonl")):
        cases += read_cases(path)
    right = sum(case[2] for case in cases)
    head = ["grader", f"accepted, of {len(cases) - right} wrong answers"]
    head += [f"of {right} right answers rejected", "per second"]
    return markdown(head, [[name, *measure(make(), cases)] for name, make in GRADERS.items()])


def kinds_table() -> str:
    """The docstrings of the kinds, in the order in which they are tried."""
    rows = []
    for _, kind in KINDS:
        text, _, examples = " ".join(kind.__doc__.split()).partition(": `")
        examples = examples.replace("|", r"\|")
        rows.append([text, f"`{examples}"])
    return markdown(["kind", "examples"], rows, words=2)


def rules_table() -> str:
    """The pairs of kinds that may be equal, with the docstrings of their rules."""
    rows = []
    for (first, second), rule in RULES.items():
        names = f"{first.__name__}, {second.__name__}".replace("Kind", "any kind")
        rows.append([names, " ".join(rule.__doc__.split())])
    return markdown(["reference, answer", "rule"], rows, words=2)


def main(args: Args) -> None:
    if not args.own and importlib.util.find_spec("verl") is None:
        sys.exit("error: verl is not installed: see python benchmark/graders.py --help")
    shared.write_page(README, {"kinds": kinds_table(), "rules": rules_table()})
    if args.own:
        measure_own(args.folder)
    else:
        table = graders_table(args.folder)
        shared.write_page(README, {"graders": table})
        print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
