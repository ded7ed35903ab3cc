"""The policy, its frozen reference, and the two engines that roll it out."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from settings import RunArgs, device, first_line, precision, refuse, seed_for

# ------------------------------------------------------------------------------- the policy


def load_tokenizer(args: Any) -> Any:
    """The tokenizer of --model. What cannot be trained is refused here, before its weights load."""
    from transformers import AutoConfig, AutoTokenizer

    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model, **trust)
        tokenizer = AutoTokenizer.from_pretrained(args.model, **trust)
    except (OSError, ValueError) as error:
        refuse("--model", args.model, f"cannot be loaded: {first_line(error)}")
    vocabulary = config.get_text_config().vocab_size
    if getattr(args, "candidates", 0) > vocabulary:  # of reft.py
        refuse("--candidates", args.candidates, f"the model knows {vocabulary} tokens")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config.get_text_config(), name, None) not in (None, 1):
            refuse("--model", args.model, f"changes its logits by {name}, which is not supported")
    return tokenizer


def load_policy(args: Any) -> nn.Module:
    """The policy: float32 master weights, or LoRA adapters where --lora-rank asks for them."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = precision(args) if args.lora_rank else torch.float32
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=dtype, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        refuse("--model", args.model, f"cannot be loaded: {first_line(error)}")
    if getattr(policy.get_output_embeddings(), "bias", None) is not None:
        refuse("--model", args.model, "its LM head has a bias, which is not supported")
    policy.to(device(args))
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # a temperature without sampling, say: it can be loaded but not be saved
        policy.generation_config.do_sample = True
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed_for(args.seed, "lora"))
        policy = get_peft_model(
            policy,
            LoraConfig(
                r=args.lora_rank,
                lora_alpha=args.lora_alpha or 2 * args.lora_rank,
                lora_dropout=args.lora_dropout,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    return policy


def is_lora(policy: nn.Module) -> bool:
    return hasattr(policy, "disable_adapter")


def base_model(policy: nn.Module) -> nn.Module:
    """The transformers model: what peft wraps, or the policy itself."""
    return policy.get_base_model() if is_lora(policy) else policy


@torch.no_grad()
def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its transformers name, LoRA added in; the policy is left as it is."""
    model = base_model(policy)
    for name, weight in model.state_dict().items():
        module, is_adapted, leaf = name.rpartition(".base_layer.")
        if is_adapted and leaf == "weight":
            delta = model.get_submodule(module).get_delta_weight("default")
            weight = weight + delta.to(weight.dtype)
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), weight


def load_weights(policy: nn.Module, folder: Path) -> None:
    """Load what `policy.save_pretrained(folder)` wrote, bit for bit."""
    if is_lora(policy):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
    else:  # through transformers, which may store weights under other names
        saved = type(policy).from_pretrained(folder, dtype=policy.dtype)
        policy.load_state_dict(saved.state_dict())


def eos_ids(policy: nn.Module, tokenizer: Any) -> list[int]:
    """Every token id that ends a response: the generation config's and the tokenizer's."""
    ids = base_model(policy).generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


class Reference:
    """The frozen initial policy, as a context: the same model with its adapter off under LoRA,
    a frozen copy of it otherwise."""

    def __init__(self, policy: nn.Module, args: RunArgs) -> None:
        self.policy = policy
        if is_lora(policy):
            return
        memo = {}  # what deepcopy takes for copied already
        if precision(args) is torch.bfloat16:
            # Autocast rounds the weights of linear layers to bfloat16 in either model, so a copy in
            # bfloat16 gives the same values in half the memory. All else stays float32.
            embedding = base_model(policy).get_input_embeddings().weight
            layers = [m.weight for m in policy.modules() if isinstance(m, nn.Linear)]
            layers = [w for w in layers if w is not embedding]
            memo = {id(w): nn.Parameter(w.bfloat16(), requires_grad=False) for w in layers}
        self.copy = copy.deepcopy(policy, memo).requires_grad_(False)

    def __enter__(self) -> nn.Module:
        if not is_lora(self.policy):
            return self.copy
        self.adapter_off = self.policy.disable_adapter()
        self.adapter_off.__enter__()
        return self.policy

    def __exit__(self, *error: Any) -> None:
        if is_lora(self.policy):
            self.adapter_off.__exit__(*error)


def is_recurrent(model: nn.Module) -> bool:
    """Whether some layers have a state instead of keys and values, which rows cannot share."""
    return getattr(base_model(model), "_is_stateful", False)


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
    cache.batch_select_indices(which)
    return cache, real[which]


def autocast(args: RunArgs) -> Any:
    """bfloat16 where the forward pass is bfloat16, nothing otherwise."""
    on = precision(args) is torch.bfloat16
    return torch.autocast(device(args).type, torch.bfloat16) if on else contextlib.nullcontext()


# ------------------------------------------------------------------------------- the engines


class VLLM:
    """vLLM in this process, so that weights pass by reference."""

    def __init__(self, args: RunArgs, policy: nn.Module, tokenizer: Any, context: int) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if device(args).type == "cpu":  # vLLM would compile with g++, which not every machine has
            torch._dynamo.config.disable = True
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        from vllm import LLM

        self.tokenizer = tokenizer
        self.stops = eos_ids(policy, tokenizer)
        self.vocabulary = base_model(policy).config.get_text_config().vocab_size
        self.sleeps = device(args).type == "cuda"
        on_cuda = {"gpu_memory_utilization": args.gpu_memory, "enable_sleep_mode": True}
        # vLLM's CPU build fails on a seeded request whose prompt is cut into chunks.
        on_cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 8192)}
        self.llm = LLM(
            args.model,
            dtype=str(precision(args)).removeprefix("torch."),
            max_model_len=context,
            max_num_seqs=min(args.prompts_per_step * args.group_size, 512),
            logprobs_mode="processed_logprobs",  # those of the distribution that was sampled
            max_logprobs=-1,  # no limit: top_tokens asks for many
            generation_config="vllm",  # no top-p or top-k from the model's folder
            enforce_eager=not self.sleeps,
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            trust_remote_code=args.trust_remote_code,
            seed=args.seed,
            **(on_cuda if self.sleeps else on_cpu),
        )

    def sync(self, policy: nn.Module) -> None:
        """Load the policy's weights. A tied LM head comes along: the state dict names it."""
        if self.sleeps:
            self.llm.wake_up()
        weights = iter(merged_weights(policy))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: list[list[int]], seeds: list[int], length: int, temperature: float
    ) -> list[tuple[list[int], list[float]]]:
        """For each prompt the response's token ids and their log-probabilities."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(
                    max_tokens=length,
                    temperature=temperature,
                    seed=seed,
                    stop_token_ids=self.stops,
                    logprobs=0,
                    detokenize=False,
                )
                for seed in seeds
            ],
            use_tqdm=False,
        )
        responses = [output.outputs[0] for output in outputs]
        return [
            (
                list(r.token_ids),
                [at[i].logprob for at, i in zip(r.logprobs, r.token_ids, strict=True)],
            )
            for r in responses
        ]

    def top_tokens(
        self, prompts: list[list[int]], count: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The likeliest first tokens after each prompt, in descending order, and their
        log-probabilities: two [P, count]. The prompts stay in the prefix cache."""
        from vllm import SamplingParams

        count = min(count, self.vocabulary)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(max_tokens=1, temperature=temperature, logprobs=count, detokenize=False),
            use_tqdm=False,
        )
        # The sampled token comes as well, even where it is not among the likeliest.
        ranked = [
            sorted((-token.logprob, i) for i, token in output.outputs[0].logprobs[0].items())
            for output in outputs
        ]
        likeliest = [row[:count] for row in ranked]
        tokens = torch.tensor([[i for _, i in row] for row in likeliest])
        return tokens, -torch.tensor([[value for value, _ in row] for row in likeliest])

    def sleep(self) -> None:
        """Give the GPU's memory to the update."""
        if self.sleeps:
            self.llm.sleep(level=1)

    def decode(self, responses: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)


