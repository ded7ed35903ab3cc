r"""How fast the verifier grades, and what hostile answers cost it.

    python benchmark/grading.py

Prints its figures and writes them to benchmark/results/grading.json. Three sittings:

- ordinary answers, a second: written differently from their gold or plainly wrong, half and half,
  read by math-verify; plain numbers, which are compared without it; and a mixture;
- golds read by `Grader.readable`, a second: for the first time, and again;
- hostile answers, made by hand and by mutation, with ordinary ones between them: seconds, workers
  killed, the peak memory of all processes together, and whether the ordinary ones were graded
  exactly as without the hostile ones.
"""

import argparse
import importlib.metadata
import json
import operator
import os
import platform
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from verifier import Grader  # noqa: E402

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
    boxes = [r"\boxed{%s}", r"\boxed{%s}", r"\boxed{%s}", "%s", r"\boxed{\boxed{%s}", "$%s$", "{%s"]
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


def memory_mb(pid: int) -> float:
    """Resident memory of a process and all below it, from /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
        except (OSError, IndexError):
            continue
    tree, more = {pid}, True
    while more:
        more = {child for child, parent in parents.items() if parent in tree} - tree
        tree |= more
    pages = 0
    for member in tree:
        try:
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class PeakMemory:
    """The largest memory_mb of this process and its workers while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.05):
            self.peak = max(self.peak, memory_mb(os.getpid()))

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def ordinary_sitting(workers: int, deadline: float, count: int) -> dict[str, float]:
    """Answers a second once the workers run: read by math-verify, plain numbers, and a mixture.

    Of the mixture three quarters are plain numbers, as in MATH. The seconds of processor time that
    the workers used tell a slow grader from a machine that was busy with something else.
    """
    responses, golds, labels = zip(*ordinary_pairs(count, seed=1), strict=True)
    rng = random.Random(2)
    numbers = [str(rng.randint(0, 10**5)) for _ in range(20 * count)]
    plain = [rf"So the answer is \boxed{{{number}.0}}." for number in numbers]

    with Grader(workers, deadline) as grader:

        def timed(responses: Sequence[str], golds: Sequence[str]) -> tuple[float, list[bool]]:
            start = time.perf_counter()
            verdicts = grader.grade(responses, golds)
            return time.perf_counter() - start, verdicts

        timed([rf"\boxed{{x+{i}}}" for i in range(8 * workers)], ["y"] * 8 * workers)
        mixed, _ = timed(
            [*responses[: count // 4], *plain[: 3 * count // 4]],
            [*golds[: count // 4], *numbers[: 3 * count // 4]],
        )
        plain_seconds, _ = timed(plain, numbers)
        # the rest of the answers, so that no parse is remembered
        read, verdicts = timed(responses[count // 4 :], golds[count // 4 :])
        agreeing = sum(map(operator.eq, verdicts, labels[count // 4 :]))
        timeouts = grader.timeouts
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "answers": count,
        "mixture_per_second": round(count // 4 * 4 / mixed, 1),
        "read_by_math_verify_per_second": round((count - count // 4) / read, 1),
        "read_by_math_verify_per_processor_second": round(
            count / (used.ru_utime + used.ru_stime), 1
        ),
        "plain_numbers_per_second": round(len(plain) / plain_seconds),
        "verdicts_as_labelled": f"{agreeing} of {count - count // 4}",
        "timeouts": timeouts,
    }


def reading_sitting(count: int) -> dict[str, float]:
    """Golds that are no plain numbers, read a second, and again from the cache (a new one)."""
    golds = [gold for _, gold, _ in ordinary_pairs(count, seed=5)]
    seconds = []
    with tempfile.TemporaryDirectory() as folder, Grader() as grader:
        kept = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        for _ in range(2):
            start = time.perf_counter()
            grader.readable(golds)
            seconds.append(time.perf_counter() - start)
        del os.environ["XDG_CACHE_HOME"]
        os.environ |= {"XDG_CACHE_HOME": kept} if kept else {}
    first, again = (round(count / s) for s in seconds)
    return {"golds": count, "first_per_second": first, "again_per_second": again}


def hostile_sitting(workers: int, deadline: float, count: int, memory: int) -> dict[str, object]:
    """Grades hostile answers with an ordinary one after every fifth, and the ordinary ones alone.

    Half of the hostile golds are numbers; `strict` is off, so that sympy evaluates what it can.
    """
    hostile = hostile_answers(count, seed=3)
    ordinary = ordinary_pairs(count // 5, seed=4)
    with Grader(workers, deadline, strict=False, memory_mb=memory) as grader:
        alone = grader.grade([pair[0] for pair in ordinary], [pair[1] for pair in ordinary])
    responses, golds, places = [], [], []
    for number, response in enumerate(hostile):
        responses.append(response)
        golds.append(["5", r"\frac{\pi}{2}"][number % 2])
        if number % 5 == 4:
            places.append(len(responses))
            responses.append(ordinary[number // 5][0])
            golds.append(ordinary[number // 5][1])
    start = time.perf_counter()
    with (
        PeakMemory() as memory_used,
        Grader(workers, deadline, strict=False, memory_mb=memory, unboxed=True) as grader,
    ):
        verdicts = grader.grade(responses, golds)
        timeouts, crashes = grader.timeouts, grader.crashes
    seconds = time.perf_counter() - start
    return {
        "hostile_answers": count,
        "hostile_distinct": len(set(hostile)),
        "ordinary_answers": len(ordinary),
        "ordinary_graded_as_alone": [verdicts[place] for place in places] == alone,
        "ordinary_right": sum(alone),
        "seconds": round(seconds, 1),
        "timeouts": timeouts,
        "crashes": crashes,
        "peak_memory_mb": round(memory_used.peak),
        "bound_mb": f"{workers} x {memory} and the caller's own",
        "hostile_scored_right": sum(verdicts) - sum(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds for one answer")
    parser.add_argument("--memory-mb", type=int, default=1024, help="cap on each worker")
    parser.add_argument("--hostile", type=int, default=1200, help="number of hostile answers")
    parser.add_argument("--ordinary", type=int, default=2000, help="number of ordinary answers")
    args = parser.parse_args()
    information = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in information if "model name" in line), "?")
    results = {
        "command": " ".join(["python", "benchmark/grading.py", *sys.argv[1:]]),
        "machine": {"cpu": cpu, "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()}
        | {
            name: importlib.metadata.version(name)
            for name in ("math-verify", "sympy", "latex2sympy2_extended", "antlr4-python3-runtime")
        },
        "settings": vars(args),
        "ordinary": ordinary_sitting(args.workers, args.deadline, args.ordinary),
        "golds": reading_sitting(args.ordinary),
        "hostile": hostile_sitting(args.workers, args.deadline, args.hostile, args.memory_mb),
    }
    text = json.dumps(results, indent=2)
    print(text)
    (ROOT / "benchmark" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmark" / "results" / "grading.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
