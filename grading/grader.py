r"""Grade answers in worker processes that can be killed.

A response of a policy is hostile input: sympy can be sent into work that neither a thread nor a
signal can always stop. So every answer that is more than a number or a phrase is read in a worker
process, under a deadline and a memory cap. A worker that exceeds the deadline or dies is replaced,
and its answer is wrong. sympy never enters the caller's process.

    with Grader(workers=2) as grader:
        grader.grade([r"so \boxed{\frac{2}{4}}", "no box"], ["0.5", "7"])  # [True, False]
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from grading import answers
from grading.kinds import leaves, read
from grading.rules import Judge, NeedsWorker

MAX_ANSWER = 512  # characters; a longer boxed answer is wrong
START_SECONDS = 120.0  # for a worker's imports on a busy machine
FOLDER = Path(__file__).resolve().parent
# gmpy2 computes in C, where only a kill stops it. The hash seed fixes the order sympy works in.
ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "PYTHONHASHSEED": "0"}


class Request(NamedTuple):
    """Asks a worker if an answer is right or, without an answer, if the reference is readable."""

    reference: str
    answer: str | None = None
    strict: bool = False


class Worker:
    """A process that runs worker.py. It answers one request at a time and ends with its input.

    Raises:
        RuntimeError: the process cannot start; the message ends with its last line of output.
    """

    def __init__(self, deadline: float, memory_mb: int) -> None:
        command = [sys.executable, "-P", str(FOLDER / "worker.py"), str(deadline), str(memory_mb)]
        with tempfile.TemporaryFile() as log:  # a pipe that nobody reads could fill up
            self.process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # Ctrl-C does not reach workers
            )
            if self.reply(START_SECONDS) != b"R":
                self.end()
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().split("\n")
                raise RuntimeError(
                    f"a grading worker cannot start; is math-verify installed? {lines[-1]}"
                )

    def reply(self, seconds: float) -> bytes:
        """Return the next byte, or b"" if the process has died or the time is up."""
        pipe = self.process.stdout
        if not wait([pipe], seconds):
            return b""
        return pipe.read(1)

    def end(self) -> None:
        with self.process:  # closes its pipes and waits
            self.process.kill()


@dataclass
class Grader(AbstractContextManager):
    """Grades responses against reference answers. As a context manager it ends its workers."""

    answer_format: str = "boxed"  # "line" reads `Answer: 42` or `#### 42`, "auto" a box or a line
    workers: int = 1  # processes at most, started when first needed
    deadline: float = 5.0  # seconds of wall-clock time per answer
    strict: bool = True  # if the reference is a number, `(16-3-4)*2` is wrong
    memory_mb: int = 2048  # cap on each worker's address space
    digits: int = 4  # of exponents, and of numbers below `!` and in binomials; more are wrong

    def __post_init__(self) -> None:
        self._idle = []
        if self.deadline <= 0:
            raise ValueError(f"deadline={self.deadline} must be above 0")
        if self.answer_format not in answers.FORMATS:
            raise ValueError(f"answer_format={self.answer_format} is none of {answers.FORMATS}")

    def grade(self, responses: list[str], references: list[str]) -> list[bool]:
        """Whether each response has the answer of its reference. Equal pairs are graded once.

        Raises:
            RuntimeError: a worker cannot start.
        """
        pairs = zip(responses, references, strict=True)
        found = [self._quick_verdict(response, reference) for response, reference in pairs]
        verdicts = self._ask_all(found)
        return [bool(verdicts.get(item, item)) for item in found]

    def readable(self, references: list[str]) -> list[bool]:
        """Whether each reference is an answer. Uses workers of its own, on all processors."""
        found = [self._quick_readable(reference) for reference in references]
        unknown = len(set(found) - {True, False})
        with replace(self, workers=min(os.cpu_count() or 1, 1 + unknown // 50)) as reader:
            verdicts = reader._ask_all(found)
        return [bool(verdicts.get(item, item)) for item in found]

    def close(self) -> None:
        """End all workers. A later call starts new ones."""
        while self._idle:
            self._idle.pop().end()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _quick_verdict(self, response: str, reference: str) -> Request | bool:
        """The verdict if no worker is needed, else the request for it."""
        text = answers.find_answer(response, self.answer_format)
        reference = answers.reference_text(reference)
        if text is None or len(text) > MAX_ANSWER or not reference:
            return False

        expected, found = read(reference), read(text)
        if expected is None or found is None:
            return False
        try:
            return Judge(strict=self.strict).equal(expected, found)
        except NeedsWorker:
            if any(answers.too_large(kind.text, self.digits) for kind in (expected, found)):
                return False
            return Request(reference, text, self.strict)

    def _quick_readable(self, reference: str) -> Request | bool:
        """Whether a reference is an answer if no worker is needed, else the request for it."""
        text = answers.reference_text(reference)
        kind = read(text)
        if not text or kind is None or answers.is_prose(text):
            return False
        return Request(text) if leaves(kind) else True

    def _ask_all(self, found: list[Request | bool]) -> dict[Request, bool | None]:
        """The workers' verdicts on the requests among `found`."""
        requests = {item: None for item in found if isinstance(item, Request)}
        with ThreadPoolExecutor(self.workers) as threads:
            return dict(zip(requests, threads.map(self._ask, requests), strict=True))

    def _ask(self, request: Request) -> bool | None:
        """A worker's verdict; None if it exceeded the deadline or died.

        Runs in several threads. Each takes a worker of its own from the idle ones.
        """
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = Worker(self.deadline, self.memory_mb)

        try:
            line = json.dumps(request) + "\n"
            worker.process.stdin.write(line.encode())
        except BrokenPipeError:  # it died while it was idle, so this answer gets another worker
            worker.end()
            return self._ask(request)

        reply = worker.reply(self.deadline)
        if reply in (b"0", b"1"):
            self._idle.append(worker)
            return reply == b"1"
        worker.end()
        return None
