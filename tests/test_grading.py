"""grading/: what it reads, that it agrees with math-verify, and that no answer can stop it."""

import _thread
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, shared_rows
from graders import LATEX, make_pairs

import grading.grader
from grading import MAX_ANSWER, Grader, last_boxed
from grading.answers import find_answer, plain_number, reference_text
from grading.grader import Worker, WorkerError
from grading.kinds import read

# Takes the place of math-verify and its parser, and obeys commands such as `\\sleep`.
STAND_IN = """
import os, signal, time
from sympy import Symbol

def latex2sympy(text, **_):
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
    return Symbol(text.lower())

def ConversionConfig(**_):
    pass

def verify(*_, **__):
    return False
"""
STRICT, LENIENT = Grader(), Grader(strict=False)
ORDINARY = [
    (r"\boxed{\dfrac{1}{2}\pi}", r"\frac{\pi}{2}", True),
    (r"\boxed{(1, 3]}", "[1, 3)", False),
    (r"first \boxed{7}, then \boxed{x+1}", "1+x", True),
    (r"\boxed{8}", "8.0", True),
    (r"\boxed{2, 1}", "1, 2", True),
    (r"\boxed{\sqrt{3}}", r"\sqrt{2}", False),
]


@pytest.fixture(scope="module", autouse=True)
def shared_graders():
    with STRICT, LENIENT:
        yield


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts modules in the place of math-verify and its parser. They obey commands by default."""

    def write(source: str = STAND_IN) -> None:
        folder = tmp_path / "stand_in"
        (folder / "latex2sympy2_extended").mkdir(exist_ok=True, parents=True)
        for name in ("__init__", "latex2sympy2"):
            (folder / "latex2sympy2_extended" / f"{name}.py").write_text(source)
        (folder / "math_verify.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return write


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """All workers that are started, including those that have ended."""
    workers = []

    class Recorded(Worker):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            workers.append(self)

    monkeypatch.setattr(grading.grader, "Worker", Recorded)
    return workers


def exit_codes(workers: list[Worker]) -> list[int | None]:
    """How the workers ended, None for those that run: -9 if the deadline passed."""
    return [worker.process.returncode for worker in workers]


def check_ordinary(grader: Grader) -> None:
    responses, references, right = zip(*ORDINARY, strict=True)
    assert grader.grade(responses, references) == list(right)


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends within the seconds; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4}", "4"), (r"no box", None), (r"\boxed", None), (r"\boxed 4", None),
        (r"\fbox{4}", "4"), (r"\boxed{}", None), (r"\boxed {4}", "4"),
        (r"\boxed{1} and \boxed{2}", "1, 2"), (r"\boxed{1} then \boxed{2}", "2"),
        (r"$\boxed{-2} \quad\text{and}\quad \boxed{1}$.", "-2, 1"),
        (r"\boxed{9}. No: \boxed{1}, $\boxed{2}$ or \(\boxed{3}\)", "1, 2, 3"),
        (r"\boxed{5}. Put it in \boxed{}.", "5"),
        (r"\boxed{1}\boxed{ }, \boxed{2}", "2"), (r"\boxed{\frac{1}{2}} is }it{", r"\frac{1}{2}"),
        (r"\boxed{3}, that is \boxed{\frac{6}{2", "3"), (r"\boxed{3}, that is \boxed{{6}", "3"),
        (r"} { \boxed{5}", "5"), (r"\boxed{\boxed{4}}", "4"), (r"\boxed{x = \boxed{4} cm}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\begin{aligned} x \\\boxed{4} \end{aligned}", "4"), (r"\\boxed{4}", "4"),
        (r"\boxed{a\\{b}}", r"a\\{b}"), ("\\boxed{\ud800\0\n}", "\ud800\0\n"),
    ],
)  # fmt: skip
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_last_boxed_of_hostile_sizes():
    assert last_boxed(r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}") == "{" * 10**6 + "}" * 10**6
    assert last_boxed(r"\boxed{" * 10**5) is None
    assert last_boxed(r"\boxed{" * 10**5 + "1" + "}" * 10**5) == "1"
    assert last_boxed("\\" * 10**6 + r"boxed{1}" + "}" * 10**6) == "1"
    assert last_boxed(r"\boxed" + " " * 10**6) is None


@pytest.mark.parametrize(
    "line",
    [
        "Answer: 42",
        "**Final answer:** 42",
        "So the answer is 42",
        "Therefore, the answer is: 42",
        "Final Answer: The final answer is $42$. I hope it is correct.",
    ],
)
def test_an_answer_line(line):
    answer = find_answer(f"Working.\n{line}\nThat is all.", "line")
    assert answer == ("$42$." if "$" in line else "42")


@pytest.mark.parametrize("part", ["\n", "*\n", " \n", "-", "#", "Answer: ", "Answer: a ", "word"])
def test_answer_lines_of_hostile_sizes(part):
    """The time is linear: such a response takes milliseconds, and a reference too."""
    text = f"x{part * 10**5} "
    start = time.perf_counter()
    find_answer("answer:" + " " * 10**4, "line")
    find_answer(text, "line")
    find_answer(f"Answer: 7{' ' * 10**5}8", "line")
    reference_text(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), (" -18 ", -18), ("007", 7), ("1,234,567", 1234567),
        ("1,234.50", Fraction("1234.5")), ("12,00,000", 1200000), ("0.125", Fraction(1, 8)),
        ("6/4", Fraction(3, 2)), (r"-\frac{3}{6}", Fraction(-1, 2)),
        (r"\dfrac{22}{7}", Fraction(22, 7)),
        *[(text, None) for text in ["", "-", "$", "x", "1/0", "00/00", r"\frac{1}{0}", "12,34"]],
        *[(text, None) for text in ["1,2345", "5%", r"5\%", "5.", "--5", "1_000", "٣", "½"]],
        *[(text, None) for text in ["2^3", r"\5", "(5)", "nan", "inf", "5\0"]],
        *[(text, None) for text in ["9" * 41, "9" * 10**6, "1e9999", "10^{9999}", "1/2/3"]],
        ("0.12345678901234567", Fraction("0.12345678901234567")), ("1e-05", Fraction(1, 10**5)),
        ("1e+16", 10**16), (r"2.5 \times 10^{-7}", Fraction(25, 10**8)), ("10^5", 10**5),
        ("-10^{-2}", Fraction(-1, 100)), (".5", Fraction(1, 2)), ("+7,000", 7000), ("1 000", 1000),
        ("10'000", 10000), (r"\frac{3}{-2}", Fraction(-3, 2)),
    ],
)  # fmt: skip
def test_plain_number(text, value):
    assert plain_number(text) == value


def number_text(rng: random.Random) -> str:
    """A number in one of the ways in which people and models write it."""

    def digits(most: int) -> str:
        return str(rng.randrange(10 ** rng.randint(1, most)))

    decimals = "".join(rng.choices("0125", k=rng.randint(1, 6)))
    integers = [digits(2), digits(7), digits(38), f"{int(digits(9)):,}", f"0{digits(3)}"]
    others = [f"{digits(4)}.0", f"{digits(7)}.{decimals}", f"{int(digits(7)):,}.{decimals}"]
    command = rng.choice([r"\frac", r"\dfrac", r"\tfrac"])
    fractions = [f"{digits(3)}/{digits(3)}", f"{command}{{{digits(3)}}}{{{digits(3)}}}"]
    text = rng.choice([*integers, *others, *fractions])
    return rng.choice(["", "", "-"]) + text


def test_plain_numbers_agree_with_math_verify():
    """math-verify gives the same verdict on two plain numbers."""
    import math_verify

    rng = random.Random(0)
    pairs = []
    for _ in range(300):
        reference = number_text(rng)
        value = plain_number(reference)
        others = [number_text(rng), reference.replace(",", "")]
        if value is not None:
            near = value + rng.choice([0, 0, Fraction(1, 10**4), 1, -2 * value])
            others += [f"{near.numerator}/{near.denominator}"]
            others += [rf"\frac{{{abs(near.numerator) * 3}}}{{{near.denominator * 3}}}"] * 2
        pairs.append((reference, rng.choice(others)))

    pairs = [pair for pair in pairs if None not in map(plain_number, pair)]
    verdicts = [plain_number(reference) == plain_number(answer) for reference, answer in pairs]
    assert verdicts.count(True) > 60 and verdicts.count(False) > 60
    for (reference, answer), verdict in zip(pairs, verdicts, strict=True):
        parsed = [math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None)
                  for text in (reference, answer)]  # fmt: skip
        assert math_verify.verify(*parsed, timeout_seconds=None) == verdict, (reference, answer)


# What means the same, by rule: reference, answers that are right, answers that are wrong.
RULES = {
    "markup": [
        ("18", [r"\text{18}", r"\textbf{18}", r"\mathbf{ 18 }", r"\mathrm{18}", r"\textit{18}",
         r"\mathcal{18}", r"{\bf 18}", r"\bf 18", r"\bf{18}", r"\underline{\text{18}}",
         r"\mathbf{18.}", "**18**", "`18`", "$18$", r"\(18\)", r"\textcolor{red}{18}",
         r"\displaystyle 18"], [r"\text{19}", r"\text{18 or 19}", r"\text{eighteen}",
         r"\text{17}+1"]),
        (r"3\sqrt{2}", [r"\mathbf{3\sqrt{2}}", r"\boldsymbol{3}\sqrt{2}"],
         [r"\mathbf{2\sqrt{3}}"]),
        (r"\text{18}", ["18", r"\mathbf{18}"], ["81"]),
    ],
    "stop": [
        ("3.5", ["3.5.", "3.5,", "3.5 ;", r"3.5\text{.}", r"\textbf{3.5.}", r"3.5\,."], ["35.",
         "3.5!"]),
        ("1, 2", ["1, 2.", "{1, 2}."], ["1, 2, 3."]),
    ],
    "grouping": [
        ("1234567", [r"1\,234\,567", "1{,}234{,}567", r"1,\!234,\!567", "1 234 567",
         "1~234~567"], [r"1\,234", r"1\,234\,56", "1, 234, 567"]),
    ],
    "neighbours": [
        ("x+6", ["x+2(3)", "x+(2)(3)"], ["x+5"]),
    ],
    "currency": [
        ("18", [r"\$18", "€18", "£ 18", "USD 18", "US$18", "18 USD", "18元", "Rs. 18", "18 €",
         r"\$18.00", r"\pounds 18"], ["$19", "€1.8", "USD 81"]),
        (r"\$18", ["18", "18 dollars", r"18 \text{ USD}"], ["€18", "18 cents", "18%"]),
    ],
    "units": [
        ("18", ["18 km/h", "$18$ points", r"18\ \mathrm{m/s}", r"18\text{ cm}^{2}", "18 m^2",
         "18 apples", "18 miles per hour", r"18^\circ", "18°", "18 degrees", "18 mph",
         r"\text{18 cm}"], ["18x", "18 or 19", "18 dozen", "18 mod 20", "18!", "180 km/h",
         "18 pi", "18 theta", "18 feet 3 inches", "18 choose 2"]),
        ("18 cm", ["18", r"18\text{ cm}", "18 centimeters", "18 centimetre"], ["18 m",
         r"18^\circ", "18 inches", "18 cm^2", "18%", "9 cm"]),
        ("5 feet 3 inches", ["5 feet 3 inches"], ["5", "5 feet", "3 inches"]),
        ("60 mph", ["60 miles per hour", r"60\text{ mi/h}", "60"], ["60 km/h", "61 mph"]),
        ("5 s", ["5000 ms", r"5000\text{ milliseconds}"], ["5000 m", "5 ms"]),
        ("5 m", ["5 metres"], ["5 ms"]),
        ("20 m/s", [r"20 ms^{-1}", r"20 \text{ m s}^{-1}"], [r"20 ms^{-2}"]),
        ("300000000", [r"3\times{10}^{8}\text{ m/s}", r"3 \times {10}^{8}"],
         [r"3 \times {10}^{7}"]),
        ("18000", ["18 thousand", r"18 \text{ thousand}", "18 thousand dollars"], ["18",
         "18 million"]),
        ("18", [], ["18 thousand", r"18 \text{ thousand}", "[18]"]),
    ],
    "percent": [
        (r"7.41\%", ["7.41", "0.0741", "7.41%", "$7.41$ %", r"7.41 \text{ percent}"], ["741",
         "0.741", r"74.1\%"]),
        ("7.41", [r"7.41\%"], [r"741.5\%", r"7.4\%"]),
        (r"12.5\%", [r"\frac{1}{8}"], [r"\frac{1}{80}"]),
        ("0.5", [r"50\%"], [r"5\%"]),
    ],
    "about": [
        ("18", [r"\approx 18", "≈18", "about 18", "18 (approximately)",
         r"18 \text{ (rounded)}"], [r"\approx 19", "18 (mod 20)", "about 1.8"]),
    ],
    "exponents": [
        ("1e-05", ["0.00001", "10^{-5}", r"1 \times 10^{-5}", "1e-5"], ["e-5", "-2.28",
         "0.0001", "1"]),
        ("2.5e-07", [r"2.5 \times 10^{-7}"], [r"2.5 \times 10^{-8}", "0"]),
        ("1024", ["2^{10}", "4^5"], ["2^{9}", "2^9+512"]),
        ("2e - 3", ["-3+2e"], ["0.002"]),
    ],
    "large numbers": [
        ("x^2+10000", ["10000+x^2"], ["x^2+10001"]),
        ("2^{10000}", [], ["2^{10001}", "2^10001", "2^(12345)"]),
        ("100e^{-0.000121t}", [r"100 \cdot e^{-0.000121t}"], ["100e^{-0.000122t}"]),
    ],
    "characters": [
        (r"2\sqrt{13}", ["2√13", "2 √(13)"], ["2√1 3", "√13"]),
        ("x^2+1", ["x²+1"], ["x³+1"]),
        ("x^{-12}", ["x⁻¹²"], ["x¹²"]),
        ("1/2", ["½"], ["⅓"]),
        ("7/2", ["3½"], ["31/2"]),
        ("-3", ["−3"], ["3"]),
    ],
    "choices": [
        ("B", [r"\textbf{(B)}\ 12", "B) 12", "(B) 12", "B. 12", "(B)", r"\text{B}",
         "Option B: 12"], ["C) 12", "(B) and (C)", "B, C", "A", "12"]),
        ("A, C", ["AC", "A and C", r"\text{A, C}"], ["A", "AB", "ABC"]),
    ],
    "words": [
        ("True", ["true", r"\text{True}", "TRUE."], ["false", "1"]),
        ("Yes", [r"\text{Yes, it is}", "yes.", r"\textbf{Yes}"], ["No", "No, yes"]),
        ("No", ["no, because 3 is odd"], [r"\text{no solution}", "yes"]),
        (r"\text{No solution}", [r"\text{no solutions}"], ["no", "one solution"]),
        (r"\text{DNE}", [r"\text{does not exist}", "dne"], [r"\text{does exist}"]),
        ("3:30 PM", [r"3:30 \text{ PM}", r"3{:}30\,\text{p.m.}"], ["3:30 AM", "3:31 PM",
         "3:30"]),
    ],
    "intervals": [
        ("(-2,3)", ["-2<x<3"], [r"-2\le x<3", "-2<x<4"]),
        (r"[0,\infty)", [r"x \geq 0"], ["x > 0"]),
        (r"(\frac{1}{2},\infty)", [r"\frac{1}{2} < \theta", r"\frac12 < x", r"\frac12 < |t|"],
         [r"\theta < \frac{1}{2}"]),
        ("(1,2)", ["1<a<2"], ["1<a<b<2", "1<x>5<2"]),
    ],
    "names": [
        ("a=1,b=2,c=3", ["1,2,3", "(1,2,3)", "c=3, a=1, b=2"], ["3,2,1", "(3,2,1)",
         "a=3,b=2,c=1"]),
        ("x=1, x=2", ["2, 1"], ["1, 3"]),
        (r"\theta=\frac{\pi}{3}", [r"\frac{\pi}{3}", r"\frac{\pi}{3}=\theta"],
         [r"\varphi=\frac{\pi}{3}"]),
        (r"\psi=2", ["2"], ["3"]),
    ],
    "rounding": [
        (r"\pi", [r"\pi"], ["3.14159265", "3.14"]),
        (r"\frac{1}{2^{99}}", ["2^{-99}"], [r"\frac{1}{2^{98}}", "0"]),
        ("0.0000001", ["1e-7"], ["0.0000002"]),
        (r"\frac{1}{3}", ["0.33333333"], ["0.333", "0.3334"]),
        ("33.333333333333336", [r"\frac{100}{3}"], ["33.3"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    cases = [(reference, answer, True) for reference, right, _ in RULES[rule] for answer in right]
    cases += [(reference, answer, False) for reference, _, wrong in RULES[rule] for answer in wrong]
    verdicts = STRICT.grade([rf"\boxed{{{case[1]}}}" for case in cases], [c[0] for c in cases])
    pairs = zip(cases, verdicts, strict=True)
    assert [case for case, verdict in pairs if case[2] != verdict] == []


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("42", r"42\ "),
        (r"42\ ", "42"),
        (r"\sqrt{2}", r"\sqrt{2} (\approx 1.414)"),
        (r"x<-4 \text{ or } x>4", "|x|>4"),
        (r"(-\infty,-2]\cup[2,\infty)", r"|x| \ge 2"),
        ("(2,2),(3,3)", r"(p,q) \in \{(2,2),(3,3)\}"),
        ("42", r"42 \text{ positive integers}"),
        ('["\\frac{1}{2}"]', r"\frac{1}{2}"),  # JSON in which a backslash is not escaped
        ("0.125", "0,125"),
        ("0.125", "0{,}125"),
        ("1234", "x = 1{,}234"),
        (r"1234567\pi", r"1{,}234{,}567\pi"),
        ("1200, 1400", r"1,\!200 \text{ and } 1,\!400"),
        (r"\$ 0.25", r"\$3 \text{ per dozen}"),
        ("Baseball", r"\text{baseball}"),
        (r"\mathbb{R}", "ℝ"),
        (r"\boxed 3.5", "3.5"),
        (r"\boxed 1/2", r"\frac{1}{2}"),
        ("5", r"5 \text{ (by AM-GM)}"),
        ("5", r"5 \text{ (as } -3 \text{ is extraneous)}"),
        ("5", r"5 \text{ (assuming } x>0)"),
        ("101_2", r"101 \text{ (base 2)}"),
        ("AF_{16}", "AFbase16"),
        ("5", r"5 \text{ baseballs}"),
        (r"\frac{2469}{20,\!000}", r"\frac{2469}{20,000}"),
        (r"1{,}000\pi", r"1,000\pi"),
        ("x=1,024", "x=1{,}024"),
        ("(1{,}000, 2{,}000)", "(1,000, 2,000)"),
        (r"8.314 \text{ J/mol K}", r"8.314 \text{ J mol}^{-1} \text{ K}^{-1}"),
        (r"x \in \mathbb{R}", r"x \in R"),
    ],
)
def test_right_answers_in_other_notation(reference, answer):
    assert LENIENT.grade([rf"\boxed{{{answer}}}"], [reference]) == [True]


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("125", "0,125"),
        ("2", "x = 2,002"),
        ("2", "x = 2{,}002"),
        (r"\$36", r"\$3 \text{ per dozen}"),
        ("R", "ℝ"),
        ("a", "a(by+cx)"),
        ("a", "a(by + cx)"),
        ("(as,bt)", "(by,cx)"),
        ("soccer_{ball}", r"\text{soccer, baseball}"),
    ],
)
def test_wrong_answers_in_other_notation(reference, answer):
    assert LENIENT.grade([rf"\boxed{{{answer}}}"], [reference]) == [False]


def test_rules_take_linear_time():
    """The longest texts that are read, made of what the patterns repeat."""
    parts = ["{", "}", " ", "1", "1,", "a", "a ", "$", r"\text{", r"\bf ", "√", "(approx", r"\,"]
    parts += ["A, ", "10^{", "1 000 ", ".", "1 km ", "²", "x=1,", "½", "*", "B) A "]
    start = time.process_time()
    for part in parts:
        for text in ((part * 4096)[:4096], "18 " + (part * 4096)[:4093]):
            read(text)
    assert time.process_time() - start < 5


def test_strict_wants_a_number():
    """A reference, right answers, and answers that are right only if `strict` is off."""
    table = [
        ("18", [r"18 \text{ dollars}", r"9 \cdot 2 = 18", "x = 18", r"18^\circ", r"18\%",
         r"1.8 \times 10^{1}", "{18}", r"\frac{36}{2}", r"\sqrt{324}", r"\binom{18}{1}"],
         ["(16-3-4)*2", r"2 \cdot 9", "20-2", r"18 = 9 \cdot 2", r"20-2 \text{ dollars}",
          "20-2, 18"]),
        ("(5,7)", ["5<x<7"], ["1+4<x<3+4", "(1+4, 7)"]),
        ("- 5", ["-5"], ["2-7"]),
        ("3", [r"\frac{1 + 5}{2}", r"\frac{1+5}{2}"], ["1 + 2"]),
        (r"\sqrt{12}", [r"2\sqrt{3}"], []),
    ]  # fmt: skip
    for reference, right, unevaluated in table:
        responses = [rf"\boxed{{{answer}}}" for answer in right + unevaluated]
        references = [reference] * len(responses)
        strictly = [True] * len(right) + [False] * len(unevaluated)
        assert STRICT.grade(responses, references) == strictly
        assert all(LENIENT.grade(responses, references))


def test_lenient_verdicts():
    """math-verify unwraps an assignment only if the reference has the answer's form."""
    responses = [r"\boxed{4}", r"\boxed{x^2 = 4}", r"\boxed{e-5}", r"\boxed{10^{-5}}"]
    references = ["x^2 = 4", "4", "1e-05", "1e-05"]  # a float is not read as e
    assert LENIENT.grade(responses, references) == [False, True, False, True]


