"""Any of the methods on many GPUs: TRL's GRPOTrainer with the functions of the method's script.

    accelerate launch --config_file scale/fsdp-8gpu.yaml scale/trl_trainer.py --method ep_grpo \\
        --model Qwen/Qwen2.5-7B-Instruct --dataset openai/gsm8k:main --eval-dataset \\
        openai/gsm8k:main --instruction 'Put your final answer in \\boxed{}.'

TRL generates, shards weights and saves. Advantages and loss are the script's. Page: docs/scale.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import arca
import common
import ep_grpo
import erpo
import grpo
import gtpo
import holderpo
import reft
import vineppo
from infra.cli import flag_of
from infra.hf_engine import HFEngine

SCRIPTS = {"grpo": grpo, "ep_grpo": ep_grpo, "erpo": erpo, "gtpo": gtpo, "grpo_s": gtpo}
SCRIPTS |= {"holderpo": holderpo, "arca": arca, "reft": reft, "vineppo": vineppo}
SCRIPTS_ONLY = {
    *("engine", "gpu_memory", "max_logp_gap", "log_rollouts", "wandb_project", "credit"),
    *("dynamic_sampling", "generation_rounds", "keep_checkpoints"),
}


@dataclass
class ScaleArgs:
    method: Literal[tuple(SCRIPTS)] = "grpo"
    """whose functions and flags are used; grpo_s is gtpo with --level sequence"""
    micro_batch: int = 4
    """most rollouts per process in one pass of the update; --token-budget limits scoring"""
    vllm_server: str = ""
    """address of a vLLM server, such as http://localhost:8000; empty: the policy generates"""
    resume: bool = False
    """resume from the last checkpoint in --run-dir, with the same settings"""


def parse(command: list[str]) -> Any:
    """The settings of the method's script, and ScaleArgs."""
    only_method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_method.add_argument("--method", default="grpo")
    method = only_method.parse_known_args(command)[0].method
    bases = ScaleArgs, SCRIPTS.get(method, grpo).Args
    settings = dataclasses.make_dataclass("Args", [], bases=bases)
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
    why = f"groups do not divide evenly over {processes} processes and {updates} updates per step"
    common.require(divides, "--group-size", args.group_size, why)
    found = any(Path(args.run_dir).glob("checkpoint-*"))
    why = f"{args.run_dir} has a checkpoint" if found else f"{args.run_dir} has no checkpoint"
    common.require(args.resume == found, "--resume", args.resume, why)


