"""Compare each method's token advantages with the true advantages on the tiny task.

    python benchmark/credit.py             # about half an hour on one core
    python benchmark/credit.py --write     # writes docs/credit.md and draws credit.svg

Two policies are measured: the starting policy, and a policy that GRPO has half trained (with LoRA
adapters, which ARCA needs). Each rolls out groups on held-out problems. truth.py measures the true
advantage of every token. Each method's own function then assigns credit to the same rollouts.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
import truth
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json
from torch import Tensor, nn
from truth import Credit, Truth, estimates

import arca
import common
import vineppo
from common import Rollouts
from docs import figures
from ep_grpo import ep_grpo_advantages
from erpo import erpo_advantages
from fipo import fipo_weights
from forking import forking_mask
from grpo import grpo_advantages
from gtpo import grpo_s_advantages, gtpo_advantages
from holderpo import holder_surrogate
from infra.models import load_weights
from lambda_grpo import lambda_weights
from stare import stare_weights
from tiny.steps import check_steps

PAGE = ROOT / "docs" / "credit.md"
POLICIES = ("starting", "half-trained")  # the second one's weights are loaded over the first's
MAX_NEW_TOKENS = 64
LORA_RANK = 64
LR = 2e-4
TRAIN_STEPS = 15  # steps of GRPO for the half-trained policy
SEED = 1
Row = dict[str, Any]  # the plain values of truth.measure for a problem
Signals = dict[str, Tensor]  # [P, G, T] each


@dataclass
class Args:
    prompts: int = 32  # held-out problems, the first ones of tiny/test.jsonl
    group_size: int = 8  # G: rollouts per problem
    continuations: int = 64  # of each prefix, for each of two independent estimates of the truth
    run_dir: Path = ROOT / "runs" / "credit"  # the half-trained policy's run, the measurements
    write: bool = False  # only write the tables and the figure from the results


def method_credits(
    policy: nn.Module, rollouts: Rollouts, steps: Tensor, values: Tensor, args: vineppo.Args
) -> tuple[Signals, Signals]:
    """Each method's advantage of every token, and the signals that methods weight tokens by.

    steps: [P, G, T] and values: [P, G, S] are VinePPO's. Both results are 0 outside the mask.
    """
    mask, correct = rollouts.mask, rollouts.correct
    reference = common.Reference(policy, args)
    logp, entropy = common.score(policy, rollouts, args)
    with reference() as frozen:
        ref_logp, _ = common.score(frozen, rollouts, args)

    every_rollout = mask.any(-1).nonzero(as_tuple=True)
    residuals = arca.residuals(policy, reference, rollouts, every_rollout, args)  # [tokens]
    signals = {
        "surprisal": arca.surprisal(logp),
        "entropy": entropy,
        "entropy reduction": arca.entropy_reduction(entropy, mask),
        "divergence": arca.divergence(logp, ref_logp),
        "residual": torch.zeros_like(logp).masked_scatter(mask, residuals),
    }

    advantages = grpo_advantages(correct)  # [P, G]
    moved = moved_logp(policy, rollouts, advantages, args)
    outcome = advantages[..., None] * mask

    scored = (correct, entropy, logp, ref_logp, mask)
    ep_grpo_credit = ep_grpo_advantages(*scored)
    credits = {
        "GRPO": outcome,
        "EP-GRPO": ep_grpo_credit,
        "EP-GRPO's progress": ep_grpo_credit - ep_grpo_advantages(*scored, eta=0.0),
        "ERPO": erpo_advantages(*scored),
        "GTPO": gtpo_advantages(correct, entropy, mask),
        "GRPO-S": grpo_s_advantages(correct, entropy, mask)[..., None] * mask,
        "HölderPO, p = 2": holder_credit(moved, logp, mask, advantages, 2.0),
        "HölderPO, p = −2": holder_credit(moved, logp, mask, advantages, -2.0),
        "FIPO": outcome * fipo_weights(moved, logp, outcome, mask),
        "STARE": outcome * stare_weights(logp, outcome, mask),
        "STARE C2": outcome * stare_weights(logp, outcome, mask, attenuate=0.9),
        "forking tokens": outcome * forking_mask(entropy, mask),
        "λ-GRPO": outcome * lambda_weights(rollouts.tokens, mask),
    }

    for signal in ("surprisal", "entropy reduction", "divergence"):
        credits[f"ARCA's {signal}"] = arca_credit(outcome, signals[signal], mask)
    credits["ARCA"] = arca_credit(outcome, signals["residual"], mask)
    credits["log π − log π_ref"] = logp - ref_logp  # EP-GRPO and ERPO sign it by the verdict
    credits["VinePPO"] = vineppo.vineppo_advantages(values, steps, correct, mask)
    return credits, signals


def arca_credit(outcome: Tensor, signal: Tensor, mask: Tensor) -> Tensor:
    """GRPO's advantage, weighted within each response by a signal: [P, G, T]."""
    weights = arca.credit_weights(signal, mask) * mask.sum(-1, keepdim=True)
    # Equal weights are 1 / T times T, which may differ from 1 by rounding: equal credit must give
    # equal ranks.
    return outcome * weights.round(decimals=6)


