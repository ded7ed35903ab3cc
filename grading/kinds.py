r"""The kinds of answers, and how a text is read as one of them.

Each kind has examples in its docstring: A `reference` is `right`, `right`, not `wrong`. They are
tests. `read` of a kind returns None for a text of another kind; `parse` asks the kinds in the order
of `KINDS`. rules.py holds which kinds may be equal.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

from grading.answers import NUMBER, plain_number
from grading.notation import tidy
from grading.units import Unit, read_unit

MAX_DEPTH = 24  # of brackets; a deeper text is not read
OPEN, CLOSE = r"\\\{|\\langle|\\begin|[({\[]", r"\\\}|\\rangle|\\end|[)}\]]"
COMMA = r"[,;]|\\\\"
LIST = rf"(?:{COMMA}) *(?:and|or)\b|{COMMA}|\b(?:and|or)\b"
MIXED = r"(?<![\w.^}/])(\d+)(?: and | )?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))(?![\d/.^])"
REPEATING = (
    r"(\d*)\.(\d*)(?:\\(?:overline|dot) *\{?(\d+)\}?(?:(\d*)\\dot *\{?(\d)\}?)?|\((\d+)\))(?!\d)"
)
LETTER = r"(?:[A-Za-z]|\\(?:[a-z]*(?:alpha|beta|gamma|delta|eta|theta|lambda|mu|omega|phi|rho|sigma|tau)))"
INDEX = r"(?:_(?:\{[^{}]*\}|\w)|'+)*"
# x, a_1, f(3), P(A), |AB|, AB, Area, \angle ABC, \overline{AB}
NAME = re.compile(
    rf"(?:[A-Za-z ]{{3,}}|{LETTER}{INDEX}(?: ?\([\w, ]+\))?|\|?[A-Z]{{2,}}{INDEX}\|?|\|{LETTER}\|"
    r"|(?:[A-Za-z]+ )?\\(?:angle|overline|overrightarrow|vec|triangle|max|min)\b ?\{?[A-Za-z]*\}?"
    r"|[a-z]\^\{-1\}\(\w\)|\\frac\{d\w?\}\{d\w\}|\(\w(?:, ?\w)+\))"
)
# Operations that are left to do, so that the answer is not yet a number
UNEVALUATED = r"(?<=[\w)}!]) *[-+] *(?!\d*\})|[*!]|\\(?:cdot|times|sum|prod|int|lim|log|ln|sin|cos|tan|gcd)"
PRODUCT = r"[a-h]{1,3}|[xyztuvw]{1,4}|[k-n]{1,3}|[p-s]{1,3}|mc|AM|PM"  # letters, not a word
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])")


def split(text: str, separator: str) -> list[str]:
    """Split at the separators outside all brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"(?P<open>{OPEN})|(?P<close>{CLOSE})|(?P<separator>{separator})", text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def unwrap(text: str) -> tuple[str, str, str] | None:
    """The bracket that encloses the whole text, what is in it, and the bracket that closes it."""
    depth = 0
    for token in re.finditer(rf"(?P<open>{OPEN})|{CLOSE}", text):
        if depth == 0:
            first = token
        depth += 1 if token["open"] else -1
        if depth == 0:
            whole = first.start() == 0 and token.end() == len(text)
            return (first[0], text[first.end() : token.start()].strip(), token[0]) if whole else None
    return None


def parse_all(texts: list[str]) -> tuple["Kind", ...]:
    return tuple(parse(text) for text in texts if text)


@dataclass(frozen=True)
class Kind:
    """An answer. `text` is its tidy text; kinds of equal fields are equal whatever their text."""

    text: str = field(default="", compare=False, kw_only=True)

    @classmethod
    def read(cls, text: str) -> "Kind | None":
        raise NotImplementedError


@dataclass(frozen=True)
class Number(Kind):
    r"""A number: `0.5` is `\frac12`, `.50`, `5 \times 10^{-1}`, `5e-1`, not `0.51`, `0.5?`."""

    value: Fraction | float

    @classmethod
    def read(cls, text: str) -> Kind | None:
        infinity = re.fullmatch(r"([-+]?) ?\\infty", text)
        if infinity:
            return Number(math.copysign(math.inf, int(infinity[1] + "1")))
        value = plain_number(text)
        return None if value is None else Number(value)