class Transformers:
    """The policy's own `generate`: slower than vLLM, nothing to install, nothing to sync."""

    def __init__(self, args: RunArgs, policy: nn.Module, tokenizer: Any, context: int) -> None:
        self.tokenizer = tokenizer
        self.stops = eos_ids(policy, tokenizer)
        self.vocabulary = base_model(policy).config.get_text_config().vocab_size
        self.args = args
        self.policy = policy

    def sync(self, policy: nn.Module) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], seeds: list[int], length: int, temperature: float
    ) -> list[tuple[list[int], list[float]]]:
        """As VLLM.generate. Each response draws from its own random numbers, one a token: it is
        the first token whose cumulative probability exceeds that number."""
        from transformers import GenerationConfig

        model = base_model(self.policy.eval())
        width = max(2, *map(len, prompts))
        padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        # Prompts but for their last token: the distinct ones, in order, and which each row has.
        starts: dict[tuple[int, ...], int] = {}
        which = [starts.setdefault(tuple(p[:-1]), len(starts)) for p in prompts]
        which = torch.tensor(which, device=model.device)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.stack([torch.rand(length, generator=draw) for draw in draws], dim=-1)
        uniform = uniform.to(model.device)[..., None]  # [T, n, 1]
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
                cache = None if is_recurrent(model) else prompt_cache(model, list(starts), which)[0]
                sequences = model.generate(
                    input_ids=padded,
                    attention_mask=real.to(model.device),
                    past_key_values=cache,
                    logits_processor=[choose],
                    generation_config=GenerationConfig(
                        max_new_tokens=length, eos_token_id=self.stops or None, pad_token_id=0
                    ),
                )
        finally:
            model.generation_config = defaults
        logps = torch.cat(steps, dim=-1).tolist()
        responses = []
        for row, logp in zip(sequences[:, width:].tolist(), logps, strict=True):
            end = next((t + 1 for t, token in enumerate(row) if token in self.stops), len(row))
            responses.append((row[:end], logp[:end]))
        return responses

    @torch.no_grad()
    def top_tokens(
        self, prompts: list[list[int]], count: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """As VLLM.top_tokens."""
        model = base_model(self.policy.eval())
        rows = [torch.tensor(prompt, device=model.device) for prompt in prompts]
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        with autocast(self.args):  # padding is on the right, where no real token sees it
            states = model.base_model(input_ids=pad_sequence(rows, batch_first=True))[0]
            logits = model.get_output_embeddings()(states[range(len(rows)), last])
        logp = (logits.float() / temperature).log_softmax(-1)
        top = logp.topk(min(count, self.vocabulary))
        return top.indices.cpu(), top.values.cpu()

    def sleep(self) -> None:
        pass

    def decode(self, responses: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)


Engine = VLLM | Transformers


def make_engine(args: RunArgs, policy: nn.Module, tokenizer: Any, *sets: list[Any]) -> Engine:
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
    installed = importlib.util.find_spec("vllm") is not None
    use_vllm = args.engine == "vllm" or (args.engine == "auto" and installed)
    return (VLLM if use_vllm else Transformers)(args, policy, tokenizer, context)
