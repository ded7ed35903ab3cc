"""The policy: device, precision, seeds; tokenizer, weights, LoRA; saving; schedule; reference.

`args` are a script's settings (common.RunArgs).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.cli import StopRun, first_line, out_of_memory, reject, report, require

TokenIds = list[int]

# ------------------------------------------------------------------ device, precision, seeds


def device(args: Any) -> torch.device:
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(args.device)


def precision(args: Any) -> torch.dtype:
    """The dtype of the forward pass."""
    if args.precision == "auto":
        return torch.bfloat16 if device(args).type == "cuda" else torch.float32
    return getattr(torch, args.precision)


def precision_name(args: Any) -> str:
    """`precision` as --precision and vLLM write it: float32 or bfloat16."""
    return str(precision(args)).removeprefix("torch.")


def autocast(args: Any) -> torch.autocast:
    """Run the forward pass in bfloat16 if `precision` says so; a no-op in float32."""
    in_bfloat16 = precision(args) is torch.bfloat16
    return torch.autocast(device(args).type, torch.bfloat16, enabled=in_bfloat16)


def seed_for(*parts: int | str) -> int:
    """A 32-bit seed that is a hash of its parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4)
    return int.from_bytes(digest.digest())


# ------------------------------------------------------------------ loading


def load_tokenizer(args: Any, flag: str = "--model") -> Any:
    """The tokenizer of `args.model`. Rejects models that cannot be trained, before weights load."""
    from transformers import AutoConfig, AutoTokenizer

    is_adapter = (Path(args.model) / "adapter_config.json").is_file()
    why = "is a LoRA adapter: name the model that it was trained on"
    require(not is_adapter, flag, args.model, why)
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model, **trust)
        # With mistral-common, which vLLM installs, tekken.json would replace the chat template.
        tokenizer = AutoTokenizer.from_pretrained(args.model, mistral_format=False, **trust)
    except Exception as error:  # transformers raises many kinds for a wrong name or folder
        reject(flag, args.model, f"cannot be loaded: {first_line(error)}")

    # Without tokenizer files transformers returns an empty tokenizer and no error.
    require(tokenizer.encode("1"), flag, args.model, "has no tokenizer")
    named_stop_tokens(args, tokenizer)  # rejects a text that is not one token
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = dict(quantization).get("quant_method", "unknown")
        reject(flag, args.model, f"is quantised ({method}); training needs full weights")
    return tokenizer


def context_limit(args: Any) -> float:
    """The most tokens of a prompt and its response that the model can take."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", math.inf)


def load_policy(args: Any) -> nn.Module:
    """The policy on its device: float32 master weights, or LoRA adapters with --lora-rank."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients are NaN at some lengths
    policy = load_model(args, precision(args) if args.lora_rank else torch.float32)
    check_model(policy, args)
    report_multimodal(policy, args)

    policy.to(device(args))
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # for example a temperature with do_sample off: loads, but cannot be saved
        policy.generation_config.do_sample = True
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank:
        policy = add_adapters(policy, args)
    return policy


def load_model(args: Any, dtype: torch.dtype, flag: str = "--model") -> nn.Module:
    """The weights of `args.model` on the CPU. Rejects weights that are missing or not finite."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model, **trust)
        disable_dropout(config)
        model, info = AutoModelForCausalLM.from_pretrained(
            args.model, config=config, dtype=dtype, output_loading_info=True, **trust
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        reject(flag, args.model, f"cannot be loaded: {first_line(error)}")

    missing = sorted(info["missing_keys"])
    require(not missing, flag, args.model, f"lacks the weights {missing[:3]}")
    for name, weight in model.named_parameters():
        why = f"the weight {name} has values that are not finite"
        require(weight.isfinite().all(), flag, args.model, why)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # Gemma 2: the faster ones leave the cap out
    return model


def disable_dropout(config: Any) -> None:
    """Set every dropout and noise rate of a configuration, and of those nested in it, to 0.

    Otherwise the policy that is updated is not the one that sampled: the ratio is not 1.
    """
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            disable_dropout(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)


def check_model(policy: nn.Module, args: Any) -> None:
    """Reject a model whose logits `lm_head` does not reproduce."""
    from infra.lm_head import head_logits, lm_head  # which imports this module

    bias = getattr(policy.get_output_embeddings(), "bias", None)
    require(bias is None, "--model", args.model, "its LM head has a bias, which is not supported")

    with torch.no_grad():
        two_tokens = torch.tensor([[0, 1]])
        weight, scale, cap = lm_head(policy)
        ours = scale * head_logits(policy.base_model(two_tokens)[0], weight, cap)
        theirs = policy(two_tokens).logits.float()
    tolerance = 0.1 * theirs.abs().max().item()
    same = torch.allclose(ours, theirs, rtol=0.1, atol=tolerance)
    require(same, "--model", args.model, "computes its logits in a way that is not supported")


def report_multimodal(policy: nn.Module, args: Any) -> None:
    """Print which part of a multimodal folder is trained and saved."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if config.get_text_config() is config:
        return
    saved = "only its text part is loaded, trained and saved"
    if type(policy.config) is type(config):
        saved = "its text part is trained, and the whole model is saved"
    report(f"--model {args.model} is multimodal: {saved}")


