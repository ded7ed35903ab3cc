r"""Grade answers in worker processes that can be killed.

A response of a policy is hostile input: sympy can be made to do work that neither a thread nor a
signal can always stop. So math-verify runs only in worker processes, under a deadline and a memory
cap. A worker that exceeds the deadline or dies is replaced, and its answer is wrong. sympy never
enters the caller's process.

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

from grading.answers import TOO_LARGE, find_answer, last_boxed, reference_text
from grading.kinds import leaves, read
from grading.notation import with_plain_commas
from grading.rules import Judge

FORMATS = ("boxed", "line", "auto")
MAX_ANSWER = 512  # characters; a longer answer is wrong
START_SECONDS = 120.0  # for a worker's imports on a busy machine
READ_SECONDS = 60.0  # for a reference, so that it can be read on slow machines too
WORKER = Path(__file__).resolve().with_name("worker.py")
# gmpy2 computes in C, where only a kill stops it. The hash seed fixes the order sympy works in.
ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "PYTHONHASHSEED": "0"}


# Reference, answer, strict: is the answer right? Without an answer: can the reference be read?
Request = tuple[str, str | None, bool]


class NeedsWorker(Exception):
    """Only math-verify can tell."""


def no_worker(relation: str, first: str, second: str) -> bool:
    raise NeedsWorker


class WorkerError(RuntimeError):
    """A worker process cannot start."""


class Worker:
    """A process that runs worker.py. It answers one request at a time and ends with its input.

    Raises:
        WorkerError: the process cannot start; the message ends with its last line of output.
    """

    def __init__(self, deadline: float, memory_mb: int) -> None:
        command = [sys.executable, "-P", str(WORKER), str(deadline), str(memory_mb)]
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
                raise WorkerError(
                    f"a grading worker ended or took over {START_SECONDS:g} s to start; is "
                    f"math-verify installed? {lines[-1]}"
                )

    def reply(self, seconds: float) -> bytes:
        """Return the next byte, or b"" if the process has died or the time is up."""
        pipe = self.process.stdout
        return pipe.read(1) if wait([pipe], seconds) else b""

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

    boxed = staticmethod(last_boxed)  # the last boxed answer of a response, or None
    reference = staticmethod(reference_text)  # the answer that a text holds, or an empty text

    def __post_init__(self) -> None:
        self._idle = []
        if self.deadline <= 0:
            raise ValueError(f"deadline={self.deadline} must be above 0")
        if self.answer_format not in FORMATS:
            raise ValueError(f"answer_format={self.answer_format} is none of {FORMATS}")

    def grade(self, responses: list[str], references: list[str]) -> list[bool]:
        """Whether each response has the answer of its reference. Equal pairs are graded once.

        Raises:
            WorkerError: a worker cannot start.
        """
        pairs = zip(responses, references, strict=True)
        return self._ask_all([self._quick_verdict(*pair) for pair in pairs])

    def readable(self, references: list[str]) -> list[bool]:
        """Whether each reference is an answer. Uses workers of its own, up to one per CPU core."""
        pending = [self._quick_readable(reference) for reference in references]
        workers = min(os.cpu_count() or 1, 1 + len({*pending}) // 50)
        with replace(self, workers=workers, deadline=READ_SECONDS) as reader:
            return reader._ask_all(pending)

    def close(self) -> None:
        """End all workers. A later call starts new ones."""
        while self._idle:
            self._idle.pop().end()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _quick_verdict(self, response: str, reference: str) -> Request | bool:
        """The verdict if no worker is needed, else the request for it."""
        reference, answer = reference_text(reference), find_answer(response, self.answer_format)
        if not reference or not answer or len(answer) > MAX_ANSWER:
            return False

        expected, found = read(reference), read(answer)
        plain = [read(with_plain_commas(text)) for text in (reference, answer)]
        if plain[0] == plain[1]:  # 1{,}000\pi and 1,000\pi
            return True
        try:
            return Judge(no_worker, self.strict).equal(expected, found)
        except NeedsWorker:
            if TOO_LARGE.search(expected.text) or TOO_LARGE.search(found.text):
                return False
            return (reference, answer, self.strict)

    def _quick_readable(self, reference: str) -> Request | bool:
        """Whether a reference is an answer if no worker is needed, else the request for it."""
        text = reference_text(reference)
        answer = read(text)
        if not text or TOO_LARGE.search(answer.text):
            return False
        return (text, None, False) if leaves(answer) else True

    def _ask_all(self, pending: list[Request | bool]) -> list[bool]:
        """The verdicts, those of workers for requests. Equal requests are asked once."""
        requests = dict.fromkeys(item for item in pending if isinstance(item, tuple))
        with ThreadPoolExecutor(self.workers) as threads:
            verdicts = dict(zip(requests, threads.map(self._ask, requests), strict=True))
        return [verdicts[item] if isinstance(item, tuple) else item for item in pending]

    def _ask(self, request: Request) -> bool:
        """A worker's verdict; False if it exceeded the deadline or died.

        Runs in several threads. Each takes a worker of its own from the idle ones.
        """
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = Worker(self.deadline, self.memory_mb)

        try:
            worker.process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:  # it died while it was idle, so this answer gets another worker
            worker.end()
            return self._ask(request)

        reply = worker.reply(self.deadline)
        if reply in (b"0", b"1"):
            self._idle.append(worker)
        else:
            worker.end()
        return reply == b"1"