def moved_logp(policy: nn.Module, rollouts: Rollouts, advantages: Tensor, args: Any) -> Tensor:
    """Log-probabilities of each half of the problems after an update on the other half, [P, G, T].

    In a step's first update HölderPO's and FIPO's credit is GRPO's advantage. It is therefore taken
    in the second. The first is GRPO's, averaged over each response's tokens.
    """
    mask = rollouts.mask
    moved = torch.zeros(mask.shape, device=mask.device)
    halves = []  # (problem, rollout) indices of each
    for problems in torch.arange(len(mask)).chunk(2):
        rows = torch.cartesian_prod(problems, torch.arange(mask.shape[1]))
        halves.append(rows.unbind(-1))

    for half, other in (halves, halves[::-1]):
        model = copy.deepcopy(policy)
        logp, _ = common.token_logp(model, rollouts, other, args)
        means = logp.sum(-1) / mask[other].sum(-1)
        (-advantages[other] * means).sum().backward()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0).step()

        with torch.no_grad():
            moved[half], _ = common.token_logp(model, rollouts, half, args)
    return moved


def holder_credit(
    logp: Tensor, old_logp: Tensor, mask: Tensor, advantages: Tensor, p: float
) -> Tensor:
    """The gradient of HölderPO's loss with respect to each log-probability, negated and times T:
    [P, G, T]. It has the scale of an advantage.
    """
    rows = logp.flatten(0, 1).requires_grad_()
    given = old_logp.flatten(0, 1), mask.flatten(0, 1), advantages.flatten()
    loss, _ = holder_surrogate(rows, *given, p)
    [gradient] = torch.autograd.grad(loss.sum(), rows)
    return -gradient.view_as(mask) * mask.sum(-1, keepdim=True)


def read_curves(row: Row, chosen: list[int], count: int) -> list[truth.Curves]:
    """The true values and advantages along each rollout of a problem's group.

    chosen: estimates to use; count: continuations of each.
    """
    curves = []
    for others, wins, reward in zip(row["others"], row["wins"], row["correct"], strict=True):
        won = np.array(wins)[:, chosen].sum(-1)
        tried = count * len(chosen)
        curves.append(truth.true_advantages(np.array(others), won, tried, reward))
    return curves


def read_steps(problem: str, pieces: list[str]) -> list[tuple[slice, bool]]:
    """The tokens of each arithmetic step of a response, and whether the step is right.

    pieces: the text of each token.
    """
    ends = np.cumsum(list(map(len, pieces)))  # in characters
    steps = []
    for start, end, right in check_steps(problem, "".join(pieces)):
        first, last = np.searchsorted(ends, (start, end - 1), side="right")
        steps.append((slice(first, last + 1), right))
    return steps


def read_truth(row: Row, chosen: list[int], count: int) -> Truth:
    """What the measures need to know about a problem's group, by `read_curves`."""
    advantages, clear = [], []
    for curve in read_curves(row, chosen, count):
        advantages.append(curve.advantages)
        smallest = np.maximum(truth.CLEAR, 2 * curve.errors)
        clear.append(np.abs(curve.advantages) > smallest)
    steps = [read_steps(row["problem"], pieces) for pieces in row["pieces"]]
    return Truth(advantages, clear, row["correct"], steps)


def rms(values: Any) -> float:
    return float(np.sqrt(np.square(values).mean()))


