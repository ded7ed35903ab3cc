r"""The process that runs math-verify. It reads requests as JSON lines and writes one byte for each.

Started as a script with `python -P`, so it imports neither the caller's modules nor a file in the
current directory that has the name of a library's module. Only a verdict leaves it: printing or
pickling a parsed expression may evaluate it.

    echo '["\\boxed{1/2}", "\\boxed{0.5}", false]' |  # reference, answer, number_only
        python -P grading/worker.py 5 2048  # writes R (ready), then 1 (right)
"""

import functools
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

# The caller reads verdicts from standard output, so what libraries print must not go there.
REPLIES = os.dup(1)
NOWHERE = os.open(os.devnull, os.O_WRONLY)
os.dup2(NOWHERE, 1)

from math_verify import parse, verify  # noqa: E402
from sympy import (  # noqa: E402
    And,
    Eq,
    FiniteSet,
    Float,
    Integer,
    Mul,
    N,
    Number,
    Pow,
    Rational,
    UnevaluatedExpr,
)

PERCENT = UnevaluatedExpr(Rational(1, 100))  # math-verify reads 50% as 50 * PERCENT


def is_number(value: Any) -> bool:
    """Whether a parsed answer is a number: 18, 3/4, 50%, 1.2 * 10^3 or 2^10.

    The right side of an equation counts, and the last element of a set.
    """
    while isinstance(value, And | Eq | FiniteSet) and value.args:
        value = getattr(value, "_unsorted_args", value.args)[-1]

    if isinstance(value, Number):
        return True
    if isinstance(value, Mul) and len(value.args) == 2 and isinstance(value.args[0], Number):
        value = value.args[1]
        if value == PERCENT:
            return True
    return isinstance(value, Pow) and all(isinstance(part, Integer) for part in value.args)


def agree(reference: Any, answer: Any) -> bool:
    """Whether two numbers that math-verify calls equal agree to five digits.

    math-verify rounds to six decimal places and so equates 1e-9 and 2e-9. Anything that is not a
    number agrees.
    """
    if hasattr(reference, "rhs") != hasattr(answer, "rhs"):  # x = 5 and 5
        reference = getattr(reference, "rhs", reference)
        answer = getattr(answer, "rhs", answer)

    if reference == answer:
        return True
    for value in (reference, answer):
        if not getattr(value, "is_number", False) or value.has(UnevaluatedExpr):
            return True  # 50% is 50, and also 1/2

    decimal = answer.has(Float) and not answer.has(Pow)
    if decimal and not reference.has(Float) and reference.doit().is_rational is False:
        return False  # 3.14159265 is not pi
    difference = abs(N(reference) - N(answer))
    return bool(difference <= abs(N(reference)) / 10**5)


# math-verify's own timeouts stay off: they interrupt sympy halfway, some of sympy's code catches
# them, and they do not reach C code. The caller kills a worker that is late.


@functools.lru_cache
def parse_text(text: str) -> list:
    return parse(text, parsing_timeout=None)


def is_right(reference: str, answer: str | None, number_only: bool) -> bool:
    """Whether an answer is right. Without an answer: whether the reference can be read."""
    expected = parse_text(reference)
    if answer is None:  # math-verify returns what it cannot read as a string
        expected = [part for part in expected if not isinstance(part, str)]
        found = expected
    else:
        found = parse_text(answer)

    if not expected or not found:
        return False
    if number_only and not is_number(found[0]):
        return False

    # x < 3 is right if the reference is (-oo, 3), but x in (-oo, 3) is not.
    sets = not hasattr(expected[0], "rhs")
    equal = verify(expected, found, timeout_seconds=None, allow_set_relation_comp=sets)
    return equal and agree(expected[0], found[0])


def serve(deadline: float) -> None:
    for line in sys.stdin.buffer:
        signal.alarm(int(deadline) + 2)  # ends the worker if its caller is gone
        try:
            right = is_right(*json.loads(line))
        except Exception:  # among others RecursionError and MemoryError
            right = False
        signal.alarm(0)
        os.write(REPLIES, b"1" if right else b"0")


def main() -> None:
    deadline = float(sys.argv[1])
    memory = int(sys.argv[2]) << 20  # from MiB to bytes
    with suppress(ValueError, OSError):  # some systems do not support this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    parse_text(r"\boxed{x^2}")  # the parser builds its tables on first use
    os.write(REPLIES, b"R")
    os.dup2(NOWHERE, 2)

    # CPython maps and unmaps memory whenever recursion crosses the end of a 16 KB chunk of its
    # stack of frames, and the parser recurses all the time. A first frame that claims 2.4 MB gets
    # one chunk with room for all calls: 12% to 27% more answers per second.
    serve.__code__ = serve.__code__.replace(co_stacksize=300_000)
    serve(deadline)


if __name__ == "__main__":
    main()