@dataclass(frozen=True)
class MixedNumber(Number):
    r"""A mixed number: `\frac72` is `3\frac12`, `3 1/2`, `3 \text{ and } \frac12`, not `\frac32`."""

    @classmethod
    def read(cls, text: str) -> Kind | None:
        match = re.fullmatch(rf"([-+]?) ?{MIXED}", text)
        if match is None or len(text) > 60:
            return None
        sign, whole, *parts = match.groups()
        above, below = (int(part) for part in parts if part)
        if not above < below:
            return None
        return MixedNumber(int(sign + "1") * (int(whole) + Fraction(above, below)))


@dataclass(frozen=True)
class RepeatingDecimal(Number):
    r"""A repeating decimal: `\frac16` is `0.1\overline{6}`, `0.1\dot{6}`, `0.1(6)`, not `0.16`."""

    @classmethod
    def read(cls, text: str) -> Kind | None:
        match = re.fullmatch(rf"([-+]?){REPEATING}", text)
        if match is None or len(text) > 60:
            return None
        sign, whole, digits, *parts = match.groups(default="")
        period = "".join(parts)
        value = int("0" + whole + digits) + Fraction(int(period), 10 ** len(period) - 1)
        return RepeatingDecimal(int(sign + "1") * value / 10 ** len(digits))


@dataclass(frozen=True)
class BaseNumber(Kind):
    r"""A number in a base: `101_2` is `(101)_{\text{two}}`, `101 \text{ (base 2)}`, `5`, `101`, not
    `101_3`. The base may be left out."""

    digits: str
    base: int

    NAMES: ClassVar[list[str]] = "two three four five six seven eight nine ten".split()

    @classmethod
    def read(cls, text: str) -> Kind | None:
        pattern = r"\(?([\dA-Z]{1,40})\)?(?:_\{? ?(\w+) ?\}?|,? \(?(?:in )?base[- _]\{?(\w+)\}?\)?)"
        match = re.fullmatch(pattern, text)
        if match is None:
            return None
        name = match[2] or match[3]
        if name in cls.NAMES:
            name = str(2 + cls.NAMES.index(name))
        if not name.isdecimal() or len(name) > 2 or not 2 <= int(name) <= 36:
            return None
        digits = match[1].lower()
        if any(int(digit, 36) >= int(name) for digit in digits):
            return None
        return BaseNumber(digits, int(name))

    @property
    def value(self) -> Fraction:
        return Fraction(int(self.digits, self.base))


@dataclass(frozen=True)
class Quantity(Kind):
    r"""A number or expression with a unit: `1 km` is `1000 \text{ m}`, `1`, not `1 m`, `1 km^2`."""

    value: Kind
    unit: Unit

    CURRENCY: ClassVar[str] = r"\\?\$|[€£¥₹]|(?:US|USD|EUR|GBP|INR|Rs)\b\.?(?: *\\?\$)?|\\pounds"
    START: ClassVar[str] = r"(?<![\\A-Za-z_{])[A-Za-z]{2}|(?<= )[A-Za-z](?![\w(])|[%€£₹元¥¢']|\^\\circ|\\[$%]"

    @classmethod
    def read(cls, text: str) -> Kind | None:
        currency = re.match(rf"(-?) *({cls.CURRENCY}) *(?=[-\d.\\(])", text)
        rest, money = text, ""
        if currency:
            rest = currency[1] + text[currency.end() :]
            money = currency[2].strip("\\.").replace("pounds", "£")[-3:]
            rest = re.sub(r"(?<=\d)(?=[kKMB]$)", " ", rest)  # $5M
        start = re.search(cls.START, rest)
        begin = start.start() if start else len(rest)
        unit = read_unit(f"{money} {rest[begin:]}" if not rest[begin:].strip() else rest[begin:])
        if unit is None or (not currency and not start) or rest.count("{", 0, begin) != rest.count("}", 0, begin):
            return None
        return cls.make(rest[:begin].strip(), unit)

    @classmethod
    def make(cls, text: str, unit: Unit) -> Kind | None:
        value = parse(text)
        if isinstance(value, Number):
            value = Number(value.value * unit.scale)
        elif not isinstance(value, Expression) or unit.scale != 1 or "_" in text or re.search(r"\\(?:sin|cos|tan|cot)", text):
            return None
        return Quantity(value, unit._replace(scale=Fraction(1))) if unit.powers else value


