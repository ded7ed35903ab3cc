"""The rollout engine: vLLM in this process. `make_engine` chooses between it and transformers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from infra.cli import StopRun, progress_bar, report, require
from infra.data import turn_ends
from infra.models import (
    TokenIds,
    base_model,
    device,
    eos_ids,
    is_recurrent,
    merged_weights,
    named_stop_tokens,
    precision,
    precision_name,
    seed_for,
)

Response = tuple[TokenIds, list[float]]  # token ids, and their log-probabilities

# vLLM reads these when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Engine:
    """Rolls out the policy. VLLMEngine and HFEngine add sync and generate."""

    def __init__(self, args: Any, policy: nn.Module, tokenizer: Any) -> None:
        self.set_tokenizer(args, policy, tokenizer)
        self.is_large = sum(weight.numel() for weight in policy.parameters()) > 10**8  # for sleep

    def set_tokenizer(self, args: Any, policy: nn.Module, tokenizer: Any) -> None:
        """Set the tokenizer and the ids of all tokens that end a response, and print these.

        A base model's own EOS token may not be the one that its chat template writes.
        """
        ids = turn_ends(args, tokenizer)
        ids.update(eos_ids(policy, tokenizer), named_stop_tokens(args, tokenizer))
        self.tokenizer, self.stop_tokens = tokenizer, sorted(ids)
        # Decoding leaves out special tokens only; a stop token may be an ordinary added token.
        self.added_stop_tokens = ids.intersection(tokenizer.added_tokens_decoder)
        tokens = tokenizer.convert_ids_to_tokens(self.stop_tokens)
        known = [token for token in tokens if token]  # None: an id that the tokenizer lacks
        names = " or ".join(known) or f"--max-new-tokens {args.max_new_tokens} alone"
        report(f"{args.model}: a response stops at {names}")

    def decode(self, responses: list[TokenIds]) -> list[str]:
        """Texts without special tokens, and without an added token that ends the response."""
        texts = []
        for tokens in responses:
            if tokens and tokens[-1] in self.added_stop_tokens:
                tokens = tokens[:-1]
            texts.append(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return texts

    def sleep(self) -> None:
        """Give memory to the update. `sync` wakes the engine."""
        # glibc keeps freed memory unless it is asked. A small model's update soon needs it again.
        libc = ctypes.CDLL(None)
        if self.is_large and hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


# The syncs of a run after which vLLM's weights are compared. The fifth at the latest follows an
# update that changed them: a warm-up's first update has a learning rate of 0.
CHECKED_SYNCS = 5


class VLLMEngine(Engine):
    """vLLM in this process, so that weights pass by reference."""

    def __init__(self, args: Any, policy: nn.Module, tokenizer: Any, context: int) -> None:
        super().__init__(args, policy, tokenizer)
        on_cuda = device(args).type == "cuda"
        if precision(args) is torch.float32:  # otherwise Triton's attention computes in TF32
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        if not on_cuda:  # vLLM would compile with g++, which not every machine has
            torch._dynamo.config.disable = True
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        import vllm

        # If vLLM lacks a model, it runs transformers' class and patches that class so that it
        # compiles. The policy may be of this class and must not be compiled: undone below.
        policy_class = type(base_model(policy).base_model)
        original_init = policy_class.__init__

        self.sampling_params = vllm.SamplingParams
        self.on_cuda = on_cuda
        self.llm = vllm.LLM(
            args.model,
            dtype=precision_name(args),
            max_model_len=context,
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled
            hf_overrides={"head_dtype": "float32"},  # as the trainer computes its logits
            generation_config="vllm",  # no top-p or top-k from the model's folder
            enforce_eager=not on_cuda,
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            trust_remote_code=args.trust_remote_code,
            seed=seed_for(args.seed, "engine"),  # vLLM takes 32 bits
            **self.device_options(args, context),
        )
        policy_class.__init__ = original_init
        policy_class.do_not_compile = True

        [self.model] = self.llm.apply_model(lambda model: model)  # it is in this process
        self.syncs = 0

        # vLLM's Gemma 2 has no LM head, so a tied one must not be sent to it.
        in_vllm = dict(self.model.named_parameters(remove_duplicate=False))
        self.not_in_vllm = base_model(policy).all_tied_weights_keys.keys() - in_vllm.keys()

    def device_options(self, args: Any, context: int) -> dict[str, Any]:
        if self.on_cuda:
            return {
                "gpu_memory_utilization": args.gpu_memory,
                "enable_sleep_mode": True,
                "max_num_seqs": 512,
            }
        return {
            # vLLM's CPU build fails on a seeded request whose prompt is split into chunks.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(context, 8192),
            "max_num_seqs": min(args.prompts_per_step * args.group_size, 512),
        }

    def sync(self, policy: nn.Module) -> None:
        """Load the policy's weights, and a tied LM head too if vLLM has one.

        Raises StopRun if one of a run's first CHECKED_SYNCS syncs did not load them.
        """
        if self.on_cuda:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.weights(policy)})
        self.syncs += 1
        if self.syncs <= CHECKED_SYNCS:
            self.check_vectors(policy)
        if self.on_cuda:  # after the weights, because merging LoRA takes memory
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise StopRun("vLLM did not reset its prefix cache, which is that of the old weights")

    def weights(self, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, weight in merged_weights(policy):
            if name not in self.not_in_vllm:
                yield name, weight

    def check_vectors(self, policy: nn.Module) -> None:
        """Compare every vector, such as a norm's weight, that has the same name in both models.

        tools/check_model.py compares matrices too, which vLLM fuses, transposes or packs.
        """
        in_engine = dict(self.model.named_parameters())
        for name, weight in merged_weights(policy):
            if weight.dim() == 1 and name in in_engine:
                loaded = in_engine[name]
                if not loaded.equal(weight.to(loaded.device, loaded.dtype)):
                    raise StopRun(
                        f"vLLM holds stale weights: {name} differs from the policy's after a sync; "
                        "try --engine transformers"
                    )

    def generate(
        self, prompts: list[TokenIds], seeds: list[int], lengths: list[int], temperature: float
    ) -> list[Response]:
        """One response to each prompt, of at most that many tokens, sampled with its own seed."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = [
            self.sampling_params(
                seed=seed,
                max_tokens=length,
                temperature=temperature,
                logprobs=0,  # of the sampled token alone
                stop_token_ids=self.stop_tokens,
                detokenize=False,
            )
            for seed, length in zip(seeds, lengths, strict=True)
        ]

        # vLLM divides by the bar's elapsed time, which is 0 if tqdm has disabled the bar.
        bar = progress_bar if sys.stderr.isatty() else False
        responses = []
        for output in self.llm.generate(requests, sampling, use_tqdm=bar):
            tokens = list(output.outputs[0].token_ids)
            logprobs = output.outputs[0].logprobs
            logp = [at[token].logprob for at, token in zip(logprobs, tokens, strict=True)]
            responses.append((tokens, logp))
        return responses

    def sleep(self) -> None:
        if self.on_cuda:
            self.llm.sleep(level=2)  # drops the weights, because each sync writes them


