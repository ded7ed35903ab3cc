"""The policy, its frozen reference, and the two engines that roll it out: vLLM and transformers.

Below them all: where and how exactly a model runs, seeds, and how a run says that it cannot go on.
`args` are a script's settings, which run.py describes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo
from torch import Tensor, nn

# ------------------------------------------------------------------------------- for everybody


class StopRun(Exception):
    """The run cannot go on as it is; the message says why, and which flag to change."""


def refuse(flag: str, value: Any, why: str) -> NoReturn:
    """One line that names the flag and the value, then exit code 2."""
    print(f"error: {flag} {value}: {why}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def memory_ran_out(error: BaseException) -> bool:
    words = "can't allocate memory", "out of memory", "Free memory on device", "KV cache"
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def seed_for(*parts: int | str) -> int:
    """A 32-bit seed that is a pure function of its parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def device(args: Any) -> torch.device:
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(args.device)


def precision(args: Any) -> torch.dtype:
    if args.precision == "auto":
        return torch.bfloat16 if device(args).type == "cuda" else torch.float32
    return getattr(torch, args.precision)


def autocast(args: Any) -> Any:
    """bfloat16 where the forward pass is bfloat16, nothing otherwise."""
    on = precision(args) is torch.bfloat16
    return torch.autocast(device(args).type, torch.bfloat16, enabled=on)


# ------------------------------------------------------------------------------- the policy


def load_tokenizer(args: Any) -> Any:
    """The tokenizer of --model. What cannot be trained is refused here, before its weights load."""
    from transformers import AutoConfig, AutoTokenizer

    if (Path(args.model) / "adapter_config.json").is_file():
        refuse("--model", args.model, "is a LoRA adapter: name the model that it was trained on")
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model, **trust)
        tokenizer = AutoTokenizer.from_pretrained(args.model, **trust)
    except Exception as error:  # a dozen kinds, for what is one mistake here
        refuse("--model", args.model, f"cannot be loaded: {first_line(error)}")
    if not tokenizer.encode("1"):  # transformers makes an empty one where there is none
        refuse("--model", args.model, "has no tokenizer")
    if quantised := getattr(config, "quantization_config", None):
        method = dict(quantised).get("quant_method", "unknown")
        refuse("--model", args.model, f"is quantised ({method}); training needs full weights")
    vocabulary = config.get_text_config().vocab_size
    if getattr(args, "candidates", 0) > vocabulary:  # of reft.py
        refuse("--candidates", args.candidates, f"the model knows {vocabulary} tokens")
    return tokenizer


