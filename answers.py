r"""How an answer is read: its box, its markup, its unit, its number. Text alone, no sympy.

Every rule, with examples and with what is arguable, is in docs/verifier.md; verifier.py takes to
math-verify what cannot be decided here.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_TEXT = 4096  # characters of a gold, and of an unboxed response, that are read

# An escaped brace groups nothing; `\\` is a line break, but `\\boxed` is a box escaped twice.
BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<open>\{)|(?P<close>\})")

# ------------------------------------------------------------------------------- rules
# No pattern repeats what holds a repetition of its own kind, so that each takes linear time.

SYMBOLS = {"−": "-", "∞": r"\infty ", "·": r"\cdot ", "⋅": r"\cdot ", "≈": r"\approx "}
FONT = (
    r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|cal|normal)|text|[mf]box|emph|underline|boldsymbol|bm)"
    r"\s*\{"
)
SWITCH = r"\\(?:bf|rm|it|sf|tt|em)(?:series|shape)?(?![A-Za-z])"
REWRITES = [  # of a text without line breaks, in this order
    (r"√ *(\d+)|√ *\(([^()]*)\)", r"\\sqrt{\1\2}"),
    (r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}"),  # what NFKC makes of ½
    (r"°", r"^\\circ "),
    (r"^\$(-?[\d.,]+)\$", r"\1"),
    (r"\\! *|\\(?:text)?color *\{[^{}]*\}|\\(?:display|text)style(?![A-Za-z])", ""),
    (SWITCH, " "),
    (r"(?<=\d)(?:\\[,;: ]|\{,\}|[~ ])(?=\d{3}(?!\d))", ""),  # 1\,234
    (r"(?<!\\)(?:\\[,;: ]|\\q?quad(?![A-Za-z])|~)", " "),
    (FONT + r"(?= *[-+\d.\\${])", "{"),  # \mathbf{3\sqrt{2}}
    (r"\((?:approx|round|about|estimat)[A-Za-z .]*\)", ""),
    (r"^(?:\\approx|\\sim|approx(?:imately)?|about|roughly)(?=[- \d.])", ""),
    (r"^(-?\d+\.?\d*)e\+?(?=-?\d\d)(-?)0*(\d+)$", r"\1 \\times 10^{\2\3}"),  # a float's 1e-05
]
STOP = r"(?<=[\w})\]$%*!|]) *[.,;:]$"
WRAPPED = re.compile(r"\$\$?([^$]*)\$\$?|\{([^{}]*)\}|\\\(([^()]*)\\\)|\\\[([^][]*)\\\]")
SENTENCE = re.compile(r"[A-Z][a-z]* [a-z]+ ")  # left to math-verify

FRACTION = r"\d+/0*[1-9]\d*|\\[dt]?frac\{\d+\}\{0*[1-9]\d*\}"
POWER = r"(?:\d+(?:\.\d+)? *(?:\\times|\\cdot|\*) *)?10\^(?:\d(?!\d)|\{-?\d{1,2}\})"
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\d))?|\.\d+"
NUMBER = rf"-?(?:{FRACTION}|{POWER}|{DECIMAL})"
PYTHON = [  # of a number, as Fraction reads it
    (r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2"),
    (r"^(-?)10\^", r"\g<1>1*10^"),
    (r" *(?:\\times|\\cdot|\*) *10\^\{?(-?\d+)\}?", r"e\1"),
]
PLAIN = re.compile(rf"\s*(?:\\?\$)?\s*({NUMBER})\s*\$?\s*", re.ASCII)
CURRENCY = r"\\?\$|[€£¥₹]|(?:US|USD|EUR|GBP|INR|Rs)\b\.?(?: *\\?\$)?"
QUANTITY = re.compile(
    rf"(?:(?P<minus>-?) *(?P<currency>{CURRENCY}))? *(?P<number>{NUMBER})(?P<unit>.*)", re.ASCII
)
SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# The names of a unit; only units that are here can be told to differ.
UNITS = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre
|in inch inches|ft foot feet|yd yard|mi mile|s sec second|min minute|h hr hrs hour|day|week|month
|yr yrs year|mg milligram|g gram|kg kilogram|lb lbs|oz ounce|ml milliliter millilitre|l liter litre
|gal gallon|$ dollar us usd|€ euro eur|£ gbp|₹ rs rupee inr|元 yuan rmb|¢ cent|degree deg|/ per|^
|% percent pct percentage|2|3"""
UNIT = {name: names.split()[0] for names in UNITS.split("|") for name in names.split()}
NO_UNIT = re.compile(  # what may follow a number and is no unit
    r"\b(?:or|and|to|mod|modulo|dozen|if|when|for|plus|minus|times|over|base|sin|cos|tan|log|exp"
    r"|sqrt|alpha|beta|gamma|delta|theta|lambda|omega|phi)\b|\\|^ *[/^\d]|[a-z] +\d"
)
UNIT_REWRITES = [
    (r"\^ *\{? *\\circ|\\degree", " degree "),
    (FONT + r"|[{}.]|\\(?=[$%])", " "),
    (r"\bmph\b", "mi/h"),
]
PHRASES = [  # of an answer in words
    (r"^(?:(?i:option|choice|answer):? )? *\(?([A-J])[).:](?: (?!.*\b[B-HJ]\b).*|$)", r"\1"),
    (r"\b([A-J])(?: *, *| *,? and )(?=[A-J]\b)", r"\1"),
    (r"^((?i:yes|no|true|false))[,.;:].*", r"\1"),
    (r"^(?i:dne)$", "does not exist"),
    (r"(?<=[a-z]{3})s\b|[ .']", ""),
]
NO_ANSWERS = {"", "proof", "notfound", "not found", "none", "nan", "null", "n/a", "unknown"}