def test_answers_without_a_box_and_long_ones_are_wrong():
    assert STRICT.grade(["The final answer is $18$.", "18", ""], ["18"] * 3) == [False] * 3
    zeros = "0" * (MAX_ANSWER - 2)
    responses = [rf"\boxed{{{zeros}18}}", rf"\boxed{{0{zeros}18}}"]
    assert LENIENT.grade(responses, ["18"] * 2) == [True, False]


# ------------------------------------------------------------------------------- shared cases


# Why verdicts differ from those wanted. Only the last box counts, where math-verify joins
# neighbouring boxes or prefers "final answer is"; a boxed `1,22` is a list, not a decimal, and
# `\boxed{185\}` is not closed; math-verify itself disagrees, or the case was written for other
# settings; a reference that is not an answer has no verdict. Inequalities are not solved, `any
# text` is no unit, one reference is a whole response; items of a list count twice, names are part
# of the answer, `x \in [-2,7]` is an interval.
EXPLAINED = """177 199 227 228 229 231 233 234 238 239 240 166 5 6 290 127 133 180 244 254 259
260 261 263 270 289 316 311 320 100 102 104 181 184 187 196 209 241 293 56"""


def test_shared_cases_at_least_as_well_as_math_verify_alone():
    """Bare answers are boxed here. Sentences without a box are left out: they are wrong."""
    cases = []
    for case in shared_rows("data/verifier_cases.jsonl"):
        if last_boxed(case["pred"]) is None:
            if re.search("[A-Za-z]{3,}:? ", case["pred"]):
                continue
            case["pred"] = rf"\boxed{{{case['pred']}}}"
        cases.append(case)
    references = [case["gold"] for case in cases]
    verdicts = LENIENT.grade([case["pred"] for case in cases], references)
    pairs = list(zip(cases, verdicts, strict=True))
    wrong = {case["id"] for case, verdict in pairs if case["expected"] != verdict}
    assert wrong <= set(map(int, EXPLAINED.split())), wrong
    alone = sum(case["expected"] != case["math_verify_0_9_0_default"] for case in cases)
    assert len(cases) == 287 and len(wrong) <= alone


