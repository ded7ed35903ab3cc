"""What REFT's one-token pass costs: rollouts with chosen openers against plain ones, in turn.

    python benchmark/first_token.py

16 prompts of about 100 tokens, 8 rollouts each, 256 new tokens, vLLM, the tiny model. Writes
benchmark/results/first_token.json.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
import vllm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import models  # noqa: E402

import common  # noqa: E402 (the scripts lie one folder up)
import reft  # noqa: E402

ROUNDS = 11


def main() -> None:
    args = reft.Args(model=str(ROOT / "tiny"), engine="vllm", max_new_tokens=256)
    tokenizer, policy = models.load_tokenizer(args), models.load_policy(args)
    text = "What is {}+{} and also what is {}*4? Put the final answer in a box."
    texts = [text.format(i, 7 * i, 3 * i) for i in range(args.prompts_per_step)]
    problems = [common.Problem(t, "", data.prompt_tokens(tokenizer, t)) for t in texts]
    engine = models.make_engine(args, policy, tokenizer, problems)
    # Every response is to have 256 tokens: nothing ends one early.
    vllm.SamplingParams = functools.partial(vllm.SamplingParams, ignore_eos=True)
    seconds: dict[str, list[float]] = {"plain": [], "reft": [], "first_token_pass": []}
    stops = engine.stops
    for attempt in range(ROUNDS):
        for kind in ("plain", "reft") if attempt % 2 else ("reft", "plain"):
            engine.sync(policy)
            start = time.perf_counter()
            openers = None
            if kind == "reft":
                engine.stops = stops  # which are never openers
                draw = torch.Generator().manual_seed(attempt)
                openers, _ = reft.choose_openers(engine, problems, args, draw)
                seconds["first_token_pass"].append(time.perf_counter() - start)
            engine.stops = []
            groups = common.roll_out(engine, problems, args, (1, attempt), openers)
            seconds[kind].append(time.perf_counter() - start)
            if any(len(tokens) != 256 for group in groups for tokens in group.tokens):
                sys.exit("a response ended early: the two sides did not do the same work")
    measured = {name: values[1:] for name, values in seconds.items()}  # the first one warms up
    results = {
        "command": "python benchmark/first_token.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "vllm": version(packages_distributions()["vllm"][0]),
        "prompt_tokens": len(problems[0].prompt),
        "rollouts": args.prompts_per_step * args.group_size,
        "new_tokens": 256,
        "median_seconds": {k: round(statistics.median(v), 4) for k, v in measured.items()},
        "median_ratio": round(
            statistics.median(
                r / p for r, p in zip(measured["reft"], measured["plain"], strict=True)
            ),
            4,
        ),
    }
    results_file = ROOT / "benchmark" / "results" / "first_token.json"
    results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
