"""Grade a file: python -m grading pairs.jsonl

Each line is a JSON object with the strings `reference` and `response`. It is printed again, in
order, with `correct` added. Blank lines are skipped. Without a file, or with `-`, standard input
is read.
"""

import argparse
import json
import os
import signal

from grading import Grader


def parse_line(line: bytes) -> dict:
    pair = json.loads(line)
    for key in ("reference", "response"):
        if not isinstance(pair, dict) or not isinstance(pair.get(key), str):
            raise ValueError(f"no string `{key}`")
    return pair


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grading", description=__doc__)
    parser.add_argument("file", nargs="?", default="-")
    name = source = parser.parse_args().file
    if name == "-":
        source = 0  # standard input

    number, pairs = 0, []
    try:
        with open(source, "rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    pairs.append(parse_line(line))

        responses = [pair["response"] for pair in pairs]
        references = [pair["reference"] for pair in pairs]
        with Grader(workers=os.cpu_count() or 1) as grader:
            verdicts = grader.grade(responses, references)
    except ValueError as error:  # a bad line
        parser.exit(2, f"error: {name}, line {number}: {error}\n")
    except (OSError, RuntimeError) as error:  # no file, no math-verify
        parser.exit(2, f"error: {name}: {error}\n")

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the output without an error
    for pair, correct in zip(pairs, verdicts, strict=True):
        print(json.dumps(pair | {"correct": correct}))


main()
