r"""Find the answer in a response or in a reference: in boxes, after `####`, on an answer line.

README.md lists the rules with examples.
"""

import json
import re
from contextlib import suppress
from fractions import Fraction

from grading.notation import rewrite

# `\boxed{`, `{` and `}`. An escaped brace does not group: `\{`. `\\` is a line break, except in
# `\\boxed{`, a box that was escaped twice.
BRACES = r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<open>\{)|(?P<close>\})"
BARE_BOX = r"\\(?:boxed|fbox) *(\d+[./]\d+|\w+|\\[a-z]+)"  # \boxed 12, in references
# What may stand between boxes that make one statement: $\boxed{1}$ and $\boxed{2}$
BETWEEN = re.compile(
    r"(?:[\s,;$&~.]|\\[\s,;:!()\[\]\\]|\\q?quad(?![a-z])|\\(?:text|mbox|textbf)(?=\{)|[{}]"
    r"|\b(?:and|or)\b)*"
)
# `Answer: 42`, `**Answer:** 42`, `Final answer: 42`, `The answer is 42`, `#### 42`
LABEL = (
    r"(?:(?!\n)[\W_])*(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?"
    r"answers?(?:\W*:| is\b:?|\.)[*_\s]*+"
)
# Final Answer: The final answer is $42$. I hope it is correct.
ANSWER_LINE = rf"(?im)^(?:.*#### *|(?:{LABEL}){{1,2}})(\S.*?)(?: I hope it is correct\.)?$"

# A proof; nothing; not found, None, nan; {'value': 52}
NO_ANSWER = (
    r"(?i)\W*proof\b|[\s.]*(?:(?:\\boxed\{\}|not ?found|none|nan|null|n/a|unknown)?[\s.]*$"
    r"|\{\s*['\"])"
)
MAX_REFERENCE = 4096  # characters
# The end of a solution: `The answer is: Friday`, `**Answer:** 12`, `So the answer is $12$.`
# Not: `the answer is a prime`, `the answer is independent of x`. After "is" without a colon, of
# words only yes, no, true and false count.
STATED = re.compile(
    r"(?i)(?<![*_#])[*_#]*(?:\b(?:so|thus|hence|therefore)\b,? )?(?:\bthe )?"
    r"(?:\b(?:final|correct) )?\banswer(?:(?: is)?[*_ ]*:"
    r"| is(?! (?!yes|no\b|true|false)(?:[a-z]{2}|(?-i:a)\b)))"
    r"[*_ ]*(\S.*)\s*\Z"
)
# Prose: at least four of its words stand before another word, as "So" and "Tom" do in "So Tom has
# 5". In addition it begins with a word, perhaps numbered: "(a) Find"; or it has a second sentence:
# "$x$ is 5. Then".
WORD_BEFORE_WORD = r"(?<![^\W\d_])[^\W\d_]{2,}(?=[.:]?\s+[^\W\d_]{2})"
PROSE = r"(?s)(\W*\w[.)])?\W*[^\W\d_]{2}|.*\w\.\s+[A-Z]"

# What may be too large to evaluate: an exponent of more than four digits; a power in an exponent; a
# power of a power of brackets, ((x+1)^2)^3; a factorial of a factorial; a number of more than four
# digits in a text with a factorial or a binomial
TOO_LARGE = re.compile(
    r"(?s)\^(?:\{[^{}]*(?<![\d.])|[-+( ]*)\d{5}|\^(?:\{[^{}]*|\w)\^|\)\^(?:\{[^{}]*\}|\w)\)\^|!\)*!"
    r"|\A(?=.*(?:!|\\binom|[Cc]_)).*\d{5}"
)

# Commands that begin like an escape of JSON, and whose rest is no word: not \tan, \nu
ESCAPED = r"text\w*|times|tfrac|theta|triangle|frac|forall|binom|beta|begin|boxed|right\w*|rangle"

