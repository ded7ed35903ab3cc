r"""Grades answers to mathematical problems with math-verify, in processes that can be killed.

What a policy writes is hostile input: a tower of powers or a huge factorial sends sympy into work
that neither a thread nor a signal can always stop. So every answer that is more than a plain
number is read in a worker process, under a deadline and a cap on memory; a worker that hangs or
dies is replaced and the answer scored wrong. sympy never enters the caller's process.

    with Grader(workers=2) as grader:
        grader.grade([r"so \boxed{\frac{2}{4}}", "no box"], golds=["0.5", "7"])  # [True, False]

Needs math-verify and the standard library alone: copy this file as it is.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import wait

MAX_ANSWER = 512  # characters; a longer boxed answer is wrong
MAX_TEXT = 4096  # characters of an unboxed response that are read, from its end; of a gold
START_SECONDS = 120.0  # for a worker's imports, on a busy machine
# gmpy2 computes in C, where only a kill stops it; a fixed hash seed fixes the order sympy works in
WORKER_ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "PYTHONHASHSEED": "0"}

Request = tuple[str, str | None, bool]  # gold, text with the answer (None: read gold), number only?

# An escaped brace groups nothing; `\\` is a line break, but `\\boxed` is a box escaped twice.
BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<open>\{)|(?P<close>\})")
PLAIN = re.compile(
    r"\s*(?:\\?\$)?\s*(-?)(?:((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\d+/0*[1-9]\d*)"
    r"|\\[dt]?frac\{(\d+)\}\{(0*[1-9]\d*)\})\s*\$?\s*",
    re.ASCII,
)


def last_boxed(text: str) -> str | None:
    r"""The content of the balanced `\boxed{...}` that begins last, None where there is none.

    A box that is never closed (a response cut off) is passed over; of nested boxes the inner one
    counts. One pass over the braces, without recursion.
    """
    opened, content = [], slice(-1, -1)
    for token in BRACES.finditer(text) if "\\boxed" in text else ():
        if token["box"] or token["open"]:
            opened.append(token.end() if token["box"] else -1)
        elif token["close"] and opened and (start := opened.pop()) > content.start:
            content = slice(start, token.start())
    return None if content.start < 0 else text[content]


def plain_number(text: str) -> Fraction | None:
    r"""The value of an integer, a decimal or a fraction of integers (`a/b`, `\frac{a}{b}`).

    A sign, thousands commas, and dollars and spaces around it are allowed, 40 characters at most
    and 15 in a decimal: forms in which math-verify sees the same number. None for all else.
    """
    if len(text) > (15 if "." in text else 40) or not (match := PLAIN.fullmatch(text)):
        return None
    sign, number, above, below = match.groups()
    return Fraction(sign + (number.replace(",", "") if number else f"{above}/{below}"))


def plain_verdict(gold: str, answer: str) -> bool | None:
    """Whether two plain numbers, or two texts, are the same; None where only math-verify can tell.

    math-verify rounds decimals to six places, so it is asked about a near miss.
    """
    if gold.strip() == answer.strip() != "":
        return True
    left, right = plain_number(gold), plain_number(answer)
    if left is None or right is None or 0 < abs(left - right) < Fraction(1, 10**5):
        return None
    return left == right


def in_box(text: str) -> str:
    """The form that math-verify reads most reliably; a bare gold it often cannot read."""
    return text if "\\boxed" in text else f"\\boxed{{{text}}}"


class Worker(subprocess.Popen):
    """A process that answers one request at a time and ends when its standard input does."""

    def __init__(self, deadline: float, memory_mb: int) -> None:
        self.ready, self.until, self.job = False, math.inf, -1
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe could fill up)
        # -P: no neighbouring file may pass for a module. Own session: Ctrl-C is not for workers.
        command = [sys.executable, "-P", os.path.abspath(__file__), str(deadline), str(memory_mb)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        environment = os.environ | WORKER_ENVIRONMENT
        super().__init__(command, bufsize=0, env=environment, start_new_session=True, **pipes)

    def end(self) -> None:
        """Kills the process; raises RuntimeError with its last words if it was never ready."""
        self.kill()
        self.wait()
        self.stdin.close(), self.stdout.close()
        with self.log as log:
            log.seek(0)
            if not self.ready:
                words = log.read().decode(errors="replace")[-2000:].strip() or "no message"
                raise RuntimeError(f"the verifier's worker ({self.args[0]}) cannot start: {words}")


@dataclass
class Grader:
    """Grades responses against gold answers; also a context manager that ends its workers."""

    workers: int = 1  # processes at most, started when first needed
    deadline: float = 5.0  # seconds of wall-clock time for one answer before its worker is killed
    strict: bool = True  # for a plain number as gold, `(16-3-4)*2` left to the grader is no answer
    memory_mb: int = 2048  # cap on each worker's address space
    unboxed: bool = False  # read a response that has no box as a whole, not as wrong
    timeouts: int = field(default=0, init=False)  # workers killed at the deadline
    crashes: int = field(default=0, init=False)  # workers that died
    _idle: list[Worker] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.workers < 1 or self.deadline <= 0:
            raise ValueError(f"workers={self.workers} and deadline={self.deadline} must be above 0")

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[bool]:
        """Whether the answer of each response equals the gold in its place; equal pairs cost one.

        Raises RuntimeError where a worker cannot start.
        """
        pairs = zip(responses, golds, strict=True)
        return self._verdicts([self._request(response, gold) for response, gold in pairs])

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Whether math-verify reads each gold, as more than text, and finds it equal to itself."""
        return self._verdicts([self._request(None, gold) for gold in golds])

    def close(self) -> None:
        """Ends the workers; a later call starts new ones."""
        while self._idle:
            self._idle.pop().end()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, response: str | None, gold: str) -> Request | bool:
        """What to ask a worker, or the verdict where none is needed; without response, readable."""
        if gold.count("\\boxed") == 1:  # of a gold with several boxes, all are the answer
            gold = last_boxed(gold) or gold
        number = plain_number(gold) is not None
        if response is None:
            return number or (len(gold) <= MAX_TEXT and (in_box(gold), None, False))
        answer = last_boxed(response)
        if answer is None and self.unboxed:
            answer, text = response, response[-MAX_TEXT:]
            if len(response) > MAX_TEXT:  # not from the middle of a line, or of a number
                text = text.partition("\n")[2] or text
        elif answer is None or len(answer) > MAX_ANSWER:
            return False
        else:
            text = in_box(answer)
        verdict = plain_verdict(gold, answer)
        if verdict is None and len(gold) <= MAX_TEXT:
            return in_box(gold), text, self.strict and number
        return bool(verdict)

    def _verdicts(self, requests: list[Request | bool]) -> list[bool]:
        """The verdicts in order: those known already, and the workers' on each distinct request."""
        asked = list(dict.fromkeys(r for r in requests if not isinstance(r, bool)))
        verdicts = dict(zip(asked, self._ask(asked), strict=True))
        return [r if isinstance(r, bool) else verdicts[r] for r in requests]

    def _ask(self, requests: list[Request]) -> list[bool]:
        """Hands the requests one at a time to whichever worker is free."""
        verdicts = [False] * len(requests)
        waiting = list(reversed(range(len(requests))))
        busy: dict[object, Worker] = {}  # by the pipe its reply comes through
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    worker = (
                        self._idle.pop() if self._idle else Worker(self.deadline, self.memory_mb)
                    )
                    busy[worker.stdout] = worker
                    worker.job = waiting.pop()
                    worker.until = time.monotonic() + (
                        self.deadline if worker.ready else START_SECONDS
                    )
                    try:
                        worker.stdin.write(json.dumps(requests[worker.job]).encode() + b"\n")
                    except BrokenPipeError:  # it died before: not this answer's fault
                        waiting.append(worker.job)
                        self.crashes += 1
                        busy.pop(worker.stdout).end()
                soonest = min(worker.until for worker in busy.values())
                for pipe in wait(busy, max(0.0, soonest - time.monotonic())):
                    worker, reply = busy[pipe], os.read(pipe.fileno(), 1)
                    if reply == b"R":  # only now does the answer's time begin
                        worker.ready, worker.until = True, time.monotonic() + self.deadline
                    elif reply:
                        verdicts[worker.job] = reply == b"1"
                        self._idle.append(busy.pop(pipe))
                    else:
                        self.crashes += 1
                        busy.pop(pipe).end()
                for pipe, worker in list(busy.items()):
                    if time.monotonic() >= worker.until:
                        self.timeouts += 1
                        busy.pop(pipe).end()
        finally:  # after an interrupt, a late reply must not be taken for the next answer's
            for worker in busy.values():
                worker.kill(), worker.wait()
        return verdicts


