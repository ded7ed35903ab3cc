"""What each method computes in scale/trl_trainer.py, by the functions of its script.

step: `common.Rollouts` with old_logp, entropy and ref_logp. `trl_trainer.py` adds number (the
training step, from 1), rewards, [P, G], and residual (ARCA), advantages and weights, [P, G, T].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

import arca
import common
import ep_grpo
import erpo
import fipo
import forking
import grpo
import gtpo
import holderpo
import lambda_grpo
import reft
import stare
from infra.forward import padded_states
from infra.models import disable_dropout

SCRIPTS = {"grpo": grpo, "ep_grpo": ep_grpo, "erpo": erpo, "gtpo": gtpo, "grpo_s": gtpo}
SCRIPTS |= {"holderpo": holderpo, "arca": arca, "reft": reft}
SCRIPTS |= {"forking": forking, "lambda_grpo": lambda_grpo, "fipo": fipo, "stare": stare}


def model_options(args: Any) -> dict[str, Any]:
    """How TRL loads the model: its precision, and without its own dropout, as the scripts do."""
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    options = {"dtype": common.precision(args) if args.lora_rank else torch.float32}
    rates = dict(vars(config))
    disable_dropout(config)
    for name, rate in rates.items():
        if getattr(config, name) != rate:
            options[name] = 0.0
    return options


def pick(args: Any, *names: str) -> dict[str, Any]:
    """The named settings, as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def hidden_states(
    model: nn.Module, step: common.Rollouts, index: common.Index, args: Any
) -> Tensor:
    """`common.hidden_states` in one padded pass.

    FSDP gathers weights in every pass, so all processes must run equally many. Nor can a prompt be
    computed once: the backward pass of its keys and values would find the weights released.
    """
    prompts = [problem.prompt for problem in step.problems]
    mask = step.mask[index]
    with common.autocast(args):
        return padded_states(model, prompts, index[0].to(mask.device), step.tokens[index], mask)


def token_logp(
    model: nn.Module, step: common.Rollouts, index: common.Index, args: Any
) -> tuple[Tensor, Tensor]:
    """`common.token_logp` in one padded pass: log-probability and entropy, two [n, T]."""
    hidden = hidden_states(model, step, index, args)
    return common.head_logp(model, step, index, hidden, args)


def method_advantages(args: Any, step: common.Rollouts) -> Tensor:
    """The advantage of each token, [P, G, T], as the method's script computes it."""
    mask, lengths = step.mask, step.mask.sum(-1)
    signals = step.rewards, step.entropy, step.old_logp, step.ref_logp, mask
    match args.method:
        case "ep_grpo":
            flags = pick(args, "gamma", "eta", "buckets", "reward_threshold")
            return ep_grpo.ep_grpo_advantages(*signals, **flags)
        case "erpo":
            flags = pick(args, "gamma", "eta", "buckets", "sigma_target")
            return erpo.erpo_advantages(*signals, **flags)
        case "gtpo" | "grpo_s":
            return gtpo.token_advantages(step, args)

    advantages = grpo.grpo_advantages(step.rewards, scale=args.scale_rewards)[..., None] * mask
    if args.method == "stare" and step.entropy[mask].mean() < args.target_entropy:
        flags = pick(args, "top", "amplify", "attenuate")
        return advantages * stare.stare_weights(step.old_logp, advantages, mask, **flags)

    if args.method == "arca":
        credit = arca.credit_weights(step.residual, mask, sharpening=args.sharpening)
        advantages = advantages * credit * lengths[..., None]
    return advantages


def method_loss(args: Any, step: common.Rollouts, logp: Tensor, index: common.Index) -> Tensor:
    """The losses of n rollouts before weighting: [n, T], or [n, 1] if each response has one."""
    mask, old_logp, advantages = step.mask[index], step.old_logp[index], step.advantages[index]
    if args.method == "arca":
        return -advantages * logp

    if args.method == "holderpo":
        p = holderpo.anneal_p(step.number, args.steps, **pick(args, "p_start", "p_end", "schedule"))
        responses = logp, old_logp, mask, advantages[:, 0]  # the same on every token
        clips = pick(args, "clip", "clip_level")
        return holderpo.holder_surrogate(*responses, p, **clips)[0][:, None]

    new_logp = logp
    if args.method == "fipo":
        bounds = {"low": args.influence_low, "high": args.influence_high}
        flags = bounds | pick(args, "half_life", "ratio_cap", "safety")
        advantages = advantages * fipo.fipo_weights(logp, old_logp, advantages, mask, **flags)
        new_logp = torch.minimum(logp, old_logp + math.log(args.ratio_cap))
    if getattr(args, "level", "token") == "sequence":
        new_logp = gtpo.rollout_logp(logp, old_logp, mask)

    loss, _ = grpo.clipped_loss(new_logp, old_logp, advantages, args.clip_low, args.clip_high)
    if args.kl:
        loss = loss + args.kl * grpo.kl_estimate(logp, step.ref_logp[index])
    return loss


def update_weights(args: Any, step: common.Rollouts, share: Tensor) -> Tensor:
    """The loss weights of the tokens that one update trains, [P, G, T], 0 elsewhere.

    share: [P'], the update's problems.
    """
    kept = step.mask
    if args.method == "forking":
        kept = torch.zeros_like(step.mask)
        kept[share] = forking.forking_mask(step.entropy[share], step.mask[share], top=args.top)
    weights = common.token_weights(kept, share, args.loss_average, args.max_new_tokens)
    if args.method == "lambda_grpo":
        weights = weights * lambda_grpo.lambda_weights(step.tokens, step.mask)
    if getattr(args, "mask_opener", False):  # REFT
        weights[..., 0] = 0
    return weights * common.importance_weights(step.old_logp, step.engine_logp, args.importance_cap)
