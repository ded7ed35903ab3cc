"""Compare graders on the shared pairs: python benchmark/graders.py [../shared]

Writes the tables in grading/README.md, those of kinds and rules too. verl's graders are read from
the package, if it is installed (`pip install --no-deps --target FOLDER verl pylatexenc`, and FOLDER
in PYTHONPATH), without what verl imports. `prime_math` is PRM800K's grader as verl distributes it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grading import Grader, last_boxed  # noqa: E402
from grading.answers import reference_text  # noqa: E402
from grading.kinds import KINDS  # noqa: E402
from grading.rules import RULES  # noqa: E402

Grade = Callable[[str, str], bool]  # of a response and a reference answer
LEFT_OUT = "left out: not installed"


def ours() -> Grade:
    grader = Grader()
    return lambda response, reference: grader.grade([response], [reference])[0]


def math_verify() -> Grade:
    from math_verify import parse, verify

    return lambda response, reference: verify(parse(rf"\boxed{{{reference}}}"), parse(response))


def from_verl(module: str, verdict: Callable[[object], bool]) -> Grade:
    """`compute_score` of a module of verl, whose packages are not executed."""
    sys.modules.pop("verl", None)  # the one of an earlier call
    root = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
    for package in ("verl", "verl.utils", "verl.utils.reward_score"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(root.joinpath(*package.split(".")[1:]))]
    helpers = types.ModuleType("verl.utils.py_functional")
    helpers.timeout_limit = lambda *_, **__: lambda function: function
    sys.modules["verl.utils.py_functional"] = helpers
    found = importlib.import_module(f"verl.utils.reward_score.{module}")
    return lambda response, reference: verdict(found.compute_score(response, reference))


def math_dapo() -> Grade:
    """Compares text, less strictly on the answer line that DAPO's prompts ask for than in a box."""
    grade = from_verl("math_dapo", lambda score: bool(score["acc"]))
    return lambda response, reference: grade(f"Answer: {last_boxed(response)}", reference)


GRADERS = {
    "grading": ours,
    "math-verify, its defaults": math_verify,
    "verl `math_reward`": lambda: from_verl("math_reward", bool),
    "verl `math_dapo`": math_dapo,
    "verl `prime_math` (PRM800K)": lambda: from_verl("prime_math", lambda score: bool(score[0])),
}


def kinds() -> list[str]:
    """The docstrings of the kinds, in the order in which they are tried."""
    rows = ["| kind | examples |", "|---|---|"]
    for _, kind in KINDS:
        text, _, examples = " ".join(kind.__doc__.split()).partition(": `")
        examples = examples.replace("|", r"\|")
        rows.append(f"| {text} | `{examples} |")
    return rows


def rules() -> list[str]:
    """The pairs of kinds that may be equal, with the docstrings of their rules."""
    rows = ["| reference, answer | rule |", "|---|---|"]
    for (first, second), rule in RULES.items():
        if rule.__name__ != "never":
            text = " ".join((rule.__doc__ or "").split())
            names = f"{first.__name__}, {second.__name__}".replace("Kind", "any kind")
            rows.append(f"| {names} | {text} |")
    return rows


def measure(grade: Grade, pairs: list[dict]) -> tuple[int, int, float]:
    """Wrong answers accepted, right answers rejected, answers per second."""
    accepted, rejected = 0, 0
    start = time.perf_counter()
    for pair in pairs:
        response = rf"So the answer is \boxed{{{pair['answer']}}}."
        verdict = False
        with contextlib.suppress(Exception):  # counted as wrong
            verdict = grade(response, reference_text(pair["gold"]))
        accepted += verdict and not pair["want"]
        rejected += pair["want"] and not verdict
    return accepted, rejected, len(pairs) / (time.perf_counter() - start)


def main() -> None:
    folder = Path([*sys.argv, "../shared"][1], "cases")
    pairs = []
    for path in sorted(folder.glob("verifier_pairs*.jsonl")):
        pairs += [json.loads(line) for line in path.read_text().splitlines()]
    wrong = sum(not pair["want"] for pair in pairs)
    head = f"{wrong} wrong answers | of {len(pairs) - wrong} right answers"
    lines = [f"| grader | accepted, of {head} rejected | per second |", "|---|---:|---:|---:|"]
    for name, make in GRADERS.items():
        try:
            grade = make()
        except (ImportError, AttributeError):
            lines.append(f"| {name} | {LEFT_OUT} | | |")
            continue
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            grade(r"\boxed{x+1}", "1+x")  # starts a worker, builds a parser
            accepted, rejected, rate = measure(grade, pairs)
        lines.append(f"| {name} | {accepted} | {rejected} | {rate:.0f} |")

    readme = ROOT / "grading" / "README.md"
    text = readme.read_text()
    for name, table in [("kinds", kinds()), ("rules", rules()), ("graders", lines)]:
        begin, end = f"<!-- results:{name} -->\n", "<!-- /results -->"
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(table) + "\n" + end + rest.partition(end)[2]
    readme.write_text(text)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
