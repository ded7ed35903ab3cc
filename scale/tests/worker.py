"""What test_trl_trainer.py runs: the scripts, one process; or the trainer, under accelerate.

python scale/tests/worker.py script FOLDER METHOD ...
accelerate launch --cpu --num_processes 2 scale/tests/worker.py compare FOLDER METHOD ...
accelerate launch --cpu --num_processes 2 scale/tests/worker.py train FOLDER METHOD ...
accelerate launch --cpu --num_processes 2 scale/tests/worker.py sharded FOLDER vineppo
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
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trl_trainer  # puts the repository on the path
from trl_trainer import SCRIPTS, MethodTrainer, arca, common, holderpo, vineppo

from data import prompt_tokens
from engine import Transformers, load_policy, load_tokenizer, load_weights
from grading import Grader
from run import learning_rate, parse_args

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
    "reft": "--candidates 6 --openers 2 --mask-opener",
    "vineppo": "--continuations 3 --kl 0.04 --overlong-buffer 8",
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
    """How far the trainer's step is from the script's second one: the largest differences."""
    rows = last_step(folder / method / "rollouts.jsonl")
    metrics = last_step(folder / method / "metrics.jsonl")[0]
    args = trl_trainer.parse(
        ["--method", method, "--steps", "1", *flags(method, folder / f"{method}-trl")]
    )
    tokenizer = load_tokenizer(args)
    problems = [
        common.Problem(row["problem"], row["answer"], prompt_tokens(tokenizer, row["problem"]))
        for row in rows[::G]
    ]
    trainer = MethodTrainer(args, problems, problems[:2], Grader(), tokenizer)
    trainer.args.eval_on_start, trainer.args.eval_strategy, trainer.args.save_strategy = (
        0,
        "no",
        "no",
    )
    load_weights(trainer.model, folder / method / "checkpoints" / "step-000001")
    gaps: dict[str, float] = {}

    def gap(name: str, ours: Tensor, theirs: list[list[float]]) -> None:
        """Of this process's rollouts; ours: [rows, T], theirs: lists of tokens."""
        pairs = zip(ours.tolist(), theirs, strict=True)
        gaps[name] = max(abs(a - b) for row, list in pairs for a, b in zip(row, list, strict=False))
        assert all(
            not any(row[len(list) :]) for row, list in zip(ours.tolist(), theirs, strict=True)
        )

    def shape(inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        own = share(trainer, len(inputs))
        mine = [row["tokens"] for row in rows[own]]
        trainer._generate_single_turn = lambda *_: (mine, None)  # the script's rollouts
        batch = of_class(inputs)
        gap(
            "advantages",
            trainer.whole.advantages.flatten(0, 1)[own],
            [row["advantage"] for row in rows[own]],
        )
        gap("logp", trainer.whole.logp.flatten(0, 1)[own], [row["logp"] for row in rows[own]])
        if method == "arca":
            gap("credit", credits[-1].flatten(0, 1)[own], [row["credit"] for row in rows[own]])
        if method == "holderpo":
            gaps["loss"] = holder_gap(trainer, batch)
        return batch

    def measure(*measured: Any) -> None:
        """With the seed of the script's step."""
        assert measured[-1] == (args.seed, 1, 0)
        of_script(*measured[:-1], (args.seed, 2, 0))

    of_script, vineppo.estimate_values = vineppo.estimate_values, measure
    of_class, credits, weigh = trainer._generate_and_score_completions, [], arca.credit_weights
    trainer._generate_and_score_completions = shape
    arca.credit_weights = lambda *a, **k: credits.append(weigh(*a, **k)) or credits[-1]
    trainer.train()
    arca.credit_weights, vineppo.estimate_values = weigh, of_script
    log = next(row for row in trainer.state.log_history if "grad_norm" in row)
    gaps["mean_loss"] = abs(log["loss"] - metrics["loss"])
    gaps["grad_norm"] = abs(log["grad_norm"] / metrics["grad_norm"] - 1)
    gaps["reward"] = abs(log["accuracy"] - metrics["accuracy"])
    gaps["largest_advantage"] = max(abs(a) for row in rows for a in row["advantage"])
    return gaps


def share(trainer: MethodTrainer, count: int) -> slice:
    """The rows of this process."""
    return slice(first := trainer.accelerator.process_index * count, first + count)


def holder_gap(trainer: MethodTrainer, batch: dict[str, Tensor]) -> float:
    """Of the loss, where the policy has moved from the one that sampled."""
    step, args = trainer.whole, trainer.settings
    logp = step.logp.clone()
    step.logp = logp + 0.3 * torch.arange(logp.numel()).view(logp.shape).sin()
    with torch.no_grad():
        ours = trainer.accelerator.reduce(
            trainer._compute_loss(trainer.model, batch), "mean"
        ).item()
    rows = (values.flatten(0, 1) for values in (logp, step.logp, step.mask))
    advantages, p = step.advantages[..., 0].flatten(), holderpo.anneal_p(1, args.steps)
    theirs = holderpo.holder_loss(*rows, advantages, p, clip=args.clip).item()
    step.logp = logp
    return abs(ours - theirs)


def train(folder: Path, method: str) -> dict[str, Any]:
    """Five steps; whether the processes then hold the same weights, other than at first."""
    command = ["--method", method, "--steps", "5", *flags(method, folder / f"{method}-5")]
    command += ["--lr-schedule", "linear", "--warmup-ratio", "0.4"]
    trainer = trl_trainer.make_trainer(trl_trainer.parse(command))
    openers = []
    roll_out = trainer._generate

    def watched(prompts: list[Any]) -> tuple:
        output = roll_out(prompts)
        if trainer.model.training:
            openers.append([ids[0] for ids in gather_object(output[1])])
        return output

    trainer._generate = watched
    first = digest(trainer.model)
    trainer.train()
    last = gather_object([digest(trainer.model)])
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    steps = range(1, trainer.settings.steps + 1)
    kinds = [len({*step[start : start + G]}) for step in openers for start in range(0, P * G, G)]
    return {
        "same": len({*last}) == 1,
        "moved": last[0] != first,
        "losses": [row["loss"] for row in rows],
        "rates": [row["learning_rate"] for row in rows],
        "script_rates": [learning_rate(step, trainer.settings) for step in steps],
        "openers": kinds,
    }


@torch.no_grad()
def sharded(folder: Path, method: str) -> dict[str, Any]:
    """Values measured over whole weights, and over those that FSDP2 shards; the passes of this
    process for each."""
    own_ends = ["--max-new-tokens", "64", "--temperature", "1"]  # not the limit's
    args = trl_trainer.parse(["--method", method, *flags(method, folder), *own_ends])
    tokenizer, grader, policy = load_tokenizer(args), Grader(), load_policy(args)
    problems = common.load_problems(args, "--dataset", tokenizer, grader).take(P, args.seed)
    engine = Transformers(args, policy, tokenizer, context=0)
    groups = common.roll_out(engine, problems, args, (args.seed,))
    engine, found, passes = trl_trainer.SharedOut(args, policy, tokenizer, context=0), {}, []
    policy.model.register_forward_hook(lambda *_: passes.append(1))

    def measure(weights: str) -> None:
        passes.clear()
        vineppo.estimate_values(engine, grader, groups, args, (args.seed,))
        values = [group.notes.pop(0)[1] for group in groups for _ in group.tokens]
        found[weights] = {"values": values, "passes": len(passes)}

    measure("whole")
    trl_trainer.run_inside(policy, sharded=True)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for module in (*policy.model.layers, policy):
        fully_shard(module, mesh=mesh)
    policy(run=(lambda _: measure("sharded"),))
    return found


def digest(model: torch.nn.Module) -> str:
    weights = [weight.detach().numpy().tobytes() for weight in model.parameters()]
    return hashlib.sha256(b"".join(weights)).hexdigest()


MODES = {"compare": compare, "train": train, "sharded": sharded}


def main(mode: str, folder: str, *methods: str) -> None:
    if mode == "script":
        return [run_script(Path(folder), method) for method in methods] and None
    PartialState(cpu=True)  # as make_trainer does, before a trainer asks for the processes
    results = {}
    for method in methods:
        found = gather_object([MODES[mode](Path(folder), method)])
        results[method] = found
    processes = len(found)
    if PartialState().is_main_process:
        Path(folder, f"{mode}-{processes}.json").write_text(json.dumps(results, indent=1))
    PartialState().destroy_process_group()
    os._exit(0)  # at a usual exit gloo's threads abort the process now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
