"""What test_trl_trainer.py runs: the scripts, one process; or the trainer, under accelerate.

python scale/tests/worker.py script FOLDER METHOD ...
accelerate launch --cpu --num_processes 2 scale/tests/worker.py compare FOLDER METHOD ...
accelerate launch --cpu --num_processes 2 scale/tests/worker.py train FOLDER METHOD ...
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trl_trainer  # puts the repository on the path
from trl_trainer import SCRIPTS, MethodTrainer, arca, common, holderpo

from infra.cli import parse_args
from infra.data import prompt_tokens
from infra.models import load_weights

ROOT = Path(__file__).resolve().parents[2]
P, G = 3, 4  # twelve rollouts: two processes share the second group
FLAGS = f"--model {ROOT}/tiny --dataset {ROOT}/tiny/train.jsonl --prompts-per-step {P}"
FLAGS += " --token-budget 75"  # several micro-batches, which two processes share
FLAGS += f" --eval-dataset {ROOT}/tiny/test.jsonl --eval-problems 2 --eval-samples 2 --eval-every 0"
FLAGS += f" --group-size {G} --max-new-tokens 40 --temperature 1.2 --lr 2e-3 --device cpu"
OWN = {
    "grpo": "--kl 0.04 --overlong-buffer 8",
    "ep_grpo": "--eta 0.3 --kl 0.04",
    "erpo": "--eta 0.3 --sigma-target 0.5",
    "gtpo": "--overlong-gamma 0.75",
    "grpo_s": "--overlong-gamma 0.75",
    "holderpo": "--updates-per-rollout 1",
    "arca": "--lora-rank 4",
    "forking": "--top 0.3 --kl 0.04",
    "lambda_grpo": "--kl 0.04",
    "reft": "--candidates 6 --openers 2 --mask-opener",
}


def flags(method: str, run_dir: Path) -> list[str]:
    return [*FLAGS.split(), *OWN.get(method, "").split(), "--run-dir", str(run_dir)]


def run_script(folder: Path, method: str) -> None:
    """Two steps of the single-file script; the second one starts from a policy that has moved."""
    command = [*flags(method, folder / method), "--steps", "2", "--save-every", "1"]
    command += ["--log-rollouts", str(P), "--engine", "transformers"]
    command += ["--level", "sequence"] if method == "grpo_s" else []
    script = SCRIPTS[method]
    script.main(parse_args(script.Args, command))


def last_step(file: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, file.read_text().splitlines()) if row["step"] == 2]


def compare(folder: Path, method: str) -> dict[str, float]:
    """The largest differences between the trainer's step and the script's second one."""
    rows = last_step(folder / method / "rollouts.jsonl")
    [metrics] = last_step(folder / method / "metrics.jsonl")
    command = ["--method", method, "--steps", "1", *flags(method, folder / f"{method}-trl")]
    args = trl_trainer.parse(command)
    tokenizer = common.load_tokenizer(args)
    problems = []
    for row in rows[::G]:
        prompt = prompt_tokens(tokenizer, row["problem"])
        problems.append(common.Problem(row["problem"], row["answer"], prompt))
    trainer = MethodTrainer(args, problems, problems[:2], common.Grader(), tokenizer)
    trainer.args.eval_on_start = False
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    load_weights(trainer.model, folder / method / "checkpoints" / "step-000001")
    gaps: dict[str, float] = {}
    credits: list[Tensor] = []
    generate_and_score = trainer._generate_and_score_completions
    credit_weights = arca.credit_weights

    def watched_step(inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The trainer's step with the script's rollouts of this process."""
        first = trainer.accelerator.process_index * len(inputs)
        own = slice(first, first + len(inputs))
        tokens = [row["tokens"] for row in rows[own]]
        trainer._generate_single_turn = lambda *_: (tokens, None)
        batch = generate_and_score(inputs)
        compared = {"advantage": trainer.step.advantages, "logp": trainer.step.logp}
        if method == "arca":
            compared["credit"] = credits[-1]
        for name, values in compared.items():
            theirs = [row[name] for row in rows[own]]
            gaps[name] = largest_gap(values.flatten(0, 1)[own].tolist(), theirs)
        if method == "holderpo":
            gaps["loss"] = holder_gap(trainer, batch)
        return batch

    def watched_credit(*inputs: Any, **flags: Any) -> Tensor:
        credits.append(credit_weights(*inputs, **flags))
        return credits[-1]

    trainer._generate_and_score_completions = watched_step
    arca.credit_weights = watched_credit
    trainer.train()
    arca.credit_weights = credit_weights
    log = next(row for row in trainer.state.log_history if "grad_norm" in row)
    gaps["mean_loss"] = abs(log["loss"] - metrics["loss"])
    gaps["grad_norm"] = abs(log["grad_norm"] / metrics["grad_norm"] - 1)
    gaps["accuracy"] = abs(log["accuracy"] - metrics["accuracy"])
    gaps["largest_advantage"] = max(abs(a) for row in rows for a in row["advantage"])
    return gaps


