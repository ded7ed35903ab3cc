"""A run: its settings and command line, its folder, its log, its checkpoints, and going on.

    metrics.jsonl     one line a step           rollouts.jsonl   some rollouts of each step
    args.json         the settings              tensorboard/     the same metrics
    checkpoints/      step-000050/ and so on    model/           the final policy, ready to load

A checkpoint is written under another name and renamed when it is whole, so a kill at any moment
leaves whole ones. A run that goes on is, in float32 on a CPU, bit for bit the run not stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import inspect
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from engine import StopRun, first_line, load_weights, memory_ran_out, refuse, save_model, seed_for

# ------------------------------------------------------------------------------- settings


@dataclass
class ResumeArgs:
    """What may be given anew with --resume: it changes nothing that is learned."""

    resume: str = ""  # folder of a run to go on with; what follows, to --wandb-project, may change
    steps: int = 150  # training steps, each with a round of rollouts
    eval_dataset: str = "tiny/test.jsonl"  # held-out problems, named as --dataset
    eval_every: int = 50  # steps between evaluations (0: only before and after)
    eval_problems: int = 200  # how many of them are used, the first
    eval_samples: int = 4  # sampled answers to each, beside a greedy one
    save_every: int = 50  # steps between checkpoints (0: only after the last)
    keep_checkpoints: int = 2  # latest checkpoints kept, beside the best
    token_budget: int = 8192 if torch.cuda.is_available() else 16384
    """tokens in a micro-batch: lower it when memory runs out"""
    gradient_checkpointing: bool = False  # less memory, about a third more time
    gpu_memory: float = 0.3  # share of the GPU's memory for vLLM while it generates
    max_logp_gap: float = 0.0
    """stop when engine and trainer differ by more nats; 0: 1e-4 in float32 on a CPU, else 0.2"""
    log_rollouts: int = 1  # groups a step written to rollouts.jsonl
    wandb_project: str = ""  # also log to this project of Weights & Biases


@dataclass
class RunArgs(ResumeArgs):
    """Every setting that no method changes."""

    model: str = "tiny"  # folder or hub name of a causal language model
    dataset: str = "tiny/train.jsonl"  # file, folder or hub name[:config][@split]
    question_column: str = ""  # where the problem is, text or messages; empty: a usual name
    answer_column: str = ""  # where the gold answer is
    system_prompt: str = ""  # for problems that bring none of their own
    instruction: str = ""  # put after each problem; it can ask for a \boxed{} answer
    template_args: str = ""  # for the chat template, such as {"enable_thinking": false}
    max_prompt_tokens: int = 1024  # longer prompts are dropped
    trust_remote_code: bool = False  # run Python code that comes with the model
    prompts_per_step: int = 16  # P: problems in a step
    group_size: int = 8  # G: rollouts of each problem
    max_new_tokens: int = 1024  # T: longest response (tokens)
    temperature: float = 1.0  # of sampling and of every log-probability
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM where it can be used
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the policy lives
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass; auto: bfloat16 on CUDA, else float32"""
    adamw_8bit: bool = False  # AdamW's moments in a quarter of the memory (torchao)
    seed: int = 1  # of everything random
    run_dir: str = ""  # the run's folder; empty: runs/<script>-<seed>-<date>


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_args(settings: type, command: list[str] | None = None) -> Any:
    """A script's settings from its command line; with --resume, from the run's args.json first."""
    module = inspect.getmodule(settings)
    about = {"description": module.__doc__, "args": command}
    args = tyro.cli(settings, **about)
    if not args.resume:
        return args
    try:
        began = json.loads((Path(args.resume) / "args.json").read_text())
        script, content = began.pop("script"), began.pop("content")
        if script != Path(module.__file__).stem:
            refuse("--resume", args.resume, f"is a run of {script}.py")
        began |= {"resume": args.resume, "run_dir": args.resume}
        began = {k: tuple(v) if isinstance(v, list) else v for k, v in began.items()}  # as JSON has
        before = settings(**began)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        refuse("--resume", args.resume, f"is not the folder of a run: {first_line(error)}")
    args, began = tyro.cli(settings, **about, default=before), vars(before)
    anew = {field.name for field in fields(ResumeArgs)}
    schedules = {args.lr_schedule, getattr(args, "schedule", "constant")}  # p, in holderpo.py
    if schedules != {"constant"} or args.warmup_ratio:  # then every step depends on the last
        anew.remove("steps")
    for name, value in vars(args).items():
        if name in content and content_of(value) != content[name]:
            refuse(flag(name), value, f"does not hold what this run began with ({began[name]})")
        if name not in anew | content.keys() and value != began[name]:
            refuse(flag(name), value, f"this run began with {began[name]}: start a new one")
    return args


