r"""Find the answer in a response or in a reference: in boxes, after `####`, on an answer line.

README.md lists the rules with examples.
"""

import json
import re
from contextlib import suppress
from fractions import Fraction

MAX_REFERENCE = 4096  # characters; a longer reference answer is not read
FORMATS = ("boxed", "line", "auto")

# `\boxed{`, `{` and `}`. An escaped brace does not group: `\{`. `\\` is a line break, except in
# `\\boxed{`, a box that was escaped twice.
BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<open>\{)|(?P<close>\})"
)
BARE_BOX = re.compile(r"\\(?:boxed|fbox) *(\w+|\\[a-z]+)")  # \boxed 12, in references
# What may stand between boxes that make one statement: $\boxed{1}$ and $\boxed{2}$
BETWEEN = re.compile(
    r"(?:[\s,;$&~.]|\\[\s,;:!()\[\]\\]|\\q?quad(?![a-z])|\\(?:text|mbox|textbf)(?=\{)|[{}]"
    r"|\b(?:and|or)\b)*"
)
# `Answer: 42`, `**Answer:** 42`, `Final answer: 42`, `The answer is 42`, `#### 42`
LABEL = r"[\W_]*(?:the )?(?:final |correct )?answers?(?:\W*:| is\b:?|\.)[*_\s]*"
ANSWER_LINE = re.compile(rf"(?im)^(?:.*#### *|{LABEL})(\S.*?) *$")

NO_ANSWERS = {
    "",
    r"\boxed{}",
    "proof",
    "notfound",
    "not found",
    "none",
    "nan",
    "null",
    "n/a",
    "unknown",
}
DICTIONARY = r"\{\s*['\"]"  # {'value': 52}
WORD_BEFORE_WORD = r"[^\W\d_]{2,}(?=[.:]?\s+[^\W\d_]{2})"  # "So" in "So Tom has 5 apples"
# Begins with a word, perhaps numbered: (a) Find. Or has a second sentence: $x$ is 5. Then
PROSE_START = r"(?s)(\W*\w[.)])?\W*[^\W\d_]{2}|.*\w\.\s+[A-Z]"
PROOF = r"(?i)\W*proof\b"  # **Proof.** Let x

FRACTION = r"[-+]?\d+/-?0*[1-9]\d*|\\[dt]?frac\{[-+]?\d+\}\{-?0*[1-9]\d*\}"  # 3/4, \frac{3}{4}
# 1.2 \times 10^{3}, 10^5
POWER = r"(?:\d+(?:\.\d+)? *(?:\\times|\\cdot|\*) *)?10\^(?:\d(?!\d)|\{[-+]?\d{1,2}\})"
# 1,234.5; 12,00,000; 10'000; 12 345; 1e-05; .5
GROUPS = r"\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:'\d{3})+|\d{1,3}(?: \d{3})+"
DECIMAL = rf"(?:{GROUPS}|\d+)(?:\.\d+)?(?:[eE][-+]?\d{{1,2}}(?!\d))?|\.\d+"
NUMBER = rf"[-+]?(?:{FRACTION}|{POWER}|{DECIMAL})"
PLAIN_NUMBER = re.compile(rf"\s*({NUMBER})\s*", re.ASCII)


