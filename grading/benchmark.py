"""How many answers are graded per second? python -m grading.benchmark

- Plain numbers, which need no worker, and LaTeX answers. Every other answer is wrong.
- With hostile answers: an eighth of the answers makes the worker sleep past the deadline, exit, or
  allocate more memory than its cap. A stand-in takes math-verify's place and does so when an answer
  tells it to.
"""

import os
import tempfile
import time
from pathlib import Path

from grading import Grader

# References, and the same value written differently. Each list has an odd length.
NUMBERS = [("A", "A.0")]
LATEX = [
    (r"\frac{A\pi}{7}", r"\dfrac{A}{7}\pi"),
    (r"x^2+Ax-3", r"-3+x^2+Ax"),
    (r"(3, A]", r"\left(3,A\right]"),
    (r"A, -2", r"-2,\, A"),
    (r"A\sin 5x", r"\sin(5x) \cdot A"),
    (r"y = Ax + 6", r"y=6+Ax"),
    (r"\frac{\sqrt{5}}{A}", r"\frac{1}{A}\sqrt{5}"),
]
HOSTILE = [("x", "sleep+A"), ("x", "exit+A"), ("x", "allocate+A"), *[("x+A", "X+A")] * 20]
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
        bytearray(3 << 30)
    if "noise" in text:
        print("11111")
        os.write(1, b"1")
        os.write(2, b"x" * 10**6)
    return [text]

def verify(reference, answer, **_):
    return reference[0].lower() == answer[0].lower()
"""


def make_pairs(forms: list, count: int) -> tuple[list, list]:
    """Return responses and references. Every other response is wrong."""
    responses, references = [], []
    for number in range(count):
        reference, answer = forms[number % len(forms)]
        answer = answer.replace("A", str(number + number % 2 + 8))
        responses.append(rf"So \boxed{{{answer}}}.")
        references.append(reference.replace("A", str(number + 8)))
    return responses, references


def report(name: str, grader: Grader, forms: list, count: int) -> None:
    responses, references = make_pairs(forms, count)
    grader.grade(responses[-8:], references[-8:])  # starts the workers
    start = time.perf_counter()
    right = sum(grader.grade(responses, references))
    rate = count / (time.perf_counter() - start)
    print(f"{name}: {rate:.0f} per second, {right} of {count} right")


def main() -> None:
    with Grader(workers=2) as grader:
        report("plain numbers", grader, NUMBERS, 40_000)
        report("LaTeX answers", grader, LATEX, 2000)

    with tempfile.TemporaryDirectory() as folder, Grader(workers=2, deadline=1.0) as grader:
        Path(folder, "math_verify.py").write_text(STAND_IN)
        os.environ["PYTHONPATH"] = folder
        report("with hostile answers", grader, HOSTILE, 299)


if __name__ == "__main__":
    main()