def add_adapters(policy: nn.Module, args: Any) -> nn.Module:
    """The policy with LoRA adapters on every linear layer and expert, initialised from --seed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed_for(args.seed, "lora"))
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )

    names = list(policy.state_dict())
    try:
        policy = get_peft_model(policy, config)
    except ValueError as error:
        reject("--lora-rank", args.lora_rank, f"cannot adapt {args.model}: {first_line(error)}")

    merged_names = [name for name, _ in merged_weights(policy)]
    why = f"cannot be merged into {args.model}"
    require(names == merged_names, "--lora-rank", args.lora_rank, why)
    freeze_routers(policy)

    if Path(args.model).is_dir():  # so that the adapter can be loaded from any working directory
        config.base_model_name_or_path = str(Path(args.model).resolve())
    return policy


def freeze_routers(policy: nn.Module) -> None:
    """Freeze the adapters of mixture-of-experts routers, at 0. Routers themselves stay as they are.

    peft adapts some routers under "all-linear", and its exclude_modules does not prevent that.
    """
    for name, weight in policy.named_parameters():
        if "lora_" in name and {"gate", "router"} & set(name.split(".")):
            weight.requires_grad_(False)


# ------------------------------------------------------------------ properties


def is_lora(policy: nn.Module) -> bool:
    return hasattr(policy, "disable_adapter")


def base_model(policy: nn.Module) -> nn.Module:
    """The transformers model: the policy, or the model inside the LoRA wrapper."""
    return policy.get_base_model() if is_lora(policy) else policy


def is_recurrent(policy: nn.Module) -> bool:
    """Whether some layers keep a recurrent state, which rows of a batch cannot share."""
    model = base_model(policy)
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    recurrent = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}
    return model._is_stateful or not recurrent.isdisjoint(layer_types)


def eos_ids(policy: nn.Module, tokenizer: Any) -> list[int]:
    """The EOS token ids of the generation config and of the tokenizer."""
    of_config = base_model(policy).generation_config.eos_token_id
    if not isinstance(of_config, list):
        of_config = [of_config]
    ids = {*of_config, tokenizer.eos_token_id}
    return sorted(ids - {None})


def named_stop_tokens(args: Any, tokenizer: Any) -> list[int]:
    """The ids of --stop-tokens. Rejects a text that is not exactly one token."""
    ids = []
    for text in args.stop_tokens:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        why = f"must be one token of {args.model}, and is {len(tokens)}"
        require(len(tokens) == 1, "--stop-tokens", text, why)
        unknown = tokens == [tokenizer.unk_token_id] and text != tokenizer.unk_token
        require(not unknown, "--stop-tokens", text, f"is not a token of {args.model}")
        ids += tokens
    return ids


# ------------------------------------------------------------------ weights


@torch.no_grad()
def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its transformers name, with LoRA added. The policy does not change."""
    model = base_model(policy)
    adapters = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            # peft wraps an experts module once per adapted tensor. Each wrapper has the tensor's
            # parameter_name and is the base_layer of the next. A linear layer has one wrapper.
            tensor = getattr(layer, "parameter_name", "weight")
            adapters[f"{path}.{tensor}".replace(".base_layer", "")] = layer

    for path, weight in model.state_dict().items():
        name = path.replace(".base_layer", "")
        if ".lora_" in name:
            continue

        if name in adapters:  # the sum is in float32, so that it is rounded once
            delta = adapters[name].get_delta_weight("default")
            weight = (weight.float() + delta).to(weight.dtype)
        yield name, weight


def load_weights(policy: nn.Module, folder: Path) -> None:
    """Load what `policy.save_pretrained(folder)` wrote, bit for bit."""
    if is_lora(policy):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
    else:  # through transformers, which may store weights under other names
        saved = type(policy).from_pretrained(folder, dtype=policy.dtype)
        policy.load_state_dict(saved.state_dict())


def save_model(policy: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write the policy as an ordinary model folder, with LoRA merged.

    Raises StopRun if loading that folder would not find every weight.
    """
    model = base_model(policy)
    weights = {name: weight.contiguous() for name, weight in merged_weights(policy)}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    # On the meta device only names and shapes are loaded.
    _, info = type(model).from_pretrained(folder, device_map="meta", output_loading_info=True)
    wrong = sorted(info["missing_keys"] | info["unexpected_keys"])
    if wrong:
        raise StopRun(f"the saved model would not load: {wrong[:3]}; the checkpoints are complete")


# ------------------------------------------------------------------ schedule


def get_scheduler(name: str, optimizer: torch.optim.Optimizer, warmup: int, updates: int) -> Any:
    """transformers' learning-rate schedule, imported late: it takes 2 s, too long for --help."""
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, warmup, updates)


# ------------------------------------------------------------------ reference


class Reference:
    """The frozen initial policy: `with reference() as frozen:`.

    With LoRA it is the policy with its adapters off, otherwise a copy.
    """

    def __init__(self, policy: nn.Module, args: Any) -> None:
        self.policy = policy
        self.copy = None if is_lora(policy) else frozen_copy(policy, precision(args))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        if self.copy is not None:
            yield self.copy
        else:
            with self.policy.disable_adapter():
                yield self.policy
            freeze_routers(self.policy)  # peft unfreezes all adapters that it enables again


def frozen_copy(policy: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy without gradients. In bfloat16 its linear layers take half the memory.

    Autocast rounds their weights to bfloat16 in either model, so the values are the same.
    """
    frozen = copy.deepcopy(policy).requires_grad_(False)
    if dtype is torch.bfloat16:
        embedding = frozen.get_input_embeddings().weight  # may be tied to the LM head
        for module in frozen.modules():
            if isinstance(module, nn.Linear) and module.weight is not embedding:
                module.weight.data = module.weight.data.bfloat16()
    return frozen