@dataclass(frozen=True)
class Compound(Quantity):
    r"""Parts of one quantity: `5 feet 3 inches` is `63 inches`, `5.25 ft`, not `5 feet`, `5`."""

    @classmethod
    def read(cls, text: str) -> Kind | None:
        parts = re.findall(rf"({NUMBER})([^\d.]+)", text)
        if len(parts) < 2 or "".join(itertools.chain(*parts)) != text:
            return None
        total, last = Fraction(0), None
        for number, words in parts:
            unit = read_unit(re.sub(r",? *\band\b *$|, *$", "", words))
            if unit is None or not unit.powers:
                return None
            if last and (unit.powers != last.powers or unit.size >= last.size):
                return None
            total += plain_number(number) * unit.scale * unit.size
            last = unit
        return Compound(Number(total / last.size), last._replace(scale=Fraction(1)))


@dataclass(frozen=True)
class Clock(Kind):
    r"""A time of day: `3:30 PM` is `3{:}30\text{ p.m.}`, `15:30`, not `3:30`, `3:30 AM`, `6:60`."""

    hour: int
    minute: int
    half: str = ""

    @classmethod
    def read(cls, text: str) -> Kind | None:
        match = re.fullmatch(r"(\d\d?):(\d\d)(?: ?([aApP])\.? ?[mM]\.?)?", text)
        if match is None or int(match[1]) > 23 or int(match[2]) > 59:
            return None
        hour, half = int(match[1]), (match[3] or "").lower()
        if half:
            hour = hour % 12 + 12 * (half == "p")
        elif hour > 12:
            half = "p"
        return Clock(hour, int(match[2]), half)


@dataclass(frozen=True)
class Ratio(Kind):
    r"""A ratio: `2:4` is `1:2`, `1 \text{ to } 2`, `\frac12`, not `2:1`, `2:4:6`."""

    items: tuple[Kind, ...]

    @classmethod
    def read(cls, text: str) -> Kind | None:
        parts = split(text, r":(?!=)|\bto\b")
        if len(parts) < 2 or not all(parts):
            return None
        items = parse_all(parts)
        return Ratio(items) if all(isinstance(item, Number | Expression) for item in items) else None


@dataclass(frozen=True)
class Complex(Kind):
    r"""A complex number: `1+2i` is `2i + 1`, `1+2\mathrm{i}`, `(1+2i)`, not `1-2i`, `2+i`."""

    real: Fraction
    imaginary: Fraction

    @classmethod
    def read(cls, text: str) -> Kind | None:
        text = text.replace(" ", "")
        match = re.fullmatch(rf"({NUMBER})?([-+]?(?:{NUMBER})?)i([-+].+)?", text)
        if match is None:
            return None
        factor = match[2] if match[2] not in ("", "+", "-") else match[2] + "1"
        real, imaginary = plain_number(match[1] or match[3] or "0"), plain_number(factor)
        if real is None or imaginary is None or (match[1] and (match[3] or match[2][:1] not in ("+", "-"))):
            return cls.read_product(text)
        return Complex(real, imaginary)

    @classmethod
    def read_product(cls, text: str) -> Kind | None:
        value = plain_number(text.removesuffix("i"))
        return Complex(Fraction(0), value) if value is not None and text.endswith("i") else None