def last_boxed(text: str) -> str | None:
    r"""The content of the balanced `\boxed{...}` that begins last, None where there is none.

    A box that is never closed (a response cut off) is passed over; of nested boxes the inner one
    counts. One pass over the braces, without recursion.
    """
    opened, content = [], slice(-1, -1)
    for token in BRACES.finditer(text) if "\\boxed" in text else ():
        if token["box"] or token["open"]:
            opened.append(token.end() if token["box"] else -1)
        elif token["close"] and opened and (start := opened.pop()) > content.start:
            content = slice(start, token.start())
    return None if content.start < 0 else text[content]


def in_box(text: str) -> str:
    """The form that math-verify reads most reliably; a bare gold it often cannot read."""
    return text if "\\boxed" in text else f"\\boxed{{{text}}}"


def rewritten(text: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, to in rules:
        text = re.sub(pattern, to, text)
    return text


def tidy(text: str) -> str:
    """The same answer without markup, a full stop at its end, and characters beyond LaTeX's."""
    text = " ".join(text.split())
    if SENTENCE.match(text):
        return text
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", text)
        text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)  # 3½ is 3 1/2
        text = unicodedata.normalize("NFKC", text).translate(str.maketrans(SYMBOLS))
    text = rewritten(text, REWRITES)
    for _ in range(3):
        text = re.sub(STOP, "", text.strip(" *`"))
        if match := WRAPPED.fullmatch(text):
            text = match[match.lastindex].strip()
    return text


def plain_number(text: str) -> Fraction | None:
    r"""The value of an integer, a decimal, `a/b`, `\frac{a}{b}`, `1e-05` or `1.2 \times 10^{3}`.

    A sign, thousands commas, and dollars and spaces around it are allowed, 40 characters at most.
    """
    match = PLAIN.fullmatch(text) if len(text) <= 40 else None
    if not match:
        return None
    number = match[1].replace(",", "")
    return Fraction(rewritten(number, PYTHON) if "\\" in number or "^" in number else number)


def phrase(text: str) -> str:
    """The letters of an answer in words, of a choice or of a time of day; empty for all else."""
    text = rewritten(re.sub(FONT + r"|[{}]", " ", text).strip(), PHRASES)
    return text.casefold() if re.fullmatch(r"(?:\d{1,2}:\d\d)?[A-Za-z]+", text) else ""


