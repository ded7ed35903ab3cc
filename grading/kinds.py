r"""The kinds of answers, and how a text is read as one of them.

Each docstring has examples: A `reference` is `right`, `right`, not `wrong`. They are tests.
The kinds are tried in the order in which they stand here. A kind's `pattern` must match the whole
text; the groups are the arguments of `read`, which returns None if the text is of another kind.
rules.py holds which kinds may be equal.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction

from grading.answers import NUMBER, plain_number
from grading.notation import compiled, rewrite, tidy
from grading.units import Unit, read_unit

MAX_DEPTH = 24  # of brackets; a deeper text is not read
BRACKETS = r"(?P<open>\\\{|\\begin|[({\[])|(?P<close>\\\}|\\end|[)}\]])"
COMMA = r"[,;]|\\\\"
LIST = rf"(?:{COMMA}) *(?:and|or)\b|{COMMA}|\b(?:and|or)\b"
BASES = "zero one two three four five six seven eight nine ten"
MIXED = r"(?<![\w.^}/])(\d+) ?\\frac\{(\d+)\}\{(\d*[1-9]\d*)\}(?![\d/.^])"  # 3\frac{1}{2}
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
CURRENCY = r"\\?\$|[€£¥₹]|(?:US|USD|EUR|GBP|INR|Rs)\b\.?(?: *\\?\$)?"
MONEY = {
    rf"^(-?(?:{CURRENCY}).*\d)([kKMB])$": r"\1 \2",  # \$5M
    rf"^(-?) *({CURRENCY}) *(?=[-\d.\\(])(.*)": r"\1\3 \2",  # \$5 is 5 \$
    r"(?<=\d) ?\\frac\{([A-Za-z]+)\}\{([A-Za-z]+(?:\^\d)?)\}$": r" \1/\2",  # \frac{m}{s^2}
}
# cm; m, but not in m g h; %; ^\circ
UNIT_BEGINS = (
    r"(?<![\\A-Za-z_{])[A-Za-z]{2}|(?<!^[A-Za-z] )(?<! [A-Za-z] )(?<= )[A-Za-z](?![\w(])"
    r"|[%€£₹元¥¢']|\^\\circ|\\[$%]"
)
PRODUCT = r"[a-h]{1,3}|[xyztuvw]{1,4}|[k-n]{1,3}|[p-s]{1,3}|[b-df-hj-np-tv-xz]{1,4}"  # no word
WORD = r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])"
PHRASE = {
    r"[\s.]+": " ",
    "^dne$": "does not exist",
    r"(?<=[a-z]{3})s\b|\b(?:the|an?) ": "",
    r"(?<=[a-z])(?<!not)(?<!^no) (?:exist|triangle|function|sequence|curve|number|solution)$": "",
}
# Operations that are left to do, so that an answer is not yet a number
OPERATION = (
    r"(?<=[\w)}!]) *[-+] *(?!\d*\})|[*!]|\\(?:cdot|times|sum|prod|int|lim|log|ln|sin|cos|tan|gcd)"
)
FOR_PARSER = {  # what the parser of math-verify reads otherwise
    r"(?<=[A-Za-z])'+": "_{prime}",  # A' is not A
    r"(?<![\\A-Za-z])([eEiI])_": r"\\mathrm{\1}_",  # E_1 is not the number e
    r"_\{?\\(odot|oplus)\b ?\}?": r"_{\1}",  # the mass of the sun
    MIXED: r"(\1+\\frac{\2}{\3})",
    r"(?<=\d),(?=\d{3})": "",
    r"\b[Cc]_\{?(\d+)\}?\^\{?(\d+)\}?": r"\\binom{\1}{\2}",
    # math-verify adds 2(3)
    r"(?:(?<=[\d)])|(?<=\\pi))(?<!\^\d)(?<!\^\{\d\}) *(?=\()": r"\\cdot ",
}
COMPARISON = r"\\[lg]e(?![a-z])|[<>]"
REALS = r"^(?:\\mathbb\{R\}|all real(?: number)?s?)$"
AROUND = {  # what stands around an answer: a sentence, a condition
    r"^((?i:yes|no|true|false))[,.;:] \w+ \w.*": r"\1",  # Yes, it is
    r"^(?:[A-Za-z]+ )*(?:is|are|equals)(?: equal to)?:? (?=.)": "",
    r"^(?:[A-Za-z]{2,} )*[A-Za-z]{2,}: *(?=[-\d\\(])": "",  # Total: 40
    r"^(?:[Tt]he )?(?:point|number|set|interval|vector) (?=[\d\\(\[])": "",
    r"(?<=.)[, (]+(?:where\b|for (?:all|every|any|some)\b|[a-z] *\\in *\\mathbb\{[ZN]\}).*$": "",
    r"(?<=\w) is the [a-z]+$": "",
}


def tokens(text: str, separator: str = "(?!)") -> Iterator[tuple[re.Match, int]]:
    """The brackets and separators with their depth, which is 0 outside all brackets."""
    depth = 0
    for token in compiled(f"{BRACKETS}|{separator}").finditer(text):
        depth += token.lastgroup == "open"
        yield token, depth
        depth -= token.lastgroup == "close"


def split(text: str, separator: str) -> list[str]:
    """Split at the separators outside all brackets."""
    parts, start = [], 0
    if not compiled(separator).search(text):
        return [text.strip()]
    for token, depth in tokens(text, separator):
        if depth == 0 and token.lastgroup is None:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def unwrap(text: str) -> tuple[str, str, str]:
    """The bracket that encloses the whole text, what is in it, and the bracket that closes it."""
    if text[-1:] not in (")", "]", "}"):
        return "", text, ""
    outer = [token for token, depth in tokens(text) if depth == 1]
    if len(outer) == 2:
        left, right = outer
        if left.start() == 0 and right.end() == len(text):
            return left[0], text[left.end() : right.start()].strip(), right[0]
    return "", text, ""


@dataclass(frozen=True)
class Kind:
    """An answer. Kinds of equal fields are equal, whatever their text."""

    text: str = field(default="", compare=False, kw_only=True)
    pattern = "(.*)"


KINDS = []


def kind(described: type) -> type[Kind]:
    """Add a kind to the table."""
    KINDS.append(dataclass(frozen=True)(described))
    return KINDS[-1]


@kind
class Number(Kind):
    r"""A number: `0.5` is `\frac12`, `.50`, `5 \times 10^{-1}`, `5e-1`, not `0.51`, `0.5?`."""

    value: Fraction | float

    @staticmethod
    def read(text):
        value = plain_number(text)
        if re.fullmatch(r"[-+]?\\infty", text):
            value = float(text.replace(r"\infty", "inf"))
        if value is not None:
            return Number(value)


@kind
class MixedNumber(Number):
    r"""A mixed number: `\frac72` is `3\frac12`, `3 1/2`, `3 \text{ and } \frac12`, not
    `\frac32`."""

    pattern = rf"(-?){MIXED}"

    @staticmethod
    def read(sign, whole, above, below):
        value = int(whole) + Fraction(int(above), int(below))
        return MixedNumber(-value if sign else value)


@kind
class RepeatingDecimal(Number):
    r"""A repeating decimal: `\frac16` is `0.1\overline{6}`, `0.1\dot{6}`, `0.1(6)`, `0.1666\ldots`,
    not `0.16`."""

    pattern = r"(-?)(\d*)\.(\d*)\\overline\{(\d+)\}"

    @staticmethod
    def read(sign, whole, digits, period):
        once = int(f"0{whole}{digits}")
        twice = int(f"0{whole}{digits}{period}")
        value = Fraction(twice - once, (10 ** len(period) - 1) * 10 ** len(digits))
        return RepeatingDecimal(-value if sign else value)


@kind
class BaseNumber(Kind):
    r"""A number in a base: `101_2` is `(101)_{\text{two}}`, `101 \text{ (base 2)}`, `5`, not
    `101_3`; `101_2` is `101`: the base may be left out; `AF_{16}` is `af_{16}`, not `FA_{16}`."""

    digits: str = field(compare=False)
    value: int
    pattern = r"\(?(\w{1,40})\)?_\{?\(?([1-9]\d?|[a-z]+)\)?\}?"

    @staticmethod
    def read(digits, base):
        with suppress(ValueError):  # not a base, or not its digits
            if base in BASES.split():
                base = BASES.split().index(base)
            return BaseNumber(digits.lower(), int(digits, int(base)))


@kind
class Congruence(Kind):
    r"""A residue class: `x \equiv 3 \pmod 7` is `3 \pmod{7}`, `10 \bmod 7`, not `3`,
    `4 \pmod 7`."""

    residue: int
    modulus: int
    pattern = (
        r"(?:[\w ]+\\equiv)? *(-?\d{1,40}),? *\(? ?\\?[pb]?mod(?:ulo)?[ {]*([1-9]\d{0,40})[)} ]*"
    )

    @staticmethod
    def read(residue, modulus):
        return Congruence(int(residue) % int(modulus), int(modulus))


@kind
class Choice(Kind):
    r"""A choice, perhaps with its text: `B` is `(B)`, `\textbf{(B)}\ 12`, `B: 12`, `Option B`, not
    `C`, `b`, `B \text{ or } C`; `A, C` is `AC`, `A \text{ and } C`, not `A`."""

    letters: str
    content: str = field(default="", compare=False)
    pattern = r"(?:(?i:option|choice|answer):? )*(.*)"

    @staticmethod
    def read(text):
        several = re.sub(r"[ ,()&]|\band\b", "", text)
        if re.fullmatch("(?=..)A?B?C?D?E?F?G?H?I?J?", several):
            return Choice(several)
        content = r"(?:(?!\b(?:or|and)\b).)*"
        match = re.fullmatch(rf"\(?([A-Z])(?:\)?|(?<=[A-J])[).:](?: ({content}))?)", text)
        return match and Choice(*match.groups(""))


@kind
class Clock(Kind):
    r"""A time of day: `3:30 PM` is `3{:}30\text{ p.m.}`, `15:30`, not `3:30`, `3:30 AM`, `6:60`."""

    minutes: int
    half: str
    pattern = r"([01]?\d|2[0-3]):([0-5]\d)(?: ?([aApP])\.? ?[mM]\.?)?"

    @staticmethod
    def read(hour, minute, half):
        hour, half = int(hour), half.lower()
        if half:
            hour = hour % 12 + 12 * (half == "p")
        elif hour > 12 or hour == 0:
            half = "ap"[hour > 0]
        return Clock(60 * hour + int(minute), half)


@kind
class Quantity(Kind):
    r"""A number or expression with a unit: `1 km` is `1000 \text{ m}`, `1`, not `1 m`, `1 km^2`;
    `5000000` is `\$5 \text{ million}`, not `5 \text{ zorks}`; `50\%` is `0.5`, `50`, not `5`."""

    value: Kind
    unit: Unit

    @staticmethod
    def read(text):
        number, *words = compiled(f"(?={UNIT_BEGINS})").split(rewrite(text, MONEY), 1)
        unit = words and read_unit(words[0])
        if not unit or not number or re.search(r"\\(?:sin|cos|tan|cot)|\{[^}]*$", number):
            return None
        value = parse(number.strip())
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
        texts = re.findall(rf"{NUMBER}[^\d.]+", text[:100])
        if len(texts) < 2 or "".join(texts) != text:
            return None
        parts = [Quantity.read(re.sub(",? *(?:and *)?$", "", part)) for part in texts]
        if not all(isinstance(getattr(part, "value", None), Number) for part in parts):
            return None
        last = parts[-1].unit
        sizes = [part.unit.size for part in parts if part.unit.powers == last.powers]
        if sizes == sorted(set(sizes), reverse=True) and len(sizes) == len(parts):
            total = sum(part.value.value * part.unit.size for part in parts)
            return Compound(Number(total / last.size), last)


@kind
class Union(Kind):
    r"""A union: `(-\infty,1)\cup(2,\infty)` is `x<1 \text{ or } x>2`, not `x<1 \text{ and } x>2`;
    `\mathbb{R}\setminus\{1\}` is `x \ne 1`, `(-\infty,1)\cup(1,\infty)`."""

    items: tuple[Kind, ...]

    @staticmethod
    def read(text):
        without = r"(?:\\mathbb\{R\} *(?:\\setminus|-)|.+\\ne(?![a-z])) *(?:\\\{(.*)\\\}|(\S+))"
        without = re.fullmatch(without, text)
        if without:
            points = parse_all(without.groups(""))
            if all(isinstance(point, Number) for point in points):
                ends = sorted([-math.inf, *(point.value for point in points), math.inf])
                pairs = itertools.pairwise(map(Number, ends))
                return Union(tuple(Interval(*pair) for pair in pairs))
        parts = split(text, r"\\cup(?![a-z])|\bor\b")
        if len(parts) < 2:
            return None
        items = parse_all(parts)
        if r"\cup" in text:
            items = tuple(map(as_interval, items))
        sets = all(isinstance(item, Interval | Collection | Number | Union) for item in items)
        if sets and any(isinstance(item, Interval) for item in items):
            return Union(items)


@kind
class Collection(Kind):
    r"""A set or a list, in any order: `\{1,2\}` is `2,1`, `1 \text{ or } 2`, `x=1, x=2`, not `1`,
    `(1,2)`; `\pm 2` is `2,-2`, not `2`; `\emptyset` is `\{\}`, `\text{no solution}`, not `0`."""

    items: tuple[Kind, ...]
    braces: bool = False

    @staticmethod
    def read(text):
        bracket, inner, _ = unwrap(text)
        braces = bracket == r"\{"
        if braces:
            text = inner
            builder = split(text, r"\||:(?!=)")
            if len(builder) == 2:
                return parse(builder[1])  # {x | x > 2}
        parts = []
        for part in split(compiled(ENVIRONMENT).sub("", text), LIST):
            parts += plus_and_minus(part)
        if len(parts) < 2 and not braces:
            return None
        items = parse_all(parts)
        if len(items) == 1:
            return items[0]
        if len(items) == 2 and all(isinstance(item, Interval) for item in items) and not braces:
            return items[0].meet(items[1]) or items[1].meet(items[0]) or Collection(items)
        return Collection(items, braces)


def plus_and_minus(text: str) -> list[str]:
    r"""Both values of `1\pm 2`. Several signs change together."""
    if r"\pm" not in text:
        return [text]
    signed = []
    for sign, other in ("+-", "-+"):
        value = re.sub(r"\\pm *", sign, re.sub(r"\\mp *", other, text))
        signed.append(re.sub(r"(^|[=(,]) *\+ *", r"\1", value))
    return signed


@kind
class Interval(Kind):
    r"""An interval, an inequality or a chain: `[1,2)` is `1 \le x < 2`, `x \in [1;2)`,
    `\{x \mid x<2, x \ge 1\}`, not `[1,2]`, `1 \le x`; `x>3` is `3<x`, `(3,\infty)`, not
    `x \ge 3`; `[-2,2]` is `|x| \le 2`, not `x \le 2`."""

    low: Kind
    high: Kind
    brackets: str = "()"
    subject: str = ""
    pattern = r"(.*(?:\\in|\\[lg]e|[<>]|\\mathbb|real).*)"

    @staticmethod
    def read(text):
        _, *sets = split(re.sub(REALS, r"x \\in (-\\infty,\\infty)", text), r"\\in(?![a-z])")
        if sets:
            return as_interval(parse(sets[-1]))

        text = re.sub(r"^\|(\w)\| *(<|\\le) *(\S+)$", r"-\3 \2 \1 \2 \3", text)
        terms, signs = split(text, COMPARISON), re.findall(COMPARISON, text)
        if len(terms) not in (2, 3) or len(terms) - len(signs) != 1:
            return None
        if {">", r"\ge"}.issuperset(signs):
            terms.reverse()
            signs.reverse()
        elif not {"<", r"\le"}.issuperset(signs):
            return None
        if len(terms) == 2:
            above = NAME.fullmatch(terms[1]) or not re.search("[A-Za-z]", terms[0])
            end = 2 if above else 0
            terms.insert(end, [r"-\infty", r"\infty"][end // 2])
            signs.insert(end, "<")
        low, subject, high = terms
        brackets = "(["["e" in signs[0]] + ")]"["e" in signs[-1]]
        return Interval(parse(low), parse(high), brackets, subject)

    def meet(self, other):
        """`x>1` and `x<2` are one interval."""
        if (self.high, other.low, other.subject) == (INFINITY, MINUS_INFINITY, self.subject):
            brackets = self.brackets[0] + other.brackets[1]
            return replace(self, high=other.high, brackets=brackets)


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
        name = left.replace(" ", "") if NAME.fullmatch(left) else ""
        return Equation(name, left, parse(right))

    @property
    def difference(self) -> str:
        return f"{self.left}-({self.right.text})"


@kind
class Matrix(Kind):
    r"""A matrix: `\begin{pmatrix}2&0\\0&2\end{pmatrix}` is `2\begin{bmatrix}1&0\\0&1\end{bmatrix}`,
    not `\begin{pmatrix}2&0\\0&1\end{pmatrix}`; `\begin{pmatrix}1\\2\end{pmatrix}` is `(1,2)`."""

    items: tuple["Sequence", ...]  # rows
    pattern = (
        r"(.*?) ?[\[(]?\\begin\{([pb]?matrix|array)\}(?:\{[clr|]+\})?((?:(?!\\begin).)*)"
        r"\\end\{\2\}[\])]?"
    )

    @staticmethod
    def read(factor, environment, cells):
        factor = plain_number(re.sub("^-?$", r"\g<0>1", factor))
        if factor is None:
            return None
        rows = []
        for line in filter(str.strip, cells.split(r"\\")):
            row = parse_all(line.split("&"))
            if factor != 1:
                row = tuple(Number(factor * getattr(item, "value", math.nan)) for item in row)
            rows.append(Sequence(row))
        if len(rows) == 1:
            return rows[0]
        if all(len(row.items) == 1 for row in rows):  # a column vector
            return Sequence(tuple(row.items[0] for row in rows))
        return Matrix(tuple(rows))


@kind
class Sequence(Kind):
    r"""A tuple, point or vector: `(1,2)` is `(1;2)`, `\langle 1, 2\rangle`, `x=1, y=2`, `1,2`, not
    `(2,1)`, `\{1,2\}`, `[1,2]`."""

    items: tuple[Kind, ...]
    brackets: str = "()"
    pattern = r"(.*[)\]])(?:\^(?:T|\{T\}|\\top))?"  # transposed

    @staticmethod
    def read(text):
        left, inner, right = unwrap(text)
        if left not in ("(", "["):
            return None
        items = parse_all(split(inner, COMMA))
        if left == "(" and len(items) == 1:
            return items[0]
        if left + right in ("(]", "[)"):
            return Interval(*items, left + right) if len(items) == 2 else None
        return Sequence(items, left + right)


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
        items = parse_all(parts) if len(parts) > 1 else ()
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
    pattern = "(.*i.*)"

    @staticmethod
    def read(text):
        imaginary = rf"({NUMBER}|[-+]?)i"
        either = rf"(?:({NUMBER})(?=[-+]))?{imaginary}|{imaginary}(?=[-+])({NUMBER})"
        match = re.fullmatch(either, text.replace(" ", ""))
        if match:
            first, second, third, fourth = match.groups("")
            factor = re.sub("^[-+]?$", r"\g<0>1", second + third)
            return Complex(plain_number(first or fourth or "0"), plain_number(factor))


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
        if words or re.search(r"[?@#\"]|\\(?:ldots|text|overline\{\d)|\d \d", text):
            return Words(rewrite(text.casefold(), PHRASE).strip() or text)


@kind
class Expression(Kind):
    r"""Everything else goes to math-verify: `2\sqrt{3}` is `\sqrt{12}`, not `3.464`; `-1` is `i^2`;
    `\sqrt3` is `2\sin 60^\circ`; `7` is not `3+4`, which is not evaluated."""

    latex: str

    @staticmethod
    def read(text):
        return Expression(rewrite(text, FOR_PARSER))

    @property
    def unevaluated(self) -> bool:
        return re.search(OPERATION, self.text) is not None


INFINITY, MINUS_INFINITY = Number(math.inf), Number(-math.inf)


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Kind:
    """Read a tidy text as the first kind that it can be. An expression is any text."""
    for kind in KINDS:
        match = compiled(kind.pattern).fullmatch(text)
        found = match and kind.read(*match.groups(""))
        if found:
            if not found.text:
                object.__setattr__(found, "text", text)  # faster than dataclasses.replace
            return found


def parse_all(texts: Iterable[str]) -> tuple[Kind, ...]:
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
    if plain_number(text) is not None:
        return parse(text.strip())
    text = tidy(text)
    if all(depth <= MAX_DEPTH for _, depth in tokens(text)):
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
