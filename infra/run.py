"""A run's folder: settings, logs, checkpoints, signals.

    args.json         the settings              metrics.jsonl    one line per step
    checkpoints/      step-000050/ and so on    rollouts.jsonl   some rollouts of each step
    model/            the final policy          tensorboard/     the same metrics

Checkpoints are written under another name and renamed, so a kill at any moment leaves only complete
ones. In float32 on a CPU a resumed run is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor, nn

from infra.cli import StopRun, first_line, out_of_memory, reject, report, require
from infra.models import device, load_weights, precision_name, save_model, seed_for

# ------------------------------------------------------------------ files

UNFINISHED = ".unfinished"  # suffix of what is being written or deleted


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield another name to write a file or folder under, then rename it to `path`.

    Raises StopRun if it cannot be written.
    """
    partial = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if partial.is_dir():
            delete_folder(path)
        partial.rename(path)
    except Exception as error:  # torch and safetensors raise their own kinds on a full disk
        delete_folder(partial)
        if isinstance(error, StopRun) or out_of_memory(error):
            raise
        cause = first_line(error)
        raise StopRun(f"{path} cannot be written; is the disk full? ({cause})") from error


def delete_folder(folder: Path) -> None:
    """Delete a folder if it exists. It is renamed first, so a kill never leaves half of it."""
    if folder.is_dir():
        doomed = folder.with_name(f"{folder.name}.old{UNFINISHED}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def delete_unfinished(folder: Path) -> None:
    """Delete what a killed run was writing."""
    checkpoints = folder / "checkpoints"
    for path in [*folder.glob(f"*{UNFINISHED}"), *checkpoints.glob(f"*{UNFINISHED}")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def new_folder(name: str) -> str:
    """Create a folder of this name, or with -2, -3, ... added if runs began in the same second."""
    for number in itertools.count(1):
        folder = name if number == 1 else f"{name}-{number}"
        try:
            Path(folder).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # `lock_folder` says why
        return folder


def lock_folder(folder: Path, flag: str) -> filelock.FileLock:
    """Create a folder and make this process its only writer. A kill releases the lock."""
    lock = filelock.FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        reject(flag, folder, "another process is writing here")
    except OSError as error:
        reject(flag, folder, f"cannot be written: {error.strerror}")
    return lock


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, without a last line that a kill left incomplete."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def keep_rows_before(path: Path, step: int) -> None:
    """Discard a jsonl file's rows from a step on, line by line: rollouts.jsonl may be large."""
    path.touch()
    with atomic_write(path) as partial, path.open("rb") as rows, partial.open("wb") as kept:
        for line in rows:
            # A kill can leave the last line incomplete, or without its end.
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] < step:
                    kept.write(line.rstrip(b"\n") + b"\n")


# ------------------------------------------------------------------ metrics


class TokenValues(dict[str, Tensor]):
    """What micro-batches record about each response token of a step, by name: [P, G, T]."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    @torch.no_grad()
    def add(self, batch: Any, **values: Tensor) -> None:
        """Record the values, [p, G, T], of the tokens that a micro-batch trains."""
        for name, value in values.items():
            if name not in self:
                self[name] = torch.zeros_like(self.mask, dtype=torch.float32)
            self[name][batch.problems] += torch.where(batch.trained, value, 0.0)

    def means(self, *names: str) -> dict[str, Tensor]:
        return {name: self[name][self.mask].mean() for name in names}


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of values, [problems]."""
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(-1), [0.025, 0.975])
    return float(low), float(high)


# ------------------------------------------------------------------ the run

# metric: the value at which a step teaches nothing, the warning after five such steps in a row
NOTHING_TO_LEARN = {
    "boxed": (0.0, "no response held a \\boxed{} answer: --instruction can ask for one"),
    "zero_variance": (1.0, "in each group all rewards were equal, so GRPO's advantages are 0"),
}


