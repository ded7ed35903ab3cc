"""What the tests of the trainer run: the scripts, one process; or the trainer, under accelerate.

python scale/tests/worker.py script FOLDER METHOD ...
accelerate launch ... scale/tests/worker.py compare FOLDER METHOD ...
accelerate launch ... scale/tests/worker.py train FOLDER METHOD ...
accelerate launch ... scale/tests/worker.py follow FOLDER VARIANT ...
accelerate launch ... scale/tests/worker.py command WORDS ...
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trl_trainer  # puts the repository on the path
from trl_trainer import SCRIPTS, MethodTrainer, arca, common

import holderpo
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
    "fipo": "--updates-per-rollout 3 --half-life 4",
    "stare": "--kl 0.04",
}
# The step of the script that is compared. The second one starts from a policy that has moved. With
# several updates it is the first one, for which AdamW has no state in the trainer either.
COMPARED = {"fipo": 1}
VARIANTS = {
    "grpo": "",
    "updates": "--prompts-per-step 4 --updates-per-rollout 2",
    "lora": "--lora-rank 8",
}


def flags(method: str, run_dir: Path) -> list[str]:
    return [*FLAGS.split(), *OWN.get(method, "").split(), "--run-dir", str(run_dir)]


def run_script(folder: Path, method: str) -> None:
    """Two steps of the single-file script."""
    command = [*flags(method, folder / method), "--steps", "2", "--save-every", "1"]
    command += ["--log-rollouts", str(P), "--engine", "transformers"]
    command += ["--level", "sequence"] if method == "grpo_s" else []
    script = SCRIPTS[method]
    script.main(parse_args(script.Args, command))


def rows_of_step(file: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, file.read_text().splitlines()) if row["step"] == step]


def compare(folder: Path, method: str) -> dict[str, float]:
    """The largest differences between the trainer's step and one of the script's."""
    number = COMPARED.get(method, 2)
    rows = rows_of_step(folder / method / "rollouts.jsonl", number)
    [metrics] = rows_of_step(folder / method / "metrics.jsonl", number)
    command = ["--method", method, "--steps", "1", *flags(method, folder / f"{method}-trl")]
    args = trl_trainer.parse(command)
    tokenizer = common.load_tokenizer(args)
    problems = []
    for row in rows:  # FIPO's advantages are logged times its weights
        influence = row.get("influence", [1.0] * len(row["advantage"]))
        pairs = zip(row["advantage"], influence, strict=True)
        row["advantage"] = [advantage / weight for advantage, weight in pairs]
    for row in rows[::G]:
        prompt = prompt_tokens(tokenizer, [{"role": "user", "content": row["problem"]}])
        problems.append(common.Problem(row["problem"], row["answer"], prompt))
    trainer = MethodTrainer(args, problems, problems[:2], common.Grader(), tokenizer)
    trainer.args.eval_on_start = False
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    if number == 2:
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
        compared = {"advantage": trainer.step.advantages, "logp": trainer.step.old_logp}
        if method == "arca":
            compared["credit"] = credits[-1]
        for name, values in compared.items():
            theirs = [row[name] for row in rows[own]]
            gaps[name] = largest_gap(values.flatten(0, 1)[own].tolist(), theirs)
        if method == "holderpo":
            gaps["loss"] = holder_gap(trainer)
        return batch

    def watched_credit(*inputs: Any, **flags: Any) -> Tensor:
        credits.append(credit_weights(*inputs, **flags))
        return credits[-1]

    trainer._generate_and_score_completions = watched_step
    arca.credit_weights = watched_credit
    trainer.train()
    arca.credit_weights = credit_weights
    log = [row for row in trainer.state.log_history if "grad_norm" in row][-1]
    accuracy = next(row["accuracy"] for row in trainer.state.log_history if "accuracy" in row)
    gaps["mean_loss"] = abs(log["loss"] - metrics["loss"])
    gaps["grad_norm"] = abs(log["grad_norm"] / metrics["grad_norm"] - 1)
    gaps["accuracy"] = abs(accuracy - metrics["accuracy"])
    gaps["largest_advantage"] = max(abs(a) for row in rows for a in row["advantage"])
    gaps["advantage"] /= max(1.0, gaps["largest_advantage"])  # ARCA's are up to T times GRPO's
    return gaps


def largest_gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """ours: padded rows, which must be 0 beyond the end of theirs."""
    gaps = [0.0]
    for row, other in zip(ours, theirs, strict=True):
        assert not any(row[len(other) :])
        gaps += [abs(a - b) for a, b in zip(row, other, strict=False)]
    return max(gaps)


def holder_gap(trainer: MethodTrainer) -> float:
    """The difference of losses when the policy has moved away from the one that sampled."""
    step, args = trainer.step, trainer.settings
    logp, batches = step.old_logp, step.batches
    step.batches = batches.view(1, -1)
    step.old_logp = logp + 0.3 * torch.arange(logp.numel()).view(logp.shape).sin()
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, {})
    ours = trainer.accelerator.reduce(loss, "mean").item()
    rows = [values.flatten(0, 1) for values in (logp, step.old_logp, step.mask)]
    advantages = step.advantages[..., 0].flatten()
    p = holderpo.anneal_p(1, args.steps)
    theirs = holderpo.holder_loss(*rows, advantages, p, clip=args.clip).item()
    step.old_logp, step.batches = logp, batches
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
    run_dir = folder / f"{method}-5"
    command = ["--method", method, "--steps", "5", *flags(method, run_dir)]
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
    trainer.save_model(str(run_dir / "model"))
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return {
        "sharded": is_sharded(trainer.model),
        "same": len({*last}) == 1,
        "moved": last[0] != first,
        "weights": last[0],
        "losses": [row["loss"] for row in rows],
        "rates": [row["learning_rate"] for row in rows],
        "script_rates": script_rates(trainer.settings),
        "openers": distinct,
    }


def follow(folder: Path, variant: str) -> dict[str, Any]:
    """Five steps of GRPO. One process writes its rollouts, several train on those that it wrote."""
    state = PartialState()
    name = f"{variant}-{state.num_processes}"
    command = ["--method", "grpo", "--steps", "5", *FLAGS.split(), *VARIANTS[variant].split()]
    command += ["--run-dir", str(folder / f"{name}-{is_fsdp()}"), "--lr", "1e-3"]
    trainer = trl_trainer.make_trainer(trl_trainer.parse(command))
    trainer.args.eval_on_start = False
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    rollouts = folder / f"{variant}-rollouts.json"
    recorded = json.loads(rollouts.read_text()) if state.num_processes > 1 else []
    generate, step = trainer._generate_single_turn, 0

    def replayed(prompts: list[Any], *rest: Any) -> tuple:
        nonlocal step
        if state.num_processes == 1:
            recorded.append(generate(prompts, *rest)[0])
        first = state.process_index * len(prompts)
        tokens = recorded[step][first : first + len(prompts)]
        step += 1
        return tokens, None

    trainer._generate_single_turn = replayed
    first = whole_weights(trainer.model)
    trainer.train()
    last = whole_weights(trainer.model)
    if state.num_processes == 1:
        rollouts.write_text(json.dumps(recorded))
        torch.save(last, folder / f"{variant}-weights.pt")
    expected = torch.load(folder / f"{variant}-weights.pt")
    assert last.keys() == expected.keys()
    return {
        "sharded": is_sharded(trainer.model),
        "gap": max((last[name] - expected[name]).abs().max().item() for name in last),
        "moved": max((last[name] - first[name]).abs().max().item() for name in last),
        "weights": digest(trainer.model),
        "updates": trainer.state.global_step,
    }


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, gathered if they are sharded."""
    weights = {}
    for name, weight in model.named_parameters():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weights[name.removeprefix("module.")] = whole.detach().clone()
    return weights


