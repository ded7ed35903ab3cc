"""How fast does the verifier grade, and what do hostile answers cost it?

    python benchmark/grading.py             # a minute; writes benchmark/results/grading.json
    python benchmark/grading.py --write     # puts the numbers into docs/verifier.md

- Golds read by `Grader.readable`, a second: for the first time, and again.
- Ordinary answers, a second: written differently from their gold or plainly wrong, half and half,
  read by math-verify; and plain numbers, which are compared without it.
- Hostile answers, made by hand and by mutation, with ordinary ones between them: seconds, workers
  killed, the peak memory of all processes together, and whether the ordinary ones were graded
  exactly as without the hostile ones.
"""

from __future__ import annotations

import contextlib
import operator
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import shared
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json

from verifier import Grader

WORKERS, DEADLINE, MEMORY_MB = 2, 1.0, 1024  # processes; seconds for one answer; of each process
FILE, PAGE = RESULTS / "grading.json", ROOT / "docs" / "verifier.md"
TITLES = {"ordinary": "ordinary answers", "golds": "golds", "hostile": "hostile answers"}
PACKAGES = ("math_verify", "sympy", "latex2sympy2_extended", "antlr4")


@dataclass
class Args:
    hostile: int = 1200
    """number of hostile answers"""
    ordinary: int = 2000
    """number of ordinary answers"""
    write: bool = False
    """only write docs/verifier.md from the results"""


TOWERS = ["9^{9^{9^{9}}}", "9**9**9**9", "10^{10^{10}}!", "(10^{9})!", "((10!)!)!", "2^{10^{10}}"]
HEAVY = [
    r"\binom{10^{9}}{5\cdot 10^{8}}",
    r"\prod_{n=1}^{100000000} (n^2+1)",
    r"\sum_{n=1}^{2024} n!",
    r"\int_0^{\infty} x^{x} e^{-x^{2}}\sin(x^3) dx",
    r"\lim_{n\to\infty} \frac{n!}{n^{n}}e^{n^{2}}",
    r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^{9}}",
    r"\{1,2,\ldots,10^{7}\}",
    r"\sqrt{2+\sqrt{4}}+\sqrt{3+\sqrt{5}}+\sqrt{5+\sqrt{7}}+\sqrt{7+\sqrt{11}}",
    r"\text{__import__('os').system('id')}",
    r"(x+1)^{1000}",
]
LATEX = r"""\frac \sqrt \boxed { } [ ] ( ) ^ _ ! $ \$ \left( \right) \begin{pmatrix} \end{matrix} &
\\ \infty \pi e i x 0 7 10 99999 1e999 1/0 % \% = < \leq \cup \{ \} , ; \text{or} \pm \log \sum
\int_0^1 ∑ ∫ √ π ² ½ 九 ٣ मान 🧮 שלום"""
CONTROLS = ["\0", "\x1b[2J", "\ud800", "\udfff", "\u202e", "\ufeff", "\n", "\r", "\t"]
FRAGMENTS = [*LATEX.split(), *CONTROLS]


def hostile_answers(count: int, seed: int) -> list[str]:
    r"""Responses meant to break a grader. Most are boxed and short enough to be parsed."""
    rng = random.Random(seed)

    def deep(before: str, after: str) -> str:
        depth = rng.choice([8, 20, 60, 1000])
        return before * depth + "1" + after * depth

    def fuzz() -> str:
        return "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 40)))

    def torn() -> str:
        text = rng.choice(HEAVY + TOWERS) + rng.choice(["", "+", "="]) + fuzz()
        cut = rng.randrange(len(text))
        return text[:cut] + rng.choice(FRAGMENTS) + text[cut + rng.randint(0, 3) :]

    def binary() -> str:
        return rng.randbytes(rng.randint(1, 400)).decode("utf-8", "surrogateescape")

    kinds: list[Callable[[], str]] = [fuzz] * 8 + [torn] * 3 + [binary] * 4
    kinds += [
        lambda: rng.choice(TOWERS) + rng.choice(["", "+x", "/7", "!", "=5"]),
        lambda: rng.choice(HEAVY) + rng.choice(["", "+x", "/7", "!", "=5"]),
        lambda: deep(r"\frac{1}{1+", "}"),
        lambda: deep("{", "}"),
        lambda: deep(r"\sqrt{", "}"),
        lambda: deep("(-", ")"),
        lambda: "".join(rng.choices("0123456789", k=rng.choice([16, 100, 500, 10_000, 1_000_000]))),
        lambda: "".join(
            chr(rng.choice([*range(0xD000, 0xE000), *range(0x2F00)])) for _ in "x" * 60
        ),
    ]
    answers = [rng.choice(kinds)() for _ in range(count)]
    boxes = [r"\boxed{%s}"] * 3 + ["%s", r"\boxed{\boxed{%s}", "$%s$", "{%s"]
    return [rng.choice(boxes).replace("%s", answer) for answer in answers]


