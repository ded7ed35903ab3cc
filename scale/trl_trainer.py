"""All methods except VinePPO on many GPUs: TRL's GRPOTrainer with the functions of the scripts.

TRL generates, shards weights and saves. Commands are in docs/scale.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import arca
import common
import grpo
import reft
from infra.cli import flag_of, load_settings, parse_args
from infra.models import freeze_routers
from infra.run import atomic_write
from scale import trl_methods as methods
from scale.trl_methods import SCRIPTS, pick

SCRIPTS_ONLY = ("engine", "gpu_memory", "max_logp_gap", "log_rollouts", "wandb_project", "credit")
SCRIPTS_ONLY += ("dynamic_sampling", "generation_rounds")


@dataclasses.dataclass
class ScaleArgs:
    method: Literal[tuple(SCRIPTS)] = "grpo"  # grpo_s is gtpo with --level sequence
    micro_batch: int = 4  # at most so many rollouts per process in one pass of the update
    vllm_server: str = ""  # such as http://localhost:8000; empty: the policy generates


def parse(command: list[str]) -> Any:
    """The settings of the method's script, and ScaleArgs. With --resume, those of the run."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="grpo")
    first.add_argument("--resume")
    asked = first.parse_known_args(command)[0]
    method, folder = asked.method, asked.resume
    why = "runs only as vineppo.py: its continuations need an engine of their own"
    common.require(method != "vineppo", "--method", method, why)
    if folder:
        method = load_settings(lambda method, **_: method, Path(__file__).stem, folder)
    script = SCRIPTS.get(method, grpo)
    settings = dataclasses.make_dataclass("Args", [], bases=(ScaleArgs, script.Args))
    settings.__module__ = __name__  # its file names the script in args.json
    args = parse_args(settings, command)
    args.run_dir = args.run_dir or f"runs/{args.method}-{args.seed}-scale"
    return dataclasses.replace(args, level="sequence") if method == "grpo_s" else args


