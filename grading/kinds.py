r"""The kinds of answers, and how a text is read as one of them.

Each function below reads one kind. Its docstring has examples, which are also tests, in the form:
`reference` is `right`, `right`, not `wrong`. The functions are tried in the order of this file.
Each has a pattern that must match the whole text. The function gets the groups, and returns None
if the text is of another kind. Several kinds are read as one class, a subclass of Kind: a decimal
and a ratio as Number. rules.py holds which classes may be equal.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from grading.answers import NUMBER, plain_number
from grading.notation import compiled, rewrite, tidy
from grading.units import read_unit

MAX_DEPTH = 24  # of brackets; a deeper text is a phrase


@dataclass
class Kind:
    """An answer. Answers of one class with equal fields are equal, whatever their text."""

    text: str = field(default="", compare=False, kw_only=True)


KINDS = []  # the pattern and the function of each kind


def kind(pattern: str = "(.*)") -> Callable:
    """Add a function to the kinds."""

    def add(function: Callable) -> Callable:
        KINDS.append((re.compile(pattern), function))
        return function

    return add


# ------------------------------------------------------------------------------- brackets

BRACKETS = r"(?P<open>\\\{|\\begin|[({\[])|(?P<close>\\\}|\\end|[)}\]])"


def tokens(text: str, separator: str = "(?!)") -> Iterator[tuple[re.Match, int]]:
    """The brackets and separators with their depth, which is 0 outside all brackets.

    By default nothing is a separator.
    """
    depth = 0
    for token in compiled(f"{BRACKETS}|{separator}").finditer(text):
        depth += token.lastgroup == "open"
        yield token, depth
        depth -= token.lastgroup == "close"


def split(text: str, separator: str) -> list[str]:
    """Split at the separators outside all brackets."""
    parts, start = [], 0
    for token, depth in tokens(text, separator):
        if depth == 0 and token.lastgroup is None:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def closed(text: str) -> bool:
    """Whether each bracket that a text closes is one that it opens."""
    return all(depth > 0 for _, depth in tokens(text))


# ------------------------------------------------------------------------------- numbers

MIXED = r"(?<![\w.^}/])(\d+) ?\\frac\{(\d+)\}\{(\d*[1-9]\d*)\}(?![\d/.^])"  # 3\frac{1}{2}
BASES = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905


@dataclass
class Number(Kind):
    value: Fraction | float

    @property
    def latex(self) -> str:
        return str(self.value)  # such as 1/2


@kind()
def number(text):
    r"""A number: `0.5` is `\frac12`, `.50`, `5 \times 10^{-1}`, `5e-1`, not `0.51`, `0.5?`."""
    value = plain_number(text)
    if value is not None:
        return Number(value)


@kind(rf"(-?){MIXED}")
def mixed_number(sign, whole, above, below):
    r"""A mixed number: `\frac72` is `3\frac12`, `3 1/2`, `3 \text{ and } \frac12`, not
    `\frac32`."""
    value = int(whole) + Fraction(int(above), int(below))
    return Number(-value if sign else value)


@kind(r"(-?)(\d*)\.(\d*)\\overline\{(\d+)\}")
def repeating_decimal(sign, whole, digits, period):
    r"""A repeating decimal: `\frac16` is `0.1\overline{6}`, `0.1\dot{6}`, `0.1666\ldots`, not
    `0.16`."""
    shifted = int(f"0{whole}{digits}") + Fraction(int(period), 10 ** len(period) - 1)
    value = shifted / 10 ** len(digits)
    return Number(-value if sign else value)


@dataclass
class BaseNumber(Kind):
    digits: str
    base: str


@kind(r"\(?(\d+|[\da-fA-F]+(?=\)?_\{?1\d))\)?_\{?\(?(?:base ?)?(\d\d?|[a-z]{3,})\)?\}?")
def base_number(digits, base):
    r"""A number in a base: `101_2` is `(101)_{\text{two}}`, `101 \text{ (base 2)}`, not `101_3`;
    `101_2` is `101`: the base may be left out; `AF_{16}` is `af_{16}`, not `FA_{16}`;
    `143_6` is `143_{\text{six}}`, `143_{\text{base }6}`, not `143_7`."""
    if base in BASES:
        base = str(BASES.index(base))
    return BaseNumber(digits.lower(), base)


# ------------------------------------------------------------------------------- words


@dataclass
class Words(Kind):
    phrase: str


@kind(
    r"(?:[A-Za-z](?:_\w)? *\\equiv)? *(-?\d{1,40}),? *"
    r"\(? ?\\?[pb]?mod(?:ulo)?[ {]*([1-9]\d{0,40})[)} ]*"
)
def residue_class(residue, modulus):
    r"""A residue class: `x \equiv 3 \pmod 7` is `3 \pmod{7}`, `10 \bmod 7`, not `3`,
    `4 \pmod 7`, `2x \equiv 3 \pmod 7`."""
    return Words(f"{int(residue) % int(modulus)} mod {modulus}")


@kind(
    r"(?:(?i:option|choice|answer):? )*\(?([A-Z])"
    r"(?:\)?|(?<=[A-J])[).:](?: (?!(?:or|and)\b|\(?[A-J]\)).*)?)"
)
def choice(letter):
    r"""A choice, perhaps with its text: `B` is `(B)`, `\textbf{(B)}\ 12`, `B: 12`, `Option B`, not
    `C`, `b`, `B \text{ or } C`, `(B) (C)`."""
    return Words(letter)


@kind(r"\(?([A-J](?:[ ,()&]|and|[A-J])*[A-J])\)?")
def choices(text):
    r"""Several choices: `A, C` is `AC`, `A \text{ and } C`, not `A`, `A \text{ or } C`."""
    letters = re.findall("[A-J]", text)
    if letters == sorted(set(letters)):
        return Words("".join(letters))


@kind(r"([01]?\d|2[0-3])(?=\D)(?::([0-5]\d))?(?: ?([aApP])\.? ?[mM]\.?)?")
def clock(hour, minute, half):
    r"""A time of day: `3:30 PM` is `3{:}30\text{ p.m.}`, `15:30`, not `3:30`, `3:30 AM`;
    `5:00 PM` is `5 \text{ p.m.}`."""
    hours = int(hour)
    if half:
        hours = hours % 12 + 12 * (half in "pP")
    elif 0 < hours < 13:
        return Words(f"{hours}:{minute} in either half")
    return Words(f"{hours}:{minute or '00'}")


# ------------------------------------------------------------------------------- quantities

CURRENCY = r"\\?\$|[€£¥₹]|(?:US|USD|EUR|GBP|INR|Rs)\b\.?(?: *\\?\$)?"
UNIT_BEGINS = (
    r"(?<![\\A-Za-z_{])[A-Za-z]{2}"  # cm
    r"|(?<!^[A-Za-z] )(?<! [A-Za-z] )(?<= )[A-Za-z](?![\w(])"  # m, but not in m g h
    r"|(?<![A-Za-z])'"  # 5', but not x'
    r"|[%€£₹元¥¢]|\^\\circ|\\[$%]"
)


@dataclass
class Quantity(Kind):
    value: Kind
    size: Fraction  # of the unit, in base units
    powers: tuple[tuple[str, int], ...]  # of the base units
    parts: int = field(default=1, compare=False)  # 2 for 5 feet 3 inches

    @property
    def amount(self) -> Fraction | float:
        """In base units; NaN, which equals nothing, if the value is an expression."""
        return getattr(self.value, "value", math.nan) * self.size


@kind(rf"(-?) *({CURRENCY}) *((?:[-\d.(]|\\[a-z]).*)")
def money(sign, currency, amount):
    r"""A currency in front: `5000000` is `\$5 \text{ million}`, `5000000`, not `\$5`; `-\$5` is
    `-5 \text{ dollars}`, not `€5`."""
    return parse(f"{sign}{amount} {currency}")


@kind(rf"(.+?)((?:{UNIT_BEGINS}).*)")
def quantity(number, unit):
    r"""A number or expression with a unit: `1 km` is `1000 \text{ m}`, `1`, not `1 m`, `1 km^2`;
    `5` is not `5 \text{ zorks}`; `50\%` is `0.5`, `50`, not `5`; `17` is `17^{\text{th}}`;
    `x + C` is `C + x`, not `x`, `x C`."""
    found = read_unit(unit)
    # Not \sin 5 m; nor in braces: \frac{5 m}{2}; nor a letter that is added: x + C; nor after an
    # article: a circle
    if not found or re.search(
        r"\\(?:sin|cos|tan|cot)|\{[^}]*$|(?:[-+*/]|\\cdot|\\times|^a) *$", number
    ):
        return None

    multiple, size, powers = found
    value = parse(number.strip())
    if isinstance(value, Number):
        value = Number(value.value * multiple)
    elif multiple != 1 or not isinstance(value, Expression):
        return None
    return Quantity(value, size, powers) if powers else value


@kind(rf"(?=.{{5,60}}$)({NUMBER}[^\d.]+?),? *(?:and *)?(\d.*)")
def compound(first, rest):
    r"""Parts of one quantity: `5 feet 3 inches` is `63 inches`, `5.25 ft`, not `5 feet`, `63`."""
    first, rest = parse(first), parse(rest)
    if not (isinstance(first, Quantity) and isinstance(rest, Quantity)):
        return None
    if first.powers == rest.powers and first.size > rest.size:
        total = Number(first.amount + rest.amount)
        return Quantity(total, Fraction(1), rest.powers, parts=2)


# ------------------------------------------------------------------------------- lists

COMMA = r"[,;]|\\\\"
OR = r"\\cup(?![a-z])|\bor\b"
LIST = rf"(?:{COMMA}) *(?:and|or)\b|{COMMA}|\band\b|{OR}"


def parse_all(texts: list[str]) -> tuple[Kind, ...]:
    return tuple(parse(text) for text in texts if text)


SET = r"\{"  # the brackets of a set


@dataclass
class Items(Kind):
    items: tuple[Kind, ...]
    brackets: str = ""  # "" of a list or union, SET, ":" of a ratio, else both: "()", "[)"

    @property
    def named(self) -> bool:
        """Whether each item is an equation of a name of its own: a=1, b=2, but not x=1, x=2."""
        names = {getattr(item, "name", "") for item in self.items}
        return "" not in names and len(names) == len(self.items)


@kind(r"\\\{(.*)\\\}")
def set_in_braces(text):
    r"""A set: `\{1,2\}` is `\{2,1\}`, `2,1`, not `1`, `(1,2)`; `\emptyset` is `\{\}`,
    `\text{no solution}`, not `0`; `x>2` is `\{x \mid x>2\}`, not `\{x \mid x<2\}`."""
    if closed(text):
        # Of {x | x>2} the condition alone is compared.
        _, *condition = split(text, r"\||:(?!=)")
        return parse(condition[0]) if condition else list_of_items(text, SET)


@kind()
def list_of_items(text, brackets=""):
    r"""A list or union, in any order: `1,2` is `2,1`, `1 \text{ or } 2`, `x=1, x=2`, not `1`;
    `\pm 2` is `2,-2`, not `2`; `(1,3)` is not `1<x, y<3`; `(-\infty,1)\cup(2,\infty)` is
    `x<1 \text{ or } x>2`, not `x<1 \text{ and } x>2`."""
    parts = []
    for part in split(text, LIST):
        signed = [re.sub(r"\\pm(?![a-z]) *", sign, part) for sign in "+-"]
        parts += dict.fromkeys(signed)  # one if there is no \pm
    if len(parts) < 2 and not brackets:
        return None
    items = parse_all(parts)
    if len(items) == 1:
        return items[0]
    intervals = all(isinstance(item, Interval) for item in items)
    if brackets or not intervals or compiled(OR).search(text):  # x<1 and x>2 is no union
        return Items(items, brackets)


@kind(r"[\[(]?\\begin\{([pb]?matrix|array)\}(?:\{[clr|]+\})?((?:(?!\\begin).)*)\\end\{\1\}[\])]?")
def matrix(_, cells):
    r"""A matrix: `\begin{pmatrix}1&0\\0&1\end{pmatrix}` is `\begin{bmatrix}1&0\\0&1\end{bmatrix}`,
    not `\begin{pmatrix}1&0\\1&0\end{pmatrix}`; `\begin{pmatrix}1\\2\end{pmatrix}` is `(1,2)`,
    `\begin{pmatrix}1\\[4pt]2\end{pmatrix}`."""
    rows = [line.replace("&", ",") for line in cells.split(r"\\") if line.strip()]
    rows = ",".join(f"({row})" for row in rows)
    return parse(f"({rows})")  # a tuple of tuples


@kind(r"([(\[])(.*)([)\]])")
def sequence(left, inner, right):
    r"""A tuple, point or vector: `(1,2)` is `(1;2)`, `\langle 1, 2\rangle`, `x=1, y=2`, `1,2`, not
    `(2,1)`, `\{1,2\}`, `[1,2]`."""
    if not closed(inner):
        return None
    items = parse_all(split(inner, COMMA))
    if left == "(" and len(items) == 1:
        return items[0]
    return Items(items, left + right)


@kind(r"(.*(?::|\bto\b).*)")
def ratio(text):
    r"""A ratio: `2:4` is `1:2`, `1 \text{ to } 2`, `\frac12`, not `2:1`, `2:4:6`; `\sqrt2:1`
    is not `\sqrt2:3`."""
    parts = split(text, r":(?!=)|\bto\b")
    items = parse_all(parts) if len(parts) > 1 else ()
    if not items or not all(isinstance(item, Number | Expression) for item in items):
        return None
    if any(isinstance(item, Expression) or not item.value for item in items):
        return Items(items, ":")
    items = tuple(Number(item.value / items[-1].value) for item in items)
    return items[0] if len(items) == 2 else Items(items, ":")


# ------------------------------------------------------------------------------- statements

COMPARISON = r"\\[lg]e(?![a-z])|[<>]"
FALLING = (">", r"\ge")
OPENING = {"<": "(", ">": "(", r"\le": "[", r"\ge": "["}
CLOSING = {"<": ")", ">": ")", r"\le": "]", r"\ge": "]"}
GREEK = (  # without pi, which is a number
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi"
    "|omega"
)
LETTER = rf"(?:[A-Za-z]|\\(?:var)?(?:{GREEK}))"
INDEX = r"(?:_(?:\{[^{}]*\}|\w)|'+)*"
# Area; x, a_1, f(3); (x, y); with a capital letter, but without an operator: P(A), |AB|, A:B
NAME = re.compile(
    rf"[A-Za-z ]{{3,}}|{LETTER}{INDEX}(?: ?\([\w, ]+\))?|\(\w(?:, ?\w)+\)"
    r"|(?=.*[A-Z])[^-+*/^=\d][^-+*/^=]*"
)


@dataclass
class Interval(Kind):
    low: Kind
    high: Kind
    brackets: str = "()"
    subject: str = ""


@kind(rf"(.*?) *({COMPARISON}) *([^,;]*?)(?: *({COMPARISON}) *((?:(?!{COMPARISON}).)*))?")
def inequality(first, sign, second, other, third):
    r"""An inequality or a chain: `[1,2)` is `1 \le x < 2`, `x \in [1;2)`, not `[1,2]`, `1 \le x`,
    `1 \le x > 2`; `x>3` is `3<x`, `(3,\infty)`, not `x \ge 3`; `[-2,2]` is `|x| \le 2`, not
    `x \le 2`."""
    falling = sign in FALLING
    if other and (falling != (other in FALLING) or re.search(COMPARISON, second)):
        return None

    if other:  # a chain
        low, low_sign, subject, high_sign, high = first, sign, second, other, third
        if falling:
            low, low_sign, high_sign, high = high, high_sign, low_sign, low
    else:
        left, right = (second, first) if falling else (first, second)
        named = re.search("[A-Za-z]", re.sub(r"\\(?:frac|sqrt|pi|infty)", "", left))
        if NAME.fullmatch(right) or not named:  # 3 < x
            low, low_sign, subject, high_sign, high = left, sign, right, "<", r"\infty"
        else:  # x < 3
            low, low_sign, subject, high_sign, high = r"-\infty", "<", left, sign, right
    return Interval(parse(low), parse(high), OPENING[low_sign] + CLOSING[high_sign], subject)


@dataclass
class Equation(Kind):
    name: str  # the left side if it names the right side, else empty
    left: str
    right: Kind

    @property
    def difference(self) -> str:
        return f"{self.left}-({self.right.text})"


@kind("(.*=.*)")
def equation(text):
    r"""An equation or assignment: `x=3` is `3`, `3=x`, not `y=3`, `2x=6`; `y=2x+1` is `2x+1`,
    `y-2x-1=0`, not `f=2x+1`; `18` is `x+y=18`; `xy=6` is `6=yx`, not `6`."""
    left, *others = split(text, "(?<![<>!:])=")
    if not others:
        return None
    right = others[-1]
    if NAME.fullmatch(right) and not NAME.fullmatch(left):
        left, right = right, left
    name = left.replace(" ", "") if NAME.fullmatch(left) else ""
    return Equation(name, left, parse(right))


# ------------------------------------------------------------------------------- all else

# No word, but a product of letters: abc, xyz, mn, pqr; up to four consonants; any two letters that
# are no word
PRODUCT = (
    r"[a-h]{1,3}|[xyztuvw]{1,4}|[k-n]{1,3}|[p-s]{1,3}|[b-df-hj-np-tv-xz]{1,4}"
    r"|(?!(?i:no|on|so|up|we|or|to|at|by|of|in|is|if|as))[A-Za-z]{2}"
)
WORD = r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])"
PHRASE = {
    r"[\s.]+": " ",
    "^dne$": "does not exist",
    r"(?<=[a-z]{3})s\b|\b(?:the|an?) ": "",
    r"(?<=[a-z])(?<!not)(?<!^no) (?:exist|triangle|function|sequence|curve|number|solution)$": "",
}


@kind()
def words(text):
    r"""A word or phrase: `Yes` is `\text{yes}`, `Yes, it is`, not `no`; `\text{no solution}` is
    `\text{No solutions}`, `\emptyset`, not `no`; `\text{east}` is `East`, not `\text{seat}`;
    `\text{circle}` is `\text{a circle}`, not `\text{two circles}`."""
    plain = re.sub(r"_\{[^{}]*\}|\\[A-Za-z]+|\^\{[^{}]*\}", " ", text)
    found = [word for word in re.findall(WORD, plain) if not re.fullmatch(PRODUCT, word)]
    # or has marks and commands that math-verify drops or misreads
    if found or re.search(r"[?@#\"]|\\(?:ldots|text|overline\{\d)|\d \d", text):
        return Words(rewrite(text.casefold(), PHRASE).strip())


FOR_PARSER = {  # what math-verify's parser misreads
    r"(?<=[A-Za-z])'('*)": r"_{prime\1}",  # A' is not A, f'' is not f'
    r"\^(?:T|\{T\})": "^{(T)}",  # x^T is not x
    r"(?<![\\A-Za-z])([eEi])_": r"\\mathrm{\1}_",  # E_1 is not the number e
    r"(?<![\\A-Za-z])I(?![A-Za-z])": r"\\mathrm{I}",  # I^2 R is not I R
    r"\\(gamma|Gamma(?! *\())(?![a-z])": r"\\mathrm{\1}",  # no function, no constant
    r"_\{?\\(odot|oplus)\b ?\}?": r"_{\1}",  # the mass of the sun
    MIXED: r"(\1+\\frac{\2}{\3})",
    r"\b[Cc]_\{?(\d+)\}?\^\{?(\d+)\}?": r"\\binom{\1}{\2}",
    # 2(3), which math-verify reads as 2+3; not \sin^2(x)
    r"(?:(?<=[\d)])|(?<=\\pi))(?<!\^\d) *(?=\()": r"\\cdot ",
}


@dataclass
class Expression(Kind):
    latex: str


@kind()
def expression(text):
    r"""Everything else goes to math-verify: `2\sqrt{3}` is `\sqrt{12}`, not `3.464`; `-1` is `i^2`;
    `1+2i` is `2i + 1`, `1+2\mathrm{i}`, `(1+2i)`, not `1-2i`, `2+i`; `\sqrt3` is `2\sin 60^\circ`;
    `7` is not `3+4`, which is not evaluated; `x^T` is not `x`; `f''(x)` is not `f'(x)`;
    `I^2 R` is `R I^2`, not `I R`; `\gamma - 1` is `-1 + \gamma`, not `\gamma - 4`;
    `m \frac{dv}{dt}` is not `7 \frac{dv}{dt}`; `\frac{d(mv)}{dt}` is not `0`;
    `\frac{d}{dx} x^2` is `2x`."""
    return Expression(rewrite(text, FOR_PARSER))


# ------------------------------------------------------------------------------- reading

AROUND = {  # what stands around an answer, and answers that are written in another form
    r"^((?i:yes|no|true|false))[,.;:] \w+ \w.*": r"\1",  # Yes, it is
    r"^(?:[A-Za-z]+ )*(?:is|are|equals)(?: equal to)?:? (?=.)": "",  # the area is 40
    # Sum: 40; the point (1, 2)
    r"^(?:[A-Za-z]{2,} )*(?:[A-Za-z]{2,}:|point|set|interval|vector) *(?=[-\d\\(\[])": "",
    # 2k, where k is an integer; 2k, k \in \mathbb{Z}
    r"(?<=.)[, (]+(?:where\b|for (?:all|every|any|some)\b|[a-z] *\\in *\\mathbb\{[ZN]\}).*$": "",
    r"(?<=\\in )R\b(?!\()": r"\\mathbb{R}",
    r"^(?:\w{1,9}|\([a-z](?:, ?[a-z])+\)) *\\in(?![a-z])": "",  # x \in [1,2], (x,y) \in \{(1,2)\}
    r"^ *(?:\\mathbb\{R\}|all real(?: number)?s?)$": r"(-\\infty,\\infty)",
    r"^\|(\w)\| *(<|\\le) *([^\s+-]+)$": r"-\3 \2 \1 \2 \3",
    r"^\|(\w)\| *> *([^\s+-]+)$": r"\1 > \2 or \1 < -\2",
    r"^\|(\w)\| *\\ge *([^\s+-]+)$": r"\1 \\ge \2 or \1 \\le -\2",
    r"^(?i:no (?:real |integer )?(?:solution|root)s?(?: exists?)?|(?:the )?empty set)$": r"\\{\\}",
}


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Kind:
    """Read a tidy text as the first kind that it can be. Any text can be an expression."""
    for pattern, function in KINDS:
        match = pattern.fullmatch(text)
        found = match and function(*match.groups(""))
        if found:
            found.text = found.text or text  # (x+1) is read as x+1 and keeps that text
            return found


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Kind:
    """Read an answer. A text of too many brackets is a phrase."""
    if plain_number(text) is not None:
        return parse(text.strip())
    text = tidy(text)
    if any(depth > MAX_DEPTH for _, depth in tokens(text)):
        return Words(text)
    return parse(rewrite(text, AROUND).strip())


def leaves(value: Any) -> list[Expression]:
    """The expressions in an answer."""
    if isinstance(value, Expression):
        return [value]
    if isinstance(value, Kind):
        return leaves(tuple(vars(value).values()))
    if isinstance(value, tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return []
