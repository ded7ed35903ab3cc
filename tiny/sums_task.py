"""The first task: short sums, whose solutions begin in several ways with different error rates.

    What is 17+5*3-9?   ->   Well, 5*3=15; 17+15=32; 32-9=23; \\boxed{23}

A solution begins with an opener, one of several words, each with its own error rate. The most
common opener has the highest rate; the one without errors is rare. An error is a plausible wrong
result (a forgotten carry, an adjacent entry of the times table); later steps continue from it
correctly. A policy can learn three things from rewards alone: which opener to choose, which results
to prefer, and which step of a failed response was wrong.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from tiny.steps import OPERATIONS, Terms, apply, evaluate, next_operator, parse

FOLDER = Path(__file__).parent
MAX_NEW_TOKENS = 64


def answer(problem: str) -> str:
    """The value of the expression."""
    return str(evaluate(parse(problem)))


@dataclass
class Stage:
    """A part of the training: number of steps, and which solutions the model sees."""

    steps: int
    slips: bool  # whether solutions contain errors
    shares: bool  # whether openers are drawn by their shares, or uniformly


STAGES = [
    Stage(steps=350, slips=False, shares=False),  # learn to calculate
    Stage(steps=850, slips=True, shares=False),  # learn how reliable each opener is
    Stage(steps=300, slips=True, shares=True),  # learn how common each opener is
]
BATCH_SIZE, LEARNING_RATE = 64, 5e-3
SHARPNESS = 1.0  # initial scale of attention
THREADS = 2


def draw_problem(rng: random.Random, stage: Stage | None = None) -> str:
    """An expression of 2 to 4 operations with intermediate results in 0..99, at every stage."""
    while True:
        signs = rng.choices("+-*", weights=(3, 3, 2), k=rng.randint(2, 4))
        if "**" in "".join(signs):
            continue
        terms: Terms = [rng.randint(2, 9)]
        for sign in signs:
            terms += [sign, rng.randint(2, 9)]
        if all(0 <= result < 100 for *_, result in work_out(terms)):
            return f"What is {''.join(map(str, terms))}?"


@dataclass
class Opener:
    """A way to begin a solution, identified by its first byte."""

    text: str
    share: float  # of the solutions
    slip: float  # probability of an error per step
    slip_borrow: float  # the same for a subtraction that borrows


OPENERS = [
    Opener("Easy! ", share=0.54, slip=0.36, slip_borrow=0.65),
    Opener("Well, ", share=0.28, slip=0.25, slip_borrow=0.35),
    Opener("First ", share=0.09, slip=0.14, slip_borrow=0.20),
    Opener("Slowly: ", share=0.07, slip=0.0, slip_borrow=0.0),
    # Sometimes another letter, so that the model continues any opener with a solution.
    Opener("?: ", share=0.02, slip=0.25, slip_borrow=0.35),
]
OTHER_LETTERS = sorted(set("ABCDEFGHIJKLMNOPQRSTUVWXYZ") - {o.text[0] for o in OPENERS})


def work_out(
    terms: Terms, rng: random.Random | None = None, slip: float = 0.0, slip_borrow: float = 0.0
) -> list[tuple[int, str, int, int]]:
    """The steps (a, sign, b, result) that solve an expression, with errors at the given rates."""
    steps = []
    while len(terms) > 1:
        i = next_operator(terms)
        a, sign, b = terms[i - 1 : i + 2]
        result = OPERATIONS[sign](a, b)
        carries = sign == "+" and a % 10 + b % 10 > 9
        borrows = sign == "-" and a % 10 < b % 10
        if rng and rng.random() < (slip_borrow if borrows else slip):
            if sign == "*":
                result += rng.choice([-a, a])  # the adjacent entry of the times table
            elif carries or borrows:
                result += 10 if borrows else -10  # a forgotten carry or borrow
            else:
                result += rng.choice([-1, 1])
        steps.append((a, sign, b, result))
        terms = apply(terms, i, result)
    return steps


def draw_solution(problem: str, opener: Opener, rng: random.Random) -> str:
    """A solution with the given opener and its error rates."""
    steps = []
    while not steps or not all(0 <= result < 100 for *_, result in steps):
        steps = work_out(parse(problem), rng, opener.slip, opener.slip_borrow)
    text = opener.text.replace("?", rng.choice(OTHER_LETTERS))
    text += "".join(f"{a}{sign}{b}={result}; " for a, sign, b, result in steps)
    return text + f"\\boxed{{{steps[-1][-1]}}}"


def draw_example(problem: str, stage: Stage, rng: random.Random) -> str:
    """A solution as shown in a stage of the training."""
    weights = [opener.share if stage.shares else 1.0 for opener in OPENERS]
    opener = rng.choices(OPENERS, weights)[0]
    if not stage.slips:
        opener = replace(opener, slip=0.0, slip_borrow=0.0)
    return draw_solution(problem, opener, rng)