class Answer(NamedTuple):
    """A tidy text; where it is a number with or without a unit, its value and the unit's words."""

    text: str
    value: Fraction | None = None
    unit: tuple[str, ...] = ()


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Answer:
    """Reads an answer as far as that is possible without math-verify."""
    if not {"$", "e"} & set(text) and (value := plain_number(text)) is not None:
        return Answer(text.strip(), value)
    text = tidy(text)
    match = QUANTITY.fullmatch(text)
    value = plain_number(match["number"]) if match else None
    if value is None:
        return Answer(text)
    unit = rewritten(f"{match['currency'] or ''} {match['unit']}".lower(), UNIT_REWRITES)
    words = re.findall(r"[a-z]+|\S", unit)
    if NO_UNIT.search(unit) or not all(word in UNIT or len(word) > 2 for word in words):
        return Answer(text)
    number = (match["minus"] or "") + match["number"]
    value = -value if match["minus"] else value
    if words and words[0] in SCALE:
        number += rf" \times 10^{{{SCALE[words[0]]}}}"
        value *= 10 ** SCALE[words.pop(0)]
    words = tuple(UNIT.get(word, UNIT.get(word.removesuffix("s"), word)) for word in words)
    return Answer(text if words == ("%",) else number, value, words)


def quick_verdict(gold: Answer, answer: Answer) -> bool | None:
    """Whether two answers are the same; None where only math-verify can tell."""
    if gold.text == answer.text and gold.unit == answer.unit:
        return gold.text != ""
    if gold.value is None or answer.value is None:
        if gold.value is not None and answer.text.startswith("["):
            return False  # a list of one number
        words = phrase(gold.text)
        return True if words and words == phrase(answer.text) else None
    golds, answers = [gold.value], [answer.value]
    if gold.unit != answer.unit:  # 50% is 50, and it is 1/2
        known = set(gold.unit + answer.unit) <= set(UNIT.values())
        if known and gold.unit and answer.unit:
            return False
        golds += [gold.value / 100] * (gold.unit == ("%",))
        answers += [answer.value / 100] * (answer.unit == ("%",))
    if not set(golds).isdisjoint(answers):
        return True
    # math-verify rounds decimals to six places, so it is asked about a near miss
    pairs = [(float(g), float(a)) for g in golds for a in answers]
    near = any(abs(g - a) < 1e-5 * min(1, max(abs(g), abs(a))) for g, a in pairs)
    return None if near else False


def in_order(gold: str) -> str:
    """`(1, 2)` for `a=1, b=2`: an answer without names is held to their order."""
    text = re.sub(r"\\text\{ *and *\}|\band\b", ",", gold)
    pairs = re.findall(r"([A-Za-z]\w*) *= *([^=,]+)(?:,|$)", text)
    named = len({name for name, _ in pairs}) == text.count("=") > 1
    return f"({', '.join(value for _, value in pairs)})" if named else gold


def gold_text(gold: str) -> str:
    """What a gold's box holds, all of it where there are several; empty where it is no answer."""
    boxed = last_boxed(gold) if gold.count("\\boxed") == 1 else None
    text = gold.strip() if boxed is None else boxed.strip()
    none = text.casefold() in NO_ANSWERS or re.match(r"\{\s*['\"]", text) or len(text) > MAX_TEXT
    return "" if none else text


def is_prose(text: str) -> bool:
    """Whether a text without a box is a proof or an explanation: four of its words stand before
    another, and it begins with a word or has sentences."""
    words = re.findall(r"[^\W\d_]{2,}(?=[.:]?\s+[^\W\d_]{2})", text)
    begins = re.match(r"(?s)(\W*\w[.)])?\W*[^\W\d_]{2}|.*\w\.\s+[A-Z]", text)
    proof = re.match(r"(?i)\W*proof\b", text)
    return "\\boxed" not in text and bool(proof or (len(words) > 3 and begins))