def load_policy(args: Any) -> nn.Module:
    """The policy: float32 master weights, or LoRA adapters where --lora-rank asks for them."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # gives NaN gradients at some lengths
    load = {"dtype": precision(args) if args.lora_rank else torch.float32}
    load |= {"trust_remote_code": args.trust_remote_code, "output_loading_info": True}
    try:
        policy, found = AutoModelForCausalLM.from_pretrained(args.model, **load)
    except Exception as error:
        if memory_ran_out(error):
            raise
        refuse("--model", args.model, f"cannot be loaded: {first_line(error)}")
    if found["missing_keys"]:
        refuse("--model", args.model, f"lacks the weights {sorted(found['missing_keys'])[:3]}")
    if getattr(policy.get_output_embeddings(), "bias", None) is not None:
        refuse("--model", args.model, "its LM head has a bias, which is not supported")
    if broken := [name for name, w in policy.named_parameters() if not w.isfinite().all()]:
        refuse("--model", args.model, f"holds weights that are not finite, {broken[0]} among them")
    if getattr(policy.config.get_text_config(), "attn_logit_softcapping", None):
        policy.set_attn_implementation("eager")  # Gemma 2: the faster ones leave the cap out
    policy.to(device(args))
    weight, scale, cap = lm_head(policy)  # are they all that the model does to its logits?
    some = torch.tensor([[0, 1]], device=weight.device)
    with torch.no_grad():
        logits, own = policy.base_model(some)[0] @ weight.T, policy(some).logits
        logits = scale * (cap * (logits / cap).tanh() if cap else logits)
    if not torch.allclose(logits, own, rtol=0.1, atol=0.1 * own.abs().max().item()):
        refuse("--model", args.model, "computes its logits in a way that is not supported")
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # a temperature without sampling, say: it can be loaded but not be saved
        policy.generation_config.do_sample = True
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed_for(args.seed, "lora"))
        adapter = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha or 2 * args.lora_rank,
            lora_dropout=args.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        names = list(policy.state_dict())
        try:
            policy = get_peft_model(policy, adapter)
        except ValueError as error:
            refuse("--lora-rank", args.lora_rank, f"cannot adapt {args.model}: {first_line(error)}")
        if names != [name for name, _ in merged_weights(policy)]:
            refuse("--lora-rank", args.lora_rank, f"cannot be merged into {args.model}")
        if Path(args.model).is_dir():  # an adapter is loaded from anywhere
            adapter.base_model_name_or_path = str(Path(args.model).resolve())
    return policy


def is_lora(policy: nn.Module) -> bool:
    return hasattr(policy, "disable_adapter")


def base_model(policy: nn.Module) -> nn.Module:
    """The transformers model: what peft wraps, or the policy itself."""
    return policy.get_base_model() if is_lora(policy) else policy


def lm_head(policy: nn.Module) -> tuple[Tensor, float, float]:
    """The LM head's weight, [V, D]; what logits are multiplied by; and what they are softly kept
    below before that, 0: nothing."""
    config = base_model(policy).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", 1.0)  # Falcon-H1
    scale /= getattr(config, "logits_scaling", 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None) or 0.0  # Gemma 2
    return base_model(policy).get_output_embeddings().weight, scale, cap


def is_recurrent(policy: nn.Module) -> bool:
    """Whether layers have a state in the place of keys and values, which rows cannot share."""
    model = base_model(policy)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    states = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}
    return model._is_stateful or not states.isdisjoint(kinds)


def prompt_cache(
    model: nn.Module, prompts: list[Sequence[int]], which: Tensor
) -> tuple[Any, Tensor]:
    """Keys and values of prompts, each computed once, for n rows of which row i continues prompt
    which[i]: transformers' cache, and which of its [n, L] places are no padding (on the left)."""
    width = max(1, *map(len, prompts))
    ids = [[-1] * (width - len(p)) + list(p) for p in prompts]
    ids = torch.tensor(ids, device=which.device)
    real = ids >= 0
    places = (real.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids * real, "attention_mask": real, "position_ids": places}
    cache = base_model(model).base_model(**inputs, use_cache=True).past_key_values
    # By index_select: the gradient of x[which] adds up in another order each time.
    cache.reorder_cache(which)
    return cache, real[which]


@torch.no_grad()
def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its transformers name, LoRA added in; the policy is left as it is."""
    model = base_model(policy)
    for name, weight in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        while path.endswith(".base_layer"):  # peft wraps once for each adapted tensor of a module
            path = path.removesuffix(".base_layer")
            layer = model.get_submodule(path)
            if leaf == getattr(layer, "parameter_name", "weight"):
                # Added in float32: the sum of bfloat16 values may round a small delta away.
                weight = (weight.float() + layer.get_delta_weight("default")).to(weight.dtype)
        if ".lora_" not in name:
            yield f"{path}.{leaf}", weight


def load_weights(policy: nn.Module, folder: Path) -> None:
    """Load what `policy.save_pretrained(folder)` wrote, bit for bit."""
    if is_lora(policy):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
    else:  # through transformers, which may store weights under other names
        saved = type(policy).from_pretrained(folder, dtype=policy.dtype)
        policy.load_state_dict(saved.state_dict())


def save_model(policy: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write the policy as an ordinary model folder, LoRA added in. Raises StopRun where a load of
    that folder would not find each weight."""
    model = base_model(policy)
    weights = {name: weight.contiguous() for name, weight in merged_weights(policy)}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    load = {"device_map": "meta", "output_loading_info": True}  # names and shapes alone
    _, found = type(model).from_pretrained(folder, **load)
    if wrong := found["missing_keys"] | found["unexpected_keys"]:
        raise StopRun(f"the model would not load back: {sorted(wrong)[:3]}; checkpoints are whole")


def eos_ids(policy: nn.Module, tokenizer: Any) -> list[int]:
    """Every token id that ends a response: the generation config's and the tokenizer's."""
    ids = base_model(policy).generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