def ordinary_pairs(count: int, seed: int) -> list[tuple[str, str, bool]]:
    """Boxed responses, golds, and the verdict that is right, in the manner of MATH's answers."""
    rng = random.Random(seed)

    def pair() -> tuple[str, str]:
        """A gold and the same value written otherwise."""
        a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.choice([2, 3, 5, 7, 11, 13])
        return rng.choice(
            [
                (rf"\frac{{{a}\pi}}{{{c}}}", rf"\dfrac{{{a}}}{{{c}}}\pi"),
                (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{c}}} \cdot {a}"),
                (rf"x^2+{a}x-{b}", rf"-{b}+x^2+{a}x"),
                (rf"({a}, {a + b}]", rf"\left({a},{a + b}\right]"),
                (rf"\left( {a}, -{b} \right)", rf"({a},-{b})"),
                (rf"{a}, {b + 99}", rf"{b + 99},\, {a}"),
                (rf"{a}\sin {c}x", rf"\sin({c}x) \cdot {a}"),
                (rf"{a}^\circ", rf"{a}"),
                (rf"y = {a}x + {b}", rf"y={b}+{a}x"),
                (rf"({a}x+{b})(x-{c})", rf"(x-{c})({a}x+{b})"),
                (rf"\frac{{{a}}}{{{c}}} + {b}i", rf"{b}i+\frac{{{a}}}{{{c}}}"),
                (rf"{a} \text{{ cm}}^2", rf"{a}"),
                (rf"{a}\%", rf"{a}"),
                (rf"{a}\frac{{1}}{{{c}}}", rf"\frac{{{a * c + 1}}}{{{c}}}"),
                (rf"\text{{case {a}-{b}}}", rf"\text{{ case {a}-{b} }}"),
                (rf"{a}e^{{{c}}}", rf"e^{{{c}}} \cdot {a}"),
                (rf"\frac{{\sqrt{{{c}}}}}{{{a}}}", rf"\frac{{1}}{{{a}}}\sqrt{{{c}}}"),
            ]
        )

    pairs = dict(pair() for _ in range(3 * count))  # distinct golds: no pair is graded twice
    golds = rng.sample(sorted(pairs), count)
    right = [place % 2 == 0 for place in range(count)]
    answers = [pairs[golds[place if right[place] else place - 1]] for place in range(count)]
    return [(rf"So \boxed{{{answers[i]}}}.", golds[i], right[i]) for i in range(count)]


def memory_mb() -> float:
    """Resident memory of this process and all below it.

    A child that is about to become another program still has this one's pages, and its command.
    """
    me = psutil.Process()
    command, size = me.cmdline(), me.memory_info().rss
    for process in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline() != command:
                size += process.memory_info().rss
    return size / 2**20


