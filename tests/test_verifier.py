r"""The verifier: what it reads, that it agrees with math-verify, and that nothing can hang it."""

import _thread
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from grading import PeakMemory, hostile_answers, memory_mb, ordinary_pairs

import verifier
from answers import last_boxed, plain_number, quick_verdict, read
from verifier import Grader, cache_path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
PAIRS = ROOT.parent / "shared" / "cases" / "verifier_pairs.jsonl"
TOWER = r"\boxed{9^{9^{9^{9}}}+x}"  # keeps sympy busy for ever
STRICT, LENIENT = Grader(), Grader(strict=False)
ORDINARY = [
    (r"\boxed{\dfrac{1}{2}\pi}", r"\frac{\pi}{2}", True),
    (r"\boxed{(1, 3]}", "[1, 3)", False),
    (r"first \boxed{7}, then \boxed{x+1}", "1+x", True),
    (r"\boxed{8}", "8.0", True),
    (r"\boxed{2, 1}", "1, 2", True),
    (r"\boxed{\sqrt{3}}", r"\sqrt{2}", False),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def shared_graders():
    with STRICT, LENIENT:
        yield


def rows(name: str) -> list[dict]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ordinary(grader: Grader) -> None:
    responses, golds, right = zip(*ORDINARY, strict=True)
    assert grader.grade(responses, golds) == list(right)


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


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a math_verify with the given source in front of the real one."""

    def write(source: str) -> None:
        (tmp_path / "math_verify.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4}", "4"),
        (r"no box", None),
        (r"\boxed", None),
        (r"\boxed 4", None),
        (r"\fbox{4}", None),
        (r"\boxed{}", ""),
        (r"\boxed {4}", "4"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is }it{", r"\frac{1}{2}"),
        (r"\boxed{3}, that is \boxed{\frac{6}{2", "3"),  # cut off
        (r"\boxed{3}, that is \boxed{{6}", "3"),
        (r"} { \boxed{5}", "5"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{x = \boxed{4} cm}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\begin{aligned} x \\\boxed{4} \end{aligned}", "4"),
        (r"\\boxed{4}", "4"),
        (r"\boxed{a\\{b}}", r"a\\{b}"),
        ("\\boxed{\ud800\0\n}", "\ud800\0\n"),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_last_boxed_of_hostile_sizes() -> None:
    assert last_boxed(r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}") == "{" * 10**6 + "}" * 10**6
    assert last_boxed(r"\boxed{" * 10**5) is None
    assert last_boxed(r"\boxed{" * 10**5 + "1" + "}" * 10**5) == "1"
    assert last_boxed("\\" * 10**6 + r"boxed{1}" + "}" * 10**6) == "1"
    assert last_boxed(r"\boxed" + " " * 10**6) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" -18 ", -18),
        ("007", 7),
        ("1,234,567", 1234567),
        ("$1,234.50$", Fraction("1234.5")),
        (r"\$42409", 42409),
        ("0.125", Fraction(1, 8)),
        ("6/4", Fraction(3, 2)),
        (r"-\frac{3}{6}", Fraction(-1, 2)),
        (r"\dfrac{22}{7}", Fraction(22, 7)),
        *[(text, None) for text in ["", "-", "$", "x", "1/0", "00/00", r"\frac{1}{0}", "12,34"]],
        *[(text, None) for text in ["1,2345", "5%", r"5\%", "5.", "--5", "1_000", "٣", "½"]],
        *[(text, None) for text in ["+7,000", "2^3", "1 000", r"\5", "(5)", "nan", "inf", "5\0"]],
        *[(text, None) for text in ["9" * 41, "9" * 10**6, "1e9999", "10^{9999}", "1/2/3"]],
        ("0.12345678901234567", Fraction("0.12345678901234567")),
        ("1e-05", Fraction(1, 10**5)),
        ("1e+16", 10**16),
        (r"2.5 \times 10^{-7}", Fraction(25, 10**8)),
        ("10^5", 10**5),
        ("-10^{-2}", Fraction(-1, 100)),
        (".5", Fraction(1, 2)),
    ],
)
def test_plain_number(text: str, value: Fraction | None) -> None:
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
    text = rng.choice(["", "", "-"]) + text
    return rng.choice(["{}", "{}", "${}$", r"\${}", " {}\n", "\t{} ", "$ {} $"]).format(text)


def quick_numbers(gold: str, answer: str) -> bool | None:
    return quick_verdict(read(gold), read(answer))


def test_plain_numbers_agree_with_math_verify() -> None:
    """Wherever two plain numbers are compared here, math-verify says the same."""
    rng = random.Random(0)
    pairs = []
    while len(pairs) < 1500:
        gold = number_text(rng)
        value = plain_number(gold)
        others = [number_text(rng), gold.replace(",", ""), gold.replace("$", "")]
        if value is not None:
            near = value + rng.choice([0, 0, Fraction(1, 10**4), 1, -2 * value])
            others += [f"{near.numerator}/{near.denominator}", f"{float(near):.6f}"]
            others += [rf"\frac{{{abs(near.numerator) * 3}}}{{{near.denominator * 3}}}"] * 2
        pairs.append((gold, rng.choice(others)))
    pairs = [pair for pair in pairs if quick_numbers(*pair) is not None]
    for name in ("math_train", "math500", "olympiadbench", "minerva_math", "aime24", "amc23"):
        if (DATA / f"{name}.jsonl").exists():
            golds = sorted({row["answer"] for row in rows(name)})
            golds = [g for g in golds if plain_number(g) is not None and "10^" not in g][:150]
            pairs += zip(golds, golds[1:] + golds[:1], strict=True)
            pairs += [(gold, str(plain_number(gold))) for gold in golds]
    verdicts = [quick_numbers(*pair) for pair in pairs]
    assert verdicts.count(True) > 300 and verdicts.count(False) > 300
    with Grader(workers=2) as grader:
        asked = [(rf"\boxed{{{g}}}", rf"\boxed{{{a}}}", False) for g, a in pairs]
        slowly = list(grader._ask_all(asked, 2))
    differing = [
        (pair, fast) for pair, fast, slow in zip(pairs, verdicts, slowly, strict=True)
        if fast is not None and fast != slow
    ]  # fmt: skip
    assert not differing


def test_plain_numbers_start_no_process_and_no_sympy() -> None:
    code = (
        "import sys, verifier\n"
        "grader = verifier.Grader()\n"
        r"assert grader.grade([r'\boxed{1,234}', r'\boxed{-\frac{1}{2}}', 'none', r'\boxed{4}'],"
        "    ['1234', '-0.5', '5', '5']) == [True, True, False, False]\n"
        "assert grader.readable(['5', '1/2']) == [True, True] and not grader._idle\n"
        r"assert grader.grade([r'\boxed{x+1}'], ['1+x']) == [True] and grader._idle"
        "\nassert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# What means the same, by rule: gold, answers that are right, answers that stay wrong.
RULES = {
    "markup": [
        ("18", [r"\text{18}", r"\textbf{18}", r"\mathbf{ 18 }", r"\mathrm{18}", r"\textit{18}",
          r"\mathcal{18}", r"{\bf 18}", r"\bf 18", r"\bf{18}",
          r"\underline{\text{18}}", r"\mathbf{18.}",
          "**18**", "`18`", "$18$", r"\(18\)", r"\textcolor{red}{18}", r"\displaystyle 18"],
         [r"\text{19}", r"\text{18 or 19}", r"\text{eighteen}", r"\text{17}+1"]),
        (r"3\sqrt{2}", [r"\mathbf{3\sqrt{2}}", r"\boldsymbol{3}\sqrt{2}"], [r"\mathbf{2\sqrt{3}}"]),
        (r"\text{18}", ["18", r"\mathbf{18}"], ["81"]),
    ],
    "stop": [
        ("3.5", ["3.5.", "3.5,", "3.5 ;", r"3.5\text{.}", r"\textbf{3.5.}", r"3.5\,."],
         ["35.", "3.5!"]),
        ("1, 2", ["1, 2.", "{1, 2}."], ["1, 2, 3."]),
    ],
    "grouping": [
        ("1234567", [r"1\,234\,567", "1{,}234{,}567", r"1,\!234,\!567", "1 234 567", "1~234~567"],
         [r"1\,234", r"1\,234\,56", "1, 234, 567"]),
    ],
    "currency": [
        ("18", [r"\$18", "€18", "£ 18", "USD 18", "US$18", "18 USD", "18元", "Rs. 18", "18 €",
          r"\$18.00", r"\pounds 18"], ["$19", "€1.8", "USD 81"]),
        (r"\$18", ["18", "18 dollars", r"18 \text{ USD}"], ["€18", "18 cents", "18%"]),
    ],
    "units": [
        ("18", ["18 km/h", "$18$ points", r"18\ \mathrm{m/s}", r"18\text{ cm}^{2}", "18 m^2",
         "18 apples",
          "18 miles per hour", r"18^\circ", "18°", "18 degrees", "18 mph", r"\text{18 cm}"],
         ["18x", "18 or 19", "18 dozen", "18 mod 20", "18!", "180 km/h", "18 pi", "18 theta",
          "18 feet 3 inches", "18 choose 2"]),
        ("18 cm", ["18", r"18\text{ cm}", "18 centimeters", "18 centimetre"],
         ["18 m", r"18^\circ", "18 inches", "18 cm^2", "18%", "9 cm"]),
        ("5 feet 3 inches", ["5 feet 3 inches"], ["5", "5 feet", "3 inches"]),
        ("60 mph", ["60 miles per hour", r"60\text{ mi/h}", "60"], ["60 km/h", "61 mph"]),
        ("18000", ["18 thousand", r"18 \text{ thousand}", "18 thousand dollars"],
         ["18", "18 million"]),
        ("18", [], ["18 thousand", r"18 \text{ thousand}", "[18]"]),
    ],
    "percent": [
        (r"7.41\%", ["7.41", "0.0741", "7.41%", "$7.41$ %", r"7.41 \text{ percent}"],
         ["741", "0.741", r"74.1\%"]),
        ("7.41", [r"7.41\%"], [r"741.5\%", r"7.4\%"]),
        (r"12.5\%", [r"\frac{1}{8}"], [r"\frac{1}{80}"]),
        ("0.5", [r"50\%"], [r"5\%"]),
    ],
    "about": [
        ("18", [r"\approx 18", "≈18", "about 18", "18 (approximately)", r"18 \text{ (rounded)}"],
         [r"\approx 19", "18 (mod 20)", "about 1.8"]),
    ],
    "exponents": [
        ("1e-05", ["0.00001", "10^{-5}", r"1 \times 10^{-5}", "1e-5"],
         ["e-5", "-2.28", "0.0001", "1"]),
        ("2.5e-07", [r"2.5 \times 10^{-7}"], [r"2.5 \times 10^{-8}", "0"]),
        ("1024", ["2^{10}", "4^5"], ["2^{9}", "2^9+512"]),
        ("2e - 3", ["-3+2e"], ["0.002"]),
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
        ("B", [r"\textbf{(B)}\ 12", "B) 12", "(B) 12", "B. 12", "(B)", r"\text{B}", "Option B: 12"],
         ["C) 12", "(B) and (C)", "B, C", "A", "12"]),
        ("A, C", ["AC", "A and C", r"\text{A, C}"], ["A", "AB", "ABC"]),
    ],
    "words": [
        ("True", ["true", r"\text{True}", "TRUE."], ["false", "1"]),
        ("Yes", [r"\text{Yes, it is}", "yes.", r"\textbf{Yes}"], ["No", "No, yes"]),
        ("No", ["no, because 3 is odd"], [r"\text{no solution}", "yes"]),
        (r"\text{No solution}", [r"\text{no solutions}"], ["no", "one solution"]),
        (r"\text{DNE}", [r"\text{does not exist}", "dne"], [r"\text{does exist}"]),
        ("3:30 PM", [r"3:30 \text{ PM}", r"3{:}30\,\text{p.m.}"], ["3:30 AM", "3:31 PM", "3:30"]),
    ],
    "intervals": [
        ("(-2,3)", ["-2<x<3"], [r"-2\le x<3", "-2<x<4"]),
        (r"[0,\infty)", [r"x \geq 0"], ["x > 0"]),
    ],
    "names": [
        ("a=1,b=2,c=3", ["1,2,3", "(1,2,3)", "c=3, a=1, b=2"], ["3,2,1", "(3,2,1)", "a=3,b=2,c=1"]),
        ("x=1, x=2", ["2, 1"], ["1, 3"]),
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
def test_rules(rule: str) -> None:
    cases = [(gold, answer, True) for gold, right, _ in RULES[rule] for answer in right]
    cases += [(gold, answer, False) for gold, _, wrong in RULES[rule] for answer in wrong]
    verdicts = STRICT.grade([rf"\boxed{{{a}}}" for _, a, _ in cases], [g for g, _, _ in cases])
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if case[2] != verdict] == []


def test_a_float_is_not_read_as_e() -> None:
    assert LENIENT.grade([r"\boxed{e-5}", r"\boxed{10^{-5}}"], ["1e-05"] * 2) == [False, True]


def test_rules_take_linear_time() -> None:
    """The longest answers that are read, of what the patterns repeat."""
    parts = [
        "{",
        "}",
        " ",
        "1",
        "1,",
        "a",
        "a ",
        "$",
        r"\text{",
        r"\bf ",
        "√",
        "(approx",
        r"\,",
        "A, ",
    ]
    parts += ["10^{", "1 000 ", ".", "1 km ", "²", "x=1,", "½", "*", "B) A "]
    start = time.perf_counter()
    for part in parts:
        for text in ((part * 4096)[:4096], "18 " + (part * 4096)[:4093]):
            quick_verdict(read(text), read("18"))
    assert time.perf_counter() - start < 5


def test_shared_pairs() -> None:
    """What is left is arguable: docs/verifier.md lists it."""
    if not PAIRS.exists():
        pytest.skip("the shared pairs are not here")
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    golds = [pair["gold"].rpartition("####")[2] for pair in pairs]
    verdicts = STRICT.grade([rf"\boxed{{{pair['answer']}}}" for pair in pairs], golds)
    otherwise = [p for p, verdict in zip(pairs, verdicts, strict=True) if p["want"] != verdict]
    assert len(otherwise) <= 18, otherwise


def test_readable_golds_are_remembered(stub, tmp_path: Path) -> None:
    golds = ["x+1", "y+2", r"\frac{1}{", "7"]
    with Grader() as grader:
        first = grader.readable(golds)
        assert first == [True, True, False, True]
    with cache_path().open("a") as file:
        file.write("\n0123torn")
    stub("raise ImportError('no worker is wanted')")
    with Grader() as grader:
        assert grader.readable(golds) == first and not grader._idle
        with pytest.raises(RuntimeError):
            grader.readable(["z+3"])


def test_a_gold_that_timed_out_is_not_remembered(stub) -> None:
    stub(
        "import time\n"
        "def parse(text, **_): time.sleep(600 * ('y' in text)); return [text]\n"
        "verify = None"
    )
    for _ in range(2):
        with Grader(deadline=0.5) as grader:
            assert grader.readable(["y+1"]) == [False]
            assert grader.timeouts == 1


def test_a_cache_that_cannot_be_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Grader() as grader:
        assert grader.readable(["x+1", r"\frac{1}{"]) == [True, False]


def test_golds_are_read_by_more_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Counted(verifier.Worker):
        def __init__(self, *args: object) -> None:
            started.append(self)
            super().__init__(*args)

    monkeypatch.setattr("verifier.Worker", Counted)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with Grader() as grader:
        assert all(grader.readable([f"x+{i}" for i in range(150)]))
        assert (len(started), len(grader._idle)) == (3, 1)


def test_ordinary_answers_in_order_with_several_workers() -> None:
    responses, golds, right = zip(*ordinary_pairs(60, seed=0), strict=True)
    with Grader(workers=3) as grader:
        check_ordinary(grader)
        assert grader.grade(responses, golds) == list(right)
        assert (grader.timeouts, grader.crashes) == (0, 0)
        with pytest.raises(ValueError):
            grader.grade(responses, golds[1:])
        assert grader.grade([], []) == []


def test_gold_comes_first() -> None:
    """math-verify unwraps an assignment only where the gold has the answer's form."""
    pair = "x^2 = 4", "4"
    with Grader(strict=False) as grader:
        forward = grader.grade([rf"\boxed{{{pair[1]}}}"], [pair[0]])
        backward = grader.grade([rf"\boxed{{{pair[0]}}}"], [pair[1]])
    assert (forward, backward) == ([False], [True])


@pytest.mark.parametrize(
    ("answer", "strictly"),
    [
        ("(16-3-4)*2", False),
        (r"2 \cdot 9", False),
        ("20-2", False),
        (r"\sqrt{324}", False),
        (r"18 = 9 \cdot 2", False),
        (r"18 \text{ dollars}", True),
        (r"9 \cdot 2 = 18", True),
        ("x = 18", True),
        (r"18^\circ", True),
        (r"18\%", True),
        (r"1.8 \times 10^{1}", True),
        ("{18}", True),
        (r"\frac{36}{2}", True),
    ],
)
def test_strict_wants_a_number(answer: str, strictly: bool) -> None:
    assert STRICT.grade([rf"\boxed{{{answer}}}"], ["18"]) == [strictly]
    assert LENIENT.grade([rf"\boxed{{{answer}}}"], ["18"]) == [True]


def test_strict_leaves_other_golds_alone() -> None:
    assert STRICT.grade([r"\boxed{2\sqrt{3}}"], [r"\sqrt{12}"]) == [True]


def test_long_answers_are_wrong_and_responses_without_a_box_read_on_request() -> None:
    text = "The final answer is $18$."
    with Grader(unboxed=True) as grader:
        assert grader.grade([text, "y\n" * 9000 + text, "18"], ["18"] * 3) == [True] * 3
        assert grader.grade([rf"\boxed{{{'0' * 512}18}}"], ["18"]) == [False]
    assert STRICT.grade([text], ["18"]) == [False]


def test_equal_pairs_are_graded_once(stub, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    stub(
        f"def parse(text, **_):\n    open({str(seen)!r}, 'a').write(text + '\\n'); return [text]\n"
        "def verify(gold, answer, **_): return gold == answer"
    )
    with Grader(workers=2, strict=False) as grader:
        verdicts = grader.grade([r"\boxed{a}", r"\boxed{b}"] * 10, ["c"] * 20)
    assert verdicts == [False] * 20
    lines = seen.read_text().splitlines()
    assert lines.count(r"\boxed{a}") == lines.count(r"\boxed{b}") == 1


def test_golds_that_cannot_be_read_are_told() -> None:
    golds = ["7", "18 cm", r"\frac{\pi}{2}", r"\boxed{x}", r"\boxed{2} or \boxed{3}"]
    golds += [r"\text{Evelyn}", "((10!)!)!+x", r"$f(x)=ax$, where $a$ is some integer and so on"]
    none = ["", " ", r"\boxed{}", "proof", "notfound", "Not found", "None", "nan", "NULL", "n/a"]
    none += ["{'value': '52', 'unit': 'cm'}", '{"value": 52}']
    unread = ["x" * 5000, "\ud800", r"\frac{1}{", "a + b + c"]
    unread += ["This completes the proof of $a=b$ for all integers."]
    unread += ["First we add 2 and 3. So Tom has 5 apples left."]
    with Grader(deadline=1.0) as grader:
        assert grader.readable(golds) == [True] * len(golds)
        assert grader.readable(none + unread) == [False] * len(none + unread)
        assert not any(grader.grade([rf"\boxed{{{gold}}}" for gold in none], none))
        check_ordinary(grader)


def test_deadline_kills_and_the_next_answers_are_right() -> None:
    with Grader(workers=2, deadline=1.0, strict=False) as grader:
        check_ordinary(grader)
        responses = [TOWER, r"\boxed{(10^9)!}", r"\boxed{x+1}"]
        assert grader.grade(responses, ["x", "5", "1+x"]) == [False, False, True]
        assert (grader.timeouts, grader.crashes) == (2, 0)
        check_ordinary(grader)


def test_deadline_holds_where_no_signal_arrives(stub) -> None:
    """As inside C code: the worker itself cannot be interrupted."""
    stub(
        "import signal, time\n"
        "def parse(text, **_):\n"
        "    if 'hang' in text:\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(600)\n"
        "    return [text]\n"
        "def verify(gold, answer, **_): return gold[0].lower() == answer[0].lower()"
    )
    with Grader(deadline=0.5, strict=False) as grader:
        responses = [r"\boxed{hang}", r"\boxed{A+1}", r"\boxed{hang it}"]
        assert grader.grade(responses, ["a+1"] * 3) == [False, True, False]
        assert (grader.timeouts, grader.crashes) == (2, 0)


def test_a_dying_worker_costs_its_answer_only(stub) -> None:
    stub(
        "import os\n"
        "def parse(text, **_):\n"
        "    if 'abort' in text: os.abort()\n"
        "    if 'exit' in text: os._exit(0)\n"
        "    if 'noise' in text: print('11111'); os.write(1, b'1'); os.write(2, b'x' * 10**6)\n"
        "    if 'memory' in text: bytearray(1 << 30)\n"
        "    return [text]\n"
        "def verify(gold, answer, **_): return gold[0].lower() == answer[0].lower()"
    )
    with Grader(strict=False, memory_mb=512) as grader:
        answers = ["abort", "A+1", "exit", "A+2", "noise", "b", "memory+1", "A+3"]
        golds = ["a", "a+1", "a", "a+2", "b", "a", "memorY+1", "a+3"]
        verdicts = grader.grade([rf"\boxed{{{answer}}}" for answer in answers], golds)
        assert verdicts == [False, True, False, True, False, False, False, True]
        assert (grader.timeouts, grader.crashes) == (0, 2)


def test_a_worker_killed_from_outside() -> None:
    with Grader(deadline=30.0, strict=False) as grader:
        check_ordinary(grader)
        os.kill(grader._idle[0].pid, signal.SIGKILL)  # idle: nobody's answer
        grader._idle[0].wait()
        check_ordinary(grader)
        assert grader.crashes == 1
        victim = grader._idle[0].pid
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {victim}"])
        assert grader.grade([TOWER], ["x"]) == [False]
        killer.wait()
        assert (grader.timeouts, grader.crashes) == (0, 2)
        check_ordinary(grader)


def test_a_worker_that_cannot_start_is_an_error(stub) -> None:
    stub("raise ImportError('no antlr here')")
    with Grader() as grader, pytest.raises(RuntimeError, match="no antlr here"):
        grader.grade([r"\boxed{x+1}"], ["1+x"])
    with pytest.raises(ValueError, match="deadline"):
        Grader(deadline=0.0)


def test_an_interrupted_call_leaves_no_reply_for_the_next() -> None:
    with Grader(deadline=1.0, strict=False) as grader:
        check_ordinary(grader)
        threading.Timer(0.6, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([TOWER, *[rf"\boxed{{x+{i}}}" for i in range(900)]], ["x"] * 901)
        assert grader.timeouts == 1  # the first was waited for, the others were not asked
        check_ordinary(grader)


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_killed_parent(busy: bool) -> None:
    code = (
        "import time, verifier\n"
        "grader = verifier.Grader(deadline=1.5, strict=False)\n"
        r"grader.grade([r'\boxed{x+1}'], ['1+x']); print('ready', flush=True)"
        f"\nif {busy}: grader.grade([{TOWER!r}], ['x'])\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        (worker,) = children(parent.pid)
        parent.kill()
    assert gone(worker, 15)


def test_close_ends_the_workers() -> None:
    with Grader() as grader:
        check_ordinary(grader)
        pid = grader._idle[0].pid
    assert gone(pid, 5) and not grader._idle


def test_a_fork_is_not_counted_twice() -> None:
    """Between fork and exec a worker is a copy of its parent, with all of the parent's pages."""
    before, pid = memory_mb(), os.fork()
    if not pid:
        signal.pause()
    try:
        assert memory_mb() < 1.2 * before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_hostile_answers_between_ordinary_ones() -> None:
    hostile, golds = hostile_answers(120, seed=0), ["5", r"\frac{\pi}{2}"]
    responses = [text for one in hostile for text in (one, *[pair[0] for pair in ORDINARY])]
    golds = [g for i in range(120) for g in (golds[i % 2], *[pair[1] for pair in ORDINARY])]
    before = memory_mb()
    with Grader(2, deadline=1.0, strict=False, memory_mb=512, unboxed=True) as grader:
        with PeakMemory() as memory:
            verdicts = grader.grade(responses, golds)
        assert before < memory.peak < before + 2 * 512 + 100
        check_ordinary(grader)
    size = len(ORDINARY) + 1
    for start in range(0, len(verdicts), size):
        assert verdicts[start + 1 : start + size] == [pair[2] for pair in ORDINARY]
    assert sum(verdicts[::size]) < 10


def test_memory_of_a_worker_is_capped() -> None:
    """sympy would build these powers until the machine is full."""
    hungry = [rf"\boxed{{\{{1,2,\ldots,10^{{{n}}}\}}}}" for n in (8, 9)] + [r"\boxed{2^{10^{11}}}"]
    with Grader(deadline=2.0, strict=False, memory_mb=256) as grader:
        assert grader.grade(hungry, [r"\{1,2\}", r"\{1,2\}", "7"]) == [False] * 3
        check_ordinary(grader)


def test_shared_adversarial_cases() -> None:
    cases = rows("verifier_adversarial")
    responses = []
    for case in cases:
        if "pred" in case:
            responses.append(case["pred"])
        else:
            prefix, suffix = case["pred_prefix"], case["pred_suffix"]
            fill = prefix * (case["length"] // max(1, len(prefix)) + 1)
            responses.append(fill[: case["length"] - len(suffix)] + suffix)
    with Grader(workers=2, deadline=1.0, strict=False, memory_mb=1024, unboxed=True) as grader:
        verdicts = grader.grade(responses, [case["gold"] for case in cases])
        names = {case["name"] for case, right in zip(cases, verdicts, strict=True) if right}
        # equal, and the end of a long response that is read
        assert names <= {"poly-1000", "answer-colon-1e4"}, names
        assert 0 < grader.timeouts < len(cases)
        check_ordinary(grader)


def test_shared_cases_at_least_as_well_as_math_verify_alone() -> None:
    """Whole predictions, so without the box rule; bare answers (wrap_boxed_both) are boxed here.

    What is left differs for these reasons. Only the last box counts, where math-verify joins
    neighbouring ones (177, 199, 227-229, 231, 233, 234, 238-240) or prefers "final answer is"
    (166). A boxed `1,22` is a list, not a decimal (6, 15). math-verify itself disagrees with the
    case, or the case was written for other settings (28, 29, 127, 133, 180, 244, 254, 257-261,
    263, 270, 289, 316, 319, 355). A gold that is no answer (310, 311, 320) has no verdict.
    """
    cases = rows("verifier_cases")
    responses = [
        rf"\boxed{{{c['pred']}}}" if c["config"]["extract"] == "wrap_boxed_both" else c["pred"]
        for c in cases
    ]
    with Grader(workers=2, strict=False, unboxed=True) as grader:
        verdicts = grader.grade(responses, [case["gold"] for case in cases])
        assert (grader.timeouts, grader.crashes) == (0, 0)
    pairs = list(zip(cases, verdicts, strict=True))
    agreeing = sum(case["expected"] == verdict for case, verdict in pairs)
    alone = sum(case["expected"] == case["math_verify_0_9_0_default"] for case in cases)
    wrong = {case["id"] for case, verdict in pairs if case["expected"] != verdict}
    assert agreeing >= alone, sorted(wrong)
    explained = {
        177,
        199,
        227,
        228,
        229,
        231,
        233,
        234,
        238,
        239,
        240,
        166,
        6,
        15,
        28,
        29,
        127,
        133,
    }
    explained |= {180, 244, 254, 257, 258, 259, 260, 261, 263, 270, 289, 316, 319, 355}
    assert wrong <= explained | {310, 311, 320}, sorted(wrong - explained)


def test_shared_solutions_against_their_golds() -> None:
    problems = rows("math500")
    with Grader(workers=2) as grader:
        golds = [problem["answer"] for problem in problems]
        assert all(grader.grade([problem["solution"] for problem in problems], golds))
        assert all(grader.readable(golds))
        assert grader.readable([row["answer"] for row in rows("gsm8k_test")]).count(False) == 0
        assert not grader.timeouts
