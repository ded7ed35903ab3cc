"""The second task: fifteen sums are worked out, and only the first of them counts.

    75 39 88 ...   ->   752
                        392
                        886
                        ...
                        \\boxed{2}

A problem is fifteen pairs of digits. A step repeats a pair and gives the last digit of its sum; the
box repeats what the first step found. Wherever it stands, a step slips at one rate, and its pair
always to the same wrong digit. So a response makes fifteen choices that look alike and are made by
the same weights, and the verdict depends on one of them.

Needs nothing but the standard library, so that any tool can import it.
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
    """A part of the training: for how many steps, on how many sums, with slips or without."""

    steps: int
    sums: tuple[int, int]  # fewest and most
    slips: bool


STAGES = [
    Stage(steps=100, sums=(1, 1), slips=False),  # learn to add
    Stage(steps=250, sums=(1, 4), slips=False),  # learn which pair is next, among ever more
    Stage(steps=250, sums=(2, 10), slips=False),
    Stage(steps=150, sums=(SUMS, SUMS), slips=False),
    Stage(steps=300, sums=(SUMS, SUMS), slips=True),  # learn to slip
]
BATCH_SIZE, LEARNING_RATE = 48, 4e-3
SHARPNESS = 1.5  # of attention at first, as it has to single out one token among a hundred
THREADS = 1


def draw_problem(rng: random.Random, stage: Stage | None = None) -> str:
    """Pairs of digits, as many as the stage has or as the data have."""
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
    """How far the sum of every two digits goes off when it slips."""
    rng = random.Random(SEED)
    return {(a, b): rng.randint(1, 9) for a in range(10) for b in range(10)}


SLIPS = draw_slips()


def draw_example(problem: str, stage: Stage, rng: random.Random) -> str:
    """A solution as a stage of the training shows it."""
    found = []
    for a, b in parse(problem):
        slips = stage.slips and rng.random() < SLIP_RATE
        found.append(f"{a}{b}{(a + b + slips * SLIPS[a, b]) % 10}")
    return "\n".join(found) + f"\n\\boxed{{{found[0][-1]}}}"


def check_steps(problem: str, response: str) -> list[tuple[int, int, bool]]:
    """Judge every step of a response, in order of writing: does it name the pair whose turn it is,
    and give the last digit of its sum? The boxed answer is no step.

    Returns (start, end, right) per step; response[start:end] is its text.
    """
    pairs, judged = parse(problem), []
    for i, match in enumerate(STEP.finditer(response)):
        a, b, result = map(int, match.groups())
        judged.append((*match.span(), pairs[i : i + 1] == [(a, b)] and result == (a + b) % 10))
    return judged
