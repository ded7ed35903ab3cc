"""Which way do the progress terms of EP-GRPO and ERPO push, along a run of GRPO?

    python benchmark/progress.py             # trains GRPO, then measures its checkpoints
    python benchmark/progress.py --variants  # trains EP-GRPO with its progress term changed
    python benchmark/progress.py --write     # puts both tables into docs/ep_grpo.md

At each checkpoint one batch is rolled out, and the gradient of each term over it is taken as the
first update of a step would take it. It is held against GRPO's, and against the gradient of the
expected reward, estimated from a larger batch of other rollouts.
The runs of the variants can be stopped and started again at any time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import shared
import torch
import tyro
from shared import ROOT, read_json
from torch import Tensor, nn

import common
import engine
import ep_grpo
import erpo
import grpo
from ep_grpo import ep_grpo_advantages
from grading import Grader
from grpo import grpo_advantages, token_weights
from run import parse_args, read_lines

RESULTS = shared.RESULTS / "progress.json"
PAGE = ROOT / "docs" / "ep_grpo.md"
TRAINING = "--lr 4e-4 --max-new-tokens 64 --eval-every 0 --log-rollouts 0 --save-every 1"
STEPS = (1, 5, 20, 40)
PROBLEMS, TRUTH = 64, 512  # of the batch measured, and of the larger one
OF_VARIANTS = "--lr 4e-4 --max-new-tokens 64 --steps 40 --eval-every 0 --eval-problems 256"
OF_VARIANTS += " --eval-samples 8 --log-rollouts 0 --save-every 0"
SCRIPTS = {"GRPO": "grpo.py", "gated outcome": "ep_grpo.py --eta 0", "EP-GRPO": "ep_grpo.py"}
CHANGED = (  # what takes the place of EP-GRPO's progress
    "progress in right answers",
    "progress in failed answers",
    "progress in groups of equal rewards",
    "progress not signed by the verdict",
    "progress not divided by its deviation",
)
CURVES = "accuracy", "truncated", "zero_variance", "credit/progress", "credit/log_ratio"


@dataclass
class Args:
    seeds: int = 3
    """batches of each checkpoint, or runs of each variant, with seeds 1, 2, ..."""
    run: Path = ROOT / "runs" / "progress"
    """folder of GRPO's run; the variants' lie beside it"""
    variants: bool = False
    """train the variants that the results lack"""
    write: bool = False
    """only write the tables from the results"""


def gradient(
    policy: nn.Module, rollouts: common.Rollouts, credit: Tensor, args: grpo.Args
) -> Tensor:
    """Of the mean over tokens of credit · log π, as one vector: what AdamW would climb."""
    weights = credit * token_weights(rollouts.mask, "token", args.max_new_tokens)
    for index in common.micro_batches(rollouts, args.token_budget, torch.arange(len(credit))):
        logp, _ = common.token_logp(policy, rollouts, index, args)
        (weights[index] * logp).sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    policy.zero_grad()
    return found


def variants(*inputs: Tensor, **settings: Any) -> dict[str, Tensor]:
    """What stands in the place of EP-GRPO's progress term, η included, and the term itself.

    inputs: as of ep_grpo_advantages. [P, G, T] each."""
    rewards, *of_tokens = inputs
    progress = ep_grpo_advantages(*inputs, **settings)
    progress = progress - ep_grpo_advantages(*inputs, **settings | {"eta": 0.0})
    right = (rewards > 0)[..., None]
    equal = (rewards.amax(-1) == rewards.amin(-1))[:, None, None]
    # A group that is all right has no outcome, and the log-ratio keeps its sign.
    unsigned = ep_grpo_advantages(torch.ones_like(rewards), *of_tokens, **settings)
    return {
        "progress": progress,
        "progress in right answers": progress * right,
        "progress in failed answers": progress * ~right,
        "progress in groups of equal rewards": progress * equal,
        "progress not signed by the verdict": unsigned,
        "progress not divided by its deviation": progress * deviation(*inputs),
    }


def deviation(
    rewards: Tensor, entropy: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor
) -> Tensor:
    """Of the signed log-ratio in each token's bucket: what its z-score divides by. [P, G, T]."""
    bucket = ep_grpo.entropy_buckets(entropy, mask, 10)
    signed = torch.where(rewards > 0, 1.0, -1.0)[..., None] * (logp - ref_logp)
    parts = [mask & (bucket == k) for k in range(10)]
    return sum(part * common.group_moments(signed, part, correction=0)[1] for part in parts)


