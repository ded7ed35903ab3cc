"""All methods except VinePPO on many GPUs: TRL's GRPOTrainer with the functions of the scripts.

TRL generates, shards weights and saves. Commands are in docs/scale.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import arca
import common
import ep_grpo
import erpo
import forking
import grpo
import gtpo
import holderpo
import lambda_grpo
import reft
from infra.cli import flag_of

SCRIPTS = {"grpo": grpo, "ep_grpo": ep_grpo, "erpo": erpo, "gtpo": gtpo, "grpo_s": gtpo}
SCRIPTS |= {"holderpo": holderpo, "arca": arca, "reft": reft}
SCRIPTS |= {"forking": forking, "lambda_grpo": lambda_grpo}
SCRIPTS_ONLY = ("engine", "gpu_memory", "max_logp_gap", "log_rollouts", "wandb_project", "credit")
SCRIPTS_ONLY += ("dynamic_sampling", "generation_rounds", "keep_checkpoints")


@dataclasses.dataclass
class ScaleArgs:
    method: Literal[tuple(SCRIPTS)] = "grpo"  # grpo_s is gtpo with --level sequence
    micro_batch: int = 4  # most rollouts per process in one pass of the update
    vllm_server: str = ""  # such as http://localhost:8000; empty: the policy generates
    resume: bool = False  # from the last checkpoint in --run-dir, with the same settings


def parse(command: list[str]) -> Any:
    """The settings of the method's script, and ScaleArgs."""
    only_method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_method.add_argument("--method", default="grpo")
    method = only_method.parse_known_args(command)[0].method
    script = SCRIPTS.get(method, grpo)
    settings = dataclasses.make_dataclass("Args", [], bases=(ScaleArgs, script.Args))
    args = tyro.cli(settings, description=__doc__, args=command)
    args.run_dir = args.run_dir or f"runs/{args.method}-{args.seed}-scale"
    return dataclasses.replace(args, level="sequence") if method == "grpo_s" else args


def check_layout(args: Any, processes: int) -> None:
    """Reject what only the scripts do, and groups that do not divide over the processes."""
    for setting in dataclasses.fields(args):
        value = getattr(args, setting.name)
        served = setting.name not in SCRIPTS_ONLY or value == setting.default
        common.require(served, flag_of(setting.name), value, "only the single-file scripts do")
    updates = args.updates_per_rollout
    divides = args.prompts_per_step * args.group_size % (processes * updates) == 0
    why = f"groups do not divide evenly over {processes} processes and {updates} updates"
    common.require(divides, "--group-size", args.group_size, why)
    found = any(Path(args.run_dir).glob("checkpoint-*"))
    why = f"{args.run_dir} has {'a' if found else 'no'} checkpoint"
    common.require(args.resume == found, "--resume", args.resume, why)


def pick(args: Any, *names: str) -> dict[str, Any]:
    """The named settings, as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def method_advantages(args: Any, step: common.Rollouts) -> Tensor:
    """The advantage of each token, [P, G, T], as the method's script computes it."""
    mask, lengths = step.mask, step.mask.sum(-1)
    signals = step.rewards, step.entropy, step.logp, step.ref_logp, mask
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
    if args.method == "arca":
        credit = arca.credit_weights(step.residual, mask, sharpening=args.sharpening)
        advantages = advantages * credit * lengths[..., None]
    return advantages


def method_loss(args: Any, step: common.Rollouts, logp: Tensor, index: common.Index) -> Tensor:
    """The losses of n rollouts before weighting: [n, T], or [n, 1] if each response has one."""
    mask, old_logp, advantages = step.mask[index], step.logp[index], step.advantages[index]
    if args.method == "arca":
        return -advantages * logp
    if args.method == "holderpo":
        p = holderpo.anneal_p(step.number, args.steps, **pick(args, "p_start", "p_end", "schedule"))
        responses = logp, old_logp, mask, advantages[:, 0]  # the same on every token
        clips = pick(args, "clip", "clip_level")
        return holderpo.holder_surrogate(*responses, p, **clips)[0][:, None]
    sequence = getattr(args, "level", "token") == "sequence"
    new_logp = gtpo.rollout_logp(logp, old_logp, mask) if sequence else logp
    loss, _ = grpo.clipped_loss(new_logp, old_logp, advantages, args.clip_low, args.clip_high)
    if args.kl:
        loss = loss + args.kl * grpo.kl_estimate(logp, step.ref_logp[index])
    return loss


def run_inside(model: nn.Module, sharded: bool) -> None:
    """Let `model(run=(f, x))` compute `f(model, x)` where FSDP and DeepSpeed gather weights."""
    plain = model.forward

    def forward(*args: Any, run: tuple | None = None, **inputs: Any) -> Any:
        return run[0](model, *run[1:]) if run else plain(*args, **inputs)

    forward.__wrapped__ = plain  # generate() reads its signature
    model.forward = forward
    model._is_fsdp_managed_module = sharded  # then generate() ends together on all processes