def why_not_vllm(args: Any, policy: nn.Module) -> str:
    """The reason why vLLM cannot roll out this policy, or an empty text."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; see README.md"
    config = base_model(policy).config
    is_multimodal = config.get_text_config() is not config
    if is_multimodal and importlib.util.find_spec("torchvision") is None:
        return "the model is multimodal, for which vLLM needs torchvision: pip install torchvision"
    if any(name.endswith(".experts") for name, _ in policy.named_modules()):
        return "the model is a mixture of experts, whose logits differ in vLLM after a sync"
    if is_recurrent(policy):
        return "some layers keep a recurrent state, which is untested with vLLM"
    from vllm.platforms import current_platform

    of_vllm, wanted = current_platform.device_type, device(args).type
    if of_vllm != wanted:
        return f"the installed vLLM runs on {of_vllm} here, not on {wanted}"
    return ""


def make_engine(args: Any, policy: nn.Module, tokenizer: Any, *problem_sets: list[Any]) -> Engine:
    """vLLM, or transformers if vLLM cannot be used. There is room for the sets' longest prompt.

    Sets `args.engine` to the engine's name, so that the run's args.json records it.
    """
    lengths = [len(problem.prompt) for problems in problem_sets for problem in problems]
    context = max(lengths) + args.max_new_tokens

    if args.engine != "transformers":
        why_not = why_not_vllm(args, policy)
        require(args.engine == "auto" or not why_not, "--engine", args.engine, why_not)
        if not why_not:
            args.engine = "vllm"
            return VLLMEngine(args, policy, tokenizer, context)
        report(f"--engine auto: transformers is used, because {why_not}")
    args.engine = "transformers"
    from infra.hf_engine import HFEngine  # imports Engine from here

    return HFEngine(args, policy, tokenizer, context)