def terms(*inputs: Tensor) -> dict[str, Tensor]:
    """The parts that the methods' advantages are made of, [P, G, T] each."""
    rewards, _, logp, ref_logp, mask = inputs
    gated = ep_grpo_advantages(*inputs, eta=0.0)
    progress = dict(list(variants(*inputs).items())[:3])
    return {
        "GRPO": grpo_advantages(rewards)[..., None] * mask,
        "gated outcome": gated,
        **progress,
        "EP-GRPO": gated + progress["progress"],
        "ERPO": erpo.erpo_advantages(*inputs),
        "-(log π - log π_ref)": (ref_logp - logp) * mask,
    }


def pull(*inputs: Tensor) -> float:
    """What log π - log π_ref is multiplied by in the progress of a failed answer's token, but for
    its sign: η over the deviation in its bucket. Median over those tokens where rewards vary."""
    std = deviation(*inputs)
    return float((0.2 / std[(std > 0) & (grpo_advantages(inputs[0]) < 0)[..., None]]).median())


def train(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """A variant's run, unless it is there; its row in the results. In a process of its own."""

    def changed(*inputs: Tensor, **settings: Any) -> Tensor:
        gated = ep_grpo_advantages(*inputs, **settings | {"eta": 0.0})
        return gated + variants(*inputs, **settings)[name]

    if name in CHANGED:
        ep_grpo.ep_grpo_advantages = changed
    module = grpo if name == "GRPO" else ep_grpo
    script, *own = SCRIPTS.get(name, "ep_grpo.py").split()
    flags = [*own, *OF_VARIANTS.split(), "--seed", str(seed)]
    _, *command = shared.run_command(script, flags, folder)
    if not (folder / "model").exists():
        module.main(parse_args(module.Args, command))
    first, *steps = read_lines(folder / "metrics.jsonl")
    tens = [steps[k : k + 10] for k in range(0, len(steps), 10)]
    before, after = (round(at["eval/accuracy"], 4) for at in (first, steps[-1]))
    row = {"variant": name, "seed": seed, "before": before, "after": after}
    for key in [key for key in CURVES if key in steps[0]]:
        row[key] = [round(mean(step[key] for step in ten), 5) for ten in tens]
    return row


def train_variants(args: Args) -> None:
    """All that the results lack, each in a process of its own; a row is kept as soon as it ends."""
    results = read_json(RESULTS)
    of = results.setdefault("variants", {"command": "python benchmark/progress.py --variants"})
    of |= {"settings": OF_VARIANTS, **shared.surroundings("torch", "vllm", "transformers")}
    rows = of.setdefault("rows", [])
    there = {(row["variant"], row["seed"]) for row in rows}
    for seed, name in itertools.product(range(1, 1 + args.seeds), [*SCRIPTS, *CHANGED]):
        if (name, seed) not in there:
            folder = args.run.with_name(f"{args.run.name} {name} {seed}".replace(" ", "-"))
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(train, name, seed, folder).result())
            shared.write_json(RESULTS, results)


