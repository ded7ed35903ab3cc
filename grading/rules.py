r"""Which kinds of answers may be equal, and when.

Answers with equal fields are equal. Else `RULES` is the table; a pair of kinds that is not in it is
never equal. math-verify decides only about the expressions at the leaves.
"""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from grading.answers import plain_number
from grading.kinds import (
    BaseNumber,
    Choice,
    Clock,
    Collection,
    Complex,
    Equation,
    Expression,
    Interval,
    Kind,
    Matrix,
    Number,
    Quantity,
    Ratio,
    Sequence,
    Union,
    Words,
    as_interval,
    parse,
    parse_all,
)  # fmt: skip

PERCENT = (("%", 1),)


class NeedsWorker(Exception):
    """Only math-verify can tell."""


def no_worker(relation: str, first: str, second: str) -> bool:
    raise NeedsWorker


@dataclass
class Judge:
    """Compares a reference with an answer.

    ask: whether two LaTeX expressions are "equal", or "proportional" by a constant that is not 0.
    strict: if the reference is a number, an answer that leaves an operation to do is wrong.
    """

    ask: Callable[[str, str, str], bool] = no_worker
    strict: bool = True

    def equal(self, reference: Kind, answer: Kind) -> bool:
        if reference == answer:
            return True
        for left, right in itertools.product(type(reference).__mro__, type(answer).__mro__):
            if (left, right) in RULES:
                return RULES[left, right](self, reference, answer)
            if (right, left) in RULES:
                return RULES[right, left](self, answer, reference)
        return False

    def all_equal(self, items: tuple, others: tuple) -> bool:
        return len(items) == len(others) and all(map(self.equal, items, others))

    def expressions(self, first: str, second: str, relation: str = "equal") -> bool:
        """Ask about two expressions, always in the same order."""
        if first.replace(" ", "") == second.replace(" ", ""):
            return True
        return self.ask(relation, *sorted((first, second)))


# Each rule takes the judge and two answers of the kinds in the table, in the table's order.
# ------------------------------------------------------------------------------- numbers


def same_number(judge, a, b):
    """Equal, or a decimal that agrees to six places and to five digits."""
    largest = max(abs(a.value), abs(b.value))
    return abs(a.value - b.value) <= min(1e-6, largest / 10**5)


def number_and_expression(judge, number, answer):
    return not (judge.strict and answer.unevaluated) and same_expression(judge, number, answer)


def same_expression(judge, a, b):
    return judge.expressions(latex(a), latex(b))


def latex(leaf):
    """What math-verify reads: the digits of a number, or a fraction."""
    value = number_value(leaf)
    if isinstance(value, Fraction) and not re.fullmatch(r"-?\d+(\.\d+)?", leaf.text):
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return getattr(leaf, "latex", leaf.text)


def same_quantity(judge, a, b):
    if a.unit == b.unit:
        return judge.equal(a.value, b.value)
    values = [number_value(quantity.value) * quantity.unit.size for quantity in (a, b)]
    return a.unit.powers == b.unit.powers and same_number(judge, *map(Number, values))


def number_value(kind):
    return getattr(kind, "value", math.nan)


def without_unit(judge, quantity, plain):
    """A unit may be left out, except in 5 feet 3 inches; p% is p and p/100."""
    if type(quantity) is Quantity and judge.equal(quantity.value, plain):
        return True
    percent = quantity.unit.powers == PERCENT and isinstance(quantity.value, Number)
    return percent and judge.equal(Number(quantity.value.value / 100), plain)


def without_base(judge, a, b):
    return b.value == a.value or b.text.lower() == a.digits


def ratio_and_number(judge, a, b):
    values = [number_value(item) for item in a.items]
    return len(values) == 2 and values[0] == values[1] * b.value


def clock_and_number(judge, a, b):
    hours, minutes = divmod(a.minutes, 60)
    return not a.half and hours == b.value * minutes > 0


# ------------------------------------------------------------------------------- collections


def same_items(judge, a, b):
    """Each item of one equals its own item of the other, in any order."""
    left = list(b.items)
    for item in a.items:
        if item in left:
            left.remove(item)
            continue
        equal = [other for other in left if judge.equal(item, other)]
        if not equal:
            return False
        left.remove(equal[0])
    return not left


