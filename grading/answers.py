r"""Read an answer without sympy: its box, its markup, its number and its unit.

grader.py sends to math-verify what cannot be decided here. README.md lists the rules with
examples and the verdicts that are arguable.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

MAX_REFERENCE = 4096  # characters; a longer reference answer is not read

# ------------------------------------------------------------------------------- patterns
# Each pattern has an example in its comment. No pattern repeats a group that itself repeats the
# same characters, so each takes linear time.

# `\boxed{`, `{` and `}`. An escaped brace does not group: `\{`. `\\` is a line break, except in
# `\\boxed{`, a box that was escaped twice.
BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<open>\{)|(?P<close>\})")

# `\textbf{`, `\mathrm{`, `\text{`, `\mbox{`, `\underline{`
FONT = (
    r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|cal|normal)|text|[mf]box|emph|underline|boldsymbol|bm)"
    r"\s*\{"
)

# Replacements that `tidy` makes before NFKC normalisation, and after it.
UNICODE_REWRITES = {
    "[⁰¹²³⁴-⁹⁻]+": r"^{\g<0>}",  # x⁻¹²
    "[¼-¾⅐-⅞]": r" \g<0>",  # 3½ is 3 1/2, not 31/2
}
REWRITES = {  # in this order
    "−": "-",
    "∞": r"\\infty ",
    "[·⋅]": r"\\cdot ",
    "≈": r"\\approx ",
    r"√ *(\d+)|√ *\(([^()]*)\)": r"\\sqrt{\1\2}",  # √13, √(13)
    r"(\d+)⁄(\d+)": r"\\frac{\1}{\2}",  # 1⁄2, the NFKC form of ½
    r"°": r"^\\circ ",  # 18°
    r"^\$(-?[\d.,]+)\$": r"\1",  # $18$ cm
    # 1,\!234; \textcolor{red}{18}; \displaystyle 18
    r"\\! *|\\(?:text)?color *\{[^{}]*\}|\\(?:display|text)style(?![A-Za-z])": "",
    r"\\(?:bf|rm|it|sf|tt|em)(?:series|shape)?(?![A-Za-z])": " ",  # {\bf 18}
    r"(?<=\d)(?:\\[,;: ]|\{,\}|[~ ])(?=\d{3}(?!\d))": "",  # 1\,234 and 1{,}234
    r"(?<!\\)(?:\\[,;: ]|\\q?quad(?![A-Za-z])|~)": " ",  # 18\ \mathrm{m}
    FONT + r"(?= *[-+\d.\\${])": "{",  # \mathbf{3\sqrt{2}}
    r"\((?:approx|round|about|estimat)[A-Za-z .]*\)": "",  # 18 (approximately)
    r"^(?:\\approx|\\sim|approx(?:imately)?|about|roughly)(?=[- \d.])": "",  # about 18
    r"^(-?\d+\.?\d*)e\+?(?=-?\d\d)(-?)0*(\d+)$": r"\1 \\times 10^{\2\3}",  # 1e-05, a float
}
WRAPPERS = {
    r"(?<=[\w})\]$%*!|]) *[.,;:]$": "",  # 3.5.
    # $18$, {18}, \(18\), \[18\]
    r"^(?:\$\$?([^$]*)\$\$?|\{([^{}]*)\}|\\\(([^()]*)\\\)|\\\[([^][]*)\\\])$": r"\1\2\3\4",
}
SENTENCE = re.compile(r"[A-Z][a-z]* [a-z]+ ")  # "The answer is 5": left to math-verify

FRACTION = r"\d+/0*[1-9]\d*|\\[dt]?frac\{\d+\}\{0*[1-9]\d*\}"  # 3/4, \frac{3}{4}
# 1.2 \times 10^{3}, 10^5
POWER = r"(?:\d+(?:\.\d+)? *(?:\\times|\\cdot|\*) *)?10\^(?:\d(?!\d)|\{-?\d{1,2}\})"
# 1,234.5; 1e-05; .5
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\d))?|\.\d+"
NUMBER = rf"-?(?:{FRACTION}|{POWER}|{DECIMAL})"  # -3/4
PLAIN_NUMBER = re.compile(rf"\s*(?:\\?\$)?\s*({NUMBER})\s*\$?\s*", re.ASCII)  # $18$
PYTHON_NUMBER = {  # LaTeX numbers as Fraction reads them
    r"\\[dt]?frac\{(\d+)\}\{(\d+)\}": r"\1/\2",  # \frac{3}{4}
    r"^(-?)10\^": r"\g<1>1*10^",  # -10^{3}
    r" *(?:\\times|\\cdot|\*) *10\^\{?(-?\d+)\}?": r"e\1",  # 1.2 \times 10^{3}
}

CURRENCY = r"\\?\$|[€£¥₹]|(?:US|USD|EUR|GBP|INR|Rs)\b\.?(?: *\\?\$)?"  # US$
MINUS_CURRENCY = rf"^- *({CURRENCY}) *"  # -$18
QUANTITY = re.compile(rf"({CURRENCY})? *({NUMBER})(.*)", re.ASCII)  # $18 per hour
SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# The names of each unit, the first of them standard. Only these units are known to differ.
UNITS = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre
|in inch inches|ft foot feet|yd yard|mi mile|s sec second|min minute|h hr hrs hour|day|week|month
|yr yrs year|mg milligram|g gram|kg kilogram|lb lbs|oz ounce|ml milliliter millilitre|l liter litre
|gal gallon|$ dollar us usd|€ euro eur|£ gbp|₹ rs rupee inr|元 yuan rmb|¢ cent|degree deg|/ per|^
|% percent pct percentage|2|3"""
UNIT = {}  # the standard name by any name
for unit in UNITS.split("|"):
    names = unit.split()
    UNIT.update(dict.fromkeys(names, names[0]))
