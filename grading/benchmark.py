"""How many plain numbers and LaTeX answers are graded per second? python -m grading.benchmark

Plain numbers need no worker. Every other answer is wrong.
"""

import time

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


def make_pairs(forms: list, count: int) -> tuple[list, list]:
    """Return responses and references. Every other response is wrong."""
    responses, references = [], []
    for number in range(count):
        reference, answer = forms[number % len(forms)]
        answer = answer.replace("A", str(number + number % 2 + 8))
        responses.append(rf"So \boxed{{{answer}}}.")
        references.append(reference.replace("A", str(number + 8)))
    return responses, references


def main() -> None:
    with Grader(workers=2) as grader:
        for name, forms, count in [("plain numbers", NUMBERS, 40_000), ("LaTeX", LATEX, 2000)]:
            responses, references = make_pairs(forms, count)
            grader.grade(responses[-8:], references[-8:])  # starts the workers
            start = time.perf_counter()
            right = sum(grader.grade(responses, references))
            rate = count / (time.perf_counter() - start)
            print(f"{name}: {rate:.0f} per second, {right} of {count} right")


if __name__ == "__main__":
    main()
