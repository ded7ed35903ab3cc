r"""Grades answers to mathematical problems with math-verify, in processes that can be killed.

What a policy writes is hostile input: a tower of powers or a huge factorial sends sympy into work
that neither a thread nor a signal can always stop. So every answer that is more than a number or
words is read in a worker process, under a deadline and a cap on memory; a worker that hangs or
dies is replaced and the answer scored wrong. sympy never enters the caller's process.

    with Grader(workers=2) as grader:
        grader.grade([r"so \boxed{\frac{2}{4}}", "no box"], golds=["0.5", "7"])  # [True, False]

Needs math-verify and tqdm alone: copy this file as it is. Every rule, with examples and with what
is arguable: docs/verifier.md.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

MAX_ANSWER = 512  # characters; a longer boxed answer is wrong
MAX_TEXT = 4096  # characters of an unboxed response that are read, from its end; of a gold
START_SECONDS = 120.0  # for a worker's imports, on a busy machine
# gmpy2 computes in C, where only a kill stops it; a fixed hash seed fixes the order sympy works in
WORKER_ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "PYTHONHASHSEED": "0"}

# An escaped brace groups nothing; `\\` is a line break, but `\\boxed` is a box escaped twice.
BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<open>\{)|(?P<close>\})")

# --------------------------------------------------------------------------------- rules of reading
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
    r"|sqrt|alpha|beta|gamma|delta|theta|lambda|omega|phi)\b|\\|^ *[/^\d]"
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
NO_ANSWERS = {"", "proof", "notfound", "not found", "none", "nan", "null", "n/a"}


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
    """Whether a text without a box begins with a letter and has six words outside of formulas."""
    text = re.sub(r"\$[^$]*\$|" + FONT + r"[^{}]*\}|\\(?!boxed)[A-Za-z]+", " ", text).strip()
    words = re.findall(r"[A-Za-z]{2,}", text)
    return text[:1].isalpha() and len(words) >= 6 and "\\boxed" not in text


def cache_path() -> Path:
    """Where the golds that were read are remembered: a line each, their hash, then 1 or 0.

    The name holds what decides: this file and the packages. Several processes may append; a line
    that is not whole is passed over, and a folder that cannot be written is not used.
    """
    packages = ("math-verify", "sympy", "latex2sympy2_extended", "antlr4-python3-runtime")
    deciding = Path(__file__).read_text(encoding="utf-8") + " ".join(map(version, packages))
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "token-credit", f"golds-{digest(deciding)[:16]}")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# --------------------------------------------------------------------------------------- processes

Request = tuple[str, str | None, bool]  # gold, text with the answer (None: read gold), number only?


class Worker(subprocess.Popen):
    """A process that answers one request at a time and ends when its standard input does.

    Raises RuntimeError with the process's last words where it cannot start.
    """

    def __init__(self, deadline: float, memory_mb: int) -> None:
        # -P: no neighbouring file may pass for a module. Own session: Ctrl-C is not for workers.
        command = [sys.executable, "-P", os.path.abspath(__file__), str(deadline), str(memory_mb)]
        with tempfile.TemporaryFile() as log:  # a pipe could fill up
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            environment = os.environ | WORKER_ENVIRONMENT
            super().__init__(command, bufsize=0, env=environment, start_new_session=True, **pipes)
            if self.reply(START_SECONDS) != b"R":
                self.end()
                log.seek(0)
                words = log.read().decode(errors="replace")[-2000:].strip() or "no message"
                raise RuntimeError(f"the verifier's worker ({command[0]}) cannot start: {words}")

    def reply(self, seconds: float) -> bytes:
        """The next byte; T where none comes in time, nothing where the process has died."""
        return os.read(self.stdout.fileno(), 1) if wait([self.stdout], seconds) else b"T"

    def end(self) -> None:
        self.kill()
        self.wait()
        self.stdin.close(), self.stdout.close()


@dataclass
class Grader:
    """Grades responses against gold answers; also a context manager that ends its workers."""

    workers: int = 1  # processes at most, started when first needed
    deadline: float = 5.0  # seconds of wall-clock time for one answer before its worker is killed
    strict: bool = True  # for a number as gold, `(16-3-4)*2` left to the grader is no answer
    memory_mb: int = 2048  # cap on each worker's address space
    unboxed: bool = False  # read a response that has no box as a whole, not as wrong
    timeouts: int = field(default=0, init=False)  # workers killed at the deadline
    crashes: int = field(default=0, init=False)  # workers that died
    _idle: list[Worker] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.workers < 1 or self.deadline <= 0:
            raise ValueError(f"workers={self.workers} and deadline={self.deadline} must be above 0")

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[bool]:
        """Whether the answer of each response equals the gold in its place; equal pairs cost one.

        Raises RuntimeError where a worker cannot start.
        """
        requests = [self._request(r, gold) for r, gold in zip(responses, golds, strict=True)]
        asked = list(dict.fromkeys(r for r in requests if not isinstance(r, bool)))
        verdicts = dict(zip(asked, self._ask_all(asked, self.workers), strict=True))
        return [r if isinstance(r, bool) else bool(verdicts[r]) for r in requests]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Whether each gold is an answer, and math-verify reads it as more than text.

        Uses every processor; what was read is remembered in the user's cache folder.
        """
        texts = ["" if is_prose(text) else text for text in map(gold_text, golds)]
        keys = {text: digest(text) for text in texts if text and read(text).value is None}
        path, known = cache_path(), {}
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(errors="replace").split()
            known = {line[:64]: line[64:] == "1" for line in lines if len(line) == 65}
        asked = [text for text, key in keys.items() if key not in known]
        requests = [(in_box(read(text).text), None, False) for text in asked]
        workers = max(self.workers, min(os.cpu_count() or 1, len(asked) // 50))
        for text, reply in zip(asked, self._ask_all(requests, workers), strict=True):
            known[keys[text]] = bool(reply)
            if reply is not None:  # a worker that was killed may have more time tomorrow
                with contextlib.suppress(OSError), path.open("a") as file:
                    file.write(f"\n{keys[text]}{reply:d}")
        while len(self._idle) > self.workers:
            self._idle.pop().end()
        return [known[keys[text]] if text in keys else text != "" for text in texts]

    def close(self) -> None:
        """Ends the workers; a later call starts new ones."""
        while self._idle:
            self._idle.pop().end()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, response: str, gold: str) -> Request | bool:
        """What to ask a worker, or the verdict where none is needed."""
        answer, limit = last_boxed(response), MAX_ANSWER
        boxed = answer is not None
        if not boxed and self.unboxed:
            answer, limit = response[-MAX_TEXT:], MAX_TEXT
            if len(response) > MAX_TEXT:  # not from the middle of a line, or of a number
                answer = answer.partition("\n")[2] or answer
        gold = gold_text(gold)
        if answer is None or len(answer) > limit or not gold:
            return False
        left, right = read(gold), read(answer)
        verdict = quick_verdict(left, right)
        if verdict is not None:
            return verdict
        gold = left.text if "=" in right.text else in_order(left.text)
        text = in_box(right.text) if boxed else answer
        return in_box(gold), text, self.strict and left.value is not None

    def _ask_all(self, requests: Sequence[Request], workers: int) -> Iterator[bool | None]:
        """The workers' verdicts, in order; a bar on a terminal where there are many."""
        from tqdm import tqdm

        with ThreadPoolExecutor(workers) as threads:
            verdicts = threads.map(self._ask, requests)
            quiet = None if len(requests) > 1000 else True
            yield from tqdm(verdicts, "reading answers", len(requests), disable=quiet)

    def _ask(self, request: Request) -> bool | None:
        """A worker's verdict; None where it hung or died. Each thread has a worker of its own."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = Worker(self.deadline, self.memory_mb)
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:  # it died before: not this answer's fault
            self.crashes += 1
            worker.end()
            return self._ask(request)
        reply = worker.reply(self.deadline)
        if reply in (b"0", b"1"):
            self._idle.append(worker)
            return reply == b"1"
        self.timeouts += reply == b"T"
        self.crashes += reply == b""
        worker.end()
        return None


def is_number(value: object) -> bool:
    """18, 3/4, 50%, 1.2·10^3; also as the right side of an equation or alone in a set."""
    from sympy import And, Eq, FiniteSet, Integer, Mul, Number, Pow, Rational, UnevaluatedExpr

    while isinstance(value, And | Eq | FiniteSet) and value.args:
        value = getattr(value, "_unsorted_args", value.args)[-1]
    if isinstance(value, Mul) and len(value.args) == 2 and isinstance(value.args[0], Number):
        value = value.args[1]
        if value == UnevaluatedExpr(Rational(1, 100)):
            return True
    elif isinstance(value, Number):
        return True
    return isinstance(value, Pow) and all(isinstance(part, Integer) for part in value.args)


def agree(gold: object, answer: object) -> bool:
    """False for two numbers that math-verify takes for one because it rounds to six places."""
    if hasattr(answer, "rhs") != hasattr(gold, "rhs"):  # x = 5 and 5
        gold, answer = (getattr(side, "rhs", side) for side in (gold, answer))
    if gold == answer or not all(getattr(side, "is_number", False) for side in (gold, answer)):
        return True
    from sympy import Float, N, Pow, UnevaluatedExpr

    if gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):
        return True  # 50% is both 50 and 1/2
    decimal = answer.has(Float) and not answer.has(Pow)
    if decimal and not gold.has(Float) and gold.doit().is_rational is False:
        return False  # 3.14159265 is not pi
    return bool(abs(N(gold) - N(answer)) <= abs(N(gold)) / 10**5)


def serve(deadline: float, memory_mb: int) -> None:
    """The worker: requests in as JSON lines, one byte out for each. Only a verdict leaves it."""
    replies, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    with contextlib.suppress(ValueError, OSError):  # some systems know no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    # math-verify's own timeouts stay off: they interrupt sympy halfway, some of its code swallows
    # them, and they do not reach C. The caller kills; if the caller is gone, the alarm does.
    from math_verify import parse, verify

    logging.disable()
    parse_gold = functools.lru_cache(maxsize=1024)(functools.partial(parse, parsing_timeout=None))
    parse_gold(in_box("x^2"))  # the parser builds its tables on first use
    os.write(replies, b"R")
    os.dup2(nowhere, 2)
    for line in sys.stdin.buffer:
        gold, text, number_wanted = json.loads(line)
        signal.alarm(math.ceil(deadline) + 1)
        try:
            gold = parse_gold(gold)
            if text is None:  # a gold left as text would equal itself without having been read
                gold = answer = [part for part in gold if not isinstance(part, str)]
            else:
                answer = parse(text, parsing_timeout=None)
            verdict = bool(answer) and (not number_wanted or is_number(answer[0]))
            if verdict:  # x < 3 is the answer where (-oo, 3) is the gold, but not x in (-oo, 3)
                sets = bool(gold) and not hasattr(gold[0], "rhs")
                verdict = verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=sets)
            verdict = verdict and (text is None or agree(gold[0], answer[0]))
        except Exception:  # RecursionError and MemoryError among them
            verdict = False
        signal.alarm(0)
        os.write(replies, b"1" if verdict else b"0")


if __name__ == "__main__":
    # CPython maps and unmaps memory whenever recursion crosses a 16 KB chunk of its frames' stack,
    # which the parser does all the time. A first frame that claims 2.4 MB gets a chunk with room.
    serve.__code__ = serve.__code__.replace(co_stacksize=300_000)
    serve(float(sys.argv[1]), int(sys.argv[2]))
