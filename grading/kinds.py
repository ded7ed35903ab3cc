r"""The kinds of answers, and how a text is read as one of them.

Each docstring has examples: A `reference` is `right`, `right`, not `wrong`. They are tests.
`KINDS` is the order in which the kinds are tried. rules.py holds which kinds may be equal.
"""

import functools
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction

from grading.answers import NUMBER, plain_number
from grading.notation import rewrite, tidy
from grading.units import Unit, read_unit

MAX_DEPTH = 24  # of brackets; a deeper text is not read
BRACKETS = r"(?P<open>\\\{|\\langle|\\begin|[({\[])|(?P<close>\\\}|\\rangle|\\end|[)}\]])"
COMMA = r"[,;]|\\\\"
LIST = rf"(?:{COMMA}) *(?:and|or)\b|{COMMA}|\b(?:and|or)\b"
BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MIXED = r"(?<![\w.^}/])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}(?![\d/.^])"  # 3\frac{1}{2}
ENVIRONMENT = r"\\(?:begin|end)\{(?:cases|aligned|align\*?|array|gathered)\}|&"

LETTER = r"(?:[A-Za-z]|\\(?:(?:var)?[a-z]?eta|alpha|gamma|delta|lambda|mu|omega|phi|rho|sigma|tau))"
INDEX = r"(?:_(?:\{[^{}]*\}|\w)|'+)*"
# Area; x, a_1, f(3), P(A); |AB|, AB; \angle ABC, \overline{AB}; f^{-1}(x); \frac{dy}{dx}; (x, y)
NAME = re.compile(
    rf"[A-Za-z ]{{3,}}|{LETTER}{INDEX}(?: ?\([\w, ]+\))?|\|?[A-Z]{{2,}}{INDEX}\|?|\|{LETTER}\|"
    r"|(?:\w+ )?\\(?:angle|overline|overrightarrow|vec|triangle|max|min)\b ?\{?[A-Za-z]*\}?"
    r"|[a-z]\^\{-1\}\(\w\)|\\frac\{d\w?\}\{d\w\}|\\frac\{[A-Z]+\}\{[A-Z]+\}|\(\w(?:, ?\w)+\)"
    r"|[A-Z](?:_\{\w+\}|\w)* ?[:/] ?[A-Z](?:_\{\w+\}|\w)*"
)
PRODUCT = r"[a-h]{1,3}|[xyztuvw]{1,4}|[k-n]{1,3}|[p-s]{1,3}|mc"  # letters, not a word
WORD = r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])"
PHRASE = {
    r"[\s.]+": " ",
    "^dne$": "does not exist",
    r"(?<=[a-z]{3})s\b|\b(?:the|an?) ": "",
    r"(?<=[a-z])(?<!not) (?:exist|triangle|function|sequence|curve|number)$": "",
}
# Operations that are left to do, so that an answer is not yet a number
OPERATION = (
    r"(?<=[\w)}!]) *[-+] *(?!\d*\})|[*!]|\\(?:cdot|times|sum|prod|int|lim|log|ln|sin|cos|tan|gcd)"
)
AROUND = {  # what stands around an answer: a sentence, a condition
    r"^((?i:yes|no|true|false))[,.;:] \w+ \w.*": r"\1",  # Yes, it is
    r"^(?:[A-Za-z]+ )*(?:is|are|equals)(?: equal to)?:? (?=.)": "",
    r"^(?:[Tt]he )?(?:point|number|set|interval|vector) (?=[\d\\(\[])": "",
    r"(?<=.)[, (]+(?:where\b|for (?:all|every|any|some)\b|[a-z] *\\in *\\mathbb\{[ZN]\}).*$": "",
    r"(?<=\w) is the [a-z]+$": "",
}