# ------------------------------------------------------------------------------- references


def test_unreadable_references_are_found():
    references = ["7", "18 cm", r"\frac{\pi}{2}", r"\boxed{x}", r"\boxed{2} or \boxed{3}"]
    references += [r"\text{Evelyn}", r"$f(x)=ax$, where $a$ is some integer and so on"]
    none = ["", " ", r"\boxed{}", "proof", "notfound", "Not found", "None", "nan", "NULL", "n/a"]
    none += ["{'value': '52', 'unit': 'cm'}", '{"value": 52}']
    references += ["a + b + c", "-1 or 1", "3:30 PM"]
    unread = ["x" * 5000, "\ud800", r"\frac{1}{", "t(0,4]", r"9^{1{,}000{,}000}"]
    unread += ["This completes the proof of $a=b$ for all integers."]
    unread += ["First we add 2 and 3. So Tom has 5 apples left."]
    assert STRICT.readable(references) == [True] * len(references)
    assert STRICT.readable(none + unread) == [False] * len(none + unread)
    assert not any(STRICT.grade([rf"\boxed{{{text}}}" for text in none], none))


def test_references_are_read_by_more_workers(monkeypatch, started):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with Grader() as grader:
        assert all(grader.readable([f"x+{number}" for number in range(150)]))
        assert exit_codes(started) == [-9, -9, -9]