PERCENT = ("%",)
# What follows a number and is not a unit: 18 or 19, 18 mod 20, 18\pi, 18^2, 5 feet 3
NO_UNIT = re.compile(
    r"\b(?:or|and|to|mod|modulo|dozen|if|when|for|plus|minus|times|over|base|sin|cos|tan|log|exp"
    r"|sqrt|alpha|beta|gamma|delta|theta|lambda|omega|phi)\b|\\|^ *[/^\d]|[a-z] +\d"
)
UNIT_REWRITES = {
    r"\^ *\{? *\\circ|\\degree": " degree ",  # 18^\circ
    FONT + r"|[{}.]|\\(?=[$%])": " ",  # 18 \text{cm}, 18\%
    r"\bmph\b": "mi/h",  # 60 mph
}

PHRASE_REWRITES = {  # of an answer in words
    # (B) 12; Option B: 12
    r"^(?:(?i:option|choice|answer):? )? *\(?([A-J])[).:](?: (?!.*\b[B-HJ]\b).*|$)": r"\1",
    r"\b([A-J])(?: *, *| *,? and )(?=[A-J]\b)": r"\1",  # A, C; A and C
    r"^((?i:yes|no|true|false))[,.;:].*": r"\1",  # Yes, it is
    r"^(?i:dne)$": "does not exist",  # DNE
    r"(?<=[a-z]{3})s\b|[ .']": "",  # no solutions
}
PHRASE = r"(?:\d{1,2}:\d\d)?[A-Za-z]+"  # nosolution, 3:30PM

NO_ANSWERS = {"", "proof", "notfound", "not found", "none", "nan", "null", "n/a", "unknown"}
DICTIONARY = r"\{\s*['\"]"  # {'value': 52}
NAMED_VALUE = r"([A-Za-z]\w*) *= *([^=,]+)(?:,|$)"  # a=1, b=2
AND = r"\\text\{ *and *\}|\band\b"  # a=1 and b=2
WORD_BEFORE_WORD = r"[^\W\d_]{2,}(?=[.:]?\s+[^\W\d_]{2})"  # "So" in "So Tom has 5 apples"
# Begins with a word, perhaps numbered: (a) Find. Or has a second sentence: $x$ is 5. Then
PROSE_START = r"(?s)(\W*\w[.)])?\W*[^\W\d_]{2}|.*\w\.\s+[A-Z]"
PROOF = r"(?i)\W*proof\b"  # **Proof.** Let x

# ------------------------------------------------------------------------------- reading


class Answer(NamedTuple):
    """An answer as read: `read("$18$ km")` is Answer("18", 18, ("km",))."""

    text: str
    value: Fraction | None = None  # None if the answer is not one number
    unit: tuple[str, ...] = ()


def last_boxed(text: str) -> str | None:
    r"""Return the content of the balanced `\boxed{...}` that begins last, or None.

    A box that is never closed (a truncated response) is ignored. Of nested boxes the inner one
    counts. The braces are read once, without recursion.
    """
    open_groups = []  # where the content of each box begins, -1 for other groups
    content = None
    start = -1
    for token in BRACES.finditer(text):
        if token["box"]:
            open_groups.append(token.end())
        elif token["open"]:
            open_groups.append(-1)
        elif token["close"] and open_groups:
            begins = open_groups.pop()
            if begins > start:
                start = begins
                content = text[begins : token.start()]
    return content


def in_box(text: str) -> str:
    """Put an answer into a box, unless it has one: math-verify often cannot read bare LaTeX."""
    if "\\boxed" in text:
        return text
    return f"\\boxed{{{text}}}"


def rewrite(text: str, rules: dict[str, str]) -> str:
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return text


def tidy(text: str) -> str:
    """Remove markup and a final punctuation mark, and write Unicode characters as LaTeX."""
    text = " ".join(text.split())
    if SENTENCE.match(text):
        return text

    text = rewrite(text, UNICODE_REWRITES)
    text = unicodedata.normalize("NFKC", text)
    text = rewrite(text, REWRITES)
    for _ in range(3):  # wrappers may be nested: **{18.}**
        text = rewrite(text.strip(" *`"), WRAPPERS)
    return text.strip()