@dataclass(frozen=True)
class Sequence(Kind):
    r"""A tuple, point or vector: `(1,2)` is `(1;2)`, `\langle 1, 2\rangle`, `x=1, y=2`, `1,2`, not
    `(2,1)`, `\{1,2\}`, `[1,2]`."""

    items: tuple[Kind, ...]
    bracket: str = "("

    @classmethod
    def read(cls, text: str) -> Kind | None:
        brackets = unwrap(re.sub(r"\^(?:T|\{T\}|\\top)$", "", text))
        if brackets is None or brackets[0] not in ("(", "[", "\\langle"):
            return None
        left, inner, right = brackets
        parts = split(inner, COMMA)
        if left == "(" and len(parts) == 1:
            return parse(inner)
        items = parse_all(parts)
        if left + right in ("(]", "[)"):
            return Interval(*items, left == "[", right == "]") if len(items) == 2 else None
        return Sequence(items, "[" if left == "[" else "(")


@dataclass(frozen=True)
class Matrix(Kind):
    r"""A matrix: `\begin{pmatrix}2&0\\0&2\end{pmatrix}` is `2\begin{bmatrix}1&0\\0&1\end{bmatrix}`,
    not `\begin{pmatrix}2&0\\0&1\end{pmatrix}`. One of a single row or column is a tuple."""

    rows: tuple[tuple[Kind, ...], ...]

    @classmethod
    def read(cls, text: str) -> Kind | None:
        pattern = r"([^\\]*?|\\frac\{\d+\}\{\d+\}) ?[\[(]?\\begin\{([pb]?matrix|array)\}(?:\{[clr|]+\})?(.*)\\end\{\2\}[\])]?"
        match = re.fullmatch(pattern, text)
        if match is None:
            return None
        factor = plain_number(match[1].replace("-", "-1") if match[1] == "-" else match[1] or "1")
        if factor is None or "\\begin" in match[3]:
            return None
        rows = []
        for line in match[3].split(r"\\"):
            row = parse_all([cell.strip() for cell in line.split("&")])
            if factor != 1:
                if not all(isinstance(cell, Number) for cell in row):
                    return None
                row = tuple(Number(factor * cell.value) for cell in row)
            if row:
                rows.append(row)
        if len(rows) == 1 or all(len(row) == 1 for row in rows):
            return Sequence(tuple(itertools.chain(*rows)))
        return Matrix(tuple(rows))


@dataclass(frozen=True)
class Collection(Kind):
    r"""A set or a list, in any order: `\{1,2\}` is `2,1`, `1 \text{ or } 2`, `x=1, x=2`, not `1`,
    `(1,2)`; `\pm 2` is `2,-2`, not `2`."""

    items: tuple[Kind, ...]
    braces: bool = False

    @classmethod
    def read(cls, text: str) -> Kind | None:
        if text in (r"\emptyset", r"\{\}"):
            return Collection((), True)
        brackets = unwrap(text)
        braces = brackets is not None and brackets[0] == r"\{"
        if braces:
            text = brackets[1]
            builder = split(text, r"\||:(?!=)")
            if len(builder) == 2:
                return parse(builder[1])
        else:
            text = re.sub(r"\\(begin|end)\{(?:cases|aligned|align\*?|array|gathered)\}", "", text).replace("&", "")
        parts = [part for part in split(text, LIST) if part]
        signed = list(itertools.chain(*map(plus_and_minus, parts)))
        if not braces and len(signed) < 2:
            return None
        items = []
        for item in parse_all(signed):
            same_level = isinstance(item, Collection) and not item.braces
            items += item.items if same_level else [item]
        return items[0] if len(items) == 1 else Collection(tuple(items), braces)


def plus_and_minus(text: str) -> list[str]:
    r"""Both values of `1\pm 2`. Several signs change together."""
    if "\\pm" not in text:
        return [text]
    plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
    minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return [re.sub(r"(^|[=(,]) *\+ *", r"\1", plus), minus]