# ------------------------------------------------------------------------------- workers


def test_order_is_kept_with_several_workers(started):
    responses, references = make_pairs(LATEX, 60)
    with Grader(workers=3) as grader:
        check_ordinary(grader)
        assert grader.grade(responses, references) == [True, False] * 30
        assert exit_codes(started) == [None] * len(started)
        with pytest.raises(ValueError):
            grader.grade(responses, references[1:])
        assert grader.grade([], []) == []


def test_equal_pairs_are_graded_once(stand_in, tmp_path):
    seen = tmp_path / "seen"
    stand_in(
        STAND_IN
        + f"\ndef latex2sympy(text, **_):\n    open({str(seen)!r}, 'a').write(text + '\\n')\n"
        "    return Symbol(text)\n"
    )
    with Grader(workers=2, strict=False) as grader:
        verdicts = grader.grade([r"\boxed{a}", r"\boxed{b}"] * 10, ["c+1"] * 20)
    assert verdicts == [False] * 20
    lines = seen.read_text().splitlines()
    assert lines.count("a") == lines.count("b") == 1


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("sleep", -signal.SIGKILL),
        ("block", -signal.SIGKILL),  # as in C code: the worker itself cannot be interrupted
        ("exit", 3),
        ("abort", -signal.SIGABRT),
        ("allocate", None),  # above the memory cap, but not above the machine's memory
        ("noise", None),  # printed output is not taken for verdicts
    ],
)
def test_an_answer_costs_its_own_verdict_only(word, code, stand_in, started):
    """Its worker ends with this code and is replaced, or goes on to the next answer."""
    stand_in()
    answers = ["A+1", rf"\{word}+2", "A+3", rf"\{word}+4", "A+5", "wrong"]
    references = ["a+1", rf"\{word.upper()}+2", "a+3", rf"\{word.upper()}+4", "a+5", "a+6"]
    with Grader(deadline=0.5, memory_mb=1024) as grader:
        verdicts = grader.grade([rf"\boxed{{{answer}}}" for answer in answers], references)
        right = word == "noise"
        assert verdicts == [True, right, True, right, True, False]
        expected = [None] if code is None else [code, code, None]
        assert exit_codes(started) == expected


