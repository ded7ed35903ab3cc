"""How close each method's token advantages come to the true ones, on the tiny task.

    python benchmark/credit.py             # half an hour on one core; goes on where it was stopped
    python benchmark/credit.py --write     # puts the results into docs/credit.md and credit.svg

Two policies: the one that training starts from, and one that GRPO has half trained, with LoRA
adapters, since ARCA needs them. Each rolls out groups on held-out problems. truth.py measures the
true advantage of every token; then each method shares out its credit on the same rollouts, with its
own function. The page: docs/credit.md.
"""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import credit_page  # noqa: E402
import files  # noqa: E402
import measures  # noqa: E402
import models  # noqa: E402
import truth  # noqa: E402
from measures import Credit, Truth, estimate, shares  # noqa: E402
from settings import device, refuse  # noqa: E402

import arca  # noqa: E402
import common  # noqa: E402
import ep_grpo  # noqa: E402
import erpo  # noqa: E402
import grpo  # noqa: E402
import gtpo  # noqa: E402
import holderpo  # noqa: E402
from tiny.steps import check_steps  # noqa: E402
from verifier import Grader  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "credit.json"
POLICIES = ("starting", "half-trained")
MAX_NEW_TOKENS, LORA_RANK, LR = 64, 64, 2e-4
Methods = dict[str, list[Credit]]  # of every problem


@dataclass
class Args:
    prompts: int = 32
    """held-out problems, the first ones of tiny/test.jsonl"""
    group_size: int = 8
    """G: rollouts of each problem"""
    continuations: int = 64
    """of every prefix, for each of two independent estimates of the truth"""
    train_steps: int = 15
    """steps of GRPO that half-train the policy"""
    policies: str = ",".join(POLICIES)
    """whose rollouts are measured"""
    seed: int = 1
    """of everything random"""
    engine: str = "auto"
    """what generates: vllm or transformers; auto: vLLM where it is installed"""
    run_dir: str = "runs/credit"
    """what has been measured so far: a file for each policy and problem"""
    results: str = str(RESULTS.relative_to(ROOT))
    """the summary that the tables and the figure are made of"""
    write: bool = False
    """only write the tables and the figure from benchmark/results/credit.json"""


# ------------------------------------------------------------------------------- the methods