def main(args: Args) -> None:
    if args.write:
        return shared.write_page(PAGE, blocks(read_json(RESULTS)))
    if args.variants:
        try:
            return train_variants(args)
        except KeyboardInterrupt:  # the run that it met has been saved
            raise SystemExit("interrupted: the same command goes on") from None
    command = [sys.executable, "grpo.py", *TRAINING.split(), "--steps", str(max(STEPS))]
    command += ["--keep-checkpoints", str(max(STEPS)), "--run-dir", str(args.run)]
    if not (args.run / "model").exists():
        subprocess.run(command, cwd=ROOT, check=True)

    settings = grpo.Args(max_new_tokens=64, token_budget=65536, group_size=8)
    tokenizer, start = engine.load_tokenizer(settings), engine.load_policy(settings)
    rows = []
    with Grader() as grader:
        problems = common.load_problems(settings, "--dataset", tokenizer, grader)
        rollout_engine = engine.make_engine(settings, start, tokenizer, problems)
        for step in STEPS:
            settings.model = str(args.run / "checkpoints" / f"step-{step:06d}")
            policy = engine.load_policy(settings)
            rollout_engine.sync(policy)

            def batch(count: int, seed: int, policy: nn.Module = policy) -> tuple:
                problems.position = 0
                chosen = problems.take(count, 1000 + seed)
                groups = common.roll_out(rollout_engine, chosen, settings, ("progress", seed))
                common.verify(grader, groups)
                stop = engine.eos_ids(policy, tokenizer)
                rollouts = common.stack(groups, stop, torch.device("cpu"))
                return rollouts, torch.tensor([group.correct for group in groups])

            rollouts, rewards = batch(TRUTH, 0)
            centred = (rewards - rewards.mean(-1, keepdim=True))[..., None] * rollouts.mask
            truth = gradient(policy, rollouts, centred, settings)
            for seed in range(1, 1 + args.seeds):
                rollouts, rewards = batch(PROBLEMS, seed)
                logp, entropy = common.score(policy, rollouts, settings)
                ref_logp, _ = common.score(start, rollouts, settings)
                inputs = rewards, entropy, logp, ref_logp, rollouts.mask
                gradients = {
                    name: gradient(policy, rollouts, credit, settings)
                    for name, credit in terms(*inputs).items()
                }
                of_grpo, like, found = gradients["GRPO"], torch.cosine_similarity, {}
                for name, of_term in gradients.items():
                    found[name] = {"norm": of_term.norm() / of_grpo.norm()}
                    found[name]["truth"] = like(of_term, truth, 0)
                    found[name]["grpo"] = like(of_term, of_grpo, 0)
                found["pull"] = {"norm": pull(*inputs)}
                found["deviation"] = {"norm": (logp - ref_logp)[rollouts.mask].std()}
                for name, values in found.items():
                    values = {key: round(float(value), 4) for key, value in values.items()}
                    rows.append({"step": step, "seed": seed, "term": name, **values})
            print(f"step {step} measured", flush=True)
    results = {"command": "python benchmark/progress.py", "training": f"python grpo.py {TRAINING}"}
    results["machine"] = shared.surroundings()["machine"]
    shared.write_json(RESULTS, read_json(RESULTS) | results | {"rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """A line a term: at each step its norm by GRPO's, and its cosine with the true gradient."""

    def at(name: str, step: int, key: str) -> float:
        return mean(row[key] for row in rows if (row["term"], row["step"]) == (name, step))

    lines = [
        [name, *(f"{at(name, s, 'norm'):.2f}, {at(name, s, 'truth'):+.2f}" for s in STEPS)]
        for name in dict.fromkeys(row["term"] for row in rows if "truth" in row)
    ]
    for name, what in (
        ("deviation", "deviation of the log-ratio, nats"),
        ("pull", "weight of the log-ratio in failed answers' progress"),
    ):
        lines.append([what, *(f"{at(name, s, 'norm'):.3g}" for s in STEPS)])
    return shared.markdown(["term", *(f"step {step}" for step in STEPS)], lines)


def table_of_variants(rows: list[dict]) -> str:
    """A line a variant: means over seeds, and those of ten steps each where there are four."""

    def line(name: str) -> list[str]:
        mine = [row for row in rows if row["variant"] == name]
        after = [row["after"] for row in mine]
        cells = [name, f"{mean(after):.3f}", ", ".join(f"{x:.2f}" for x in after)]
        for key in ("accuracy", "truncated", "credit/progress"):
            tens = zip(*(row.get(key, ()) for row in mine), strict=True)
            cells.append(", ".join(f"{mean(ten):.2f}" for ten in tens))
        return cells

    head = ["trained with", "accuracy", "by seed", "of rollouts", "cut off", "size of progress"]
    return shared.markdown(head, map(line, dict.fromkeys(row["variant"] for row in rows)))


def blocks(results: dict) -> dict[str, str]:
    """The tables, by their marks on the page."""
    seeds = len({row["seed"] for row in results["rows"]})
    said = (
        f"Norm of the gradient against GRPO's, and its cosine with the true one; means over "
        f"{seeds} batches of {PROBLEMS} problems at checkpoints of `{results['training']}`. The "
        f"true gradient is from {TRUTH} problems with 8 other rollouts each. "
        f"`{results['command']}`, {results['machine']}."
    )
    of = results["variants"]
    of_variants = (
        f"Held-out accuracy after step 40 (before step 1: {of['rows'][0]['before']:.3f}), mean and "
        f"by seed; then means of ten steps each: accuracy of the rollouts, share of them cut off, "
        f"mean size of the term. `{of['settings']}`. `{of['command']}`, {of['machine']}, vLLM "
        f"{of['versions']['vllm']}."
    )
    return {
        "progress": f"{table(results['rows'])}\n\n{said}",
        "variants": f"{table_of_variants(of['rows'])}\n\n{of_variants}",
    }


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
