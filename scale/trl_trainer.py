"""Any of the methods on many GPUs: TRL's GRPOTrainer with the functions of the method's script.

    accelerate launch --config_file scale/fsdp-8gpu.yaml scale/trl_trainer.py --method ep_grpo \\
        --model Qwen/Qwen2.5-7B-Instruct --dataset openai/gsm8k:main --eval-dataset \\
        openai/gsm8k:main --instruction 'Put your final answer in \\boxed{}.'

TRL generates, shards and saves; advantages and loss are the script's. Page: docs/scale.md.
"""

from __future__ import annotations

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
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
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
from engine import Transformers, base_model, device, load_tokenizer, precision, refuse, seed_for
from grading import Grader
from run import check, learning_rate

SCRIPTS = {"grpo": grpo, "ep_grpo": ep_grpo, "erpo": erpo, "gtpo": gtpo, "grpo_s": gtpo}
SCRIPTS |= {"holderpo": holderpo, "arca": arca, "reft": reft, "vineppo": vineppo}
NOT_HERE = ("engine", "gpu_memory", "max_logp_gap", "log_rollouts", "wandb_project", "credit")
NOT_HERE += ("dynamic_sampling", "generation_rounds", "keep_checkpoints", "adamw_8bit")


@dataclass
class ScaleArgs:
    method: Literal[tuple(SCRIPTS)] = "grpo"
    """whose functions and flags are used; grpo_s is gtpo with --level sequence"""
    micro_batch: int = 4
    """most rollouts of a process in one pass of the update; scoring goes by --token-budget"""
    vllm_server: str = ""
    """address of a vLLM server, such as http://localhost:8000; empty: the policy generates"""
    resume: bool = False
    """go on from the last checkpoint in --run-dir, with the same settings"""


def parse(command: list[str]) -> Any:
    """The settings of the method's script, and ScaleArgs."""
    words = " ".join(command).replace("=", " ").split()
    named = words[words.index("--method") + 1 :][:1] if "--method" in words else ["grpo"]
    script = SCRIPTS.get("".join(named), grpo)
    settings = dataclasses.make_dataclass("Args", [], bases=(ScaleArgs, script.Args))
    args = tyro.cli(settings, description=__doc__, args=command)
    args.run_dir = args.run_dir or f"runs/{args.method}-{args.seed}-scale"
    return dataclasses.replace(args, level="sequence") if args.method == "grpo_s" else args


def check_layout(args: Any, processes: int) -> None:
    """Refuse what only the scripts do, and groups that the processes cannot hold whole."""
    check(args)
    for field in dataclasses.fields(args):
        if field.name in NOT_HERE and (value := getattr(args, field.name)) != field.default:
            refuse("--" + field.name.replace("_", "-"), value, "only the single-file scripts do")
    if args.prompts_per_step * args.group_size % (processes * args.updates_per_rollout):
        share = f"{processes} processes with {args.updates_per_rollout} updates a step"
        refuse("--group-size", args.group_size, f"whole groups do not divide evenly over {share}")
    if args.resume != (found := any(Path(args.run_dir).glob("checkpoint-*"))):
        refuse("--resume", args.resume, f"{args.run_dir} holds {'a' if found else 'no'} checkpoint")


def method_advantages(args: Any, step: SimpleNamespace) -> Tensor:
    """The advantage of each token of whole groups, [P, G, T], as the method's script computes it;
    step: correct, rewards [P, G]; mask, logp, entropy, ref_logp, residual [P, G, T]; groups."""
    mask, lengths = step.mask, step.mask.sum(-1)
    signals = step.rewards, step.entropy, step.logp, step.ref_logp, mask
    match args.method:
        case "ep_grpo":
            names = ("gamma", "eta", "buckets", "reward_threshold")
            return ep_grpo.ep_grpo_advantages(*signals, **{n: getattr(args, n) for n in names})
        case "erpo":
            names = ("gamma", "eta", "buckets", "sigma_target")
            return erpo.erpo_advantages(*signals, **{n: getattr(args, n) for n in names})
        case "gtpo" | "grpo_s":
            doubt = step.entropy.clamp(*args.entropy_clamp) if args.entropy_clamp else step.entropy
            punished = gtpo.overlong_punishment(step.correct, lengths, gamma=args.overlong_gamma)
            alpha1 = 1 + torch.where(step.correct > 0, punished, -punished)[..., None]
            rollouts = step.correct, doubt, mask
            if args.level == "sequence":
                shaped = gtpo.grpo_s_advantages(*rollouts, beta1=alpha1, beta2=args.alpha2)
                return shaped[..., None] * mask
            shaping = {"alpha1": alpha1, "alpha2": args.alpha2, "normalize": args.normalize}
            return gtpo.gtpo_advantages(*rollouts, **shaping)
        case "vineppo":
            steps, values = vineppo.stack_values(step.groups, mask.device)
            values = broadcast(values)  # a verdict may have come too late on one process alone
            measured = values, steps, step.rewards, mask
            return vineppo.vineppo_advantages(*measured, whiten=args.whiten)
    scale = getattr(args, "scale_rewards", True)
    advantages = grpo.grpo_advantages(step.rewards, scale=scale)[..., None] * mask
    if args.method != "arca":
        return advantages
    credit = arca.credit_weights(step.residual, mask, sharpening=args.sharpening)
    return advantages * credit * lengths[..., None]


