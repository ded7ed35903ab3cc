"""Which model fits on which GPU: docs/memory.md, computed from the models' shapes.

    python docs/memory.py            # prints the page's table
    python docs/memory.py --write    # puts it into docs/memory.md

What autograd keeps of a token is counted, not guessed: two layers and one layer of the real width
run on fake tensors, which have shapes but no memory. Needs no GPU.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen2Config

PAGE = Path(__file__).with_suffix(".md")
GPUS = (24, 48, 80, 141)  # GB
TOKEN_BUDGET = 16384  # --token-budget's default, and the least that is worth a micro-batch
LEAST_BUDGET = 2048
LORA_RANK = 32
CONTEXT = 2048  # tokens of a prompt and its response
SEQUENCES = 32  # that vLLM should at least hold at once
LOGITS = 3 * 2**28  # a tile of logits, their log-softmax and its exponential
RESERVED = 2.5e9  # CUDA's context, vLLM's CUDA graphs, fragments


@dataclass(frozen=True)
class Model:
    """A shape of Qwen2.5."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 152064
    tied: bool = False

    def config(self, layers: int) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            tie_word_embeddings=self.tied,
        )

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of one layer's linear modules."""
        h, kv, i = self.hidden, self.kv_width, self.intermediate
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def parameters(self) -> int:
        layer = sum(a * b for a, b in self.linears) + self.hidden + 2 * self.kv_width  # biases
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (layer + 2 * self.hidden) + self.hidden

    @property
    def adapters(self) -> int:
        """Parameters of LoRA adapters on every linear module of the layers."""
        return self.layers * LORA_RANK * sum(a + b for a, b in self.linears)


MODELS = (
    Model("0.5B", 896, 24, 14, 2, 4864, 151936, tied=True),
    Model("1.5B", 1536, 28, 12, 2, 8960, 151936, tied=True),
    Model("3B", 2048, 36, 16, 2, 11008, 151936, tied=True),
    Model("7B", 3584, 28, 28, 4, 18944),
    Model("14B", 5120, 48, 40, 8, 13824),
    Model("32B", 5120, 64, 40, 8, 27648),
)


