"""Compute which model fits on which GPU, and on how many, from the models' shapes.

    python docs/memory.py            # print the tables of docs/memory.md and docs/scale.md
    python docs/memory.py --write    # write them into these pages

Activation memory per token is the difference between two layers and one layer of the real width,
run on fake tensors, which have shapes but no memory. Needs no GPU.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen2Config

PAGE = Path(__file__).with_suffix(".md")
SCALE_PAGE = PAGE.with_name("scale.md")
MEASURED = PAGE.parents[1] / "benchmark" / "results" / "gpu.json"
GPUS = (24, 48, 80, 141)  # GB
TOKEN_BUDGETS = (8192, 4096, 2048)  # --token-budget: the default and smaller values
GPU_MEMORY = 0.3  # --gpu-memory's default: the share of GPU memory for vLLM
LORA_RANK = 32
CONTEXT = 2048  # tokens of a prompt and its response
SEQUENCES = 32  # minimum that vLLM should hold at once
ENGINE = 1.5e9  # vLLM's workspace, without weights and cache
LOGITS = 3 * 2**28  # a tile of logits, their log-softmax and its exponential
RESERVED = 2.5e9  # CUDA's context, vLLM's CUDA graphs, fragments
KINDS = {
    "full": "Full fine-tuning",
    "reference": "Full fine-tuning with a reference model",
    "lora": f"LoRA of rank {LORA_RANK}, with or without a reference model",
}


@dataclass(frozen=True)
class Model:
    """A shape of Qwen2.5, with the names of its configuration. Derived sizes are in bytes."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 152064
    tie_word_embeddings: bool = False

    def build(self, lora: bool, **changes: int) -> nn.Module:
        """The policy as a run loads it, on the meta device."""
        config = Qwen2Config(**asdict(self) | changes)
        dtype = torch.bfloat16 if lora else torch.float32
        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(config, dtype=dtype)
            adapters = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            return get_peft_model(policy, adapters) if lora else policy

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(weight.numel() for weight in self.build(lora=False).parameters())

    @cached_property
    def adapters(self) -> int:
        """Number of parameters of LoRA adapters on every linear module of the layers."""
        weights = self.build(lora=True).parameters()
        return sum(weight.numel() for weight in weights if weight.requires_grad)

    @cached_property
    def reference(self) -> int:
        """Bytes of a frozen copy: linear modules in bfloat16, others and tied heads in float32."""
        copy = self.build(lora=False)
        linear = {module.weight for module in copy.modules() if isinstance(module, nn.Linear)}
        linear.discard(copy.get_input_embeddings().weight)
        return sum(w.numel() * (2 if w in linear else 4) for w in copy.parameters())

    @property
    def engine(self) -> float:
        """Minimum for vLLM: bfloat16 weights, a key-value cache and workspace."""
        width = self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        keys_and_values = 2 * 2 * self.num_hidden_layers * width * CONTEXT * SEQUENCES
        return 2 * self.parameters + keys_and_values + ENGINE


MODELS = (
    Model("0.5B", 896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True),
    Model("1.5B", 1536, 28, 12, 2, 8960, 151936, tie_word_embeddings=True),
    Model("3B", 2048, 36, 16, 2, 11008, 151936, tie_word_embeddings=True),
    Model("7B", 3584, 28, 28, 4, 18944),
    Model("14B", 5120, 48, 40, 8, 13824),
)
LARGE = (
    *MODELS[3:],
    Model("32B", 5120, 64, 40, 8, 27648),
    Model("72B", 8192, 80, 64, 8, 29568),
)