def is_number(value: object) -> bool:
    """18, 3/4, 50%, 1.2·10^3; also as the right side of an equation or alone in a set."""
    from sympy import And, Eq, FiniteSet, Integer, Mul, Number, Pow, Rational, UnevaluatedExpr

    while isinstance(value, And | Eq | FiniteSet) and value.args:
        value = getattr(value, "_unsorted_args", value.args)[-1]
    if isinstance(value, Mul) and len(value.args) == 2 and isinstance(value.args[0], Number):
        value = value.args[1]
        if value == UnevaluatedExpr(Rational(1, 100)):
            return True
    elif isinstance(value, Number):
        return True
    return isinstance(value, Pow) and value.base == 10 and isinstance(value.exp, Integer)


def serve(deadline: float, memory_mb: int) -> None:
    """The worker: requests in as JSON lines, one byte out for each. Only a verdict leaves it."""
    replies, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    with contextlib.suppress(ValueError, OSError):  # some systems know no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    # math-verify's own timeouts stay off: they interrupt sympy halfway, some of its code swallows
    # them, and they do not reach C. The caller kills; if the caller is gone, the alarm does.
    from math_verify import parse, verify

    logging.disable()
    parse_gold = functools.lru_cache(maxsize=1024)(functools.partial(parse, parsing_timeout=None))
    parse_gold(in_box("x^2"))  # the parser builds its tables on first use
    os.write(replies, b"R")
    os.dup2(nowhere, 2)
    for line in sys.stdin.buffer:
        gold_text, text, number_wanted = json.loads(line)
        signal.alarm(math.ceil(deadline) + 1)
        try:
            gold = parse_gold(gold_text)
            if text is None:  # a gold left as text would equal itself without having been read
                gold = answer = [part for part in gold if not isinstance(part, str)]
            else:
                answer = parse(text, parsing_timeout=None)
            verdict = bool(answer) and (is_number(answer[0]) or not number_wanted)
            verdict = verdict and verify(gold, answer, timeout_seconds=None)
        except Exception:  # RecursionError and MemoryError among them
            verdict = False
        signal.alarm(0)
        os.write(replies, b"1" if verdict else b"0")


if __name__ == "__main__":
    # CPython maps and unmaps memory whenever recursion crosses a 16 KB chunk of its frames' stack,
    # which the parser does all the time. A first frame that claims 2.4 MB gets a chunk with room.
    serve.__code__ = serve.__code__.replace(co_stacksize=300_000)
    serve(float(sys.argv[1]), int(sys.argv[2]))
