r"""Which kinds of answers may be equal, and when.

Answers with equal fields are equal. Else `RULES` is the table; a pair of kinds that is not in it is
never equal. math-verify decides only about the expressions at the leaves.
"""

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
    Compound,
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
        for left in type(reference).__mro__:
            for right in type(answer).__mro__:
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
    if a.value == b.value:
        return True
    difference = abs(a.value - b.value)
    return difference < Fraction(1, 10**6) and difference * 10**5 < max(abs(a.value), abs(b.value))


def number_and_expression(judge, number, answer):
    if judge.strict and answer.unevaluated:
        return False
    return expression_and_number(judge, answer, number)


def expression_and_number(judge, expression, number):
    """math-verify reads the digits of a number, or a fraction."""
    latex = number.text
    if isinstance(number.value, float):
        return False  # infinity
    if not re.fullmatch(r"-?\d+(\.\d+)?", latex):
        latex = rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"
    return judge.expressions(expression.latex, latex)


def same_expression(judge, a, b):
    return judge.expressions(a.latex, b.latex)


def complex_and_expression(judge, a, b):
    return judge.expressions(a.text, b.latex)


def same_quantity(judge, a, b):
    if a.unit.powers != b.unit.powers:
        return False
    if isinstance(a.value, Number) and isinstance(b.value, Number):
        ratio = a.unit.size / b.unit.size
        return same_number(judge, Number(a.value.value * ratio), b.value)
    return a.unit == b.unit and judge.equal(a.value, b.value)


def without_unit(judge, quantity, plain):
    """A unit may be left out; p% is p and p/100."""
    value = quantity.value
    if quantity.unit.powers == PERCENT and isinstance(value, Number):
        return judge.equal(value, plain) or judge.equal(Number(value.value / 100), plain)
    return judge.equal(value, plain)


def without_base(judge, a, b):
    return b.value == a.value or b.text.lower() == a.digits


def ratio_and_number(judge, a, b):
    """The first term of a ratio of numbers is 1."""
    first, second, *others = a.items
    if others or not isinstance(second, Number) or not second.value:
        return False
    return judge.equal(first, Number(b.value * second.value))


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
    for named, plain in ((a, b), (b, a)):
        values = named_values(named)
        if values and not any(isinstance(item, Equation) for item in plain.items):
            return judge.all_equal(values, plain.items)
    return same_items(judge, a, b)


def named_values(collection):
    """The values of a=1, b=2; none if a name repeats, as in x=1, x=2 and in x_1=1, x_2=2."""
    equations = [item for item in collection.items if isinstance(item, Equation) and item.name]
    names = {item.name.partition("_")[0] for item in equations}
    if len(names) < len(collection.items):
        return ()
    return tuple(item.right for item in equations)


def tuple_and_list(judge, a, b):
    """A tuple is not a set, but a list without braces may be a tuple without brackets."""
    return not b.braces and judge.all_equal(a.items, named_values(b) or b.items)


def same_order(judge, a, b):
    return judge.all_equal(a.items, b.items)


def same_tuple(judge, a, b):
    """Of two items, the brackets count: the tuple may be an interval."""
    return (len(a.items) != 2 or a.brackets == b.brackets) and same_order(judge, a, b)


def list_and_number(judge, a, b):
    """`0,5` is also a decimal, and `100,200` also a list. `3\\frac12, 3.5` is one number twice."""
    texts = {item.text for item in a.items}
    if len(texts) == len(a.items) > 1 and judge.all_equal(a.items, (b,) * len(texts)):
        return True
    if re.fullmatch(r"-?\d+,\d+", a.text):
        return plain_number(a.text.replace(",", ".")) == b.value
    numbers = parse_all(b.text.split(","))
    return len(numbers) > 1 and same_items(judge, a, Collection(numbers))


def list_and_named_tuple(judge, a, b):
    """`x=1, y=2` is `(x,y)=(1,2)`."""
    names = b.name.strip("()").split(",")
    values = getattr(b.right, "items", ())
    return same_items(judge, a, Collection(tuple(map(Equation, names, names, values))))


def same_interval(judge, a, b):
    """The name of the variable may be left out."""
    if a.brackets != b.brackets or (a.subject and b.subject and a.subject != b.subject):
        return False
    return judge.equal(a.low, b.low) and judge.equal(a.high, b.high)


def interval_and_pair(judge, a, b):
    return len(b.items) == 2 and same_interval(judge, a, as_interval(b))


# ------------------------------------------------------------------------------- statements


def same_equation(judge, a, b):
    """Equal values of one name, or proportional differences of the sides. `2x=6` is not solved."""
    if a.name and a.name == b.name:
        return judge.equal(a.right, b.right)
    for equation in (a, b):
        if equation.name and isinstance(equation.right, Number):
            return False
    return judge.expressions(a.difference, b.difference, relation="proportional")


def named_value(judge, a, b):
    return bool(a.name) and judge.equal(a.right, b)


def stated_value(judge, reference, answer):
    r"""An answer may show what it is the value of: `x+y=18`, `9 \cdot 2 = 18`."""
    return judge.equal(reference, answer.right)


def choice_and_content(judge, a, b):
    if a.content:
        return judge.equal(parse_all([a.content])[0], b)
    return isinstance(b, Expression) and judge.expressions(a.letters, b.latex)


def no_solution(judge, a, b):
    return not b.items and re.match(r"(?:no|empty) \w+", a.phrase) is not None


def never(judge, a, b):
    return False


# (kind of the reference, kind of the answer): the rule. A pair also stands for the swapped pair,
# unless that has a rule of its own.
RULES = {
    (Number, Number): same_number,
    (Number, Expression): number_and_expression,
    (Expression, Number): expression_and_number,
    (Expression, Expression): same_expression,
    (Complex, Expression): complex_and_expression,
    (Quantity, Quantity): same_quantity,
    (Quantity, Number): without_unit,
    (Quantity, Expression): without_unit,
    (Compound, Number): never,
    (BaseNumber, Number): without_base,
    (Ratio, Ratio): same_order,
    (Ratio, Number): ratio_and_number,
    (Clock, Number): clock_and_number,
    (Sequence, Sequence): same_tuple,
    (Sequence, Collection): tuple_and_list,
    (Matrix, Matrix): same_order,
    (Collection, Collection): same_collection,
    (Collection, Number): list_and_number,
    (Collection, Equation): list_and_named_tuple,
    (Interval, Interval): same_interval,
    (Interval, Sequence): interval_and_pair,
    (Union, Union): same_items,
    (Equation, Equation): same_equation,
    (Equation, Kind): named_value,
    (Kind, Equation): stated_value,
    (Choice, Choice): never,
    (Choice, Kind): choice_and_content,
    (Words, Collection): no_solution,
}