def pick(args: Any, *names: str) -> dict[str, Any]:
    """The named settings, as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def method_advantages(args: Any, step: SimpleNamespace) -> Tensor:
    """The advantage of each token, [P, G, T], as the method's script computes it.

    step: rewards, correct [P, G]; mask, logp, entropy, ref_logp, residual [P, G, T]; groups.
    """
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
            doubt = step.entropy.clamp(*args.entropy_clamp) if args.entropy_clamp else step.entropy
            punished = gtpo.overlong_punishment(step.correct, lengths, gamma=args.overlong_gamma)
            alpha1 = 1 + torch.where(step.correct > 0, punished, -punished)[..., None]
            rollouts = step.correct, doubt, mask
            if args.level == "token":
                flags = pick(args, "alpha2", "normalize")
                return gtpo.gtpo_advantages(*rollouts, alpha1=alpha1, **flags)
            advantages = gtpo.grpo_s_advantages(*rollouts, beta1=alpha1, beta2=args.alpha2)
            return advantages[..., None] * mask
        case "vineppo":
            steps, values = vineppo.stack_values(step.groups, mask.device)
            values = broadcast(values)  # grading may time out in one process alone
            signals = values, steps, step.rewards, mask
            return vineppo.vineppo_advantages(*signals, whiten=args.whiten)
    advantages = grpo.grpo_advantages(step.rewards, scale=args.scale_rewards)[..., None] * mask
    if args.method == "arca":
        credit = arca.credit_weights(step.residual, mask, sharpening=args.sharpening)
        advantages = advantages * credit * lengths[..., None]
    return advantages


def method_loss(args: Any, step: SimpleNamespace, logp: Tensor, index: common.Index) -> Tensor:
    """The losses of n rollouts before weighting: [n, T], or [n, 1] if each response has one.

    logp: [n, T]. step: as above, with advantages, [P, G, T], and number, from 1.
    """
    mask, old_logp, advantages = step.mask[index], step.logp[index], step.advantages[index]
    if args.method == "arca":
        return -advantages * logp
    if args.method == "holderpo":
        p = holderpo.anneal_p(step.number, args.steps, **pick(args, "p_start", "p_end", "schedule"))
        responses = logp, old_logp, mask, advantages[:, 0]  # the same on every token
        clips = pick(args, "clip", "clip_level")
        return holderpo.holder_surrogate(*responses, p, **clips)[0][:, None]
    new_logp = logp
    if getattr(args, "level", "token") == "sequence":
        new_logp = gtpo.rollout_logp(logp, old_logp, mask)
    loss, _ = grpo.clipped_loss(new_logp, old_logp, advantages, args.clip_low, args.clip_high)
    if args.kl:
        loss = loss + args.kl * grpo.kl_estimate(logp, step.ref_logp[index])
    return loss


def run_inside(model: nn.Module, sharded: bool) -> None:
    """Make `model(run=(f, x))` return `f(model, x)`, computed in the model's forward pass.

    There FSDP and DeepSpeed have gathered its weights, and DDP registers their use.
    """
    plain = model.forward

    def forward(*args: Any, run: tuple | None = None, **inputs: Any) -> Any:
        return run[0](model, *run[1:]) if run else plain(*args, **inputs)

    forward.__wrapped__ = plain  # generate() reads its signature
    model.forward = forward
    model._is_fsdp_managed_module = sharded  # then generate() ends together on all processes


class DistributedEngine(HFEngine):
    """Each process generates an equal share of the responses."""

    def generate(self, prompts: list, seeds: list, lengths: list, temperature: float) -> list:
        state, rows = PartialState(), list(zip(prompts, seeds, lengths, strict=True))
        self.batch_size = self.args.prompts_per_step * self.args.group_size // state.num_processes
        count = math.ceil(len(rows) / state.num_processes)
        first = state.process_index * count
        own = [rows[i % len(rows)] for i in range(first, first + count)]  # the last may repeat some
        responses = super().generate(*zip(*own, strict=True), temperature)
        return gather_object(responses)[: len(rows)]

    @torch.no_grad()
    def generate_batch(self, *batch: Any) -> list:
        """FSDP needs every process in each forward pass, so those that are done continue."""
        model = common.base_model(self.policy)
        running = torch.ones(1, device=model.device)
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)

        def announce(*_: Any) -> None:
            reduce(running)

        # Prepended, so that it runs before FSDP gathers the weights.
        hook = model.register_forward_pre_hook(announce, prepend=True)
        responses = super().generate_batch(*batch)
        hook.remove()
        while reduce(torch.zeros_like(running)) > 0:
            model(input_ids=token, use_cache=False)
        return responses

    def prefill(self, model: nn.Module, prompts: list) -> tuple:
        return model(run=(super().prefill, prompts))


def trl_config(args: Any, held_out: int, needs_reference: bool) -> GRPOConfig:
    """TRL's settings. held_out: the number of held-out problems."""
    processes = PartialState().num_processes
    rows = args.prompts_per_step * args.group_size // processes  # per process and step
    rows_per_update = rows // args.updates_per_rollout
    micro_batch = math.gcd(rows_per_update, args.micro_batch)
    eval_problems = math.gcd(held_out // processes, max(1, rows // args.eval_samples))
    dtype = common.precision(args)
    same = ("temperature", "seed", "max_grad_norm", "weight_decay", "trust_remote_code")
    return GRPOConfig(
        **pick(args, "gradient_checkpointing", *same),
        output_dir=args.run_dir,
        use_cpu=common.device(args).type == "cpu",
        bf16=dtype is torch.bfloat16,
        model_init_kwargs={"dtype": dtype if args.lora_rank else torch.float32},
        beta=float(needs_reference),  # above 0, TRL loads a reference
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens - (args.method == "reft"),
        shuffle_dataset=False,
        use_vllm=bool(args.vllm_server),
        vllm_server_base_url=args.vllm_server,
        vllm_importance_sampling_correction=False,  # --importance-cap does it
        per_device_train_batch_size=micro_batch,
        steps_per_generation=rows // micro_batch,
        gradient_accumulation_steps=rows_per_update // micro_batch,
        max_steps=args.updates,
        learning_rate=args.lr,
        lr_scheduler_type=args.lr_schedule,
        warmup_steps=args.warmup_updates,
        per_device_eval_batch_size=eval_problems * args.eval_samples,
        num_generations_eval=args.eval_samples,
        eval_strategy="steps",
        eval_steps=(args.eval_every or args.steps) * args.updates_per_rollout,
        eval_on_start=not args.resume,
        save_steps=(args.save_every or args.steps) * args.updates_per_rollout,
        logging_steps=1,
        report_to="tensorboard",
    )


class MethodTrainer(GRPOTrainer):
    """Each process rolls out, verifies and scores a share of a step's P * G rollouts.

    The tensors of the whole step, [P, G, T], are then gathered on every process.
    """

    def __init__(self, args: Any, train: list, held_out: list, grader: common.Grader, tokenizer):
        processes = PartialState().num_processes
        held_out = held_out[: len(held_out) // processes * processes]
        self.settings, self.grader = args, grader
        self.needs_reference = args.method in ("ep_grpo", "erpo") or getattr(args, "kl", 0) > 0
        lora = {"r": args.lora_rank or 1, "lora_alpha": args.lora_alpha or 2 * args.lora_rank}
        lora |= {"lora_dropout": args.lora_dropout, "target_modules": "all-linear"}
        super().__init__(
            args.model,
            grader.grade,
            trl_config(args, len(held_out), self.needs_reference),
            Dataset.from_list([vars(problem) for problem in train]),
            Dataset.from_list([vars(problem) for problem in held_out]),
            processing_class=tokenizer,
            peft_config=LoraConfig(**lora, task_type="CAUSAL_LM") if args.lora_rank else None,
        )
        for model in filter(None, (self.model, self.ref_model)):
            plain = self.accelerator.unwrap_model(model)
            run_inside(common.base_model(plain), self.is_fsdp_enabled)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        return prompts, None, {}  # load_problems has tokenized them

    def _generate_single_turn(
        self, prompts: list, images: None, fields: dict, copies: int
    ) -> tuple:
        """With REFT, rollouts begin with the first tokens that its script chooses for the step."""
        args, generate = self.settings, super()._generate_single_turn
        if args.method != "reft" or not self.model.training:
            return generate(prompts, images, fields, copies)
        of_step = gather_object(prompts)[::copies]
        draw = torch.Generator()
        draw.manual_seed(common.seed_for(args.seed, self.state.global_step, "openers"))
        chosen, _ = reft.choose_openers(self.model, self.processing_class, of_step, args, draw)
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
        correct = map(float, self.grader.grade(texts, [row["answer"] for row in rows]))
        done = gather_object(list(zip(rows, tokens, logp, texts, correct, strict=True)))
        groups = []
        for start in range(0, len(done), group_size):
            problems, *columns = zip(*done[start : start + group_size], strict=True)
            groups.append(common.Group(common.Problem(**problems[0]), *map(list, columns)))
        mode = "train" if self.model.training else "eval"
        accuracy = sum(sum(group.correct) for group in groups) / len(done)
        self._metrics[mode]["accuracy"].append(accuracy)
        return groups

    def prediction_step(self, model: nn.Module, rows: list, *_: Any, **__: Any) -> tuple:
        self.roll_out(rows, self.settings.eval_samples)  # held-out problems have no loss
        return torch.zeros(1, device=self.accelerator.device), None, None

    @torch.no_grad()
    def score(self, rollouts: common.Rollouts) -> Tensor:
        """logp, entropy, ref_logp and ARCA's residual of all rollouts: [4, P, G, T].

        Micro-batches are `common.score`'s, dealt out to the processes: the same bits as the script.
        """
        args, mask, processes = self.settings, rollouts.mask, self.accelerator.num_processes
        reference = self.ref_model or self.model
        adapter_off = self.model.disable_adapter if args.lora_rank else nullcontext
        budget, everything = 4 * args.token_budget, torch.arange(len(mask))
        batches = list(common.micro_batches(rollouts, budget, everything))
        scores = torch.zeros(4, *mask.shape, device=mask.device)
        for first in range(0, len(batches), processes):
            place = first + self.accelerator.process_index
            index = batches[place % len(batches)]  # every process runs equally many passes
            tokens = common.token_logp, rollouts, index, args
            states = common.hidden_states, rollouts, index, args
            found = torch.zeros(4, *mask[index].shape, device=mask.device)
            found[0], found[1] = self.model(run=tokens)
            if self.needs_reference:
                with adapter_off():
                    found[2], _ = reference(run=tokens)
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
        args, device = self.settings, self.accelerator.device
        number = self.state.global_step // args.updates_per_rollout + 1
        groups = self.roll_out(rows, args.group_size)
        if args.method == "vineppo":
            engine = DistributedEngine(args, self.model, self.processing_class, context=0)
            seed = (args.seed, number, 0)
            vineppo.estimate_values(engine, self.grader, groups, args, seed)
        self.rollouts = rollouts = common.stack(groups, self.eos_token_ids, device)
        mask, lengths = rollouts.mask, rollouts.mask.sum(-1)
        self.step = step = SimpleNamespace(groups=groups, number=number, mask=mask)
        step.logp, step.entropy, step.ref_logp, step.residual = self.score(rollouts)
        penalty = common.overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
        step.correct, step.rewards = rollouts.correct, rollouts.correct + penalty
        step.advantages = method_advantages(args, step)

        # The weights are the whole step's. Each of several updates has a part of the rollouts.
        problems = torch.arange(len(groups))
        limits = args.loss_average, args.max_new_tokens
        weights = common.token_weights(mask, problems, *limits) * args.updates_per_rollout
        importance = common.importance_weights(rollouts, step.logp, args.importance_cap)
        step.weights = weights * importance
        if getattr(args, "mask_opener", False):
            step.weights[..., 0] = 0
        self._metrics["train"]["entropy"].append(step.entropy[mask].mean().item())
        order = torch.arange(lengths.numel(), device=device).view(-1, len(rows))
        return {"rollout": order[self.accelerator.process_index]}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        index = torch.unravel_index(inputs["rollout"], self.rollouts.mask.shape[:2])
        logp, _ = model(run=(common.token_logp, self.rollouts, index, self.settings))
        loss = method_loss(self.settings, self.step, logp, index) * self.step.weights[index]
        return loss.sum() * self.accelerator.num_processes  # DDP and FSDP average gradients


def make_trainer(args: Any) -> MethodTrainer:
    on_cpu = common.device(args).type == "cpu"
    check_layout(args, PartialState(cpu=on_cpu).num_processes)
    grader, tokenizer = common.Grader(), common.load_tokenizer(args)
    train = common.load_problems(args, "--dataset", tokenizer, grader)
    train = train.take(args.steps * args.prompts_per_step, args.seed)  # in the script's order
    held_out = common.load_problems(args, "--eval-dataset", tokenizer, grader)
    return MethodTrainer(args, train, held_out[: args.eval_problems], grader, tokenizer)


if __name__ == "__main__":
    trainer = make_trainer(parse(sys.argv[1:]))
    trainer.train(resume_from_checkpoint=trainer.settings.resume or None)
    trainer.save_model(f"{trainer.settings.run_dir}/model")
    trainer.accelerator.end_training()
