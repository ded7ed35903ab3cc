"""Does vLLM hold the policy's weights after a sync? Prints what it compared, and what is stale.

    python tools/check_model.py --model Qwen/Qwen2.5-0.5B-Instruct --lora-rank 8

Loads the policy and vLLM, syncs, changes the trained weights a little, syncs again and compares.
A run itself compares only vectors, after each of its first five syncs. Log-probabilities do not
show every stale weight: in bfloat16 those of a policy one update old are within rounding error of
the new ones.
Exit code: 0 if vLLM holds the policy's weights, 1 if it does not or if a run would stop after the
change, 2 for an error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from infra.cli import StopRun, first_line
from infra.models import base_model, device, load_policy, load_tokenizer, merged_weights, precision

Columns = dict[str, Tensor]  # by vLLM's names: vectors, and the first columns of matrices
TEXTS = ("1 + 1 =", "The capital of France is", "A prime number is", "x")


@dataclass
class Args:
    model: str = "tiny"  # folder or hub name of a causal language model
    lora_rank: int = 0  # change LoRA adapters of this rank; 0: change all weights
    trust_remote_code: bool = False  # run Python code that comes with the model
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the policy and of vLLM
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    gpu_memory: float = 0.3  # vLLM's share of the GPU's memory
    seed: int = 1  # of the change and of sampling


class WeightCheck:
    """Compares vectors and first columns of matrices, bit for bit.

    vLLM stores some weights fused, transposed or in another order. Right after loading, engine and
    policy hold the same model: the names under which they are equal then must stay equal.
    """

    def __init__(self, engine_model: nn.Module, policy: nn.Module, dtype: torch.dtype) -> None:
        self.engine_model, self.dtype = engine_model, dtype
        # vLLM's name of each part of a name: "q_proj" -> "qkv_proj", "transformer" -> "model"
        self.renamed = {base_model(policy).base_model_prefix: "model"}
        for fused, parts in getattr(engine_model, "packed_modules_mapping", {}).items():
            self.renamed |= dict.fromkeys(parts, fused)
        of_policy = self.policy_weights(policy)
        equal = self.equal(self.engine_weights(), of_policy)
        # A constant column is no evidence: it would be equal whatever model it came from.
        self.compared = {name for name in equal if len(of_policy[name].unique()) > 1}
        self.skipped = sorted(of_policy.keys() - self.compared)

    def add(self, columns: Columns, name: str, weight: Tensor) -> None:
        """Add a weight's first column under vLLM's name, after the ones vLLM fuses it with."""
        name = ".".join(self.renamed.get(part, part) for part in name.split("."))
        column = weight if weight.dim() < 2 else weight[..., 0]
        column = column.flatten().to("cpu", self.dtype)
        columns[name] = torch.cat([columns[name], column]) if name in columns else column

    def policy_weights(self, policy: nn.Module) -> Columns:
        columns: Columns = {}
        for name, weight in merged_weights(policy):
            self.add(columns, name, weight)
        return columns

    def engine_weights(self) -> Columns:
        """The weights that the engine computes with."""
        columns: Columns = {}
        for path, module in self.engine_model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if name == "weight" and hasattr(module, "cpu_linear"):
                    # The CPU build multiplies by a packed copy. W · (1, 0, ...) is its column.
                    width = weight.shape[-1] if weight.numel() else module.input_size
                    unit = torch.eye(1, width, dtype=self.dtype)
                    weight = module.quant_method.apply(module, unit).T
                self.add(columns, f"{path}.{name}", weight)
        return columns

    def equal(self, of_engine: Columns, of_policy: Columns) -> set[str]:
        """The names under which both hold the same values. vLLM may pad at the end."""
        names = set()
        for name in of_engine.keys() & of_policy.keys():
            count = len(of_policy[name])
            if of_engine[name][:count].equal(of_policy[name]):
                names.add(name)
        return names

    def stale(self, policy: nn.Module) -> list[str]:
        """The names that were equal after loading and are not now."""
        equal = self.equal(self.engine_weights(), self.policy_weights(policy))
        return sorted(self.compared - equal)


@torch.no_grad()
def perturb(policy: nn.Module, seed: int) -> None:
    """Change trained weights by about 2% of their tensor's mean size, tensors of zeros by 0.02."""
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        if weight.requires_grad:
            size = weight.abs().mean().item() or 1.0
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight += 0.02 * size * noise


def main(args: Args) -> int:
    """Check the model, print the result, return the exit code."""
    settings = common.RunArgs(
        **vars(args), engine="vllm", prompts_per_step=len(TEXTS), group_size=4, max_new_tokens=32
    )
    tokenizer = load_tokenizer(settings)
    problems = [common.Problem(text, "", tokenizer.encode(text)) for text in TEXTS]
    policy = load_policy(settings)
    engine = common.make_engine(settings, policy, tokenizer, problems)
    check = WeightCheck(engine.model, policy, precision(settings))

    engine.sync(policy)
    perturb(policy, args.seed)
    try:
        engine.sync(policy)
        groups = common.roll_out(engine, problems, settings, (args.seed, "check"))
        rollouts = common.stack(groups, engine.stop_tokens, device(settings))
        common.score_rollouts(policy, None, rollouts, settings)
        gap = common.check_engine(rollouts, settings)
    except StopRun as error:  # a run's own checks: stale vectors, log-probabilities
        print(error)
        gap = {}

    stale = check.stale(policy)
    held = len(check.compared) - len(stale)
    print(f"vLLM holds the policy's values for {held} of {len(check.compared)} weights")
    print(f"stale: {', '.join(stale) or 'none'}")
    print(f"not compared, constant or stored otherwise: {', '.join(check.skipped) or 'none'}")
    for name, value in gap.items():
        print(f"{name} {value:.2g}")
    return 1 if stale or not gap else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Args, description=__doc__)))
    except (StopRun, OSError, RuntimeError, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