@dataclass(frozen=True)
class Interval(Kind):
    r"""An interval, an inequality or a chain: `[1,2)` is `1 \le x < 2`, `x \in [1;2)`,
    `\{x \mid x<2, x \ge 1\}`, not `[1,2]`, `1 \le x`; `x>3` is `3<x`, `(3,\infty)`, not `x \ge 3`."""

    low: Kind
    high: Kind
    low_closed: bool = False
    high_closed: bool = False
    subject: str = ""

    @classmethod
    def read(cls, text: str) -> Kind | None:
        if re.fullmatch(r"\\mathbb\{R\}|all real(?: number)?s?", text):
            return REALS
        member = re.fullmatch(r"([^,]+?)\\in(?![a-z])(.+)", text)
        if member:
            found = parse(member[2].strip())
            if isinstance(found, Sequence) and len(found.items) == 2:
                found = found_interval(found)
            return found if isinstance(found, Interval | Union | Collection) else None
        sign = r"\\[lg]e(?![a-z])|[<>]"
        terms = split(text, sign)
        signs = re.findall(sign, text)
        if len(terms) - 1 != len(signs) or len(terms) not in (2, 3) or not all(terms):
            return None
        upward = [sign in ("<", r"\le") for sign in signs]
        if len(set(upward)) == 2:
            return None
        if not upward[0]:
            terms, signs = terms[::-1], signs[::-1]
        closed = [sign in (r"\le", r"\ge") for sign in signs]
        if len(terms) == 3:
            return Interval(parse(terms[0]), parse(terms[2]), *closed, terms[1])
        low, high = terms
        if NAME.fullmatch(high) or not re.search("[A-Za-z]", low):
            return Interval(parse(low), Number(math.inf), closed[0], False, high)
        return Interval(Number(-math.inf), parse(high), False, closed[0], low)


def found_interval(pair: Sequence) -> Interval:
    """`(1,2)` and `[1,2]` as intervals."""
    closed = pair.bracket == "["
    return Interval(*pair.items, closed, closed)


REALS = Interval(Number(-math.inf), Number(math.inf), text=r"\mathbb{R}")


@dataclass(frozen=True)
class Union(Kind):
    r"""A union: `(-\infty,1)\cup(2,\infty)` is `x<1 \text{ or } x>2`, not `x<1 \text{ and } x>2`;
    `\mathbb{R}\setminus\{1\}` is `x \ne 1`, `(-\infty,1)\cup(1,\infty)`."""

    items: tuple[Kind, ...]

    @classmethod
    def read(cls, text: str) -> Kind | None:
        without = re.split(r"\\ne(?![a-z])", text)
        if len(without) == 2 and NAME.fullmatch(without[0].strip()):
            return cls.around(parse(without[1].strip()))
        without = re.fullmatch(r"\\mathbb\{R\} *(?:\\setminus|-) *(\\\{.*\\\})", text)
        if without:
            return cls.around(parse(without[1]))
        parts = split(text, r"\\cup(?![a-z])|\bor\b")
        if len(parts) < 2:
            return cls.both(split(text, r"\band\b|,"))
        items = []
        for item in parse_all(parts):
            if r"\cup" in text and isinstance(item, Sequence) and len(item.items) == 2:
                item = found_interval(item)
            items.append(item)
        is_set = all(isinstance(item, Interval | Collection | Number | Union) for item in items)
        any_interval = any(isinstance(item, Interval) for item in items)
        return Union(tuple(items)) if is_set and any_interval else None

    @classmethod
    def around(cls, points: Kind) -> Kind | None:
        """All real numbers except some."""
        items = points.items if isinstance(points, Collection) else (points,)
        if not all(isinstance(item, Number) for item in items):
            return Union((REALS, *items)) if len(items) == 1 else None
        ends = [-math.inf, *sorted(item.value for item in items), math.inf]
        return Union(tuple(Interval(Number(a), Number(b)) for a, b in itertools.pairwise(ends)))

    @classmethod
    def both(cls, parts: list[str]) -> Kind | None:
        """Two inequalities of one variable, such as x > 1 and x < 2."""
        if len(parts) != 2 or not all(re.search(r"[<>]|\\[lg]e(?![a-z])", part) for part in parts):
            return None
        first, second = parse_all(parts)
        if not isinstance(first, Interval) or not isinstance(second, Interval):
            return None
        if first.high != Number(math.inf):
            first, second = second, first
        if first.subject != second.subject or first.high != Number(math.inf) or second.low != Number(-math.inf):
            return None
        return Interval(first.low, second.high, first.low_closed, second.high_closed, first.subject)


