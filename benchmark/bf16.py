"""What is left of EP-GRPO's and ERPO's signal in bfloat16, with the LM head in bfloat16 or float32.

    python benchmark/bf16.py tiny [other model folders]
    python benchmark/bf16.py --write         # puts the table into docs/metrics.md

The policy is the reference with Gaussian noise on its weights, a share of each matrix's own
deviation. vLLM rolls it out in bfloat16; policy and reference score the same tokens in bfloat16
and in float32; every other response counts as right. Means over tokens, in nats: gap, of engine
and trainer; log_ratio, of policy to reference, and the rounding of it. Then the correlation of each
method's advantages with those of float32, and of their credit: what η adds to them.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import shared
import torch
from shared import ROOT
from torch import Tensor, nn

import common
import engine
import ep_grpo
import erpo
from data import prompt_tokens

NOISE = (1e-4, 1e-3, 3e-3, 1e-2)  # as a share of each matrix's deviation
QUESTIONS = ("What is 3+4?", "What is 25-7?", "What is 6*8?", "What is 12+9-5?")
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bfloat16": lambda a, b: (a @ b).float(),
    "float32": common.product,
}
METHODS = {"ep_grpo": ep_grpo.ep_grpo_advantages, "erpo": erpo.erpo_advantages}


@torch.no_grad()
def move(policy: nn.Module, initial: dict[str, Tensor], noise: float) -> None:
    """The initial weights, with that much noise on every matrix."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.named_parameters():
        weight.copy_(initial[name])
        if weight.dim() > 1:
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)


def measure(model: str, head: str) -> list[dict[str, Any]]:
    """A row for each distance."""
    common.product = PRODUCTS[head]
    args = ep_grpo.Args(model=model, device="cpu", precision="bfloat16", engine="vllm")
    args = dataclasses.replace(args, prompts_per_step=4, group_size=8, max_new_tokens=32)
    exact = dataclasses.replace(args, precision="float32")
    tokenizer, policy = engine.load_tokenizer(args), engine.load_policy(args)
    problems = [common.Problem(q, "", prompt_tokens(tokenizer, q)) for q in QUESTIONS]
    import vllm

    make = vllm.LLM  # the engine's own overrides ask for a float32 head
    overrides = {"head_dtype": "float32" if head == "float32" else "model"}
    vllm.LLM = lambda *a, **k: make(*a, **k | {"hf_overrides": overrides})
    rollout_engine = engine.make_engine(args, policy, tokenizer, problems)
    vllm.LLM = make
    initial = {name: weight.clone() for name, weight in policy.state_dict().items()}
    rewards = (torch.arange(args.group_size) % 2).float().expand(len(problems), -1)
    rows = []
    for noise in NOISE:
        move(policy, initial, noise)
        rollout_engine.sync(policy)
        groups = common.roll_out(rollout_engine, problems, args, (1,))
        rollouts = common.stack(groups, rollout_engine.stops, torch.device("cpu"))
        live = rollouts.mask
        (logp, entropy), (true_logp, true_entropy) = scores = [
            common.score(policy, rollouts, a) for a in (args, exact)
        ]
        move(policy, initial, 0.0)
        references = [common.score(policy, rollouts, a)[0] for a in (args, exact)]
        ratio, true_ratio = (s[0] - r for s, r in zip(scores, references, strict=True))
        row = {"model": Path(model).name, "head": head, "noise": noise}
        row["gap"] = (rollouts.engine_logp - logp)[live].abs().mean().item()
        row["log_ratio"] = true_ratio[live].abs().mean().item()
        row["rounding"] = (ratio - true_ratio)[live].abs().mean().item()
        rounded = rewards, entropy, logp, references[0], live
        true = rewards, true_entropy, true_logp, references[1], live
        for name, advantages in METHODS.items():
            pairs = {name: [advantages(*of) for of in (rounded, true)]}
            pairs[f"{name}_credit"] = [
                advantages(*of) - advantages(*of, eta=0.0) for of in (rounded, true)
            ]
            for column, pair in pairs.items():
                row[column] = torch.corrcoef(torch.stack([x[live] for x in pair]))[0, 1].item()
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def table(results: dict[str, Any]) -> str:
    """A line for each model, product of the head, and distance."""
    rows = [
        [f"{x:.2g}" if isinstance(x, float) else x for k, x in row.items() if k != "noise"]
        for row in results["rows"]
    ]
    head = ["model", "head", "gap", "log-ratio", "its rounding"]
    head += [f"{name}{part}" for name in ("EP-GRPO", "ERPO") for part in (", whole", ", credit")]
    said = f"`{results['command']}`, {results['machine']}, vLLM {results['vllm']} for the CPU."
    return f"{shared.markdown(head, rows, words=2)}\n\n{said}"


def main(models: list[str]) -> None:
    file = shared.RESULTS / "bf16.json"
    if models == ["--write"]:
        blocks = {"bf16": table(shared.read_json(file))}
        return shared.write_page(ROOT / "docs" / "metrics.md", blocks)
    rows = [row for model in models for head in PRODUCTS for row in measure(model, head)]
    results = {
        "command": "python benchmark/bf16.py " + " ".join(Path(model).name for model in models),
        "machine": platform.machine(),
        "vllm": version(packages_distributions()["vllm"][0]),
        "torch": torch.__version__,
        "rows": rows,
    }
    shared.write_json(file, results)
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:] or ["tiny"])
