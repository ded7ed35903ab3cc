"""The second task: a response computes fifteen sums, and only the first counts.

    75 39 88 ...   ->   752
                        392
                        886
                        ...
                        \\boxed{2}

A problem is fifteen pairs of digits. A step repeats a pair and gives the last digit of its sum; the
box repeats the result of the first step. Every step has the same error rate, and each pair always
the same wrong digit. A response thus makes fifteen similar choices with the same weights, and the
verdict depends on one of them.

Needs only the standard library, so that any tool can import it.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "needle"
SEED = 0
MAX_NEW_TOKENS = 80
SUMS = 15
SLIP_RATE = 0.6
OPENERS = ()
STEP = re.compile(r"(\d)(\d)(\d)\n")


@dataclass
class Stage:
    """A part of the training: number of steps, number of sums, with or without errors."""

    steps: int
    sums: tuple[int, int]  # fewest and most
    slips: bool


STAGES = [
    Stage(steps=100, sums=(1, 1), slips=False),  # learn to add
    Stage(steps=250, sums=(1, 4), slips=False),  # learn which pair is next, among more and more
    Stage(steps=250, sums=(2, 10), slips=False),
    Stage(steps=150, sums=(SUMS, SUMS), slips=False),
    Stage(steps=300, sums=(SUMS, SUMS), slips=True),  # learn to make errors
]
BATCH_SIZE, LEARNING_RATE = 48, 4e-3
SHARPNESS = 1.5  # initial scale of attention, which has to select one token of a hundred
THREADS = 1


def draw_problem(rng: random.Random, stage: Stage | None = None) -> str:
    """Pairs of digits, as many as the stage or else the data have."""
    count = rng.randint(*stage.sums) if stage else SUMS
    return " ".join(f"{rng.randrange(100):02}" for _ in range(count))


def parse(problem: str) -> list[tuple[int, int]]:
    """The pairs of digits."""
    return [(int(a), int(b)) for a, b in problem.split()]


def answer(problem: str) -> str:
    """The last digit of the first sum."""
    a, b = parse(problem)[0]
    return str((a + b) % 10)


def draw_slips() -> dict[tuple[int, int], int]:
    """The offset that an error adds to the sum of every pair of digits."""
    rng = random.Random(SEED)
    return {(a, b): rng.randint(1, 9) for a in range(10) for b in range(10)}


SLIPS = draw_slips()


def draw_example(problem: str, stage: Stage, rng: random.Random) -> str:
    """A solution as shown in a stage of the training."""
    found = []
    for a, b in parse(problem):
        slips = stage.slips and rng.random() < SLIP_RATE
        found.append(f"{a}{b}{(a + b + slips * SLIPS[a, b]) % 10}")
    return "\n".join(found) + f"\n\\boxed{{{found[0][-1]}}}"


def check_steps(problem: str, response: str) -> list[tuple[int, int, bool]]:
    """Judge every step of a response in order: does it repeat the pair at its position and give
    the last digit of its sum? The boxed answer is not a step.

    Returns (start, end, right) per step; response[start:end] is its text.
    """
    pairs, judged = parse(problem), []
    for i, match in enumerate(STEP.finditer(response)):
        a, b, result = map(int, match.groups())
        judged.append((*match.span(), pairs[i : i + 1] == [(a, b)] and result == (a + b) % 10))
    return judged
