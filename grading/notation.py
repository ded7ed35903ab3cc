r"""One notation for what LaTeX, Unicode and models write in many ways.

`tidy(r"\mathbf{\dfrac12}\,\text{ cm}")` is `\frac{1}{2} cm`.
"""

import functools
import re
import unicodedata

# The names of commands, and what they become; ~ is a space, \math and \text are removed below
COMMANDS = r"""dfrac tfrac cfrac -> \frac, dbinom tbinom -> \binom, leq leqslant -> \le,
geq geqslant -> \ge, neq -> \ne, sim -> \approx, backslash -> \setminus, tg -> \tan,
ctg cotg -> \cot, lg -> \log_{10}, cdots dots dotsc -> \ldots, langle -> (, rangle -> ),
uppi -> \pi, emptyset varnothing -> \{\}, bar -> \overline,
lbrace -> \{, rbrace -> \}, lt -> <, gt -> >,
colon -> :,
textbf textit textrm textsf texttt textnormal textsc mbox fbox emph underline boxed -> \text,
mathbf mathit mathrm mathsf mathtt mathcal mathnormal boldsymbol bm operatorname -> \math,
land wedge -> ~and~, lor vee -> ~or~, degree -> ^\circ~, pounds -> £,
qquad quad bf rm it sf tt em bfseries itshape Large large -> ~,
mid vert lvert rvert -> |,
left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits nolimits -> """
COMMAND = {}
for names, command in re.findall(r"([\w\s]+) -> ?([^,]*)", COMMANDS):
    COMMAND.update(dict.fromkeys(names.split(), command))