@dataclass(frozen=True)
class Equation(Kind):
    r"""An equation or assignment: `x=3` is `3`, `3=x`, not `y=3`, `2x=6`; `y=2x+1` is `2x+1`,
    `y-2x-1=0`, not `f=2x+1`; `18` is `x+y=18`; `xy=6` is `6=yx`, not `6`."""

    name: str  # the left side if it names the right side, else empty
    left: str
    right: Kind

    @classmethod
    def read(cls, text: str) -> Kind | None:
        parts = split(text, r"(?<![<>!:])=|\\Rightarrow|\\iff|\\implies")
        if len(parts) < 2 or not all(parts):
            return None
        left, right = parts[0], parts[-1]
        if NAME.fullmatch(right) and not NAME.fullmatch(left):
            left, right = right, left
        value = parse(right)
        names = re.fullmatch(r"\(([^()]*)\)", left)
        if names and isinstance(value, Sequence):
            each = [name.strip() for name in names[1].split(",")]
            if len(each) == len(value.items):
                equations = [Equation(name, name, item) for name, item in zip(each, value.items, strict=True)]
                return Collection(tuple(equations))
        name = left.replace(" ", "") if NAME.fullmatch(left) else ""
        return Equation(name, left, value)


@dataclass(frozen=True)
class Congruence(Kind):
    r"""A residue class: `x \equiv 3 \pmod 7` is `3 \pmod{7}`, `10 \bmod 7`, not `3`, `4 \pmod 7`."""

    residue: int
    modulus: int

    @classmethod
    def read(cls, text: str) -> Kind | None:
        pattern = r"(?:[\w ]+\\equiv)? *(-?\d{1,40}),? *(?:\\pmod|\\bmod|\\mod|\(? ?\\?(?:mod|modulo)\b)[ {]*(\d{1,40})[)} ]*"
        match = re.fullmatch(pattern, text)
        if match is None or not int(match[2]):
            return None
        return Congruence(int(match[1]) % int(match[2]), int(match[2]))


@dataclass(frozen=True)
class Choice(Kind):
    r"""A choice, perhaps with its text: `B` is `(B)`, `\textbf{(B)}\ 12`, `B: 12`, `Option B`, not
    `C`, `b`, `B \text{ or } C`; `A, C` is `AC`, `A \text{ and } C`, not `A`."""

    letters: str
    content: str = field(default="", compare=False)

    @classmethod
    def read(cls, text: str) -> Kind | None:
        several = re.sub(r"[ ,()&]|\band\b", "", text)
        if re.fullmatch("[A-J]{2,}", several) and list(several) == sorted(set(several)):
            return Choice(several)
        text = re.sub(r"(?i)^(?:the )?(?:correct |right )?(?:option|choice|answer)(?: is)?:? *(?=\(?[A-J]\b)", "", text)
        match = re.fullmatch(r"\(?([A-Z])\)?", text) or re.fullmatch(r"(?:\(([A-J])\)|([A-J])[).:])(?: (.*))?", text)
        if match is None:
            return None
        letter, *more = match.groups(default="")
        content = more[-1] if more else ""
        return None if re.search(r"\b(?:and|or)\b", content) else Choice(letter or more[0], content)


@dataclass(frozen=True)
class Words(Kind):
    r"""A word or phrase: `Yes` is `\text{yes}`, `Yes, it is`, not `no`; `\text{no solution}` is
    `\text{No solutions}`, `\emptyset`, not `no`; `east` is not `seat`."""

    phrase: str

    LAST: ClassVar[str] = r"(?<=[a-z])(?<!not) (?:exists?|triangle|function|sequence|curve|number)$"

    @classmethod
    def read(cls, text: str) -> Kind | None:
        plain = re.sub(r"_\{[^{}]*\}|\\[A-Za-z]+|\^\{[^{}]*\}", " ", text)
        words = [word for word in WORD.findall(plain) if not re.fullmatch(PRODUCT, word)]
        short = all(len(word) == 2 for word in words) and not re.fullmatch("(?i)no|on|so|up|we", text)
        unusual = re.search(r"[?@#\"]|\\(?:ldots|text)|\d \d", text)
        if not unusual and (not words or (short and " " not in text)):
            return None
        text = text.replace("DNE", "does not exist")
        phrase = " ".join(re.findall(r"\w+|[^\w\s.]", text)) or text
        phrase = re.sub(r"(?<=[a-z]{3})s\b|\b(?:the|a|an) ", "", phrase.casefold())
        phrase = re.sub(cls.LAST, "", phrase)
        return Words(phrase)