def test_hostile_answers_in_one_batch(stand_in):
    """Two workers, and a third of the answers kill them."""
    stand_in()
    answers = [f"A+{number}" for number in range(24)]
    answers[::3] = [r"\sleep+1", r"\exit+2", r"\allocate+3", r"\abort+4"] * 2
    references = [answer.swapcase() for answer in answers]
    references[1::3] = ["b+1"] * 8
    with Grader(workers=2, deadline=0.5, memory_mb=1024) as grader:
        verdicts = grader.grade([rf"\boxed{{{answer}}}" for answer in answers], references)
    assert verdicts == [number % 3 == 2 for number in range(24)]


def test_workers_killed_from_outside(stand_in, started):
    stand_in()
    with Grader(deadline=30.0) as grader:
        assert grader.grade([r"\boxed{A+1}"], ["a+1"]) == [True]
        started[0].process.kill()
        started[0].process.wait()
        assert grader.grade([r"\boxed{A+2}"], ["a+2"]) == [True]  # it was idle: no answer is lost

        threading.Timer(0.5, started[1].process.kill).start()
        assert grader.grade([r"\boxed{\sleep}", r"\boxed{A+3}"], ["x", "a+3"]) == [False, True]
        assert exit_codes(started) == [-9, -9, None]


def test_a_worker_that_cannot_start_is_an_error(stand_in):
    stand_in("raise ImportError('no antlr here')")
    with Grader() as grader, pytest.raises(WorkerError, match="no antlr here"):
        grader.grade([r"\boxed{x+1}"], ["1+x"])
    with pytest.raises(ValueError, match="deadline"):
        Grader(deadline=0.0)