def plain_number(text: str) -> Fraction | None:
    r"""Return the value of an integer, decimal, `a/b`, `\frac{a}{b}`, `1e-05` or `2 \times 10^{3}`.

    A sign, thousands separators, dollar signs and surrounding spaces are allowed. The result is
    None for any other text and for texts of more than 40 characters.
    """
    match = PLAIN_NUMBER.fullmatch(text)
    if match is None or len(text) > 40:
        return None
    number = match[1].replace(",", "")
    if "\\" in number or "^" in number:  # Fraction reads all others
        number = rewrite(number, PYTHON_NUMBER)
    return Fraction(number)


def read(text: str) -> Answer:
    """Read an answer as far as is possible without math-verify."""
    value = plain_number(text)
    if value is not None and "$" not in text and "e" not in text:
        return Answer(text.strip(), value)

    text = tidy(text)
    match = QUANTITY.fullmatch(re.sub(MINUS_CURRENCY, r"\1-", text))
    if match is None:
        return Answer(text)
    currency, number, rest = match.groups(default="")
    value = plain_number(number)
    unit = rewrite(f"{currency} {rest}".lower(), UNIT_REWRITES)
    words = re.findall(r"[a-z]+|\S", unit)  # "mi/h" is mi, / and h
    known = all(word in UNIT or len(word) > 2 for word in words)
    if value is None or NO_UNIT.search(unit) or not known:
        return Answer(text)

    if words and words[0] in SCALE:  # 18 thousand dollars
        zeros = SCALE[words.pop(0)]
        number += rf" \times 10^{{{zeros}}}"
        value *= 10**zeros

    # `km` for `kilometers`; other words stay as they are
    names = tuple(UNIT.get(word, UNIT.get(word.removesuffix("s"), word)) for word in words)
    if names == PERCENT:
        return Answer(text, value, names)
    return Answer(number, value, names)


def phrase(text: str) -> str:
    """Return the letters of an answer in words, a choice or a time of day; else an empty text."""
    text = re.sub(FONT + r"|[{}]", " ", text)  # \text{Yes}
    text = rewrite(text.strip(), PHRASE_REWRITES)
    if re.fullmatch(PHRASE, text):
        return text.casefold()
    return ""


# ------------------------------------------------------------------------------- comparison


def quick_verdict(reference: Answer, answer: Answer) -> bool | None:
    """Whether two answers are equal; None if only math-verify can decide."""
    if reference.text == answer.text and reference.unit == answer.unit:
        return reference.text != ""

    if reference.value is not None and answer.value is not None:
        return same_quantity(reference, answer)

    if reference.value is not None and answer.text.startswith("["):
        return False  # a list with one number is not a number

    words = phrase(reference.text)
    if words and words == phrase(answer.text):
        return True
    return None


def same_quantity(reference: Answer, answer: Answer) -> bool | None:
    """Whether two numbers with units are equal; None if only math-verify can decide."""
    pairs = [(reference.value, answer.value)]
    if reference.unit != answer.unit:
        known = set(reference.unit + answer.unit) <= set(UNIT.values())
        if known and reference.unit and answer.unit:
            return False
        if reference.unit == PERCENT:  # 50% equals 50 and also 1/2
            pairs.append((reference.value / 100, answer.value))
        if answer.unit == PERCENT:
            pairs.append((reference.value, answer.value / 100))

    if any(left == right for left, right in pairs):
        return True
    for left, right in pairs:
        scale = max(abs(left), abs(right))
        if abs(left - right) * 10**5 < min(1, scale):
            return None  # math-verify rounds decimals to six places
    return False


# ------------------------------------------------------------------------------- references


def reference_text(reference: str) -> str:
    """Return the answer that a reference holds, or an empty text if it holds none.

    The answer is the content of the box if there is exactly one box, else the whole text.
    """
    text = None
    if reference.count("\\boxed") == 1:
        text = last_boxed(reference)
    if text is None:
        text = reference
    text = text.strip()
    if text.casefold() in NO_ANSWERS or re.match(DICTIONARY, text) or len(text) > MAX_REFERENCE:
        return ""
    return text


def without_names(reference: str) -> str:
    """Return `(1, 2)` for `a=1, b=2`: an answer that omits the names must keep their order."""
    text = re.sub(AND, ",", reference)
    pairs = re.findall(NAMED_VALUE, text)
    if len(dict(pairs)) == text.count("=") > 1:  # each `=` belongs to a name of its own
        values = ", ".join(value for _, value in pairs)
        return f"({values})"
    return reference


def is_prose(text: str) -> bool:
    """Whether a text without a box is a proof or an explanation instead of an answer.

    Prose has at least four words that are followed by a word, and it begins with a word or has
    several sentences.
    """
    if "\\boxed" in text:
        return False
    if re.match(PROOF, text):
        return True
    words = re.findall(WORD_BEFORE_WORD, text)
    return len(words) > 3 and bool(re.match(PROSE_START, text))