CHARACTERS = r"""∞ \infty~ · \cdot~ ⋅ \cdot~ × \times~ ÷ \div~ ≈ \approx~ ± \pm~ ≤ \le~ ≥ \ge~
≠ \ne~ ≡ \equiv~ ∪ \cup~ ∈ \in~ ∅ \emptyset~ π \pi~ θ \theta~ ° ^\circ~ − - – -
′ ' ’ '"""
CHARACTER = {ord(key): value for key, value in re.findall(r"(\S) (\S+)", CHARACTERS)}
UNICODE = {
    "[⁰¹²³⁴-⁹⁻]+": r"^{\g<0>}",  # x⁻¹²
    "[¼-¾⅐-⅞]": r" \g<0>",  # 3½ is 3 1/2, not 31/2
    "ℝ": r"\\mathbb{R} ",  # NFKC would make it R
    r"√ *(\d+)|√ *\(([^()]*)\)": r"\\sqrt{\1\2}",  # √13, √(13)
}
FUNCTION = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|c?tg|ln|log|exp|sqrt|pi|infty"
# 5 (by AM-GM), but not a(by+cx), a(by + cx)
REMARK = r"\\?approx|round|about|esti|assum|(?:since|because|using)\b|(?:as|by)(?::| (?![-+*/^=] ))"
# LATEX, BRACES and PLAIN are applied in this order. No pattern repeats a group that itself repeats
# the same characters, so none takes exponential time.
LATEX = {
    r"(?<!\\)\$|~": " ",
    r"(?<!\\)\\\\(?=(?:left|right|[dt]?frac|sqrt|text|pi|le|ge|infty|cdot|cup)\b)": r"\\",
    # 1{,}234 and 1,\!234 in all places; but 0{,}125 is a decimal comma
    r"(?<=\d)(?<!(?<!\d)0)(?:\{,\}|,\\!)(?=\d{3}(?!\d))": "",
    r"\\!(?: |\\,)*|\\checkmark|\\(?:text)?color *\{[^{}]*\}|\\(?:left|right)\.": "",
    r"(?<=\\\\)\[[\d.]+ ?[a-z]{2}\]": "",  # \\[4pt] between the rows of a matrix
    r"\\(?:begin|end) *\{(?:cases|aligned|align\*?|gathered)\}|&(?==)": "",
    r"(?<!\\)((?:\\\\)*)\\(?:[,;: ()\[\]]|$)": r"\1 ",  # 1\,234; \(18\)
}
BRACES = {
    r"\\(?:text|math) *\{((?:[^{}\\]|\\.)*)\}": r" \1 ",  # \text{ cm}
    r"\\(?:text|math) *(?=\{|$)": "",  # \mathbf{3\sqrt{2}}
    r"(\\(?:frac|sqrt|binom)) +(?=\{)|(?<=\}) +(?=\{)": r"\1",
    r"\\frac *(\d|\\pi|[a-z](?=[\d{]))": r"\\frac{\1}",
    r"(\\frac *\{[^{}]*\}) *(\d|[a-z](?![a-z]))": r"\1{\2}",
    r"\\sqrt *(\d|[a-z](?![a-z]))": r"\\sqrt{\1}",
    r"\\log_(\w)": r"\\log_{\1}",
    r"\^ *\{? *\\circ(?![a-z]) *\}?": r"^\\circ ",
    r"\{([,:])\}": r"\1",  # 3{,}5
    r"(\\times|\\cdot) *\{(\d+)\}": r"\1 \2",  # 3 \times {10}^8
    # {3}\sqrt{2}, 17^{th}
    r"^\{([^{}]*)\}$|(?<![\\\w^_}\]])\{([^{}]*)\}|(?<=\d)\^\{ *(th|st|nd|rd) *\}": r"\1\2\3",
    r" +(?=[_^}\])])|(?<=[_^{(\[]) +": "",
}
PLAIN = {
    r"(?<![\\\w])[Ii]nfinity\b": r"\\infty",
    r"(?<=\w) squared\b": "^2",  # 3 squared, metres squared
    r"(?<=\w) cubed\b": "^3",
    r"(?<=\d) and (?=\\frac)": " ",  # 3 and 1/2
    r"(?<![\d/.])(\d+) (\d+)/(\d+)(?!\d)": r"\1\\frac{\2}{\3}",  # 3 1/2
    r"\.\.\.": r"\\ldots",
    r"\\dot *\{?(\d)\}?": r"\\overline{\1}",  # 0.\dot{3}
    r"(\.\d*?)(\d+?)\2+ ?\\ldots": r"\1\\overline{\2}",  # 0.1666...
    # 101 (base 2), but not baseball
    r",? *\(?(?:in )?(?<![a-z])base(?:[- ]|(?=\d))(\w+)\)?$": r"_{\1}",
    r"(\d+)⁄(\d+)": r"\\frac{\1}{\2}",  # 1⁄2, the NFKC form of ½
    r"(?<=\w)\*\*(?=[\w({-])": "^",  # x**2
    "<=|=<": r"\\le ",
    ">=": r"\\ge ",
    rf"(?<![\\A-Za-z])({FUNCTION})(?=[({{\d^]| [^=A-Za-z]| [a-z](?![a-z]))": r"\\\1",  # log(2)
    r"(?<=[\w})\]$%*!|']) *[.,;:]$": "",  # 3.5.
    rf"\((?:{REMARK})[^()]*(?:\([^()]*\))*[^()]*\)$": "",
    r"^(?:\\approx|approx(?:imately|\.)?|about|roughly)(?=[- \d.\\])": "",  # about 18
}


compiled = functools.cache(re.compile)


def rewrite(text: str, rules: dict[str, str]) -> str:
    """Replace each pattern, in order. To search first is faster, since most are not there."""
    for pattern, replacement in rules.items():
        if compiled(pattern).search(text):
            text = compiled(pattern).sub(replacement, text)
    return text


def with_plain_commas(text: str) -> str:
    r"""Write `1{,}000` and `1,\!000` as `1,000`, which may also be a list."""
    return re.sub(r"\{,\}|,\\!", ",", text)


def tidy(text: str) -> str:
    """Remove markup and write everything in one notation."""
    text = " ".join(text.split())
    if not text.isascii():
        text = unicodedata.normalize("NFKC", rewrite(text, UNICODE)).translate(CHARACTER)
    for _ in range(4):  # fonts may be nested: {\bf\text{18.}}
        before = text
        text = rewrite(text, LATEX)
        text = re.sub(r"\\([A-Za-z]+)", lambda name: COMMAND.get(name[1], name[0]), text)
        text = " ".join(rewrite(text, BRACES).replace("~", " ").split())
        text = rewrite(text.strip(" *`"), PLAIN).strip()
        if text == before:
            break
    return text
