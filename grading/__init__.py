"""Grade answers to mathematical problems with math-verify, in processes that can be killed.

This package can be copied on its own; it needs only math-verify. README.md lists the rules.
"""

from grading.answers import find_answer, last_boxed
from grading.grader import MAX_ANSWER, Grader, WorkerError

__all__ = ["MAX_ANSWER", "Grader", "WorkerError", "find_answer", "last_boxed"]