def trl_config(args: Any, held_out: int) -> GRPOConfig:
    """TRL's settings. held_out: the number of held-out problems."""
    updates, samples = args.updates_per_rollout, args.eval_samples
    processes = PartialState().num_processes
    rows = args.prompts_per_step * args.group_size // processes  # per process and step
    micro_batch = math.gcd(rows // updates, args.micro_batch)
    uses_reference = args.method in ("ep_grpo", "erpo") or getattr(args, "kl", 0) > 0
    dtype = common.precision(args)
    return GRPOConfig(
        **pick(args, "temperature", "seed", "max_grad_norm", "weight_decay"),
        **pick(args, "gradient_checkpointing", "trust_remote_code"),
        output_dir=args.run_dir,
        use_cpu=common.device(args).type == "cpu",
        bf16=dtype is torch.bfloat16,
        model_init_kwargs={"dtype": dtype if args.lora_rank else torch.float32},
        beta=float(uses_reference),  # above 0, TRL loads a reference
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens - (args.method == "reft"),
        shuffle_dataset=False,
        use_vllm=bool(args.vllm_server),
        vllm_mode="server",  # the default, "colocate", ignores the server
        vllm_server_base_url=args.vllm_server,
        vllm_importance_sampling_correction=False,  # --importance-cap does it
        use_bias_correction_kl=False,  # --kl weighs the k3 estimate itself
        per_device_train_batch_size=micro_batch,
        steps_per_generation=rows // micro_batch,
        gradient_accumulation_steps=rows // updates // micro_batch,
        max_steps=args.updates,
        learning_rate=args.lr,
        lr_scheduler_type=args.lr_schedule,
        warmup_steps=args.warmup_updates,
        per_device_eval_batch_size=samples * math.gcd(held_out // processes, rows // samples or 1),
        num_generations_eval=samples,
        eval_strategy="steps",
        eval_on_start=not args.resume,
        eval_steps=(args.eval_every or args.steps) * updates,
        save_steps=(args.save_every or args.steps) * updates,
        logging_steps=1,
        report_to="tensorboard",
    )


class MethodTrainer(GRPOTrainer):
    """Each process rolls out, verifies and scores a share of a step, then all hold all tensors."""

    def __init__(self, args: Any, train: list, held_out: list, grader: common.Grader, tokenizer):
        self.settings, self.grader = args, grader
        lora = {"r": args.lora_rank or 1, "lora_alpha": args.lora_alpha or 2 * args.lora_rank}
        lora |= {"lora_dropout": args.lora_dropout, "target_modules": "all-linear"}
        super().__init__(
            args.model,
            grader.grade,
            trl_config(args, len(held_out)),
            Dataset.from_list([vars(problem) for problem in train]),
            Dataset.from_list([vars(problem) for problem in held_out]),
            processing_class=tokenizer,
            peft_config=LoraConfig(**lora, task_type="CAUSAL_LM") if args.lora_rank else None,
        )
        self._tokenize_prompts = lambda prompts: (prompts, None, {})  # load_problems has done it
        for model in filter(None, (self.model, self.ref_model)):
            model = common.base_model(self.accelerator.unwrap_model(model))
            run_inside(model, self.is_fsdp_enabled)

    def _generate_single_turn(self, prompts: list, images: Any, fields: Any, copies: int) -> tuple:
        """With REFT, rollouts begin with the first tokens that its script chooses for the step."""
        args, generate = self.settings, super()._generate_single_turn
        if args.method != "reft" or not self.model.training:
            return generate(prompts, images, fields, copies)
        of_step = gather_object(prompts)[::copies]
        engine = common.Engine(self.model, self.processing_class)
        seed = common.seed_for(args.seed, self.state.global_step, "openers")
        draw = torch.Generator().manual_seed(seed)
        chosen, _ = reft.choose_openers(self.model, engine, of_step, args, draw)
        self.model.train()
        chosen = broadcast(chosen.to(self.accelerator.device)).view(-1, len(prompts))
        first = chosen[self.accelerator.process_index].tolist()
        opened = [[*prompt, token] for prompt, token in zip(prompts, first, strict=True)]
        rows, logp = generate(opened, images, fields, copies // args.openers)
        rows = [[token, *row] for token, row in zip(first, rows, strict=True)]
        return rows, logp and [[math.nan, *row] for row in logp]

    def roll_out(self, rows: list[dict[str, Any]], group_size: int) -> list[common.Group]:
        """Generate and verify this process's rows. Returns the groups of all processes."""
        _, tokens, _, texts, logp, *_ = self._generate([row["prompt"] for row in rows])
        logp = logp or [[math.nan] * len(row) for row in tokens]
        asked = [common.Problem(**row) for row in rows]
        correct = map(float, common.grade(self.grader, texts, asked))
        done = gather_object(list(zip(rows, tokens, logp, texts, correct, strict=True)))
        groups = []
        for start in range(0, len(done), group_size):
            problems, *columns = zip(*done[start : start + group_size], strict=True)
            groups.append(common.Group(common.Problem(**problems[0]), *map(list, columns)))
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["accuracy"].append(sum(row[-1] for row in done) / len(done))
        return groups

    def prediction_step(self, model: nn.Module, rows: list, *_: Any, **__: Any) -> tuple:
        self.roll_out(rows, self.settings.eval_samples)  # held-out problems have no loss
        return torch.zeros(1, device=self.accelerator.device), None, None

    @torch.no_grad()
    def score(self, rollouts: common.Rollouts) -> Tensor:
        """logp, entropy, ref_logp and ARCA's residual of all rollouts: [4, P, G, T]."""
        args, mask, processes = self.settings, rollouts.mask, self.accelerator.num_processes
        adapter_off = self.model.disable_adapter if args.lora_rank else nullcontext
        # Processes share the micro-batches of `common.score`: the values have the script's bits.
        batches = [*common.micro_batches(rollouts, 4 * args.token_budget, torch.arange(len(mask)))]
        scores = torch.zeros(4, *mask.shape, device=mask.device)
        for first in range(0, len(batches), processes):
            place = first + self.accelerator.process_index
            index = batches[place % len(batches)]  # every process runs equally many passes
            tokens = common.token_logp, rollouts, index, args
            states = common.hidden_states, rollouts, index, args
            found = torch.zeros(4, *mask[index].shape, device=mask.device)
            found[0], found[1] = self.model(run=tokens)
            if self.beta:
                with adapter_off():
                    found[2], _ = (self.ref_model or self.model)(run=tokens)
            if args.method == "arca":
                adapted = self.model(run=states)
                with adapter_off():
                    found[3][mask[index]] = arca.residual_norm(adapted, self.model(run=states))
            if place < len(batches):
                scores[:, *index] = found
        self.model.train()
        return self.accelerator.reduce(scores)

    def _generate_and_score_completions(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A step of the script up to its update, with each process's share of the rollouts."""
        args = self.settings
        groups = self.roll_out(rows, args.group_size)
        step = common.stack(groups, self.eos_token_ids, self.accelerator.device)
        mask, lengths, self.step = step.mask, step.mask.sum(-1), step
        # The attributes below are the method's: rewards [P, G], the tensors [P, G, T].
        step.number = self.state.global_step // args.updates_per_rollout + 1
        step.logp, step.entropy, step.ref_logp, step.residual = self.score(step)
        penalty = common.overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
        step.rewards = step.correct + penalty
        step.advantages = method_advantages(args, step)
        # Each of several updates has a part of the rollouts, and of the whole step's weights.
        average = args.loss_average, args.max_new_tokens
        kept = mask
        if args.method == "forking":
            kept = forking.forking_mask(step.entropy, mask, top=args.top)
        weights = common.token_weights(kept, torch.arange(len(groups)), *average)
        if args.method == "lambda_grpo":
            weights = weights * lambda_grpo.lambda_weights(step.tokens, mask)
        importance = common.importance_weights(step.logp, step.engine_logp, args.importance_cap)
        step.weights = weights * importance * args.updates_per_rollout
        step.weights[..., 0] *= not getattr(args, "mask_opener", False)
        self._metrics["train"]["entropy"].append(step.entropy[mask].mean().item())
        order = torch.arange(lengths.numel(), device=mask.device).view(-1, len(rows))
        return {"rollout": order[self.accelerator.process_index]}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        args, step = self.settings, self.step
        index = torch.unravel_index(inputs["rollout"], step.correct.shape)
        logp, _ = model(run=(common.token_logp, step, index, args))
        loss = method_loss(args, step, logp, index) * step.weights[index]
        return loss.sum() * self.accelerator.num_processes  # DDP and FSDP average gradients


def make_trainer(args: Any) -> MethodTrainer:
    processes = PartialState(cpu=common.device(args).type == "cpu").num_processes
    check_layout(args, processes)
    grader, tokenizer = common.Grader(args.answer_format), common.load_tokenizer(args)
    train = common.load_problems(args, "--dataset", tokenizer, grader)
    train = train.take(args.steps * args.prompts_per_step, args.seed)  # in the script's order
    held_out = common.load_problems(args, "--eval-dataset", tokenizer, grader)
    count = min(len(held_out), args.eval_problems) // processes * processes
    return MethodTrainer(args, train, held_out[:count], grader, tokenizer)


if __name__ == "__main__":
    trainer = make_trainer(parse(sys.argv[1:]))
    trainer.train(resume_from_checkpoint=trainer.settings.resume or None)
    trainer.save_model(f"{trainer.settings.run_dir}/model")
    trainer.accelerator.end_training()