def boxes(text: str) -> list[tuple[int, int, int]]:
    """Where each balanced box begins, and its content begins and ends, in order of their begin.

    A box that is never closed (a truncated response) is ignored. The braces are read once, without
    recursion.
    """
    open_groups = []  # where each box and its content begin, None for other groups
    found = []
    for token in BRACES.finditer(text):
        if token["box"]:
            open_groups.append(token.span())
        elif token["open"]:
            open_groups.append(None)
        elif token["close"] and open_groups:
            box = open_groups.pop()
            if box:
                found.append((*box, token.start()))
    return sorted(found)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the balanced `\boxed{...}` that begins last, or None.

    Boxes with only separators between them make one statement: `1, 2` for `\boxed{1}` and
    `\boxed{2}`. An empty box is passed over. Of nested boxes the inner one counts.
    """
    contents = []
    statement_begins = len(text)
    for begin, start, end in reversed(boxes(text)):
        content = text[start:end]
        if not content.strip():
            continue
        joined = end < statement_begins and BETWEEN.fullmatch(text, end + 1, statement_begins)
        if contents and not joined:
            break
        contents.append(content)
        statement_begins = begin
    return ", ".join(reversed(contents)) or None


def answer_line(text: str) -> str | None:
    """Return what the last answer line of a response states: `Answer: 42` or `#### 42`."""
    lines = ANSWER_LINE.findall(text)
    if not lines:
        return None
    return last_boxed(lines[-1]) or lines[-1].strip("* ")


def find_answer(response: str, answer_format: str) -> str | None:
    """Return the answer of a response. "auto" reads the answer line where there is no box."""
    answer = None
    if answer_format != "line":
        answer = last_boxed(response)
    if answer is None and answer_format != "boxed":
        answer = answer_line(response)
    return answer


def asked_format(prompt: str) -> str:
    """The format that a prompt asks for: "boxed", "line", or "" if it names none."""
    if re.search(r"\\?boxed", prompt):
        return "boxed"
    return "line" if re.search(r"(?i)\banswer:|####", prompt) else ""


def reference_text(reference: str) -> str:
    """Return the answer that a reference holds, or an empty text if it holds none.

    The answer is what follows `####`, else what is boxed last, else what it states last, else the
    whole text.
    """
    text = reference
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    else:
        bare = BARE_BOX.findall(text)
        text = last_boxed(text) or (bare and bare[-1]) or answer_line(text) or text
    text = in_list(text.strip())
    if text.strip(" .").casefold() in NO_ANSWERS or re.match(DICTIONARY, text):
        return ""
    return text if len(text) <= MAX_REFERENCE else ""


def in_list(text: str) -> str:
    """Return the only text in a JSON list of one, `["1/2"]`, or the texts in brackets."""
    if text.startswith('["'):
        with suppress(ValueError, TypeError):
            texts = json.loads(text)
            return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    return text


def in_box(text: str) -> str:
    """Put an answer into a box, unless it has one."""
    if "\\boxed" in text:
        return text
    return f"\\boxed{{{text}}}"


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


def plain_number(text: str) -> Fraction | None:
    r"""Return the value of an integer, decimal, `a/b`, `\frac{a}{b}`, `1e-05` or `2 \times 10^{3}`.

    A sign, thousands separators and surrounding spaces are allowed. The result is
    None for any other text and for texts of more than 40 characters.
    """
    match = PLAIN_NUMBER.fullmatch(text)
    if match is None or len(text) > 40:
        return None
    number = re.sub("[,' ]", "", match[1])
    sign = 1
    if number.startswith(("-\\", "+\\")):  # -\frac{3}{4}
        sign = int(number[0] + "1")
        number = number[1:]
    if "frac" in number or "/" in number:
        above, below = re.findall(r"[-+]?\d+", number)
        return sign * Fraction(int(above), int(below))
    if "10^" in number:
        factor, _, exponent = number.partition("10^")
        factor = re.sub(r"\\times|\\cdot|\*", "", factor)
        if factor in ("", "-", "+"):
            factor += "1"
        return Fraction(factor) * Fraction(10) ** int(exponent.strip("{}"))
    return Fraction(number)


def too_large(text: str, digits: int) -> bool:
    """Whether a power, a factorial or a binomial in a text may be too large to evaluate.

    digits: the most digits of an exponent, and of any number next to a factorial or binomial.
    """
    many = rf"\d{{{digits + 1}}}"
    tower = r"\^(?:\{[^{}]*|\w)\^|\)\^(?:\{[^{}]*\}|\w)\)\^|!\)*!"
    if re.search(rf"\^\{{?[^{{}}]*{many}|{tower}", text):
        return True
    return bool(re.search(r"!|\\binom|[Cc]_", text) and re.search(many, text))