def digest(model: torch.nn.Module) -> str:
    weights = [weight.numpy().tobytes() for weight in whole_weights(model).values()]
    return hashlib.sha256(b"".join(weights)).hexdigest()


def is_sharded(model: torch.nn.Module) -> bool:
    return all(isinstance(weight, DTensor) for weight in model.parameters())


def is_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard_on_cpu() -> None:
    """Have accelerate apply FSDP2 to CPU processes, which it does only to those with GPUs."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


class Kill(TrainerCallback):
    """SIGKILL for all processes at the end of an update, before it is saved."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def command(*words: str) -> None:
    """What `trl_trainer.py WORDS` does. Killed at the update that KILL_AT names.

    With ALONE in the environment, accelerate takes each process for the only one.
    """
    make_trainer = trl_trainer.make_trainer

    def make_mortal(args: Any) -> MethodTrainer:
        trainer = make_trainer(args)
        trainer.add_callback(Kill(int(os.environ.get("KILL_AT", 0))))
        return trainer

    trl_trainer.make_trainer = make_mortal
    if "ALONE" in os.environ:
        PartialState._prepare_backend = lambda *_, **__: (None, DistributedType.NO)
    trl_trainer.main([*words])


MODES = {"compare": compare, "train": train, "follow": follow}


def main(mode: str, *words: str) -> None:
    if is_fsdp():
        shard_on_cpu()
    if mode == "script":
        for method in words[1:]:
            run_script(Path(words[0]), method)
        return
    if mode == "command":
        command(*words)
    else:
        results_of(mode, Path(words[0]), words[1:])
    PartialState().destroy_process_group()
    os._exit(0)  # at a usual exit gloo's threads abort the process now and then


def results_of(mode: str, folder: Path, names: tuple[str, ...]) -> None:
    """Write what each process returns for each name."""
    state = PartialState(cpu=True)  # as make_trainer does, before a trainer asks for the processes
    results = {}
    for name in names:
        results[name] = gather_object([MODES[mode](folder, name)])
    if state.is_main_process:
        Path(folder, f"{mode}-{state.num_processes}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