def test_an_interrupted_call_leaves_no_reply_for_the_next(stand_in, started):
    stand_in()
    with Grader(deadline=3.0) as grader:
        assert grader.grade([r"\boxed{A+1}"], ["a+1"]) == [True]
        threading.Timer(0.6, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            responses = [rf"\boxed{{x+{number}}}" for number in range(900)]
            grader.grade([r"\boxed{\sleep}", *responses], ["y"] * 901)
        assert exit_codes(started)[0] == -9  # its reply was awaited, the others were not asked
        assert grader.grade([r"\boxed{A+1}", r"\boxed{B+1}"], ["a+1", "a"]) == [True, False]


@pytest.mark.parametrize("answer", ["A+2", r"\sleep"])
def test_workers_end_with_a_killed_parent(answer, stand_in):
    stand_in()
    code = (
        "import time, grading\n"
        "grader = grading.Grader(deadline=1.5)\n"
        r"grader.grade([r'\boxed{A+1}'], ['a+1']); print(grader._idle[0].process.pid, flush=True)"
        f"\ngrader.grade([r'\\boxed{{{answer}}}'], ['x']); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
    assert gone(pid, 15)


def test_close_ends_the_workers():
    with Grader() as grader:
        check_ordinary(grader)
        pid = grader._idle[0].process.pid
    assert gone(pid, 5) and not grader._idle


# ------------------------------------------------------------------------------- imports


def test_numbers_start_no_process_and_the_caller_imports_no_library():
    code = (
        "import sys, grading\n"
        "grader = grading.Grader()\n"
        r"assert grader.grade([r'\boxed{1,234}', r'\boxed{-\frac{1}{2}}', 'none', r'\boxed{4}'],"
        "    ['1234', '-0.5', '5', '5']) == [True, True, False, False]\n"
        "assert grader.readable(['5', '1/2']) == [True, True] and not grader._idle\n"
        r"assert grader.grade([r'\boxed{x+1}'], ['1+x']) == [True] and grader._idle"
        "\nassert not {'sympy', 'math_verify', 'torch', 'infra', 'common'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_workers_import_neither_torch_nor_neighbouring_files(tmp_path, monkeypatch):
    imported = f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__)"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text(imported)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    for name in ("math_verify", "sympy", "json", "answers", "grading"):
        (tmp_path / f"{name}.py").write_text(imported)
    monkeypatch.chdir(tmp_path)
    with Grader() as grader:
        check_ordinary(grader)
    assert not (tmp_path / "imported").exists()


# ------------------------------------------------------------------------------- command line


def grade_file(
    folder: Path, *arguments: str, text: str = "", **variables: str
) -> subprocess.CompletedProcess:
    """Run `python -m grading` where nothing of ours but a copy of grading/ can be imported."""
    shutil.copytree(ROOT / "grading", folder / "grading", dirs_exist_ok=True)
    command = [sys.executable, "-m", "grading", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= variables
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, input=text, **options, check=False)


def test_a_missing_math_verify_is_one_line(stand_in, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"reference": "x+1", "response": "\\\\boxed{1+x}"}')
    stand_in("raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    done = grade_file(tmp_path, "pairs.jsonl", PYTHONPATH=os.environ["PYTHONPATH"])
    assert (done.returncode, done.stdout) == (2, "")
    (message,) = done.stderr.splitlines()
    assert message.startswith("error: ") and "math-verify" in message


@pytest.mark.parametrize("arguments", [["pairs.jsonl"], ["-"], []])
def test_a_copy_of_grading_grades_a_file(arguments, tmp_path):
    pairs = [{"reference": reference, "response": r, "id": r} for r, reference, _ in ORDINARY]
    pairs += [{"reference": "²√\ud800", "response": "no box"}]
    text = "\n" + "".join(json.dumps(pair) + "\n\n" for pair in pairs)  # with blank lines
    (tmp_path / "pairs.jsonl").write_text(text)
    done = grade_file(tmp_path, *arguments, text=text)
    assert (done.returncode, done.stderr) == (0, "")
    right = [*[pair[2] for pair in ORDINARY], False]
    expected = [pair | {"correct": value} for pair, value in zip(pairs, right, strict=True)]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_a_reader_that_closes_the_output(tmp_path):
    """As `| head` does. More output than a pipe holds."""
    (tmp_path / "pairs.jsonl").write_text('{"reference": "1", "response": "1"}\n' * 20000)
    command = f"{shlex.quote(sys.executable)} -m grading {tmp_path / 'pairs.jsonl'} | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "line 2: Expecting property name"),
        ("\n{", "line 3: Expecting property name"),
        ("[1]", "line 2: "),
        ('{"response": "1"}', "line 2: no string `reference`"),
        ('{"reference": "1"}', "line 2: no string `response`"),
        ('{"reference": 1, "response": "1"}', "line 2: no string `reference`"),
        (None, "No such file"),
    ],
)
def test_bad_input_is_one_line(line, cause, tmp_path):
    if line is not None:
        fine = '{"reference": "1", "response": "1"}\n'
        (tmp_path / "pairs.jsonl").write_text(fine + line + "\n")
    done = grade_file(tmp_path, "pairs.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    (message,) = done.stderr.splitlines()
    assert message.startswith("error: ") and "pairs.jsonl" in message and cause in message