@dataclass(frozen=True)
class Expression(Kind):
    r"""Everything else goes to math-verify: `2\sqrt{3}` is `\sqrt{12}`, not `3.464`; `-1` is `i^2`;
    `\frac12` is `\sin 30^\circ`, but `7` is not `3+4`, which is not evaluated."""

    latex: str

    REWRITES: ClassVar[dict[str, str]] = {
        MIXED: r"(\1+\\frac{\2\4}{\3\5})",
        r"(?<=\d),(?=\d{3})": "",
        r"\b[Cc]_\{?(\d+)\}?\^\{?(\d+)\}?": r"\\binom{\1}{\2}",
        r"(?<=[\d)]) *(?=\()|(?<=\\pi) *(?=\()": r"\\cdot ",  # math-verify adds 2(3)
        r"\\(?=[%$])": "",
    }

    @classmethod
    def read(cls, text: str) -> Kind | None:
        latex = text
        for pattern, replacement in cls.REWRITES.items():
            latex = re.sub(pattern, replacement, latex)
        return Expression(latex)

    @property
    def unevaluated(self) -> bool:
        return re.search(UNEVALUATED, self.text) is not None


# The order in which they are tried
KINDS = (
    Choice, Clock, Number, MixedNumber, RepeatingDecimal, BaseNumber, Congruence, Compound, Union,
    Collection, Interval, Equation, Matrix, Sequence, Ratio, Quantity, Complex, Words, Expression,
)  # fmt: skip

# Sentences around an answer, and conditions after it
SENTENCE = (
    r"(?:[Tt]he )?(?:[A-Za-z]+ )*(?:is|are|equals)(?: equal to)?:? (?=.)|(?:[Tt]he )?(?:point|number|set|interval|vector) (?=[\d\\(\[])"
)
CONDITION = (
    r"(?:,| )? *\(?(?:\\text)? *(?:(?:where|for|with|when|if)\b.*|[a-z](?:, ?[a-z])* *\\in *\\mathbb\{[ZN]\}.*| is the \w+)$"
)


def bare(text: str) -> str:
    """Drop the sentence around an answer and the condition after it."""
    text = re.sub(r"^((?i:yes|no|true|false))[,.;:] \w+ \w.*", r"\1", text)  # Yes, it is
    text = re.sub(rf"^{SENTENCE}", "", text)
    shorter = re.sub(CONDITION, "", text).strip()
    return shorter or text


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Kind:
    """Read a tidy text as the first kind that it can be."""
    for kind in KINDS:
        found = kind.read(text)
        if found is not None:
            if not found.text:
                object.__setattr__(found, "text", text)
            return found
    raise AssertionError("an expression is any text")


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Kind | None:
    """Read an answer; None if it has too many brackets."""
    text = bare(tidy(text))
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            return None
    return parse(text)


def leaves(kind: Kind) -> Iterator[Expression]:
    """The expressions in an answer."""
    if isinstance(kind, Expression):
        yield kind
    for value in vars(kind).values():
        if isinstance(value, Kind):
            yield from leaves(value)
        elif isinstance(value, tuple):
            for item in itertools.chain(*(item if isinstance(item, tuple) else (item,) for item in value)):
                if isinstance(item, Kind):
                    yield from leaves(item)


def too_large(text: str, digits: int) -> bool:
    """Whether a power, a factorial or a binomial in a text may have too many digits to evaluate."""
    many = rf"\d{{{digits + 1}}}"
    tower = r"\^(?:\{[^{}]*|\w)\^|\)\^[^)]*\)\^|!\)*!"
    if re.search(rf"\^\{{?[^{{}}]*{many}|{tower}", text):
        return True
    return re.search(r"!|\\binom|[Cc]_", text) is not None and re.search(many, text) is not None
