r"""Which classes of answers may be equal, and when.

Answers of one class with equal fields are equal. Else `RULES` is the table; a pair of classes that
is not in it is never equal. math-verify decides only about the expressions at the leaves.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from grading.answers import plain_number
from grading.kinds import (
    SET,
    BaseNumber,
    Equation,
    Expression,
    Interval,
    Items,
    Kind,
    Number,
    Quantity,
)  # fmt: skip

# Operations that are left to do, so that an answer is not yet a number: 3+4, 7!, 6 \cdot 3. A sign
# before digits that end a brace does not count, as in 2^{n-1} and \frac{1+5}{2}.
OPERATION = (
    r"(?<=[\w)}!]) *[-+](?! *\d*\})|[*!]"
    r"|\\(?:cdot|times|sum|prod|int|lim|log|ln|sin|cos|tan|gcd)"
)


@dataclass
class Judge:
    """Compares a reference with an answer.

    ask: whether two LaTeX expressions are "equal", or "proportional" by a constant that is not 0.
    strict: if the reference is a number, an answer that leaves an operation to do is wrong.
    swapped: whether `equal` gets the answer first.
    """

    ask: Callable[[str, str, str], bool]
    strict: bool
    swapped: bool = False

    def equal(self, reference: Kind, answer: Kind) -> bool:
        if reference == answer:
            return True
        # First the two classes, then with Kind, which stands for any; each pair in both orders.
        for left, right in itertools.product((type(reference), Kind), (type(answer), Kind)):
            if (left, right) in RULES:
                return RULES[left, right](self, reference, answer)
            if (right, left) in RULES:
                judge = replace(self, swapped=not self.swapped)
                return RULES[right, left](judge, answer, reference)
        return False


# Each rule takes the judge and two answers of the kinds in the table, in the table's order.
# ------------------------------------------------------------------------------- numbers


def same_number(judge, a, b):
    """Equal, or a decimal that agrees to six places and to five digits."""
    largest = max(abs(a.value), abs(b.value))
    return abs(a.value - b.value) <= min(1e-6, largest / 10**5)


def same_expression(judge, reference, answer):
    """Equal for math-verify. With `strict`, an answer that leaves an operation to do is wrong if
    the reference is a number."""
    if judge.swapped:
        reference, answer = answer, reference
    if judge.strict and isinstance(reference, Number) and re.search(OPERATION, answer.text):
        return False
    if reference.latex.replace(" ", "") == answer.latex.replace(" ", ""):
        return True
    return judge.ask("equal", *sorted((reference.latex, answer.latex)))


def same_quantity(judge, a, b):
    """The same amount of the same base units: `1 km` is `1000 m`."""
    if a.powers != b.powers:
        return False
    if a.size == b.size:
        return judge.equal(a.value, b.value)
    return same_number(judge, Number(a.amount), Number(b.amount))


def without_unit(judge, quantity, plain):
    """A unit may be left out, except in 5 feet 3 inches; p% is p and p/100."""
    if quantity.parts == 1 and judge.equal(quantity.value, plain):
        return True
    return quantity.powers == (("%", 1),) and judge.equal(Number(quantity.amount), plain)


def without_base(judge, a, b):
    """The base may be left out: `101_2` is `101`."""
    return b.text.lower() == a.digits


# ------------------------------------------------------------------------------- lists


def same_items(judge, a, b):
    """A set, list or union in any order, all else in order. A list may be a set or a tuple.

    Order counts too if one side names its values and the other does not: a=1, b=2. The brackets of
    a pair count, since it may be an interval.
    """
    brackets = {a.brackets, b.brackets} - {""}
    other_brackets = len(brackets) > 1 and (SET in brackets or len(a.items) == 2)
    if other_brackets or len(a.items) != len(b.items):
        return False
    if a.named != b.named or brackets - {SET}:
        return all(map(judge.equal, a.items, b.items))
    remaining = list(b.items)
    for item in a.items:
        equal = next((other for other in remaining if judge.equal(item, other)), None)
        if equal is None:
            return False
        remaining.remove(equal)
    return True


def list_and_number(judge, a, b):
    r"""`0,5` is also a decimal. `3\frac12, 3.5` is one number, written twice; `x=2,002` is not."""
    if plain_number(a.text.replace(",", ".")) == b.value:
        return True
    if len(a.items) < 2 or a.brackets or re.search(r",0\d", a.text):
        return False
    return all(judge.equal(item, b) for item in a.items)


def same_interval(judge, a, b):
    """The name of the variable may be left out."""
    other_name = a.subject and b.subject and a.subject != b.subject
    if other_name or a.brackets != b.brackets:
        return False
    return judge.equal(a.low, b.low) and judge.equal(a.high, b.high)


def interval_and_pair(judge, a, b):
    """`(1,2)` is a point or `1<x<2`."""
    return len(b.items) == 2 and same_interval(judge, a, Interval(*b.items, b.brackets))


# ------------------------------------------------------------------------------- statements


def same_equation(judge, a, b):
    """Equal values of one name, or proportional differences of the sides unless one is solved:
    `x=3` is not `2x=6`."""
    if a.name and a.name == b.name:
        return judge.equal(a.right, b.right)
    solved = any(side.name and isinstance(side.right, Number) for side in (a, b))
    return not solved and judge.ask("proportional", a.difference, b.difference)


def named_value(judge, a, b):
    """The name may be left out: `x=3` is `3`."""
    return bool(a.name) and judge.equal(a.right, b)


def stated_value(judge, reference, answer):
    r"""An answer may show what it is the value of: `x+y=18`, `9 \cdot 2 = 18`."""
    return judge.equal(reference, answer.right)


# (kind of the reference, kind of the answer): the rule. A pair also stands for the swapped pair,
# unless that has a rule of its own.
RULES = {
    (Number, Number): same_number,
    (Number, Expression): same_expression,
    (Expression, Number): same_expression,
    (Expression, Expression): same_expression,
    (Quantity, Quantity): same_quantity,
    (Quantity, Number): without_unit,
    (Quantity, Expression): without_unit,
    (BaseNumber, Number): without_base,
    (Items, Items): same_items,
    (Items, Number): list_and_number,
    (Interval, Interval): same_interval,
    (Interval, Items): interval_and_pair,
    (Equation, Equation): same_equation,
    (Equation, Kind): named_value,
    (Kind, Equation): stated_value,
}