class PeakMemory:
    """The largest memory_mb of this process and its workers while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.05):
            self.peak = max(self.peak, memory_mb())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def ordinary_sitting(count: int) -> dict[str, Any]:
    """Answers a second once the workers run."""
    responses, golds, labels = map(list, zip(*ordinary_pairs(count, seed=1), strict=True))
    rng = random.Random(2)
    numbers = [str(rng.randint(0, 10**5)) for _ in range(20 * count)]
    plain = [rf"So the answer is \boxed{{{number}.0}}." for number in numbers]
    with Grader(WORKERS, DEADLINE) as grader:
        grader.grade([rf"\boxed{{x+{i}}}" for i in range(8 * WORKERS)], ["y"] * 8 * WORKERS)
        begun = time.perf_counter()
        grader.grade(plain, numbers)
        between = time.perf_counter()
        verdicts = grader.grade(responses, golds)
        ended = time.perf_counter()
    return {
        "answers": count,
        "read_by_math_verify_per_second": round(count / (ended - between), 1),
        "plain_numbers_per_second": round(len(plain) / (between - begun)),
        "verdicts_as_labelled": f"{sum(map(operator.eq, verdicts, labels))} of {count}",
        "timeouts": grader.timeouts,
    }


def reading_sitting(count: int) -> dict[str, float]:
    """Golds that are no plain numbers, read a second, and again from the cache (a new one)."""
    golds = [gold for _, gold, _ in ordinary_pairs(count, seed=5)]
    seconds = []
    with tempfile.TemporaryDirectory() as folder, Grader(WORKERS) as grader:
        before = dict(os.environ)
        os.environ["XDG_CACHE_HOME"] = folder
        for _ in range(2):
            start = time.perf_counter()
            grader.readable(golds)
            seconds.append(time.perf_counter() - start)
        os.environ.clear()
        os.environ.update(before)
    first, again = (round(count / s) for s in seconds)
    return {"golds": count, "first_per_second": first, "again_per_second": again}


def hostile_sitting(count: int) -> dict[str, Any]:
    """Grades hostile answers with an ordinary one after every fifth, and the ordinary ones alone.

    Half of the hostile golds are numbers; `strict` is off, so that sympy evaluates what it can.
    """
    hostile = hostile_answers(count, seed=3)
    ordinary = ordinary_pairs(count // 5, seed=4)
    settings = {"strict": False, "memory_mb": MEMORY_MB}
    with Grader(WORKERS, DEADLINE, **settings) as grader:
        alone = grader.grade([pair[0] for pair in ordinary], [pair[1] for pair in ordinary])
    asked = []
    for number, response in enumerate(hostile):
        asked.append((response, ["5", r"\frac{\pi}{2}"][number % 2]))
        if number % 5 == 4:
            asked.append(ordinary[number // 5][:2])
    begun = time.perf_counter()
    with PeakMemory() as memory, Grader(WORKERS, DEADLINE, **settings, unboxed=True) as grader:
        verdicts = grader.grade(*map(list, zip(*asked, strict=True)))
    return {
        "hostile_answers": count,
        "hostile_distinct": len(set(hostile)),
        "ordinary_answers": len(ordinary),
        "ordinary_graded_as_alone": verdicts[5::6] == alone,
        "ordinary_right": sum(alone),
        "seconds": round(time.perf_counter() - begun, 1),
        "timeouts": grader.timeouts,
        "crashes": grader.crashes,
        "peak_memory_mb": round(memory.peak),
        "bound_mb": f"{WORKERS} x {MEMORY_MB} and the caller's own",
        "hostile_scored_right": sum(verdicts) - sum(alone),
    }


def tables(results: dict[str, Any]) -> str:
    """What docs/verifier.md shows: every figure under its name."""
    parts = []
    for kind, title in TITLES.items():
        rows = [[name.replace("_", " "), value] for name, value in results[kind].items()]
        parts.append(markdown([title, ""], rows))
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n\n".join([*parts, f"`{results['command']}`, {versions}."])


def main(args: Args) -> None:
    if args.write:
        return shared.write_page(PAGE, {"grading": tables(read_json(FILE))})
    shared.at_least(args, hostile=5, ordinary=1)
    results = {"command": "python benchmark/grading.py"} | shared.surroundings(*PACKAGES)
    results["ordinary"] = ordinary_sitting(args.ordinary)
    results["golds"] = reading_sitting(args.ordinary)
    results["hostile"] = hostile_sitting(args.hostile)
    write_json(FILE, results)
    print(tables(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
