"""Does vLLM hold the policy's weights? The one check of a run that looks at them, not at rollouts.

In bfloat16 the log-probabilities of a policy one update old are within rounding of the new ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infra.cli import StopRun
from infra.models import base_model, merged_weights

Columns = dict[str, Tensor]  # by vLLM's names: vectors, and the first columns of matrices


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
        equal = set()
        for name in of_engine.keys() & of_policy.keys():
            count = len(of_policy[name])
            if of_engine[name][:count].equal(of_policy[name]):
                equal.add(name)
        return equal

    def run(self, policy: nn.Module) -> None:
        """Raises StopRun if a weight that was equal after loading differs after a sync."""
        stale = self.compared - self.equal(self.engine_weights(), self.policy_weights(policy))
        if stale:
            raise StopRun(
                f"vLLM holds stale weights: after the sync {len(stale)} of {len(self.compared)} "
                f"differ from the policy's, for example {min(stale)}; try --engine transformers"
            )