def soundness(rows: list[Row], count: int) -> dict[str, float]:
    """Checks of the truth against itself and against independent responses."""
    closing, against_new = [], []  # of each rollout
    repeated = []  # of each token
    for row in rows:
        won, tried = row["prompt"]
        new = won / tried
        error_of_new = np.sqrt(new * (1 - new) / tried)
        for curve, reward in zip(read_curves(row, [0, 1], count), row["correct"], strict=True):
            total = curve.advantages.sum()
            error = np.hypot(curve.value_errors[0], error_of_new)
            closing.append(total - (reward - curve.values[0]))
            against_new.append((total - (reward - new)) / error)

        first = read_curves(row, [0], count)
        second = read_curves(row, [1], count)
        for once, again, others in zip(first, second, row["others"], strict=True):
            uncertain = np.array(others) > 0
            change = once.advantages - again.advantages
            error = np.hypot(once.errors, again.errors)
            repeated.extend(change[uncertain] / error[uncertain])
    return {
        "advantages of a rollout − (reward − V(prompt)), largest": float(np.abs(closing).max()),
        "the same with V(prompt) from new responses, mean z": float(np.mean(against_new)),
        "rms z": rms(against_new),
        "share within 2 standard errors": float((np.abs(against_new) < 2).mean()),
        "an advantage measured twice, rms z": rms(repeated),
    }


def example(rows: list[Row], truths: list[Truth], credits: dict[str, list[Credit]]) -> Row:
    """The wrong rollout, of a group with right ones, with the largest range of true advantages."""
    candidates = []
    for p, true in enumerate(truths):
        for g, correct in enumerate(true.correct):
            if any(true.correct) and not correct:
                candidates.append((np.ptp(true.advantages[g]), p, g))
    _, p, g = max(candidates)
    shown = {"truth": np.round(truths[p].advantages[g], 4).tolist()}
    for name, credit in credits.items():
        shown[name] = np.round(credit[p][g], 4).tolist()
    return {"problem": rows[p]["problem"], "pieces": rows[p]["pieces"][g], "credit": shown}


def as_lists(tensors: Signals, mask: Tensor) -> dict[str, list[Credit]]:
    """Values of each problem's rollouts without padding."""
    lists = {name: [] for name in tensors}
    for name, values in tensors.items():
        for group, is_token in zip(values.double().cpu(), mask.cpu(), strict=True):
            rows = group[is_token].split(is_token.sum(-1).tolist())
            lists[name].append([row.numpy() for row in rows])
    return lists


def step_sums(steps: Tensor, true: Truth) -> Credit:
    """VinePPO's credit with true values: each token gets the sum over its step. steps: [G, T]."""
    credit = []
    for row, advantages in zip(steps.cpu().numpy(), true.advantages, strict=True):
        of_tokens = row[: len(advantages)]
        credit.append(np.bincount(of_tokens, advantages)[of_tokens])
    return credit


def summarise(
    rows: list[Row],
    groups: list[common.Group],
    steps: Tensor,
    values: Tensor,
    policy: nn.Module,
    args: vineppo.Args,
    count: int,
) -> dict[str, Any]:
    """All results for one policy. steps, values: VinePPO's. count: continuations per estimate."""
    rollouts = common.stack(groups, [], common.device(args))
    mask = rollouts.mask
    given, signals = method_credits(policy, rollouts, steps, values, args)
    credits = as_lists(given, mask)
    truths = [read_truth(row, [0, 1], count) for row in rows]
    first = [read_truth(row, [0], count).advantages for row in rows]
    second = [read_truth(row, [1], count) for row in rows]
    credits["VinePPO, true values"] = list(map(step_sums, steps, truths))
    baseline = credits["GRPO"]
    methods = {}
    for name, credit in credits.items():
        methods[name] = estimates(truth.MEASURES, credit, truths, baseline)
    methods["truth, measured again"] = estimates(truth.MEASURES, first, second, baseline)

    sizes = []  # a signal has no sign: it is compared with the size of the true advantage
    for true in truths:
        sizes.append(replace(true, advantages=list(map(np.abs, true.advantages))))
    of_signals = {}
    for name, signal in as_lists(signals, mask).items():
        of_signals[name] = estimates(truth.SIGNAL_MEASURES, signal, sizes, signal)
    return {
        "facts": truth.facts(truths),
        "soundness": soundness(rows, count),
        "methods": methods,
        "signals": of_signals,
        "example": example(rows, truths, credits),
    }


