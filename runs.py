"""The run: its folder, its clock, its log, its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import files
from common import Rollouts
from models import base_model, load_weights, merged_weights
from settings import (
    StopRun,
    check,
    check_unchanged,
    device,
    parse_args,
    precision,
    refuse,
    resume_command,
    seed_for,
)

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


class Run:
    """A run's folder, its clock and its log.

    metrics.jsonl     one line a step           rollouts.jsonl   some rollouts of each step
    args.json         the settings              tensorboard/     the same metrics
    checkpoints/      step-000050/ and so on    model/           the final policy, ready to load
    """

    def __init__(self, args: Any, script: str) -> None:
        check(args)
        if args.resume and not args.run_dir:
            refuse("--resume", "", "needs --run-dir, the folder of the run to go on with")
        name = Path(script).stem
        args.run_dir = args.run_dir or time.strftime(f"runs/{name}-{args.seed}-%Y%m%d-%H%M%S")
        self.args = args
        self.settings = json.loads(json.dumps({"script": name} | dataclasses.asdict(args)))
        self.folder = Path(args.run_dir)
        self.lock = files.lock(self.folder)
        self.metrics_file = self.folder / "metrics.jsonl"
        self.rollouts_file = self.folder / "rollouts.jsonl"
        self.started = self.step_started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.step = self.failures = self.skipped = self.next_warning = 0
        self.interrupted = self.stopped = False

        if not args.resume and (self.metrics_file.exists() or self.checkpoints()):
            refuse("--run-dir", self.folder, "already holds a run; add --resume to go on with it")
        self.checkpoint = self.last_checkpoint() if args.resume else None
        if self.checkpoint:
            check_unchanged(args, self.settings, files.read_json(self.checkpoint / "args.json"))
            self.step = step_of(self.checkpoint)
            if self.is_finished():
                print(f"{self.folder} is finished: {self.step} steps; more --steps would go on")
                raise SystemExit(0)
        elif self.checkpoints():
            refuse("--resume", self.folder, "none of its checkpoints is whole")
        elif args.resume:
            say(f"{self.folder} holds no checkpoint: the run begins at step 0")
        first = self.step + 1 if self.checkpoint else 0
        for log in (self.metrics_file, self.rollouts_file):
            if damaged := files.keep_steps(log, first - 1):
                say(f"{log}: {damaged} damaged lines dropped")
        files.write_json(self.folder / "args.json", self.settings)
        self.open_boards(first)

    # -- steps and time

    def steps(self) -> Iterator[int]:
        """Step numbers from where the run stands to --steps; 1 is the first.

        Until the last, Ctrl-C and SIGTERM let the step end and be saved.
        """
        signals = signal.SIGINT, signal.SIGTERM
        before = [signal.signal(number, self.interrupt) for number in signals]
        try:
            while self.step < self.args.steps and not self.stopped:
                self.step_started, self.seconds, self.skipped = time.perf_counter(), {}, 0
                yield self.step + 1
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler or signal.SIG_DFL)

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C: finish the step and save. A second one stops at once. No print here: a print
        may be what was interrupted."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        os.write(2, b"\nfinishing the step, then saving; Ctrl-C again stops at once\n")

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Adds what runs inside to the step's seconds of that part."""
        start = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            raise self.out_of_memory(part) from error
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    # -- log

    def open_boards(self, first: int) -> None:
        """Start the boards and the progress bar; steps from `first` on will be written anew."""
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=first)
        self.wandb = None
        if self.args.wandb_project:
            import wandb

            self.wandb = wandb.init(
                project=self.args.wandb_project,
                name=self.folder.name,
                id=hashlib.blake2b(str(self.folder).encode(), digest_size=8).hexdigest(),
                resume="allow",
                config=self.settings,
            )
        self.bar = tqdm(
            total=self.args.steps, initial=self.step, disable=not sys.stderr.isatty(), unit="step"
        )

    def log(self, step: int, metrics: dict[str, float], tokens: int = 0) -> None:
        """Write one step's metrics everywhere they are shown."""
        total = time.perf_counter() - self.step_started
        metrics = {k: float(v) for k, v in metrics.items()}
        if tokens:
            metrics |= {f"seconds/{part}": spent for part, spent in self.seconds.items()}
            metrics["seconds/other"] = total - sum(self.seconds.values())
            metrics["seconds/step"] = total
            metrics["tokens_per_second"] = tokens / total
            metrics["skipped_updates"] = self.skipped
            self.report_collapse(step, metrics)
        files.append_line(self.metrics_file, {"step": step, **metrics})
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()  # or a kill would lose the last two minutes
        if self.wandb:
            self.wandb.log(metrics, step=step)
        self.step = step
        self.show(step, metrics)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """The progress bar, or a plain line now and then where output is no terminal."""
        shown = {k: metrics[k] for k in ("reward", "length", "entropy") if k in metrics}
        if step > 0:
            self.bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items()}, refresh=False)
            self.bar.update(step - self.bar.n)
        interval = ""
        if "eval/accuracy" in metrics:
            low, high = metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]
            shown["held-out"], interval = metrics["eval/accuracy"], f" [{low:.3f}, {high:.3f}]"
        if interval or (self.bar.disable and step % max(1, self.args.steps // 20) == 0):
            say(f"step {step}  " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()) + interval)

    def log_rollouts(
        self, step: int, rollouts: Rollouts, rewards: Tensor, **per_token: Tensor
    ) -> None:
        """Write the first --log-rollouts groups, with a value a token of each [P, G, T] given."""
        for p, problem in enumerate(rollouts.problems[: self.args.log_rollouts]):
            for g, text in enumerate(rollouts.texts[p]):
                live = rollouts.mask[p, g]
                row = {"step": step, "problem": problem.text, "answer": problem.answer}
                row |= {"rollout": g, "text": text, "reward": rewards[p, g].item()}
                row |= {"tokens": rollouts.tokens[p, g][live].tolist()}
                row |= {name: values[p, g][live].tolist() for name, values in per_token.items()}
                files.append_line(self.rollouts_file, row)

    # -- guards

    def check_engine(self, rollouts: Rollouts, old_logp: Tensor) -> dict[str, float]:
        """Compare the engine's log-probabilities with the trainer's; stop when they drift apart:
        then the engine does not hold the policy's weights."""
        if not old_logp[rollouts.mask].isfinite().all():
            raise StopRun(f"the policy's log-probabilities are not finite; {self.last_good()}")
        sampled = rollouts.mask & rollouts.engine_logp.isfinite()
        gap = (rollouts.engine_logp - old_logp)[sampled].abs()
        mean, most = gap.mean().item(), max(gap.tolist(), default=math.nan)
        allowed = self.args.max_logp_gap
        if allowed is None:
            allowed = 1e-4 if precision(self.args) is torch.float32 else 0.02
        if not mean <= allowed:
            raise StopRun(
                f"the engine's log-probabilities differ from the trainer's by {mean:.2g} on "
                f"average ({most:.2g} at most), more than --max-logp-gap {allowed:g}: "
                "the engine does not hold the policy's weights"
            )
        return {"logp_gap/mean": mean, "logp_gap/max": most}

    def update(self, optimizer: torch.optim.Optimizer, lr: float, loss: float) -> float:
        """Clip the gradient and take the optimiser's step, unless something is not finite.

        Returns the gradient norm before clipping.
        """
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, self.args.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's optimiser reads it from a tensor
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            optimizer.step()
            self.failures = 0
        else:
            self.failures += 1
            self.skipped += 1
            say(f"loss {loss:g}, gradient norm {norm:g}: update skipped")
        optimizer.zero_grad()
        if self.failures == 3:
            raise StopRun(f"3 updates in a row were not finite; {self.last_good()}")
        return norm

    def report_collapse(self, step: int, metrics: dict[str, float]) -> None:
        """Say so, at most every 10 steps, when all answers are empty or endless."""
        empty, endless = metrics["length"] <= 1, metrics["truncated"] == 1
        if (empty or endless) and step >= self.next_warning:
            what = "empty" if empty else f"cut off at --max-new-tokens {self.args.max_new_tokens}"
            say(f"warning: step {step}: every answer is {what}")
            self.next_warning = step + 10

    def out_of_memory(self, part: str) -> StopRun:
        """Which setting to lower, and to what, after memory ran out in a part of the step."""
        args = self.args
        if part in ("score", "update"):
            half = max(1, args.token_budget // 2)
            what = f"lower --token-budget from {args.token_budget} to {half}"
            if not args.gradient_checkpointing:
                what += "; where that is not enough, add --gradient-checkpointing"
            changes: dict[str, Any] = {"token_budget": half}
        elif device(args).type == "cuda" and args.engine != "transformers":
            less = round(args.gpu_memory * 0.8, 2)
            what = f"lower --gpu-memory from {args.gpu_memory} to {less}"
            changes = {"gpu_memory": less}
        else:
            what, changes = "a new run with a lower --prompts-per-step needs less", {}
        return StopRun(f"out of memory ({part}): {what}; {self.last_good()}", **changes)

    def last_good(self) -> str:
        saved = self.last_checkpoint()
        return f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved yet"

    # -- checkpoints

    def save(self, step: int, policy: nn.Module, tokenizer: Any, **state: Any) -> None:
        """Write a checkpoint every --save-every steps, after the last, and when interrupted.

        state: what has a state_dict, and plain values.
        """
        interrupted = self.interrupted  # read once: a signal may come while this runs
        due = self.args.save_every and step % self.args.save_every == 0
        if not (due or step == self.args.steps or interrupted):
            return
        if not all(weight.isfinite().all() for weight in policy.parameters()):
            raise StopRun(f"the weights are not finite; {self.last_good()}")
        values = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        values["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            values["cuda_rng"] = torch.cuda.get_rng_state()
        checkpoint = self.folder / "checkpoints" / f"step-{step:06d}"
        with files.whole_folder(checkpoint, self.settings) as folder:
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.save(values, folder / "trainer.pt")
            files.flush(self.metrics_file)
        self.remove_old_checkpoints(step)
        self.stopped = interrupted

    def remove_old_checkpoints(self, step: int) -> None:
        """Keep the last --keep-checkpoints up to this step, and the best of those evaluated."""
        accuracy = {row["step"]: row["eval/accuracy"] for row in self.evaluations()}
        saved = [folder for folder in self.checkpoints() if step_of(folder) <= step]
        scored = [folder for folder in saved if step_of(folder) in accuracy]
        best = max(scored, key=lambda folder: accuracy[step_of(folder)], default=None)
        for folder in saved[: -self.args.keep_checkpoints]:
            if folder != best:
                files.remove(folder)

    def checkpoints(self) -> list[Path]:
        """All that are there, the oldest first."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return sorted((f for f in folders if f.name[5:].isdigit()), key=step_of)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files have the sizes they were written with."""
        for folder in reversed(self.checkpoints()):
            if files.is_whole(folder):
                return folder
            say(f"{folder} is damaged; looking for an older checkpoint")
        return None

    def is_finished(self) -> bool:
        """Whether model/ was written at the end of as many steps."""
        model = self.folder / "model"
        return (
            files.is_whole(model)
            and files.read_json(model / "args.json")["steps"] >= self.args.steps
        )

    def restore(self, policy: nn.Module, **state: Any) -> dict[str, Any]:
        """Load the last checkpoint into the policy and into what has a state_dict; the plain
        values come back. Where there is none, nothing is loaded."""
        torch.manual_seed(seed_for(self.args.seed, "training"))
        if not self.checkpoint:
            return {}
        load_weights(policy, self.checkpoint)
        values = torch.load(self.checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        for name, owner in state.items():
            owner.load_state_dict(values[name])
        torch.set_rng_state(values["rng"])
        if torch.cuda.is_available() and "cuda_rng" in values:
            torch.cuda.set_rng_state(values["cuda_rng"])
        return values

    def evaluations(self) -> list[dict[str, float]]:
        """The metrics of the steps with an evaluation."""
        return [row for row in files.read_lines(self.metrics_file) if "eval/accuracy" in row]

    def finish(self, policy: nn.Module, tokenizer: Any) -> None:
        """Write model/, the policy as an ordinary model folder, and say how the run went."""
        self.bar.close()
        self.board.close()
        if self.step < self.args.steps:
            raise KeyboardInterrupt
        with files.whole_folder(self.folder / "model", self.settings) as folder:
            weights = {name: weight.contiguous() for name, weight in merged_weights(policy)}
            base_model(policy).save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
        rows = self.evaluations()
        for label, row in zip(("before", "after"), rows[:1] + rows[-1:], strict=False):
            low, high = row["eval/accuracy_low"], row["eval/accuracy_high"]
            print(
                f"held-out accuracy {label:6}  {row['eval/accuracy']:.3f}  "
                f"95% interval [{low:.3f}, {high:.3f}]  greedy {row['eval/greedy']:.3f}"
            )
        print(f"wall time {time.perf_counter() - self.started:.0f} s")
        print(f"checkpoint {self.folder / 'model'}")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def say(text: str) -> None:
    """A line on the error stream, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


# ------------------------------------------------------------------------------- start and stop


def make_optimizer(policy: nn.Module, args: Any) -> torch.optim.Optimizer:
    """AdamW over the weights that are trained."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.adamw_8bit:  # torchao's: written in PyTorch, and its state saves like any other
        from torchao.optim import AdamW8bit

        return AdamW8bit(weights, **settings)
    return torch.optim.AdamW(weights, **settings, fused=True)


def learning_rate(step: int, args: Any) -> float:
    """Linear warm-up, then constant, or a line or a cosine to 0 at the last step."""
    warmup = args.warmup_steps or math.ceil(args.warmup_ratio * args.steps)
    if step <= warmup:
        return args.lr * step / warmup
    done = (step - warmup) / (args.steps - warmup)
    falls = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return args.lr * falls[args.lr_schedule]


def memory_ran_out(error: Exception) -> bool:
    kinds = torch.OutOfMemoryError, MemoryError
    words = "can't allocate memory", "out of memory"  # PyTorch on a CPU, CUDA's libraries
    return isinstance(error, kinds) or any(part in str(error) for part in words)


def launch(main: Callable[[Any], None], settings: type) -> None:
    """Parse the command line, run, and turn what can go wrong into one clear message."""
    args = parse_args(settings)
    changes: dict[str, Any] = {}
    try:
        return main(args)
    except KeyboardInterrupt:
        what, code = "interrupted", 130
    except (StopRun, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_TROUBLE:
            raise
        what, code, changes = f"stopped: {error}", 1, getattr(error, "changes", {})
    print(f"{what}\ngo on with: {resume_command(args, **changes)}", file=sys.stderr)
    raise SystemExit(code)
