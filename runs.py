"""The run: its folder, its clock, its log, its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import Rollouts
from models import base_model, is_lora, merged_weights
from settings import check, parse_args, precision, refuse


class StopRun(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Run:
    """A run's folder, its clock and its log.

    metrics.jsonl     one line a step           rollouts.jsonl   some rollouts of each step
    args.json         the settings              tensorboard/     the same metrics
    checkpoints/      step-000050/ and so on    model/           the final policy, ready to load
    """

    def __init__(self, args: Any, script: str) -> None:
        check(args)
        script = Path(script).stem
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.args = args
        self.folder = Path(args.run_dir or f"runs/{script}-{args.seed}-{stamp}")
        self.started = self.step_started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.step, self.state, self.failures, self.interrupted = 0, {}, 0, False
        metrics = self.folder / "metrics.jsonl"
        if args.resume and not args.run_dir:
            refuse("--resume", "", "needs --run-dir, the folder of the run to go on with")
        if metrics.exists() and not args.resume:
            refuse("--run-dir", self.folder, "already holds a run; add --resume to go on with it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = (self.folder / "lock").open("w")
        except OSError as error:
            refuse("--run-dir", self.folder, f"cannot be written: {error.strerror}")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            refuse("--run-dir", self.folder, "another run is writing here")
        self.checkpoint = self.last_checkpoint() if args.resume else None
        if self.checkpoint:
            self.check_settings()
            self.step = int(self.checkpoint.name.removeprefix("step-"))
        for log in (metrics, self.folder / "rollouts.jsonl"):
            keep_steps(log, self.step if self.checkpoint else -1)
        write_whole(self.folder / "args.json", json.dumps(dataclasses.asdict(args), indent=1))
        self.open_boards()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)

    # -- steps and time

    def steps(self) -> Iterator[int]:
        """Step numbers from where the run stands to --steps; 1 is the first."""
        while self.step < self.args.steps and not self.interrupted:
            self.step_started, self.seconds = time.perf_counter(), {}
            yield self.step + 1

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Adds what runs inside to the step's seconds of that part."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C: finish the step and save. A second one stops at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nfinishing the step, then saving; Ctrl-C again stops at once", file=sys.stderr)

    # -- log

    def open_boards(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)
        self.wandb = None
        if self.args.wandb_project:
            try:
                import wandb
            except ImportError:
                refuse("--wandb-project", self.args.wandb_project, "wandb is not installed")
            settings = dataclasses.asdict(self.args)
            self.wandb = wandb.init(
                project=self.args.wandb_project,
                name=self.folder.name,
                id=hashlib.blake2b(str(self.folder).encode(), digest_size=8).hexdigest(),
                resume="allow",
                config=settings,
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
        append_line(self.folder / "metrics.jsonl", {"step": step, **metrics})
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
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
        plain = self.bar.disable and step % max(1, self.args.steps // 20) == 0
        if "eval/accuracy" in metrics:
            low, high = metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]
            shown["held-out"] = metrics["eval/accuracy"]
            line = "  ".join(f"{k} {v:.3f}" for k, v in shown.items())
            tqdm.write(f"step {step}  {line} [{low:.3f}, {high:.3f}]", file=sys.stderr)
        elif plain and step:
            line = "  ".join(f"{k} {v:.3f}" for k, v in shown.items())
            print(f"step {step}  {line}", file=sys.stderr)

    def log_rollouts(
        self, step: int, rollouts: Rollouts, rewards: Tensor, **per_token: Tensor
    ) -> None:
        """Write the first --log-rollouts groups, with a value a token of each [P, G, T] given."""
        for p in range(min(self.args.log_rollouts, len(rollouts.problems))):
            for g, text in enumerate(rollouts.texts[p]):
                live = rollouts.mask[p, g]
                values = {k: v[p, g][live].tolist() for k, v in per_token.items()}
                line = {
                    "step": step,
                    "problem": rollouts.problems[p].text,
                    "answer": rollouts.problems[p].answer,
                    "rollout": g,
                    "text": text,
                    "tokens": rollouts.tokens[p, g][live].tolist(),
                    "reward": rewards[p, g].item(),
                }
                append_line(self.folder / "rollouts.jsonl", line | values)

    # -- guards

    def check_engine(self, rollouts: Rollouts, old_logp: Tensor) -> dict[str, float]:
        """Compare the engine's log-probabilities with the trainer's; stop when they drift apart:
        then the engine does not hold the policy's weights."""
        sampled = rollouts.mask & rollouts.engine_logp.isfinite()
        gap = (rollouts.engine_logp - old_logp)[sampled].abs()
        mean, most = gap.mean().item(), gap.max().item()
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
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, self.args.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            self.failures = 0
        else:
            self.failures += 1
            print(f"loss {loss}, gradient norm {norm}: update skipped", file=sys.stderr)
        optimizer.zero_grad()
        if self.failures == 3:
            raise StopRun(f"3 updates in a row were not finite; {self.last_good()}")
        return norm

    def last_good(self) -> str:
        saved = self.last_checkpoint()
        return f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved yet"

    # -- checkpoints

    def save(self, step: int, policy: nn.Module, tokenizer: Any, **state: Any) -> None:
        """Every --save-every steps, after the last, and when interrupted: write a checkpoint into
        a temporary folder, then rename it, so that it is whole or not there.

        state: what has a state_dict, and plain values.
        """
        due = self.args.save_every and step % self.args.save_every == 0
        if not (due or step == self.args.steps or self.interrupted):
            return
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        torn = folder.with_name("." + folder.name)
        shutil.rmtree(torn, ignore_errors=True)
        policy.save_pretrained(torn)
        tokenizer.save_pretrained(torn)
        values = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        values["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            values["cuda_rng"] = torch.cuda.get_rng_state_all()
        torch.save(values, torn / "trainer.pt")
        write_whole(torn / "args.json", json.dumps(dataclasses.asdict(self.args), indent=1))
        sizes = {f.name: f.stat().st_size for f in torn.iterdir()}
        write_whole(torn / "sizes.json", json.dumps(sizes))
        shutil.rmtree(folder, ignore_errors=True)
        torn.rename(folder)
        rows = [row for row in self.metrics() if "eval/accuracy" in row]
        best = max(rows, key=lambda row: row["eval/accuracy"], default={"step": step})["step"]
        saved = sorted(folder.parent.glob("step-*"))
        for old in saved[: -self.args.keep_checkpoints or None]:
            if old.name != f"step-{best:06d}":
                shutil.rmtree(old)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files have the sizes they were written with."""
        for folder in sorted((self.folder / "checkpoints").glob("step-*"), reverse=True):
            with contextlib.suppress(OSError, ValueError):
                sizes = json.loads((folder / "sizes.json").read_text())
                if all((folder / name).stat().st_size == size for name, size in sizes.items()):
                    return folder
            print(f"{folder} is damaged; looking for an older checkpoint", file=sys.stderr)
        return None

    def check_settings(self) -> None:
        """Refuse to go on with other settings than the run began with, but for harmless ones."""
        before = json.loads((self.checkpoint / "args.json").read_text())
        for name, value in json.loads(json.dumps(dataclasses.asdict(self.args))).items():
            if name not in self.args.harmless and before.get(name, value) != value:
                flag = "--" + name.replace("_", "-")
                refuse(flag, value, f"this run began with {before[name]}; start a new one")

    def restore(self, policy: nn.Module, **state: Any) -> dict[str, Any]:
        """Load the last checkpoint into the policy and into what has a state_dict; the plain
        values come back. Without --resume nothing happens."""
        if not self.checkpoint:
            return {}
        from safetensors.torch import load_file

        weights = {}
        for file in sorted(self.checkpoint.glob("*.safetensors")):
            weights |= load_file(file)
        if is_lora(policy):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(policy, weights)
        else:
            policy.load_state_dict(weights, strict=False)  # a tied LM head is stored once
        values = torch.load(self.checkpoint / "trainer.pt", weights_only=True)
        for name, owner in state.items():
            owner.load_state_dict(values[name])
        torch.set_rng_state(values["rng"])
        if torch.cuda.is_available() and "cuda_rng" in values:
            torch.cuda.set_rng_state_all(values["cuda_rng"])
        return values

    def metrics(self) -> list[dict[str, float]]:
        return read_lines(self.folder / "metrics.jsonl")

    def finish(self, policy: nn.Module, tokenizer: Any) -> None:
        """Write model/, the policy as an ordinary model folder, and say how the run went."""
        self.bar.close()
        self.board.close()
        if self.interrupted:
            raise KeyboardInterrupt
        base = base_model(policy)
        weights = {name: weight.contiguous() for name, weight in merged_weights(policy)}
        base.save_pretrained(self.folder / "model", state_dict=weights)
        tokenizer.save_pretrained(self.folder / "model")
        scored = [row for row in self.metrics() if "eval/accuracy" in row]
        for label, row in (("before", scored[0]), ("after", scored[-1])):
            accuracy, greedy = row["eval/accuracy"], row["eval/greedy"]
            low, high = row["eval/accuracy_low"], row["eval/accuracy_high"]
            print(
                f"held-out accuracy {label:6}  {accuracy:.3f}  "
                f"95% interval [{low:.3f}, {high:.3f}]  greedy {greedy:.3f}"
            )
        print(f"wall time {time.perf_counter() - self.started:.0f} s")
        print(f"checkpoint {self.folder / 'model'}")


def append_line(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, but for lines that a crash or a disk has damaged."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def keep_steps(path: Path, last: int) -> None:
    """Drop the rows after a step: the run will write them again."""
    if path.exists():
        rows = [row for row in read_lines(path) if row["step"] <= last]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def learning_rate(step: int, args: Any) -> float:
    """Linear warm-up, then constant or a cosine to 0 at the last step."""
    warm = min(1.0, step / max(1, args.warmup_steps))
    if args.lr_schedule == "constant":
        return args.lr * warm
    done = max(0, step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * done))


def launch(main: Callable[[Any], None], settings: type) -> None:
    """Parse the command line, run, and turn what can go wrong into one clear message."""
    args = parse_args(settings)
    try:
        main(args)
    except StopRun as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted: go on with the same command and --resume --run-dir", file=sys.stderr)
        raise SystemExit(130) from None
