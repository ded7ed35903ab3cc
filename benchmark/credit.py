"""How close each method's token advantages come to the true ones, on the tiny task.

    python benchmark/credit.py             # half an hour on one core; goes on where it was stopped
    python benchmark/credit.py --write     # puts the results into docs/credit.md and credit.svg

Two policies: the one that training starts from, and one that GRPO has half trained, with LoRA
adapters, since ARCA needs them. Each rolls out groups on held-out problems. truth.py measures the
true advantage of every token; then each method shares out its credit on the same rollouts, with its
own function.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
import truth
import tyro
from shared import RESULTS, ROOT, markdown, read_json, refuse, write_json
from torch import Tensor, nn
from truth import Credit, Truth, estimate, shares

import arca
import common
import ep_grpo
import erpo
import grpo
import gtpo
import holderpo
import vineppo
from common import Rollouts
from docs.figures import BLUE, GREY, ORANGE, Drawing
from engine import Reference, device, load_policy, load_tokenizer, load_weights, make_engine
from grading import Grader
from tiny.steps import check_steps

PAGE, FIGURE = ROOT / "docs" / "credit.md", ROOT / "docs" / "credit.svg"
POLICIES = ("starting", "half-trained")
MAX_NEW_TOKENS, LORA_RANK, LR = 64, 64, 2e-4
Row = dict[str, Any]  # what truth.measure returned for a problem
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
    run_dir: Path = ROOT / "runs" / "credit"
    """what has been measured so far: a file for each policy and problem"""
    results: Path = RESULTS / "credit.json"
    """the summary that the tables and the figure are made of"""
    write: bool = False
    """only write the tables and the figure from the results"""


def method_credits(
    policy: nn.Module,
    rollouts: Rollouts,
    correct: Tensor,
    steps: Tensor,
    values: Tensor,
    args: vineppo.Args,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each method's advantage of every token, and the signals that methods share it out by.

    correct: [P, G]; steps [P, G, T] and values [P, G, S] are VinePPO's. Returns two dictionaries of
    [P, G, T], 0 outside the mask.
    """
    mask, reference = rollouts.mask, Reference(policy, args)
    logp, entropy = common.score(policy, rollouts, args)
    with reference() as frozen:
        ref_logp, _ = common.score(frozen, rollouts, args)
    outcome = grpo.grpo_advantages(correct)
    scored = (correct, entropy, logp, ref_logp, mask)
    ep_grpo_credit = ep_grpo.ep_grpo_advantages(*scored)
    signals = {
        "surprisal": arca.surprisal(logp),
        "entropy": entropy,
        "entropy reduction": arca.entropy_reduction(entropy, mask),
        "divergence": arca.divergence(logp, ref_logp),
        "residual": arca.residuals(policy, reference, rollouts, args),
    }
    credits = {
        "GRPO": outcome[..., None] * mask,
        "EP-GRPO": ep_grpo_credit,
        "EP-GRPO's progress": ep_grpo_credit - ep_grpo.ep_grpo_advantages(*scored, eta=0.0),
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
    credits["VinePPO"] = vineppo.vineppo_advantages(values, steps, correct, mask)
    return credits, signals


def holder_credit(
    policy: nn.Module, rollouts: Rollouts, outcome: Tensor, old_logp: Tensor, args: Any, p: float
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


def read_truth(row: Row, estimates: list[int], count: int) -> tuple[Truth, list[truth.Curves]]:
    """The truth of a problem by some estimates, of `count` continuations each; and the curves of
    each rollout."""
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
    clear = [np.abs(c.advantages) > np.maximum(truth.CLEAR, 2 * c.errors) for c in curves]
    return Truth(advantages, clear, row["correct"], steps), curves


def soundness(rows: list[Row], count: int) -> dict[str, float]:
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

    def rms(z: list[Any]) -> float:
        return float(np.sqrt(np.square(z).mean()))

    return {
        "advantages of a rollout − (reward − V(prompt)), largest": float(np.abs(closing).max()),
        "the same with V(prompt) from new responses, mean z": float(np.mean(against_new)),
        "rms z": rms(against_new),
        "share within 2 standard errors": float((np.abs(against_new) < 2).mean()),
        "an advantage measured twice, rms z": rms(np.concatenate(repeated)),
    }


def example(rows: list[Row], truths: list[Truth], credits: Methods) -> dict[str, Any]:
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
    rows: list[Row],
    groups: list[common.Group],
    policy: nn.Module,
    args: vineppo.Args,
    count: int,
) -> dict[str, Any]:
    """All that is said about one policy, from what was measured and from the methods."""
    rollouts = common.stack(groups, [], device(args))
    correct = torch.tensor([row["correct"] for row in rows], device=rollouts.mask.device)
    steps_and_values = vineppo.stack_values(groups, rollouts.mask.device)
    credits, signals = (
        {
            name: [
                [c[m].double().cpu().numpy() for c, m in zip(*pair, strict=True)]
                for pair in zip(values, rollouts.mask, strict=True)
            ]
            for name, values in tensors.items()
        }
        for tensors in method_credits(policy, rollouts, correct, *steps_and_values, args)
    )
    truths, first, second = (
        [read_truth(row, estimates, count)[0] for row in rows] for estimates in ([0, 1], [0], [1])
    )
    credits["VinePPO, true values"] = [
        [np.bincount(steps, a)[steps] for (steps, *_), a in zip(group.notes, of_group, strict=True)]
        for group, of_group in zip(groups, (true.advantages for true in truths), strict=True)
    ]
    again = [true.advantages for true in first]
    judged = {name: (credit, truths) for name, credit in credits.items()}
    judged["truth, measured again"] = again, second
    sizes = [replace(true, advantages=[np.abs(a) for a in true.advantages]) for true in truths]
    return {
        "facts": truth.facts(truths),
        "soundness": soundness(rows, count),
        "methods": {
            name: {
                label: estimate(shares(measure, *pair), shares(measure, credits["GRPO"], pair[1]))
                for label, measure in truth.MEASURES.items()
            }
            for name, pair in judged.items()
        },
        "signals": {
            name: {
                label: estimate(shares(measure, signal, sizes), shares(measure, signal, sizes))
                for label, measure in truth.SIGNAL_MEASURES.items()
            }
            for name, signal in signals.items()
        },
        "example": example(rows, truths, credits),
    }


# ------------------------------------------------------------------------------- the page


def cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    low, high = figure["interval"]
    value = f"{figure['value']:.2f}"
    return f"{f'**{value}**' if figure['differs'] else value} [{low:.2f}, {high:.2f}]"


def plain(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"


def tables(results: dict[str, Any]) -> str:
    """All tables of the page."""
    policies = results["policies"]
    first, *_ = policies.values()
    parts = []
    for name, policy in policies.items():
        rows = [[m, *map(cell, row.values())] for m, row in policy["methods"].items()]
        parts += [f"The {name} policy:", markdown(["credit", *truth.MEASURES], rows)]
    for part, title in (("facts", "the rollouts"), ("soundness", "the truth")):
        rows = [[key, *(plain(p[part][key]) for p in policies.values())] for key in first[part]]
        parts.append(markdown([title, *policies], rows))
    head = ["signal, against the size of the true advantage"]
    head += [f"{measure}, {name}" for name in policies for measure in truth.SIGNAL_MEASURES]
    rows = [
        [s, *(cell(c) for p in policies.values() for c in p["signals"][s].values())]
        for s in first["signals"]
    ]
    parts.append(markdown(head, rows))
    settings = results["settings"]
    parts.append(
        f"`{results['command']}`, seed {settings['seed']}: {settings['prompts']} problems, "
        f"{settings['group_size']} rollouts of each, {settings['continuations']} continuations for "
        f"each of two estimates; {results['machine']}, vLLM {results['versions']['vllm']} for the "
        f"CPU. All numbers: `benchmark/results/credit.json`."
    )
    return "\n\n".join(parts)


def draw(results: dict[str, Any], path: Path) -> None:
    """One rollout: a row of shaded tokens for the truth and for each method."""
    *_, policy = results["policies"].values()
    shown = policy["example"]
    left, step, tall, top = 190, 12.4, 20, 62
    across = left + step * len(shown["pieces"])
    drawing = Drawing(int(across) + 12, top + tall * len(shown["credit"]) + 34)
    drawing.text(left, 20, shown["problem"], anchor="start")
    for t, piece in enumerate(shown["pieces"]):
        drawing.text(left + step * (t + 0.5), top - 8, piece.strip() or ("¶", "␣")[bool(piece)])
    for row, (name, credit) in enumerate(shown["credit"].items()):
        y = top + tall * row
        drawing.text(left - 10, y + 14, name, anchor="end")
        drawing.line([(left, y + tall - 2), (across, y + tall - 2)], GREY, 0.3)
        largest = max(map(abs, credit)) or 1.0
        for t, value in enumerate(credit):
            colour, solid = (BLUE, ORANGE)[value < 0], abs(value) / largest
            if solid >= 0.01:
                drawing.box(left + step * t + 0.5, y, step - 1, tall - 3, colour, round(solid, 2))
    legend = top + tall * len(shown["credit"]) + 12
    for x, colour, words in ((left, BLUE, "for the token"), (left + 150, ORANGE, "against it")):
        drawing.box(x, legend, step, 12, colour)
        drawing.text(x + step + 6, legend + 10, words, anchor="start")
    drawing.save(str(path))


def check(args: Args) -> list[str]:
    """The policies asked for; refuses what cannot work, before anything is loaded."""
    shared.at_least(args, prompts=2, group_size=2, continuations=2, train_steps=1)
    policies = shared.chosen("--policies", args.policies, POLICIES)
    kept = {k: getattr(args, k) for k in ("group_size", "continuations", "seed", "train_steps")}
    file = args.run_dir / "settings.json"
    if file.exists() and read_json(file) != kept:
        refuse("--run-dir", args.run_dir, f"was measured with {read_json(file)}")
    write_json(file, kept)
    return policies


def train(args: Args) -> Path:
    """The half-trained policy's adapters, trained now if they are not there."""
    folder = args.run_dir.resolve() / "policy"
    flags = f"--lora-rank {LORA_RANK} --lr {LR} --max-new-tokens {MAX_NEW_TOKENS}"
    flags += f" --steps {args.train_steps} --seed {args.seed} --eval-every 0 --save-every 0"
    command = shared.run_command("grpo.py", flags.split(), folder)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return folder / "checkpoints" / f"step-{args.train_steps:06d}"


def measure_policies(args: Args, names: list[str]) -> dict[str, Any]:
    """The summary of each policy; what was measured before is not measured again."""
    settings = vineppo.Args(
        model=str(ROOT / "tiny"),
        eval_dataset=str(ROOT / "tiny" / "test.jsonl"),
        lora_rank=LORA_RANK,
        group_size=args.group_size,
        max_new_tokens=MAX_NEW_TOKENS,
        prompts_per_step=max(1, 512 // args.group_size),  # what vLLM has in flight
        lr=LR,
        seed=args.seed,
    )
    summaries = {}
    with Grader() as grader:
        tokenizer = load_tokenizer(settings)
        policy = load_policy(settings)
        problems = common.load_problems(settings, "--eval-dataset", tokenizer, grader)
        problems = problems[: args.prompts]
        engine = make_engine(settings, policy, tokenizer, problems)
        # The starting policy comes first: the other one's weights are loaded over its own.
        for name in sorted(names, key=POLICIES.index):
            if name == "half-trained":
                load_weights(policy, train(args))
            engine.sync(policy)
            rows = []
            for i, problem in enumerate(problems):
                path = args.run_dir / name / f"problem-{i:03d}.json"
                if not path.exists():
                    row = truth.measure(
                        *(engine, grader, policy, problem, settings),
                        continuations=args.continuations,
                        seed=(args.seed, name, i),
                    )
                    write_json(path, row)
                    print(f"{name}: {i + 1} of {len(problems)}", flush=True)
                rows.append(read_json(path))
            groups = [
                common.Group(problem, row["tokens"], row["others"], texts=[])  # no log-probability
                for problem, row in zip(problems, rows, strict=True)
            ]
            vineppo.estimate_values(engine, grader, groups, settings, (args.seed, name))
            summaries[name] = summarise(rows, groups, policy, settings, args.continuations)
    return summaries


def main(args: Args) -> None:
    if args.write:
        results = read_json(args.results)
        shared.write_page(PAGE, {"credit": tables(results)})
        return draw(results, FIGURE)
    summaries = measure_policies(args, check(args))
    settings = {k: v for k, v in asdict(args).items() if not isinstance(v, Path | bool)}
    results = {"command": "python benchmark/credit.py", "settings": settings}
    results |= shared.surroundings("torch", "vllm", "transformers") | {"policies": summaries}
    write_json(args.results, results)
    print(tables(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