def largest_gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """ours: padded rows, which must be 0 beyond the end of theirs."""
    gaps = [0.0]
    for row, other in zip(ours, theirs, strict=True):
        assert not any(row[len(other) :])
        gaps += [abs(a - b) for a, b in zip(row, other, strict=False)]
    return max(gaps)


def holder_gap(trainer: MethodTrainer, batch: dict[str, Tensor]) -> float:
    """The difference of losses when the policy has moved away from the one that sampled."""
    step, args = trainer.step, trainer.settings
    logp = step.logp
    step.logp = logp + 0.3 * torch.arange(logp.numel()).view(logp.shape).sin()
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, batch)
    ours = trainer.accelerator.reduce(loss, "mean").item()
    rows = [values.flatten(0, 1) for values in (logp, step.logp, step.mask)]
    advantages = step.advantages[..., 0].flatten()
    p = holderpo.anneal_p(1, args.steps)
    theirs = holderpo.holder_loss(*rows, advantages, p, clip=args.clip).item()
    step.logp = logp
    return abs(ours - theirs)


def script_rates(args: common.RunArgs) -> list[float]:
    """The learning rate of each update, as the scripts' loop uses it."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler = common.get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.updates)
    rates = []
    for _ in range(args.updates):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return rates


def train(folder: Path, method: str) -> dict[str, Any]:
    """Five steps, after which all processes must hold the same weights, other than at first."""
    command = ["--method", method, "--steps", "5", *flags(method, folder / f"{method}-5")]
    command += ["--lr-schedule", "linear", "--warmup-ratio", "0.4"]
    trainer = trl_trainer.make_trainer(trl_trainer.parse(command))
    generate, distinct = trainer._generate, []

    def watched_generate(prompts: list[Any]) -> tuple:
        output = generate(prompts)
        if trainer.model.training:
            first_tokens = gather_object([row[0] for row in output[1]])
            for start in range(0, P * G, G):
                distinct.append(len({*first_tokens[start : start + G]}))
        return output

    trainer._generate = watched_generate
    first = digest(trainer.model)
    trainer.train()
    last = gather_object([digest(trainer.model)])
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return {
        "same": len({*last}) == 1,
        "moved": last[0] != first,
        "losses": [row["loss"] for row in rows],
        "rates": [row["learning_rate"] for row in rows],
        "script_rates": script_rates(trainer.settings),
        "openers": distinct,
    }


def digest(model: torch.nn.Module) -> str:
    weights = [weight.detach().numpy().tobytes() for weight in model.parameters()]
    return hashlib.sha256(b"".join(weights)).hexdigest()


MODES = {"compare": compare, "train": train}


def main(mode: str, folder: str, *methods: str) -> None:
    if mode == "script":
        for method in methods:
            run_script(Path(folder), method)
        return
    state = PartialState(cpu=True)  # as make_trainer does, before a trainer asks for the processes
    results = {}
    for method in methods:
        results[method] = gather_object([MODES[mode](Path(folder), method)])
    if state.is_main_process:
        Path(folder, f"{mode}-{state.num_processes}.json").write_text(json.dumps(results, indent=1))
    state.destroy_process_group()
    os._exit(0)  # at a usual exit gloo's threads abort the process now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