class Adapted(nn.Module):
    """A linear module with a LoRA adapter, as peft computes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, LORA_RANK, bias=False)
        self.lora_b = nn.Linear(LORA_RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x)) * 2.0


def kept_bytes(model: Model, layers: int, lora: bool, tokens: int) -> int:
    """Bytes that autograd keeps for the backward pass of the layers under bf16 autocast."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(), torch.device("cpu"):
        dtype = torch.bfloat16 if lora else torch.float32
        policy = AutoModelForCausalLM.from_config(model.config(layers), dtype=dtype)
        if lora:
            policy.requires_grad_(False)
            for layer in policy.model.layers:
                for part in (layer.self_attn, layer.mlp):
                    for name, linear in list(part.named_children()):
                        if isinstance(linear, nn.Linear):
                            setattr(part, name, Adapted(linear))
        own = {weight.untyped_storage()._cdata for weight in policy.parameters()}
        ids = torch.zeros(1, tokens, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            policy.model(input_ids=ids, use_cache=False)
    return sum(size for storage, size in kept.items() if storage not in own)


@cache
def activations(model: Model, lora: bool) -> tuple[int, int]:
    """Bytes of one layer: of each token, and of the weights' bf16 copies that autocast makes."""
    few, many = 64, 128
    of_layer = [
        kept_bytes(model, 2, lora, tokens) - kept_bytes(model, 1, lora, tokens)
        for tokens in (few, many)
    ]
    of_token = (of_layer[1] - of_layer[0]) // (many - few)
    return of_token, of_layer[0] - few * of_token


@dataclass(frozen=True)
class Settings:
    """What decides the memory, in the order in which it is worth giving up."""

    lora: bool
    reference: bool = False
    checkpointing: bool = False
    eight_bit: bool = False
    token_budget: int = TOKEN_BUDGET

    def flags(self, gpu_memory: float = 0.5) -> str:
        words = ["--gradient-checkpointing"] * self.checkpointing
        words += [f"--gpu-memory {gpu_memory}"] * (gpu_memory < 0.5)
        words += ["--adamw-8bit"] * self.eight_bit
        if self.token_budget != TOKEN_BUDGET:
            words.append(f"--token-budget {self.token_budget}")
        return "`" + " ".join(words) + "`" if words else "as it is"


def resident(model: Model, settings: Settings) -> float:
    """Bytes that stay on the GPU from step to step: weights, optimiser, reference."""
    states = 2 if settings.eight_bit else 8
    if settings.lora:  # the reference is the policy with its adapters off
        return 2 * model.parameters + (4 + states) * model.adapters
    reference = 2 * model.parameters if settings.reference else 0
    return (4 + states) * model.parameters + reference


def update_bytes(model: Model, settings: Settings) -> float:
    """Peak of the update, vLLM asleep: what stays, gradients, activations, a tile of logits."""
    trained = model.adapters if settings.lora else model.parameters
    # The head's gradient of a micro-batch, before it is added to that of those before.
    head = 4 * model.vocabulary * model.hidden * (not settings.lora)
    of_token, of_weights = activations(model, settings.lora)
    layers = of_token * model.layers
    if settings.checkpointing:  # every layer's input, and all of the one that is computed again
        layers = 4 * model.hidden * model.layers + of_token
    kept = layers * settings.token_budget + of_weights * model.layers + head
    return resident(model, settings) + 4 * trained + kept + LOGITS + RESERVED


def rollout_bytes(model: Model, settings: Settings) -> float:
    """Peak of the rollouts: what stays, vLLM's bf16 weights, the least key-value cache."""
    keys_values = 2 * 2 * model.layers * model.kv_width * CONTEXT * SEQUENCES
    return resident(model, settings) + 2 * model.parameters + keys_values + RESERVED


def peak(model: Model, settings: Settings) -> float:
    return max(update_bytes(model, settings), rollout_bytes(model, settings))


def gpu_memory(model: Model, settings: Settings, gpu: int) -> float:
    """The share of the GPU that vLLM may have beside what stays; half, the default, if it can."""
    free = gpu * 1e9 - resident(model, settings) - RESERVED
    return min(0.5, int(100 * free / (gpu * 1e9)) / 100)


def gentlest(model: Model, gpu: int, lora: bool, reference: bool) -> Settings | None:
    """The first of the settings, from costless to costly, that fits; None where none does."""
    for eight_bit in (False, True):
        for checkpointing in (False, True):
            budget = TOKEN_BUDGET
            while budget >= LEAST_BUDGET:
                tried = Settings(lora, reference, checkpointing, eight_bit, budget)
                if peak(model, tried) <= gpu * 1e9:
                    return tried
                budget //= 2
    return None


def tables() -> str:
    """One table for full fine-tuning, with and without a reference model, and one for LoRA."""
    lines = []
    for title, lora, reference in (
        ("Full fine-tuning", False, False),
        ("Full fine-tuning with a reference model", False, True),
        (f"LoRA of rank {LORA_RANK}, with or without a reference model", True, False),
    ):
        lines += ["", f"**{title}**", ""]
        sizes = " | ".join(f"{gpu} GB" for gpu in GPUS)
        lines.append(f"| model | rollout, GB | update, GB | {sizes} | measured |")
        lines.append("|---|---:|---:|" + "---|" * len(GPUS) + "---|")
        for model in MODELS:
            plain = Settings(lora, reference)
            row = [model.name, f"{rollout_bytes(model, plain) / 1e9:.0f}"]
            row.append(f"{update_bytes(model, plain) / 1e9:.0f}")
            for gpu in GPUS:
                chosen = gentlest(model, gpu, lora, reference)
                row.append(chosen.flags(gpu_memory(model, chosen, gpu)) if chosen else "no")
            lines.append(f"| {' | '.join(row)} | not measured |")
    return "\n".join(lines[1:])


def filled_page() -> str:
    """docs/memory.md with the tables between its marks."""
    marks = r"(<!-- results:memory -->\n).*?(<!-- /results -->)"
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(marks, lambda m: f"{m[1]}{tables()}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(filled_page(), encoding="utf-8")
    print(tables())