def kept_bytes(model: Model, layers: int, lora: bool, tokens: int) -> int:
    """Bytes that autograd saves for the backward pass of the layers under bf16 autocast."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    policy = model.build(lora, num_hidden_layers=layers)
    body = (policy.get_base_model() if lora else policy).model
    with FakeTensorMode(), torch.device("cpu"):
        state = {
            name: torch.empty(value.shape, dtype=value.dtype).requires_grad_(value.requires_grad)
            for name, value in [*body.named_parameters(), *body.named_buffers()]
        }
        inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": False}
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            torch.func.functional_call(body, state, kwargs=inputs)
    own = {value.untyped_storage()._cdata for value in state.values()}
    return sum(size for storage, size in kept.items() if storage not in own)


@cache
def activations(model: Model, lora: bool) -> tuple[int, int]:
    """Saved bytes of one layer: per token, and for the bf16 copies of weights by autocast."""
    few, many = (
        kept_bytes(model, 2, lora, tokens) - kept_bytes(model, 1, lora, tokens)
        for tokens in (64, 128)
    )
    of_token = (many - few) // 64
    return of_token, few - 64 * of_token


@dataclass(frozen=True)
class Settings:
    """The settings that determine memory. From the third on, cheapest to change first."""

    model: Model
    kind: str = "full"
    token_budget: int = TOKEN_BUDGETS[0]
    checkpointing: bool = False

    @property
    def trained(self) -> int:
        return self.model.adapters if self.kind == "lora" else self.model.parameters

    @property
    def saved(self) -> tuple[int, int]:
        """Bytes on disk: of a checkpoint (trained weights and moments), and of model/."""
        weight = 2 if self.kind == "lora" else 4
        return 12 * self.trained, weight * self.model.parameters

    @property
    def resident(self) -> int:
        """Bytes constantly on the GPU: weights, optimiser state, reference."""
        # LoRA's reference is the policy with its adapters off.
        frozen = {"full": 0, "reference": self.model.reference, "lora": 2 * self.model.parameters}
        return self.saved[0] + frozen[self.kind]

    @property
    def update(self) -> float:
        """Peak of the update, vLLM asleep: resident, gradients, activations, a tile of logits."""
        depth, width = self.model.num_hidden_layers, self.model.hidden_size
        # The head's gradient of a micro-batch, before it is accumulated.
        head = 4 * self.model.vocab_size * width * (self.kind != "lora")
        of_token, of_weights = activations(self.model, self.kind == "lora")
        layers = of_token * depth
        if self.checkpointing:  # every layer's input, and one layer that is recomputed
            layers = 4 * width * depth + of_token
        kept = layers * self.token_budget + of_weights * depth + head
        return self.resident + 4 * self.trained + kept + LOGITS + RESERVED

    @property
    def rollout(self) -> float:
        """Peak of the rollouts: resident, and the minimum for vLLM."""
        return self.resident + self.model.engine + RESERVED

    def flags(self, gpu: int) -> str:
        """The flags for a GPU of so many GB. vLLM's share is the default, but at least the minimum
        that it needs and at most the memory that is free."""
        needed = math.ceil(self.model.engine / gpu / 1e7) / 100
        free = math.floor(100 - (self.resident + RESERVED) / gpu / 1e7) / 100
        share = min(max(GPU_MEMORY, needed), free)
        words = ["--gradient-checkpointing"] * self.checkpointing
        words += [f"--gpu-memory {share:g}"] * (share != GPU_MEMORY)
        words += [f"--token-budget {self.token_budget}"] * (self.token_budget != TOKEN_BUDGETS[0])
        return f"`{' '.join(words)}`" if words else "as it is"


def gentlest(model: Model, kind: str, gpu: int) -> Settings | None:
    """The first settings that fit, from cheap to costly; None if none do."""
    for checkpointing, budget in product((False, True), TOKEN_BUDGETS):
        settings = Settings(model, kind, budget, checkpointing)
        if max(settings.update, settings.rollout) <= gpu * 1e9:
            return settings
    return None


def tables() -> str:
    """One table per kind. gpu.json holds measured GiB after the engine's start, with the engine
    asleep, and at a step's peak: {"memory": {kind: {model: [start, asleep, peak]}}}. The tables
    have a column of them if there are any."""
    measured = json.loads(MEASURED.read_text())["memory"] if MEASURED.exists() else {}
    head = ["model", "rollout, GB", "update, GB", *(f"{gpu} GB" for gpu in GPUS)]
    head.append("checkpoint + `model/`, GB")
    if measured:
        head.append("measured: start, asleep, peak, GB")

    parts = []
    for kind, title in KINDS.items():
        rows = [head]
        for model in MODELS:
            plain = Settings(model, kind)
            fits = [(gentlest(model, kind, gpu), gpu) for gpu in GPUS]
            row = [model.name, f"{plain.rollout / 1e9:.0f}", f"{plain.update / 1e9:.0f}"]
            row += [settings.flags(gpu) if settings else "no" for settings, gpu in fits]
            row.append(" + ".join(f"{size / 1e9:.1f}" for size in plain.saved))
            if measured:
                found = measured.get(kind, {}).get(model.name, [])
                row.append(", ".join(f"{2**30 * size / 1e9:.0f}" for size in found))
            rows.append(row)

        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * len(head) + "|")
        parts += [f"**{title}**", "\n".join(lines)]
    return "\n\n".join(parts)


# Nodes of 8 H100 SXM with 80 GB each, from NVIDIA's data sheets: dense bfloat16 FLOP/s, memory
# bandwidth in bytes/s, and NVLink's and the network's in bytes/s, GPU and direction.
FLOPS, HBM, NVLINK, NETWORK = 989e12, 3.35e12, 450e9, 50e9
SHARE = 0.4  # of each of these, what a step reaches: an assumption
NODE, GPU_BYTES = 8, 80e9
TOTALS = (4, 8, 16, 32, 64)  # GPUs
PROMPT = 512  # tokens
PROBLEMS = 168  # --prompts-per-step: divides over 7, 14, 28 and 56 processes as well
CASES = ((8, 2048), (16, 8192))  # group size, tokens of a response


@dataclass(frozen=True)
class Cluster:
    """A training step on `train` GPUs with FSDP2 and `serve` others with vLLM.

    Full fine-tuning with a reference and gradient checkpointing. Every response has `response`
    tokens. Sizes are in bytes, times in seconds.
    """

    model: Model
    group_size: int
    response: int
    train: int
    serve: int
    tensor_parallel: int

    @property
    def rollouts(self) -> int:
        """Rollouts per step."""
        return PROBLEMS * self.group_size

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rollouts * (PROMPT + self.response)

    @property
    def layer(self) -> float:
        """Number of parameters of a layer."""
        outside = self.model.vocab_size * self.model.hidden_size * 2
        return (self.model.parameters - outside) / self.model.num_hidden_layers

    def memory(self, micro_batch: int) -> float:
        """Peak of a training GPU with so many rollouts per pass."""
        model = self.model
        tokens = micro_batch * (PROMPT + self.response)
        # Weights, gradients, moments and the reference, all in float32.
        sharded = 20 * model.parameters / self.train
        # The embedding and the head in bfloat16, and the head's gradient.
        gathered = (2 + 2 + 4) * model.vocab_size * model.hidden_size
        # The layer at work and the next one in bfloat16, and a gradient.
        gathered += (2 + 2 + 2) * self.layer
        checkpoints = 4 * model.hidden_size * model.num_hidden_layers
        kept = tokens * (checkpoints + activations(model, False)[0])
        return sharded + gathered + kept + LOGITS + RESERVED

    @property
    def micro_batch(self) -> int:
        """The most rollouts per pass that fit, a divisor of the process's share; 0 if none do."""
        share = self.rollouts // self.train
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        return max((n for n in fitting if self.memory(n) <= GPU_BYTES), default=0)

    @property
    def token_cache(self) -> int:
        """Bytes of keys and values per token."""
        width = self.model.hidden_size // self.model.num_attention_heads
        keys = self.model.num_hidden_layers * self.model.num_key_value_heads * width
        return 2 * 2 * keys

    @property
    def at_once(self) -> int:
        """The most sequences of full length in the cache of one server."""
        cache = 0.9 * GPU_BYTES * self.tensor_parallel - 2 * self.model.parameters
        cache -= (ENGINE + RESERVED) * self.tensor_parallel
        return int(cache // (self.token_cache * (PROMPT + self.response)))

    @property
    def rollout(self) -> float:
        """Decoding: each token of a batch reads all weights and the cached tokens before it."""
        servers = self.serve // self.tensor_parallel
        of_server = self.rollouts / servers
        batch = min(of_server, self.at_once)
        read = 2 * self.model.parameters
        read += batch * self.token_cache * (PROMPT + self.response / 2)
        computed = 2 * self.model.parameters * batch
        a_token = max(read / HBM, computed / FLOPS) / (SHARE * self.tensor_parallel)
        return of_server / batch * self.response * a_token

    @property
    def link(self) -> float:
        """Bytes per second and training GPU."""
        return SHARE * (NVLINK if self.train + self.serve <= NODE else NETWORK)

    def computed(self, flops: float) -> float:
        """Computing with so many FLOPs per token and parameter."""
        return flops * self.model.parameters * self.tokens / self.train / (SHARE * FLOPS)

    def communicated(self, passes: float, gathers: int) -> float:
        """Gathering or reducing all weights in bfloat16, so many times per pass of each GPU."""
        return passes * gathers * 2 * self.model.parameters / self.link

    @property
    def score(self) -> float:
        """A forward pass of the policy and of the reference, while weights are gathered."""
        passes = math.ceil(self.tokens / (4 * TOKEN_BUDGETS[0]) / self.train)
        return max(self.computed(2 + 2), self.communicated(passes, gathers=2))

    @property
    def update(self) -> float:
        """Forward, the same recomputed, backward; weights gathered twice, gradients reduced."""
        passes = self.rollouts / self.train / self.micro_batch
        return max(self.computed(2 + 2 + 4), self.communicated(passes, gathers=3))

    @property
    def transfer(self) -> float:
        """Gather the float32 weights on the first process and broadcast them to the servers."""
        return 2 * 4 * self.model.parameters / self.link

    @property
    def step(self) -> float:
        """TRL's phases follow one another."""
        return self.rollout + self.score + self.update + self.transfer


def fastest(model: Model, shape: tuple[int, int], gpus: int, servers: int) -> Cluster | None:
    """The fastest division of so many GPUs with at most so many servers; None if none fits."""
    found = []
    counts = range(1, servers + 1)
    for tensor_parallel, count, train in product((1, 2, 4, 8), counts, range(1, gpus)):
        serve = tensor_parallel * count
        cluster = Cluster(model, *shape, train, serve, tensor_parallel)
        divides = PROBLEMS * shape[0] % train == model.num_attention_heads % tensor_parallel == 0
        if not divides or train + serve > gpus:
            continue
        if cluster.at_once >= SEQUENCES and cluster.micro_batch:
            found.append(cluster)
    return min(found, key=lambda cluster: cluster.step, default=None)


def cluster_row(name: str, cluster: Cluster) -> list[str]:
    """A row of `cluster_table`."""
    update = "update: network" if cluster.update > cluster.computed(8) else "update: computing"
    phases = {"rollouts": cluster.rollout, "scoring": cluster.score, update: cluster.update}
    phases["weights"] = cluster.transfer
    slowest = max(phases, key=phases.get)
    per_gpu = cluster.rollouts * cluster.response / cluster.rollout / cluster.serve
    row = [cluster.model.name, f"{cluster.group_size} × {cluster.response:,}", name]
    servers = cluster.serve // cluster.tensor_parallel
    row.append(f"{cluster.train} + {servers} × {cluster.tensor_parallel}")
    row.append(str(cluster.micro_batch))
    row += [f"{seconds:,.0f}" for seconds in phases.values()]
    row += [f"{slowest}, {phases[slowest] / cluster.step:.0%}", f"{per_gpu:,.0f}"]
    return row


def cluster_table() -> str:
    """Per model and case: the fewest GPUs, and up to 64 with one server or with more."""
    head = ["model", "group × response", "GPUs", "training + vLLM", "`--micro-batch`"]
    head += ["rollouts, s", "scoring, s", "update, s", "weights, s", "bound by"]
    head.append("tokens/s per vLLM GPU")

    rows = [head]
    for model, case in product(LARGE, CASES):
        by_size = [fastest(model, case, gpus, servers=1) for gpus in TOTALS]
        fewest = next(filter(None, by_size))
        many = fastest(model, case, TOTALS[-1], servers=NODE)
        named = (("fewest", fewest), ("64, one server", by_size[-1]), ("64, more servers", many))
        names: dict[Cluster, str] = {}
        for name, cluster in named:
            names.setdefault(cluster, name)  # where two are equal, the first name
        rows += [cluster_row(name, cluster) for cluster, name in names.items()]

    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def filled_page(page: Path = PAGE) -> str:
    """The text of docs/memory.md or docs/scale.md with new tables between the marks."""
    results = tables() if page == PAGE else cluster_table()
    marks = r"(<!-- results:memory -->\n).*?(<!-- /results -->)"
    text = page.read_text(encoding="utf-8")
    return re.sub(marks, lambda m: f"{m[1]}{results}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in (PAGE, SCALE_PAGE):
        if "--write" in sys.argv:
            page.write_text(filled_page(page), encoding="utf-8")
    print(tables(), cluster_table(), sep="\n\n")