def interval(figure: dict[str, Any] | None) -> str:
    """A value and its interval, without brackets if it is the value; bold if unlike GRPO's."""
    if figure is None:
        return "–"
    value = f"{figure['value']:.2f}"
    low, high = (f"{end:.2f}" for end in figure["interval"])
    shown = f"**{value}**" if figure["differs"] else value
    return shown if low == value == high else f"{shown} [{low}, {high}]"


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def methods_table(methods: dict[str, dict[str, Any]]) -> str:
    """The measures of each method. Methods with equal cells share a row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for method, figures_of_method in methods.items():
        cells = tuple(map(interval, figures_of_method.values()))
        names.setdefault(cells, []).append(method)
    rows = [[", ".join(names[cells]), *cells] for cells in names]
    return markdown(["credit", *truth.MEASURES], rows)


def tables(results: dict[str, Any]) -> str:
    """All tables of the page."""
    policies = results["policies"]
    parts = [f"`{results['command']}`, {results['machine']}, vLLM {results['versions']['vllm']}."]
    for name, policy in policies.items():
        parts += [f"The {name} policy:", methods_table(policy["methods"])]

    for part, title in (("facts", "the rollouts"), ("soundness", "the truth")):
        rows = []
        for name in policies["starting"][part]:
            cells = [number(policy[part][name]) for policy in policies.values()]
            rows.append([name, *cells])
        parts.append(markdown([title, *policies], rows))

    head = ["signal, against the size of the true advantage"]
    for name in policies:
        head += [f"{measure}, {name}" for measure in truth.SIGNAL_MEASURES]
    rows = []
    for signal in policies["starting"]["signals"]:
        rows.append([signal])
        for policy in policies.values():
            rows[-1] += map(interval, policy["signals"][signal].values())
    parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def train(args: Args) -> Path:
    """The adapters of the half-trained policy. Trains the policy if it does not exist yet."""
    folder = args.run_dir.resolve() / "policy"
    flags = f"--lora-rank {LORA_RANK} --lr {LR} --max-new-tokens {MAX_NEW_TOKENS}"
    flags += f" --steps {TRAIN_STEPS} --seed {SEED} --eval-every 0 --save-every 0"
    command = shared.run_command("grpo.py", flags.split(), folder)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return folder / "checkpoints" / f"step-{TRAIN_STEPS:06d}"


def measure_policies(args: Args) -> dict[str, Any]:
    """The summary of each policy."""
    settings = vineppo.Args(
        model=str(ROOT / "tiny"),
        eval_dataset=str(ROOT / "tiny" / "test.jsonl"),
        lora_rank=LORA_RANK,
        group_size=args.group_size,
        max_new_tokens=MAX_NEW_TOKENS,
        prompts_per_step=512 // args.group_size,  # vLLM runs 512 sequences at once
        lr=LR,
        seed=SEED,
    )

    count = args.continuations
    summaries = {}
    with common.Grader() as grader:
        tokenizer = common.load_tokenizer(settings)
        policy = common.load_policy(settings)
        problems = common.load_problems(settings, "--eval-dataset", tokenizer, grader)
        problems = problems[: args.prompts]
        engine = common.make_engine(settings, policy, tokenizer, problems)
        for name in POLICIES:
            if name == "half-trained":
                load_weights(policy, train(args))

            engine.sync(policy)
            groups, rows = [], []
            for i, problem in enumerate(problems):
                group, row = truth.measure(
                    engine, grader, policy, problem, settings, count, (SEED, name, i)
                )
                groups.append(group)
                rows.append(row)
                print(f"{name}: {i + 1} of {len(problems)}", flush=True)

            write_json(args.run_dir / f"{name}.json", rows)

            given = engine, grader, groups, settings
            steps, values, _ = vineppo.estimate_values(*given, (SEED, name))
            summaries[name] = summarise(rows, groups, steps, values, policy, settings, count)
    return summaries


def code() -> str:
    """Digest of the code that the results depend on."""
    names = "arca ep_grpo erpo fipo forking grpo gtpo holderpo lambda_grpo stare vineppo"
    scripts = [f"{name}.py" for name in names.split()]
    return shared.code_digest(
        *scripts, "benchmark/credit.py", "benchmark/truth.py", *shared.TRAINING
    )


def main(args: Args) -> None:
    path = RESULTS / "credit.json"  # the source of the tables and of the figure
    if args.write:
        results = read_json(path)
        shared.write_page(PAGE, {"credit": tables(results)})
        figures.draw_credit(results["policies"]["half-trained"]["example"])
        return
    shared.require_at_least(args, prompts=2, group_size=2, continuations=2)
    policies = measure_policies(args)
    results = {"command": shared.own_command(), **shared.environment()}
    results |= {"code": code(), "policies": policies}
    write_json(path, results)
    print(tables(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