def content_of(name: str) -> str:
    """What tells a model or a data set from another, wherever it lies: the size, the beginning and
    the end of its files; or its name on the hub."""
    path, total = Path(name), hashlib.sha256()
    for file in (path, *sorted(path.rglob("*"))):
        if file.is_file() and file.suffix not in (".md", ".pyc"):
            size = file.stat().st_size
            with file.open("rb") as data:
                total.update(f"{file.relative_to(path)} {size} ".encode() + data.read(1 << 20))
                data.seek(max(0, size - (1 << 20)))
                total.update(data.read())
    return total.hexdigest() if path.exists() else name


NOT_ZERO = (
    *("steps", "prompts_per_step", "group_size", "max_new_tokens", "max_prompt_tokens", "buckets"),
    *("token_budget", "eval_problems", "eval_samples", "keep_checkpoints", "updates_per_rollout"),
    *("generation_rounds", "temperature", "lr", "max_grad_norm", "gpu_memory", "sigma_target"),
)
BELOW_ONE = ("warmup_ratio", "clip_low", "lora_dropout", "gpu_memory")
SIGNED = ("p_start", "p_end")  # which may be below 0
NEEDS = {"lora_alpha": "lora_rank", "lora_dropout": "lora_rank"}
NEEDS |= {"generation_rounds": "dynamic_sampling"}  # the first changes nothing without the second


def check(args: Any) -> None:
    """Refuse what cannot work, before anything heavy is loaded."""

    def must(name: str, fine: Any, why: str) -> None:
        if not fine:
            refuse(flag(name), getattr(args, name), why)

    for name, value in vars(args).items():
        if isinstance(value, int | float) and name not in SIGNED:
            must(name, 0 <= value < math.inf, "must be at least 0 and finite")
            must(name, value or name not in NOT_ZERO, "must be above 0")
            must(name, value < 1 or name not in BELOW_ONE, "must be below 1")
    must("group_size", args.group_size > 1, "must be at least 2")
    shares = f"must divide --prompts-per-step {args.prompts_per_step}"
    must("updates_per_rollout", args.prompts_per_step % args.updates_per_rollout == 0, shares)
    longest = f"must be at most --max-new-tokens {args.max_new_tokens}"
    must("overlong_buffer", args.overlong_buffer <= args.max_new_tokens, longest)
    both = f"cannot be given together with --warmup-steps {args.warmup_steps}"
    must("warmup_ratio", not (args.warmup_ratio and args.warmup_steps), both)
    for name, needed in NEEDS.items():
        default = getattr(args, name) == getattr(type(args), name)
        must(name, getattr(args, needed) or default, f"changes nothing without {flag(needed)}")
    has = importlib.util.find_spec
    must("engine", args.engine != "vllm" or has("vllm"), "vLLM is not installed; see README.md")
    must("wandb_project", not args.wandb_project or has("wandb"), "wandb is not installed")
    fit = has("torchao") and torch.cuda.is_available()
    must("adamw_8bit", not args.adamw_8bit or fit, "needs torchao and a CUDA device")
    must("device", args.device != "cuda" or torch.cuda.is_available(), "no CUDA device is there")


# ------------------------------------------------------------------------------- files

UNFINISHED = ".unfinished"  # ends the name of what must not be taken for whole