def method_loss(args: Any, step: SimpleNamespace, logp: Tensor, index: common.Index) -> Tensor:
    """The losses of n rollouts, [n, T], or [n, 1] where a response has one, not yet weighed;
    step: as above, and advantages [P, G, T]; number, from 1. logp: [n, T]."""
    mask, old_logp, advantages = step.mask[index], step.logp[index], step.advantages[index]
    if args.method == "arca":
        return -advantages * logp
    if args.method == "holderpo":
        schedule = {"p_start": args.p_start, "p_end": args.p_end, "schedule": args.schedule}
        p = holderpo.anneal_p(step.number, args.steps, **schedule)
        responses = logp, old_logp, mask, advantages[:, 0]  # the same on every token
        clips = {"clip": args.clip, "clip_level": args.clip_level}
        return holderpo.holder_surrogate(*responses, p, **clips)[0][:, None]
    sequence = getattr(args, "level", "") == "sequence"
    new_logp = gtpo.rollout_logp(logp, old_logp, mask) if sequence else logp
    loss, _ = grpo.clipped_loss(new_logp, old_logp, advantages, args.clip_low, args.clip_high)
    if args.kl:
        loss = loss + args.kl * grpo.kl_to_reference(logp, step.ref_logp[index])
    return loss


def run_inside(model: nn.Module, sharded: bool) -> None:
    """Let `model(run=(f, x))` give `f(model, x)`, computed in the model's forward pass: there FSDP
    and DeepSpeed have gathered its weights, and DDP sees them used."""
    plain = model.forward

    def forward(*args: Any, run: tuple | None = None, **inputs: Any) -> Any:
        return run[0](model, *run[1:]) if run else plain(*args, **inputs)

    forward.__wrapped__ = plain  # generate() reads its signature
    model.forward = forward
    model._is_fsdp_managed_module = sharded  # then generate() ends together on all processes


class SharedOut(Transformers):
    """Each process draws an equal share of the responses, as many at once as it has rollouts."""

    def generate(self, prompts: list, seeds: list, lengths: list, temperature: float) -> list:
        state, rows = PartialState(), list(zip(prompts, seeds, lengths, strict=True))
        self.at_once = self.args.prompts_per_step * self.args.group_size // state.num_processes
        count = math.ceil(len(rows) / state.num_processes)
        first = state.process_index * count
        own = [rows[i % len(rows)] for i in range(first, first + count)]  # at the end, again
        return gather_object(super().generate(*zip(*own, strict=True), temperature))[: len(rows)]


