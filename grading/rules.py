r"""Which kinds of answers may be equal, and when.

`RULES` is the table. A pair of kinds that is not in it is never equal. math-verify decides only
about the expressions at the leaves, through `ask`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from grading.answers import plain_number
from grading.kinds import (
    BaseNumber, Choice, Clock, Collection, Complex, Congruence, Equation, Expression, Interval,
    Kind, Matrix, Number, Quantity, Ratio, Sequence, Union, Words, found_interval, parse_all,
)  # fmt: skip

PERCENT = (("%", 1),)


class NeedsWorker(Exception):
    """Only math-verify can tell."""


def no_worker(relation: str, reference: str, answer: str) -> bool:
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

    def all_equal(self, references: tuple, answers: tuple) -> bool:
        if len(references) != len(answers):
            return False
        pairs = zip(references, answers, strict=True)
        return all(self.equal(reference, answer) for reference, answer in pairs)

    def expressions(self, first: str, second: str, relation: str = "equal") -> bool:
        """Ask about two expressions, always in the same order."""
        if first.replace(" ", "") == second.replace(" ", ""):
            return True
        return self.ask(relation, *sorted((first, second)))


# ------------------------------------------------------------------------------- numbers


def same_number(judge: Judge, a: Number, b: Number) -> bool:
    """Equal, or a decimal that agrees to six places and to five digits."""
    if a.value == b.value:
        return True
    difference = abs(a.value - b.value)
    return difference < Fraction(1, 10**6) and difference * 10**5 < max(abs(a.value), abs(b.value))


def number_and_expression(judge: Judge, number: Number, answer: Expression) -> bool:
    if judge.strict and answer.unevaluated:
        return False
    return judge.expressions(latex(number), answer.latex)


def expression_and_number(judge: Judge, reference: Expression, number: Number) -> bool:
    return judge.expressions(reference.latex, latex(number))


def same_expression(judge: Judge, a: Expression, b: Expression) -> bool:
    return judge.expressions(a.latex, b.latex)


def complex_and_expression(judge: Judge, a: Complex, b: Expression) -> bool:
    return judge.expressions(a.text, b.latex)


def latex(number: Number) -> str:
    """A number as math-verify reads it: its digits, or a fraction."""
    if isinstance(number.value, float):
        return r"\infty" if number.value > 0 else r"-\infty"
    if re.fullmatch(r"-?\d+(\.\d+)?", number.text):
        return number.text
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


def same_quantity(judge: Judge, a: Quantity, b: Quantity) -> bool:
    if a.unit.powers != b.unit.powers:
        return False
    if isinstance(a.value, Number) and isinstance(b.value, Number):
        left = Number(a.value.value * a.unit.size)
        return same_number(judge, left, Number(b.value.value * b.unit.size))
    return a.unit == b.unit and judge.equal(a.value, b.value)


def without_unit(judge: Judge, quantity: Quantity, plain: Kind) -> bool:
    """A unit may be left out; p% is p and p/100."""
    if quantity.unit.powers == PERCENT and isinstance(quantity.value, Number):
        share = Number(quantity.value.value / 100)
        if judge.equal(share, plain):
            return True
    return judge.equal(quantity.value, plain)


def same_in_base(judge: Judge, a: BaseNumber, b: BaseNumber) -> bool:
    return a.value == b.value


def without_base(judge: Judge, a: BaseNumber, b: Number) -> bool:
    return b.value == a.value or b.text.lower() == a.digits


def same_ratio(judge: Judge, a: Ratio, b: Ratio) -> bool:
    if judge.all_equal(a.items, b.items):
        return True
    items = a.items + b.items
    if len(a.items) != len(b.items) or not all(isinstance(item, Number) for item in items):
        return False
    first, second = a.items[0].value, b.items[0].value
    pairs = zip(a.items, b.items, strict=True)
    return all(left.value * second == right.value * first for left, right in pairs)


def ratio_and_number(judge: Judge, a: Ratio, b: Number) -> bool:
    first, *rest = a.items
    if len(rest) != 1 or not isinstance(first, Number) or not isinstance(rest[0], Number):
        return False
    return first.value == b.value * rest[0].value


def clock_and_number(judge: Judge, a: Clock, b: Number) -> bool:
    return not a.half and a.hour == b.value * a.minute > 0


# ------------------------------------------------------------------------------- collections


def same_items(judge: Judge, a: Any, b: Any) -> bool:
    """Each item of one equals its own item of the other, in any order."""
    if len(a.items) != len(b.items):
        return False
    left = list(b.items)
    for item in a.items:
        same = next((other for other in left if item == other), None)
        if same is None:
            same = next((other for other in left if judge.equal(item, other)), None)
        if same is None:
            return False
        left.remove(same)
    return True


def same_collection(judge: Judge, a: Collection, b: Collection) -> bool:
    """If only one side names its values, and each by a name of its own, their order counts."""
    for named, plain in ((a, b), (b, a)):
        values = named_values(named)
        if values and not any(isinstance(item, Equation) for item in plain.items):
            return judge.all_equal(values, plain.items)
    return same_items(judge, a, b)


def named_values(collection: Collection) -> tuple[Kind, ...]:
    """The values of a=1, b=2; none if a name repeats, as in x=1, x=2 and in x_1=1, x_2=2."""
    equations = [item for item in collection.items if isinstance(item, Equation) and item.name]
    names = {item.name.partition("_")[0] for item in equations}
    if len(names) < len(collection.items):
        return ()
    return tuple(item.right for item in equations)


def sequence_and_list(judge: Judge, a: Sequence, b: Collection) -> bool:
    """A tuple is not a set, but a list without braces may be a tuple without brackets."""
    values = named_values(b) or b.items
    return not b.braces and judge.all_equal(a.items, values)


def same_sequence(judge: Judge, a: Sequence, b: Sequence) -> bool:
    if len(a.items) == 2 and a.bracket != b.bracket:
        return False  # an open and a closed interval
    return judge.all_equal(a.items, b.items)


def same_matrix(judge: Judge, a: Matrix, b: Matrix) -> bool:
    pairs = zip(a.rows, b.rows, strict=False)
    return len(a.rows) == len(b.rows) and all(judge.all_equal(*pair) for pair in pairs)


def list_and_number(judge: Judge, a: Collection, b: Number) -> bool:
    """`0,5` is also a decimal, and `100,200` also a list."""
    if re.fullmatch(r"-?\d+,\d+", a.text) and Number(plain_number(a.text.replace(",", "."))) == b:
        return True
    if "," in b.text:
        return same_items(judge, a, Collection(parse_all(b.text.split(","))))
    return False


def same_interval(judge: Judge, a: Interval, b: Interval) -> bool:
    if (a.low_closed, a.high_closed) != (b.low_closed, b.high_closed):
        return False
    if a.subject and b.subject and a.subject != b.subject:
        return False
    return judge.equal(a.low, b.low) and judge.equal(a.high, b.high)


def interval_and_pair(judge: Judge, a: Interval, b: Sequence) -> bool:
    return len(b.items) == 2 and same_interval(judge, a, found_interval(b))


# ------------------------------------------------------------------------------- statements


def same_equation(judge: Judge, a: Equation, b: Equation) -> bool:
    if a.name and a.name == b.name:
        return judge.equal(a.right, b.right)
    numbers = isinstance(a.right, Number), isinstance(b.right, Number)
    if (a.name and b.name and any(numbers)) or (a.name and numbers[0]) or (b.name and numbers[1]):
        return False
    sides = [f"{side.left}-({side.right.text})" for side in (a, b)]
    return judge.expressions(*sides, relation="proportional")


def named_value(judge: Judge, a: Equation, b: Kind) -> bool:
    return bool(a.name) and judge.equal(a.right, b)


def stated_value(judge: Judge, reference: Kind, answer: Equation) -> bool:
    """An answer may show what it is the value of: `x+y=18`, `9 \\cdot 2 = 18`."""
    return judge.equal(reference, answer.right)


def choice_and_content(judge: Judge, a: Choice, b: Kind) -> bool:
    if a.content:
        return judge.equal(parse_all([a.content])[0], b)
    return isinstance(b, Expression) and judge.expressions(a.letters, b.latex)


def no_solution(judge: Judge, a: Words, b: Collection) -> bool:
    return not b.items and re.match(r"(?:no|empty) \w+", a.phrase) is not None


def never(judge: Judge, a: Kind, b: Kind) -> bool:
    """Kinds that are equal only if all their fields are."""
    return False


Rule = Callable[[Judge, Any, Any], bool]
# (kind of the reference, kind of the answer): the rule. A pair also stands for the swapped pair,
# unless that has a rule of its own.
RULES: dict[tuple[type, type], Rule] = {
    (Number, Number): same_number,
    (Number, Expression): number_and_expression,
    (Expression, Number): expression_and_number,
    (Expression, Expression): same_expression,
    (Complex, Expression): complex_and_expression,
    (Quantity, Quantity): same_quantity,
    (Quantity, Number): without_unit,
    (Quantity, Expression): without_unit,
    (BaseNumber, BaseNumber): same_in_base,
    (BaseNumber, Number): without_base,
    (Ratio, Ratio): same_ratio,
    (Ratio, Number): ratio_and_number,
    (Clock, Number): clock_and_number,
    (Sequence, Sequence): same_sequence,
    (Sequence, Collection): sequence_and_list,
    (Matrix, Matrix): same_matrix,
    (Collection, Collection): same_collection,
    (Collection, Number): list_and_number,
    (Interval, Interval): same_interval,
    (Interval, Sequence): interval_and_pair,
    (Union, Union): same_items,
    (Equation, Equation): same_equation,
    (Equation, Kind): named_value,
    (Kind, Equation): stated_value,
    (Congruence, Congruence): never,
    (Choice, Choice): never,
    (Choice, Kind): choice_and_content,
    (Words, Words): never,
    (Words, Collection): no_solution,
}
