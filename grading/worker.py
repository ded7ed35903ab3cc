r"""The process that runs math-verify. It reads requests as JSON lines and writes one byte for each.

Started as a script with `python -P`, so it imports neither the caller's modules nor a file in the
current directory that has the name of a library's module. Only a verdict leaves it: printing or
pickling a parsed expression may evaluate it.

    echo '["x+1", "1+x", true]' |  # reference, answer, strict
        python -P grading/worker.py 5 2048  # writes R (ready), then 1 (right)
"""

import functools
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# The caller reads verdicts from standard output, so what libraries print must not go there.
REPLIES = os.dup(1)
NOWHERE = os.open(os.devnull, os.O_WRONLY)
os.dup2(NOWHERE, 1)

# Last, so that no file of the caller's takes precedence over a library's module.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from latex2sympy2_extended import latex2sympy  # noqa: E402
from latex2sympy2_extended.latex2sympy2 import ConversionConfig  # noqa: E402
from math_verify import verify  # noqa: E402
from sympy import Abs, Derivative, I, N, Symbol, cancel, expand  # noqa: E402

from grading.kinds import leaves, read  # noqa: E402
from grading.rules import Judge  # noqa: E402

# math-verify's own timeouts stay off: they interrupt sympy halfway, some of sympy's code catches
# them, and they do not reach C code. The caller kills a worker that is late.


@functools.lru_cache
def expression(latex: str) -> Any:
    """Read LaTeX with math-verify's parser. Letters keep their case; i is the imaginary unit.

    Letters are positive, so that log(x^2) is 2 log(x), except where there is an absolute value.
    """
    value = latex2sympy(
        latex,
        is_real=True,
        convert_degrees=True,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )

    value = value.xreplace({Symbol("i", real=True): I})
    for derivative in value.atoms(Derivative):  # dv/dt, d(mv)/dt: evaluated, it would be 0
        letters = derivative.expr.free_symbols
        if letters and letters.isdisjoint(derivative.variables):
            value = value.xreplace({derivative: Symbol(str(derivative), real=True)})

    if value.has(Abs):
        return value
    return value.xreplace({x: Symbol(x.name, positive=True) for x in value.free_symbols})


def agree(first: Any, second: Any) -> bool:
    """Whether two numbers that math-verify calls equal agree to five digits.

    math-verify rounds to six decimal places and so equates 1e-9 and 2e-9. Anything that is not a
    number agrees.
    """
    if not (first.is_number and second.is_number):
        return True
    if {first.doit().is_rational, second.doit().is_rational} == {True, False}:
        return False  # 3.14159265 is not pi
    value = N(first)
    return bool(abs(value - N(second)) <= abs(value) / 10**5)


def ask(relation: str, first: str, second: str) -> bool:
    """Whether two expressions are "equal", or "proportional" by a number that is not 0."""
    left, right = expression(first), expression(second)
    if left == right:
        return True
    if relation == "proportional":
        ratio = cancel(expand(left) / expand(right))
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    if Symbol in (type(left), type(right)):  # math-verify ignores their case
        return False
    return verify([left], [right], timeout_seconds=None) and agree(left, right)


def is_right(reference: str, answer: str | None, strict: bool) -> bool:
    """Whether an answer is right. Without an answer: whether the reference can be read."""
    expected = read(reference)
    if answer is not None:
        return Judge(ask, strict).equal(expected, read(answer))
    for leaf in leaves(expected):
        expression(leaf.latex)
    return True


def serve(deadline: float) -> None:
    for line in sys.stdin.buffer:
        signal.alarm(int(deadline) + 2)  # ends the worker if its caller is gone
        right = False
        with suppress(Exception):  # among others RecursionError and MemoryError
            right = is_right(*json.loads(line))
        signal.alarm(0)
        os.write(REPLIES, b"%d" % right)


def main() -> None:
    deadline = float(sys.argv[1])
    memory = int(sys.argv[2]) << 20  # from MiB to bytes
    with suppress(ValueError, OSError):  # some systems do not support this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    expression("x^2")  # the parser builds its tables on first use
    os.write(REPLIES, b"R")
    os.dup2(NOWHERE, 2)

    # CPython maps and unmaps memory whenever recursion crosses the end of a 16 KB chunk of its
    # stack of frames, and the parser recurses all the time. A first frame that claims 2.4 MB gets
    # one chunk with room for all calls: 12% to 27% more answers per second.
    serve.__code__ = serve.__code__.replace(co_stacksize=300_000)
    serve(deadline)


if __name__ == "__main__":
    main()