FRACTION = r"[-+]?\d+/-?0*[1-9]\d*|\\[dt]?frac\{[-+]?\d+\}\{-?0*[1-9]\d*\}"  # 3/4, \frac{3}{4}
# 1.2 \times 10^{3}, 10^5
POWER = r"(?:\d+(?:\.\d+)? *(?:\\times|\\cdot|\*) *)?10\^(?:\d(?!\d)|\{[-+]?\d{1,2}\})"
# 1,234.5; 12,00,000; 10'000; 12 345; not 0,125
GROUPS = r"[1-9](?:\d{0,2}(?:,\d{3})+|\d?(?:,\d\d)+,\d{3}|\d{0,2}(?:'\d{3})+|\d{0,2}(?: \d{3})+)"
# .5, 1e-05
DECIMAL = rf"(?:{GROUPS}|\d+)(?:\.\d+)?(?:[eE][-+]?\d{{1,2}}(?!\d))?|\.\d+"
NUMBER = rf"[-+]? *(?:{FRACTION}|{POWER}|{DECIMAL})"
PLAIN_NUMBER = re.compile(rf"\s*{NUMBER}\s*", re.ASCII)
AS_FRACTION = {  # rewritten for Fraction()
    r"[,'\s+]": "",
    r"\\[dt]?frac\{(.*)\}\{(.*)\}": r"\1/\2",
    r"(.*)/-": r"-\1/",
    "--": "",
    r"(?:\\times|\\cdot|\*)?10\^\{?(-?\d+)\}?": r"e\1",
    "^(-?)e": r"\g<1>1e",
}


def boxes(text: str) -> list[tuple[int, int, int]]:
    """Where each balanced box begins, and its content begins and ends, sorted by the first.

    A box that is never closed (a truncated response) is ignored. The braces are read once, without
    recursion.
    """
    open_groups, found = [], []
    for token in re.finditer(BRACES, text):
        if token["box"] or token["open"]:
            open_groups.append(token)
        elif token["close"] and open_groups:
            opening = open_groups.pop()
            if opening["box"]:
                found.append((*opening.span(), token.start()))
    return sorted(found)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the balanced `\boxed{...}` that begins last, or None.

    Boxes with only separators between them make one statement: `1, 2` for `\boxed{1}` and
    `\boxed{2}`. An empty box is passed over. Of nested boxes the inner one counts.
    """
    contents, statement_begins = [], len(text)
    for begin, start, end in reversed(boxes(text)):
        if not text[start:end].strip():
            continue
        if contents and not BETWEEN.fullmatch(text, end + 1, statement_begins):
            break
        contents.append(text[start:end])
        statement_begins = begin
    return ", ".join(reversed(contents)) or None


def find_answer(response: str, answer_format: str) -> str | None:
    """Return the answer of a response: what is boxed, or what the last answer line says.

    "auto" reads the answer line if there is no box.
    """
    boxed = last_boxed(response)
    if answer_format == "boxed" or (boxed and answer_format == "auto"):
        return boxed
    lines = re.findall(ANSWER_LINE, response)
    line = lines[-1] if lines else ""
    return last_boxed(line) or line.strip("* ") or None


def reference_text(reference: str) -> str:
    """Return the answer that a reference holds, or an empty text if it holds none.

    The answer is what follows `####`, else what is boxed last, else what it states at its end, else
    all of it. Prose and proofs hold none.
    """
    text = re.sub(BARE_BOX, r"\\boxed{\1}", reference).strip()
    if text.startswith('["'):  # a list of answers as JSON: ["1", "2"]
        with suppress(ValueError, TypeError):
            text = ", ".join(json.loads(escape_latex(text)))
    boxed, stated = last_boxed(text), STATED.search(text)
    if "####" in text:
        text = STATED.sub("", text.rpartition("####")[2]).strip()
    elif boxed or stated:
        text = boxed or stated[1].rstrip("*_. ")
    prose = len(re.findall(WORD_BEFORE_WORD, text)) > 3 and re.match(PROSE, text)
    if len(text) > MAX_REFERENCE or re.match(NO_ANSWER, text) or (prose and not boxed):
        return ""
    return text


def escape_latex(text: str) -> str:
    r"""Double the backslash of commands that JSON and Python would read as \t, \f, \b or \r."""
    return re.sub(rf"(?<!\\)\\(?=(?:{ESCAPED})(?![a-z]))", r"\\\\", text)


def plain_number(text: str) -> Fraction | None:
    r"""Return the value of an integer, decimal, `a/b`, `\frac{a}{b}`, `1e-05` or `2 \times 10^{3}`.

    A sign, thousands separators and surrounding spaces are allowed. The result is
    None for any other text and for texts of more than 40 characters.
    """
    if len(text) <= 40 and PLAIN_NUMBER.fullmatch(text):
        return Fraction(rewrite(text, AS_FRACTION))
    return None