def last_checkpoint(args: Any) -> Path | None:
    """The newest complete checkpoint of the run: trainer_state.json is written last."""
    complete = Path(args.run_dir).glob("checkpoint-*/trainer_state.json")
    folders = [file.parent for file in complete]
    return max(folders, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def check_layout(args: Any, processes: int) -> None:
    """Reject processes that did not join, what only the scripts do, and groups that do not divide.

    processes: the number of those that joined.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    why = f"only {processes} joined, so each would train alone"
    common.require(processes == launched, "--num_processes", launched, why)

    for setting in dataclasses.fields(args):
        value = getattr(args, setting.name)
        served = setting.name not in SCRIPTS_ONLY or value == setting.default
        common.require(served, flag_of(setting.name), value, "only the single-file scripts do")
    common.require(args.micro_batch > 0, "--micro-batch", args.micro_batch, "must be at least 1")

    rollouts, updates = args.prompts_per_step * args.group_size, args.updates_per_rollout
    why = f"{rollouts} rollouts do not divide by {processes} processes x {updates} updates"
    common.require(rollouts % (processes * updates) == 0, "--group-size", args.group_size, why)

    mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    why = f"accelerate launch has --mixed_precision {mixed_precision}, which would override it"
    is_same = mixed_precision == "no" or common.precision(args) is not torch.float32
    common.require(is_same, "--precision", args.precision, why)

    is_new = args.resume or not any(Path(args.run_dir).glob("checkpoint*"))
    why = f"holds a run; resume it with --resume {args.run_dir}"
    common.require(is_new, "--run-dir", args.run_dir, why)


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
    micro_batch = max(n for n in range(1, args.micro_batch + 1) if rows // updates % n == 0)
    uses_reference = args.method in ("ep_grpo", "erpo") or getattr(args, "kl", 0) > 0

    return GRPOConfig(
        **pick(args, "temperature", "max_grad_norm", "weight_decay"),
        **pick(args, "gradient_checkpointing", "trust_remote_code"),
        seed=args.seed % 2**32,  # NumPy takes 32 bits
        output_dir=args.run_dir,
        use_cpu=common.device(args).type == "cpu",
        bf16=common.precision(args) is torch.bfloat16,
        model_init_kwargs=methods.model_options(args),
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
        eval_on_start=last_checkpoint(args) is None,
        eval_steps=(args.eval_every or args.steps) * updates,
        save_steps=(args.save_every or args.steps) * updates,
        save_total_limit=args.keep_checkpoints,
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
        freeze_routers(self.model)

        self.engine = common.Engine(args, self.model, tokenizer)
        self.eos_token_ids = self.engine.stop_tokens
        if args.vllm_server:
            self.vllm_generation.generation_kwargs["stop_token_ids"] = self.eos_token_ids
        else:
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
            self.generation_config.eos_token_id = self.eos_token_ids

        for model in filter(None, (self.model, self.ref_model)):
            model = common.base_model(self.accelerator.unwrap_model(model))
            run_inside(model, self.is_fsdp_enabled)

    def _prepare_for_training(self, *args: Any) -> tuple:
        prepared = super()._prepare_for_training(*args)
        sharded = all(isinstance(weight, DTensor) for weight in self.model.parameters())
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false")
        why = "the parameters are whole: FSDP2 did not shard them (fsdp_version 2, on GPUs)"
        common.require(sharded or asked != "true", "ACCELERATE_USE_FSDP", asked, why)
        return prepared

    def _generate_single_turn(self, prompts: list, images: Any, fields: Any, copies: int) -> tuple:
        """With REFT, rollouts begin with the first tokens that its script chooses for the step."""
        args, generate = self.settings, super()._generate_single_turn
        if args.method != "reft" or not self.model.training:
            return generate(prompts, images, fields, copies)

        of_step = gather_object(prompts)[::copies]
        seed = common.seed_for(args.seed, self.state.global_step, "openers")
        draw = torch.Generator().manual_seed(seed)
        chosen, _ = reft.choose_openers(self.model, self.engine, of_step, args, draw)
        self.model.train()
        chosen = broadcast(chosen.to(self.accelerator.device)).view(-1, len(prompts))
        first = chosen[self.accelerator.process_index].tolist()

        opened = [[*prompt, token] for prompt, token in zip(prompts, first, strict=True)]
        rows, logp = generate(opened, images, fields, copies // args.openers)
        rows = [[token, *row] for token, row in zip(first, rows, strict=True)]
        return rows, logp and [[math.nan, *row] for row in logp]

    def roll_out(self, rows: list[dict[str, Any]], group_size: int) -> list[common.Group]:
        """Generate and verify this process's rows. Returns the groups of all processes."""
        _, tokens, _, _, logp, *_ = self._generate([row["prompt"] for row in rows])
        texts = self.engine.decode(tokens)
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
        problems = torch.arange(len(mask))  # processes share the micro-batches
        batches = [*common.micro_batches(rollouts, 4 * args.token_budget, problems, False)]

        self.model.eval()
        scores = torch.zeros(4, *mask.shape, device=mask.device)
        for first in range(0, len(batches), processes):
            place = first + self.accelerator.process_index
            index = batches[place % len(batches)]  # every process runs equally many passes
            tokens = methods.token_logp, rollouts, index, args
            states = methods.hidden_states, rollouts, index, args
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

        freeze_routers(self.model)  # peft unfreezes all adapters that it enables again
        self.model.train()
        return self.accelerator.reduce(scores)

    def _generate_and_score_completions(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A step of the script up to its update, with each process's share of the rollouts."""
        args = self.settings
        groups = self.roll_out(rows, args.group_size)
        step = common.stack(groups, self.eos_token_ids, self.accelerator.device)
        mask, lengths, self.step = step.mask, step.mask.sum(-1), step
        step.number = self.state.global_step // args.updates_per_rollout + 1
        step.old_logp, step.entropy, step.ref_logp, step.residual = self.score(step)

        penalty = common.overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
        step.rewards = step.correct + penalty
        step.advantages = methods.method_advantages(args, step)

        self._metrics["train"]["entropy"].append(step.entropy[mask].mean().item())
        seed = common.seed_for(args.seed, step.number, "updates")
        shares = common.shuffled_shares(len(groups), args.updates_per_rollout, seed)
        step.weights = sum(methods.update_weights(args, step, share) for share in shares)

        # Processes divide the rollouts of each update: [updates, processes, rollouts].
        order = torch.arange(lengths.numel()).view(lengths.shape)[torch.cat(shares)]
        order = order.view(len(shares), self.accelerator.num_processes, -1)
        own = order[:, self.accelerator.process_index].to(mask.device)
        step.batches = own.reshape(self.args.steps_per_generation, -1)
        return {"rollout": own.flatten()}  # TRL shuffles it, which `batches` are not

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        args, step = self.settings, self.step
        rollouts = step.batches[self._step % len(step.batches)]
        index = torch.unravel_index(rollouts, step.correct.shape)
        logp, _ = model(run=(methods.token_logp, step, index, args))
        loss = methods.method_loss(args, step, logp, index) * step.weights[index]
        # Micro-batches add up, by weights of the whole update; DDP and FSDP average gradients.
        return loss.sum() * self.accelerator.num_processes


def make_trainer(args: Any) -> MethodTrainer:
    state = PartialState(cpu=common.device(args).type == "cpu")
    processes = state.num_processes
    check_layout(args, processes)
    grader, tokenizer = common.Grader(args.answer_format), common.load_tokenizer(args)
    train = common.load_problems(args, "--dataset", tokenizer, grader)
    train = train.take(args.steps * args.prompts_per_step, args.seed)  # in the script's order
    held_out = common.load_problems(args, "--eval-dataset", tokenizer, grader)
    count = min(len(held_out), args.eval_problems) // processes * processes
    if state.is_main_process:
        settings = {"script": Path(__file__).stem, **vars(args), "resume": ""}
        with atomic_write(Path(args.run_dir) / "args.json") as partial:
            partial.write_text(json.dumps(settings, indent=1))
    return MethodTrainer(args, train, held_out[:count], grader, tokenizer)


def main(command: list[str]) -> MethodTrainer:
    trainer = make_trainer(parse(command))
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.settings))
    trainer.save_model(f"{trainer.settings.run_dir}/model")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:]).accelerator.end_training()