def method_credits(
    policy: nn.Module, rollouts: common.Rollouts, correct: Tensor, args: grpo.Args
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each method's advantage of every token, and the signals that methods share it out by.

    correct: [P, G]. Returns two dictionaries of [P, G, T], 0 outside the mask.
    """
    mask, reference = rollouts.mask, models.Reference(policy, args)
    logp, entropy = common.score(policy, rollouts, args)
    with reference as frozen:
        ref_logp, _ = common.score(frozen, rollouts, args)
    outcome = grpo.grpo_advantages(correct)
    gated = ep_grpo.entropy_gate(entropy, mask) * outcome[..., None] * mask
    scored = (correct, entropy, logp, ref_logp, mask)
    signals = {
        "surprisal": arca.surprisal(logp),
        "entropy": entropy,
        "entropy reduction": arca.entropy_reduction(entropy, mask),
        "divergence": arca.divergence(logp, ref_logp),
        "residual": arca.residuals(policy, reference, rollouts, args),
    }
    credits = {
        "GRPO": outcome[..., None] * mask,
        "EP-GRPO": ep_grpo.ep_grpo_advantages(*scored),
        "EP-GRPO's progress": ep_grpo.ep_grpo_advantages(*scored) - gated,
        "ERPO": erpo.erpo_advantages(*scored),
        "GTPO": gtpo.gtpo_advantages(correct, entropy, mask),
        "GRPO-S": gtpo.grpo_s_advantages(correct, entropy, mask)[..., None] * mask,
        "HölderPO, p = 2": holder_credit(policy, rollouts, outcome, logp, args, 2.0),
        "HölderPO, p = −2": holder_credit(policy, rollouts, outcome, logp, args, -2.0),
    }
    for name, signal in signals.items():
        if name != "entropy":  # arca.py takes its fall
            weights = arca.credit_weights(signal, mask) * mask.sum(-1, keepdim=True)
            label = "ARCA" if name == "residual" else f"ARCA's {name}"
            # Rounded, because equal credit must tie, and a weight of 1 / T times T may miss 1.
            credits[label] = outcome[..., None] * weights.round(decimals=6)
    credits["log π − log π_ref"] = logp - ref_logp  # what EP-GRPO and ERPO sign by the verdict
    return credits, signals


def holder_credit(
    policy: nn.Module,
    rollouts: common.Rollouts,
    outcome: Tensor,
    old_logp: Tensor,
    args: grpo.Args,
    p: float,
) -> Tensor:
    """What HölderPO's loss gives each token's log-probability, times T, as every other advantage
    is what GRPO's gives: [P, G, T].

    On the first update of a step this is GRPO's for any p. So it is taken on the second of two:
    the policy has moved by an update on the other half of the problems.
    """
    credit = torch.zeros_like(old_logp)
    for half in torch.arange(len(rollouts.problems)).chunk(2):
        other = torch.tensor([i for i in range(len(rollouts.problems)) if i not in half])
        moved = copy.deepcopy(policy)
        trained = [weight for weight in moved.parameters() if weight.requires_grad]
        for index in common.micro_batches(rollouts, args.token_budget, other):
            logp, _ = common.token_logp(moved, rollouts, index, args)
            new_and_old = logp, old_logp[index], rollouts.mask[index]
            holderpo.holder_surrogate(*new_and_old, outcome[index], p)[0].sum().backward()
        torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0).step()  # whatever the loss's scale
        logp = common.score(moved, rollouts, args)[0][half].flatten(0, 1).requires_grad_()
        mask = rollouts.mask[half].flatten(0, 1)
        new_and_old = logp, old_logp[half].flatten(0, 1), mask
        holderpo.holder_surrogate(*new_and_old, outcome[half].flatten(), p)[0].sum().backward()
        credit[half] = (-logp.grad * mask.sum(-1, keepdim=True)).view(credit[half].shape)
    return credit


# ------------------------------------------------------------------------------- one policy


def read_truth(
    row: dict[str, Any], estimates: list[int], count: int
) -> tuple[Truth, list[truth.Curves]]:
    """The truth by some estimates, of `count` continuations each, of what `truth.measure` returned
    for a problem; and the curves of each rollout."""
    curves, steps = [], []
    for others, wins, pieces, reward in zip(
        *(row[name] for name in ("others", "wins", "pieces", "correct")), strict=True
    ):
        won = np.array(wins)[:, estimates].sum(-1)
        tried = count * len(estimates)
        curves.append(truth.true_advantages(np.array(others), won, tried, reward))
        ends = np.cumsum([len(piece) for piece in pieces])
        steps.append([])
        for start, end, right in check_steps(row["problem"], "".join(pieces)):
            first, last = np.searchsorted(ends, (start, end - 1), side="right")
            steps[-1].append((slice(first, last + 1), right))
    advantages = [curve.advantages for curve in curves]
    clear = [np.abs(c.advantages) > np.maximum(measures.CLEAR, 2 * c.errors) for c in curves]
    return Truth(advantages, clear, row["correct"], steps), curves


def soundness(rows: list[dict[str, Any]], count: int) -> dict[str, float]:
    """The truth against itself, and against responses that share nothing with it."""
    closing, against_new, repeated = [], [], []
    for row in rows:
        won, tried = row["prompt"]
        new = won / tried
        both, first, second = (read_truth(row, e, count)[1] for e in ([0, 1], [0], [1]))
        for g, (curve, one, two) in enumerate(zip(both, first, second, strict=True)):
            total, reward = curve.advantages.sum(), row["correct"][g]
            closing.append(total - (reward - curve.values[0]))
            error = np.hypot(curve.value_errors[0], np.sqrt(new * (1 - new) / tried))
            against_new.append((total - (reward - new)) / error)
            z = (one.advantages - two.advantages) / np.hypot(one.errors, two.errors).clip(1e-12)
            repeated.append(z[np.array(row["others"][g]) > 0])
    return {
        "advantages of a rollout − (reward − V(prompt)), largest": float(np.abs(closing).max()),
        "the same with V(prompt) from new responses, mean z": float(np.mean(against_new)),
        "rms z": float(np.sqrt(np.square(against_new).mean())),
        "share within 2 standard errors": float((np.abs(against_new) < 2).mean()),
        "an advantage measured twice, rms z": float(
            np.sqrt(np.square(np.concatenate(repeated)).mean())
        ),
    }


def example(rows: list[dict[str, Any]], truths: list[Truth], credits: Methods) -> dict[str, Any]:
    """The failed rollout, of a group with successes, whose true advantages lie furthest apart."""
    *_, p, g = max(
        (any(true.correct) and not true.correct[g], np.ptp(advantages), p, g)
        for p, true in enumerate(truths)
        for g, advantages in enumerate(true.advantages)
    )
    given = {"truth": truths[p].advantages[g]}
    given |= {name: credit[p][g] for name, credit in credits.items()}
    return {
        "problem": rows[p]["problem"],
        "pieces": rows[p]["pieces"][g],
        "credit": {name: np.round(credit, 4).tolist() for name, credit in given.items()},
    }


def summarise(
    rows: list[dict[str, Any]],
    problems: list[common.Problem],
    policy: nn.Module,
    args: grpo.Args,
    count: int,
) -> dict[str, Any]:
    """All that is said about one policy, from what was measured and from the methods."""
    groups = [
        common.Group(problem, row["tokens"], engine_logp=row["others"], texts=[])  # logp: unused
        for problem, row in zip(problems, rows, strict=True)
    ]
    rollouts = common.stack(groups, [], device(args))
    correct = torch.tensor([row["correct"] for row in rows], device=rollouts.mask.device)
    credits, signals = (
        {
            name: [
                [c[m].double().cpu().numpy() for c, m in zip(*pair, strict=True)]
                for pair in zip(values, rollouts.mask, strict=True)
            ]
            for name, values in tensors.items()
        }
        for tensors in method_credits(policy, rollouts, correct, args)
    )
    truths, first, second = (
        [read_truth(row, estimates, count)[0] for row in rows] for estimates in ([0, 1], [0], [1])
    )
    again = [true.advantages for true in first]
    reverse = [[-advantages for advantages in credit] for credit in again]
    judged = {name: (credit, truths) for name, credit in credits.items()}
    judged |= {"truth, measured again": (again, second), "the same, reversed": (reverse, second)}
    sizes = [replace(true, advantages=[np.abs(a) for a in true.advantages]) for true in truths]
    return {
        "facts": measures.facts(truths),
        "soundness": soundness(rows, count),
        "methods": {
            name: {
                label: estimate(shares(measure, *pair), shares(measure, credits["GRPO"], pair[1]))
                for label, measure in measures.MEASURES.items()
            }
            for name, pair in judged.items()
        },
        "signals": {
            name: {
                label: estimate(shares(measure, signal, sizes), shares(measure, signal, sizes))
                for label, measure in measures.SIGNAL_MEASURES.items()
            }
            for name, signal in signals.items()
        },
        "example": example(rows, truths, credits),
    }


# ------------------------------------------------------------------------------- the whole


def check(args: Args) -> None:
    """Refuse what cannot work, before anything is loaded."""
    least = {"prompts": 2, "group_size": 2, "continuations": 2, "train_steps": 1}
    for name, minimum in least.items():
        if getattr(args, name) < minimum:
            flag = "--" + name.replace("_", "-")
            refuse(flag, getattr(args, name), f"must be at least {minimum}")
    for unknown in set(args.policies.split(",")) - set(POLICIES):
        refuse("--policies", unknown or "''", f"known are {', '.join(POLICIES)}")
    folder = Path(args.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("group_size", "continuations", "seed", "train_steps")
    kept, file = {name: getattr(args, name) for name in names}, folder / "settings.json"
    if file.exists() and files.read_json(file) != kept:
        refuse("--run-dir", args.run_dir, f"was measured with {files.read_json(file)}")
    files.write_json(file, kept)


def train(args: Args) -> Path:
    """The half-trained policy's adapters, trained now if they are not there."""
    folder = Path(args.run_dir, "policy").resolve()
    command = f"grpo.py --lora-rank {LORA_RANK} --lr {LR} --max-new-tokens {MAX_NEW_TOKENS}"
    command += f" --steps {args.train_steps} --seed {args.seed} --eval-every 0 --save-every 0"
    words = [sys.executable, *command.split(), "--resume", "--run-dir", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True)
    return folder / "checkpoints" / f"step-{args.train_steps:06d}"


def main(args: Args) -> None:
    if args.write:
        return credit_page.write(files.read_json(RESULTS))
    check(args)
    settings = grpo.Args(
        model=str(ROOT / "tiny"),
        eval_dataset=str(ROOT / "tiny" / "test.jsonl"),
        engine=args.engine,
        lora_rank=LORA_RANK,
        group_size=args.group_size,
        max_new_tokens=MAX_NEW_TOKENS,
        prompts_per_step=max(1, 512 // args.group_size),  # what vLLM has in flight
        lr=LR,
        seed=args.seed,
    )
    with Grader() as grader:
        tokenizer = models.load_tokenizer(settings)
        policy = models.load_policy(settings)
        problems = common.load_problems(settings, "--eval-dataset", tokenizer, grader)
        problems = problems[: args.prompts]
        engine = models.make_engine(settings, policy, tokenizer, problems)
        summaries = {}
        # The starting policy comes first: the other one's weights are loaded over its own.
        for name in (name for name in POLICIES if name in args.policies.split(",")):
            if name == "half-trained":
                models.load_weights(policy, train(args))
            engine.sync(policy)
            rows = []
            for i, problem in enumerate(problems):
                path = Path(args.run_dir, name, f"problem-{i:03d}.json")
                path.parent.mkdir(exist_ok=True)
                if not path.exists():
                    row = truth.measure(
                        *(engine, grader, policy, problem, settings),
                        continuations=args.continuations,
                        seed=(args.seed, name, i),
                    )
                    files.write_json(path, row)
                    print(f"{name}: {i + 1} of {len(problems)}", flush=True)
                rows.append(files.read_json(path))
            summaries[name] = summarise(rows, problems, policy, settings, args.continuations)
    results = {
        "command": "python benchmark/credit.py",
        "settings": {k: v for k, v in asdict(args).items() if k not in ("run_dir", "results")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "vllm": version(packages_distributions()["vllm"][0]),
            "transformers": version("transformers"),
        },
        "policies": summaries,
    }
    files.write_json(Path(args.results), results)
    print(credit_page.tables(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
