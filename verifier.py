r"""Grades answers to mathematical problems with math-verify, in processes that can be killed.

What a policy writes is hostile input: a tower of powers or a huge factorial sends sympy into work
that neither a thread nor a signal can always stop. So every answer that is more than a number or
words is read in a worker process, under a deadline and a cap on memory; a worker that hangs or
dies is replaced and the answer scored wrong. sympy never enters the caller's process.

    with Grader(workers=2) as grader:
        grader.grade([r"so \boxed{\frac{2}{4}}", "no box"], golds=["0.5", "7"])  # [True, False]

Needs math-verify, tqdm and answers.py: copy both files. The rules: docs/verifier.md.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path

import answers

MAX_ANSWER = 512  # characters; a longer boxed answer is wrong
START_SECONDS = 120.0  # for a worker's imports, on a busy machine
# gmpy2 computes in C, where only a kill stops it; a fixed hash seed fixes the order sympy works in
WORKER_ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "PYTHONHASHSEED": "0"}


def cache_path() -> Path:
    """Where the golds that were read are remembered: a line each, their hash, then 1 or 0.

    The name holds what decides: this file, answers.py and the packages.
    """
    packages = ("math-verify", "sympy", "latex2sympy2_extended", "antlr4-python3-runtime")
    here = [Path(__file__).with_name(name).read_text() for name in ("verifier.py", "answers.py")]
    deciding = " ".join([*here, *map(version, packages)])
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "token-credit", f"golds-{digest(deciding)[:16]}")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# --------------------------------------------------------------------------------------- processes

Request = tuple[str, str | None, bool]  # gold, text with the answer (None: read gold), number only?


class Worker(subprocess.Popen):
    """A process that answers one request at a time and ends when its standard input does.

    Raises RuntimeError with the process's last words where it cannot start.
    """

    def __init__(self, deadline: float, memory_mb: int) -> None:
        # -P, and last in the path: no neighbouring file may pass for a module of a library.
        start = "import sys; sys.path.append(sys.argv[1]); import verifier; verifier.main()"
        command = [sys.executable, "-P", "-c", start, os.path.dirname(os.path.abspath(__file__))]
        command += [str(deadline), str(memory_mb)]  # in a session of its own: no Ctrl-C for workers
        with tempfile.TemporaryFile() as log:  # a pipe could fill up
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            environment = os.environ | WORKER_ENVIRONMENT
            super().__init__(command, bufsize=0, env=environment, start_new_session=True, **pipes)
            if self.reply(START_SECONDS) != b"R":
                self.end()
                log.seek(0)
                words = log.read().decode(errors="replace")[-2000:].strip() or "no message"
                raise RuntimeError(f"the verifier's worker ({command[0]}) cannot start: {words}")

    def reply(self, seconds: float) -> bytes:
        """The next byte; T where none comes in time, nothing where the process has died."""
        return os.read(self.stdout.fileno(), 1) if wait([self.stdout], seconds) else b"T"

    def end(self) -> None:
        self.kill()
        self.wait()
        self.stdin.close()
        self.stdout.close()


@dataclass
class Grader(contextlib.AbstractContextManager):
    """Grades responses against gold answers; also a context manager that ends its workers."""

    workers: int = 1  # processes at most, started when first needed
    deadline: float = 5.0  # seconds of wall-clock time for one answer before its worker is killed
    strict: bool = True  # for a number as gold, `(16-3-4)*2` left to the grader is no answer
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
        requests = [self._request(r, gold) for r, gold in zip(responses, golds, strict=True)]
        asked = list(dict.fromkeys(r for r in requests if not isinstance(r, bool)))
        verdicts = dict(zip(asked, self._ask_all(asked, self.workers), strict=True))
        return [r if isinstance(r, bool) else bool(verdicts[r]) for r in requests]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Whether each gold is an answer, and math-verify reads it as more than text.

        Uses every processor. What was read is remembered: several runs may add to the cache, a line
        that is not whole is passed over, and a folder that cannot be written is not used.
        """
        texts = ["" if answers.is_prose(text) else text for text in map(answers.gold_text, golds)]
        keys = {text: digest(text) for text in texts if text and answers.read(text).value is None}
        path, known = cache_path(), {}
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(errors="replace").split()
            known = {line[:64]: line[64:] == "1" for line in lines if len(line) == 65}
        asked = [text for text, key in keys.items() if key not in known]
        requests = [(answers.in_box(answers.read(text).text), None, False) for text in asked]
        workers = max(self.workers, min(os.cpu_count() or 1, len(asked) // 50))
        for text, reply in zip(asked, self._ask_all(requests, workers), strict=True):
            known[keys[text]] = bool(reply)
            if reply is not None:  # a worker that was killed may have more time tomorrow
                with contextlib.suppress(OSError), path.open("a") as file:
                    file.write(f"\n{keys[text]}{reply:d}")
        self.close(keep=self.workers)
        return [known[keys[text]] if text in keys else text != "" for text in texts]

    def close(self, keep: int = 0) -> None:
        """Ends the workers, but for some to keep; a later call starts new ones."""
        while len(self._idle) > keep:
            self._idle.pop().end()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, response: str, gold: str) -> Request | bool:
        """What to ask a worker, or the verdict where none is needed."""
        answer, limit = answers.last_boxed(response), MAX_ANSWER
        boxed = answer is not None
        if not boxed and self.unboxed:
            answer, limit = response[-answers.MAX_TEXT :], answers.MAX_TEXT
            if len(response) > answers.MAX_TEXT:  # not from the middle of a line, or of a number
                answer = answer.partition("\n")[2] or answer
        gold = answers.gold_text(gold)
        if answer is None or len(answer) > limit or not gold:
            return False
        left, right = answers.read(gold), answers.read(answer)
        verdict = answers.quick_verdict(left, right)
        if verdict is not None:
            return verdict
        gold = left.text if "=" in right.text else answers.in_order(left.text)
        text = answers.in_box(right.text) if boxed else answer
        return answers.in_box(gold), text, self.strict and left.value is not None

    def _ask_all(self, requests: Sequence[Request], workers: int) -> Iterator[bool | None]:
        """The workers' verdicts, in order; a bar on a terminal where there are many."""
        from tqdm import tqdm

        with ThreadPoolExecutor(workers) as threads:
            verdicts = threads.map(self._ask, requests)
            quiet = None if len(requests) > 1000 else True
            yield from tqdm(verdicts, "reading answers", len(requests), disable=quiet)

    def _ask(self, request: Request) -> bool | None:
        """A worker's verdict; None where it hung or died. Each thread has a worker of its own."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = Worker(self.deadline, self.memory_mb)
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:  # it died before: not this answer's fault
            self.crashes += 1
            worker.end()
            return self._ask(request)
        reply = worker.reply(self.deadline)
        if reply in (b"0", b"1"):
            self._idle.append(worker)
            return reply == b"1"
        self.timeouts += reply == b"T"
        self.crashes += reply == b""
        worker.end()
        return None


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
    return isinstance(value, Pow) and all(isinstance(part, Integer) for part in value.args)


def agree(gold: object, answer: object) -> bool:
    """False for two numbers that math-verify takes for one because it rounds to six places."""
    if hasattr(answer, "rhs") != hasattr(gold, "rhs"):  # x = 5 and 5
        gold, answer = (getattr(side, "rhs", side) for side in (gold, answer))
    if gold == answer or not all(getattr(side, "is_number", False) for side in (gold, answer)):
        return True
    from sympy import Float, N, Pow, UnevaluatedExpr

    if gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):
        return True  # 50% is both 50 and 1/2
    decimal = answer.has(Float) and not answer.has(Pow)
    if decimal and not gold.has(Float) and gold.doit().is_rational is False:
        return False  # 3.14159265 is not pi
    return bool(abs(N(gold) - N(answer)) <= abs(N(gold)) / 10**5)


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
    parse_gold(answers.in_box("x^2"))  # the parser builds its tables on first use
    os.write(replies, b"R")
    os.dup2(nowhere, 2)
    for line in sys.stdin.buffer:
        gold, text, number_wanted = json.loads(line)
        signal.alarm(math.ceil(deadline) + 1)
        try:
            gold = parse_gold(gold)
            if text is None:  # a gold left as text would equal itself without having been read
                gold = answer = [part for part in gold if not isinstance(part, str)]
            else:
                answer = parse(text, parsing_timeout=None)
            verdict = bool(answer) and (not number_wanted or is_number(answer[0]))
            if verdict:  # x < 3 is the answer where (-oo, 3) is the gold, but not x in (-oo, 3)
                sets = bool(gold) and not hasattr(gold[0], "rhs")
                verdict = verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=sets)
            verdict = verdict and (text is None or agree(gold[0], answer[0]))
        except Exception:  # RecursionError and MemoryError among them
            verdict = False
        signal.alarm(0)
        os.write(replies, b"1" if verdict else b"0")


def main() -> None:
    # CPython maps and unmaps memory whenever recursion crosses a 16 KB chunk of its frames' stack,
    # which the parser does all the time. A first frame that claims 2.4 MB gets a chunk with room.
    serve.__code__ = serve.__code__.replace(co_stacksize=300_000)
    serve(float(sys.argv[2]), int(sys.argv[3]))
