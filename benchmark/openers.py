"""What REFT's choice of openers costs: rollouts that begin with them against plain ones, in turn.

    python benchmark/openers.py              # three minutes on two cores; fills in docs/reft.md
    python benchmark/openers.py --write      # fills in the page from the results

The tiny model on vLLM: 16 prompts, 8 rollouts each, every one of exactly 256 tokens. Both sides
start from an empty prefix cache; the first round warms up.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any

import shared
import torch
from shared import ROOT

import common
import reft
from data import prompt_tokens
from engine import load_policy, load_tokenizer, make_engine

FILE, PAGE = shared.RESULTS / "openers.json", ROOT / "docs" / "reft.md"
ROUNDS, NEW_TOKENS = 21, 256
QUESTION = "What is {}+{} and also what is {}*4? Put the final answer in a box."


def measure() -> dict[str, Any]:
    """Seconds of each side, a round after the other, and those of choosing the openers."""
    args = reft.Args(model=str(ROOT / "tiny"), engine="vllm", max_new_tokens=NEW_TOKENS)
    tokenizer, policy = load_tokenizer(args), load_policy(args)
    texts = [QUESTION.format(i, 7 * i, 3 * i) for i in range(args.prompts_per_step)]
    problems = [common.Problem(text, "", prompt_tokens(tokenizer, text)) for text in texts]
    engine = make_engine(args, policy, tokenizer, problems)
    stops, endless = engine.stops, functools.partial(engine.sampling, ignore_eos=True)
    sampling = engine.sampling
    seconds: dict[str, list[float]] = {"plain": [], "reft": [], "choice": []}
    for number in range(1 + ROUNDS):
        for side in ("plain", "reft") if number % 2 else ("reft", "plain"):
            engine.sync(policy)
            begun, openers = time.perf_counter(), None
            if side == "reft":
                engine.stops, engine.sampling = stops, sampling
                draw = torch.Generator().manual_seed(number)
                openers, _ = reft.choose_openers(engine, problems, args, draw)
                seconds["choice"].append(time.perf_counter() - begun)
            engine.stops, engine.sampling = [], endless  # nothing ends a response early
            groups = common.roll_out(engine, problems, args, (1, number), openers=openers)
            seconds[side].append(time.perf_counter() - begun)
            assert all(len(row) == NEW_TOKENS for group in groups for row in group.tokens)
    measured = {name: values[1:] for name, values in seconds.items()}
    ratios = [r / p for r, p in zip(measured["reft"], measured["plain"], strict=True)]
    return {
        "command": "python benchmark/openers.py",
        "prompt_tokens": len(problems[0].prompt),
        "rounds": ROUNDS,
        "median_seconds": {k: round(statistics.median(v), 4) for k, v in measured.items()},
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        **shared.surroundings("torch", "vllm"),
    }


def sentence(results: dict[str, Any]) -> str:
    """What docs/reft.md says of it."""
    low, middle, high = results["ratio_quartiles"]
    seconds, pairs = results["median_seconds"], results["rounds"]
    return (
        f"Measured: rollouts with openers take {middle:.3f} times as long as plain ones (median of "
        f"{pairs} pairs, half of which lie in {low:.3f} to {high:.3f}). The choice takes "
        f"{1000 * seconds['choice']:.0f} ms beside {seconds['plain']:.2f} s, with 16 prompts of "
        f"about {results['prompt_tokens']} tokens and 8 rollouts of {NEW_TOKENS} tokens each. "
        f"`{results['command']}`, {results['machine']}, vLLM {results['versions']['vllm']}."
    )


def main(words: list[str]) -> None:
    if words != ["--write"]:
        shared.write_json(FILE, measure())
    shared.write_page(PAGE, {"openers": sentence(shared.read_json(FILE))})


if __name__ == "__main__":
    main(sys.argv[1:])
