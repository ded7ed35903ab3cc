"""How many answers are graded per second? python -m grading.benchmark

- Plain numbers, which need no worker, and LaTeX answers, half of them wrong.
- The guards: a tenth of the answers makes the worker sleep past the deadline, exit, or allocate
  more memory than its cap. A stand-in takes math-verify's place and does so when an answer tells
  it to. The other answers must be graded as if they were alone.
"""

import os
import tempfile
import time
from pathlib import Path

from grading import Grader

FORMS = [  # a reference, and the same value written differently; an odd number of them
    (r"\frac{A\pi}{7}", r"\dfrac{A}{7}\pi"),
    (r"x^2+Ax-3", r"-3+x^2+Ax"),
    (r"(3, A]", r"\left(3,A\right]"),
    (r"A, -2", r"-2,\, A"),
    (r"A\sin 5x", r"\sin(5x) \cdot A"),
    (r"y = Ax + 6", r"y=6+Ax"),
    (r"\frac{\sqrt{5}}{A}", r"\frac{1}{A}\sqrt{5}"),
]
HOSTILE = ["sleep", "exit", "allocate"]
STAND_IN = """
import os, signal, time

def parse(text, **_):
    if "sleep" in text:
        time.sleep(600)
    if "block" in text:  # as in C code, no signal arrives
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        time.sleep(600)
    if "exit" in text:
        os._exit(3)
    if "abort" in text:
        os.abort()
    if "allocate" in text:
        bytearray(1 << 40)
    if "noise" in text:
        print("11111")
        os.write(1, b"1")
        os.write(2, b"x" * 10**6)
    return [text]

def verify(reference, answer, **_):
    return reference[0].lower() == answer[0].lower()
"""


def latex_pairs(count: int) -> tuple[list[str], list[str], list[bool]]:
    """Return responses, references and the right verdicts, alternately true and false."""
    responses, references = [], []
    for number in range(count):
        reference, answer = FORMS[number % len(FORMS)]
        value = number + 8
        references.append(reference.replace("A", str(value)))
        responses.append(r"So \boxed{" + answer.replace("A", str(value + number % 2)) + "}.")
    return responses, references, [True, False] * (count // 2)


def report(name: str, grader: Grader, responses: list, references: list, right: list) -> None:
    grader.grade(responses[:8], references[:8])  # starts the workers
    start = time.perf_counter()
    verdicts = grader.grade(responses, references)
    rate = len(verdicts) / (time.perf_counter() - start)
    print(f"{name}: {rate:.0f} per second, all verdicts right: {verdicts == right}")


def main() -> None:
    with Grader(workers=2) as grader:
        numbers = [str(number) for number in range(40_000)]
        responses = [rf"\boxed{{{number}.0}}" for number in numbers]
        report("plain numbers", grader, responses, numbers, [True] * 40_000)
        report("LaTeX answers", grader, *latex_pairs(2000))

    responses, references, right = latex_pairs(300)
    for place in range(0, 300, 10):
        responses[place] = rf"\boxed{{{HOSTILE[place % 3]}+{place}}}"
    with tempfile.TemporaryDirectory() as folder, Grader(workers=2, deadline=1.0) as grader:
        Path(folder, "math_verify.py").write_text(STAND_IN)
        os.environ["PYTHONPATH"] = folder
        report("with guards", grader, references, references, right)


if __name__ == "__main__":
    main()