class Run:
    """The folder, the clock, the log and the checkpoints of one run."""

    def __init__(self, args: Any) -> None:
        self.script = Path(inspect.getfile(type(args))).stem
        name = time.strftime(f"runs/{self.script}-{args.seed}-%Y%m%d-%H%M%S")
        args.run_dir = args.run_dir or new_folder(name)
        # args.json records what auto chose here, so that a run resumed elsewhere keeps it.
        args.device = device(args).type
        args.precision = precision_name(args)
        self.args, self.folder = args, Path(args.run_dir)
        self.metrics_file = self.folder / "metrics.jsonl"
        self.rollouts_file = self.folder / "rollouts.jsonl"
        self.lock = lock_folder(self.folder, "--run-dir")
        self.check_folder()
        delete_unfinished(self.folder)

        self.step = 0  # the last step that was logged
        self.started = time.perf_counter()
        self.seconds: Counter[str] = Counter()  # of the step's parts
        self.skipped_updates = 0  # in this step
        self.failures = 0  # updates in a row that were not finite
        self.idle_steps = dict.fromkeys(NOTHING_TO_LEARN, 0)  # in a row
        self.earlier_gap: float | None = None  # mean engine-trainer gap, to compare later ones with
        self.interrupted = False  # becomes True when a signal comes
        self.stopped = False  # becomes True when the step in which it came is saved

    def check_folder(self) -> None:
        """Reject a folder that holds another run, and exit if the run is finished."""
        checkpoints, model = self.checkpoints(), self.folder / "model"
        last = step_of(checkpoints[-1]) if checkpoints else 0
        if not self.args.resume:
            # A run never overwrites a model or a log; scale/ names its checkpoints checkpoint-10.
            written = [self.metrics_file, self.rollouts_file, model]
            written += self.folder.glob("checkpoint*")
            why = f"holds a run or a model: name another folder, or add --resume {self.folder}"
            require(not any(path.exists() for path in written), "--run-dir", self.folder, why)
        elif model.exists() and not checkpoints:
            reject("--resume", self.folder, "has a model/, but no checkpoint to continue from")

        if self.args.steps < last:
            reject("--steps", self.args.steps, f"the run has already reached step {last}")
        if self.args.steps == last and model.exists():
            print(f"{self.folder} is finished after {last} steps; --steps can extend it")
            raise SystemExit(0)

    def steps(self) -> Iterator[int]:
        """Yield the remaining step numbers, from 1.

        The first SIGINT or SIGTERM finishes the step and saves; a second exits immediately.
        """
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, self.interrupt)
        try:
            while self.step < self.args.steps and not self.stopped:
                self.step_started = time.perf_counter()
                self.seconds, self.skipped_updates = Counter(), 0
                yield self.step + 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        os.write(2, b"\nfinishing the step, then saving; Ctrl-C again exits immediately\n")

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time spent inside to the step's seconds of that part."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():  # not with --device cpu
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - start

    def update_is_finite(self, loss: float, grad_norm: float) -> bool:
        """Whether to take the optimiser's step. Raises StopRun when three in a row are skipped."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.failures = 0
            return True
        self.failures += 1
        self.skipped_updates += 1
        report(f"loss {loss:g}, gradient norm {grad_norm:g}: update skipped")
        if self.failures == 3:
            raise StopRun("3 updates in a row were not finite")
        return False

    # -------------------------------------------------------------- logs

    def log(self, step: int, metrics: dict[str, Any], tokens: int = 0) -> None:
        """Write one step's metrics to metrics.jsonl and TensorBoard, and print some of them.

        tokens: response tokens of a training step; 0 for the evaluation before training.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        if tokens:
            metrics |= self.timing(tokens)
            self.check_health(metrics)
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()  # a kill would lose up to two minutes of events
        self.step = step

        line = f"step {step} of {self.args.steps}"
        for name in ("reward", "length", "entropy", "eval/accuracy"):
            if name in metrics:
                line += f"  {name} {metrics[name]:.3f}"
        report(line)

    def timing(self, tokens: int) -> dict[str, float]:
        total = time.perf_counter() - self.step_started
        other = total - sum(self.seconds.values())
        metrics = {f"seconds/{part}": spent for part, spent in self.seconds.items()}
        metrics |= {"seconds/other": other, "seconds/step": total}
        metrics |= {"tokens_per_second": tokens / total, "skipped_updates": self.skipped_updates}
        if torch.cuda.is_initialized():
            metrics["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics

    def check_health(self, metrics: dict[str, float]) -> None:
        """Warn if nothing could be learned in five steps, or if engine and trainer drift apart."""
        for name, (value, why) in NOTHING_TO_LEARN.items():
            if name == "boxed" and self.args.answer_format != "boxed":
                continue
            idle = metrics.get(name) == value
            self.idle_steps[name] = self.idle_steps[name] + 1 if idle else 0
            if self.idle_steps[name] == 5:
                report(f"warning: for 5 steps {why}")

        gap = metrics.get("logp_gap/mean", 0.0)
        if self.earlier_gap is None:
            self.earlier_gap = gap
        if gap > 0.05:  # more than rounding in bfloat16
            report(f"warning: logp_gap/mean {gap:.2g} is above 0.05")
        elif gap > max(3 * self.earlier_gap, 1e-3):  # below 1e-3 it is rounding
            earlier = f"{self.earlier_gap:.2g}"
            report(f"warning: logp_gap/mean {gap:.2g} is over three times the earlier {earlier}")
            self.earlier_gap = gap

    def log_rollouts(
        self, step: int, rollouts: Any, rewards: Tensor, per_token: dict[str, Tensor]
    ) -> None:
        """Write the first --log-rollouts groups to rollouts.jsonl.

        per_token: tensors [P, G, T], of which each rollout gets its response tokens' values.
        """
        logp, entropy = rollouts.old_logp, rollouts.entropy
        per_token = {"tokens": rollouts.tokens, "logp": logp, "entropy": entropy, **per_token}
        with self.rollouts_file.open("a") as file:
            for p, problem in enumerate(rollouts.problems[: self.args.log_rollouts]):
                for g, text in enumerate(rollouts.texts[p]):
                    row = {
                        "step": step,
                        "problem": problem.text,
                        "answer": problem.answer,
                        "rollout": g,
                        "text": text,
                        "reward": rewards[p, g].item(),
                    }

                    for name, values in per_token.items():
                        row[name] = values[p, g][rollouts.mask[p, g]].tolist()
                    file.write(json.dumps(row) + "\n")

    def open_logs(self) -> None:
        """Write args.json, discard what was logged after the checkpoint, start TensorBoard."""
        from torch.utils.tensorboard import SummaryWriter

        settings = {"script": self.script, **vars(self.args), "resume": ""}
        with atomic_write(self.folder / "args.json") as partial:
            partial.write_text(json.dumps(settings, indent=1))
        first = self.step + 1 if self.step else 0  # the evaluation before training is step 0
        for path in (self.metrics_file, self.rollouts_file):
            keep_rows_before(path, first)
        delete_folder(self.folder / "model")  # of fewer steps
        if self.args.wandb_project:
            import wandb

            path = self.folder.resolve()
            wandb.init(
                project=self.args.wandb_project,
                name=path.name,
                id=f"{path.name}-{seed_for(str(path)):08x}",  # a resumed run continues there
                resume="allow",
                config=settings,
                sync_tensorboard=True,
            )
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=first)

    # -------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, in order of their steps."""
        folders = (self.folder / "checkpoints").glob("step-*")
        complete = [folder for folder in folders if folder.name.removeprefix("step-").isdigit()]
        return sorted(complete, key=step_of)

    def restore(self, policy: nn.Module, **state: Any) -> None:
        """Load the newest checkpoint that loads, if there is one, then open the logs.

        state: objects with a state_dict, under the names that `save` gets.
        """
        torch.manual_seed(seed_for(self.args.seed, "training"))
        checkpoints = self.checkpoints()
        for folder in reversed(checkpoints):
            try:
                self.load(folder, policy, state)
                break
            except Exception as error:  # torch and safetensors raise many kinds
                if isinstance(error, StopRun) or out_of_memory(error):
                    raise
                report(f"{folder} does not load ({first_line(error)}); trying an older checkpoint")
        if checkpoints and not self.step:
            reject("--resume", self.folder, "none of its checkpoints loads")
        self.open_logs()

    def load(self, folder: Path, policy: nn.Module, state: dict[str, Any]) -> None:
        saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        load_weights(policy, folder)
        for name, owner in state.items():
            owner.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        if "cuda_rng" in saved:
            torch.cuda.set_rng_state(saved["cuda_rng"])
        self.step = step_of(folder)

    def save(self, step: int, policy: nn.Module, tokenizer: Any, **state: Any) -> None:
        """Write a checkpoint every --save-every steps, after the last, and when interrupted."""
        self.stopped = self.interrupted
        due = self.args.save_every and step % self.args.save_every == 0
        if not (due or step == self.args.steps or self.stopped):
            return
        for weight in policy.parameters():
            if weight.requires_grad and not weight.isfinite().all():
                raise StopRun("the weights are not finite")

        trainer = {name: owner.state_dict() for name, owner in state.items()}
        trainer["rng"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            trainer["cuda_rng"] = torch.cuda.get_rng_state()  # LoRA dropout on a GPU

        with atomic_write(self.folder / "checkpoints" / f"step-{step:06d}") as folder:
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.save(trainer, folder / "trainer.pt")
        self.delete_old_checkpoints(step)

    def delete_old_checkpoints(self, step: int) -> None:
        """Keep the latest --keep-checkpoints, and the one with the best held-out accuracy."""
        accuracy = {}
        for row in read_lines(self.metrics_file):
            if "eval/accuracy" in row:
                accuracy[row["step"]] = row["eval/accuracy"]
        # A checkpoint of a later step did not load, or the run would have resumed from it.
        loadable = [folder for folder in self.checkpoints() if step_of(folder) <= step]
        # reversed: of several with the same accuracy, the latest
        best = max(reversed(loadable), key=lambda folder: accuracy.get(step_of(folder), -1))
        for folder in loadable[: -self.args.keep_checkpoints]:
            if folder != best:
                delete_folder(folder)

    def finish(self, policy: nn.Module, tokenizer: Any) -> None:
        """Write model/, the policy as an ordinary model folder, and print the result."""
        self.board.close()
        if self.stopped and self.step < self.args.steps:
            raise KeyboardInterrupt  # `launch` prints how to resume

        policy.cpu()  # merging LoRA takes memory, and vLLM has loaded its weights again
        with atomic_write(self.folder / "model") as folder:
            save_model(policy, tokenizer, folder)

        rows = [row for row in read_lines(self.metrics_file) if "eval/accuracy" in row]
        for label, row in (("before", rows[0]), ("after", rows[-1])):
            low, high = row["eval/accuracy_low"], row["eval/accuracy_high"]
            print(
                f"held-out accuracy {label:6}  {row['eval/accuracy']:.3f}  "
                f"95% interval [{low:.3f}, {high:.3f}]  greedy {row['eval/greedy']:.3f}"
            )
        print(f"wall time {time.perf_counter() - self.started:.0f} s")
        print(f"checkpoint {self.folder / 'model'}")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
