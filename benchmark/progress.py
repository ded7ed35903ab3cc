"""Which way do the progress terms of EP-GRPO and ERPO push, along a run of GRPO?

    python benchmark/progress.py             # trains GRPO, then measures its checkpoints
    python benchmark/progress.py --write     # puts the table into docs/ep_grpo.md

At each checkpoint one batch is rolled out, and the gradient of each term over it is taken as the
first update of a step would take it. It is held against GRPO's, and against the gradient of the
expected reward, estimated from a larger batch of other rollouts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import engine  # noqa: E402
import ep_grpo  # noqa: E402
import erpo  # noqa: E402
from grpo import Args as Settings  # noqa: E402
from grpo import grpo_advantages, token_weights  # noqa: E402
from verifier import Grader  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "progress.json"
PAGE = ROOT / "docs" / "ep_grpo.md"
TRAINING = "--lr 4e-4 --max-new-tokens 64 --eval-every 0 --log-rollouts 0 --save-every 1"
STEPS = (1, 5, 20, 40)
PROBLEMS, TRUTH = 64, 512  # of the batch measured, and of the larger one


@dataclass
class Args:
    seeds: int = 3
    """batches of each checkpoint, with seeds 1, 2, ..."""
    run: Path = ROOT / "runs" / "progress"
    """folder of GRPO's run"""
    write: bool = False
    """only write the table from the results"""


def gradient(
    policy: nn.Module, rollouts: common.Rollouts, credit: Tensor, args: Settings
) -> Tensor:
    """Of the mean over tokens of credit · log π, as one vector: what AdamW would climb."""
    weights = credit * token_weights(rollouts.mask, "token", args.max_new_tokens)
    for index in common.micro_batches(rollouts, args.token_budget, torch.arange(len(credit))):
        logp, _ = common.token_logp(policy, rollouts, index, args)
        (weights[index] * logp).sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    policy.zero_grad()
    return found


def terms(
    rewards: Tensor, entropy: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The parts that the methods' advantages are made of, [P, G, T] each."""
    inputs = (rewards, entropy, logp, ref_logp, mask)
    gated = ep_grpo.ep_grpo_advantages(*inputs, eta=0.0)
    progress = ep_grpo.ep_grpo_advantages(*inputs) - gated
    right = (rewards > 0)[..., None]
    return {
        "GRPO": grpo_advantages(rewards)[..., None] * mask,
        "gated outcome": gated,
        "progress": progress,
        "progress in right answers": progress * right,
        "progress in failed answers": progress * ~right,
        "EP-GRPO": gated + progress,
        "ERPO": erpo.erpo_advantages(*inputs),
        "-(log π - log π_ref)": (ref_logp - logp) * mask,
    }


def pull(rewards: Tensor, entropy: Tensor, signal: Tensor, mask: Tensor) -> float:
    """What log π - log π_ref is multiplied by in the progress of a failed answer's token, but for
    its sign: η over the deviation in the token's bucket. Median over those tokens."""
    bucket = ep_grpo.entropy_buckets(entropy, mask, 10)
    anchored = grpo_advantages(rewards).sign()[..., None] * signal
    weight = torch.zeros_like(signal)
    for k in range(10):
        _, std = common.group_moments(anchored, mask & (bucket == k), correction=0)
        weight = torch.where((bucket == k) & (std > 0), 0.2 / std, weight)
    failed = mask & (rewards == 0)[..., None] & (weight > 0)
    return float(weight[failed].median())


def main(args: Args) -> None:
    if args.write:
        write_page(json.loads(RESULTS.read_text()))
        return
    command = [sys.executable, "grpo.py", *TRAINING.split(), "--steps", str(max(STEPS))]
    command += ["--keep-checkpoints", str(max(STEPS)), "--run-dir", str(args.run)]
    if not (args.run / "model").exists():
        subprocess.run(command, cwd=ROOT, check=True)

    settings = Settings(max_new_tokens=64, token_budget=65536, group_size=8)
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
                of_grpo = None
                for name, credit in terms(rewards, entropy, logp, ref_logp, rollouts.mask).items():
                    found = gradient(policy, rollouts, credit, settings)
                    of_grpo = found if of_grpo is None else of_grpo
                    like = torch.cosine_similarity
                    row = {"step": step, "seed": seed, "term": name}
                    row |= {"norm": float(found.norm() / of_grpo.norm())}
                    row |= {
                        "truth": float(like(found, truth, 0)),
                        "grpo": float(like(found, of_grpo, 0)),
                    }
                    rows.append(
                        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                    )
                ratio = logp - ref_logp
                found = pull(rewards, entropy, ratio, rollouts.mask)
                rows.append({"step": step, "seed": seed, "term": "pull", "norm": round(found, 4)})
                ratio = ratio[rollouts.mask]
                rows.append(
                    {"step": step, "seed": seed, "term": "deviation", "norm": float(ratio.std())}
                )
            print(f"step {step} measured", flush=True)
    results = {"command": "python benchmark/progress.py", "training": f"python grpo.py {TRAINING}"}
    results["machine"] = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    RESULTS.write_text(json.dumps(results | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """A line a term: at each step its norm by GRPO's, and its cosine with the true gradient."""
    names = dict.fromkeys(row["term"] for row in rows if "truth" in row)
    lines = [
        "| term |" + "".join(f" step {step} |" for step in STEPS),
        "|---|" + "---:|" * len(STEPS),
    ]

    def mean(name: str, step: int, key: str) -> float:
        found = [row[key] for row in rows if (row["term"], row["step"]) == (name, step)]
        return sum(found) / len(found)

    for name in names:
        cells = [f"{mean(name, s, 'norm'):.2f}, {mean(name, s, 'truth'):+.2f}" for s in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, what in (
        ("deviation", "deviation of the log-ratio, nats"),
        ("pull", "weight of the log-ratio in failed answers' progress"),
    ):
        lines.append(
            f"| {what} | " + " | ".join(f"{mean(name, s, 'norm'):.3g}" for s in STEPS) + " |"
        )
    return "\n".join(lines)


def write_page(results: dict) -> None:
    seeds = len({row["seed"] for row in results["rows"]})
    said = (
        f"Norm of the gradient against GRPO's, and its cosine with the true one; means over "
        f"{seeds} batches of {PROBLEMS} problems at checkpoints of `{results['training']}`. The "
        f"true gradient is from {TRUTH} problems with 8 other rollouts each. "
        f"`{results['command']}`, {results['machine']}."
    )
    marks = r"(<!-- results:progress -->\n).*?(<!-- /results -->)"
    text = PAGE.read_text(encoding="utf-8")
    block = f"{table(results['rows'])}\n\n{said}"
    PAGE.write_text(re.sub(marks, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
