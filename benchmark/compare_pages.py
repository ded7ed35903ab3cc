"""What benchmark/compare.py shows of its results: the tables of README.md and docs/compare.md."""

from __future__ import annotations

import re
import statistics

from compare import (
    GROUP,
    METHODS,
    PROMPTS,
    ROOT,
    chosen_rate,
    split_rows,
    t_interval,
    validation_accuracy,
)

CREDITS = [name for name, command in METHODS.items() if command.startswith("arca.py")]


def difference(rows: list[dict], method: str, baseline: str) -> list[float]:
    """Accuracy of a method less that of another, seed by seed."""
    of = {(row["method"], row["seed"]): row["accuracy"] for row in rows}
    seeds = sorted(seed for name, seed in of if name == method and (baseline, seed) in of)
    return [of[method, seed] - of[baseline, seed] for seed in seeds]


def signed(values: list[float]) -> str:
    """The mean of differences and its interval, with signs."""
    if len(values) < 2:
        return ""
    low, high = t_interval(values)
    return f"{statistics.mean(values):+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")


def table(results: dict) -> str:
    """One line a method: means over seeds."""
    lines = [
        "| method | learning rate | accuracy | pass@8 | entropy | length | step, ms | "
        "accuracy less GRPO's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    start = results["start"]
    shown = [f"{start['accuracy']:.3f}", f"{start['pass@8']:.3f}", "", f"{start['length']:.1f}"]
    lines.append(f"| before training | | {' | '.join(shown)} | | |")
    rows, _ = split_rows(results)
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        keys = ("accuracy", "pass@8", "entropy", "length", "step_seconds")
        mean = {key: statistics.mean(row[key] for row in mine) for key in keys}
        lr, at_end = chosen_rate(results["selection"], method, results["rates"])
        against = difference(rows, method, "GRPO") if method != "GRPO" else []
        cells = [method, lr + " †" * at_end, f"{mean['accuracy']:.3f}", f"{mean['pass@8']:.3f}"]
        cells += [f"{mean['entropy']:.3f}", f"{mean['length']:.1f}"]
        cells += [f"{1000 * mean['step_seconds']:.0f}", signed(against)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_table(results: dict) -> str:
    """Validation accuracy of each method at each learning rate; the chosen one in bold."""
    rates = results["rates"]
    lines = [f"| method | {' | '.join(rates)} |", "|---|" + "---:|" * len(rates)]
    for method in dict.fromkeys(row["method"] for row in results["selection"]):
        accuracy = validation_accuracy(results["selection"], method)
        best, _ = chosen_rate(results["selection"], method, rates)
        shown = {lr: "stopped" if a < 0 else f"{a:.3f}" for lr, a in accuracy.items()}
        shown[best] = f"**{shown[best]}**"
        lines.append(f"| {method} | {' | '.join(shown.get(lr, '') for lr in rates)} |")
    return "\n".join(lines)


def credit_table(results: dict) -> str:
    """The credits of arca.py against its own uniform credit, which has the same adapters."""
    lines = ["| credit | accuracy less that of uniform credit |", "|---|---:|"]
    for method in CREDITS:
        if method != "uniform credit":
            against = difference(split_rows(results)[0], method, "uniform credit")
            lines.append(f"| {method} | {signed(against)} |")
    return "\n".join(lines)


def other_rates_table(results: dict) -> str:
    """What was measured, with the same seeds, at learning rates that are not the chosen ones."""
    chosen, others = split_rows(results)
    lines = ["| method | learning rate | accuracy | accuracy less GRPO's |", "|---|---:|---:|---:|"]
    for method, lr in dict.fromkeys((row["method"], row["lr"]) for row in others):
        rows = [row for row in others if (row["method"], row["lr"]) == (method, lr)]
        mean = statistics.mean(row["accuracy"] for row in rows)
        baseline = [row for row in chosen if row["method"] == "GRPO"]
        against = signed(difference(baseline + rows, method, "GRPO"))
        lines.append(f"| {method} | {lr} | {mean:.3f} | {against} |")
    return "\n".join(lines)


def caption(results: dict) -> str:
    """What a reader needs to know beside the table."""
    rows, rates = split_rows(results)[0], ", ".join(results["rates"])
    budget = results["steps"] * PROMPTS * GROUP
    said = (
        f"Means over {len({row['seed'] for row in rows})} seeds; in brackets the 95% interval of "
        "the mean paired difference (Student's t over seeds). † The learning rate lies at an end "
        f"of the grid {rates}: a better one may lie beyond. Each run drew {budget} rollouts in "
        f"{results['steps']} steps"
    )
    if dapo := [row for row in rows if row["method"] == "DAPO"]:
        steps = sorted(row["step"] for row in dapo)
        said += f", DAPO {min(row['rollouts'] for row in dapo)} or more in {steps[0]}–{steps[-1]}"
    vllm = results["versions"]["vllm"]
    return f"{said}. `{results['command']}`, {results['machine']}, vLLM {vllm} for the CPU."


def filled_pages(results: dict) -> dict[str, str]:
    """README.md and docs/compare.md with the tables between their marks."""
    blocks = {
        "compare": f"{table(results)}\n\n{caption(results)}",
        "compare-choice": choice_table(results),
        "compare-credit": credit_table(results),
        "compare-others": other_rates_table(results),
    }
    filled = {}
    for page in ("README.md", "docs/compare.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, block in blocks.items():
            marks = rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)"
            text = re.sub(marks, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)
        filled[page] = text
    return filled