def same_collection(judge, a, b):
    """If one side names its values, each by a name of its own, and the other none, order counts."""
    first, second = values(a), values(b)
    if (first is a.items) != (second is b.items):
        return judge.all_equal(first, second)
    return same_items(judge, a, b)


def values(collection):
    """The values of a=1, b=2, but the items if a name repeats, as in x=1, x=2 and x_1=1, x_2=2."""
    names = {getattr(item, "name", "").partition("_")[0] for item in collection.items}
    if "" in names or len(names) < len(collection.items):
        return collection.items
    return tuple(item.right for item in collection.items)


def tuple_and_list(judge, a, b):
    """A tuple is not a set, but a list without braces may be a tuple without brackets."""
    return not b.braces and judge.all_equal(a.items, values(b))


def same_order(judge, a, b):
    return judge.all_equal(a.items, b.items)


def same_tuple(judge, a, b):
    """Of two items, the brackets count: the tuple may be an interval."""
    return (len(a.items) != 2 or a.brackets == b.brackets) and same_order(judge, a, b)


def list_and_number(judge, a, b):
    """`0,5` is also a decimal, and `100,200` also a list. `3\\frac12, 3.5` is one number twice."""
    if plain_number(a.text.replace(",", ".")) == b.value:
        return True
    if "," in b.text:
        return same_items(judge, a, Collection(parse_all(b.text.split(","))))
    texts = {item.text for item in a.items}
    return len(texts) > 1 and judge.all_equal(a.items, (b,) * len(texts))


def same_interval(judge, a, b):
    """The name of the variable may be left out."""
    names = {a.subject, b.subject} - {""}
    if a.brackets != b.brackets or len(names) > 1:
        return False
    return judge.all_equal((a.low, a.high), (b.low, b.high))


def interval_and_pair(judge, a, b):
    return len(b.items) == 2 and same_interval(judge, a, as_interval(b))


# ------------------------------------------------------------------------------- statements


def same_equation(judge, a, b):
    """Equal values of one name, or proportional differences of the sides. `2x=6` is not solved."""
    if a.name and a.name == b.name:
        return judge.equal(a.right, b.right)
    solved = any(side.name and isinstance(side.right, Number) for side in (a, b))
    return not solved and judge.expressions(a.difference, b.difference, "proportional")


def named_value(judge, a, b):
    return bool(a.name) and judge.equal(a.right, b)


def stated_value(judge, reference, answer):
    r"""An answer may show what it is the value of: `x+y=18`, `9 \cdot 2 = 18`."""
    return judge.equal(reference, answer.right)


def choice_and_content(judge, a, b):
    return bool(a.content) and not isinstance(b, Choice) and judge.equal(parse(a.content), b)


def no_solution(judge, a, b):
    return not b.items and re.match(r"(?:no|empty) \w+", a.phrase) is not None


# (kind of the reference, kind of the answer): the rule. A pair also stands for the swapped pair,
# unless that has a rule of its own.
RULES = {
    (Number, Number): same_number,
    (Number, Expression): number_and_expression,
    (Expression, Number): same_expression,
    (Expression, Expression): same_expression,
    (Complex, Expression): same_expression,
    (Quantity, Quantity): same_quantity,
    (Quantity, Number): without_unit,
    (Quantity, Expression): without_unit,
    (BaseNumber, Number): without_base,
    (Ratio, Ratio): same_order,
    (Ratio, Number): ratio_and_number,
    (Clock, Number): clock_and_number,
    (Sequence, Sequence): same_tuple,
    (Sequence, Collection): tuple_and_list,
    (Matrix, Matrix): same_order,
    (Collection, Collection): same_collection,
    (Collection, Number): list_and_number,
    (Interval, Interval): same_interval,
    (Interval, Sequence): interval_and_pair,
    (Union, Union): same_items,
    (Equation, Equation): same_equation,
    (Equation, Kind): named_value,
    (Kind, Equation): stated_value,
    (Choice, Kind): choice_and_content,
    (Words, Collection): no_solution,
}
