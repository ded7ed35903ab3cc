"""Grade a file: python -m grading pairs.jsonl

Each line is a JSON object with the strings `reference` and `response`. It is printed again, in
order, with `correct` added. Without a file, or with `-`, standard input is read.
"""

import argparse
import json
import os
import sys

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
    name = parser.parse_args().file

    pairs = []
    place = name
    try:
        with open(0 if name == "-" else name, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{name}, line {number}"
                pairs.append(parse_line(line))
    except (OSError, ValueError, RecursionError) as error:
        print(f"error: {place}: {error}", file=sys.stderr)
        sys.exit(2)

    with Grader(workers=os.cpu_count() or 1) as grader:
        responses = [pair["response"] for pair in pairs]
        references = [pair["reference"] for pair in pairs]
        verdicts = grader.grade(responses, references)
    for pair, correct in zip(pairs, verdicts, strict=True):
        print(json.dumps(pair | {"correct": correct}))


if __name__ == "__main__":
    main()