class Reference:
    """The frozen initial policy, `with reference() as frozen:`. Under LoRA it is the same model
    with its adapter off, otherwise a copy."""

    def __init__(self, policy: nn.Module, args: Any) -> None:
        self.policy, self.copy = policy, None
        if is_lora(policy):
            return
        memo: dict[int, Any] = {}  # what deepcopy takes for copied already
        if precision(args) is torch.bfloat16:
            # Autocast rounds the weights of linear layers to bfloat16 in either model, so a copy in
            # bfloat16 gives the same values in half the memory. All else stays float32.
            embedding = base_model(policy).get_input_embeddings().weight
            layers = [m.weight for m in policy.modules() if isinstance(m, nn.Linear)]
            layers = [w for w in layers if w is not embedding]
            memo = {id(w): nn.Parameter(w.bfloat16(), requires_grad=False) for w in layers}
        self.copy = copy.deepcopy(policy, memo).requires_grad_(False)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        with self.policy.disable_adapter() if self.copy is None else contextlib.nullcontext():
            yield self.policy if self.copy is None else self.copy


# ------------------------------------------------------------------------------- the engines

Response = tuple[list[int], list[float]]  # token ids, and their log-probabilities

# vLLM reads these when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Engine:
    """What rolls the policy out. VLLM and Transformers add sync, generate and top_tokens."""

    def __init__(self, policy: nn.Module, tokenizer: Any) -> None:
        self.tokenizer, self.stops = tokenizer, eos_ids(policy, tokenizer)
        self.vocabulary = base_model(policy).config.get_text_config().vocab_size

    def decode(self, responses: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)

    def sleep(self) -> None:
        """Give memory to the update. On a CPU: what was freed, which glibc keeps in pieces."""
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)