def lock(folder: Path) -> Any:
    """Make a folder, and this process its only writer for as long as the returned file is open.
    What a crash has left halfway is deleted."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in [*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"checkpoints/*{UNFINISHED}")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    except BlockingIOError:
        refuse("--run-dir", folder, "another run is writing here")
    except OSError as error:
        refuse("--run-dir", folder, f"cannot be written: {error.strerror}")
    return file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's jsonl file, but for those that a crash or a disk has damaged."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, LookupError):
            rows += [row] if (row := json.loads(line))["step"] >= 0 else []
    return rows


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file or a folder to write under another name, which is on the disk before it is renamed:
    what has the name is whole. Raises StopRun where it cannot be written."""
    partial = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for written in (*partial.rglob("*"), partial):
            handle = os.open(written, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if partial.is_dir():
            remove(path)
        partial.rename(path)
    except Exception as error:  # torch and safetensors have kinds of their own
        remove(partial)
        if isinstance(error, StopRun):
            raise
        why = f"{path} cannot be written; is the disk full? ({first_line(error)})"
        raise StopRun(why) from error


def remove(folder: Path) -> None:
    """Delete a folder, if it is there; a crash halfway leaves nothing under its name."""
    if folder.is_dir():
        doomed = folder.with_name(f"{folder.name}.old{UNFINISHED}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


# ------------------------------------------------------------------------------- the run


def say(text: str) -> None:
    print(text, file=sys.stderr)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


HOPELESS = {  # metrics that mean, at this value, that nothing can be learned
    "boxed": (0, "no response held a \\boxed{} answer: --instruction can ask for one"),
    "zero_variance": (1, "all rewards of each group were equal, which teaches GRPO nothing"),
    "truncated": (1, "every response was cut off at --max-new-tokens"),
    "length": (1, "every response was empty"),
}


class Run:
    """A run's folder, its clock, its log and its checkpoints."""

    def __init__(self, args: Any) -> None:
        check(args)
        script = Path(inspect.getfile(type(args))).stem
        args.run_dir = args.run_dir or time.strftime(f"runs/{script}-{args.seed}-%Y%m%d-%H%M%S")
        self.args, self.folder = args, Path(args.run_dir)
        self.lock = lock(self.folder)
        self.logs = self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"
        last = max(map(step_of, self.checkpoints()), default=0)
        if not args.resume and (self.logs[0].exists() or last):
            refuse("--run-dir", self.folder, f"holds a run; --resume {self.folder} goes on with it")
        if args.steps < last:
            refuse("--steps", args.steps, f"the run has come to step {last}")
        if args.steps == last and (self.folder / "model").exists():
            print(f"{self.folder} is finished: {args.steps} steps; more --steps would go on")
            raise SystemExit(0)
        content = {name: content_of(getattr(args, name)) for name in ("model", "dataset")}
        self.settings = {"script": script, "content": content, **vars(args), "resume": ""}
        self.started = time.perf_counter()
        self.step = self.failures = self.skipped = 0
        self.hopeless = dict.fromkeys(HOPELESS, 0)
        self.interrupted = self.stopped = False

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to come, from 1. Ctrl-C and SIGTERM let a step end and be saved;
        a second one stops at once."""
        numbers = signal.SIGINT, signal.SIGTERM
        before = [signal.signal(number, self.interrupt) for number in numbers]
        try:
            while self.step < self.args.steps and not self.stopped:
                self.step_started, self.seconds, self.skipped = time.perf_counter(), {}, 0
                yield self.step + 1
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        os.write(2, b"\nfinishing the step, then saving; Ctrl-C again stops at once\n")

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Adds what runs inside to the step's seconds of that part."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def log(self, step: int, metrics: dict[str, float], tokens: int = 0) -> None:
        """Write one step's metrics everywhere they are shown."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if tokens:
            total = time.perf_counter() - self.step_started
            parts = self.seconds | {"other": total - sum(self.seconds.values()), "step": total}
            metrics |= {f"seconds/{part}": spent for part, spent in parts.items()}
            metrics |= {"tokens_per_second": tokens / total, "skipped_updates": self.skipped}
            if torch.cuda.is_available():
                metrics["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.warn(metrics)
        with self.logs[0].open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()  # or a kill would lose the last two minutes
        self.step = step
        names = "reward", "length", "entropy", "eval/accuracy"
        shown = (f"{name} {metrics[name]:.3f}" for name in names if name in metrics)
        say("  ".join([f"step {step} of {self.args.steps}", *shown]))

    def warn(self, metrics: dict[str, float]) -> None:
        """Say it once when nothing can be learned for 5 steps in a row."""
        for name, (value, why) in HOPELESS.items():
            self.hopeless[name] = self.hopeless[name] + 1 if metrics.get(name) == value else 0
            if self.hopeless[name] == 5:
                say(f"warning: for 5 steps {why}")

    def log_rollouts(self, step: int, rollouts: Any, rewards: Tensor, **per_token: Tensor) -> None:
        """Write the first --log-rollouts groups, with a value a token of each [P, G, T] given."""
        per_token["tokens"] = rollouts.tokens
        with self.logs[1].open("a") as file:
            for p, problem in enumerate(rollouts.problems[: self.args.log_rollouts]):
                for g, text in enumerate(rollouts.texts[p]):
                    row = {"step": step, "problem": problem.text, "answer": problem.answer}
                    row |= {"rollout": g, "text": text, "reward": rewards[p, g].item()}
                    live = rollouts.mask[p, g]
                    row |= {name: values[p, g][live].tolist() for name, values in per_token.items()}
                    file.write(json.dumps(row) + "\n")

    def update(self, optimizer: torch.optim.Optimizer, lr: float, loss: float) -> float:
        """Clip the gradient, whose norm is returned, and take the optimiser's step, unless loss or
        gradient are not finite."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, self.args.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            self.failures = 0
            for group in optimizer.param_groups:
                torchao = isinstance(group["lr"], Tensor)  # which wants a tensor
                group["lr"] = torch.full_like(group["lr"], lr) if torchao else lr
            optimizer.step()
        else:
            self.failures, self.skipped = self.failures + 1, self.skipped + 1
            say(f"loss {loss:g}, gradient norm {norm:g}: update skipped")
        optimizer.zero_grad()
        if self.failures == 3:
            raise StopRun("3 updates in a row were not finite")
        return norm

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*[0-9]"), key=step_of)

    def restore(self, policy: nn.Module, **state: Any) -> dict[str, Any]:
        """Load the last whole checkpoint, if there is one, into the policy and into what has a
        state_dict, and return its plain values. From here on the run can be logged."""
        needed = sum(w.nbytes * (4 if w.requires_grad else 1) for w in policy.parameters())
        if (free := shutil.disk_usage(self.folder).free) < needed:
            sizes = f"{1e-9 * needed:.1f} GB, and {1e-9 * free:.1f} GB are free"
            refuse("--run-dir", self.folder, f"a checkpoint and model/ need {sizes}")
        torch.manual_seed(seed_for(self.args.seed, "training"))
        values: dict[str, Any] = {}
        for folder in reversed(self.checkpoints()):
            try:
                values = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
                load_weights(policy, folder)
                for name, owner in state.items():
                    owner.load_state_dict(values[name])
                torch.set_rng_state(values["rng"])
                self.step = step_of(folder)
                break
            except Exception as error:
                if memory_ran_out(error):
                    raise
                say(f"{folder} is damaged ({first_line(error)}); looking for an older checkpoint")
        if self.checkpoints() and not self.step:
            refuse("--resume", self.folder, "none of its checkpoints can be loaded")
        self.open_logs()
        return values

    def open_logs(self) -> None:
        """Write the settings; drop what was logged after the checkpoint; start the boards."""
        from torch.utils.tensorboard import SummaryWriter

        with whole(self.folder / "args.json") as partial:
            partial.write_text(json.dumps(self.settings, indent=1))
        first = self.step + 1 if self.step else 0  # step 0 is logged too
        for path in self.logs:
            rows = [row for row in read_lines(path) if row["step"] < first]
            with whole(path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        remove(self.folder / "model")  # of fewer steps
        if self.args.wandb_project:
            import wandb

            mark = self.folder / "wandb_id"  # of this run, not of the folder's name
            if not mark.exists():
                with whole(mark) as partial:
                    partial.write_text(secrets.token_hex(4))
            options = {"project": self.args.wandb_project, "name": self.folder.name}
            options |= {"id": mark.read_text(), "resume": "allow", "config": self.settings}
            wandb.init(**options, sync_tensorboard=True)
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=first)

    def save(self, step: int, policy: nn.Module, tokenizer: Any, **state: Any) -> None:
        """Write a checkpoint every --save-every steps, after the last, and when interrupted. state:
        what has a state_dict, and plain values."""
        self.stopped = self.interrupted
        due = self.args.save_every and step % self.args.save_every == 0
        if not (due or step == self.args.steps or self.stopped):
            return
        if not all(weight.isfinite().all() for weight in policy.parameters()):
            raise StopRun("the weights are not finite")
        values = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        with whole(self.folder / "checkpoints" / f"step-{step:06d}") as folder:
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.save(values | {"rng": torch.get_rng_state()}, folder / "trainer.pt")
        rows = read_lines(self.logs[0])
        accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
        there = [f for f in self.checkpoints() if step_of(f) <= step]  # later ones are damaged
        best = max(reversed(there), key=lambda f: accuracy.get(step_of(f), -1))
        for old in there[: -self.args.keep_checkpoints]:
            if old != best:
                remove(old)

    def finish(self, policy: nn.Module, tokenizer: Any) -> None:
        """Write model/, the policy as an ordinary model folder, and say how the run went."""
        self.board.close()
        if self.stopped and self.step < self.args.steps:
            raise KeyboardInterrupt
        with whole(self.folder / "model") as folder:
            save_model(policy, tokenizer, folder)
        rows = [row for row in read_lines(self.logs[0]) if "eval/accuracy" in row]
        for label, row in zip(("before", "after"), rows[:1] + rows[-1:], strict=False):
            low, high = row["eval/accuracy_low"], row["eval/accuracy_high"]
            print(
                f"held-out accuracy {label:6}  {row['eval/accuracy']:.3f}  "
                f"95% interval [{low:.3f}, {high:.3f}]  greedy {row['eval/greedy']:.3f}"
            )
        print(f"wall time {time.perf_counter() - self.started:.0f} s")
        print(f"checkpoint {self.folder / 'model'}")


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


LARGE = "--model {0.model} is too large here; --lora-rank 32 needs less"
MEMORY = {  # where memory ran out: what to change
    "load_policy": LARGE,
    "Run.restore": LARGE,
    "Reference": "--kl {0.kl} takes a second model; --lora-rank 32, or --kl 0, takes none",
    "VLLM": "--gpu-memory {0.gpu_memory} is vLLM's share; --engine transformers takes none",
    "Transformers": "start anew with fewer --prompts-per-step than {0.prompts_per_step}",
    "main": "lower --token-budget {0.token_budget}, or add --gradient-checkpointing",
}


def memory_advice(error: Exception, args: Any) -> str:
    """What to change, by the innermost of these functions in which memory ran out."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_code.co_qualname for frame in reversed(frames)]
    places = [place for name in names for place in MEMORY if place in (name, name.split(".")[0])]
    return MEMORY[places[0]].format(args)


def launch(main: Callable[[Any], None], settings: type) -> None:
    """Parse the command line, run, and turn what can go wrong into one clear message."""
    args = parse_args(settings)
    try:
        return main(args)
    except KeyboardInterrupt:
        what, code = "interrupted", 130
    except Exception as error:
        what, code = f"stopped: {error}", 1
        if memory_ran_out(error):
            what = f"stopped: out of memory: {memory_advice(error, args)}"
        elif not isinstance(error, StopRun | OSError):
            raise
    say(what)
    if Path(args.run_dir, "args.json").exists():
        say("go on with: " + shlex.join(["python", sys.argv[0], "--resume", args.run_dir]))
    raise SystemExit(code)