class MethodTrainer(GRPOTrainer):
    """A process rolls out and verifies a contiguous share of a step's P * G rollouts, and scores a
    share of them; then all tensors of the step, [P, G, T], are the same on every process."""

    def __init__(self, args: Any, train: list, held_out: list, grader: Grader, tokenizer: Any):
        self.settings, self.grader, updates = args, grader, args.updates_per_rollout
        self.compares = args.method in ("ep_grpo", "erpo") or getattr(args, "kl", 0) > 0
        processes, samples = PartialState().num_processes, args.eval_samples
        rows = args.prompts_per_step * args.group_size // processes  # of this process, in a step
        micro = math.gcd(rows // updates, args.micro_batch)
        held_out = held_out[: len(held_out) // processes * processes]
        at_once = math.gcd(len(held_out) // processes, max(1, rows // samples))
        names = ("temperature", "seed", "max_grad_norm", "weight_decay", "gradient_checkpointing")
        options = {name: getattr(args, name) for name in names} | {"output_dir": args.run_dir}
        options |= {"per_device_train_batch_size": micro, "steps_per_generation": rows // micro}
        options |= {"gradient_accumulation_steps": rows // micro // updates, "logging_steps": 1}
        options |= {"max_steps": args.steps * updates, "num_generations": args.group_size}
        options |= {"max_completion_length": args.max_new_tokens - (args.method == "reft")}
        options |= {"num_generations_eval": samples, "eval_on_start": not args.resume}
        options |= {"use_cpu": device(args).type == "cpu", "report_to": "tensorboard"}
        options |= {"per_device_eval_batch_size": at_once * samples, "shuffle_dataset": False}
        options |= {"save_steps": (args.save_every or args.steps) * updates}
        options |= {"eval_steps": (args.eval_every or args.steps) * updates}
        options |= {"learning_rate": args.lr, "beta": 1.0 * self.compares}
        options |= {"use_vllm": bool(args.vllm_server), "vllm_server_base_url": args.vllm_server}
        options |= {"vllm_importance_sampling_correction": False}  # --importance-cap does it
        options |= {"bf16": precision(args) == torch.bfloat16, "eval_strategy": "steps"}
        dtype = precision(args) if args.lora_rank else torch.float32
        model = {"dtype": dtype, "trust_remote_code": args.trust_remote_code}
        lora = {"r": args.lora_rank or 1, "lora_alpha": args.lora_alpha or 2 * args.lora_rank}
        lora |= {"lora_dropout": args.lora_dropout, "target_modules": "all-linear"}
        super().__init__(
            *(args.model, grader.grade, GRPOConfig(**options, model_init_kwargs=model)),
            *(Dataset.from_list([vars(problem) for problem in part]) for part in (train, held_out)),
            processing_class=tokenizer,
            peft_config=LoraConfig(**lora, task_type="CAUSAL_LM") if args.lora_rank else None,
        )
        self._tokenize_prompts = lambda prompts: (prompts, None, {})  # load_problems has done it
        for scored in filter(None, (self.model, self.ref_model)):
            run_inside(base_model(self.accelerator.unwrap_model(scored)), self.is_fsdp_enabled)

    def create_scheduler(self, *_: Any, **__: Any) -> LambdaLR:
        """The scripts' learning rate, by the number of updates done."""
        args, updates = self.settings, self.settings.updates_per_rollout
        rates = [learning_rate(step + 1, args) / args.lr for step in range(args.steps)] + [0.0]
        self.lr_scheduler = LambdaLR(self.optimizer, lambda done: rates[done // updates])
        return self.lr_scheduler

    def _generate_single_turn(
        self, prompts: list[list[int]], images: None, fields: dict, copies: int
    ) -> tuple[list[list[int]], list | None]:
        """Under REFT, rollouts begin with the tokens that its script draws for the whole step."""
        args, generate = self.settings, super()._generate_single_turn
        if args.method != "reft" or not self.model.training:
            return generate(prompts, images, fields, copies)
        problems = [common.Problem("", "", prompt) for prompt in gather_object(prompts)[::copies]]
        draw = torch.Generator().manual_seed(seed_for(args.seed, self.state.global_step, "openers"))
        engine = Transformers(args, self.model, self.processing_class, context=0)
        chosen = self.model(run=(lambda _: reft.choose_openers(engine, problems, args, draw)[0],))
        openers = broadcast(chosen.to(self.accelerator.device))
        self.model.train()
        openers = openers.view(-1, len(prompts))[self.accelerator.process_index].tolist()
        opened = [[*prompt, opener] for prompt, opener in zip(prompts, openers, strict=True)]
        tokens, logp = generate(opened, images, fields, copies // args.openers)
        tokens = [[opener, *row] for opener, row in zip(openers, tokens, strict=True)]
        return tokens, logp and [[math.nan, *row] for row in logp]

    def roll_out(self, rows: list[dict[str, Any]], group_size: int) -> list[common.Group]:
        """Generate and verify this process's rows; returns the whole groups of all processes."""
        _, tokens, _, texts, logp, *_ = self._generate([row["prompt"] for row in rows])
        logp = logp or [[math.nan] * len(ids) for ids in tokens]
        correct = map(float, self.grader.grade(texts, [row["answer"] for row in rows]))
        done = gather_object(list(zip(rows, tokens, logp, texts, correct, strict=True)))
        groups = []
        for start in range(0, len(done), group_size):
            (row, *_), *columns = zip(*done[start : start + group_size], strict=True)
            groups.append(common.Group(common.Problem(**row), *map(list, columns)))
        mode = self._metrics["train" if self.model.training else "eval"]
        mode["accuracy"].append(sum(sum(group.correct) for group in groups) / len(done))
        return groups

    def prediction_step(self, model: nn.Module, rows: list, *_: Any, **__: Any) -> tuple:
        self.roll_out(rows, self.settings.eval_samples)  # held-out problems have no loss
        return torch.zeros(1, device=self.accelerator.device), None, None

    @torch.no_grad()
    def score(self, rollouts: common.Rollouts) -> dict[str, Tensor]:
        """logp, entropy, ref_logp and ARCA's residual of all rollouts, [P, G, T] each. The script's
        micro-batches are dealt out to the processes: so the numbers are the script's to the bit."""
        args, processes, mask = self.settings, self.accelerator.num_processes, rollouts.mask
        policy, frozen = self.accelerator.unwrap_model(self.model), self.ref_model or self.model
        adapter_off = policy.disable_adapter if args.lora_rank else nullcontext
        budget, everything = 4 * args.token_budget, torch.arange(len(mask))  # as common.score
        batches = list(common.micro_batches(rollouts, budget, everything))
        names = ("logp", "entropy", "ref_logp", "residual")
        scores = {name: torch.zeros(mask.shape, device=mask.device) for name in names}
        for first in range(0, len(batches), processes):
            place = first + self.accelerator.process_index
            index = batches[place % len(batches)]  # at the end, again: all processes run as many
            scored = common.token_logp, rollouts, index, args
            states = common.hidden_states, rollouts, index, args
            found = dict(zip(names, self.model(run=scored), strict=False))
            if self.compares:
                with adapter_off():
                    found["ref_logp"], _ = frozen(run=scored)
            if args.method == "arca":
                adapted = self.model(run=states)
                with adapter_off():
                    norm = arca.residual_norm(adapted, self.model(run=states))
                found["residual"] = scores["residual"][index].masked_scatter(mask[index], norm)
            for name, values in found.items() if place < len(batches) else ():
                scores[name][index] = values
        self.model.train()
        return self.accelerator.reduce(scores)

    def _generate_and_score_completions(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A step up to its update: like the scripts, but for whose the rows are."""
        args, where = self.settings, self.accelerator.device
        groups = self.roll_out(rows, args.group_size)
        number = self.state.global_step // args.updates_per_rollout + 1
        if args.method == "vineppo":
            engine = SharedOut(args, self.model, self.processing_class, context=0)
            measured = engine, self.grader, groups, args, (args.seed, number, 0)
            self.model(run=(lambda _: vineppo.estimate_values(*measured),))
        self.rollouts = common.stack(groups, self.eos_token_ids, where)
        mask, lengths = self.rollouts.mask, self.rollouts.mask.sum(-1)
        step = self.whole = SimpleNamespace(mask=mask, **self.score(self.rollouts))
        step.groups, step.number = groups, number
        step.correct = torch.tensor([group.correct for group in groups], device=where)  # [P, G]
        penalty = grpo.overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
        step.rewards = step.correct + penalty
        step.advantages = method_advantages(args, step)
        # Of several updates, each has its part of the step's weights.
        weights = grpo.token_weights(mask, args.loss_average, args.max_new_tokens)
        importance = common.importance_weights(self.rollouts, step.logp, args.importance_cap)
        step.weights = weights * importance * args.updates_per_rollout
        step.weights[..., 0] *= not getattr(args, "mask_opener", False)
        self._metrics["train"]["entropy"].append(step.entropy[mask].mean().item())
        order = torch.arange(lengths.numel(), device=where).view(-1, len(rows))
        return {"rollout": order[self.accelerator.process_index]}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        index = torch.unravel_index(inputs["rollout"], self.rollouts.mask.shape[:2])
        logp, _ = model(run=(common.token_logp, self.rollouts, index, self.settings))
        loss = method_loss(self.settings, self.whole, logp, index) * self.whole.weights[index]
        return loss.sum() * self.accelerator.num_processes  # whose gradients are averaged


def make_trainer(args: Any) -> MethodTrainer:
    check_layout(args, PartialState(cpu=device(args).type == "cpu").num_processes)
    grader, tokenizer = Grader(), load_tokenizer(args)
    train = common.load_problems(args, "--dataset", tokenizer, grader)
    train = train.take(args.steps * args.prompts_per_step, args.seed)  # in the script's order
    held_out = common.load_problems(args, "--eval-dataset", tokenizer, grader)
    return MethodTrainer(args, train, held_out[: args.eval_problems], grader, tokenizer)


if __name__ == "__main__":
    trainer = make_trainer(parse(sys.argv[1:]))
    trainer.train(resume_from_checkpoint=trainer.settings.resume or None)
    trainer.save_model(f"{trainer.settings.run_dir}/model")
    trainer.accelerator.end_training()