class VLLM(Engine):
    """vLLM in this process, so that weights pass by reference."""

    def __init__(self, args: Any, policy: nn.Module, tokenizer: Any, context: int) -> None:
        super().__init__(policy, tokenizer)
        on_cuda = device(args).type == "cuda"
        if precision(args) is torch.float32:  # or its attention would compute in TF32
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        if not on_cuda:  # vLLM would compile with g++, which not every machine has
            torch._dynamo.config.disable = True
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        import vllm

        body = type(base_model(policy).base_model)
        init = body.__init__
        self.sampling = vllm.SamplingParams
        self.dtype, self.sleeps = precision(args), on_cuda
        for_cuda = {"gpu_memory_utilization": args.gpu_memory, "enable_sleep_mode": True}
        # vLLM's CPU build fails on a seeded request whose prompt is cut into chunks.
        for_cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 8192)}
        self.llm = vllm.LLM(
            args.model,
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=context,
            max_num_seqs=512 if on_cuda else min(args.prompts_per_step * args.group_size, 512),
            logprobs_mode="processed_logprobs",  # those of the distribution that was sampled
            max_logprobs=-1,  # no limit: top_tokens asks for many
            hf_overrides={"head_dtype": "float32"},  # as the trainer computes its logits
            generation_config="vllm",  # no top-p or top-k from the model's folder
            enforce_eager=not on_cuda,
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            trust_remote_code=args.trust_remote_code,
            seed=args.seed,
            **(for_cuda if on_cuda else for_cpu),
        )
        # Where vLLM has no class of its own for a model it runs transformers', changed so that what
        # is made of it compiles. The policy may be of that class, and is not to be compiled.
        body.__init__, body.do_not_compile = init, True
        # Some weights vLLM stores under other names or in another order. It has just loaded those
        # of --model, as the policy has: what is equal now must be equal after every sync.
        [self.model] = self.llm.apply_model(lambda model: model)  # this process has it
        parts = getattr(self.model, "packed_modules_mapping", {})
        self.names = {part: whole for whole, names in parts.items() for part in names}
        self.names[base_model(policy).base_model_prefix] = "model"
        held, own = self.held(), {}
        for name, weight in merged_weights(policy):
            self.record(own, name, weight)
        self.compared = [name for name in self.equal(held, own) if len(own[name].unique()) > 1]
        # Where vLLM's model has no LM head (Gemma 2), a tied one must not be handed to it.
        self.unknown = base_model(policy).all_tied_weights_keys.keys() - held.keys()

    def record(self, columns: dict[str, Tensor], name: str, weight: Tensor) -> None:
        """Note a vector, or a matrix's first column, by vLLM's name for it: enough to see whether
        an engine holds the policy's weights. What vLLM fuses is put one after another."""
        name = ".".join(self.names.get(part, part) for part in name.split("."))
        column = (weight if weight.dim() < 2 else weight[..., 0]).flatten().to("cpu", self.dtype)
        columns[name] = torch.cat([columns[name], column]) if name in columns else column

    def held(self) -> dict[str, Tensor]:
        """What `record` notes of the weights that the engine computes with."""
        columns: dict[str, Tensor] = {}
        for path, module in self.model.named_modules():
            for leaf, weight in module.named_parameters(recurse=False):
                if leaf == "weight" and hasattr(module, "cpu_linear"):
                    # The CPU build computes with a packed copy, of which W · (1, 0, ...) tells.
                    width = weight.shape[-1] if weight.numel() else module.input_size
                    unit = torch.eye(1, width, dtype=self.dtype)
                    weight = module.quant_method.apply(module, unit).T
                self.record(columns, f"{path}.{leaf}", weight)
        return columns

    def equal(self, held: dict[str, Tensor], own: dict[str, Tensor]) -> set[str]:
        """The names under which both are the same, but for vLLM's padding."""
        shared = held.keys() & own.keys()
        return {name for name in shared if held[name][: len(own[name])].equal(own[name])}

    def sync(self, policy: nn.Module) -> None:
        """Load the policy's weights, and see that they are there. A tied LM head comes along: the
        state dict names it. Raises StopRun where the engine holds other weights."""
        own: dict[str, Tensor] = {}

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, weight in merged_weights(policy):
                self.record(own, name, weight)
                if name not in self.unknown:
                    yield name, weight

        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights()})
        if stale := sorted(set(self.compared) - self.equal(self.held(), own)):
            raise StopRun(
                f"vLLM holds stale weights: after the sync {len(stale)} of {len(self.compared)} "
                f"differ from the policy's, {stale[0]} among them; try --engine transformers"
            )
        if self.sleeps:  # after the weights, whose merging takes memory of its own
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: list[list[int]], seeds: list[int], lengths: list[int], temperature: float
    ) -> list[Response]:
        """A response to each prompt, of at most so many tokens, drawn with its own seed."""
        common = {"temperature": temperature, "logprobs": 0}
        common |= {"stop_token_ids": self.stops, "detokenize": False}
        pairs = zip(seeds, lengths, strict=True)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [self.sampling(seed=seed, max_tokens=length, **common) for seed, length in pairs],
            use_tqdm=False,
        )
        responses = []
        for output in outputs:
            tokens, at = output.outputs[0].token_ids, output.outputs[0].logprobs
            logp = [place[token].logprob for place, token in zip(at, tokens, strict=True)]
            responses.append((list(tokens), logp))
        return responses

    def top_tokens(
        self, prompts: list[list[int]], count: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The likeliest first tokens after each prompt, in descending order, and their
        log-probabilities: two [P, count]. The prompts stay in the prefix cache."""
        count = min(count, self.vocabulary)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            self.sampling(max_tokens=1, temperature=temperature, logprobs=count, detokenize=False),
            use_tqdm=False,
        )
        # The sampled token comes as well, even where it is not among the likeliest.
        first = [output.outputs[0].logprobs[0] for output in outputs]
        ranked = [
            sorted((-at.logprob, token) for token, at in row.items())[:count] for row in first
        ]
        ranked = torch.tensor(ranked, dtype=torch.float64)  # [P, count, 2]
        return ranked[..., 1].long(), -ranked[..., 0].float()

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # the weights are dropped: each sync writes them


class Transformers(Engine):
    """The policy's own `generate`: slower than vLLM, nothing to install, nothing to sync."""

    def __init__(self, args: Any, policy: nn.Module, tokenizer: Any, context: int) -> None:
        super().__init__(policy, tokenizer)
        self.args, self.policy = args, policy
        self.at_once = args.prompts_per_step * args.group_size

    def sync(self, policy: nn.Module) -> None:
        self.policy = policy

    def generate(
        self, prompts: list[list[int]], seeds: list[int], lengths: list[int], temperature: float
    ) -> list[Response]:
        """As VLLM.generate, as many at once as a step has rollouts."""
        rows = list(zip(prompts, seeds, lengths, strict=True))
        drawn = []
        for k in range(0, len(rows), self.at_once):
            part = zip(*rows[k : k + self.at_once], strict=True)
            drawn += self.generate_batch(*part, temperature)
        return drawn

    @torch.no_grad()
    def generate_batch(
        self, prompts: list[list[int]], seeds: list[int], lengths: list[int], temperature: float
    ) -> list[Response]:
        """Each response draws from its own random numbers, one a token: it is the first token
        whose cumulative probability exceeds that number."""
        from transformers import GenerationConfig

        model = base_model(self.policy.eval())
        width, length = max(2, *map(len, prompts)), max(lengths)
        padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        real = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        draws = [torch.rand(length, generator=torch.Generator().manual_seed(s)) for s in seeds]
        uniform = torch.stack(draws, dim=-1).to(model.device)[..., None]  # [T, n, 1]
        steps: list[Tensor] = []

        def choose(_: Tensor, logits: Tensor) -> Tensor:
            logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
            tokens = logp.argmax(-1, keepdim=True)
            if temperature:
                below = logp.exp().cumsum(-1)
                tokens = torch.searchsorted(below, uniform[len(steps)] * below[:, -1:], right=True)
                tokens = tokens.clamp(max=logp.shape[-1] - 1)  # where rounding went past the end
            steps.append(logp.gather(-1, tokens))
            return torch.zeros_like(logp).scatter_(-1, tokens, 1.0)  # the largest is taken

        # What the folder says on top-p or repetition would fill in what is not set here.
        defaults, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with autocast(self.args):
                cache = None
                if not is_recurrent(model):
                    # Each prompt once for all its responses, but for the token they start from.
                    different: dict[tuple[int, ...], int] = {}
                    which = [different.setdefault(tuple(p), len(different)) for p in prompts]
                    which = torch.tensor(which, device=model.device)
                    cache, _ = prompt_cache(model, [p[:-1] for p in different], which)
                sequences = model.generate(
                    input_ids=padded,
                    attention_mask=torch.tensor(real, device=model.device),
                    past_key_values=cache,
                    logits_processor=[choose],
                    max_new_tokens=length,
                    eos_token_id=self.stops or None,
                    pad_token_id=0,
                )
        finally:
            model.generation_config = defaults
        logps = torch.cat(steps, dim=-1).tolist()
        responses = []
        for row, logp, longest in zip(sequences[:, width:].tolist(), logps, lengths, strict=True):
            ends = (t + 1 for t, token in enumerate(row) if token in self.stops)
            end = min(next(ends, len(row)), longest)
            responses.append((row[:end], logp[:end]))
        return responses

    @torch.no_grad()
    def top_tokens(
        self, prompts: list[list[int]], count: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """As VLLM.top_tokens."""
        model = base_model(self.policy.eval())
        with autocast(self.args):
            rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
            logits = torch.cat([model(row, logits_to_keep=1).logits[:, -1] for row in rows])
        logp = (logits.float() / temperature).log_softmax(-1)
        top = logp.topk(min(count, logp.shape[-1]))
        return top.indices.cpu(), top.values.cpu()


def why_not_vllm(args: Any, policy: nn.Module) -> str:
    """Why vLLM cannot roll the policy out; empty where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; see README.md"
    if any(name.endswith(".experts") for name, _ in policy.named_modules()):
        return "the model is a mixture of experts, which vLLM computes otherwise after a sync"
    if is_recurrent(policy):
        return "some layers keep a state, not keys and values, which was not tried with vLLM"
    from vllm.platforms import current_platform

    runs_on = current_platform.device_type
    if runs_on != device(args).type:
        return f"the vLLM that is installed runs on {runs_on} here, not on {device(args).type}"
    return ""


def make_engine(args: Any, policy: nn.Module, tokenizer: Any, *sets: list[Any]) -> Engine:
    """vLLM where it is installed, transformers otherwise, for the longest prompt of the sets."""
    lengths = [len(problem.prompt) for problems in sets for problem in problems]
    context = max(lengths) + args.max_new_tokens
    limit = getattr(base_model(policy).config, "max_position_embeddings", context)
    if context > limit:
        room = max(0, limit - args.max_new_tokens)
        too_long = sum(length > room for length in lengths)
        why = (
            f"{too_long} of {len(lengths)} prompts leave less than that in the model's context of "
            f"{limit} tokens; --max-prompt-tokens {room} drops them"
        )
        refuse("--max-new-tokens", args.max_new_tokens, why)
    why_not = why_not_vllm(args, policy)
    if why_not and args.engine == "vllm":
        refuse("--engine", "vllm", why_not)
    use_vllm = args.engine != "transformers" and not why_not
    return (VLLM if use_vllm else Transformers)(args, policy, tokenizer, context)
