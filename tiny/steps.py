"""The arithmetic of the tiny problems, and a judge of the steps of a response.

Needs only the standard library, so that any tool can import it.
"""

import operator
import re

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
STEP = re.compile(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)")

Terms = list[int | str]  # alternating numbers and operators: 17+5*3 is [17, "+", 5, "*", 3]


def parse(problem: str) -> Terms:
    """Terms of the expression in a problem's text."""
    return [int(t) if t.isdigit() else t for t in re.findall(r"\d+|[-+*]", problem)]


def next_operator(terms: Terms) -> int:
    """Position of the operator to apply next: the first product, or else the first operator."""
    return terms.index("*") if "*" in terms else 1


def apply(terms: Terms, i: int, result: int) -> Terms:
    """The terms with the operator at position i and its two operands replaced by a result."""
    return [*terms[: i - 1], result, *terms[i + 2 :]]


def evaluate(terms: Terms) -> int:
    """Value of the expression."""
    while len(terms) > 1:
        i = next_operator(terms)
        terms = apply(terms, i, OPERATIONS[terms[i]](terms[i - 1], terms[i + 1]))
    return terms[0]


def check_steps(problem: str, response: str) -> list[tuple[int, int, bool]]:
    """Judge every step `a+b=c` of a response in order.

    A step is right if it replaces two adjacent numbers of the current expression by a result that
    keeps the expression's value. A wrong step does not make later steps wrong: they are judged on
    the expression that it produced. The boxed answer is not a step.

    Returns (start, end, right) per step; response[start:end] is its text.
    """
    terms = parse(problem)
    judged = []
    for match in STEP.finditer(response):
        left, sign, right, result = match.groups()
        step = [int(left), sign, int(right)]
        places = [i for i in range(1, len(terms), 2) if terms[i - 1 : i + 2] == step]
        outcomes = [apply(terms, i, int(result)) for i in places]
        good = [outcome for outcome in outcomes if evaluate(outcome) == evaluate(terms)]
        terms = (good or outcomes or [terms])[0]
        judged.append((*match.span(), bool(good)))
    return judged