def split(text: str, separator: str) -> list[str]:
    """Split at the separators outside all brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(f"{BRACKETS}|{separator}", text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def unwrap(text: str) -> tuple[str, str, str]:
    """The bracket that encloses the whole text, what is in it, and the bracket that closes it."""
    depth = 0
    first = re.match(BRACKETS, text)
    for token in re.finditer(BRACKETS, text):
        depth += 1 if token["open"] else -1
        if depth == 0:
            if first and token.end() == len(text):
                return first[0], text[first.end() : token.start()].strip(), token[0]
            break
    return "", text, ""


kind = dataclass(frozen=True)


@kind
class Kind:
    """An answer. Kinds of equal fields are equal, whatever their text."""

    text: str = field(default="", compare=False, kw_only=True)

    @staticmethod
    def read(text: str) -> "Kind | None":
        """Read a tidy text; None if it is of another kind."""


@kind
class Number(Kind):
    r"""A number: `0.5` is `\frac12`, `.50`, `5 \times 10^{-1}`, `5e-1`, not `0.51`, `0.5?`."""

    value: Fraction | float

    @staticmethod
    def read(text):
        infinity = re.fullmatch(r"([-+]?)(?:\\infty|[Ii]nfinity)", text)
        if infinity:
            return Number(float(f"{infinity[1]}inf"))
        value = plain_number(text)
        if value is not None:
            return Number(value)


@kind
class MixedNumber(Number):
    r"""A mixed number: `\frac72` is `3\frac12`, `3 1/2`, `3 \text{ and } \frac12`, not
    `\frac32`."""

    @staticmethod
    def read(text):
        match = re.fullmatch(rf"(-?){MIXED}", text)
        if match and len(text) < 60:
            sign, whole, above, below = match.groups()
            if int(above) < int(below):
                return MixedNumber(Fraction(int(sign + whole)) + Fraction(f"{sign}{above}/{below}"))


@kind
class RepeatingDecimal(Number):
    r"""A repeating decimal: `\frac16` is `0.1\overline{6}`, `0.1\dot{6}`, `0.1(6)`, `0.1666\ldots`,
    not `0.16`."""

    @staticmethod
    def read(text):
        match = re.fullmatch(r"(-?)(\d*)\.(\d*)\\overline\{(\d+)\}", text)
        if match and len(text) < 60:
            sign, whole, digits, period = match.groups()
            once = int(f"0{whole}{digits}")
            twice = int(f"0{whole}{digits}{period}")
            value = Fraction(twice - once, (10 ** len(period) - 1) * 10 ** len(digits))
            return RepeatingDecimal(-value if sign else value)


@kind
class BaseNumber(Kind):
    r"""A number in a base: `101_2` is `(101)_{\text{two}}`, `101 \text{ (base 2)}`, `5`, not
    `101_3`; `101_2` is `101`: the base may be left out."""

    digits: str = field(compare=False)
    value: int

    @staticmethod
    def read(text):
        match = re.fullmatch(r"\(?([\dA-Za-z]{1,40})\)?_\{?\(?([1-9]\d?|[a-z]+)\)?\}?", text)
        if match:
            base = match[2]
            if base in BASES:
                base = 2 + BASES.index(base)
            with suppress(ValueError):  # not a base, or not its digits
                base = int(base)
                return BaseNumber(match[1].lower(), int(match[1], base))


@kind
class Congruence(Kind):
    r"""A residue class: `x \equiv 3 \pmod 7` is `3 \pmod{7}`, `10 \bmod 7`, not `3`,
    `4 \pmod 7`."""

    residue: int
    modulus: int

    @staticmethod
    def read(text):
        match = re.fullmatch(
            r"(?:[\w ]+\\equiv)? *(-?\d{1,40}),? *\(? ?\\?[pb]?mod(?:ulo)?[ {]*(\d{1,40})[)} ]*",
            text,
        )
        if match and int(match[2]):
            modulus = int(match[2])
            return Congruence(int(match[1]) % modulus, modulus)


@kind
class Clock(Kind):
    r"""A time of day: `3:30 PM` is `3{:}30\text{ p.m.}`, `15:30`, not `3:30`, `3:30 AM`, `6:60`."""

    minutes: int
    half: str

    @staticmethod
    def read(text):
        match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)(?: ?([aApP])\.? ?[mM]\.?)?", text)
        if match:
            hour, half = int(match[1]), (match[3] or "").lower()
            if half:
                hour = hour % 12 + 12 * (half == "p")
            elif hour > 12:
                half = "p"
            return Clock(60 * hour + int(match[2]), half)


@kind
class Quantity(Kind):
    r"""A number or expression with a unit: `1 km` is `1000 \text{ m}`, `1`, not `1 m`, `1 km^2`;
    `5000000` is `\$5 \text{ million}`, not `5 \text{ zorks}`; `50\%` is `0.5`, `50`, not `5`."""

    value: Kind
    unit: Unit

    @staticmethod
    def read(text):
        money = re.match(
            r"(-?) *(\\?\$|[€£¥₹]|(?:US|USD|EUR|GBP|INR|Rs)\b\.?(?: *\\?\$)?) *(?=[-\d.\\(])",
            text,
        )
        words = ""
        if money:
            words = money[2].replace("US\\", "")
            text = money[1] + re.sub(r"(?<=\d)[kKMB]$", r" \g<0>", text[money.end() :])  # $5M
        found = re.search(
            r"(?<![\\A-Za-z_{])[A-Za-z]{2}|(?<= )[A-Za-z](?![\w(])|[%€£₹元¥¢']|\^\\circ|\\[$%]",
            text,
        )
        start = found.start() if found else len(text)
        unit = read_unit(f"{words} {text[start:]}")
        if unit is None or not (found or money):
            return None
        value = text[:start].strip()
        if not value or re.search(r"\\(?:sin|cos|tan|cot)|\{[^}]*$", value):
            return None
        return with_unit(parse(value), unit)


def with_unit(value: Kind, unit: Unit) -> Kind | None:
    if isinstance(value, Number):
        value = Number(value.value * unit.scale)
    elif not isinstance(value, Expression) or unit.scale != 1:
        return None
    return Quantity(value, unit._replace(scale=1)) if unit.powers else value


@kind
class Compound(Quantity):
    r"""Parts of one quantity: `5 feet 3 inches` is `63 inches`, `5.25 ft`, not `5 feet`, `63`."""

    @staticmethod
    def read(text):
        parts = re.findall(rf"({NUMBER})([^\d.]+)", text[:100])
        if len(parts) < 2 or "".join(number + words for number, words in parts) != text:
            return None
        total, last = 0, None
        for number, words in parts:
            value, unit = plain_number(number), read_unit(re.sub(r",? *\band *$|, *$", "", words))
            if value is None or unit is None or not unit.powers:
                return None
            if last and (unit.powers != last.powers or unit.size >= last.size):
                return None
            total += value * unit.scale * unit.size
            last = unit
        return Compound(Number(total / last.size), last._replace(scale=1))


@kind
class Union(Kind):
    r"""A union: `(-\infty,1)\cup(2,\infty)` is `x<1 \text{ or } x>2`, not `x<1 \text{ and } x>2`;
    `\mathbb{R}\setminus\{1\}` is `x \ne 1`, `(-\infty,1)\cup(1,\infty)`."""

    items: tuple[Kind, ...]

    @staticmethod
    def read(text):
        without = re.fullmatch(r"(.+?)(?:\\ne(?![a-z])|\\setminus|-) *(\\\{.*\\\}|\S+)", text)
        if without and (without[1].strip() == r"\mathbb{R}" or r"\ne" in text):
            points = parse(without[2])
            points = getattr(points, "items", (points,))
            if all(isinstance(point, Number) for point in points):
                ends = sorted([Interval.LOW, *points, Interval.HIGH], key=lambda end: end.value)
                return Union(tuple(map(Interval, ends, ends[1:])))
        parts = split(text, r"\\cup(?![a-z])|\bor\b")
        if len(parts) < 2:
            return None
        items = list(parse_all(parts))
        if r"\cup" in text:
            items = list(map(as_interval, items))
        sets = all(isinstance(item, Interval | Collection | Number | Union) for item in items)
        if sets and any(isinstance(item, Interval) for item in items):
            return Union(tuple(items))


@kind
class Collection(Kind):
    r"""A set or a list, in any order: `\{1,2\}` is `2,1`, `1 \text{ or } 2`, `x=1, x=2`, not `1`,
    `(1,2)`; `\pm 2` is `2,-2`, not `2`; `\emptyset` is `\{\}`, `\text{no solution}`, not `0`."""

    items: tuple[Kind, ...]
    braces: bool = False

    @staticmethod
    def read(text):
        if text == r"\emptyset":
            return Collection((), True)
        bracket, inner, _ = unwrap(text)
        braces = bracket == r"\{"
        if braces:
            text = inner
            builder = split(text, r"\||:(?!=)")
            if len(builder) == 2:
                return parse(builder[1])  # {x | x > 2}
        signed = []
        for part in split(re.sub(ENVIRONMENT, "", text), LIST):
            signed += plus_and_minus(part)
        if len(signed) < 2 and not braces:
            return None
        items = parse_all(signed)
        if len(items) == 1:
            return items[0]
        if len(items) == 2 and all(isinstance(item, Interval) for item in items):
            both = items[0].meet(items[1])
            if both and not braces:
                return both
        return Collection(items, braces)


def plus_and_minus(text: str) -> list[str]:
    r"""Both values of `1\pm 2`. Several signs change together."""
    if "\\pm" not in text:
        return [text]
    plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
    minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return [re.sub(r"(^|[=(,]) *\+ *", r"\1", plus), minus]


@kind
class Interval(Kind):
    r"""An interval, an inequality or a chain: `[1,2)` is `1 \le x < 2`, `x \in [1;2)`,
    `\{x \mid x<2, x \ge 1\}`, not `[1,2]`, `1 \le x`; `x>3` is `3<x`, `(3,\infty)`, not
    `x \ge 3`."""

    low: Kind
    high: Kind
    brackets: str = "()"
    subject: str = ""

    @staticmethod
    def read(text):
        if re.fullmatch(r"\\mathbb\{R\}|all real(?: number)?s?", text):
            return Interval(Interval.LOW, Interval.HIGH)
        _, *sets = split(text, r"\\in(?![a-z])")
        if len(sets) == 1:
            return as_interval(parse(sets[0]))

        pattern = r"\\[lg]e(?![a-z])|[<>]"
        terms, signs = split(text, pattern), re.findall(pattern, text)
        upward = {">": "<", r"\ge": r"\le"}
        if all(sign in upward for sign in signs):
            terms.reverse()
            signs = [upward[sign] for sign in reversed(signs)]
        if not 1 < len(terms) < 4 or len(terms) - len(signs) != 1 or upward.keys() & signs:
            return None
        left = "(["[signs[0] == r"\le"]
        right = ")]"[signs[-1] == r"\le"]
        first, last = terms[0], terms[-1]
        if len(terms) == 3:
            return Interval(parse(first), parse(last), left + right, terms[1])
        if NAME.fullmatch(last) or not re.search("[A-Za-z]", first):
            return Interval(parse(first), Interval.HIGH, left + ")", last)
        return Interval(Interval.LOW, parse(last), "(" + right, first)

    def meet(self, other):
        """`x>1` and `x<2` are one interval."""
        lower, upper = self, other
        if lower.low == Interval.LOW:
            lower, upper = other, self
        if (lower.high, upper.low, upper.subject) == (Interval.HIGH, Interval.LOW, lower.subject):
            brackets = lower.brackets[0] + upper.brackets[1]
            return replace(lower, high=upper.high, brackets=brackets)


Interval.LOW, Interval.HIGH = Number(-math.inf), Number(math.inf)


@kind
class Equation(Kind):
    r"""An equation or assignment: `x=3` is `3`, `3=x`, not `y=3`, `2x=6`; `y=2x+1` is `2x+1`,
    `y-2x-1=0`, not `f=2x+1`; `18` is `x+y=18`; `xy=6` is `6=yx`, not `6`."""

    name: str  # the left side if it names the right side, else empty
    left: str
    right: Kind

    @staticmethod
    def read(text):
        left, *others = split(text, r"(?<![<>!:])=|\\Rightarrow|\\iff|\\implies")
        if not others or not left or not others[-1]:
            return None
        right = others[-1]
        if NAME.fullmatch(right) and not NAME.fullmatch(left):
            left, right = right, left
        match = NAME.fullmatch(left)
        return Equation(match[0].replace(" ", "") if match else "", left, parse(right))

    @property
    def difference(self) -> str:
        return f"{self.left}-({self.right.text})"


@kind
class Matrix(Kind):
    r"""A matrix: `\begin{pmatrix}2&0\\0&2\end{pmatrix}` is `2\begin{bmatrix}1&0\\0&1\end{bmatrix}`,
    not `\begin{pmatrix}2&0\\0&1\end{pmatrix}`; `\begin{pmatrix}1\\2\end{pmatrix}` is `(1,2)`."""

    items: tuple["Sequence", ...]  # rows

    @staticmethod
    def read(text):
        match = re.fullmatch(
            r"(.*?) ?[\[(]?\\begin\{([pb]?matrix|array)\}(?:\{[clr|]+\})?((?:(?!\\begin).)*)"
            r"\\end\{\2\}[\])]?",
            text,
        )
        factor = match and plain_number(re.sub("^-?$", r"\g<0>1", match[1]))
        if factor is None:
            return None
        rows = []
        for line in filter(str.strip, match[3].split(r"\\")):
            row = parse_all(line.split("&"))
            if factor != 1:
                row = tuple(Number(factor * getattr(item, "value", math.nan)) for item in row)
            rows.append(Sequence(row))
        if len(rows) == 1:
            return rows[0]
        column = [row.items[0] for row in rows if len(row.items) == 1]
        return Sequence(tuple(column)) if len(column) == len(rows) else Matrix(tuple(rows))


@kind
class Sequence(Kind):
    r"""A tuple, point or vector: `(1,2)` is `(1;2)`, `\langle 1, 2\rangle`, `x=1, y=2`, `1,2`, not
    `(2,1)`, `\{1,2\}`, `[1,2]`."""

    items: tuple[Kind, ...]
    brackets: str = "()"

    @staticmethod
    def read(text):
        left, inner, right = unwrap(re.sub(r"\^(?:T|\{T\}|\\top)$", "", text))
        if left not in ("(", "[", r"\langle"):
            return None
        items = parse_all(split(inner, COMMA))
        if left == "(" and len(items) == 1:
            return items[0]
        if left + right in ("(]", "[)"):
            return as_interval(Sequence(items, left + right))
        return Sequence(items, (left + right).replace(r"\langle\rangle", "()"))


def as_interval(kind: Kind) -> Kind:
    """A pair as an interval. Other kinds stay as they are."""
    if isinstance(kind, Sequence) and len(kind.items) == 2:
        return Interval(*kind.items, kind.brackets)
    return kind


@kind
class Ratio(Kind):
    r"""A ratio: `2:4` is `1:2`, `1 \text{ to } 2`, `\frac12`, not `2:1`, `2:4:6`."""

    items: tuple[Kind, ...]

    @staticmethod
    def read(text):
        parts = split(text, r":(?!=)|\bto\b")
        if len(parts) < 2:
            return None
        items = parse_all(parts)
        if len(items) != len(parts):
            return None
        if all(isinstance(item, Number) for item in items) and items[0].value:
            items = tuple(Number(item.value / items[0].value) for item in items)
        if all(isinstance(item, Number | Expression) for item in items):
            return Ratio(items)


@kind
class Complex(Kind):
    r"""A complex number: `1+2i` is `2i + 1`, `1+2\mathrm{i}`, `(1+2i)`, not `1-2i`, `2+i`."""

    real: Fraction
    imaginary: Fraction

    @staticmethod
    def read(text):
        terms = re.sub(r"(?<=[\w}])([-+])", r" \1", text.replace(" ", "")).split()
        parts = [Fraction(0), Fraction(0)]
        if "i" not in text or len(terms) > 2:
            return None
        for term in terms:
            value = plain_number(re.sub("^([-+]?)i$", r"\g<1>1i", term).removesuffix("i"))
            if value is None:
                return None
            parts[term.endswith("i")] += value
        return Complex(*parts)


@kind
class Choice(Kind):
    r"""A choice, perhaps with its text: `B` is `(B)`, `\textbf{(B)}\ 12`, `B: 12`, `Option B`, not
    `C`, `b`, `B \text{ or } C`; `A, C` is `AC`, `A \text{ and } C`, not `A`."""

    letters: str
    content: str = field(default="", compare=False)

    @staticmethod
    def read(text):
        several = re.sub(r"[ ,()&]|\band\b", "", text)
        if re.fullmatch("[A-J]{2,}", several) and sorted({*several}) == [*several]:
            return Choice(several)
        text = re.sub(r"^(?i:(?:option|choice|answer):? )*(?=\(?[A-J]\b)", "", text)
        match = re.fullmatch(r"\(?([A-Z])\)?|\(?([A-J])[).:](?: ((?:(?!\b(?:or|and)\b).)*))?", text)
        if match:
            letter, other, content = match.groups(default="")
            return Choice(letter + other, content)


@kind
class Words(Kind):
    r"""A word or phrase: `Yes` is `\text{yes}`, `Yes, it is`, not `no`; `\text{no solution}` is
    `\text{No solutions}`, `\emptyset`, not `no`; `\text{east}` is `East`, not `\text{seat}`."""

    phrase: str

    @staticmethod
    def read(text):
        plain = re.sub(r"_\{[^{}]*\}|\\[A-Za-z]+|\^\{[^{}]*\}", " ", text)
        words = [word for word in re.findall(WORD, plain) if not re.fullmatch(PRODUCT, word)]
        if " " not in text and not re.fullmatch("(?i)no|on|so|up|we", text):
            words = [word for word in words if len(word) > 2]
        if not words and not re.search(r"[?@#\"]|\\(?:ldots|text|overline\{\d)|\d \d", text):
            return None
        return Words(rewrite(text.casefold(), PHRASE).strip() or text)


@kind
class Expression(Kind):
    r"""Everything else goes to math-verify: `2\sqrt{3}` is `\sqrt{12}`, not `3.464`; `-1` is `i^2`;
    `\sqrt3` is `2\sin 60^\circ`; `7` is not `3+4`, which is not evaluated."""

    latex: str

    @staticmethod
    def read(text):
        rules = {
            r"(?<=[A-Za-z])'+": "_{prime}",  # A' is not A
            r"(?<![\\A-Za-z])([eEiI])_": r"\\mathrm{\1}_",  # E_1 is not the number e
            r"_\{?\\(odot|oplus)\b ?\}?": r"_{\1}",  # the mass of the sun
            MIXED: r"(\1+\\frac{\2}{\3})",
            r"(?<=\d),(?=\d{3})": "",
            r"\b[Cc]_\{?(\d+)\}?\^\{?(\d+)\}?": r"\\binom{\1}{\2}",
            # math-verify adds 2(3)
            r"(?:(?<=[\d)])|(?<=\\pi))(?<!\^\d)(?<!\^\{\d\}) *(?=\()": r"\\cdot ",
        }
        return Expression(rewrite(text, rules))

    @property
    def unevaluated(self) -> bool:
        return re.search(OPERATION, self.text) is not None


KINDS = (
    Choice, Clock, Number, MixedNumber, RepeatingDecimal, BaseNumber, Congruence, Compound,
    Quantity, Union, Collection, Interval, Equation, Matrix, Sequence, Ratio, Complex, Words,
    Expression,
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Kind:
    """Read a tidy text as the first kind that it can be. An expression is any text."""
    for kind in KINDS:
        found = kind.read(text)
        if found:
            return found if found.text else replace(found, text=text)


def parse_all(texts: list[str]) -> tuple[Kind, ...]:
    """Read the items of a list. A list in a list is part of it."""
    items = []
    for text in filter(None, map(str.strip, texts)):
        item = parse(text)
        inner = isinstance(item, Collection) and not item.braces
        items += item.items if inner else [item]
    return tuple(items)


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Kind | None:
    """Read an answer; None if it has too many brackets."""
    text = tidy(text)
    depth = 0
    for token in re.finditer(BRACKETS, text):
        depth += 1 if token["open"] else -1
        if depth > MAX_DEPTH:
            return None
    return parse(rewrite(text, AROUND).strip() or text)


def leaves(kind: Kind) -> list[Expression]:
    """The expressions in an answer."""
    if isinstance(kind, Expression):
        return [kind]
    found = []
    for value in vars(kind).values():
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, Kind):
                found += leaves(part)
    return found
